#!/usr/bin/env python3
"""Print the distance to the reference, largest error over largest value, of every stage, and how long each takes.

    python tests/parity.py                            # the cases of golden/, on the device that MindSpore finds
    python tests/parity.py CHECKPOINT REFERENCE.npz   # what make_golden.py CHECKPOINT REFERENCE.npz computed
    python tests/parity.py --schedulers CHECKPOINT [SECONDS]   # instead: how far fewer steps are from 200 of DDIM
    python tests/parity.py --bfloat16 CHECKPOINT [SECONDS]     # instead: how far bfloat16 is from float32
"""
import concurrent.futures
import multiprocessing
import pathlib
import platform
import sys
import timeit
import types
import warnings

import mindspore
import numpy as np
from mindspore import ops

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from conftest import CASES, case_config, case_options, golden_config, reference, relative_error  # noqa: E402

import layers  # noqa: E402
import musicldm  # noqa: E402
import weights  # noqa: E402


BARS = {"float32": (1e-5, 2e-5, 3e-5, 2e-4), "float16": (1e-2, 1e-2, 1e-2, 5e-2)}


def distances(name, cfg, params, expected, options):
    steps, prompt = [], CASES[name]["prompt"]
    audio = musicldm.generate(cfg, prompt, params, **options, callback=lambda step, timestep, x: steps.append(x))
    return [relative_error(musicldm.encode_prompt(cfg, prompt, params), expected["prompt_embeds"]),
            max(map(relative_error, steps, expected["step_latents"])),
            relative_error(musicldm.decode_latents(cfg, steps[-1], params), expected["mel"]),
            relative_error(audio, expected["audio"])]


def seconds(cfg, params):
    """{stage: seconds of a first call, which compiles, and of a second} for 10.24 s with guidance."""
    (samples, size), vectors = musicldm.clip_size(cfg, 10.24), np.eye(2, cfg["text_encoder"]["projection_dim"])
    latents, vectors = np.random.default_rng(0).standard_normal((1, *size), np.float32), vectors.astype(np.float32)
    sampling = {**cfg["sampling"], "num_inference_steps": 10}
    mel = musicldm.decode_latents(cfg, latents, params)
    stages = {"prompt": lambda: musicldm.encode_prompt(cfg, "a slow blues", params),
              "10 UNet steps": lambda: musicldm.denoise(cfg, latents, iter(()), vectors, params, sampling),
              "VAE": lambda: musicldm.decode_latents(cfg, latents, params),
              "vocoder": lambda: musicldm.vocode(cfg, mel, params),
              "audio tower": lambda: musicldm.encode_audio(cfg, np.ones(samples) / 2, params)}
    return {name: [timeit.timeit(call, number=1) for _ in range(2)] for name, call in stages.items()}


def report():
    """All that a report from another device should say, to be pasted as it is."""
    cfg = musicldm.load_config(weights="demo")
    print(f"{weights.device_in_words(cfg)}; MindSpore {mindspore.__version__}, NumPy {np.__version__}, Python "
          f"{platform.python_version()}, {platform.platform()}")
    for dtype, bars in BARS.items():
        print(f"\n| {dtype} | prompt vector | latents, worst step | log-mel | waveform |\n|---|---|---|---|---|")
        print("| bar | " + " | ".join(f"{x:.0e}" for x in bars) + " |")
        params = weights.load_params({**golden_config(), "dtype": dtype})
        for name in CASES:
            found = distances(name, {**case_config(name), "dtype": dtype}, params, reference(name), case_options(name))
            print(f"| {name} | " + " | ".join(f"{x:.0e}{'' if x < bar else ' (over)'}"
                                              for x, bar in zip(found, bars)) + " |", flush=True)
        cfg = {**cfg, "dtype": dtype}
        took = seconds(cfg, weights.load_params(cfg))
        print("\nSeconds, first and second call, on demo/: " + ", ".join(
            f"{name} {first:.2f} and {second:.2f}" for name, (first, second) in took.items()), flush=True)


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
        layers.is_fast = lambda dtype, stride: False
        layers.ops = sys.modules["rounding_ops"] = types.ModuleType("rounding_ops")
        vars(layers.ops).update({**vars(ops), "__name__": "rounding_ops", "MatMul": of_rounded(ops.MatMul),
                                 "BatchMatMul": of_rounded(ops.BatchMatMul)})
    cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, checkpoint)
    params, arrays = weights.load_params(cfg), []
    for steps in (20, 200):
        latents = musicldm.generate(cfg, CASES["guided"]["prompt"], params, num_inference_steps=steps, seed=seed,
                                    audio_length_in_s=float(seconds), output_type="latent")
        arrays += [latents, musicldm.decode_latents(cfg, latents, params)]
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
    if not sys.argv[1:]:
        return report()
    if len(sys.argv) != 3:
        return print(__doc__)
    with np.load(sys.argv[2]) as file:
        expected = {key.split(".")[1]: file[key] for key in file.files}
    cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, sys.argv[1])
    options = {**case_options("guided"), "latents": expected["in_latents"],
               "audio_length_in_s": expected["audio"].shape[1] / cfg["vocoder"]["sampling_rate"]}
    found = distances("guided", cfg, weights.load_params(cfg), expected, options)
    print("| | prompt vector | latents, worst step | log-mel | waveform |\n|---|---|---|---|---|\n| guided | "
          + " | ".join(f"{x:.0e}" for x in found) + " |")


if __name__ == "__main__":
    main()
