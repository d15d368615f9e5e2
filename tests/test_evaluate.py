"""Listening with numbers: each measure against what is known of a signal, and a whole evaluation of noise."""
import json
import math
import pathlib
import sys

import numpy as np
import pytest
import soundfile
from conftest import GOLDEN, golden_config
from scipy import linalg

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "training"))
import data
import evaluate

T = np.arange(round(10.24 * 16000)) / 16000
NOISE = np.random.default_rng(0).standard_normal(len(T))
SCALE = [0, 2, 4, 5, 7, 9, 11, 12]  # C major's


def clicks(bpm):
    return np.exp(-200 * (T % (60 / bpm))) * NOISE


def tones(notes, each=0.64):
    """Notes (semitones above middle C) one after the other."""
    pitch = np.array(notes)[(T / each).astype(int) % len(notes)]
    return np.sin(2 * np.pi * np.cumsum(261.63 * 2 ** (pitch / 12)) / 16000)


@pytest.mark.parametrize("bpm", [60, 84, 100, 128, 140, 174])
def test_the_tempo_of_clicks(bpm):
    assert evaluate.same_tempo(evaluate.tempo(clicks(bpm)), bpm)


def test_tempos_are_the_same_within_a_share_and_octaves():
    same = [other for other in (50, 58, 60, 90, 113, 115, 120, 125, 127, 230, 255, 480)
            if evaluate.same_tempo(other, 120)]
    assert same == [58, 60, 115, 120, 125, 230]


def test_percussion_is_steep_in_time():
    assert evaluate.percussive_share(clicks(120)) > 0.9 and evaluate.percussive_share(tones([0, 7])) < 0.1
    assert evaluate.percussive_share(NOISE) == pytest.approx(0.5, abs=0.1)


def test_the_spectrum_of_noise_and_of_a_tone():
    tone = np.sin(2 * np.pi * 1000 * T)
    assert evaluate.centroid(NOISE) == pytest.approx(4000, rel=0.02)
    assert evaluate.centroid(tone) == pytest.approx(1000, rel=0.05)
    # white noise's power is exponential at each frequency: exp(-Euler's constant) over 1
    assert evaluate.flatness(NOISE) == pytest.approx(math.exp(-np.euler_gamma), rel=0.02)
    assert evaluate.flatness(tone) < 1e-3


def test_what_repeats_itself_with_every_frame_hums():
    assert evaluate.hum(np.tile(NOISE[:160], 1024)) > 0.99
    assert evaluate.hum(NOISE) == pytest.approx(0.02, abs=0.005) and evaluate.hum(tones([0, 4, 7])) < 0.05


def test_a_scale_has_a_key_and_all_notes_have_none():
    (found, clear), (moved, as_clear) = (evaluate.key(tones([note + by for note in SCALE])) for by in (0, 5))
    assert clear > 0.75 and as_clear == pytest.approx(clear, abs=0.1) and evaluate.key(tones(range(12)))[1] < 0.5
    assert found == (0, "major") and moved == (5, "major")


def test_notes_in_another_order_have_the_same_key_and_higher_ones_are_transposed():
    melody = tones(SCALE)
    assert evaluate.transposition(tones(SCALE[::-2] + SCALE[::3]), melody) == 0
    assert [evaluate.transposition(tones([note + by for note in SCALE]), melody) for by in (1, 5, 11)] == [1, 5, 11]


def test_a_jump_is_rougher_than_the_rest():
    audio = np.sin(2 * np.pi * 440 * T)
    assert evaluate.roughness(audio, [16000, 80000]) == pytest.approx(1, abs=0.01)
    audio[80000:] += 0.1
    assert evaluate.roughness(audio, [16000]) < 1.01 and evaluate.roughness(audio, [80100]) > 3


def test_the_nearest_style_counts_each_feature_by_its_spread():
    rng = np.random.default_rng(0)
    known = {"a": rng.normal([0, 0], [1, 100], (50, 2)), "b": rng.normal([8, 0], [1, 100], (50, 2))}
    assert evaluate.nearest_style(np.array([7.0, -50.0]), known) == "b"
    assert evaluate.nearest_style(np.array([1.0, 50.0]), known) == "a"


def test_frechet_distance_of_normal_distributions():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((60, 5)), 2 + rng.standard_normal((70, 5)) @ rng.standard_normal((5, 5))
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert evaluate.frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)
    assert evaluate.frechet_distance(a, a + [3, 0, 0, 0, 4]) == pytest.approx(25)


