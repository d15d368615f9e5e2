"""The corpus that training composes: notes, captions, sound, files. It is rendered where FluidSynth is installed."""
import json
import os
import re
import shutil

import numpy as np
import pytest
import soundfile
from scipy.signal import stft

from training import corpus
from training.captions import HELD_OUT, WORDS, evaluation_prompts
from weights import InputError

INSTALLED = shutil.which("fluidsynth") is not None and os.path.isfile(corpus.BANK)
# Krumhansl and Kessler, 1982: how well each pitch class fits a key, from the tonic up
PROFILES = {"major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
            "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)}


@pytest.fixture(scope="module")
def clips():
    return [corpus.compose(index, seed=5) for index in range(240)]


def clip_captions(clips):
    return [corpus.captions(clip, np.random.default_rng((5, index, 1))) for index, clip in enumerate(clips)]


def sketch(clip):
    """(16000 * 10.24,) clicks at the notes of a clip, as loud as they are: sound without a synthesiser."""
    audio, rng = np.zeros(163840), np.random.default_rng(0)
    for track in clip["tracks"]:
        for onset, _, _, velocity in track["notes"]:
            click = rng.normal(size=320) * np.exp(-np.arange(320) / 80) * velocity / 127
            start = int(onset * 16000)
            audio[start:start + 320] += click[:len(audio) - start]
    return audio


def onset_tempo(audio):
    """BPM by the autocorrelation of the rise of the log spectrum, over frames of 10 ms."""
    power = np.log1p(1e3 * np.abs(stft(audio, 16000, "hann", 1024, 864)[2]))
    rise = np.maximum(0, np.diff(power, axis=1)).sum(0)
    rise -= np.convolve(rise, np.ones(100) / 100, "same")
    correlation = np.correlate(rise, rise, "full")[len(rise) - 1:]
    tempos = np.arange(50, 200, 0.5)
    scores = sum(np.interp(k * 6000 / tempos, np.arange(len(correlation)), correlation) for k in (1, 2, 4))
    return tempos[np.argmax(scores * np.exp(-0.5 * np.log2(tempos / 110) ** 2))]


def test_a_clip_follows_from_seed_and_index(clips):
    for index in (0, 7, 23):
        again = corpus.compose(index, seed=5)
        assert corpus.midi_file(again["tracks"], 10.24) == corpus.midi_file(clips[index]["tracks"], 10.24)
        other = corpus.compose(index, seed=6)
        assert corpus.midi_file(other["tracks"], 10.24) != corpus.midi_file(clips[index]["tracks"], 10.24)
    assert clip_captions(clips[:24]) == clip_captions(clips[:24])


def test_styles_and_splits_are_balanced(clips):
    assert len(corpus.STYLES) == 12
    for style in corpus.STYLES:
        splits = [clip["split"] for clip in clips if clip["style"] == style]
        assert splits.count("train") == 18 and splits.count("validation") == 2
        assert {clip["tempo"] for clip in clips if clip["style"] == style} == set(corpus.STYLES[style][1])


def test_downbeats_are_bars_of_the_tempo(clips):
    for clip in clips:
        bars = 240 / clip["tempo"]
        assert clip["downbeats"][0] == 0 and np.allclose(np.diff(clip["downbeats"]), bars, atol=2e-6)
        assert 10.24 - bars <= clip["downbeats"][-1] < 10.24
        onsets = np.concatenate([track["notes"][:, 0] for track in clip["tracks"]])
        assert all(np.abs(onsets - beat).min() < 0.01 for beat in clip["downbeats"])


def test_notes_are_playable(clips):
    for track in (track for clip in clips for track in clip["tracks"]):
        onset, length, pitch, velocity = track["notes"].T
        assert onset.min() >= 0 and onset.max() < 10.26 and length.min() > 0
        assert 24 <= pitch.min() and pitch.max() <= 96 and 1 <= velocity.min() and velocity.max() <= 127
        for key in set(pitch):  # a pitch never sounds twice at once
            assert (onset[pitch == key][1:] >= (onset + length)[pitch == key][:-1]).all()


def test_no_validation_arrangement_is_in_training():
    def first_phrase(clip):
        """Sixteenths and pitches, without what only humanises them."""
        return str([[(round(onset * clip["tempo"] / 15), pitch) for onset, _, pitch, _ in track["notes"]
                     if onset * clip["tempo"] / 15 < 63.5] for track in clip["tracks"]])

    for number in range(12):
        some = [corpus.compose(number + 12 * turn, seconds=16.0) for turn in range(100)]
        training = {first_phrase(clip) for clip in some if clip["split"] == "train"}
        held_out = {first_phrase(clip) for clip in some if clip["split"] == "validation"}
        assert len(training) > 50 and len(held_out) > 5 and not training & held_out


def test_the_key_is_heard_in_the_notes(clips):
    ranks = []
    for clip in clips:
        if clip["mode"]:
            weight = np.zeros(12)
            for track in clip["tracks"]:
                if not track["drums"]:
                    np.add.at(weight, track["notes"][:, 2].astype(int) % 12, track["notes"][:, 1])
            fits = {(tonic, mode): np.corrcoef(np.roll(profile, tonic), weight)[0, 1]
                    for mode, profile in PROFILES.items() for tonic in range(12)}
            own = fits[corpus.PITCH_NAMES.index(clip["key"]), clip["mode"]]
            ranks.append(sum(fit > own for fit in fits.values()))
    assert np.mean(np.array(ranks) == 0) > 0.5 and np.mean(np.array(ranks) < 3) > 0.9


def test_the_tempo_is_heard_in_the_notes(clips):
    heard = [any(abs(onset_tempo(sketch(clip)) / clip["tempo"] / octave - 1) < 0.05 for octave in (0.5, 1, 2))
             for clip in clips[:60] if clip["style"] != "ambient pads"]
    assert np.mean(heard) > 0.9


def test_captions_are_many_and_never_held_out(clips):
    everything = clip_captions(clips)
    for clip, texts in zip(clips, everything):
        assert len(set(texts)) == len(texts) == 8 and min(map(len, texts)) < 40
        numbers = [int(number) for text in texts for number in re.findall(r"\d+ (?=bpm|beats)", text.lower())]
        assert len(numbers) >= 3 and set(numbers) == {clip["tempo"]}
        assert not ({"sad", "happy", "bright", "melancholic"} & set(" ".join(texts).split()) and clip["mode"] is None)
    texts = [text.lower() for texts in everything for text in texts]
    assert not [text for text in texts for phrase in HELD_OUT if phrase in text]
    assert not {prompt["prompt"].lower() for prompt in evaluation_prompts()} & set(texts)


def test_evaluation_prompts_are_unseen_but_understandable(clips):
    words = {style: set() for style in corpus.STYLES}
    for clip, texts in zip(clips, clip_captions(clips)):
        words[clip["style"]] |= set(re.findall(r"[\w-]+", " ".join(texts).lower()))
    prompts = evaluation_prompts()
    for style, (_, tempos, *_) in corpus.STYLES.items():
        own = [prompt for prompt in prompts if prompt["style"] == style]
        assert len(own) >= 4 and sum(prompt["tempo"] is not None for prompt in own) * 2 == len(own)
        for prompt in own:
            assert any(phrase in prompt["prompt"] for phrase in HELD_OUT), prompt
            assert prompt["tempo"] is None or prompt["tempo"] in tempos and str(prompt["tempo"]) in prompt["prompt"]
            known = set(re.findall(r"[\w-]+", prompt["prompt"]))
            assert len(known & words[style]) >= 2 and known & set(" ".join(WORDS[style][0]).split()), prompt


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for arguments, message in ((["full", "--clips", "12"], "is there"), (["new", "--clips", "0"], "at least 1"),
                               (["new", "--clips", "1", "--seconds", "0"], "1 to 600"),
                               (["new", "--clips", "1", "--seed", "-1"], "at least 0")):
        assert corpus.main([str(tmp_path / arguments[0]), *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setattr(corpus, "BANK", str(tmp_path / "none.sf2"))
    with pytest.raises(InputError, match="fluidsynth and fluid-soundfont-gm"):
        corpus.make_corpus(tmp_path / "new", 1)
    monkeypatch.setattr(corpus, "BANK", str(tmp_path / "full" / "file"))
    with pytest.raises(InputError, match="cannot play its bank" if INSTALLED else "is missing"):
        corpus.make_corpus(tmp_path / "new", 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert corpus.main([str(tmp_path / "new"), "--clips", "1"]) == 2
    assert "fluid-soundfont-gm" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_files_are_whole_loud_in_time_and_the_same_twice(tmp_path):
    if not INSTALLED:  # the message is tested above
        with pytest.raises(InputError):
            corpus.make_corpus(tmp_path / "one", 12)
        return
    for name in ("one", "two"):
        assert corpus.main([str(tmp_path / name), "--clips", "12", "--seed", "3", "--seconds", "8"]) == 0
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 13 and not list(tmp_path.glob("*.part"))
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)
    lines = [json.loads(line) for line in (tmp_path / "one" / "manifest.jsonl").read_text().splitlines()]
    assert [line["style"] for line in lines] == list(corpus.STYLES)
    right = 0
    for line in lines:
        audio, rate = soundfile.read(tmp_path / "one" / line["audio"])
        assert rate == 16000 and audio.shape == (128000,) and np.abs(audio).max() < 0.95
        assert 0.095 < np.sqrt(np.mean(audio ** 2)) < 0.101
        assert np.sqrt(np.mean(audio.reshape(8, -1) ** 2, 1)).min() > 0.01  # no silent second
        right += any(abs(onset_tempo(audio) / line["tempo"] / octave - 1) < 0.05 for octave in (0.5, 1, 2))
    assert right >= 11
