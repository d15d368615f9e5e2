#!/usr/bin/env python3
"""Print the distance to the reference, largest error over largest value, of every stage.

    python tests/parity.py                            # the cases of golden/
    python tests/parity.py CHECKPOINT REFERENCE.npz   # what make_golden.py CHECKPOINT REFERENCE.npz computed
"""
import pathlib
import sys
import warnings

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from conftest import CASES, GOLDEN, case_config, case_options, relative_error  # noqa: E402

import musicldm  # noqa: E402
import weights  # noqa: E402


def distances(name, cfg, params, expected, options):
    steps, prompt = [], CASES[name]["prompt"]
    audio = musicldm.generate(cfg, prompt, params, **options, callback=lambda step, timestep, x: steps.append(x))
    return [relative_error(musicldm.encode_prompt(cfg, params, prompt), expected["prompt_embeds"]),
            max(map(relative_error, steps, expected["step_latents"])),
            relative_error(musicldm.decode_latents(cfg, params, steps[-1]), expected["mel"]),
            relative_error(audio, expected["audio"])]


def main():
    warnings.simplefilter("ignore")
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
