"""Music to train on, made from nothing: composes, captions and renders clips of twelve styles.

    python training/corpus.py OUT --clips N --seed S

writes OUT/manifest.jsonl and OUT/audio/*.flac, 16 kHz mono. `compose` returns a clip's notes as data; FluidSynth plays
them with the FluidR3 General MIDI bank (Debian packages fluidsynth and fluid-soundfont-gm). A clip follows from the
seed and its index alone. One line of the manifest is a clip: `audio` (a path beside it), `captions`, `tempo` (BPM),
`downbeats` (seconds), `style`, `key` and `mode` (null for drums alone), `instruments`, `split`.

Breadth is kept small on purpose: few tempos, four keys and `ARRANGEMENTS` arrangements of each style, so that a small
model hears each of them often.
"""
import argparse
import functools
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import soundfile
from scipy.signal import resample_poly

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from training.captions import captions  # noqa: E402
from weights import InputError  # noqa: E402

BANK = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
RATE = 16000
OVERSAMPLED = 3  # FluidSynth does not filter what folds down from above half its rate; 48 kHz holds all of the bank
RMS, KNEE, PEAK = 0.1, 0.6, 0.95  # -20 dBFS
ARRANGEMENTS = 120  # of each style in training; validation draws from others

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PITCH_NAMES = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
DRUMS = {"kick": 36, "rim": 37, "snare": 38, "clap": 39, "hat": 42, "pedal": 44, "open": 46, "crash": 49, "ride": 51,
         "high": 50, "mid": 47, "low": 43, "shaker": 70, "cowbell": 56}
BALANCE = {"snare": 0.85, "crash": 0.55, "high": 0.8, "mid": 0.8, "low": 0.8, "cowbell": 0.6, "shaker": 0.9}

FILLS = {"all": ({"snare": "o.o.*.**"}, {"snare": "**..", "high": "..**", "mid": "....**..", "low": "......**"},
                 {"snare": "*.**", "mid": "....*.*.", "low": "......**"}, {"snare": "****o*o*"},
                 {"high": "*.*.", "low": "....*.*."}),
         "snare": ({"snare": "o.o.o*o*"}, {"snare": "****o*o*"}),
         "swing": ({"snare": "*.o.*.*."}, {"snare": "..*.*.o."})}
# Progressions as degrees of the scale, 0 to 6: a chord a bar, or two.
POP = {"major": ("0453", "0534", "0354", "5304"),
       "minor": ("0526", "0354", "0656", "0534")}
LONG = {"major": ("04530344", "05345140", "03045340"),
        "minor": ("05260340", "03625344", "05340540")}

# ------------------------------------------------------------------------------------------------------------- harmony

def chord(tonic, mode, degree, size=3):
    """Pitch classes of the chord on a degree (0 to 6) of the scale; the fifth of minor gets its leading tone."""
    tones = [(tonic + SCALES[mode][(degree + 2 * i) % 7]) % 12 for i in range(size)]
    if mode == "minor" and degree == 4:
        tones[1] = (tones[1] + 1) % 12
    return tones


def harmony(rng, key, progressions, size=3):
    """The chords of a phrase: one of the mode's progressions, a digit a degree."""
    return [chord(*key, int(degree), size) for degree in pick(rng, progressions[key[1]])]


def voiced(chords, low, high, size):
    """Pitches of each chord in close position within low to high, moving as little as possible between chords."""
    result, previous = [], [low + (high - low) * (i + 1) / (size + 1) for i in range(size)]
    for tones in chords:
        ladder = [pitch for pitch in range(low, high + 1) if pitch % 12 in tones]
        candidates = [ladder[i:i + size] for i in range(len(ladder) - size + 1)]
        previous = min(candidates, key=lambda pitches: sum(abs(a - b) for a, b in zip(pitches, previous)))
        result.append(previous)
    return result


def at_or_above(pitch_class, low):
    return low + (pitch_class - low) % 12


def basses(chords, low):
    """Each chord's root and its octave, from low on."""
    return [[at_or_above(tones[0], low), at_or_above(tones[0], low) + 12] for tones in chords]


def pick(rng, options):
    return options[rng.integers(len(options))]


