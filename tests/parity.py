#!/usr/bin/env python3
"""Print the distance to the reference, largest error over largest value, of every stage.

    python tests/parity.py                            # the cases of golden/
    python tests/parity.py CHECKPOINT REFERENCE.npz   # what make_golden.py CHECKPOINT REFERENCE.npz computed
    python tests/parity.py --schedulers CHECKPOINT [SECONDS]   # instead: how far fewer steps are from 200 of DDIM
    python tests/parity.py --bfloat16 CHECKPOINT [SECONDS]     # instead: how far bfloat16 is from float32
"""
import concurrent.futures
import multiprocessing
import pathlib
import sys
import types
import warnings

import numpy as np
from mindspore import ops

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from conftest import CASES, GOLDEN, case_config, case_options, relative_error  # noqa: E402

import layers  # noqa: E402
import musicldm  # noqa: E402
import weights  # noqa: E402


def distances(name, cfg, params, expected, options):
    steps, prompt = [], CASES[name]["prompt"]
    audio = musicldm.generate(cfg, prompt, params, **options, callback=lambda step, timestep, x: steps.append(x))
    return [relative_error(musicldm.encode_prompt(cfg, params, prompt), expected["prompt_embeds"]),
            max(map(relative_error, steps, expected["step_latents"])),
            relative_error(musicldm.decode_latents(cfg, params, steps[-1]), expected["mel"]),
            relative_error(audio, expected["audio"])]


def schedulers(checkpoint, seconds=2.56):
    """RMS log-mel distance of every scheduler, at some numbers of steps, from 200 steps of DDIM on the same latents."""
    cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, checkpoint)
    params, counts = weights.load_params(cfg), (10, 20, 25, 50)

    def mel(scheduler, steps, seed=0):
        return musicldm.generate(cfg, CASES["guided"]["prompt"], params, scheduler=scheduler, num_inference_steps=steps,
                                 seed=seed, guidance_scale=2.0, audio_length_in_s=float(seconds), output_type="mel")

    def distance(result):
        return f"{np.sqrt(np.mean((result - expected) ** 2)):.4f}"

    expected = mel("ddim", 200)
    print("| scheduler | " + " | ".join(f"{n} steps" for n in counts) + " | UNet evaluations |\n|" + "---|" * 6)
    for name in musicldm.SCHEDULERS:
        evaluations = [str(len(musicldm.scheduler_timesteps(name, n, cfg["schedule"]))) for n in counts]
        print(f"| {name} | " + " | ".join(distance(mel(name, n)) for n in counts) + f" | {', '.join(evaluations)} |")
    print(f"\nFor scale, 200 steps of DDIM with another seed: {distance(mel('ddim', 200, seed=1))}")


def rounded(x):
    """float32 to the 8 significant bits of bfloat16 (Dekker, 1971): MindSpore leaves out a cast there and back."""
    wide = x * (2 ** 16 + 1)
    return wide - (wide - x)


def of_rounded(primitive):
    """ops.MatMul or ops.BatchMatMul with both factors rounded."""
    def constructor(transpose_b=False):
        def product(a, b):
            return primitive(transpose_b=transpose_b)(rounded(a), rounded(b))
        return product
    return constructor


def latents_and_mels(checkpoint, seconds, seed, in_bfloat16):
    """Of 20 and 200 steps; in bfloat16 as with AMX: the factors of every product rounded, sums in float32."""
    if in_bfloat16:  # in a process of its own: what is compiled stays compiled
        layers.products_are_exact = lambda: False
        layers.ops = sys.modules["rounding_ops"] = types.ModuleType("rounding_ops")
        vars(layers.ops).update({**vars(ops), "__name__": "rounding_ops", "MatMul": of_rounded(ops.MatMul),
                                 "BatchMatMul": of_rounded(ops.BatchMatMul)})
    cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, checkpoint)
    params, arrays = weights.load_params(cfg), []
    for steps in (20, 200):
        latents = musicldm.generate(cfg, CASES["guided"]["prompt"], params, num_inference_steps=steps, seed=seed,
                                    audio_length_in_s=float(seconds), output_type="latent")
        arrays += [latents, musicldm.decode_latents(cfg, params, latents)]
    return arrays


def bfloat16(checkpoint, seconds=2.56):
    """RMS distances of latents and log-mel from float32's, of bfloat16 as it would be with AMX and of another seed."""
    def in_new_process(*given):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(latents_and_mels, checkpoint, seconds, *given).result()

    names = [f"{what}, {steps} steps" for steps in (20, 200) for what in ("latents", "log-mel")]
    print("| | bfloat16 | another seed |\n|---|---|---|")
    for name, x, y, z in zip(names, *(in_new_process(*given) for given in ((0, False), (0, True), (1, False)))):
        print(f"| {name} | " + " | ".join(f"{np.sqrt(np.mean((array - x) ** 2)):.4f}" for array in (y, z)) + " |")


def main():
    warnings.simplefilter("ignore")
    if sys.argv[1:2] == ["--schedulers"]:
        return schedulers(*sys.argv[2:])
    if sys.argv[1:2] == ["--bfloat16"]:
        return bfloat16(*sys.argv[2:])
    path = sys.argv[2] if sys.argv[1:] else GOLDEN / "arrays.npz"
    names, params = ["guided"] if sys.argv[1:] else list(CASES), None
    print("| | prompt vector | latents, worst step | log-mel | waveform |\n|---|---|---|---|---|")
    for name in names:
        with np.load(path) as file:
            expected = {key.split(".")[1]: file[key] for key in file.files if key.startswith(f"{name}.")}
        cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, sys.argv[1]) if sys.argv[1:] else case_config(name)
        params = params or weights.load_params(cfg)
        options = {**case_options(name), "latents": expected["in_latents"],
                   "audio_length_in_s": expected["audio"].shape[1] / cfg["vocoder"]["sampling_rate"]}
        print(f"| {name} | " + " | ".join(f"{x:.0e}" for x in distances(name, cfg, params, expected, options)) + " |")


if __name__ == "__main__":
    main()
