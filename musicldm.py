"""MusicLDM, text to music (Chen et al., 2023, arXiv 2308.01546), as pure functions in MindSpore.

`generate` reads like the paper's figure: prompt -> CLAP text tower -> UNet under DDIM with classifier-free guidance ->
VAE decoder -> HiFi-GAN -> waveform. Axis letters are those of layers.py.
"""
import argparse
import difflib
import functools
import io
import math
import numbers
import os
import pathlib
import re
import signal
import sys
import tempfile
import time
import unicodedata
import warnings

import mindspore
import numpy as np
import soundfile
import yaml
from mindspore import Tensor, ops
from scipy import signal as dsp

import weights as checkpoints
from layers import (bert_layer, conv1d, conv2d, conv_transpose1d, group_norm, hifigan_block, image_attention,
                    layer_norm, leaky_relu, linear, patch_merging, resnet, spatial_transformer, swin_block, tanh)
from weights import InputError

DEFAULT_CONFIG = pathlib.Path(__file__).with_name("config.yaml")
CHOICES = {"device": ("auto", "Ascend", "CPU", "GPU"), "dtype": ("float32", "float16", "bfloat16"),
           "sampling.output_type": ("np", "mel", "latent")}
RANGES = {"sampling.audio_length_in_s": (0.04, 600), "sampling.num_inference_steps": (1, 999),
          "sampling.guidance_scale": (0, math.inf), "sampling.eta": (0, 1), "sampling.seed": (0, math.inf),
          "sampling.callback_steps": (1, math.inf)}
FORMATS = (".wav", ".flac", ".ogg")
ARRAYS_AND_CALLBACKS = ("latents", "noise", "callback")  # options of generate() that a config file cannot hold


# ------------------------------------------------------------------------------------------------------ configuration

def unknown(kind, name, valid):
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {kind} {name!r}: {hint}valid: {', '.join(valid)}")


def fits(value, like):
    """Whether `value` has the type of `like`; an integer passes for a float, and a list is not empty."""
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(like, bool) and isinstance(value, bool)
    if isinstance(like, int):
        return isinstance(value, numbers.Integral)
    if isinstance(like, float):
        return isinstance(value, numbers.Real) and -1e30 < value < 1e30  # neither NaN nor Inf
    if isinstance(like, list):
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(fits(item, like[0]) for item in value)
    return isinstance(value, type(like))


def checked_value(name, value, default):
    """`value` as the type of `default`, within the range or choices of its name; else an InputError."""
    if isinstance(default, float) and isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.)?\d+e[-+]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-5 and 1.5e5 as text
    if name == "sampling.negative_prompt":
        valid = "null, a text, or a list of texts, one a prompt"
        ok = value is None or fits(value, "") or fits(value, [""])
    elif name == "unet.attention_head_dim":
        valid, ok = "an integer, or a list of one a level", fits(value, 8) or fits(value, [8])
    else:
        kind = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", list: "a list"}
        valid, ok = f"{kind[type(default)]}, such as {default!r}", fits(value, default)
    if ok and name in CHOICES:
        valid, ok = ", ".join(CHOICES[name]), value in CHOICES[name]
    if ok and name in RANGES:
        low, high = RANGES[name]
        valid, ok = f"{low} or more" if high == math.inf else f"{low} to {high}", low <= value <= high
    if not ok:
        raise InputError(f"{name} is {value!r}; valid: {valid}")
    return float(value) if isinstance(default, float) else value


def merged(base, new, prefix=""):
    """`base` with the values of `new`, an equally nested dict, checked against it; neither is changed."""
    if not isinstance(new, dict):
        name = prefix.rstrip(".") or "the configuration"
        raise InputError(f"{name} is {new!r}; valid: a mapping of {', '.join(base)}")
    result = dict(base)
    for key, value in new.items():
        if key not in base:
            raise unknown("config key", f"{prefix}{key}", [prefix + name for name in base])
        result[key] = (merged(base[key], value, f"{prefix}{key}.") if isinstance(base[key], dict)
                       else checked_value(f"{prefix}{key}", value, base[key]))
    return result


def known_part(stated, base):
    """What a config.json states of the keys that `base` has."""
    return {key: known_part(stated[key], value) if isinstance(value, dict) else stated[key]
            for key, value in base.items() if key in stated}


def parse_yaml(text, where):
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers raise ValueError
        raise InputError(f"{where}: {checkpoints.one_line(error)}") from None


def read_yaml(path):
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config: cannot read {path}: {checkpoints.one_line(error)}") from None
    tree = parse_yaml(text, f"config: cannot read {path}")
    return {} if tree is None else tree