# --------------------------------------------------------------------------------------------------------------- notes
# A note is (beat, length in beats, pitch, velocity). A pattern is a string of sixteenths: "." rests, "-" holds, a digit
# plays that voice, "*" plays all voices, "o" plays all softly (a ghost note). A phrase is four bars of four beats.

PHRASE = 16


def play(pattern, voices, beat=0, loud=90, legato=0.95):
    """The notes of a pattern: beats are accented, the steps between them are softer."""
    notes = []
    for i, sign in enumerate(pattern):
        if sign not in ".-":
            held = 1 + len(pattern[i + 1:]) - len(pattern[i + 1:].lstrip("-"))
            accent = (1, 0.78, 0.88, 0.78)[i % 4] * (0.5 if sign == "o" else 1)
            notes += [(beat + i / 4, held / 4 * legato, pitch, loud * accent)
                      for pitch in (voices if sign in "*o" else [voices[int(sign)]])]
    return notes


def comp(pattern, voices, loud=90, legato=0.95):
    """The pattern over every chord of the phrase, each chord with its own voices."""
    beats = PHRASE // len(voices)
    return [note for slot, own in enumerate(voices) for note in play(pattern, own, slot * beats, loud, legato)]


def melody(rng, key, chords, rhythms, low, high, loud=95, scale=None):
    """A phrase over the chords: a motif, its answer, the motif again, and a long note of the last chord.

    The same rhythm and steps come back over other chords. Notes on a beat are of the chord, the others of the scale.
    """
    motifs = [(pick(rng, rhythms), rng.choice([-2, -1, -1, 1, 1, 2], 16)) for _ in range(2)]
    start, notes, beats = int(rng.integers(3)), [], PHRASE // len(chords)
    for slot, tones in enumerate(chords):
        degrees = set(scale or SCALES[key[1]]) - ({10} if (key[0] + 11) % 12 in tones else set())
        ladder = [p for p in range(low, high + 1) if (p - key[0]) % 12 in degrees or p % 12 in tones]
        rhythm, moves = motifs[slot % 2]
        last = slot == len(chords) - 1
        if last:
            rhythm = "x-x".ljust(len(rhythm), "-") if rhythm[0] == "x" else "x".ljust(len(rhythm), "-")
        position = position if slot % 2 else len(ladder) // 3 + start
        for i in (i for i, sign in enumerate(rhythm) if sign == "x"):
            position += int(moves[i])
            position = len(ladder) - 3 if position >= len(ladder) else 2 if position < 0 else position
            if i % 4 == 0 or last:
                position = min((j for j, p in enumerate(ladder) if p % 12 in tones), key=lambda j: abs(j - position))
            note = "." * i + "0" + "-" * (len(rhythm[i + 1:]) - len(rhythm[i + 1:].lstrip("-")))
            notes += play(note, [ladder[position]], slot * beats, loud)
    return notes


def drums(rng, groove, loud=100, fills="all", crash=True, kick=0.8):
    """A bar's groove four times, with a fill in the second half of the fourth and a crash at the beginning.

    `BALANCE` evens out the bank's kits, whose cymbals are faint.
    """
    fill, notes, balance = pick(rng, FILLS[fills]), [], {**BALANCE, "kick": kick}
    for bar in range(4):
        for name, pattern in groove.items():
            cut = 8 if bar == 3 and name not in ("kick", "pedal") else 16
            notes += play(pattern[:cut], [DRUMS[name]], bar * 4, loud * balance.get(name, 1))
    for name, pattern in fill.items():
        notes += play(pattern, [DRUMS[name]], 14, loud * balance.get(name, 1))
    return notes + [(0, 1, DRUMS["crash"], loud * balance["crash"])] * crash


# -------------------------------------------------------------------------------------------------------------- styles
# A style's function gets the arrangement's generator and the key (tonic, mode) and returns the tracks of one phrase:
# (instrument, General MIDI program, level 0 to 127, notes). Of drums the program is a kit. Levels were set so that the
# tracks' loudness in the mix is right (drums of techno 4 dB below the whole, its lead 8, and so on).

