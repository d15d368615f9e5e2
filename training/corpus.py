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
import json
import os
import pathlib
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
from weights import InputError  # noqa: E402

BANK = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
RATE = 16000
OVERSAMPLED = 3  # FluidSynth does not filter what folds down from above half its rate; 48 kHz holds all of the bank
RMS, KNEE, PEAK = 0.1, 0.6, 0.95  # -20 dBFS
ARRANGEMENTS = 120  # of each style in training; validation draws from as many others

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PITCH_NAMES = ("C", "C sharp", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
DRUMS = {"kick": 36, "rim": 37, "snare": 38, "clap": 39, "hat": 42, "pedal": 44, "open": 46, "crash": 49, "ride": 51,
         "high": 50, "mid": 47, "low": 43, "shaker": 70, "cowbell": 56}
BALANCE = {"snare": 0.85, "crash": 0.55, "high": 0.8, "mid": 0.8, "low": 0.8, "cowbell": 0.6, "shaker": 0.9}

# ------------------------------------------------------------------------------------------------------------- harmony

def chord(tonic, mode, degree, size=3):
    """Pitch classes of the chord on a degree (0 to 6) of the scale; the fifth of minor gets its leading tone."""
    tones = [(tonic + SCALES[mode][(degree + 2 * i) % 7]) % 12 for i in range(size)]
    if mode == "minor" and degree == 4:
        tones[1] = (tones[1] + 1) % 12
    return tones


def voiced(chords, low, high, size):
    """Pitches of each chord in close position within low to high, moving as little as possible between chords."""
    result, previous = [], np.linspace(low, high, size + 2)[1:-1]
    for tones in chords:
        candidates = []
        for bottom in range(low, high):
            pitches = [p for p in range(bottom, high + 1) if p % 12 in tones][:size]
            if bottom % 12 in tones and len(pitches) == size:
                candidates.append(pitches)
        previous = min(candidates, key=lambda pitches: np.abs(np.subtract(pitches, previous)).sum())
        result.append(previous)
    return result


def pick(rng, options):
    return options[rng.integers(len(options))]


def at_or_above(pitch_class, low):
    return low + (pitch_class - low) % 12


# --------------------------------------------------------------------------------------------------------------- notes
# A note is (beat, length in beats, pitch, velocity). A pattern is a string of steps: "." rests, "-" holds, a digit plays
# that voice, "*" plays all voices, "o" plays all softly (a ghost note).

def play(pattern, voices, beat=0, loud=90, step=0.25, legato=0.95):
    """The notes of a pattern: beats are accented, the steps between them are softer."""
    notes = []
    for i, sign in enumerate(pattern):
        if sign in ".-":
            continue
        held = len(pattern[i + 1:]) - len(pattern[i + 1:].lstrip("-")) + 1
        accent = 1 if i * step % 1 == 0 else 0.88 if i * step % 0.5 == 0 else 0.78
        for pitch in (voices if sign in "*o" else [voices[int(sign)]]):
            notes.append((beat + i * step, held * step * legato, pitch, loud * accent * (0.5 if sign == "o" else 1)))
    return notes


def melody(rng, chords, scale, rhythms, low, high, beats, loud=95, step=0.25):
    """A phrase over the chords: a motif, its answer, the motif again, and a long note of the last chord.

    The same rhythm and steps come back over other chords. Notes on a beat are of the chord, the others of the scale.
    """
    count = len(chords)
    motifs = [(rhythms[rng.integers(len(rhythms))], rng.choice([-2, -1, -1, 1, 1, 2], 16)) for _ in range(2)]
    start, notes = int(rng.integers(3)), []
    for slot, tones in enumerate(chords):
        ladder = [p for p in range(low, high + 1) if (p - scale[0]) % 12 in scale[1] or p % 12 in tones]
        if (scale[0] + 11) % 12 in tones:
            ladder = [p for p in ladder if (p - scale[0]) % 12 != 10]
        rhythm, moves = motifs[slot % 2]
        if slot == count - 1:
            rhythm = rhythm[:2] + "x" + "-" * (len(rhythm) - 3) if rhythm[0] == "x" else "x" + "-" * (len(rhythm) - 1)
        position = len(ladder) // 3 + start if slot % 2 == 0 else position
        for i, sign in enumerate(rhythm):
            if sign != "x":
                continue
            position += int(moves[i % 16])
            position = len(ladder) - 3 if position >= len(ladder) else 2 if position < 0 else position
            if i * step % 1 == 0 or slot == count - 1:
                position = min((j for j, p in enumerate(ladder) if p % 12 in tones), key=lambda j: abs(j - position))
            notes += play("0" + rhythm[i + 1:][:len(rhythm) - i - 1 - len(rhythm[i + 1:].lstrip("-"))],
                          [ladder[position]], slot * beats + i * step, loud * (1 if i * step % 1 == 0 else 0.85), step)
    return notes


def phrases(notes, length, total, changed=None):
    """Notes of a phrase repeated over `total` beats; every second time `changed`, if there is one."""
    return [(start + beat, held, pitch, velocity) for k, start in enumerate(np.arange(0, total, length))
            for beat, held, pitch, velocity in (changed if changed is not None and k % 2 else notes)]


FILLS = ({"snare": "o.o.*.**"}, {"snare": "**..", "high": "..**", "mid": "....**..", "low": "......**"},
         {"snare": "*.**", "mid": "....*.*.", "low": "......**"}, {"snare": "****o*o*"}, {"high": "*.*.", "low": "....*.*."})


def drums(rng, total, groove, loud=100, fills=FILLS, crash=True, kick=0.8):
    """A groove of one bar with a fill in every fourth bar's second half and a crash after it.

    `BALANCE` evens out the bank's kits, whose cymbals are faint.
    """
    fill, notes, balance = pick(rng, fills), [], {**BALANCE, "kick": kick}
    for bar in range(int(np.ceil(total / 4))):
        for name, pattern in groove.items():
            cut = bar % 4 == 3 and name not in ("kick", "pedal")
            notes += play(pattern[:8] if cut else pattern, [DRUMS[name]], bar * 4, loud * balance.get(name, 1))
        for name, pattern in fill.items() if bar % 4 == 3 else ():
            notes += play(pattern, [DRUMS[name]], bar * 4 + 2, loud * balance.get(name, 1))
        if crash and bar % 4 == 0:
            notes.append((bar * 4, 1, DRUMS["crash"], loud * balance["crash"]))
    return notes


# -------------------------------------------------------------------------------------------------------------- styles
# A style's function gets the arrangement's generator, tonic, mode and the beats to fill, and returns its tracks:
# (instrument, General MIDI program, level 0 to 127, notes). The program of "drums" is a kit.

def harmony(rng, tonic, mode, progressions, size=3):
    return [chord(tonic, mode, degree, size) for degree in pick(rng, progressions[mode])]


POP = {"major": ((0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 5, 4), (5, 3, 0, 4)),
       "minor": ((0, 5, 2, 6), (0, 3, 5, 4), (0, 6, 5, 6), (0, 5, 3, 4))}
LONG = {"major": ((0, 4, 5, 3, 0, 3, 4, 4), (0, 5, 3, 4, 5, 1, 4, 0), (0, 3, 0, 4, 5, 3, 4, 0)),
        "minor": ((0, 5, 2, 6, 0, 3, 4, 0), (0, 3, 6, 2, 5, 3, 4, 4), (0, 5, 3, 4, 0, 5, 4, 0))}


def over(chords, beats, function):
    """What `function(slot, chord)` plays in each slot, moved to the slot's beat."""
    return [(slot * beats + beat, *rest) for slot, tones in enumerate(chords) for beat, *rest in function(slot, tones)]


def techno(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, {"major": ((0, 0, 5, 3), (0, 0, 3, 4)), "minor": ((0, 0, 5, 6), (0, 0, 3, 6))})
    stabs, rolling = voiced(chords, 60, 76, 3), pick(rng, (".000.000.000.000", "..00..00..00..00", "..0.0.0...0.00.0"))
    hook = pick(rng, ("*..*..*...*..*..", "..*...*...*...**", "*..*..*..*..*.*."))
    riff = melody(rng, chords, (tonic, SCALES[mode]), ("x.x..x.x..x.x...", "x..x..x.x..x..x.", "x.xx..x...x.x.x."), 69, 86, 4)
    bass = over(chords, 4, lambda slot, tones: play(rolling, [at_or_above(tones[0], 33)], legato=0.8))
    stab = over(chords, 4, lambda slot, tones: play(hook, stabs[slot], legato=0.6, loud=80))
    groove = {"kick": "*...*...*...*...", "open": "..*...*...*...*.", "clap": "....*.......*...",
              "hat": pick(rng, ("*o.o*o.o*o.o*o.o", "oo.ooo.ooo.ooo.o"))}
    return [("drum machine", 25, 87, drums(rng, total, groove, 110, ({"snare": "o.o.o*o*"}, {"snare": "****o*o*"}),
                                       crash=False, kick=0.5)),
            ("synth bass", 38, 110, phrases(bass, 16, total)), ("synth", 62, 106, phrases(stab, 16, total)),
            ("synth lead", 81, 120, phrases(riff, 16, total))]


def house(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, {"major": ((0, 5, 1, 4), (3, 4, 2, 5)), "minor": ((0, 3, 5, 6), (0, 5, 3, 6))}, 4)
    keys, low = voiced(chords, 57, 74, 4), voiced(chords, 62, 81, 2)
    stab = pick(rng, ("..*..*....*..*..", "*..*..*...*..*..", "..*...*..*..*.*."))
    octaves = pick(rng, ("0.1.0.1.0.1.0.1.", "0.1.0.100.1.0.10"))
    bass = over(chords, 4, lambda slot, tones: play(octaves, [at_or_above(tones[0], 33), at_or_above(tones[0], 33) + 12],
                                                    legato=0.8))
    line = melody(rng, chords, (tonic, SCALES[mode]), ("x---x---x-------", "x-----x-x-------", "x---x-x-x-------"), 72, 88, 4)
    groove = {"kick": "*...*...*...*...", "open": "..*...*...*...*.", "clap": "....*.......*...",
              "shaker": "oooooooooooooooo"}
    return [("drums", 8, 118, drums(rng, total, groove, 105)), ("bass", 33, 109, phrases(bass, 16, total)),
            ("piano", 0, 120, phrases(over(chords, 4, lambda slot, _: play(stab, keys[slot], legato=0.7)), 16, total)),
            ("strings", 48, 89, phrases(line, 16, total))]


def rock(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, {"major": ((0, 3, 4, 3), (0, 4, 5, 3)), "minor": ((0, 5, 6, 0), (0, 6, 5, 6))})
    strum = pick(rng, ("*-*-*-*-*-*-*-*-", "*---*-*-*-*-*-*-", "*-----*-*---*-*-"))
    roots = [at_or_above(tones[0], 40) for tones in chords]
    power = over(chords, 4, lambda slot, _: play(strum, [roots[slot], roots[slot] + 7, roots[slot] + 12], legato=0.9))
    bass = over(chords, 4, lambda slot, _: play("0-0-0-0-0-0-0-0-", [roots[slot] - 12]))
    pentatonic = (0, 2, 4, 7, 9) if mode == "major" else (0, 3, 5, 7, 10)
    solo = melody(rng, chords, (tonic, pentatonic), ("x---x-x-x---x-x-", "x-x-x---x-x-----", "x---x---x-x-x---"), 64, 82, 4)
    groove = {"kick": pick(rng, ("*.....*.*.......", "*.......*.*.....", "*..*....*..*....")), "snare": "....*.......*...",
              "hat": "*.*.*.*.*.*.*.*."}
    return [("drums", 16, 120, drums(rng, total, groove, 115)), ("bass", 34, 106, phrases(bass, 16, total)),
            ("distorted guitar", 30, 86, phrases(power, 16, total)), ("lead guitar", 29, 95, phrases(solo, 16, total))]


def hiphop(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, {"major": ((0, 5, 1, 4), (3, 2, 1, 0)), "minor": ((0, 5, 3, 4), (0, 3, 5, 6))}, 4)
    keys, roots = voiced(chords, 55, 70, 4), [at_or_above(tones[0], 31) for tones in chords]
    lazy = pick(rng, ("*-----*---------", "*-------..*-----", "*---..*-----*---"))
    walk = pick(rng, ("0--...0---0-....", "0-----..0-0-..0-", "0--0....0-..0-.."))
    hook = melody(rng, chords, (tonic, SCALES[mode]), ("....x-x-x---x---", "..x-x---..x-x---", "x---x-x-....x---"), 67, 82, 4)
    groove = {"kick": pick(rng, ("*.....*.*.*.....", "*..*....*.*.....", "*......**.....*.")), "snare": "....*.......*...",
              "hat": pick(rng, ("*.*.*.*.*.*.*.*.", "*.*.*.***.*.*.*o"))}
    return [("drums", 25, 104, drums(rng, total, groove, 112, FILLS[:1] + FILLS[3:4], crash=False, kick=0.55)),
            ("deep bass", 39, 73, phrases(over(chords, 4, lambda s, _: play(walk, [roots[s]])), 16, total)),
            ("electric piano", 4, 72, phrases(over(chords, 4, lambda s, _: play(lazy, keys[s], loud=80)), 16, total)),
            ("vibraphone", 11, 120, phrases(hook, 16, total))]


def jazz(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, {"major": ((1, 4, 0, 5), (0, 5, 1, 4)), "minor": ((1, 4, 0, 0), (0, 3, 1, 4))}, 4)
    comp, keys = pick(rng, ("*-....*-........", "..*-......*-....", "*---......*-....")), voiced(chords, 53, 69, 4)
    roots, bass = [at_or_above(tones[0], 36) for tones in chords], []
    for slot, tones in enumerate(chords):  # a walking bass: root, two notes of the chord, a semitone from the next root
        above = [at_or_above(tone, roots[slot]) for tone in tones]
        approach = roots[(slot + 1) % len(chords)] + (1 if rng.random() < 0.5 else -1)
        bass += play("0---1---2---3---", [roots[slot], above[1 + rng.integers(2)], above[2 + rng.integers(2)], approach],
                     slot * 4, 95)
    solo = [melody(rng, chords, (tonic, SCALES[mode]), ("x.x.x.x.x.x.x---", "..x.x.x.x-x.x---", "x---x.x.x.x.x---"), 67, 86, 4,
                   100) for _ in range(2)]
    groove = {"ride": "*...*.*.*...*.*.", "pedal": "....*.......*...", "kick": "o...o...o...o...",
              "snare": pick(rng, ("......o.......o.", "..........o...o.", "......o.........") )}
    return [("drums", 32, 120, drums(rng, total, groove, 92, ({"snare": "*.o.*.*."}, {"snare": "..*.*.o."}), crash=False)),
            ("double bass", 32, 62, phrases(bass, 16, total)),
            ("piano", 0, 107, phrases(over(chords, 4, lambda slot, _: play(comp, keys[slot], loud=72)), 16, total)
             + phrases(solo[0], 16, total, solo[1]))]


def piano(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, LONG)
    figure = pick(rng, ("0-1-2-1-", "0-2-1-2-", "0-1-2-3-"))
    tune = melody(rng, chords, (tonic, SCALES[mode]), ("x---x---", "x-----x-", "x---x-x-", "x-------"), 69, 84, 2, 92)
    left = over(chords, 2, lambda slot, tones: play(figure, wide(tones, 41), loud=62, legato=2.0))
    return [("piano", 0, 110, phrases(left + tune, 16, total))]


def wide(tones, low):
    """Root, fifth, tenth and octave above a low root: an open chord that a left hand rolls."""
    root = at_or_above(tones[0], low)
    fifth = root + (tones[2] - tones[0]) % 12
    return [root, fifth, root + 12 + (tones[1] - tones[0]) % 12, root + 12]


def strings(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, LONG)
    inner, roots = voiced(chords, 55, 69, 3), [at_or_above(tones[0], 36) for tones in chords]
    pulse = pick(rng, ("*-*-*-*-", "*---*-*-", "*---*---"))
    tune = melody(rng, chords, (tonic, SCALES[mode]), ("x---x---", "x-----x-", "x---x-x-"), 71, 88, 2, 100)
    return [("violins", 48, 120, phrases(tune, 16, total)),
            ("violas", 48, 98, phrases(over(chords, 2, lambda s, _: play(pulse, inner[s], loud=84, legato=0.8)), 16, total)),
            ("cellos", 42, 115, phrases(over(chords, 2, lambda s, _: play("0---1---", [roots[s], roots[s] + 12], loud=92,
                                                                         legato=0.85)), 16, total))]


def organ(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, LONG)
    inner, roots = voiced(chords, 55, 69, 3), [at_or_above(tones[0], 36) for tones in chords]
    tune = melody(rng, chords, (tonic, SCALES[mode]), ("x---x---", "x---x-x-", "x-x-x---"), 69, 84, 2, 100)
    steps = pick(rng, ("*---*---", "*---*-*-"))
    return [("church organ", 19, 100, phrases(over(chords, 2, lambda s, _: play(steps, inner[s], legato=0.85)), 16, total)
             + phrases(over(chords, 2, lambda s, _: play("0---0---", [roots[s]], legato=0.85)), 16, total)
             + phrases(tune, 16, total))]


def guitar(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, POP)
    picking = pick(rng, ("0-3-1-2-0-3-1-2-", "0-2-3-2-1-2-3-2-", "0-1-2-3-0-3-2-1-"))
    shapes = [[at_or_above(tones[0], 40), at_or_above(tones[2], 47), *pair] for tones, pair in
              zip(chords, voiced(chords, 55, 67, 2))]
    tune = melody(rng, chords, (tonic, SCALES[mode]), ("x-------x---x---", "x---x-------x---", "x-----x-x-------"), 64, 79, 4)
    chosen = over(chords, 4, lambda slot, _: play(picking, shapes[slot], loud=84, legato=2.0))
    return [("acoustic guitar", 25, 112, phrases(chosen + tune, 16, total))]


def ambient(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, {"major": ((0, 3, 5, 3), (0, 2, 3, 3)), "minor": ((0, 5, 3, 5), (0, 5, 2, 6))}, 4)
    pads, roots = voiced(chords, 52, 70, 4), [at_or_above(tones[0], 36) for tones in chords]
    bells = melody(rng, chords, (tonic, SCALES[mode]), ("x---....x---....", "x---x---........", "....x---....x---"), 74, 91, 4, 70)
    return [("pad", 92, 53, phrases(over(chords, 4, lambda s, _: play("*" + "-" * 15, pads[s], legato=1.1)), 16, total)),
            ("choir pad", 91, 69, phrases(over(chords, 4, lambda s, _: play("0" + "-" * 15, [roots[s]], legato=1.1)), 16, total)),
            ("bells", 98, 120, phrases(bells, 16, total))]


def arpeggios(rng, tonic, mode, total):
    chords = harmony(rng, tonic, mode, POP)
    shapes, roots = voiced(chords, 60, 84, 4), [at_or_above(tones[0], 36) for tones in chords]
    figure = pick(rng, ("0123210123210123", "0121012101210121", "0123012301230123", "3210321032103210", "0213021302130213"))
    bass = over(chords, 4, lambda slot, _: play("0---0---0---0---", [roots[slot]], loud=88))
    return [("arpeggiator", 80, 120, phrases(over(chords, 4, lambda s, _: play(figure, shapes[s], legato=0.7)), 16, total)),
            ("synth bass", 38, 92, phrases(bass, 16, total)),
            ("pad", 90, 81, phrases(over(chords, 4, lambda s, _: play("*" + "-" * 15, [p - 12 for p in shapes[s][:3]])), 16, total))]


def drumkit(rng, tonic, mode, total):
    kick = pick(rng, ("*.......*.......", "*.....*.*.......", "*..*....*.*.....", "*.......*.*...*.", "*.*.....*..*...."))
    snare = pick(rng, ("....*.......*...", "....*..o.o..*...", "....*..o....*..o"))
    top = pick(rng, (("hat", "*.*.*.*.*.*.*.*."), ("hat", "*o*o*o*o*o*o*o*o"), ("ride", "*.*.*.*.*.*.*.*."), ("low", "*..*..*.*..*..*.")))
    extra = pick(rng, ({}, {"cowbell": "*...*...*...*..."}, {"shaker": "oooooooooooooooo"}, {"open": "..............*."}))
    return [("drums", 0, 120, drums(rng, total, {"kick": kick, "snare": snare, top[0]: top[1], **extra}, 112))]


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


def compose(index, seed=0, seconds=10.24):
    """Clip number `index` of a corpus as data: a dict of the manifest's fields without audio and captions, and `tracks`,
    a list of dicts: instrument, program, level and reverb (MIDI, 0 to 127), drums (bool), notes (n, 4) float64: onset and
    length in seconds, pitch, velocity.

    Styles take turns. Every tenth clip of a style is for validation and plays an arrangement (harmony, patterns, melody,
    fills) that no training clip of any seed draws.
    """
    style = list(STYLES)[index % len(STYLES)]
    function, tempos, keys, delay, reverb = STYLES[style]
    rng = np.random.default_rng((seed, index))
    validation = index // len(STYLES) % 10 == 9
    arrangement = int(rng.integers(ARRANGEMENTS)) + ARRANGEMENTS * validation
    tempo, (tonic, mode) = pick(rng, tempos), pick(rng, keys)
    beats = seconds * tempo / 60
    tracks = []
    for name, program, level, notes in function(np.random.default_rng((arrangement, index % len(STYLES))), tonic, mode, beats):
        notes = np.array(sorted(note for note in notes if note[0] < beats), np.float64)
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

def midi_file(tracks, seconds):
    """Bytes of a Standard MIDI File (format 0) in which a tick is a millisecond."""
    events, channels = [], iter([channel for channel in range(16) if channel != 9])
    for track in tracks:
        channel = 9 if track["drums"] else next(channels)
        events.append((0, 1, bytes([0xC0 | channel, track["program"]])))
        events += [(0, 1, bytes([0xB0 | channel, control, track[name]])) for control, name in ((7, "level"), (91, "reverb"))]
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
        done = subprocess.run(["fluidsynth", "-niq", "-g", "0.3", "-r", str(RATE * OVERSAMPLED), "-T", "raw", "-O", "float",
                               *(f"-o{option}" for option in options), "-F", "-", BANK, file.name],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True)
    audio = np.frombuffer(done.stdout, "<f4").reshape(-1, 2).mean(1)[:int(round(seconds * RATE)) * OVERSAMPLED]
    return resample_poly(audio, 1, OVERSAMPLED)


def render(tracks, seconds=10.24):
    """Tracks of `compose` as sound: (samples,) float32 at 16 kHz, RMS about -20 dBFS, peak below 0.95."""
    audio = synthesise(tracks, seconds)
    audio *= RMS / np.sqrt(np.mean(audio ** 2))
    over = np.maximum(np.abs(audio) - KNEE, 0)  # peaks of drums are rounded off
    return (np.clip(audio, -KNEE, KNEE) + np.sign(audio) * (PEAK - KNEE) * np.tanh(over / (PEAK - KNEE))).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------ captions

# style: names, instruments and qualities, as people write them
WORDS = {
    "techno": (("techno", "melodic techno", "techno music", "club techno", "a techno track"),
               ("synths", "a synth lead", "synth bass", "a drum machine", "electronic drums", "a four on the floor kick"),
               ("electronic", "hypnotic", "pulsing", "driving")),
    "house": (("house", "disco", "house music", "disco house", "a disco track"),
              ("piano chords", "a funky bass", "strings", "a dance beat", "open hi-hats"),
              ("danceable", "groovy", "funky", "feel-good")),
    "rock": (("rock", "rock music", "hard rock", "a rock song", "guitar rock"),
             ("distorted guitars", "electric guitars", "loud drums", "electric bass", "a lead guitar", "a guitar solo"),
             ("heavy", "powerful", "loud", "raw")),
    "hip-hop": (("hip-hop", "hip hop", "a hip-hop beat", "hip hop instrumental", "lo-fi hip hop"),
                ("a deep bass", "electric piano", "vibraphone", "808 drums", "a lazy drum beat", "rhodes chords"),
                ("laid-back", "chilled", "relaxed", "head-nodding")),
    "jazz trio": (("jazz", "swing jazz", "a jazz trio", "jazz music", "swing"),
                  ("piano, double bass and drums", "a walking bass", "a piano solo", "a ride cymbal", "upright bass",
                   "piano and drums"), ("swinging", "smooth", "lively", "cool")),
    "solo piano": (("piano", "solo piano", "piano music", "a piano piece", "a piano ballad"),
                   ("a single piano", "piano only", "a gentle melody", "rolling left-hand chords"),
                   ("gentle", "romantic", "tender", "intimate")),
    "string ensemble": (("strings", "string ensemble", "string orchestra", "classical strings", "orchestral strings"),
                        ("violins", "cellos", "violas", "a violin melody", "an orchestra"),
                        ("classical", "elegant", "cinematic", "expressive")),
    "church organ": (("organ", "church organ", "organ music", "an organ chorale", "a hymn"),
                     ("a church organ", "deep organ pedals", "organ chords", "a hymn melody"),
                     ("solemn", "sacred", "majestic", "grand")),
    "acoustic guitar": (("acoustic guitar", "guitar", "folk guitar", "guitar picking", "solo acoustic guitar"),
                        ("steel strings", "finger picking", "gentle picking", "a finger-picked melody"),
                        ("folk", "warm", "soft", "cosy")),
    "ambient pads": (("ambient", "ambient music", "ambient pads", "an ambient soundscape", "atmospheric pads"),
                     ("soft synth pads", "warm pads", "gentle bells", "pads and bells", "no drums"),
                     ("atmospheric", "dreamy", "spacious", "ethereal")),
    "synth arpeggios": (("synth arpeggios", "arpeggios", "an arpeggiated synth", "synthwave arpeggios", "synth music"),
                        ("fast synth notes", "an arpeggiator", "synth bass and pads", "a square synth", "running synths"),
                        ("retro", "sparkling", "bubbling", "electronic")),
    "drums alone": (("drums", "a drum beat", "drums alone", "drum solo", "solo drums"),
                    ("kick and snare", "only drums", "a drum kit", "hi-hats and snare", "drum fills"),
                    ("rhythmic", "percussive", "punchy", "steady"))}
MOODS = {("minor", False): ("sad", "melancholic", "dark", "moody", "sorrowful"),
         ("minor", True): ("dark", "tense", "dramatic", "moody", "melancholic"),
         ("major", False): ("happy", "bright", "peaceful", "calm", "hopeful"),
         ("major", True): ("happy", "bright", "cheerful", "joyful", "uplifting")}
SPEEDS = (("slow", "slow-paced", "calm and slow"), ("mid-tempo", "medium tempo", "moderate"), ("fast", "up-tempo", "quick"))
NUMBERS = ("{} bpm", "{} BPM", "at {} bpm", "at {} beats per minute", "{} beats per minute", "with {} bpm")
# A caption of each row: five name the tempo, three are for the ear; tags come in any order.
TEMPLATES = (("{name}", "{bare}", "{mood} {bare}"),
             ("{bare}, {number}", "{tempo} bpm {bare}", "{mood} {bare} {number}"),
             ("{speed} {bare} {number}", "{speed} {mood} {bare}, {number}", "{tempo} BPM {mood} {bare} with {instrument}"),
             ("{speed} {mood} {bare} with {instrument}, {number}, {key}", "{quality} {bare} {key} with {instrument} {number}"),
             ("{mood} {bare}", "{speed} {mood} {bare}", "{speed} {bare}", "{quality} {bare}"),
             ("{bare} with {instrument}", "{bare} with {instrument} and {another}", "{mood} {bare} with {instrument}"),
             ("{mood} {bare} with a {speed} beat and {instrument}", "{speed}, {quality} {bare} with {instrument}, {key}",
              "{quality}, {mood} {bare} with {instrument} and {another}", "{speed} {bare} {key}"), ("tags",))
OPENINGS = ("a piece of ", "a recording of ", "an instrumental: ", "a loop of ", "a clip of ", "music: ", "make ", "create ")
ENDINGS = (", instrumental", ", high quality", ", no vocals", ", well played", " in the background", ", a short loop")


def captions(clip, rng):
    """Eight different captions of a clip, from a word to a sentence, three or four with the tempo as a number."""
    names, instruments, qualities = WORDS[clip["style"]]
    mode, tempo = clip["mode"], clip["tempo"]
    moods = MOODS[mode, tempo > 105] if mode else qualities
    keys = (f"in a {mode} key", f"in {clip['key']} {mode}", f"in {mode}") if mode else ("without other instruments",)
    result = []
    while len(result) < len(TEMPLATES):
        template, name = pick(rng, TEMPLATES[len(result)]), pick(rng, names)
        instrument, another = rng.permutation(instruments)[:2]
        words = {"name": name, "bare": name.removeprefix("a ").removeprefix("an "), "instrument": str(instrument),
                 "another": str(another), "quality": pick(rng, qualities), "mood": pick(rng, moods), "key": pick(rng, keys),
                 "speed": pick(rng, SPEEDS[(tempo > 80) + (tempo > 105)]), "number": pick(rng, NUMBERS).format(tempo)}
        if template == "tags":
            tags = [words[tag] for tag in ("bare", "instrument", "mood", "speed", "number")]
            text = ", ".join(rng.permutation([tags[0], *rng.permutation(tags[1:])[:rng.integers(2, 5)]]))
        else:
            text = template.format(tempo=tempo, **words).replace(" a up", " an up")
        if len(result) > 1 and rng.random() < 0.3:
            text = pick(rng, OPENINGS) + text if rng.random() < 0.5 else text + pick(rng, ENDINGS)
        text = text[0].upper() + text[1:] if rng.random() < 0.15 else text
        if text not in result:
            result.append(text)
    return result


# What training captions never hold, for evaluation: other words, other ways to put them.
HELD_OUT = ("i want", "i'd like", "please", "some ", "something", "play me", "for a ", "for the ", "like in", "around",
            "roughly", "tempo:", "tempo of", "bpm:", "beats a minute", "that sounds", "could be", "full of", "we need",
            "rave", "warehouse", "nightclub", "dancefloor", "stadium", "garage", "rapper", "boom bap", "smoky", "late night",
            "pianist", "rainy", "symphon", "chamber", "cathedral", "wedding", "campfire", "unplugged", "meditation", "floating",
            "sequenced", "arcade", "drummer", "marching", "brisk", "speedy", "gloomy", "sunny", "mournful", "unhurried")
EVALUATION = {
    "techno": ("i want {} bpm techno for a warehouse", "rave music, techno with synths, tempo: {}",
               "something dark and techno with a drum machine", "play me melodic techno full of synths"),
    "house": ("sunny disco for the dancefloor, around {} bpm", "bpm: {}, house music with piano please",
              "we need disco for a nightclub", "something groovy, house with a funky bass"),
    "rock": ("i'd like guitar rock, roughly {} bpm", "stadium rock at {} beats a minute",
             "a garage band, loud rock with distorted guitars", "play me something heavy with electric guitars, rock"),
    "hip-hop": ("boom bap hip hop around {} bpm", "a beat for a rapper, hip-hop, tempo: {}",
                "late night lo-fi hip hop please", "something laid-back with a deep bass, hip-hop"),
    "jazz trio": ("some swing jazz, roughly {} bpm", "jazz for a smoky bar, {} beats a minute",
                  "play me a jazz trio with walking bass", "late night jazz, piano and double bass please"),
    "solo piano": ("a pianist alone, piano at around {} bpm", "tempo: {}, some tender piano",
                   "mournful piano for a rainy day", "something gentle on the piano please"),
    "string ensemble": ("chamber strings, roughly {} bpm", "i want violins and cellos, strings, {} beats a minute",
                        "symphonic strings that sounds cinematic", "play me unhurried classical strings"),
    "church organ": ("bpm: {}, organ in a cathedral", "i'd like a church organ around {} bpm",
                     "organ music for a wedding", "something solemn for the organ please"),
    "acoustic guitar": ("campfire guitar, roughly {} bpm", "unplugged, acoustic guitar at {} beats a minute",
                        "some folk guitar for a sunny day", "play me a steel strings acoustic guitar"),
    "ambient pads": ("floating ambient pads, around {} bpm", "meditation, ambient music, tempo: {}",
                     "something ambient and dreamy for the night", "i want warm pads, ambient, full of bells"),
    "synth arpeggios": ("sequenced synth arpeggios, bpm: {}", "arcade game, arpeggios on a synth, around {} bpm",
                        "something full of synth arpeggios", "i'd like a speedy arpeggiated synth"),
    "drums alone": ("a drummer alone, drums, {} beats a minute", "i want a drum beat of roughly {} bpm",
                    "play me a drum solo", "marching drums, only drums please")}


def evaluation_prompts():
    """Prompts in phrasings that no training caption has: dicts of prompt, style and tempo (BPM, or None if not named).

    Four a style, two of them with a tempo. Each has a word or phrase of HELD_OUT beside words that captions do have.
    """
    return [{"prompt": text.format(tempo), "style": style, "tempo": tempo if "{}" in text else None}
            for style, texts in EVALUATION.items() for text, tempo in zip(texts, STYLES[style][1] * 2)]


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
    parser.add_argument("--clips", type=int, required=True, metavar="N", help="styles take turns: a multiple of 12 is even")
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