def parse_override(text):
    """ "unet.norm_eps=1" -> {"unet": {"norm_eps": 1}}."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"override {text!r}; valid: key=value, such as sampling.seed=3")
    tree = parse_yaml(value, f"override {text!r}")
    for key in reversed(name.strip().split(".")):
        tree = {key: tree}
    return tree


def load_config(path=DEFAULT_CONFIG, weights=None, overrides=()):
    """The configuration as a nested plain dict: the file, below the checkpoint's own config.json, below `overrides`.

    path: a YAML file; keys it leaves out have the values of the config.yaml beside this module
    weights: a checkpoint folder, a hub id, or "random"; None keeps the file's
    overrides: texts like "sampling.seed=3", the value in YAML
    Raises InputError, one line, for an unreadable file, an unknown key, a wrong type or a value out of range.
    """
    changes = [parse_override(text) for text in overrides] + ([] if weights is None else [{"weights": str(weights)}])
    cfg = merged(read_yaml(DEFAULT_CONFIG), read_yaml(path))
    folder = checkpoints.find_weights(functools.reduce(merged, changes, cfg)["weights"])
    if folder != checkpoints.RANDOM:
        stated = checkpoints.read_config_files(folder)
        cfg = merged(cfg, {section: known_part(stated[section], cfg[section]) for section in stated})
    cfg = {**functools.reduce(merged, changes, cfg), "weights": folder}
    checkpoints.check_architecture(cfg)
    load_vocabulary(cfg)  # refused now rather than when the first prompt is read
    return cfg


def frozen(section):
    """A config section as a constant of a MindSpore graph, which keys its cache on tuples but not on lists."""
    if isinstance(section, dict):
        return {key: frozen(value) for key, value in section.items()}
    return tuple(frozen(value) for value in section) if isinstance(section, (list, tuple)) else section


# ---------------------------------------------------------------------------------------------------------- tokenizer

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
# GPT-2's pattern (openai/gpt-2, encoder.py), on text whose characters stand for their Unicode class: see `words`
WORDS = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)


def byte_characters():
    """GPT-2's printable stand-in for each byte: [chr] of length 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def words(text):
    """GPT-2's words. `re` lacks \\p{L} and \\p{N}: it is shown an ASCII character of the same class for any other."""
    def stand_in(character):
        category = unicodedata.category(character)
        return "A" if category[0] == "L" else "0" if category[0] == "N" else (
            "\n" if category[0] == "Z" or character == "\x85" else "!")

    classes = "".join(character if character.isascii() else stand_in(character) for character in text)
    return [text[match.start():match.end()] for match in WORDS.finditer(classes)]


def byte_pairs(word, ranks):
    """Byte-pair encoding (Sennrich et al., 2016): merge the pair of lowest rank until none is left."""
    parts = list(word)
    while len(parts) > 1:
        pair = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, math.inf))
        if pair not in ranks:
            break
        joined, i = [], 0
        while i < len(parts):
            step = 2 if tuple(parts[i:i + 2]) == pair else 1
            joined.append("".join(parts[i:i + step]))
            i += step
        parts = joined
    return parts


def load_vocabulary(cfg):
    """({token: id}, {pair: rank}) of the checkpoint; for random weights the bytes alone."""
    if cfg["weights"] == checkpoints.RANDOM:
        return {token: i for i, token in enumerate([*SPECIAL_TOKENS, *byte_characters()])}, {}
    vocab_path, merges_path = (pathlib.Path(cfg["weights"]) / name for name in checkpoints.TOKENIZER_FILES)
    vocab = checkpoints.read_json(vocab_path)
    size = cfg["text_encoder"]["text_config"]["vocab_size"]
    if not isinstance(vocab, dict) or not all(type(i) is int and 0 <= i < size for i in vocab.values()):
        raise InputError(f"weights: {vocab_path} must map tokens to integers below the vocab_size, {size}")
    missing = [token for token in SPECIAL_TOKENS if token not in vocab]
    if missing:
        raise InputError(f"weights: {vocab_path} lacks the tokens {' '.join(missing)}")
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"weights: cannot read {merges_path}: {checkpoints.one_line(error)}") from None
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return vocab, {pair: rank for rank, pair in enumerate(pairs)}


def text_to_tokens(text, ranks):
    """RoBERTa's tokens of one text. Special tokens written in it count as such; <mask> takes the spaces before it."""
    characters, tokens = byte_characters(), []
    pieces = re.split(f"({'|'.join(SPECIAL_TOKENS)})", text)
    for piece, following in zip(pieces, pieces[1:] + [""]):
        if piece in SPECIAL_TOKENS:
            tokens.append(piece)
            continue
        for word in words(piece.rstrip() if following == "<mask>" else piece):
            tokens += byte_pairs("".join(characters[byte] for byte in word.encode("utf-8")), ranks)
    return tokens


def tokens_to_text(tokens):
    codes = {character: byte for byte, character in enumerate(byte_characters())}
    parts = (token.encode() if token in SPECIAL_TOKENS else bytes(codes[character] for character in token)
             for token in tokens)
    return b"".join(parts).decode("utf-8", errors="replace")