def techno(rng, key):
    chords = harmony(rng, key, {"major": ("0053", "0034"), "minor": ("0056", "0036")})
    bass = pick(rng, (".000.000.000.000", "..00..00..00..00", "..0.0.0...0.00.0"))
    stab = pick(rng, ("*..*..*...*..*..", "..*...*...*...**", "*..*..*..*..*.*."))
    riff = melody(rng, key, chords, ("x.x..x.x..x.x...", "x..x..x.x..x..x.", "x.xx..x...x.x.x."), 69, 86)
    groove = {"kick": "*...*...*...*...", "open": "..*...*...*...*.", "clap": "....*.......*...",
              "hat": pick(rng, ("*o.o*o.o*o.o*o.o", "oo.ooo.ooo.ooo.o"))}
    return [("drum machine", 25, 87, drums(rng, groove, 110, "snare", crash=False, kick=0.5)),
            ("synth bass", 38, 110, comp(bass, basses(chords, 33), legato=0.8)),
            ("synth", 62, 106, comp(stab, voiced(chords, 60, 76, 3), 80, legato=0.6)),
            ("synth lead", 81, 120, riff)]


def house(rng, key):
    chords = harmony(rng, key, {"major": ("0514", "3425"), "minor": ("0356", "0536")}, 4)
    stab = pick(rng, ("..*..*....*..*..", "*..*..*...*..*..", "..*...*..*..*.*."))
    bass = pick(rng, ("0.1.0.1.0.1.0.1.", "0.1.0.100.1.0.10"))
    line = melody(rng, key, chords, ("x---x---x-------", "x-----x-x-------", "x---x-x-x-------"), 72, 88)
    groove = {"kick": "*...*...*...*...", "open": "..*...*...*...*.", "clap": "....*.......*...", "shaker": "o" * 16}
    return [("drums", 8, 118, drums(rng, groove, 105)), ("bass", 33, 109, comp(bass, basses(chords, 33), legato=0.8)),
            ("piano", 0, 120, comp(stab, voiced(chords, 57, 74, 4), legato=0.7)), ("strings", 48, 89, line)]


def rock(rng, key):
    chords = harmony(rng, key, {"major": ("0343", "0453"), "minor": ("0560", "0656")})
    strum = pick(rng, ("*-*-*-*-*-*-*-*-", "*---*-*-*-*-*-*-", "*-----*-*---*-*-"))
    power = [[root, root + 7, octave] for root, octave in basses(chords, 40)]
    solo = melody(rng, key, chords, ("x---x-x-x---x-x-", "x-x-x---x-x-----", "x---x---x-x-x---"), 64, 82,
                  scale=(0, 2, 4, 7, 9) if key[1] == "major" else (0, 3, 5, 7, 10))
    groove = {"kick": pick(rng, ("*.....*.*.......", "*.......*.*.....", "*..*....*..*....")),
              "snare": "....*.......*...", "hat": "*.*.*.*.*.*.*.*."}
    return [("drums", 16, 120, drums(rng, groove, 115)), ("bass", 34, 106, comp("0-" * 8, basses(chords, 28))),
            ("distorted guitar", 30, 86, comp(strum, power, legato=0.9)), ("lead guitar", 29, 95, solo)]


def hiphop(rng, key):
    chords = harmony(rng, key, {"major": ("0514", "3210"), "minor": ("0534", "0356")}, 4)
    lazy = pick(rng, ("*-----*---------", "*-------..*-----", "*---..*-----*---"))
    bass = pick(rng, ("0--...0---0-....", "0-----..0-0-..0-", "0--0....0-..0-.."))
    hook = melody(rng, key, chords, ("....x-x-x---x---", "..x-x---..x-x---", "x---x-x-....x---"), 67, 82)
    groove = {"kick": pick(rng, ("*.....*.*.*.....", "*..*....*.*.....", "*......**.....*.")),
              "snare": "....*.......*...", "hat": pick(rng, ("*.*.*.*.*.*.*.*.", "*.*.*.***.*.*.*o"))}
    return [("drums", 25, 104, drums(rng, groove, 112, "snare", crash=False, kick=0.55)),
            ("deep bass", 39, 73, comp(bass, basses(chords, 31))),
            ("electric piano", 4, 72, comp(lazy, voiced(chords, 55, 70, 4), 80)), ("vibraphone", 11, 120, hook)]


