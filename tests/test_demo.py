"""The checkpoint in demo/, heard with numbers as the README plays it."""
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import soundfile
from conftest import ENVIRONMENT, GOLDEN
from test_command_line import ROOT, readme_commands

import musicldm
import weights

sys.path.insert(0, str(ROOT / "training"))
import evaluate

LOOP = ["--prompt", "techno at 130 bpm", "--loop", "--seconds", "2.56", "--waveforms", "3", "--scheduler", "dpm",
        "--steps", "10", "--out", "loop.wav", "--set", "sampling.seed=1"]


def play(home):
    """(folder, what was printed) of the README's commands after the first, in one process; music in takes few steps."""
    folder = home / "play"
    (folder / "demo").mkdir(parents=True)
    _, listen, *music_in = [shlex.split(line)[2:] for line in readme_commands()
                            if line.startswith(".venv/bin/python musicldm.py --prompt")]
    assert len(music_in) == 3
    commands = [listen, *([re.sub("^50$", "2", word) for word in command] for command in music_in), LOOP]
    script = f"import musicldm, sys\nsys.exit(max(map(musicldm.main, {commands})))"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, text=True, stdout=subprocess.PIPE,
                          env={**ENVIRONMENT, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")})
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


pytestmark = pytest.mark.beside([play])


@pytest.fixture
def heard(beside):
    """{name: waveform (samples,) at 16 kHz} of the files that `play` wrote."""
    folder, _ = beside(play)
    found = {path.stem: soundfile.read(path) for path in [*folder.glob("*.wav"), *folder.glob("demo/*.ogg")]}
    assert {rate for _, rate in found.values()} == {16000}
    return {name: audio for name, (audio, _) in found.items()}


def test_it_is_the_published_layout_in_half_the_precision_and_small():
    files = {path.relative_to(ROOT / "demo") for path in (ROOT / "demo").rglob("*") if path.is_file()}
    published = {path.relative_to(GOLDEN / "checkpoint") for path in (GOLDEN / "checkpoint").rglob("*")
                 if path.is_file()}
    assert published - files <= {pathlib.Path("tokenizer", name) for name in (
        "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")}
    assert sum((ROOT / "demo" / path).stat().st_size for path in files) < 16e6
    for path in files:
        if path.suffix == ".safetensors":
            arrays = safetensors.numpy.load_file(ROOT / "demo" / path)
            assert {array.dtype for array in arrays.values() if array.dtype.kind == "f"} == {np.dtype("float16")}
        if path.suffix in (".ogg", ".flac"):
            assert (ROOT / "demo" / path).stat().st_size < 200e3


def test_it_plays_its_own_length_when_nobody_names_weights(heard):
    assert musicldm.load_config()["weights"] == str(ROOT / "demo")
    assert {name: len(audio) for name, audio in heard.items()} == {
        **dict.fromkeys(("music_1", "music_2", "music_3", "variation", "repainted"), 163840), "longer": 323840,
        **dict.fromkeys(("loop_1", "loop_2", "loop_3"), 40960)}
    assert all(0.02 < audio.std() < 0.5 for audio in heard.values())


def test_techno_has_its_tempo(heard):
    assert evaluate.same_tempo(evaluate.tempo(heard["music_1"]), 130)


def test_drums_are_more_percussive_than_strings(heard):
    assert evaluate.percussive_share(heard["music_2"]) > 2 * evaluate.percussive_share(heard["music_3"])


def test_what_is_not_repainted_is_the_music(heard):
    kept, music = np.r_[:4 * 16000, 8 * 16000:163840], np.clip(heard["music_1"], -1, 1)  # ogg goes a little past 1
    assert np.abs(heard["repainted"] - music)[kept].max() <= 2 ** -15
    assert np.abs(heard["repainted"] - music)[4 * 16000:8 * 16000].std() > 0.01
    assert np.abs(heard["longer"][:163840 - 320] - music[:-320]).max() <= 2 ** -15


def test_an_extension_is_as_loud_as_the_music(heard):
    """Where the VAE's encoder heard silence beside what is known, the UNet went on with silence."""
    loudness = heard["longer"][:20 * 16000].reshape(20, 16000).std(1)
    assert loudness[10:].min() > 0.4 * loudness[:10].mean()


def test_a_loop_has_no_seam(heard):
    """Twice in a row, the waveform bends no more where it starts anew than elsewhere."""
    for name in ("loop_1", "loop_2", "loop_3"):
        bend = np.abs(np.diff(np.tile(heard[name], 2), 2))
        assert bend[40957:40961].max() <= np.quantile(bend, 0.999)


def test_the_best_take_comes_first(beside):
    folder, said = beside(play)
    scores = [float(score) for score in re.findall(r"loop_\d.wav .* score (\S+)", said)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and scores[0] > scores[2]
    cfg = musicldm.load_config()
    params = {"text_encoder": weights.load_params(cfg)["text_encoder"]}
    audio = np.stack([soundfile.read(folder / f"loop_{i}.wav", dtype="float32")[0] for i in (1, 2, 3)])
    assert np.allclose(musicldm.score(cfg, LOOP[1], audio, params)[0], scores, atol=2e-3)