def tokenize(cfg, prompts):
    """Token ids and mask, np.int32 (n, L) each, padded to the longest of the prompts (a text or a list of texts).

    A prompt longer than the text tower's 512 positions is cut, with a warning that quotes what was cut.
    """
    vocab, ranks = load_vocabulary(cfg)
    text = cfg["text_encoder"]["text_config"]
    longest = text["max_position_embeddings"] - text["pad_token_id"] - 1
    rows = []
    for prompt in checked_prompts(prompts):
        tokens = text_to_tokens(prompt, ranks)
        if len(tokens) > longest - 2:
            cut = tokens_to_text(tokens[longest - 2:])
            warnings.warn(f"a prompt is longer than {longest - 2} tokens; cut: {cut!r}", stacklevel=2)
        tokens = ["<s>", *tokens[:longest - 2], "</s>"]
        rows.append([vocab.get(token, vocab["<unk>"]) for token in tokens])
    length = max(map(len, rows))
    ids = [row + [vocab["<pad>"]] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return np.array(ids, np.int32), np.array(mask, np.int32)


# ------------------------------------------------------------------------------------------------------------- models

@mindspore.jit
def clap_text(ids, positions, bias, text_model, text_projection, cfg):
    """CLAP's text tower (RoBERTa) and projection: ids, positions (N, L), bias (N, 1, 1, L) -> (N, projection_dim).

    transformers' ClapModel.get_text_features, before it is normalised.
    """
    p = text_model["embeddings"]
    x = (ops.gather(p["word_embeddings"]["weight"], ids, 0) + p["token_type_embeddings"]["weight"][0]
         + ops.gather(p["position_embeddings"]["weight"], positions, 0))
    x = layer_norm(x, **p["LayerNorm"], eps=cfg["layer_norm_eps"])
    for i in range(cfg["num_hidden_layers"]):
        x = bert_layer(x, bias, text_model["encoder"]["layer." + str(i)], heads=cfg["num_attention_heads"],
                       eps=cfg["layer_norm_eps"])
    x = tanh(linear(x[:, 0], **text_model["pooler"]["dense"]))
    return linear(ops.relu(linear(x, **text_projection["linear1"])), **text_projection["linear2"])


@mindspore.jit
def clap_audio(x, audio_encoder, audio_projection, cfg):
    """CLAP's audio tower (HTSAT, Chen et al., 2022) and projection: x (N, frames, mels) -> (N, projection_dim).

    x is a log-mel spectrogram whose spec_size ** 2 / mels frames fill the square image that it is folded into.
    transformers' ClapModel.get_audio_features after its interpolation, before it is normalised.
    """
    n, frames, mels = x.shape
    p, patch, window = audio_encoder["batch_norm"], cfg["patch_size"], cfg["window_size"]
    x = (x - p["running_mean"]) * ops.rsqrt(p["running_var"] + 1e-5) * p["weight"] + p["bias"]
    p, size = audio_encoder["patch_embed.proj"], cfg["spec_size"] // patch
    # successive parts of the time axis come one below the other in the image
    x = x.reshape(n, cfg["spec_size"] // mels, size, patch, mels // patch, patch).transpose(0, 1, 4, 2, 5, 3)
    x = linear(x.reshape(n, size * size, patch * patch), p["weight"].reshape(-1, patch * patch), p["bias"])
    x = layer_norm(x, **audio_encoder["patch_embed"]["norm"], eps=1e-5)
    for stage in range(len(cfg["depths"])):
        p = audio_encoder["layers." + str(stage)]
        for i in range(cfg["depths"][stage]):
            x = swin_block(x, p["blocks." + str(i)], size=size, window=window, eps=cfg["layer_norm_eps"],
                           shift=window // 2 if i % 2 == 1 and size > window else 0,
                           heads=cfg["num_attention_heads"][stage])
        if "downsample" in p:
            x = patch_merging(x, p["downsample"], size=size)
            size = size // 2
    x = layer_norm(x, **audio_encoder["norm"], eps=1e-5).mean(1)
    return linear(ops.relu(linear(x, **audio_projection["linear1"])), **audio_projection["linear2"])


def unet(x, timestep, class_labels, p, cfg):
    """diffusers' UNet2DConditionModel as MusicLDM uses it: the noise in x at a timestep, given CLAP vectors.

    x (N, H, W, 8), timestep (1, block_out_channels[0]) its sinusoids, class_labels (N, projection_dim) -> (N, H, W, 8)
    """
    channels, layers, groups, eps = (cfg["block_out_channels"], cfg["layers_per_block"], cfg["norm_num_groups"],
                                     cfg["norm_eps"])
    levels, heads = len(channels), cfg["attention_head_dim"]
    embedding = linear(timestep, **p["time_embedding"]["linear_1"])
    embedding = linear(ops.silu(embedding), **p["time_embedding"]["linear_2"])
    embedding = ops.silu(ops.cat((ops.broadcast_to(embedding, (x.shape[0], embedding.shape[1])),
                                  linear(class_labels, **p["class_embedding"])), -1))

    x = conv2d(x, **p["conv_in"])
    skips = (x,)
    for level in range(levels):
        block = p["down_blocks." + str(level)]
        for i in range(layers):
            x = resnet(x, embedding, block["resnets." + str(i)], groups=groups, eps=eps)
            if "attentions.0" in block:
                x = spatial_transformer(x, block["attentions." + str(i)], heads=heads[level], groups=groups)
            skips = skips + (x,)
        if "downsamplers.0" in block:
            x = conv2d(x, **block["downsamplers.0"]["conv"], stride=2)
            skips = skips + (x,)

    block = p["mid_block"]
    x = resnet(x, embedding, block["resnets.0"], groups=groups, eps=eps)
    x = spatial_transformer(x, block["attentions.0"], heads=heads[-1], groups=groups)
    x = resnet(x, embedding, block["resnets.1"], groups=groups, eps=eps)

    for level in range(levels):
        block = p["up_blocks." + str(level)]
        for i in range(layers + 1):
            x = resnet(ops.cat((x, skips[-1]), -1), embedding, block["resnets." + str(i)], groups=groups, eps=eps)
            skips = skips[:-1]
            if "attentions.0" in block:
                x = spatial_transformer(x, block["attentions." + str(i)], heads=heads[-1 - level], groups=groups)
        if "upsamplers.0" in block:
            x = conv2d(x, **block["upsamplers.0"]["conv"], upsample_to=skips[-1].shape[1:3])
    return conv2d(ops.silu(group_norm(x, **p["conv_norm_out"], groups=groups, eps=eps)), **p["conv_out"])


@mindspore.jit
def guided_noise(x, timestep, embeds, guidance_scale, p, cfg):
    """The noise in latents x (N, H, W, 8), under classifier-free guidance (Ho & Salimans, 2022) if embeds has 2 N rows.

    embeds (2 N, projection_dim): what to steer away from, then the prompts; or (N, projection_dim), the prompts alone.
    """
    if embeds.shape[0] == x.shape[0]:
        return unet(x, timestep, embeds, p, cfg)
    away, toward = ops.chunk(unet(ops.cat((x, x), 0), timestep, embeds, p, cfg), 2, 0)
    return away + guidance_scale * (toward - away)


@mindspore.jit
def vae_decode(x, p, cfg):
    """diffusers' AutoencoderKL.decode: latents x (N, H, W, 8), divided by scaling_factor -> log-mel (N, 4 H, 4 W)."""
    groups, levels = cfg["norm_num_groups"], len(cfg["block_out_channels"])
    x = linear(x, **p["post_quant_conv"])
    p = p["decoder"]
    x = conv2d(x, **p["conv_in"])
    x = resnet(x, None, p["mid_block"]["resnets.0"], groups=groups, eps=1e-6)
    x = image_attention(x, p["mid_block"]["attentions.0"], groups=groups)
    x = resnet(x, None, p["mid_block"]["resnets.1"], groups=groups, eps=1e-6)
    for level in range(levels):
        block = p["up_blocks." + str(level)]
        for i in range(cfg["layers_per_block"] + 1):
            x = resnet(x, None, block["resnets." + str(i)], groups=groups, eps=1e-6)
        if "upsamplers.0" in block:
            x = conv2d(x, **block["upsamplers.0"]["conv"], upsample_to=(2 * x.shape[1], 2 * x.shape[2]))
    x = conv2d(ops.silu(group_norm(x, **p["conv_norm_out"], groups=groups, eps=1e-6)), **p["conv_out"])
    return x.reshape(x.shape[:3])


@mindspore.jit
def hifigan(mel, p, cfg):
    """transformers' SpeechT5HifiGan (Kong et al., 2020): log-mel (N, frames, bands) -> waveform (N, samples).

    In [-1, 1]; at the published rates samples = 160 * frames + 32.
    """
    kernels, dilations, slope = cfg["resblock_kernel_sizes"], cfg["resblock_dilation_sizes"], cfg["leaky_relu_slope"]
    if cfg["normalize_before"]:
        mel = (mel - p["mean"]) / p["scale"]
    x = conv1d(mel, **p["conv_pre"], kernel=7)
    for i in range(len(cfg["upsample_rates"])):
        x = conv_transpose1d(leaky_relu(x, slope), **p["upsampler." + str(i)], kernel=cfg["upsample_kernel_sizes"][i],
                             stride=cfg["upsample_rates"][i])
        total = 0.0
        for j in range(len(kernels)):
            y = x if j == 0 else ops.Depend()(x, total)  # one block after the other, so that they share memory
            total = total + hifigan_block(y, p["resblocks." + str(i * len(kernels) + j)], kernel=kernels[j],
                                          dilations=dilations[j], slope=slope)
        x = total / len(kernels)
    x = conv1d(leaky_relu(x, 0.01), **p["conv_post"], kernel=7)  # torch's default slope: the reference gives none here
    return tanh(x.reshape(x.shape[:2]))


# --------------------------------------------------------------------------------------------------------------- DDIM

def ddim_timesteps(steps, schedule):
    """diffusers' "leading" spacing: `steps` integers from high to low."""
    train = schedule["num_train_timesteps"]
    return np.arange(steps)[::-1] * (train // steps) + schedule["steps_offset"]


def alphas_cumprod(schedule):
    """The share of signal left at each timestep, (num_train_timesteps,): "scaled_linear", rounded as diffusers does.

    torch.linspace counts from the nearer end with a float32 step; 1 - alpha is so small at first that it matters.
    """
    n = schedule["num_train_timesteps"]
    start, end = np.float32(schedule["beta_start"] ** 0.5), np.float32(schedule["beta_end"] ** 0.5)
    step, i = float((end - start) / np.float32(n - 1)), np.arange(n)
    roots = np.where(i < n // 2, start + step * i, end - step * (n - 1 - i)).astype(np.float32)
    return np.cumprod(1 - roots ** 2, dtype=np.float64).astype(np.float32)


def timestep_embedding(timesteps, channels):
    """diffusers' Timesteps (flip_sin_to_cos, freq_shift 0): integers (n,) -> float32 (n, channels), cosines first.

    Every product is rounded to float32, as there: an angle of 1000 is only good to 6e-5, and the network sees it.
    """
    half = channels // 2
    exponents = np.float32(-math.log(10000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    angles = np.asarray(timesteps, np.float32)[:, None] * np.exp(exponents, dtype=np.float64).astype(np.float32)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def ddim(eps_fn, x, timesteps, alphas, final_alpha, *, eta=0.0, noise=None):
    """Yield x after each step of DDIM (Song et al., 2020, equations 12 and 16).

    eps_fn(x, t) predicts the noise in x; alphas[t] is the share of signal at timestep t, final_alpha after the last
    step; noise is an iterator of unit normal arrays like x, read when eta > 0. Works on any array type.
    """
    step = len(alphas) // len(timesteps)
    for t in timesteps:
        alpha = float(alphas[t])
        previous = float(alphas[t - step]) if t >= step else float(final_alpha)
        eps = eps_fn(x, int(t))
        clean = (x - (1 - alpha) ** 0.5 * eps) / alpha ** 0.5
        sigma = eta * ((1 - previous) / (1 - alpha) * (1 - alpha / previous)) ** 0.5
        x = previous ** 0.5 * clean + (1 - previous - sigma ** 2) ** 0.5 * eps
        if eta > 0:
            x = x + sigma * next(noise)
        yield x


# ------------------------------------------------------------------------------------------------------ audio features

def resample(audio, rate, new_rate):
    """Audio (..., samples) at one integer rate in Hz -> (..., ceil(samples * new_rate / rate)) at another, float64.

    The low-pass filter is flat up to 0.913 of the lower rate's Nyquist frequency and 126 dB down above it, like soxr's
    HQ, with which the reference resamples: CLAP's bands above 8 kHz hear of 16 kHz audio only what the filter leaks.
    """
    up, down = new_rate // math.gcd(rate, new_rate), rate // math.gcd(rate, new_rate)
    nyquist = 1 / max(up, down)  # of the lower rate, as a share of that of the rate at which the filter runs
    taps, beta = dsp.kaiserord(126, (1 - 0.913) * nyquist)
    lowpass = dsp.firwin(taps | 1, (1 + 0.913) / 2 * nyquist, window=("kaiser", beta))
    return dsp.resample_poly(np.asarray(audio, np.float64), up, down, axis=-1, window=lowpass)


def mel_filters(extractor):
    """Slaney's mel bands (Auditory Toolbox, 1998), each of area 1: (fft_window_size / 2 + 1, feature_size) float64."""
    def mel(hertz):  # linear up to 1000 Hz, 27 bands to a factor of 6.4 above
        return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000, 6.4)

    mels = np.linspace(mel(extractor["frequency_min"]), mel(extractor["frequency_max"]), extractor["feature_size"] + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    bins = np.fft.rfftfreq(extractor["fft_window_size"], 1 / extractor["sampling_rate"])[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    return np.maximum(triangles, 0) * 2 / (high - low)


def clap_features(cfg, waveforms):
    """Waveforms, a list of (samples,) at the extractor's rate -> log-mel power in dB, np.float32 (n, 1, frames, bands).

    transformers' ClapFeatureExtractor ("repeatpad"), but longer audio gives its first nb_max_samples, not random ones.
    """
    extractor = cfg["feature_extractor"]
    length, size, hop = extractor["nb_max_samples"], extractor["fft_window_size"], extractor["hop_length"]
    window, filters, features = dsp.get_window("hann", size), mel_filters(extractor), []
    for waveform in checked_audio(waveforms, extractor["sampling_rate"]):
        waveform = np.tile(waveform[:length].astype(np.float64), max(1, length // len(waveform)))
        waveform = np.pad(np.pad(waveform, (0, length - len(waveform))), size // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(waveform, size)[::hop]
        power = np.abs(np.fft.rfft(frames * window)) ** 2
        features.append(10 * np.log10(np.maximum(power @ filters, 1e-10)))
    return np.stack(features)[:, None].astype(np.float32)


def stretch(x, frames):
    """x (..., L, C) -> (..., frames, C): torch's bicubic interpolation (Keys, 1981, a = -0.75) with align_corners.

    The places are rounded to float32, as there: it is all that the fractions of places near 1000 have.
    """
    length = x.shape[-2]
    places = np.arange(frames, dtype=np.float32) * np.float32((length - 1) / (frames - 1))
    d = np.abs(places[:, None] - np.arange(-1.0, length + 2))
    kernel = np.where(d < 1, (1.25 * d - 2.25) * d ** 2 + 1, np.where(d < 2, ((3.75 - 0.75 * d) * d - 6) * d + 3, 0))
    return kernel @ np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 2), (0, 0)], mode="edge")


# ----------------------------------------------------------------------------------------------------------- pipeline

def to_tensor(cfg, array):
    return Tensor(np.ascontiguousarray(array, np.float32), checkpoints.tensor_dtype(cfg))


def to_numpy(tensor):
    return tensor.astype(mindspore.float32).asnumpy().copy()  # asnumpy shares the tensor's memory


def encode_prompt(cfg, params, prompts):
    """CLAP's text vectors of a text or a list of texts: np.float32 (n, projection_dim), unit length."""
    ids, mask = tokenize(cfg, prompts)
    text = frozen(cfg["text_encoder"]["text_config"])
    # RoBERTa counts positions over what is not padding, from pad_token_id + 1
    real = ids != text["pad_token_id"]
    positions = np.cumsum(real, axis=1) * real + text["pad_token_id"]
    bias = np.where(mask, 0, -1e4)[:, None, None]  # exp() of it is 0 in float32
    p = params["text_encoder"]
    x = to_numpy(clap_text(Tensor(ids), Tensor(positions.astype(np.int32)), Tensor(bias.astype(np.float32)),
                           mindspore.mutable(p["text_model"]), mindspore.mutable(p["text_projection"]), text))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def encode_audio(cfg, params, audio, sampling_rate=16000):
    """CLAP's audio vectors, np.float32 (n, projection_dim), unit length, one waveform at a time.

    audio: floating-point samples in [-1, 1], (samples,) or (n, samples), or a list of 1-D arrays of any lengths; the
        first nb_max_samples, 10 s, count
    sampling_rate: of the audio in Hz, an integer
    Raises InputError, before the tower runs, for audio that is empty, not finite, or of another shape or type.
    """
    waveforms = checked_audio(audio, sampling_rate)
    extractor, tower, p = cfg["feature_extractor"], frozen(cfg["text_encoder"]["audio_config"]), params["text_encoder"]
    encoder, projection = mindspore.mutable(p["audio_model"]["audio_encoder"]), mindspore.mutable(p["audio_projection"])
    rate, width = extractor["sampling_rate"], tower["spec_size"] * (tower["spec_size"] // tower["num_mel_bins"])
    # a second more than is heard, so that the end of the resampling does not show
    longest = extractor["nb_max_samples"] * sampling_rate // rate + sampling_rate
    vectors = []
    for waveform in waveforms:
        features = clap_features(cfg, [resample(waveform[:longest], sampling_rate, rate)])
        x = to_tensor(cfg, stretch(features[:, 0], width))
        vectors.append(to_numpy(clap_audio(x, encoder, projection, tower)))
    x = np.concatenate(vectors)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def score(cfg, params, prompts, audio, sampling_rate=16000):
    """The cosines of CLAP's text and audio vectors, np.float32 (prompts, waveforms): how well each fits each.

    prompts as in `encode_prompt`, audio and sampling_rate as in `encode_audio`
    """
    prompts, audio = checked_prompts(prompts), checked_audio(audio, sampling_rate)
    return encode_prompt(cfg, params, prompts) @ encode_audio(cfg, params, audio, sampling_rate).T


def decode_latents(cfg, params, latents):
    """Latents np.float32 (n, 8, h, w) -> log-mel spectrograms np.float32 (n, 4h, 4w), one at a time."""
    x = np.asarray(latents, np.float32).transpose(0, 2, 3, 1) / np.float32(cfg["vae"]["scaling_factor"])
    p, vae = mindspore.mutable(params["vae"]), frozen(cfg["vae"])
    return np.concatenate([to_numpy(vae_decode(to_tensor(cfg, x[i:i + 1]), p, vae)) for i in range(len(x))])


def vocode(cfg, params, mel):
    """Log-mel spectrograms np.float32 (n, frames, bands) -> waveforms np.float32 (n, samples), one at a time."""
    p, vocoder = mindspore.mutable(params["vocoder"]), frozen(cfg["vocoder"])
    return np.concatenate([to_numpy(hifigan(to_tensor(cfg, mel[i:i + 1]), p, vocoder)) for i in range(len(mel))])


def clip_size(cfg, seconds):
    """(samples, latent shape) of a clip: its frames are rounded up to what the VAE divides by, so none is missing."""
    hop, factor = math.prod(cfg["vocoder"]["upsample_rates"]), 2 ** (len(cfg["vae"]["block_out_channels"]) - 1)
    samples = round(seconds * cfg["vocoder"]["sampling_rate"])
    height, width = math.ceil(samples / (hop * factor)), cfg["vocoder"]["model_in_dim"] // factor
    return samples, (cfg["unet"]["in_channels"], height, width)


def standard_normal(seed, draw, prompts, size):
    """The unit normal noise of one draw of a run, float32 (n, *size), a stream for each waveform.

    Every prompt has the same stream wherever it stands among others; its repetitions have the next ones.
    """
    streams = [np.random.SeedSequence(seed, spawn_key=(prompts[:i].count(prompt), draw))
               for i, prompt in enumerate(prompts)]
    return np.stack([np.random.default_rng(stream).standard_normal(size, np.float32) for stream in streams])


def checked_array(name, value, shape):
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise InputError(f"{name} is not an array of numbers; valid: shape {shape}") from None
    if array.shape != shape:
        raise InputError(f"{name} has the shape {array.shape}; valid: {shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or Inf; valid: finite numbers")
    return array


def checked_audio(audio, sampling_rate):
    """A list of (samples,) arrays, each with a finite floating-point sample or more."""
    if not fits(sampling_rate, 1) or not 1000 <= sampling_rate <= 192000:
        raise InputError(f"sampling_rate is {sampling_rate!r}; valid: an integer from 1000 to 192000")
    try:
        several = isinstance(audio, (list, tuple)) or np.ndim(audio) == 2
        arrays = [np.asarray(x) for x in (audio if several else [audio])]
    except ValueError:
        raise InputError("audio is not an array; valid: (samples,), (n, samples), or a list of 1-D arrays") from None
    for x in arrays or [np.zeros(0)]:
        if x.dtype.kind != "f" or x.ndim != 1 or not x.size:
            raise InputError(f"audio has the shape {x.shape} and the type {x.dtype}; valid: floating-point samples, "
                             "(samples,) or (n, samples), or a list of 1-D arrays")
        if not np.isfinite(x).all():
            raise InputError("audio holds NaN or Inf; valid: finite numbers")
    return arrays


def checked_prompts(prompt):
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError(f"prompt is {prompt!r}; valid: a text, or a list of one text or more")
    for text in prompts:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"prompt {text!r} holds half a surrogate pair; valid: Unicode text")
    return list(prompts)


def checked_options(cfg, options, n):
    """cfg["sampling"] with the options of one call for n prompts, all checked."""
    valid = [*cfg["sampling"], *ARRAYS_AND_CALLBACKS]
    for name in options:
        if name not in valid:
            raise unknown("option", name, valid)
    defaults = read_yaml(DEFAULT_CONFIG)["sampling"]
    sampling = {name: checked_value(f"sampling.{name}", options.get(name, cfg["sampling"][name]), default)
                for name, default in defaults.items()}
    if sampling["num_inference_steps"] > cfg["schedule"]["num_train_timesteps"]:
        raise InputError(f"sampling.num_inference_steps is {sampling['num_inference_steps']}; valid: up to "
                         f"schedule.num_train_timesteps, {cfg['schedule']['num_train_timesteps']}")
    negative = sampling["negative_prompt"]
    if isinstance(negative, (list, tuple)) and len(negative) != n:
        raise InputError(f"negative_prompt is a list of {len(negative)}; valid: one text, or one for each of the {n} "
                         "prompts")
    checked_prompts(negative or "")
    return sampling


def generate(cfg, prompt, params=None, **options):
    """Text to music: a prompt, or a list of n -> np.float32 (n, samples) in [-1, 1] at the vocoder's sampling rate.

    params: what weights.load_params(cfg) returned; None loads them for this call
    options: any key of cfg["sampling"], for this call, and
        latents: the initial noise, unit normal, (n, 8, frames / 4, 16)
        noise: what eta > 0 mixes in, unit normal, one such array a step: (steps, n, 8, frames / 4, 16)
        callback: called as callback(step, timestep, latents) after steps 0, callback_steps, ...
    With output_type "mel" the result is the log-mel spectrogram (n, frames, 64), with "latent" it is the latents.
    A waveform's noise follows from `seed` alone, so a prompt gives the same music alone and among others; a prompt that
    is repeated gives other music each time.
    Raises InputError for unusable arguments or weights, before any model runs, and for a result that is not finite.
    """
    prompts = checked_prompts(prompt)
    n = len(prompts)
    sampling = checked_options(cfg, options, n)
    steps, eta, callback = sampling["num_inference_steps"], sampling["eta"], options.get("callback")
    if callback is not None and not callable(callback):
        raise InputError(f"callback is {callback!r}; valid: a function of step, timestep and latents")
    samples, size = clip_size(cfg, sampling["audio_length_in_s"])
    x, noise = options.get("latents"), options.get("noise")
    x = standard_normal(sampling["seed"], 0, prompts, size) if x is None else checked_array("latents", x, (n, *size))
    noise = (standard_normal(sampling["seed"], i + 1, prompts, size) for i in range(steps)) if noise is None else iter(
        checked_array("noise", noise, (steps, n, *size)))
    if params is None:
        params = checkpoints.load_params(cfg)

    texts = prompts
    if sampling["guidance_scale"] > 1:
        negative = sampling["negative_prompt"] or ""
        texts = ([negative] * n if isinstance(negative, str) else list(negative)) + prompts
    distinct = list(dict.fromkeys(texts))
    embeds = encode_prompt(cfg, params, distinct)[[distinct.index(text) for text in texts]]
    embeds, scale = to_tensor(cfg, embeds), to_tensor(cfg, sampling["guidance_scale"])
    unet_params, unet_cfg = mindspore.mutable(params["unet"]), frozen(cfg["unet"])
    unet_cfg["attention_head_dim"] = checkpoints.heads_by_level(cfg["unet"])
    channels = cfg["unet"]["block_out_channels"][0]

    def eps_fn(x, t):
        return guided_noise(x, to_tensor(cfg, timestep_embedding([t], channels)), embeds, scale, unet_params, unet_cfg)

    timesteps, alphas = ddim_timesteps(steps, cfg["schedule"]), alphas_cumprod(cfg["schedule"])
    final_alpha = 1.0 if cfg["schedule"]["set_alpha_to_one"] else alphas[0]
    noise = (to_tensor(cfg, array.transpose(0, 2, 3, 1)) for array in noise)
    x = to_tensor(cfg, x.transpose(0, 2, 3, 1))
    for i, x in enumerate(ddim(eps_fn, x, timesteps, alphas, final_alpha, eta=eta, noise=noise)):
        if callback is not None and i % sampling["callback_steps"] == 0:
            callback(i, int(timesteps[i]), to_numpy(x).transpose(0, 3, 1, 2))
    result = to_numpy(x).transpose(0, 3, 1, 2)

    if sampling["output_type"] != "latent":
        result = decode_latents(cfg, params, result)
    if sampling["output_type"] == "np":
        result = vocode(cfg, params, result)[:, :samples]
    if not np.isfinite(result).all():
        raise InputError("the result holds NaN or Inf: the weights, the latents or the dtype are at fault")
    return result


# ------------------------------------------------------------------------------------------------------- command line

def output_paths(out, n, samples):
    """One path, or n numbered ones; an InputError now if n clips could not be written there when they are ready."""
    path = pathlib.Path(out)
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--out {out}: unknown format {path.suffix!r}; valid endings: {', '.join(FORMATS)}")
    paths = [path] if n == 1 else [path.with_name(f"{path.stem}_{i + 1}{path.suffix}") for i in range(n)]
    if any(os.path.isdir(path) for path in paths) or not os.path.isdir(path.parent):
        raise InputError(f"--out {out}: valid is a file name in a folder that exists")
    if len(os.fsencode(paths[-1].name)) > 240:
        raise InputError(f"--out {out}: the file name is too long; valid: up to 240 bytes")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:  # has no name, so that nothing can be left behind
            file.write(bytes(2 * n * samples))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    return paths


def write_audio(paths, audio, rate):
    """Every waveform or none: encoded and written beside its path under another name, and then all are renamed."""
    parts = [path.with_name(f".{os.getpid()}.{i}.part") for i, path in enumerate(paths)]
    try:
        for path, part, waveform in zip(paths, parts, audio):
            buffer = io.BytesIO()
            with soundfile.SoundFile(buffer, "w", rate, 1, format=path.suffix[1:]) as file:
                for start in range(0, len(waveform), 10 * rate):  # libsndfile crashes on 3 minutes of ogg at once
                    file.write(waveform[start:start + 10 * rate])
            part.write_bytes(buffer.getvalue())
        for path, part in zip(paths, parts):
            os.replace(part, path)
    except OSError as error:
        raise InputError(f"--out {paths[0]}: cannot be written: {error.strerror}") from None
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def progress_line(steps):
    """A generate() callback that reports each step on standard error, rewriting one line if that is a terminal."""
    start, live = time.perf_counter(), sys.stderr.isatty()
    times = []

    def report(step, timestep, latents):
        times.append(time.perf_counter() - start)
        # the first step also compiles the graph: it does not tell what the others take
        each = (times[-1] - times[0]) / step if step else times[0]
        left = f"  {each * (steps - step - 1):.0f} s left" if step else ""
        text = f"step {step + 1}/{steps}  {each:.2f} s a step{left}"
        print(f"\r{text}\033[K" if live else text, end="\n" if not live or step + 1 == steps else "", file=sys.stderr,
              flush=True)

    return report


def read_prompts(args):
    prompts = list(args.prompt)
    if args.prompts_file:
        try:
            text = pathlib.Path(args.prompts_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--prompts-file {args.prompts_file}: {checkpoints.one_line(error)}") from None
        prompts += [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise InputError("no prompt; valid: --prompt TEXT, once or more, or --prompts-file FILE with a prompt a line")
    return checked_prompts(prompts)


def parse_arguments(argv):
    def fail(message):
        raise InputError(message)

    parser = argparse.ArgumentParser(description="Text to music with MusicLDM.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to play; may be repeated")
    parser.add_argument("--prompts-file", metavar="FILE", help="more prompts, one a line")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    shortcuts = {"--seconds": "sampling.audio_length_in_s", "--steps": "sampling.num_inference_steps",
                 "--guidance": "sampling.guidance_scale", "--eta": "sampling.eta", "--seed": "sampling.seed",
                 "--device": "device", "--dtype": "dtype"}
    for flag, key in shortcuts.items():
        parser.add_argument(flag, dest="set", action="append", metavar=key.split(".")[-1].upper(), help=f"sets {key}",
                            type=lambda value, key=key: f"{key}={value}")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="any other config key")
    parser.set_defaults(set=[])  # argparse would take the default from the first of these flags, which has none
    parser.add_argument("--weights", metavar="DIR|HUB-ID|random", help="checkpoint folder, hub id or random weights")
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), metavar="FILE", help="YAML configuration")
    parser.add_argument("--out", default="musicldm.wav", metavar="FILE", help="wav, flac or ogg, by its ending")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    return parser.parse_args(argv)


def run(argv):
    start = time.perf_counter()
    args = parse_arguments(argv)
    say = (lambda *values: None) if args.quiet else lambda *values: print(*values, flush=True)
    prompts = read_prompts(args)
    cfg = load_config(args.config, args.weights, args.set)
    options = {} if args.negative_prompt is None else {"negative_prompt": args.negative_prompt}
    sampling = checked_options(cfg, options, len(prompts))
    if sampling["output_type"] != "np":
        raise InputError(f"sampling.output_type is {sampling['output_type']!r}; the command line writes audio: np")
    seconds, rate = sampling["audio_length_in_s"], cfg["vocoder"]["sampling_rate"]
    paths = output_paths(args.out, len(prompts), clip_size(cfg, seconds)[0])

    say(f"weights {cfg['weights']}, device {cfg['device']}, {cfg['dtype']}; {seconds:g} s, "
        f"{sampling['num_inference_steps']} steps, guidance {sampling['guidance_scale']:g}, eta {sampling['eta']:g}, "
        f"seed {sampling['seed']}")
    if cfg["weights"] == checkpoints.RANDOM:
        say("the weights are random: the result is noise, not music")
    params = checkpoints.load_params(cfg)
    if not args.quiet:
        options |= {"callback": progress_line(sampling["num_inference_steps"]), "callback_steps": 1}
    audio = generate(cfg, prompts, params, **options)
    write_audio(paths, audio, rate)
    for path, waveform in zip(paths, audio):
        say(f"{path}  {len(waveform) / rate:.2f} s")
    took = time.perf_counter() - start
    say(f"{took:.1f} s in all, {took / (audio.size / rate):.2f} s for each second of audio")


def main(argv=None):
    """The command line: 0 when every file is written, 2 after one line about a mistake, 130 after Ctrl-C."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"musicldm: warning: {message}", file=sys.stderr)
            run(argv)
    except InputError as error:
        print(f"musicldm: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmusicldm: interrupted, nothing written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what MindSpore makes of Ctrl-C while a graph runs
    os.environ.setdefault("MS_OM_PATH", tempfile.gettempdir())  # its notes on a compilation that was interrupted
    sys.exit(main())
