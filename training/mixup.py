"""Beat-synchronous mixup (Chen et al., 2023, section 3.3), as pure functions.

Two tracks of one tempo are aligned at a downbeat of each, cut to the shorter, and added with the weights lambda and
1 - lambda: as waveforms (BAM), or as the UNet's latents (BLM). Tracks without tempo or downbeats have no partner.
"""
import math

import numpy as np


def tempo_distance(a, b):
    """How far apart two tempos (BPM) are, as a share, where doubles and halves count as the same: 0 to 0.42."""
    octaves = math.log2(a / b)
    return 2 ** abs(octaves - round(octaves)) - 1


def partners(tracks, within=0.02):
    """For each track, the indices of those that it can be mixed with: others whose tempo is the same `within` 2 %.

    Tracks that state the same `audio` are parts of one, and no partners.
    """
    known = [i for i, track in enumerate(tracks) if track.get("tempo") and track.get("downbeats")]

    def fit(i, j):
        audio = tracks[i].get("audio", i), tracks[j].get("audio", j)
        return audio[0] != audio[1] and tempo_distance(tracks[i]["tempo"], tracks[j]["tempo"]) <= within

    return [[j for j in known if fit(i, j)] if i in set(known) else [] for i in range(len(tracks))]


def draw_lambda(rng):
    """The weight of the first of two tracks: Beta(5, 5), as the authors' training code has it."""
    return rng.beta(5, 5)


def draw_downbeat(downbeats, length, least, rng):
    """A random downbeat (seconds) of a track of `length` seconds with at least `least` seconds after it; None if
    there is none."""
    fitting = [beat for beat in downbeats if length - beat >= least]
    return float(rng.choice(fitting)) if fitting else None


def mix(a, b, start_a, start_b, weight):
    """weight * a + (1 - weight) * b, aligned at a[start_a] and b[start_b] and cut to the shorter; along the first axis.

    Waveforms (samples,) or latents (rows, ...), of any float dtype; starts are whole samples or rows.
    """
    length = min(len(a) - start_a, len(b) - start_b)
    return weight * a[start_a:start_a + length] + (1 - weight) * b[start_b:start_b + length]
