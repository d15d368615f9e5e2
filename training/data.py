"""A corpus of music on disk: `manifest.jsonl`, one JSON object a line, and the audio files that it names.

    {"audio": "audio/0001.flac", "captions": ["slow sad piano"], "tempo": 80, "downbeats": [0.0, 3.0, 6.0]}

audio: a path beside the manifest, of any rate and number of channels that soundfile reads
captions: a list of texts; only clap needs them
tempo (BPM) and downbeats (seconds): where they are known; other keys are left alone
split: "train" if it is not stated; what is of another split is not trained on
"""
import collections
import difflib
import json
import math
import pathlib

import numpy as np
import soundfile

import musicldm
from weights import SPECIAL_TOKENS, InputError, byte_characters, fits, one_line, unknown

SILENCE = 1e-4  # a file whose largest sample is below this is silent: -80 dB
TEMPO = (20, 400)  # BPM
KEYS = ("audio", "captions", "tempo", "downbeats", "split")


def problem_with(folder, record):
    """What is wrong with one object of a manifest, as a text; None if nothing is."""
    if not isinstance(record, dict) or not isinstance(record.get("audio"), str):
        return "valid is an object with the key audio, a path beside the manifest"
    for name in record:
        if name not in KEYS and difflib.get_close_matches(name, KEYS, 1, 0.8):
            return str(unknown("key", name, KEYS))
    captions, tempo, downbeats = record.get("captions", []), record.get("tempo"), record.get("downbeats") or []
    if not isinstance(captions, list) or not all(isinstance(text, str) and text.strip() for text in captions):
        return f"captions is {captions!r:.80}; valid: a list of texts"
    if tempo is not None and not (fits(tempo, 1.0) and TEMPO[0] <= tempo <= TEMPO[1]):
        return f"tempo is {tempo!r:.80}; valid: {TEMPO[0]} to {TEMPO[1]} BPM"
    if not isinstance(downbeats, list) or not all(fits(beat, 1.0) for beat in downbeats):
        return f"downbeats is {downbeats!r:.80}; valid: a list of seconds"
    try:
        info = soundfile.info(str(folder / record["audio"]))
        blocks = [np.abs(block).max() for block in soundfile.blocks(str(folder / record["audio"]), 2 ** 16)]
    except (OSError, RuntimeError, TypeError) as error:  # soundfile's are RuntimeErrors; TypeError: without a header
        there = (folder / record["audio"]).exists()
        return f"cannot read {record['audio']}: {one_line(error) if there else 'there is no such file'}"
    if not np.isfinite(blocks).all():
        return f"{record['audio']} holds NaN or Inf"
    if not blocks or max(blocks) <= SILENCE:
        return f"{record['audio']} is {'silent' if blocks else 'empty'}"
    if any(not 0 <= beat <= info.duration for beat in downbeats) or downbeats != sorted(set(downbeats)):
        return f"downbeats must rise from 0 to the file's end, {info.duration:.2f} s"
    return None


def read_manifest(folder):
    """Every track of a corpus: the manifest's objects, each with `path`, `rate` (Hz) and `samples` of its file.

    All files are read. Raises InputError, one line, that tells up to ten lines that are wrong.
    """
    manifest, tracks, problems = pathlib.Path(folder) / "manifest.jsonl", [], []
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--data: cannot read {manifest}: {one_line(error)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number}: not JSON: {one_line(error)}")
            continue
        problem = problem_with(manifest.parent, record)
        if problem:
            problems.append(f"line {number}: {problem}")
        else:
            path = manifest.parent / record["audio"]
            info = soundfile.info(str(path))
            tracks.append({**record, "downbeats": record.get("downbeats") or [], "path": path, "rate": info.samplerate,
                           "samples": info.frames})
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"--data {manifest}: {'; '.join(problems[:10])}{more}")
    if not tracks:
        raise InputError(f"--data {manifest} names no track; valid: an object a line")
    return tracks


def of_split(tracks, split):
    """The tracks of one split; an InputError if there are none."""
    chosen = [track for track in tracks if track.get("split", "train") == split]
    if not chosen:
        raise InputError(f"--data holds no track of the split {split!r}")
    return chosen


def crop(track, start, seconds, rate):
    """Mono np.float32 (round(seconds * rate),) of a track from `start` seconds on, at `rate` Hz; then silence."""
    first, count = round(start * track["rate"]), math.ceil(seconds * track["rate"])
    audio, _ = soundfile.read(str(track["path"]), count, first, dtype="float32", always_2d=True)
    audio = musicldm.resample(audio.mean(axis=1), track["rate"], rate)[:round(seconds * rate)]
    return np.pad(audio, (0, round(seconds * rate) - len(audio))).astype(np.float32)


def random_crop(track, seconds, rate, rng):
    """`crop` at a random place, from its start if it is shorter."""
    spare = max(0.0, track["samples"] / track["rate"] - seconds)
    return crop(track, rng.uniform(0, spare), seconds, rate)


def learn_vocabulary(texts, size):
    """(vocab, merges) as weights.load_vocabulary returns them: byte-pair encoding learned from texts (Sennrich et al.,
    2016, algorithm 1), of at most `size` tokens: RoBERTa's special ones, the bytes, then what is merged most often."""
    characters = byte_characters()
    words = collections.Counter(tuple(characters[byte] for byte in word.encode())
                                for text in texts for word in musicldm.words(text))
    merges = []
    while len(SPECIAL_TOKENS) + len(characters) + len(merges) < size:
        pairs = collections.Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(" ".join(best))
        rank = {merges[-1]: 0}
        merged = collections.Counter()
        for word, count in words.items():
            merged[tuple(musicldm.byte_pairs(word, rank)) if best[0] in word else word] += count
        words = merged
    tokens = dict.fromkeys([*SPECIAL_TOKENS, *characters, *(merge.replace(" ", "") for merge in merges)])
    return {token: i for i, token in enumerate(tokens)}, {merge: rank for rank, merge in enumerate(merges)}
