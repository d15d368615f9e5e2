"""What the stages of train.py minimise, as MindSpore functions; axis letters are those of layers.py.

The discriminators are HiFi-GAN's (Kong et al., 2020, section 2.3), of any width and without grouped convolutions.
"""
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops import constexpr

import layers
import musicldm

PERIODS = (2, 3, 5, 7, 11)  # samples between two that a period discriminator sees side by side
SCALES = 3  # a scale discriminator hears the waveform itself, another its mean over 2 samples, and over 4


def contrastive(text, audio, scale_text, scale_audio):
    """Cross entropy of each text among all audios and the reverse (Radford et al., 2021, figure 3), N pairs.

    text, audio: unit vectors (N, D); scales: logarithms. Not transformers' `return_loss`, which transposes the logits
    of audio before and so counts one direction twice.
    """
    labels = ops.arange(text.shape[0])
    cosines = ops.MatMul(transpose_b=True)(text, audio)
    return (ops.cross_entropy(cosines * ops.exp(scale_text), labels)
            + ops.cross_entropy(cosines.transpose(1, 0) * ops.exp(scale_audio), labels)) / 2


def unit(x):
    """Rows (N, D) of length 1."""
    return x * ops.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)


def kl_divergence(mean, log_variance):
    """Of normal latents from unit normal ones, a number of them (Kingma & Welling, 2013, appendix B)."""
    return ((mean * mean + ops.exp(log_variance) - 1 - log_variance) / 2).mean()


# ------------------------------------------------------------------------------------------------------- spectrograms

@constexpr
def stft_basis(size, hop, bands, rate):
    """Cosines and sines under a Hann window (size / 2, bins), mel filters (bins, bands), and what turns a hop around,
    (hop, hop).

    The window is 0 at sample 0, and the same at n and size - n: a cosine takes the sum of these two, a sine their
    difference.
    """
    n = np.arange(1, size // 2 + 1)[:, None]
    angles, hann = 2 * np.pi * n * np.arange(size // 2 + 1) / size, np.hanning(size + 1)[n]
    hann[-1] /= 2  # the middle is added to itself
    filters = musicldm.mel_filters(rate, size, 0, rate / 2, bands)
    return tuple(Tensor(x.astype(np.float32)) for x in (np.cos(angles) * hann, np.sin(angles) * hann, filters,
                                                        np.eye(hop)[::-1]))


def log_mel(x, size, hop, bands, rate):
    """musicldm.log_mel of waveforms (N, samples) in a graph, without frames that reach outside: (N * frames, bands).

    hop must divide samples.
    """
    cosines, sines, filters, turn = stft_basis(size, hop, bands, rate)
    n, hops, last = x.shape[0], x.shape[1] // hop, -(-size // hop) - 1
    rest = (last + 1) * hop - size  # of a frame's hops, behind its window
    count = (rest + size // 2) // hop + 1  # hops of half a window
    forth = x.reshape(n, hops, hop)
    back = ops.MatMul()(x.reshape(-1, hop), turn).reshape(n, hops, hop)
    forth = ops.Concat(2)([forth[:, i:hops - last + i] for i in range(count)]).reshape(-1, count * hop)
    back = ops.Concat(2)([back[:, last - i:hops - i] for i in range(count)]).reshape(-1, count * hop)
    rising, falling = forth[:, 1:size // 2 + 1], back[:, rest:rest + size // 2]
    real, imaginary = ops.MatMul()(rising + falling, cosines), ops.MatMul()(rising - falling, sines)
    magnitudes = ops.sqrt(real * real + imaginary * imaginary + 1e-9)
    return ops.log(ops.maximum(ops.MatMul()(magnitudes, filters), Tensor(1e-5, magnitudes.dtype)))


def mel_distance(x, y, size, hop, bands, rate):
    """L1 between the log-mel spectrograms of waveforms (N, samples)."""
    return ops.abs(log_mel(x, size, hop, bands, rate) - log_mel(y, size, hop, bands, rate)).mean()


# ----------------------------------------------------------------------------------------------------- discriminators

def discriminator_layers(channels):
    """([(I, O, kernel, stride)] of a period discriminator, the same of a scale discriminator), the last gives a score.

    channels: of the layers, such as (32, 128, 512, 1024)
    """
    inputs = (1, *channels)
    period = [(i, o, 5, 3) for i, o in zip(inputs, channels)] + [(channels[-1], channels[-1], 5, 1)]
    scale = [(1, channels[0], 15, 1)] + [(i, o, 41, 4) for i, o in zip(channels, channels[1:])]
    scale += [(channels[-1], channels[-1], 5, 1)]
    return period + [(channels[-1], 1, 3, 1)], scale + [(channels[-1], 1, 3, 1)]


def discriminator_shapes(channels):
    """{name: shape} of all discriminators' parameters."""
    period, scale = discriminator_layers(channels)
    kinds = {**{f"period.{p}": period for p in PERIODS}, **{f"scale.{s}": scale for s in range(SCALES)}}
    return {f"{kind}.convs.{i}.{name}": shape for kind, stack in kinds.items()
            for i, (c, o, kernel, _) in enumerate(stack)
            for name, shape in (("weight", (o, c, kernel, 1)), ("bias", (o,)))}


@constexpr
def strided_geometry(shape, kernel, stride):
    n, h, w, _ = shape
    return n, (h, w), ((h - 1) // stride + 1, w), (kernel, 1), (stride, 1), (1, 1), (kernel // 2, 0), 1, False


def discriminate(x, p, stack):
    """One discriminator's score (N, H, W, 1) of x (N, L, W, 1), and the features of all layers before, a tuple."""
    features = ()
    for i in range(len(stack)):
        x = layers.convolution(x, p[layers.nth("convs", i)], strided_geometry(x.shape, stack[i][2], stack[i][3]))
        if i < len(stack) - 1:
            x = layers.leaky_relu(x, 0.1)
            features = features + (x,)
    return x, features


def discriminators(x, p, channels):
    """Two tuples: every discriminator's score (N, H, W, 1) of waveforms x (N, samples), and the features of all.

    Trailing samples that a discriminator cannot lay out are left out.
    """
    n, samples = x.shape
    period, scale = discriminator_layers(channels)
    scores, features = (), ()
    for length in PERIODS:
        rows = samples // length
        part = x[:, :rows * length].reshape(n, rows, length, 1)
        score, seen = discriminate(part, p[layers.nth("period", length)], period)
        scores, features = scores + (score,), features + seen
    for level in range(SCALES):
        count = samples // 2 ** level
        part = x[:, :count * 2 ** level].reshape(n, count, 1, 2 ** level).mean(-1, keep_dims=True)
        score, seen = discriminate(part, p[layers.nth("scale", level)], scale)
        scores, features = scores + (score,), features + seen
    return scores, features


def adversarial(scores):
    """Least squares of the generator (equation 2): what discriminators say of fake waveforms should be 1."""
    total = 0.0
    for score in scores:
        total = total + ((1 - score) * (1 - score)).mean()
    return total


def discrimination(scores):
    """Least squares of the discriminators (equation 1): scores (2 N, H, W, 1) should be 1 for N real waveforms, 0 for
    the N fake ones behind them."""
    n = scores[0].shape[0] // 2
    total = adversarial([score[:n] for score in scores])
    for score in scores:
        total = total + (score[n:] * score[n:]).mean()
    return total


def feature_matching(real, fake):
    """L1 between all features of real and of fake waveforms (equation 4)."""
    total = 0.0
    for i in range(len(real)):
        total = total + ops.abs(real[i] - fake[i]).mean()
    return total