def jazz(rng, key):
    chords = harmony(rng, key, {"major": ("1405", "0514"), "minor": ("1400", "0314")}, 4)
    stab = pick(rng, ("*-....*-........", "..*-......*-....", "*---......*-...."))
    walk, roots = [], [root for root, _ in basses(chords, 36)]
    for tones, root, following in zip(chords, roots, roots[1:] + roots[:1]):
        above = [at_or_above(tone, root) for tone in tones]  # the last step is a semitone from the next root
        walk.append([root, above[rng.integers(1, 3)], above[rng.integers(2, 4)], following + pick(rng, (-1, 1))])
    solo = melody(rng, key, chords, ("x.x.x.x.x.x.x---", "..x.x.x.x-x.x---", "x---x.x.x.x.x---"), 67, 86, 100)
    groove = {"ride": "*...*.*.*...*.*.", "pedal": "....*.......*...", "kick": "o...o...o...o...",
              "snare": pick(rng, ("......o.......o.", "..........o...o.", "......o........."))}
    return [("drums", 32, 120, drums(rng, groove, 92, "swing", crash=False)),
            ("double bass", 32, 62, comp("0---1---2---3---", walk, 95)),
            ("piano", 0, 107, comp(stab, voiced(chords, 53, 69, 4), 72) + solo)]


def piano(rng, key):
    chords = harmony(rng, key, LONG)
    figure, left = pick(rng, ("0-1-2-1-", "0-2-1-2-", "0-1-2-3-")), []
    tune = melody(rng, key, chords, ("x---x---", "x-----x-", "x---x-x-", "x-------"), 69, 84, 92)
    for tones, (root, octave) in zip(chords, basses(chords, 41)):  # root, fifth, tenth, octave: a hand that rolls
        left.append([root, at_or_above(tones[2], root), at_or_above(tones[1], octave), octave])
    return [("piano", 0, 110, comp(figure, left, 62, legato=2) + tune)]


def strings(rng, key):
    chords = harmony(rng, key, LONG)
    pulse = pick(rng, ("*-*-*-*-", "*---*-*-", "*---*---"))
    tune = melody(rng, key, chords, ("x---x---", "x-----x-", "x---x-x-"), 71, 88, 100)
    return [("violins", 48, 120, tune), ("violas", 48, 98, comp(pulse, voiced(chords, 55, 69, 3), 84, legato=0.8)),
            ("cellos", 42, 115, comp("0---1---", basses(chords, 36), 92, legato=0.85))]


def organ(rng, key):
    chords = harmony(rng, key, LONG)
    tune = melody(rng, key, chords, ("x---x---", "x---x-x-", "x-x-x---"), 69, 84, 100)
    inner = comp(pick(rng, ("*---*---", "*---*-*-")), voiced(chords, 55, 69, 3), legato=0.85)
    return [("church organ", 19, 100, inner + comp("0---0---", basses(chords, 36), legato=0.85) + tune)]


def guitar(rng, key):
    chords = harmony(rng, key, POP)
    picking = pick(rng, ("0-3-1-2-0-3-1-2-", "0-2-3-2-1-2-3-2-", "0-1-2-3-0-3-2-1-"))
    shapes = [[at_or_above(tones[0], 40), at_or_above(tones[2], 47), *pair]
              for tones, pair in zip(chords, voiced(chords, 55, 67, 2))]
    tune = melody(rng, key, chords, ("x-------x---x---", "x---x-------x---", "x-----x-x-------"), 64, 79)
    return [("acoustic guitar", 25, 112, comp(picking, shapes, 84, legato=2) + tune)]


def ambient(rng, key):
    chords = harmony(rng, key, {"major": ("0353", "0233"), "minor": ("0535", "0526")}, 4)
    bells = melody(rng, key, chords, ("x---....x---....", "x---x---........", "....x---....x---"), 74, 91, 70)
    return [("pad", 92, 53, comp("*".ljust(16, "-"), voiced(chords, 52, 70, 4), legato=1.1)),
            ("choir pad", 91, 69, comp("0".ljust(16, "-"), basses(chords, 36), legato=1.1)), ("bells", 98, 120, bells)]


