"""What tests and make_golden.py share: audio by a formula, a sweep over exact noise, so that it need not be stored."""
import numpy as np

SPOKEN = ["a slow blues", "", "a fast techno track with bright synths", "ambient pads, no drums"]
SECONDS = (0.4, 3.3, 10, 12)  # repeated, repeated and padded, as it is, cut


def waveform(seconds, rate):
    n = np.arange(round(seconds * rate))
    t, noise = n / rate, n * n * 7919 % 104729 / 104729 - 0.5
    pitch = 200 + 150 * seconds + 900 * t / seconds
    return ((0.4 + 0.3 * np.sin(6 * np.pi * t)) * np.sin(2 * np.pi * pitch * t) * 0.5 + 0.05 * noise).astype(np.float32)


def sketch(array):
    """What is stored of a large array: every n-th number, its largest one, and sums of all numbers of random sign."""
    flat = array.reshape(-1).astype(np.float64)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (2, len(flat)))
    return np.concatenate([flat[::len(flat) // 48 + 1], [np.abs(flat).max()], signs @ flat / len(flat) ** 0.5]
                          ).astype(np.float32)