def test_the_share_of_what_is_near():
    angles = np.radians([0, 10, 30, 90])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert evaluate.share_near(vectors, vectors[:1], 0.95) == 0.5
    assert evaluate.share_near(vectors, vectors[:1], 0.80) == 0.75


@pytest.fixture(scope="module")
def tracks(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("corpus"), []
    for i in range(12):
        style, audio = ("drums alone", clicks(100 + i)) if i % 2 else ("string ensemble", tones([i, i + 7]))
        soundfile.write(folder / f"{i}.wav", 0.3 * audio / np.abs(audio).max(), 16000)
        lines.append({"audio": f"{i}.wav", "style": style, "tempo": 100 + i if i % 2 else None, "key": None,
                      "split": "validation" if i > 7 else "train"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data.read_manifest(folder)


def test_a_whole_evaluation(tracks, params, monkeypatch):
    prompts = [{"prompt": "a drummer", "style": "drums alone", "tempo": 100},
               {"prompt": "violins", "style": "string ensemble", "tempo": None}]
    cfg = golden_config("sampling.num_inference_steps=2")
    alone = evaluate.evaluate(cfg, params, tracks, prompts, ["corpus"], 1, say=lambda text: None)["corpus"]
    assert alone["takes"] == 4 and alone["tempo right"] == alone["style right"] == 1
    assert alone["drums / strings"] > 10 and abs(alone["Frechet distance"]) < 1e-6
    assert alone["key clarity"] > 0.5 and math.isnan(alone["text-audio cosine"])
    monkeypatch.setattr(evaluate, "SECONDS", 0.32)
    found = evaluate.evaluate(cfg, params, tracks, prompts, evaluate.ROWS, 2, say=lambda text: None)
    assert [*found] == [*evaluate.ROWS] and [row["takes"] for row in found.values()] == [4, 4, 4, 4, 4]
    assert all(-1 <= found[row]["text-audio cosine"] <= 1 for row in ("model", "random"))
    assert found["model"] != found["random"] and found["model"]["Frechet distance"] > 0
    settings = {"a": cfg, "b": cfg, "c": golden_config("sampling.num_inference_steps=2", "sampling.guidance_scale=4")}
    compared = evaluate.evaluate(cfg, params, tracks, prompts, seeds=2, settings=settings, say=lambda text: None)
    distances = [row.pop("distance to the first") for row in compared.values()]
    assert distances[:2] == [0, 0] and 0.1 < distances[2] < 10 and compared["a"] == compared["b"] == found["model"]
    text = evaluate.table(found)
    assert text.splitlines()[0] == "|  | corpus | ceiling | model | led | random |" and "nan" not in text


def test_music_in(tracks, params, monkeypatch):
    monkeypatch.setattr(evaluate, "SECONDS", 0.32)
    prompts = [{"prompt": style, "style": style} for style in ("drums alone", "string ensemble")]
    given = [{**track, "key": "C", "mode": "major", "tempo": 100} for track in tracks]
    cfg = golden_config("sampling.num_inference_steps=5", "unet.sample_size=8")
    found = evaluate.music_in(cfg, params, given, prompts, say=lambda text: None)
    assert [*found] == ["others alike", "round trip", "without the clip", "strength 0.2", "strength 0.5",
                        "strength 0.8", "repainted", "extended", "extended, led by the clip",
                        "extended, strength 1"]
    alike, back, without, little, half, most, repainted, extended, led, new = (row["distance to the clip"]
                                                                         for row in found.values())
    assert 0 < alike < back < little < half < most < without  # random weights play no music
    assert extended < repainted < most and max(led, new) < repainted
    assert found["extended"] != found["extended, led by the clip"]
    assert math.isnan(found["strength 0.5"]["roughness of joins"]) and found["extended"]["roughness of joins"] > 0


@pytest.mark.parametrize("arguments, message", [
    (["--rows", "corpus,mode"], "--rows corpus,mode"), (["--seeds", "0"], "--seeds 0"),
    (["--prompts", "0"], "--prompts 0"), (["--settings", "steps=3"], "unknown config key"),
    (["--data", "nowhere"], "cannot read nowhere"), (["--out", "nowhere/a.json"], "--out nowhere/a.json"),
    (["--weights", "nowhere"], "no folder 'nowhere'"),
    ([], "no track to learn the style of acoustic guitar"), (["--set", "sampling.steps=3"], "unknown config key"),
])
def test_mistakes_are_one_line(arguments, message, tracks, capsys):
    given = ["--data", str(tracks[0]["path"].parent), "--weights", str(GOLDEN / "checkpoint"), *arguments]
    assert evaluate.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("evaluate: error: ") and error.count("\n") == 1 and message in error