def arpeggios(rng, key):
    chords = harmony(rng, key, POP)
    cells = ("0123", "0121", "3210", "0213", "0231", "3212")
    figure, bass = (pick(rng, cells) + pick(rng, cells)) * 2, pick(rng, ("0---0---0---0---", "0-..0-..0-..0-.."))
    shapes = voiced(chords, 60, 84, 4)
    return [("arpeggiator", 80, 120, comp(figure, shapes, legato=0.7)),
            ("synth bass", 38, 92, comp(bass, basses(chords, 36), 88)),
            ("pad", 90, 81, comp("*".ljust(16, "-"), [[pitch - 12 for pitch in shape[:3]] for shape in shapes]))]


def drumkit(rng, key):
    ghosts = rng.permutation([1, 3, 5, 7, 9, 11])[:2]
    snare = "".join("*" if i in (4, 12) else "o" if i in ghosts else "." for i in range(16))
    kick = pick(rng, ("*.......*.......", "*.....*.*.......", "*..*....*.*.....", "*.......*.*...*.",
                      "*.*.....*..*...."))
    top = pick(rng, ({"hat": "*.*.*.*.*.*.*.*."}, {"hat": "*o*o*o*o*o*o*o*o"}, {"hat": "*..*..*.*..*..*."},
                     {"low": "*..*..*.*..*..*."}))
    extra = pick(rng, ({}, {"cowbell": "*...*...*...*..."}, {"shaker": "o" * 16}, {"open": "..............*."}))
    return [("drums", 0, 120, drums(rng, {"kick": kick, "snare": snare, **top, **extra}, 112))]


def apart(notes):
    """Notes in order, each ended before its pitch comes again, as one key plays one note; doubled ones once."""
    following, kept = {}, []
    for onset, length, pitch, velocity in notes[np.argsort(notes[:, 0], kind="stable")][::-1]:
        length = min(length, following.get(pitch, np.inf) - onset - 0.002)
        if length > 0.02:
            kept.append((onset, length, pitch, velocity))
            following[pitch] = onset
    return np.array(kept[::-1])


C, D, E, F, G, A = 0, 2, 4, 5, 7, 9
# style: (function, tempos in BPM, four keys, what delays every second eighth in beats, reverb 0 to 127)
STYLES = {
    "techno": (techno, (120, 130, 140), ((A, "minor"), (C, "minor"), (D, "minor"), (F, "major")), 0, 20),
    "house": (house, (110, 120, 128), ((C, "major"), (F, "major"), (A, "minor"), (D, "minor")), 0, 20),
    "rock": (rock, (100, 120, 140), ((E, "minor"), (A, "minor"), (G, "major"), (A, "major")), 0, 25),
    "hip-hop": (hiphop, (80, 90, 100), ((C, "minor"), (D, "minor"), (A, "minor"), (F, "major")), 0, 20),
    "jazz trio": (jazz, (120, 140, 160), ((C, "major"), (F, "major"), (D, "minor"), (C, "minor")), 1 / 6, 30),
    "solo piano": (piano, (60, 80, 100), ((C, "major"), (G, "major"), (A, "minor"), (C, "minor")), 0, 40),
    "string ensemble": (strings, (60, 80, 100), ((D, "major"), (G, "major"), (D, "minor"), (A, "minor")), 0, 50),
    "church organ": (organ, (60, 80), ((C, "major"), (D, "major"), (D, "minor"), (C, "minor")), 0, 60),
    "acoustic guitar": (guitar, (80, 100, 120), ((G, "major"), (C, "major"), (E, "minor"), (A, "minor")), 0, 30),
    "ambient pads": (ambient, (60, 70), ((C, "major"), (D, "major"), (A, "minor"), (D, "minor")), 0, 70),
    "synth arpeggios": (arpeggios, (110, 130, 150), ((C, "major"), (F, "major"), (A, "minor"), (C, "minor")), 0, 30),
    "drums alone": (drumkit, (80, 100, 120, 140), ((None, None),), 0, 20)}


