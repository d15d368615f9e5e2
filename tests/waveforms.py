"""Test audio by a formula, so that it need not be stored: a sweep over exact noise, louder and softer."""
import numpy as np

SECONDS = (0.4, 3.3, 10, 12)  # repeated, repeated and padded, as it is, cut


def waveform(seconds, rate):
    n = np.arange(round(seconds * rate))
    t, noise = n / rate, n * n * 7919 % 104729 / 104729 - 0.5
    pitch = 200 + 150 * seconds + 900 * t / seconds
    return ((0.4 + 0.3 * np.sin(6 * np.pi * t)) * np.sin(2 * np.pi * pitch * t) * 0.5 + 0.05 * noise).astype(np.float32)