@functools.cache
def arrangements(style):
    """Seeds of a style's arrangements, for training and for validation: no phrase of the former is among the latter."""
    def phrases(seed):
        return {str(STYLES[style][0](np.random.default_rng((seed, list(STYLES).index(style))), (C, mode)))
                for mode in SCALES}

    training = range(ARRANGEMENTS)
    known = set().union(*map(phrases, training))
    return training, [seed for seed in range(ARRANGEMENTS, 2 * ARRANGEMENTS) if not phrases(seed) & known]


def compose(index, seed=0, seconds=10.24):
    """Clip number `index` of a corpus as data: the manifest's fields without audio and captions, and `tracks`, a list
    of dicts: instrument, program, level and reverb (MIDI, 0 to 127), drums (bool), notes (n, 4) float64: onset and
    length in seconds, pitch, velocity.

    Styles take turns. Every tenth clip of a style is for validation and plays an arrangement (harmony, patterns,
    melody, fills) that no training clip of any seed has.
    """
    style = list(STYLES)[index % len(STYLES)]
    function, tempos, keys, delay, reverb = STYLES[style]
    rng = np.random.default_rng((seed, index))
    validation = index // len(STYLES) % 10 == 9
    arrangement = pick(rng, arrangements(style)[validation])
    tempo, (tonic, mode) = pick(rng, tempos), pick(rng, keys)
    beats, tracks = seconds * tempo / 60, []
    phrase = function(np.random.default_rng((arrangement, index % len(STYLES))), (tonic, mode))
    for name, program, level, notes in phrase:
        notes = [(start + beat, *rest) for start in np.arange(0, beats, PHRASE) for beat, *rest in notes]
        notes = np.array(sorted(note for note in notes if note[0] < beats))
        notes[:, 0] += np.where(notes[:, 0] % 1 == 0.5, delay, 0)
        notes[:, :2] *= 60 / tempo
        steady = 0 if style in ("techno", "house", "synth arpeggios") else 0.004
        notes[:, 0] = np.maximum(0, notes[:, 0] + np.clip(rng.normal(0, 1, len(notes)), -2, 2) * steady)
        notes[:, 3] = np.clip(np.round(notes[:, 3] + rng.normal(0, 4, len(notes))), 1, 127)
        notes = apart(notes)
        tracks.append({"instrument": name, "program": program, "level": level, "reverb": reverb, "notes": notes,
                       "drums": name in ("drums", "drum machine")})
    return {"tempo": tempo, "downbeats": [round(bar * 240 / tempo, 6) for bar in range(int(np.ceil(beats / 4 - 1e-9)))],
            "style": style, "key": None if tonic is None else PITCH_NAMES[tonic], "mode": mode,
            "instruments": [track["instrument"] for track in tracks], "split": "validation" if validation else "train",
            "tracks": tracks}


# ----------------------------------------------------------------------------------------------------------- rendering

CONTROLS = ((7, "level"), (91, "reverb"))


def midi_file(tracks, seconds):
    """Bytes of a Standard MIDI File (format 0) in which a tick is a millisecond."""
    events, channels = [], iter([channel for channel in range(16) if channel != 9])
    for track in tracks:
        channel = 9 if track["drums"] else next(channels)
        events.append((0, 1, bytes([0xC0 | channel, track["program"]])))
        events += [(0, 1, bytes([0xB0 | channel, control, track[name]])) for control, name in CONTROLS]
        for onset, length, pitch, velocity in track["notes"]:
            ticks, held = int(round(onset * 1000)), max(1, int(round(length * 1000)))
            events.append((ticks, 2, bytes([0x90 | channel, int(pitch), int(velocity)])))
            events.append((ticks + held, 0, bytes([0x80 | channel, int(pitch), 0])))
    end = int(seconds * 1000) + 100
    stop = [(end, 3, bytes([0xB0 | channel, 120, 0])) for channel in range(16)]  # FluidSynth waits for sounding notes
    events = sorted(event for event in events if event[0] < end) + stop + [(end, 4, b"\xff\x2f\x00")]
    body, now = b"\x00\xff\x51\x03" + (1000000).to_bytes(3, "big"), 0
    for ticks, _, message in events:
        delta = ticks - now
        digits = [delta & 127]
        while delta := delta >> 7:
            digits.append(delta & 127 | 128)
        body, now = body + bytes(digits[::-1]) + message, ticks
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, 1000) + b"MTrk" + struct.pack(">I", len(body)) + body


def synthesise(tracks, seconds):
    """Tracks of `compose` as FluidSynth plays them: (samples,) at 16 kHz, at their own loudness."""
    with tempfile.NamedTemporaryFile(suffix=".mid") as file:
        file.write(midi_file(tracks, seconds))
        file.flush()
        options = ("synth.dynamic-sample-loading=1", "synth.chorus.active=0", "synth.reverb.room-size=0.4",
                   "synth.reverb.damp=0.3", "synth.reverb.level=0.5", "synth.cpu-cores=1", "synth.polyphony=512")
        done = subprocess.run(["fluidsynth", "-niq", "-g", "0.3", "-r", str(RATE * OVERSAMPLED), "-T", "raw", "-O",
                               "float", *(f"-o{option}" for option in options), "-F", "-", BANK, file.name],
                              capture_output=True)
    complaint = re.search("fluidsynth: error: (.*)", done.stderr.decode(errors="replace"))
    if done.returncode or complaint:  # it leaves out a damaged bank, with status 0
        raise InputError(f"FluidSynth cannot play its bank {BANK}: {complaint[1] if complaint else done.returncode}; "
                         "install the Debian package fluid-soundfont-gm anew")
    audio = np.frombuffer(done.stdout, "<f4").reshape(-1, 2).mean(1)[:int(round(seconds * RATE)) * OVERSAMPLED]
    return resample_poly(audio, 1, OVERSAMPLED)


def render(tracks, seconds=10.24):
    """Tracks of `compose` as sound: (samples,) float32 at 16 kHz, RMS about -20 dBFS, peak below 0.95."""
    audio = synthesise(tracks, seconds)
    audio *= RMS / np.sqrt(np.mean(audio ** 2))
    over = np.tanh(np.maximum(np.abs(audio) - KNEE, 0) / (PEAK - KNEE))  # the peaks of drums are rounded off
    return (np.clip(audio, -KNEE, KNEE) + np.sign(audio) * (PEAK - KNEE) * over).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- command line

def make_clip(folder, index, seed, seconds):
    """Write one clip's audio below `folder`; its line of the manifest, as a dict."""
    clip = compose(index, seed, seconds)
    path = f"audio/{index:05d}.flac"
    soundfile.write(folder / path, render(clip.pop("tracks"), seconds), RATE)
    return {"audio": path, "captions": captions(clip, np.random.default_rng((seed, index, 1))), **clip}


def make_corpus(out, clips, seed=0, seconds=10.24):
    """Write `clips` clips and their manifest to the folder `out`, which appears whole or not at all."""
    out = pathlib.Path(out)
    if clips < 1:
        raise InputError(f"--clips is {clips}; it must be at least 1")
    if seed < 0:
        raise InputError(f"--seed is {seed}; it must be at least 0")
    if not 1 <= seconds <= 600:
        raise InputError(f"--seconds is {seconds}; it must be 1 to 600")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there and not an empty folder; name a new one")
    if not shutil.which("fluidsynth") or not os.path.isfile(BANK):
        raise InputError(f"FluidSynth or its bank {BANK} is missing; install the Debian packages fluidsynth and "
                         "fluid-soundfont-gm")
    part = out.with_name(out.name + ".part")
    try:
        (part / "audio").mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{part} cannot be made: {error.strerror}") from None
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, open(part / "manifest.jsonl", "w", encoding="utf-8") as file:
            for line in pool.map(lambda index: make_clip(part, index, seed, seconds), range(clips)):
                file.write(json.dumps(line) + "\n")
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Compose, caption and render music to train on.")
    parser.add_argument("out", metavar="OUT", help="a new folder")
    parser.add_argument("--clips", type=int, required=True, metavar="N", help="12 styles take turns")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--seconds", type=float, default=10.24, help="length of a clip (10.24)")
    args = parser.parse_args(argv)
    try:
        make_corpus(args.out, args.clips, args.seed, args.seconds)
    except InputError as error:
        print(f"corpus: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
