"""MusicLDM, text to music (Chen et al., 2023, arXiv 2308.01546), as pure functions in MindSpore.

What it computes, with the published sizes, for one prompt and 10.24 s:
    tokens (1, 16) of the prompt
    -> clap_text: CLAP's vector (1, 512)
    -> noise (1, 8, 256, 16), denoised step by step by a scheduler around unet, under classifier-free guidance: latents
    -> vae_decode: log-mel spectrogram (1, 1024, 64)
    -> hifigan: waveform (1, 163872) at 16 kHz, of which render keeps 163840 samples
The UNet sees one vector, which goes into its residual blocks beside the timestep; there is no text to attend to. It
was trained on CLAP's vectors of audio, and is led by those of texts, which lie in the same space. The paper's
beat-synchronous mixup is part of training alone (training/mixup.py).

First come the models, then the schedulers, then the pipeline that joins them: `generate`, and what it calls. All that
follows serves it: CLAP's audio tower, music that goes in, the tokenizer, checks, and the command line. For the
algorithm alone read clap_text, unet, guided_prediction, ddim, noise_predictor, denoise and render.

Inside of graphs an image is (N, H, W, C), H being time and W mel frequency; layers.py lists the axis letters. Arrays
outside have diffusers' layout (n, channels, h, w).
"""
import argparse
import collections
import contextlib
import fractions
import functools
import gc
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
import types
import unicodedata
import warnings

if __name__ == "__main__":
    os.environ.setdefault("GLOG_v", "4")  # MindSpore reads it here: no lines of its own beside its exceptions
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process: Python's exception crashes its import

import mindspore
import numpy as np
import soundfile
from mindspore import Tensor, ops
from PIL import Image, ImageDraw, ImageOps

if __package__:  # when the files lie in a package
    from . import layers, weights as checkpoints
    from .weights import DEFAULT_CONFIG, InputError, load_config, one_at_a_time, shown
else:
    import layers
    import weights as checkpoints
    from weights import DEFAULT_CONFIG, InputError, load_config, one_at_a_time, shown

FADE = 0.02  # seconds of a crossfade between what is kept and what is made anew
FORMATS = (".wav", ".flac", ".ogg")
KEPT = 16  # settings whose compiled graphs the command line keeps on disk
COLOURS = ((0, 0, 4), (81, 18, 124), (183, 55, 121), (252, 137, 97), (252, 253, 191))  # of a spectrogram, low to high


# --------------------------------------------------------------------------------------------------------------- models

@mindspore.jit
def clap_text(ids, positions, mask, text_model, text_projection, cfg):
    """CLAP's text tower (RoBERTa) and projection: ids, positions (N, L), mask (N, 1, 1, L) -> (N, projection_dim).

    mask: 0 for a token, far below 0 for padding. transformers' ClapModel.get_text_features, before it is normalised.
    """
    p, eps = text_model["embeddings"], cfg["layer_norm_eps"]
    x = (ops.gather(p["word_embeddings"]["weight"], ids, 0) + p["token_type_embeddings"]["weight"][0]
         + ops.gather(p["position_embeddings"]["weight"], positions, 0))
    x = layers.layer_norm(x, p["LayerNorm"], eps)
    for i in range(cfg["num_hidden_layers"]):
        x = layers.bert_layer(x, mask, text_model["encoder"][layers.nth("layer", i)], cfg["num_attention_heads"], eps)
    x = layers.tanh(layers.linear(x[:, 0], text_model["pooler"]["dense"]))
    return layers.linear(ops.relu(layers.linear(x, text_projection["linear1"])), text_projection["linear2"])


def unet(x, sinusoids, embeds, p, cfg, loop):
    """diffusers' UNet2DConditionModel as MusicLDM uses it: the noise or velocity in latents x, given CLAP vectors.

    x (N, H, W, 8), sinusoids (1 or N, block_out_channels[0]) of the timestep -> (N, H, W, 8)
    embeds (N, projection_dim): the CLAP vectors, diffusers' class_labels
    With `loop` convolutions pad H circularly, so that the clip has no seam; 2 ** (levels - 1) must divide H.
    """
    levels, groups, eps = len(cfg["block_out_channels"]), cfg["norm_num_groups"], cfg["norm_eps"]
    heads = checkpoints.heads_by_level(cfg)
    time = layers.linear(sinusoids, p["time_embedding"]["linear_1"])
    time = layers.linear(layers.silu(time), p["time_embedding"]["linear_2"])
    time = ops.broadcast_to(time, (x.shape[0], time.shape[1]))
    embedding = layers.silu(ops.Concat(1)((time, layers.linear(embeds, p["class_embedding"]))))

    x = layers.conv2d(x, p["conv_in"], loop)
    skips = (x,)
    for level in range(levels):
        block = p[layers.nth("down_blocks", level)]
        for i in range(cfg["layers_per_block"]):
            x = layers.resnet(x, embedding, block[layers.nth("resnets", i)], groups, eps, loop)
            if "attentions.0" in block:
                x = layers.spatial_transformer(x, block[layers.nth("attentions", i)], heads[level], groups)
            skips = skips + (x,)
        if "downsamplers.0" in block:
            x = layers.conv2d(x, block["downsamplers.0"]["conv"], loop, stride=2)
            skips = skips + (x,)

    block = p["mid_block"]
    x = layers.resnet(x, embedding, block["resnets.0"], groups, eps, loop)
    x = layers.spatial_transformer(x, block["attentions.0"], heads[-1], groups)
    x = layers.resnet(x, embedding, block["resnets.1"], groups, eps, loop)

    for level in range(levels):
        block = p[layers.nth("up_blocks", level)]
        for i in range(cfg["layers_per_block"] + 1):
            x, skips = ops.Concat(-1)((x, skips[-1])), skips[:-1]
            x = layers.resnet(x, embedding, block[layers.nth("resnets", i)], groups, eps, loop)
            if "attentions.0" in block:
                x = layers.spatial_transformer(x, block[layers.nth("attentions", i)], heads[-1 - level], groups)
        if "upsamplers.0" in block:
            x = layers.conv2d(x, block["upsamplers.0"]["conv"], loop, upsample_to=skips[-1].shape[1:3])
    x = layers.silu(layers.group_norm(x, p["conv_norm_out"], groups, eps))
    return layers.conv2d(x, p["conv_out"], loop)


@mindspore.jit
def guided_prediction(x, sinusoids, embeds, guidance_scale, p, cfg, loop):
    """`unet` of latents x (N, H, W, 8), under classifier-free guidance (Ho & Salimans, 2022) if embeds has 2 N rows.

    embeds (2 N, projection_dim): what to steer away from, then the prompts; or (N, projection_dim), the prompts alone.
    """
    if embeds.shape[0] == x.shape[0]:
        return unet(x, sinusoids, embeds, p, cfg, loop)
    predicted = unet(ops.cat((x, x), 0), sinusoids, embeds, p, cfg, loop)
    unconditional, conditional = predicted[:x.shape[0]], predicted[x.shape[0]:]
    return unconditional + guidance_scale * (conditional - unconditional)


@mindspore.jit
def vae_decode(x, p, cfg, loop):
    """diffusers' AutoencoderKL.decode: latents x / scaling_factor (N, H, W, 8) -> log-mel (N, 4 H, 4 W)."""
    groups, eps = cfg["norm_num_groups"], 1e-6
    x = layers.conv1x1(x, p["post_quant_conv"])
    p = p["decoder"]
    x = layers.conv2d(x, p["conv_in"], loop)
    x = layers.resnet(x, None, p["mid_block"]["resnets.0"], groups, eps, loop)
    x = layers.image_attention(x, p["mid_block"]["attentions.0"], groups)
    x = layers.resnet(x, None, p["mid_block"]["resnets.1"], groups, eps, loop)
    for level in range(len(cfg["block_out_channels"])):
        block = p[layers.nth("up_blocks", level)]
        for i in range(cfg["layers_per_block"] + 1):
            x = layers.resnet(x, None, block[layers.nth("resnets", i)], groups, eps, loop)
        if "upsamplers.0" in block:
            x = layers.conv2d(x, block["upsamplers.0"]["conv"], loop, upsample_to=(2 * x.shape[1], 2 * x.shape[2]))
    x = layers.silu(layers.group_norm(x, p["conv_norm_out"], groups, eps))
    return layers.conv2d(x, p["conv_out"], loop).squeeze(3)


@mindspore.jit
def hifigan(mel, p, cfg):
    """transformers' SpeechT5HifiGan (Kong et al., 2020): log-mel (N, frames, bands) -> waveform (N, samples)."""
    dilations, slope = cfg["resblock_dilation_sizes"], cfg["leaky_relu_slope"]
    if cfg["normalize_before"]:
        mel = (mel - p["mean"]) / p["scale"]
    x = layers.conv1d(mel, p["conv_pre"])
    for i in range(len(cfg["upsample_rates"])):
        x = layers.leaky_relu(x, slope)
        x = layers.conv_transpose1d(x, p[layers.nth("upsampler", i)], cfg["upsample_rates"][i])
        total = 0.0
        for j in range(len(dilations)):
            block = p[layers.nth("resblocks", i * len(dilations) + j)]
            y = x if j == 0 else ops.Depend()(x, total)  # one block after the other, so that they share memory
            total = total + layers.hifigan_block(y, block, dilations[j], slope)
        x = total * (1 / len(dilations))  # not by a division: MindSpore's keeps an index of every element
    # torch's default slope: the reference gives none here
    return layers.tanh(layers.conv1d(layers.leaky_relu(x, 0.01), p["conv_post"]).squeeze(2))


# ----------------------------------------------------------------------------------------------------------- schedulers
# Each takes x from noise to music, and yields it after every UNet evaluation, as diffusers' `step` returns it (but see
# pndm). Their inputs, of which each takes what it needs:
#   alphas[t] is alpha-bar of Ho et al. (2020) at timestep t, the signal's share of the power: see alphas_cumprod
#   timesteps are scheduler_timesteps', from noise to music
#   x is where to start: unit normal noise, or music noised to the first timestep; of any array type, not changed
#   predict(x, t) returns the noise in x at timestep t, by the UNet; x is `add_noise` of a signal at alphas[t]
#   steps is num_inference_steps, which sets how far timesteps are apart, also where a strength skips the first of them
#   final_alpha is alpha-bar after the last step; noise is an iterator of unit normal arrays like x
# What ddim, pndm and dpm yield is at such a level too; lms, heun and the Eulers yield signal + sigma * noise.

def scheduler_timesteps(scheduler, steps, schedule, strength=1.0):
    """The timestep of each UNet evaluation, integers from high to low in diffusers' "leading" spacing.

    There are `steps` of them, but 2 steps - 1 for heun and from 2 on steps + 1 for pndm: some are evaluated twice. A
    strength below 1 keeps only the last int(steps * strength) steps (diffusers' image-to-image pipelines).
    """
    count = steps + 1 if scheduler == "dpm" else steps  # dpm spaces one more and leaves out the last
    timesteps = np.arange(count)[::-1][:steps] * (schedule["num_train_timesteps"] // count) + schedule["steps_offset"]
    timesteps = timesteps[steps - int(steps * strength):]
    if scheduler == "pndm":
        return np.concatenate([timesteps[:2], timesteps[1:]])
    return np.repeat(timesteps, 2)[1:] if scheduler == "heun" else timesteps


def alphas_cumprod(schedule):
    """Alpha-bar, the share of the signal's power left at each timestep, (num_train_timesteps,), of "scaled_linear".

    Rounded as in diffusers: torch.linspace counts from the nearer end with a float32 step, and 1 - alpha is so small at
    first that it matters.
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


def ddim_step(x, noise_pred, alpha, end, sigma=0.0):
    """x at alpha-bar `alpha` and the noise in it -> x at alpha-bar `end`, but for sigma times fresh noise."""
    clean = (x - (1 - alpha) ** 0.5 * noise_pred) / alpha ** 0.5
    return end ** 0.5 * clean + (1 - end - sigma ** 2) ** 0.5 * noise_pred


def ddim(predict, x, timesteps, alphas, *, steps, final_alpha, eta=0.0, noise=None, **_):
    """DDIM (Song et al., 2020, arXiv 2010.02502, equations 12 and 16); noise is read when eta > 0."""
    step = len(alphas) // steps
    for t in timesteps:
        alpha, end = float(alphas[t]), float(alphas[t - step] if t >= step else final_alpha)
        sigma = eta * ((1 - end) / (1 - alpha) * (1 - alpha / end)) ** 0.5
        x = ddim_step(x, predict(x, int(t)), alpha, end, sigma)
        if eta > 0:
            x = x + sigma * next(noise)
        yield x


def multistep_weights(nodes, end):
    """Adams-Bashforth on uneven nodes: [w], so that sum(w * f(node)) is the integral of f from nodes[0] to `end` for
    every polynomial f of a lower degree than there are nodes. For 0, -1, -2, -3 and 1 they are 55, -59, 37, -9 over 24.
    """
    first, powers = nodes[0], np.arange(len(nodes))
    scaled = (np.asarray(nodes, np.float64) - first) / (end - first)
    return ((end - first) * np.linalg.solve(scaled ** powers[:, None], 1 / (powers + 1))).tolist()


def pndm(predict, x, timesteps, alphas, *, steps, final_alpha, **_):
    """PNDM without its Runge-Kutta steps, or PLMS (Liu et al., 2022, arXiv 2202.09778, equations 9 and 12).

    The first step is taken twice: the second time with the mean of the noise at both of its ends. It is the noises
    that are combined, whatever prediction_type is; diffusers combines velocities.
    """
    step, start, history = len(alphas) // steps, x, ()
    for i, t in enumerate(timesteps):
        noise_pred = predict(x, int(t))
        if i == 1:
            x, t, noise_pred = start, t + step, (noise_pred + history[0]) / 2
        else:
            history = (noise_pred, *history[:3])
            weights = multistep_weights(range(0, -len(history), -1), 1)
            noise_pred = sum(w * e for w, e in zip(weights, history))
        x = ddim_step(x, noise_pred, float(alphas[t]), float(alphas[t - step] if t >= step else final_alpha))
        yield x


def in_sigma_scale(predict, x, timesteps, alphas):
    """The scale of Karras et al. (2022, arXiv 2206.00364): x is signal + sigma * noise, and dx / dsigma the noise.

    Returns noise_at(x, t, sigma) and x, both in that scale, and sigmas, a float a timestep and 0 after the last.
    """
    alphas = np.asarray(alphas, np.float64)[timesteps]
    sigmas = [*(((1 - alphas) / alphas) ** 0.5).tolist(), 0.0]

    def noise_at(x, t, sigma):
        return predict(x / (sigma ** 2 + 1) ** 0.5, int(t))

    return noise_at, x * (sigmas[0] ** 2 + 1) ** 0.5, sigmas


def dpm(predict, x, timesteps, alphas, **_):
    """DPM-Solver++(2M) (Lu et al., 2022, arXiv 2211.01095, algorithm 2); the first and last step are of first order."""
    noise_at, x, sigmas = in_sigma_scale(predict, x, timesteps, alphas)
    previous = None
    for i, (t, sigma, following) in enumerate(zip(timesteps, sigmas, sigmas[1:])):
        clean = x - sigma * noise_at(x, t, sigma)
        target = clean
        if 0 < i < len(timesteps) - 1:
            step_over_last = math.log(sigma / following) / math.log(sigmas[i - 1] / sigma)
            target = clean + step_over_last / 2 * (clean - previous)
        x, previous = following / sigma * x + (1 - following / sigma) * target, clean
        yield x / (following ** 2 + 1) ** 0.5


def lms(predict, x, timesteps, alphas, **_):
    """Linear multistep of order 4 in sigma, as in K. Crowson's k-diffusion on the equation of Karras et al. (2022)."""
    noise_at, x, sigmas = in_sigma_scale(predict, x, timesteps, alphas)
    history = ()
    for i, t in enumerate(timesteps):
        history = (noise_at(x, t, sigmas[i]), *history[:3])
        weights = multistep_weights(sigmas[i::-1][:4], sigmas[i + 1])
        x = x + sum(w * noise_pred for w, noise_pred in zip(weights, history))
        yield x


def heun(predict, x, timesteps, alphas, **_):
    """Heun's method in sigma (Karras et al., 2022, algorithm 1): yields the Euler step, then its correction."""
    timesteps = timesteps[::2]  # each but the first is there twice, for the two evaluations at it
    noise_at, x, sigmas = in_sigma_scale(predict, x, timesteps, alphas)
    for i, (t, sigma, following) in enumerate(zip(timesteps, sigmas, sigmas[1:])):
        noise_pred = noise_at(x, t, sigma)
        predicted = x + (following - sigma) * noise_pred
        yield predicted
        if following > 0:
            x = x + (following - sigma) / 2 * (noise_pred + noise_at(predicted, timesteps[i + 1], following))
            yield x


def euler(predict, x, timesteps, alphas, **_):
    """Euler's method in sigma (Karras et al., 2022)."""
    noise_at, x, sigmas = in_sigma_scale(predict, x, timesteps, alphas)
    for t, sigma, following in zip(timesteps, sigmas, sigmas[1:]):
        x = x + (following - sigma) * noise_at(x, t, sigma)
        yield x


def euler_ancestral(predict, x, timesteps, alphas, *, noise, **_):
    """Euler's method down past the next sigma, then fresh noise up to it: as k-diffusion, after Ho et al. (2020)."""
    noise_at, x, sigmas = in_sigma_scale(predict, x, timesteps, alphas)
    for t, sigma, following in zip(timesteps, sigmas, sigmas[1:]):
        down = following ** 2 / sigma
        up = (following ** 2 - down ** 2) ** 0.5
        x = x + (down - sigma) * noise_at(x, t, sigma) + up * next(noise)
        yield x


SCHEDULERS = {function.__name__: function for function in (ddim, dpm, pndm, lms, heun, euler, euler_ancestral)}


def make_scheduler(name, schedule, steps, eta, noise):
    """The scheduler of a name as a function of (predict, x, timesteps)."""
    alphas = alphas_cumprod(schedule)
    return functools.partial(SCHEDULERS[name], alphas=alphas, steps=steps, eta=eta, noise=noise,
                             final_alpha=1.0 if schedule["set_alpha_to_one"] else alphas[0])


def add_noise(x, noise, alpha):
    """x (...) noised to alpha-bar `alpha` by unit normal noise (Ho et al., 2020, equation 4)."""
    return alpha ** 0.5 * x + (1 - alpha) ** 0.5 * noise


def noise_of_velocity(velocity, x, alpha):
    """The velocity in x = add_noise(signal, noise, alpha) -> the noise. A UNet with v_prediction predicts the velocity,
    alpha ** 0.5 * noise - (1 - alpha) ** 0.5 * signal (Salimans & Ho, 2022, arXiv 2202.00512, appendix D)."""
    return alpha ** 0.5 * velocity + (1 - alpha) ** 0.5 * x


def keeping(predict, known, kept, alphas):
    """`predict` for repainting: where `kept`, (H, 1, 1) of 0 or 1, is 1, it returns the noise that makes x of `known`,
    (n or 1, H, W, C), so that any scheduler stays there on `known`, noised to each step's level.

    Lugmayr et al. (2022, arXiv 2201.09865, equation 8) set x itself, and resample. Here only eta and euler_ancestral
    change the noise on `known` from step to step.
    """
    def predict_kept(x, t):
        alpha = float(alphas[t])
        return kept * (x - alpha ** 0.5 * known) / (1 - alpha) ** 0.5 + (1 - kept) * predict(x, t)

    return predict_kept


# ------------------------------------------------------------------------------------------------------------- pipeline
# Around each compiled model stand the same few functions, none of which changes a result: one_at_a_time is a lock,
# `frozen` makes a config section a constant of the graph, mindspore.mutable makes parameters its inputs, make_room
# bounds how many graphs are kept, `prepared` and `release` save time and memory, `finite` looks for NaN.

@one_at_a_time
def encode_prompt(cfg, prompts, params):
    """CLAP's text vectors of a text or a list of texts: np.float32 (n, projection_dim), unit length.

    Each text goes through the tower alone, so that what stands beside it changes nothing.
    """
    prompts, text_cfg = checked_prompts(prompts), frozen(cfg["text_encoder"]["text_config"])
    p = params["text_encoder"]
    model, projection = mindspore.mutable(p["text_model"]), mindspore.mutable(p["text_projection"])
    distinct, vectors = list(dict.fromkeys(prompts)), {}
    for prompt, ids, mask in zip(distinct, *tokenize(cfg, distinct)):
        inputs = text_inputs(cfg, ids[None], mask[None], padded_length(cfg, int(mask.sum())))
        x = to_numpy(clap_text(*map(Tensor, inputs), model, projection, text_cfg))[0]
        vectors[prompt] = x / np.linalg.norm(x)
    return finite(np.stack([vectors[prompt] for prompt in prompts]), "the prompts' vectors")


@one_at_a_time
def prompt_vectors(cfg, prompts, params, audio_embeds=None, weight=0.5):
    """What the UNet is conditioned on: CLAP vectors np.float32 (n, projection_dim), unit length.

    prompts: a text or a list of texts, or None for audio alone
    audio_embeds (1, projection_dim): `encode_audio`'s, of which each text is mixed with the share `weight`, 0 to 1
    """
    if audio_embeds is None:
        return encode_prompt(cfg, prompts, params)
    if prompts is None:
        return audio_embeds
    mixture = (1 - weight) * encode_prompt(cfg, prompts, params) + weight * audio_embeds
    return mixture / np.linalg.norm(mixture, axis=1, keepdims=True)


def noise_predictor(cfg, x, embeds, params, sampling, alphas):
    """predict(x, t) of the schedulers, for Tensors of x's size: the noise, by `guided_prediction`, all else fixed."""
    make_room(cfg, "unet", x.shape, embeds.shape, sampling["loop"])
    embeds, scale = to_tensor(cfg, embeds), to_tensor(cfg, sampling["guidance_scale"])
    p = mindspore.mutable(prepared(cfg, params["unet"], checkpoints.in_own_memory))
    checkpoints.release(params)  # the loop needs neither the text tower nor what the UNet's were prepared from
    unet_cfg = frozen({**cfg["unet"], "sample_size": None})  # not read by `unet`, but another value would compile anew

    def predict(x, t):
        sinusoids = to_tensor(cfg, timestep_embedding([t], unet_cfg["block_out_channels"][0]))
        predicted = guided_prediction(x, sinusoids, embeds, scale, p, unet_cfg, sampling["loop"])
        is_noise = cfg["schedule"]["prediction_type"] == "epsilon"
        return predicted if is_noise else noise_of_velocity(predicted, x, float(alphas[t]))

    return predict


@one_at_a_time
def denoise(cfg, x, noise, embeds, params, sampling, callback=None, known=None, kept=None):
    """Unit normal x np.float32 (n, 8, h, w) -> latents of that shape: a scheduler's loop around `guided_prediction`.

    noise: an iterator of more such arrays, one a step, for schedulers that mix in fresh noise
    embeds (2 n, projection_dim): what to steer away from, then what toward; or the latter alone, (n, projection_dim)
    sampling: cfg["sampling"], with a number for strength
    known (n or 1, 8, h, w): latents of the music to start from
    kept, bool (h,): which rows stay `known`, noised to each step's level; the others are made anew, from `known` if
        sampling["strength"] is below 1, else from x alone
    Raises NotFinite after a step that leaves NaN or Inf: at once on a CPU, where to look at latents is free; elsewhere
    the device runs ahead until the callback or the end needs them (MindSpore, runtime.launch_blocking).
    """
    alphas = alphas_cumprod(cfg["schedule"])
    predict = noise_predictor(cfg, x, embeds, params, sampling, alphas)
    steps, strength = sampling["num_inference_steps"], sampling["strength"]
    timesteps = scheduler_timesteps(sampling["scheduler"], steps, cfg["schedule"], strength)
    if known is not None:
        x = np.where(kept[:, None] | (strength < 1), add_noise(known, x, float(alphas[timesteps[0]])), x)
        if kept.any():
            known, kept = to_tensor(cfg, known.transpose(0, 2, 3, 1)), to_tensor(cfg, kept[:, None, None])
            predict = keeping(predict, known, kept, alphas)
    noise = (to_tensor(cfg, array.transpose(0, 2, 3, 1)) for array in noise)
    scheduler = make_scheduler(sampling["scheduler"], cfg["schedule"], steps, sampling["eta"], noise)
    on_cpu = checkpoints.use_device(cfg) == "CPU"
    for i, x in enumerate(scheduler(predict, to_tensor(cfg, x.transpose(0, 2, 3, 1)), timesteps)):
        called = callback is not None and i % sampling["callback_steps"] == 0
        if called or on_cpu or i == len(timesteps) - 1:
            latents = finite(to_numpy(x).transpose(0, 3, 1, 2), f"the latents after step {i + 1} of {len(timesteps)}")
        if called:
            callback(i, int(timesteps[i]), latents.copy())
    checkpoints.release(params)
    return latents


@one_at_a_time
def decode_latents(cfg, latents, params, loop=False):
    """Latents np.float32 (n, 8, h, w) -> log-mel spectrograms np.float32 (n, 4h, 4w), one at a time."""
    x = np.asarray(latents, np.float32).transpose(0, 2, 3, 1) / np.float32(cfg["vae"]["scaling_factor"])
    make_room(cfg, "vae", x.shape[1:], loop)
    p, vae = mindspore.mutable(params["vae"]), frozen(cfg["vae"])
    return finite(np.concatenate([to_numpy(vae_decode(to_tensor(cfg, x[i:i + 1]), p, vae, loop))
                                  for i in range(len(x))]), "the spectrogram")


@one_at_a_time
def vocode(cfg, mel, params, loop=False, window=1024):
    """Log-mel spectrograms np.float32 (n, frames, bands) -> waveforms np.float32 (n, samples), one at a time.

    At the published rates a waveform has 160 samples a frame and, unless it is a `loop`, 32 more. A spectrogram longer
    than `window` frames is vocoded window by window, so that memory does not grow, with the same result: a sample
    depends on `reach` frames on either side, so windows overlap by twice that, and their ends are dropped.
    """
    p, vocoder = mindspore.mutable(params["vocoder"]), frozen(cfg["vocoder"])
    hop, reach = math.prod(cfg["vocoder"]["upsample_rates"]), hifigan_reach(cfg["vocoder"])
    samples = mel.shape[1] * hop
    if loop:
        mel = np.pad(mel, ((0, 0), (reach, reach), (0, 0)), mode="wrap")
    step = max(1, window - 2 * reach)
    size = min(mel.shape[1], step + 2 * reach)
    last = mel.shape[1] - size
    make_room(cfg, "vocoder", size)
    audio = np.zeros((len(mel), 0), np.float32)
    for start in [*range(0, last, step), last]:
        made = np.concatenate([to_numpy(hifigan(to_tensor(cfg, x[None, start:start + size]), p, vocoder)) for x in mel])
        first = reach * hop if start else 0
        audio = np.concatenate((audio[:, :start * hop + first], made[:, first:]), axis=1)
    finite(audio, "the audio")
    return audio[:, reach * hop:reach * hop + samples] if loop else audio


def render(cfg, x, noise, embeds, params, sampling, callback=None, original=None):
    """What `generate` does once prompts are vectors and noise is drawn: noise -> latents -> log-mel -> waveforms.

    x, noise, embeds, callback: as in `denoise`; sampling: `checked_call`'s; the result is of sampling["output_type"]
    original (n or 1, samples): music to start from; with parts in sampling["repaint"] it stays outside of them
    """
    samples, size = clip_size(cfg, sampling["audio_length_in_s"], sampling["loop"])
    known = kept = None
    if original is not None:
        share = share_of_new(samples, cfg["vocoder"]["sampling_rate"], sampling["repaint"], sampling["loop"])
        known = encode_latents(cfg, np.atleast_2d(original), params, cfg["vocoder"]["sampling_rate"])
        # the last row of latents may reach past the clip's end
        share_by_row = np.pad(share, (0, size[1] * row_samples(cfg) - samples), mode="edge").reshape(size[1], -1)
        kept = share_by_row.max(axis=1) == 0
    latents = denoise(cfg, x, noise, embeds, params, sampling, callback, known, kept)
    if sampling["output_type"] == "latent":
        return latents
    mel = decode_latents(cfg, latents, params, sampling["loop"])
    if sampling["output_type"] == "mel":
        return mel
    audio = vocode(cfg, mel, params, sampling["loop"])[:, :samples]
    return audio if original is None else share * audio + (1 - share) * original


@one_at_a_time
def generate(cfg, prompt=None, params=None, *, prompt_embeds=None, negative_prompt_embeds=None, audio_prompt=None,
             init_audio=None, latents=None, noise=None, callback=None, audio_length_in_s=None, scheduler=None,
             num_inference_steps=None, guidance_scale=None, negative_prompt=None, eta=None,
             num_waveforms_per_prompt=None, audio_prompt_weight=None, strength=None, repaint=None, extend=None,
             loop=None, seed=None, callback_steps=None, output_type=None):
    """Text to music: a prompt, or a list of them -> np.float32 (n, samples) in [-1, 1] at the vocoder's sampling rate.

    n is the number of prompts times num_waveforms_per_prompt, prompt by prompt.

    params: what weights.load_params(cfg) returned; None loads them for this call
    prompt_embeds, negative_prompt_embeds: CLAP vectors (prompts, projection_dim) of unit length instead of the texts
    audio_prompt: music to follow, alone or mixed into each prompt: a file, (samples, rate) as soundfile.read returns
        them, or samples in [-1, 1] at the vocoder's rate
    init_audio: music to start from, likewise: with `strength` its variation; with `repaint` the same but for those
        parts; with `extend` the same and more of it, the freer the greater the strength
    latents: the initial noise, unit normal, (n, *size), where size is clip_size(cfg, seconds, loop)[1]
    noise: what eta > 0 or euler_ancestral mixes in, unit normal, one a step: (steps, n, *size); others ignore it
    callback: called as callback(i, timestep, latents) after UNet evaluations 0, callback_steps, ..., with the latents
        in the scheduler's own scale; may raise to stop the run, and may call what is here, but not wait for another
        thread that does: threads compute one at a time
    audio_length_in_s and all after it: as config.yaml explains them; None is what cfg["sampling"] says. `seed` may also
        be a list of one a waveform
    With num_waveforms_per_prompt above 1, a prompt's takes go from the most to the least similar to it (`rank`). A
    prompt's takes, and its repetitions, count up the seed. With output_type "mel" the result is the log-mel spectrogram
    (n, frames, 64), with "latent" it is the latents, both in the order of the seeds. A waveform follows from its own
    prompt, seed and options, not from the other prompts and takes of the call.
    Raises InputError for unusable arguments or weights, and its kind OutOfMemory, before any model runs; its kind
    NotFinite after one has.
    """
    call = checked_call(**{name: value for name, value in locals().items() if value is not None})  # all that was given
    sampling, takes = call.sampling, call.sampling["num_waveforms_per_prompt"]
    params = checkpoints.load_params(cfg) if params is None else params

    prompt_embeds, negative_embeds = call.prompt_embeds, call.negative_prompt_embeds
    if prompt_embeds is None:
        heard = call.audio_prompt and encode_audio(cfg, call.audio_prompt[0], params, call.audio_prompt[1])
        prompt_embeds = prompt_vectors(cfg, prompt, params, heard, sampling["audio_prompt_weight"])
    embeds = prompt_embeds
    if call.guided:
        if negative_embeds is None:
            negative_embeds = encode_prompt(cfg, call.negative_prompts, params)
        embeds = np.concatenate((negative_embeds, prompt_embeds))
    embeds = np.repeat(embeds, takes, axis=0)

    if sampling["extend"]:
        result = extended(cfg, call, embeds, params)
    else:
        result = render(cfg, *draw(call), embeds, params, sampling, callback, call.original)
    if sampling["output_type"] != "np" or takes == 1:
        return result
    return result[rank(cfg, prompt_embeds, result, params)[0]]


# ------------------------------------------------------------------------------------------------------- audio and CLAP

def resample(audio, rate, new_rate):
    """Audio (..., samples) at one integer rate in Hz -> (..., ceil(samples * new_rate / rate)) at another, float64.

    Where the ratio of the rates takes numbers above 2,000, the nearest that does not is taken, and its own length.
    The low-pass filter is flat up to 0.913 of the lower rate's Nyquist frequency and 126 dB down above it, like soxr's
    HQ, with which the reference resamples: CLAP's bands above 8 kHz hear of 16 kHz audio only what the filter leaks.
    """
    from scipy import signal as dsp  # here, as it takes most of a second, and few need it
    ratio = fractions.Fraction(new_rate, rate)  # of numbers above 2000, the filter would have 100,000s of taps
    ratio = ratio.limit_denominator(2000) if ratio < 1 else 1 / (1 / ratio).limit_denominator(2000)
    up, down = ratio.numerator, ratio.denominator
    nyquist = 1 / max(up, down)  # of the lower rate, as a share of that of the rate at which the filter runs
    taps, beta = dsp.kaiserord(126, (1 - 0.913) * nyquist)
    lowpass = dsp.firwin(taps | 1, (1 + 0.913) / 2 * nyquist, window=("kaiser", beta))
    return dsp.resample_poly(np.asarray(audio, np.float64), up, down, axis=-1, window=lowpass)


def spectra(waveform, size, hop):
    """Magnitudes, (frames, size / 2 + 1), of a waveform (samples,) under Hann windows of `size`, one every `hop`.

    The first is centred on the first sample; what lies outside the waveform is its reflection.
    """
    waveform = np.pad(waveform.astype(np.float64), size // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(waveform, size)[::hop]
    return np.abs(np.fft.rfft(frames * np.hanning(size + 1)[:-1]))


def mel_filters(rate, size, low, high, bands):
    """Slaney's mel bands (Auditory Toolbox, 1998) from `low` to `high` Hz, each of area 1, for spectra of `size`
    samples at `rate` Hz: (size / 2 + 1, bands) float64."""
    def mel(hertz):  # linear up to 1000 Hz, 27 bands to a factor of 6.4 above
        return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000, 6.4)

    mels = np.linspace(mel(low), mel(high), bands + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    bins = np.fft.rfftfreq(size, 1 / rate)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre))
    return np.maximum(triangles, 0) * 2 / (high - low)


def clap_features(cfg, waveforms):
    """Waveforms, a list of (samples,) at the extractor's rate -> log-mel power in dB, np.float32 (n, 1, frames, bands).

    transformers' ClapFeatureExtractor ("repeatpad"), but longer audio gives its first nb_max_samples, not random ones.
    """
    extractor = cfg["feature_extractor"]
    rate, length = extractor["sampling_rate"], extractor["nb_max_samples"]
    size, hop = extractor["fft_window_size"], extractor["hop_length"]
    filters = mel_filters(rate, size, extractor["frequency_min"], extractor["frequency_max"], extractor["feature_size"])
    features = []
    for waveform in waveforms:
        waveform = np.tile(waveform[:length], max(1, length // len(waveform)))
        power = spectra(np.pad(waveform, (0, length - len(waveform))), size, hop) ** 2
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


@mindspore.jit
def clap_audio(x, audio_encoder, audio_projection, cfg):
    """CLAP's audio tower (HTSAT, Chen et al., 2022) and projection: x (N, frames, mels) -> (N, projection_dim).

    x is a log-mel spectrogram whose spec_size ** 2 / mels frames fill the square image that it is folded into.
    transformers' ClapModel.get_audio_features after its interpolation, before it is normalised.
    """
    n, frames, mels = x.shape
    norm, patch, window = audio_encoder["batch_norm"], cfg["patch_size"], cfg["window_size"]
    x = (x - norm["running_mean"]) * ops.rsqrt(norm["running_var"] + 1e-5) * norm["weight"] + norm["bias"]
    size = cfg["spec_size"] // patch
    # successive parts of the time axis come one below the other in the image
    x = x.reshape(n, cfg["spec_size"] // mels, size, patch, mels // patch, patch).transpose(0, 1, 4, 2, 5, 3)
    x = layers.conv1x1(x.reshape(n, size, size, patch * patch), audio_encoder["patch_embed"]["proj"])
    x = layers.layer_norm(x, audio_encoder["patch_embed"]["norm"], 1e-5)
    for stage in range(len(cfg["depths"])):
        p = audio_encoder[layers.nth("layers", stage)]
        for i in range(cfg["depths"][stage]):
            shift = window // 2 if i % 2 == 1 and x.shape[1] > window else 0
            x = layers.swin_block(x, p[layers.nth("blocks", i)], window, shift, cfg["num_attention_heads"][stage],
                                  cfg["layer_norm_eps"])
        if "downsample" in p:
            x = layers.patch_merging(x, p["downsample"])
    x = layers.layer_norm(x, audio_encoder["norm"], 1e-5).reshape(n, -1, x.shape[3]).mean(1)
    return layers.linear(ops.relu(layers.linear(x, audio_projection["linear1"])), audio_projection["linear2"])


def samples_to_read(cfg, sampling_rate):
    """As many samples as CLAP hears, and a second more, so that the end of the resampling does not show."""
    extractor = cfg["feature_extractor"]
    return extractor["nb_max_samples"] * sampling_rate // extractor["sampling_rate"] + sampling_rate


@one_at_a_time
def encode_audio(cfg, audio, params, sampling_rate=16000):
    """CLAP's audio vectors, np.float32 (n, projection_dim), unit length, one waveform at a time.

    audio: floating-point samples in [-1, 1], (samples,) or (n, samples), or a list of 1-D arrays of any lengths; the
        first nb_max_samples, 10 s, count
    sampling_rate: of the audio in Hz, an integer
    Raises InputError, before the tower runs, for audio that is empty, not finite, or of another shape or type.
    """
    waveforms = checked_audio(audio, sampling_rate)
    audio_cfg, p = frozen(cfg["text_encoder"]["audio_config"]), params["text_encoder"]
    encoder, projection = mindspore.mutable(p["audio_model"]["audio_encoder"]), mindspore.mutable(p["audio_projection"])
    rate, side = cfg["feature_extractor"]["sampling_rate"], audio_cfg["spec_size"]
    longest, vectors = samples_to_read(cfg, sampling_rate), []
    for waveform in waveforms:
        features = clap_features(cfg, [resample(waveform[:longest], sampling_rate, rate)])
        x = to_tensor(cfg, stretch(features[:, 0], side * (side // audio_cfg["num_mel_bins"])))
        vectors.append(to_numpy(clap_audio(x, encoder, projection, audio_cfg)))
    x = np.concatenate(vectors)
    return finite(x / np.linalg.norm(x, axis=1, keepdims=True), "the audio's vectors")


@one_at_a_time
def score(cfg, prompts, audio, params, sampling_rate=16000):
    """How well texts and audio fit: cosines np.float32 (prompts, waveforms) of `encode_prompt` and `encode_audio`."""
    prompts, audio = checked_prompts(prompts), checked_audio(audio, sampling_rate)
    return encode_prompt(cfg, prompts, params) @ encode_audio(cfg, audio, params, sampling_rate).T


def rank(cfg, embeds, audio, params):
    """Each prompt's own waveforms by their CLAP similarity to it, best first.

    embeds (n, projection_dim), audio (n * takes, samples), by prompt -> (order, scores), (n * takes,) each: the indices
    into audio, by prompt and then from best to worst, and the cosines in that order.
    """
    own = np.repeat(np.arange(len(embeds)), len(audio) // len(embeds))  # of each waveform, the number of its prompt
    scores = np.einsum("nd,nd->n", encode_audio(cfg, audio, params, cfg["vocoder"]["sampling_rate"]), embeds[own])
    order = np.lexsort((-scores, own))  # by prompt, then by score
    return order, scores[order]


def interpolate(start, end, n):
    """n unit vectors, float32 (n, d), along the great circle from `start` (d,) to `end` (d,) (Shoemake, 1985)."""
    angle = math.acos(np.clip(np.dot(start, end), -1, 1))
    if angle < 1e-4:  # one point
        return np.tile(np.float32(start), (n, 1))
    t = np.linspace(0, angle, n)[:, None]
    return ((np.sin(angle - t) * start + np.sin(t) * end) / math.sin(angle)).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- music in

def log_mel(vocoder, waveform):
    """The log-mel spectrogram of VAE and vocoder: a waveform (samples,) at their rate -> np.float32 (frames, 64).

    There are samples / 160 frames, rounded up (160 is the product of upsample_rates); silence fills the last one.
    Slaney's bands from 0 Hz to half the rate over magnitudes, log of at least 1e-5: the authors' training code.
    """
    hop, rate = math.prod(vocoder["upsample_rates"]), vocoder["sampling_rate"]
    filters = mel_filters(rate, 1024, 0, rate / 2, vocoder["model_in_dim"])
    waveform = np.pad(waveform, (0, -len(waveform) % hop))
    magnitudes = spectra(waveform, 1024, hop)[:len(waveform) // hop]
    return np.log(np.maximum(magnitudes @ filters, 1e-5)).astype(np.float32)


@mindspore.jit
def vae_encode(x, p, cfg):
    """diffusers' AutoencoderKL.encode: log-mel (N, 4 H, 4 W) -> latents' mean and log variance, (N, H, W, 8) each.

    Neither is multiplied by scaling_factor; the log variance is cut to -30 to 20, as there.
    """
    groups, eps, quant_conv, p = cfg["norm_num_groups"], 1e-6, p["quant_conv"], p["encoder"]
    x = layers.conv2d(x.expand_dims(3), p["conv_in"], False)
    for level in range(len(cfg["block_out_channels"])):
        block = p[layers.nth("down_blocks", level)]
        for i in range(cfg["layers_per_block"]):
            x = layers.resnet(x, None, block[layers.nth("resnets", i)], groups, eps, False)
        if "downsamplers.0" in block:
            x = layers.conv2d(x, block["downsamplers.0"]["conv"], False, stride=2, padding=0)
    x = layers.resnet(x, None, p["mid_block"]["resnets.0"], groups, eps, False)
    x = layers.image_attention(x, p["mid_block"]["attentions.0"], groups)
    x = layers.resnet(x, None, p["mid_block"]["resnets.1"], groups, eps, False)
    x = layers.conv2d(layers.silu(layers.group_norm(x, p["conv_norm_out"], groups, eps)), p["conv_out"], False)
    mean, log_variance = layers.halves(layers.conv1x1(x, quant_conv))
    return mean, ops.clamp(log_variance, -30.0, 20.0)


@one_at_a_time
def encode_latents(cfg, audio, params, sampling_rate=16000):
    """The UNet's latents np.float32 (n, 8, h, w) of waveforms, the inverse of `decode_latents` and `vocode`.

    They are the means of the VAE's encoder times scaling_factor. Silence fills the last row of a waveform.
    audio, sampling_rate: as in `encode_audio`, but all of it counts, and all waveforms are of one length
    """
    waveforms = checked_audio(audio, sampling_rate)
    if len({len(waveform) for waveform in waveforms}) > 1:
        raise InputError("audio holds waveforms of several lengths; valid: of one length")
    vocoder, p, vae, latents = cfg["vocoder"], mindspore.mutable(params["vae"]), frozen(cfg["vae"]), []
    for waveform in waveforms:
        mel = log_mel(vocoder, resample(waveform, sampling_rate, vocoder["sampling_rate"]))
        mel = np.pad(mel, ((0, -len(mel) % vae_factor(cfg)), (0, 0)), constant_values=np.log(1e-5))
        make_room(cfg, "vae", mel.shape, "encoder")
        mean, _ = vae_encode(to_tensor(cfg, mel[None]), p, vae)
        latents.append(to_numpy(mean).transpose(0, 3, 1, 2) * np.float32(cfg["vae"]["scaling_factor"]))
    return finite(np.concatenate(latents), "the latents")


def read_audio(cfg, audio, name="audio_prompt", seconds=None):
    """(mono waveform (samples,), rate in Hz) of what `generate` takes as audio_prompt or init_audio, the option `name`.

    seconds: how much of a file is read; None for what CLAP hears
    """
    if isinstance(audio, (str, os.PathLike)):
        try:
            with soundfile.SoundFile(audio) as file:
                rate = file.samplerate
                audio = file.read(seconds * rate if seconds else samples_to_read(cfg, rate)), rate
        except (OSError, TypeError, ValueError, soundfile.SoundFileError) as error:  # TypeError: without a header
            problem = checkpoints.one_line(error) if os.path.exists(audio) else "there is no such file"
            raise InputError(f"{name}: cannot read {shown(str(audio))}: {problem}; valid: a file that soundfile reads, "
                             "such as wav, flac, ogg or mp3") from None
    pair = isinstance(audio, (tuple, list)) and len(audio) == 2 and isinstance(audio[0], (np.ndarray, list, tuple))
    waveform, rate = audio if pair else (audio, cfg["vocoder"]["sampling_rate"])
    if isinstance(waveform, np.ndarray) and waveform.ndim == 2:
        if not 0 < waveform.shape[1] <= max(1, len(waveform)):
            raise InputError(f"{name} has the shape {waveform.shape}; valid: (samples,) or (samples, channels)")
        waveform = waveform.mean(axis=1)
    try:
        waveform, = checked_audio([waveform], rate)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if not waveform.any():
        raise InputError(f"{name} is silent once it is mono; valid: music")
    return waveform, rate


def checked_init_audio(cfg, audio, sampling):
    """`generate`'s init_audio as np.float32 (samples,) at the vocoder's rate, or None, and sampling, checked with it.

    The waveform is cut to audio_length_in_s. In the sampling that is returned, strength is a number, and
    audio_length_in_s the length of what is computed at once: the clip's, or with extend a window's.
    """
    length, repaint, extend = (sampling[name] for name in ("audio_length_in_s", "repaint", "extend"))
    if audio is None:
        for name in ("strength", "repaint", "extend"):
            if sampling[name]:
                raise InputError(f"{name} stands without init_audio; valid: both")
        return None, {**sampling, "audio_length_in_s": own_length(cfg) if length is None else length, "strength": 1.0}
    rate, (shortest, longest) = cfg["vocoder"]["sampling_rate"], checkpoints.RANGES["sampling.audio_length_in_s"]
    waveform, own_rate = read_audio(cfg, audio, "init_audio", longest + 1)
    heard = waveform[:math.ceil((longest if length is None else length) + 1) * own_rate]  # no more is worth resampling
    waveform = resample(heard, own_rate, rate).astype(np.float32)
    if length is not None and length > len(waveform) / rate:
        raise InputError(f"audio_length_in_s is {length:.9g}, and init_audio has {len(waveform) / rate:.9g} s; valid: "
                         "up to that; extend makes it longer")
    if length is None and not shortest <= len(waveform) / rate <= longest:
        short = f"{len(waveform) / rate:g} s; valid: {shortest:g} s or more"
        long = f"more than {longest} s; valid: audio_length_in_s for how much of it is taken"
        raise InputError(f"init_audio has {short if len(waveform) / rate < shortest else long}")
    length = len(waveform) / rate if length is None else length
    strength = sampling["strength"] or (1.0 if repaint else 0.6 if extend else 0.5)
    if int(sampling["num_inference_steps"] * strength) == 0:
        least = math.ceil(1000 / sampling["num_inference_steps"]) / 1000
        raise InputError(f"strength {strength:g} leaves none of {sampling['num_inference_steps']} steps; valid: more "
                         f"steps, or a strength from {least:g} to 1")
    if extend == 0:
        raise InputError("extend is 0; valid: seconds to add, below 0 before the start, or null for none")
    if extend:
        for name, clashes in (("repaint", repaint), ("loop", sampling["loop"]),
                              ("output_type", sampling["output_type"] != "np")):
            if clashes:
                raise InputError(f"{name} {shown(sampling[name])} stands beside extend; valid: one or the other")
        if length + abs(extend) > longest:
            raise InputError(f"extend is {extend:g} beside {length:g} s; valid: up to {longest} s in all")
    samples, _ = clip_size(cfg, length, sampling["loop"])
    if sampling["loop"] and samples > len(waveform):  # rounded up, a loop would hold silence
        unit, _ = clip_size(cfg, 0, True)
        samples = max(unit, samples - unit)
        length = samples / rate
    share_of_new(samples, rate, repaint, sampling["loop"])  # refuses parts that cannot be
    waveform = np.pad(waveform[:samples], (0, max(0, samples - len(waveform))))
    return waveform, {**sampling, "audio_length_in_s": own_length(cfg) if extend else length, "strength": strength}


def share_of_new(samples, rate, parts, loop):
    """The share of new music in each sample, np.float32 (samples,): 0 outside the parts, up to 1 inside.

    parts: [start, end] in seconds; none is the whole. In a loop, one whose end comes first goes on over the seam.
    A fade is FADE seconds long; there is none at the ends of a clip.
    """
    if not parts:
        return np.ones(samples, np.float32)
    share, ramp = np.zeros(samples, np.float32), round(FADE * rate)
    for start, end in parts:
        first, last = round(start * rate), round(end * rate)
        if not 0 <= first < samples or not 0 < last <= samples or (last <= first and not loop) or first == last:
            raise InputError(f"repaint has the part {start:g}:{end:g}; valid: start and end within the clip's "
                             f"{samples / rate:g} s, the start first by a sample or more, or with loop across the "
                             "seam, such as 6:1")
        place = np.arange(first, last if last > first else last + samples)
        up = np.ones(len(place)) if first == 0 and not loop else (np.arange(len(place)) + 1) / (ramp + 1)
        down = np.ones(len(place)) if last == samples and not loop else (np.arange(len(place)) + 1)[::-1] / (ramp + 1)
        if share[place % samples].any():
            raise InputError(f"repaint has the part {start:g}:{end:g}, which overlaps another; valid: parts apart")
        share[place % samples] = np.minimum(np.minimum(up, down), 1)
    if share.all():
        raise InputError("repaint is the whole of init_audio; valid: a part of it, or strength 1 without repaint")
    return share


def extended(cfg, call, embeds, params):
    """Waveforms (n, samples): call.original with seconds of music after its end, or before its start if below 0.

    Window by window, each of the checkpoint's own length. A window begins with its context, the end of the music so
    far: half a window, or all there is. After that stands the original's last window, again and again. It is repainted,
    as are the context's last FADE seconds. With a strength below 1 it becomes a variation, so that no window strays far
    in key and tempo; with 1 the encoder alone hears it, as after silence the UNet would go on with silence.
    call: `checked_call`'s; embeds as in `render`
    """
    rate, seconds = cfg["vocoder"]["sampling_rate"], call.sampling["extend"]
    window, _ = clip_size(cfg, own_length(cfg))

    def turned(waveforms):  # before the start all is the same, backwards
        return waveforms if seconds > 0 else waveforms[:, ::-1]

    original = audio = turned(np.repeat(call.original[None], len(call.seeds), axis=0))
    wanted = audio.shape[1] + round(abs(seconds) * rate)
    for i in range(window_count(cfg, audio.shape[1], seconds)):
        context = min(audio.shape[1], window // 2)
        added = audio.shape[1] - original.shape[1]
        repeated = original[:, -window:].take(range(added, added + window - context), axis=1, mode="wrap")
        known = turned(np.concatenate((audio[:, -context:], repeated), axis=1))
        start = context / rate - FADE
        part = [start, window / rate] if seconds > 0 else [0, window / rate - start]
        counted = call.callback and (lambda step, *more: call.callback(i * call.evaluations + step, *more))
        made = render(cfg, *draw(call, i), embeds, params, {**call.sampling, "repaint": [part]}, counted, known)
        audio = np.concatenate((audio[:, :-context], turned(made)), axis=1)
    return turned(audio[:, :wanted])


def window_count(cfg, samples, seconds):
    """How many windows `extended` takes for audio of so many samples."""
    rate, (window, _) = cfg["vocoder"]["sampling_rate"], clip_size(cfg, own_length(cfg))
    more = round(abs(seconds) * rate) - (window - min(samples, window // 2))  # after the first of them
    return 1 + max(0, math.ceil(more / (window - window // 2)))


# ------------------------------------------------------------------------------------------------------------ tokenizer

# GPT-2's pattern (openai/gpt-2, encoder.py), on text whose characters stand for their Unicode class: see `words`
WORDS = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)


def words(text):
    """GPT-2's words. `re` lacks \\p{L} and \\p{N}: it is shown an ASCII character of the same class for any other."""
    def stand_in(character):
        kind = "Z" if character == "\x85" else unicodedata.category(character)[0]
        return character if character.isascii() else {"L": "A", "N": "0", "Z": "\n"}.get(kind, "!")

    classes = "".join(map(stand_in, text))
    return [text[match.start():match.end()] for match in WORDS.finditer(classes)]


def byte_pairs(word, ranks):
    """Byte-pair encoding (Sennrich et al., 2016): merge the pair of lowest rank until none is left."""
    parts = list(word)
    while len(parts) > 1:
        pair = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(" ".join(pair), math.inf))
        if " ".join(pair) not in ranks:
            break
        for i in range(len(parts) - 1):  # parts gets shorter meanwhile: beyond its end there is no pair
            if tuple(parts[i:i + 2]) == pair:
                parts[i:i + 2] = ["".join(pair)]
    return parts


def text_to_tokens(text, ranks, added):
    """RoBERTa's tokens of one text. Special and added tokens in it count as such, the longest first, and may take the
    spaces on their left or right: see `load_vocabulary`."""
    characters, tokens, strips_right = checkpoints.byte_characters(), [], False
    pieces = re.split(f"({'|'.join(map(re.escape, sorted(added, key=len, reverse=True)))})", text)
    for piece, token in itertools.zip_longest(pieces[::2], pieces[1::2]):  # after the last piece stands no token
        piece = piece.lstrip() if strips_right else piece
        strips_left, strips_right = added.get(token, (False, False))
        piece = piece.rstrip() if strips_left else piece
        for word in words(piece):
            tokens += byte_pairs("".join(characters[byte] for byte in word.encode("utf-8")), ranks)
        tokens += [token] if token else []
    return tokens


def tokens_to_text(tokens, added):
    """The inverse of `text_to_tokens`."""
    codes = {character: byte for byte, character in enumerate(checkpoints.byte_characters())}
    parts = (token.encode() if token in added else bytes(codes[character] for character in token) for token in tokens)
    return b"".join(parts).decode("utf-8", errors="replace")


def tokenize(cfg, prompts):
    """Token ids and mask, np.int32 (n, L) each, padded to the longest of the prompts (a text or a list of texts).

    A prompt longer than the text tower's 512 positions, or than the tokenizer's own limit, is cut, with a warning that
    quotes what was cut.
    """
    vocab, ranks, added, longest = checkpoints.load_vocabulary(cfg)
    rows = []
    for prompt in checked_prompts(prompts):
        tokens = text_to_tokens(prompt, ranks, added)
        if len(tokens) > longest - 2:
            cut = tokens_to_text(tokens[longest - 2:], added)
            warnings.warn(f"a prompt is longer than {longest - 2} tokens; cut: {shown(cut)}", stacklevel=2)
        tokens = ["<s>", *tokens[:longest - 2], "</s>"]
        rows.append([vocab.get(token, vocab["<unk>"]) for token in tokens])
    length = max(map(len, rows))
    ids = [row + [vocab["<pad>"]] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return np.array(ids, np.int32), np.array(mask, np.int32)


def text_inputs(cfg, ids, mask, length):
    """What `clap_text` takes of `tokenize`'s (n, L), cut or padded to `length`: ids and positions np.int32 (n, length),
    mask np.float32 (n, 1, 1, length)."""
    pad = cfg["text_encoder"]["text_config"]["pad_token_id"]
    ids, mask = (np.pad(x, ((0, 0), (0, max(0, length - x.shape[1]))))[:, :length] for x in (ids, mask))
    ids = np.where(mask == 1, ids, pad).astype(np.int32)
    # RoBERTa counts positions over what is not padding, from pad_token_id + 1
    positions = np.cumsum(ids != pad, axis=1) * (ids != pad) + pad
    mask = np.where(mask == 1, 0, -1e4).astype(np.float32)[:, None, None]  # exp() of -1e4 is 0 in float32
    return ids, positions.astype(np.int32), mask


def padded_length(cfg, tokens):
    """A number of tokens, rounded up to a multiple of 16, so that there are few lengths to compile, or to as many as
    the text tower has positions for."""
    text = cfg["text_encoder"]["text_config"]
    return min(math.ceil(tokens / 16) * 16, text["max_position_embeddings"] - text["pad_token_id"] - 1)


# ------------------------------------------------------------------------------------------------- sizes, seeds, checks

SIZES = 24  # of all models together, which may have compiled graphs at once
COMPILED = set()  # those that do


def make_room(cfg, model, *size):
    """Before a model is compiled for one size more than SIZES, forget all compiled graphs, the caller's own among them.

    MindSpore would keep them, tens of megabytes a graph, until the process ends. Nothing changes in what is computed.
    """
    key = repr((model, cfg[model], cfg["dtype"], size))
    if key not in COMPILED and len(COMPILED) >= SIZES:
        mindspore.ms_memory_recycle()
        COMPILED.clear()
    COMPILED.add(key)


def prepared(cfg, params, as_tensor=Tensor.from_numpy):
    """The UNet's parameters with the kernels of its convolutions transformed already (layers.prepared_weight), so that
    this is done once rather than at each of 200 steps. Elsewhere than on a CPU they are returned as they are.

    They take 1.8 to 4 times the memory. `generate` prepares them in each call, unless they are prepared: for many
    calls, pass it {**params, "unet": prepared(cfg, params["unet"])}. weights.save_params takes none of these.
    as_tensor: makes a Tensor of each new array
    """
    if checkpoints.use_device(cfg) != "CPU":
        return params
    flat = checkpoints.flatten(params)
    for name, x in flat.items():
        if x.ndim == 4 and x.shape[2:] != (1, 1):
            flat[name] = as_tensor(layers.prepared_weight(x, stride=2 if "downsamplers" in name else 1))
    return checkpoints.nest(flat)


def frozen(section):
    """A config section as a constant of a MindSpore graph, which keys its cache on tuples but not on lists."""
    if isinstance(section, dict):
        return {key: frozen(value) for key, value in section.items()}
    return tuple(frozen(value) for value in section) if isinstance(section, (list, tuple)) else section


def to_tensor(cfg, array):
    """An array as a Tensor of the dtype that cfg computes in."""
    return Tensor(np.ascontiguousarray(array, np.float32), checkpoints.tensor_dtype(cfg))


def to_numpy(tensor):
    """A Tensor as an np.float32 array of its own memory."""
    return tensor.astype(mindspore.float32).asnumpy().copy()  # asnumpy shares the tensor's memory


def finite(array, what):
    """The array; a NotFinite that names `what` if it holds NaN or Inf."""
    if not np.isfinite(array).all():
        raise checkpoints.NotFinite(f"NaN or Inf in {what}: the weights, the latents or the dtype are at fault")
    return array


def hifigan_reach(vocoder):
    """The frames on either side of one that its samples depend on, rounded up."""
    kernels, dilations = vocoder["resblock_kernel_sizes"], vocoder["resblock_dilation_sizes"]
    block = max(sum((kernel - 1) // 2 * (dilation + 1) for dilation in d) for kernel, d in zip(kernels, dilations))
    reach, rate = 3, 1  # conv_pre has 7 taps
    for kernel, stride in zip(vocoder["upsample_kernel_sizes"], vocoder["upsample_rates"]):
        reach += layers.polyphase(kernel, stride)[0] / rate
        rate *= stride
        reach += block / rate
    return math.ceil(reach + 3 / rate)


def vae_factor(cfg):
    """How many frames, and how many bands, one row or column of latents stands for."""
    return 2 ** (len(cfg["vae"]["block_out_channels"]) - 1)


def row_samples(cfg):
    """The samples of a waveform that one row of latents stands for; published 640."""
    return math.prod(cfg["vocoder"]["upsample_rates"]) * vae_factor(cfg)


def own_length(cfg):
    """The seconds that a checkpoint was trained on: of its UNet's sample_size rows of latents."""
    if cfg["unet"]["sample_size"] is None:
        raise InputError("unet/config.json states no sample_size; valid: sampling.audio_length_in_s (--seconds)")
    return cfg["unet"]["sample_size"] * row_samples(cfg) / cfg["vocoder"]["sampling_rate"]


def clip_size(cfg, seconds, loop=False):
    """(samples, (channels, height, width) of the latents) of a clip, at the published sizes (163840, (8, 256, 16)).

    The height is rounded up, so that the latents cover every sample. A loop is rounded to what the UNet's coarsest
    level divides by, so that every level can repeat itself.
    """
    samples, row = round(seconds * cfg["vocoder"]["sampling_rate"]), row_samples(cfg)
    height, width = math.ceil(samples / row), cfg["vocoder"]["model_in_dim"] // vae_factor(cfg)
    if loop:
        coarsest = 2 ** (len(cfg["unet"]["block_out_channels"]) - 1)
        height = max(1, round(samples / (row * coarsest))) * coarsest
        samples = height * row
    return samples, (cfg["unet"]["in_channels"], height, width)


def free_memory(cfg):
    """Bytes that this process may take where cfg computes; inf on a GPU, and where the system does not say.

    What it holds counts as free: it is the weights, and MindSpore's pool, which the next call takes again.
    """
    card = checkpoints.card(cfg)
    if card:
        return card.free_memory + mindspore.runtime.memory_reserved()
    if checkpoints.use_device(cfg) != "CPU":
        return math.inf

    def stated(path, pattern, otherwise):
        found = re.search(pattern, pathlib.Path(path).read_text()) if os.path.exists(path) else None
        return int(found[1]) if found else otherwise

    return min(1024 * (stated("/proc/meminfo", r"MemAvailable:\s+(\d+) kB", math.inf)
                       + stated("/proc/self/status", r"RssAnon:\s+(\d+) kB", 0)),
               stated("/sys/fs/cgroup/memory.max", r"^(\d+)", math.inf),  # a container's limit, or its older kind
               stated("/sys/fs/cgroup/memory/memory.limit_in_bytes", r"^(\d+)", math.inf))


def check_memory(cfg, shape, guided):
    """Refuse latents of a shape (n, 8, h, w) whose work would not fit: an OutOfMemory with an estimate.

    The estimate is of all weights, of the blocks that attention and convolutions work in, and of the outputs of the
    finest layers, of the UNet's first two levels for all n or of the VAE's second for one. Its factors come from the
    peaks of 10 to 60 seconds at the published sizes on a CPU, and cover what lives at once elsewhere
    (tests/test_ascend.py).
    """
    n, _, h, w = shape
    in_unet, in_vae = cfg["unet"]["block_out_channels"], cfg["vae"]["block_out_channels"]
    finest = max(12 * (2 if guided else 1) * n * h * w * (in_unet[0] + in_unet[:2][-1]),
                 6 * h * w * vae_factor(cfg) ** 2 * in_vae[:2][-1])
    weights = sum(math.prod(size) for sizes in checkpoints.param_shapes(cfg).values() for size in sizes.values())
    count = weights + 9 * layers.BLOCK + finest
    free = free_memory(cfg)
    if 4 * count > free:
        raise checkpoints.OutOfMemory(
            f"{n} at once with latents of {h} x {w} would take about {4 * count / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} are free; valid: a shorter audio_length_in_s or fewer at once")


def take_seeds(seed, prompts, takes):
    """The seed of each waveform: `takes` a prompt count up from `seed`, and on over its repetitions; or the list."""
    if isinstance(seed, (list, tuple)):
        return list(seed)
    counters = collections.defaultdict(lambda: itertools.count(seed))
    return [next(counters[prompt]) for prompt in prompts for _ in range(takes)]


def standard_normal(seeds, number, size):
    """Unit normal noise, float32 (n, *size): of each waveform what its seed gives under this number."""
    streams = [np.random.SeedSequence(seed, spawn_key=(number,)) for seed in seeds]
    return np.stack([np.random.default_rng(stream).standard_normal(size, np.float32) for stream in streams])


def draw(call, window=0):
    """(initial noise, iterator of the steps' noise) of a window: what `generate` was given, or from the seeds."""
    steps = call.sampling["num_inference_steps"]
    first = window * (steps + 1)
    latents = standard_normal(call.seeds, first, call.size) if call.latents is None else call.latents
    later = (standard_normal(call.seeds, first + i + 1, call.size) for i in range(steps))
    return latents, later if call.noise is None else iter(call.noise)


def checked_call(cfg=None, prompt=None, params=None, prompt_embeds=None, negative_prompt_embeds=None, audio_prompt=None,
                 init_audio=None, latents=None, noise=None, callback=None, at_once=math.inf, **options):
    """`generate`'s arguments, all checked, as a namespace; for what cannot be, an InputError.

    at_once: how many waveforms are to fit in memory, if not all
    sampling (strength and audio_length_in_s are numbers), prompt_embeds, negative_prompt_embeds, latents, noise (arrays
    or None), audio_prompt (waveform, rate) or None, original (samples,) or None, callback; guided: whether the UNet
    takes two rows a waveform; negative_prompts, one a prompt; seeds, one a waveform; size: the latents' (8, h, w);
    evaluations: of the UNet, in a window
    """
    models = [*checkpoints.MODELS]
    for name, value, parts in (("cfg", cfg, ["sampling", *models]), ("params", params, models)):
        if not (name == "params" and value is None or isinstance(value, dict) and value.keys() >= {*parts}):
            raise InputError(f"{name} is {shown(value)}; valid: a dict with {', '.join(parts)}")
    checkpoints.check_config(cfg)
    if params is not None:
        wanted = checkpoints.tensor_dtype(cfg)
        for name, x in checkpoints.checked_tree(cfg, params, may_be_prepared=True).items():
            if x.dtype != wanted:
                raise InputError(f"params hold {x.dtype} in {name}, and cfg computes in {wanted}; valid: of one dtype")
    if prompt_embeds is not None:
        if prompt is not None or audio_prompt is not None:
            raise InputError("prompt_embeds stands beside a prompt or an audio_prompt; valid: one or the other")
        prompt_embeds = checked_vectors("prompt_embeds", prompt_embeds, None, cfg)
        conditions = [row.tobytes() for row in prompt_embeds]  # of equal ones the seed counts up
    else:
        audio_prompt = None if audio_prompt is None else read_audio(cfg, audio_prompt)
        if prompt is None and audio_prompt is None:
            raise InputError("prompt is None; valid: a text, a list of texts, or instead audio_prompt or prompt_embeds")
        conditions = [""] if prompt is None else checked_prompts(prompt)
    n, sampling = len(conditions), checked_options(cfg, options, len(conditions))
    negative = sampling["negative_prompt"]
    if negative_prompt_embeds is not None:
        if negative is not None:
            raise InputError("negative_prompt_embeds stands beside a negative_prompt; valid: one or the other")
        negative_prompt_embeds = checked_vectors("negative_prompt_embeds", negative_prompt_embeds, n, cfg)
    if callback is not None and not callable(callback):
        raise InputError(f"callback is {shown(callback)}; valid: a function of step, timestep and latents")
    original, sampling = checked_init_audio(cfg, init_audio, sampling)
    guided, (_, size) = sampling["guidance_scale"] > 1, clip_size(cfg, sampling["audio_length_in_s"], sampling["loop"])
    shape = (n * sampling["num_waveforms_per_prompt"], *size)
    check_memory(cfg, (min(shape[0], at_once), *size), guided)
    if sampling["extend"] and not (latents is None and noise is None):
        raise InputError("latents or noise stand beside extend; valid: a seed")
    timesteps = scheduler_timesteps(sampling["scheduler"], sampling["num_inference_steps"], cfg["schedule"],
                                    sampling["strength"])
    return types.SimpleNamespace(
        sampling=sampling, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, size=size,
        audio_prompt=audio_prompt, original=original, callback=callback, guided=guided, evaluations=len(timesteps),
        seeds=take_seeds(sampling["seed"], conditions, sampling["num_waveforms_per_prompt"]),
        negative_prompts=negative if isinstance(negative, (list, tuple)) else [negative or ""] * n,
        latents=None if latents is None else checked_array("latents", latents, shape),
        noise=None if noise is None else checked_array("noise", noise, (sampling["num_inference_steps"], *shape)))


def checked_array(name, value, shape):
    """float32 (*shape), whose first length may be None for any."""
    wanted = f"({', '.join('n' if length is None else str(length) for length in shape)})"
    try:
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind in "fiu" else None
    except (TypeError, ValueError, OverflowError):
        array = None
    if array is None:
        raise InputError(f"{name} is not an array of numbers; valid: shape {wanted}")
    if array.ndim != len(shape) or array.size == 0 or any(
            length not in (None, found) for length, found in zip(shape, array.shape)):
        raise InputError(f"{name} has the shape {array.shape}; valid: {wanted}")
    if not np.isfinite(array).all():
        raise InputError(f"{name} holds NaN or Inf; valid: finite numbers")
    return array


def checked_vectors(name, value, n, cfg):
    """np.float32 (n, projection_dim) of unit length, n None for any; else an InputError that begins with `name`."""
    array = checked_array(name, value, (n, cfg["text_encoder"]["projection_dim"]))
    lengths = np.linalg.norm(array, axis=1)
    if np.abs(lengths - 1).max() > 1e-3:
        raise InputError(f"{name} has a row of length {lengths[np.abs(lengths - 1).argmax()]:.3g}; valid: rows of "
                         "length 1, as encode_prompt and encode_audio return them")
    return array


def checked_audio(audio, sampling_rate):
    """A list of (samples,) arrays, each with a finite floating-point sample or more."""
    if not checkpoints.fits(sampling_rate, 1) or not 1000 <= sampling_rate <= 192000:
        raise InputError(f"sampling_rate is {shown(sampling_rate)}; valid: an integer from 1000 to 192000")
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
        if np.abs(x).max() > 10:  # as integers converted to floats do
            raise InputError(f"audio reaches {np.abs(x).max():g}; valid: samples in [-1, 1]")
    return arrays


def checked_prompts(prompt, name="prompt"):
    """A text, or a list of texts -> a list of one text or more; else an InputError."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise InputError(f"{name} is {shown(prompt)}; valid: a text, or a list of one text or more")
    for text in prompts:
        if re.search("[\udc80-\udcff]", text):  # what Python makes of a byte that it could not decode
            raise InputError(f"{name} {shown(text)} is not Unicode text; valid on the command line: a UTF-8 locale, "
                             f"such as LC_ALL=C.UTF-8; this one's encoding is {sys.getfilesystemencoding()}")
        if re.search("[\ud800-\udfff]", text):
            raise InputError(f"{name} {shown(text)} holds half a surrogate pair; valid: Unicode text")
        if len(text) > 10000:  # byte pairs take the square of it, and the text tower 512 tokens
            raise InputError(f"{name} {shown(text)} has {len(text)} characters; valid: up to 10000")
    return list(prompts)


def checked_options(cfg, options, n):
    """cfg["sampling"] with the options of one call for n prompts, all checked."""
    defaults = checkpoints.published_config()["sampling"]
    sampling = {name: checkpoints.checked_value(f"sampling.{name}", options.get(name, cfg["sampling"][name]), default)
                for name, default in defaults.items()}
    scheduler, train = sampling["scheduler"], cfg["schedule"]["num_train_timesteps"]
    longest = train - cfg["schedule"]["steps_offset"] - (scheduler == "dpm")  # more would begin past the schedule
    if sampling["num_inference_steps"] > longest:
        raise InputError(f"sampling.num_inference_steps is {sampling['num_inference_steps']}; valid with the scheduler "
                         f"{scheduler} and {train} training timesteps: up to {longest}")
    if sampling["eta"] > 0 and scheduler != "ddim":
        raise InputError(f"sampling.eta is {sampling['eta']:g}; valid with the scheduler {scheduler}: 0")
    for name, valid in (("negative_prompt", n), ("seed", n * sampling["num_waveforms_per_prompt"])):
        value = sampling[name]
        if isinstance(value, (list, tuple)) and len(value) != valid:
            raise InputError(f"{name} is a list of {len(value)}; valid: one, or a list of {valid}")
    checked_prompts(sampling["negative_prompt"] or "", "negative_prompt")
    return sampling


# --------------------------------------------------------------------------------------------------------- command line

def output_paths(outs, names, replace):
    """For each of `outs`, its path with each name before its ending; of a later run, -2, -3, ..., if one is there."""
    for run in itertools.count(1):
        later = f"-{run}" if run > 1 else ""
        found = [[out.parent / f"{out.stem}{later}{name}{out.suffix}" for name in names] for out in outs]
        if replace or not any(os.path.isfile(path) for paths in found for path in paths):
            return found


def check_output(flag, paths, formats, size):
    """An InputError now if files could not be written there when they are ready; `size` is in bytes."""
    path = max(paths, key=lambda path: len(os.fsencode(path.name)))
    if path.suffix.lower() not in formats:
        raise InputError(f"{flag} {path}: unknown format {shown(path.suffix)}; valid endings: {', '.join(formats)}")
    if any(os.path.isdir(path) for path in paths) or not os.path.isdir(path.parent):
        raise InputError(f"{flag} {path}: valid is a file name in a folder that exists")
    if len(os.fsencode(path.name)) > 240:
        raise InputError(f"{flag} {path}: the file name is too long; valid: up to 240 bytes")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:  # has no name, so that nothing can be left behind
            file.write(bytes(size))
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be written: {error.strerror}") from None


def write_files(contents):
    """{path: bytes}, each file whole: all are written beside their paths under other names, then all are renamed."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in contents}
    try:
        for path, part in parts.items():
            part.write_bytes(contents[path])
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def audio_bytes(waveform, rate, ending):
    """A file of a waveform (samples,) in one of FORMATS."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", rate, 1, format=ending[1:]) as file:
        for start in range(0, len(waveform), 10 * rate):  # libsndfile crashes on 3 minutes of ogg at once
            file.write(waveform[start:start + 10 * rate])
    return buffer.getvalue()


def spectrogram_bytes(mel, seconds):
    """A PNG of a log-mel spectrogram (frames, bands): time to the right, low bands below, the axes' sizes beneath."""
    low, high = float(mel.min()), float(mel.max())
    level = (mel.T[::-1] - low) / max(high - low, 1e-6)
    colours = np.stack([np.interp(level, np.linspace(0, 1, 5), channel) for channel in zip(*COLOURS)], axis=-1)
    picture = Image.fromarray(colours.astype(np.uint8))
    picture = picture.resize((max(len(mel), 400), 4 * mel.shape[1]), Image.Resampling.NEAREST)
    page = ImageOps.expand(picture, (0, 0, 0, 16), "white")  # room below for the caption
    caption = f"{seconds:.2f} s ({len(mel)} frames) x {mel.shape[1]} mel bands, log {low:.1f} to {high:.1f}"
    ImageDraw.Draw(page).text((4, picture.height + 2), caption, fill="black")
    buffer = io.BytesIO()
    page.quantize(64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def progress_line(name, evaluations):
    """A generate() callback that reports each step on standard error, rewriting one line if that is a terminal."""
    start, live = time.perf_counter(), sys.stderr.isatty()
    times = []

    def report(step, timestep, latents):
        times.append(time.perf_counter() - start)
        # the first step also compiles the graph: it does not tell what the others take
        each = (times[-1] - times[0]) / step if step else times[0]
        left = f"  {each * (evaluations - step - 1):.0f} s left" if step else ""
        text = f"{name}step {step + 1}/{evaluations}  {each:.2f} s a step{left}"
        print(f"\r{text}\033[K" if live else text, end="\n" if not live or step + 1 == evaluations else "",
              file=sys.stderr, flush=True)

    return report


def read_prompts(args):
    """{number: prompt}: the prompts from 1 on, or the lines of the file that are not blank by their number."""
    if args.prompt and args.prompts_file is not None:
        raise InputError("--prompt stands beside --prompts-file; valid: one or the other")
    prompts = dict(enumerate(args.prompt, 1))
    if args.prompts_file is not None:
        try:
            lines = pathlib.Path(args.prompts_file).read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
        except OSError as error:
            raise InputError(f"--prompts-file {args.prompts_file}: {checkpoints.one_line(error)}") from None
        for number, line in enumerate(lines, 1):
            try:
                prompts[number] = line.decode().strip()
            except UnicodeDecodeError as error:
                raise InputError(f"--prompts-file {args.prompts_file}, line {number}: {error}; valid: UTF-8") from None
        prompts = {number: text for number, text in prompts.items() if text}
    if not prompts and (args.prompts_file is not None or args.audio_prompt is None):
        raise InputError("no prompt; valid: --prompt TEXT, once or more, --prompts-file FILE with a prompt a line, or "
                         "--audio-prompt FILE")
    checked_prompts(list(prompts.values()) or "")
    return prompts


SHORTCUTS = {
    "--seconds": ("sampling.audio_length_in_s", "S", "length, 0.04 to 600 (default the checkpoint's own), or how much "
                                                     "of --init-audio is taken"),
    "--steps": ("sampling.num_inference_steps", "N", "steps from noise to music, 1 to 999: more are slower and better"),
    "--scheduler": ("sampling.scheduler", "NAME", "ddim, dpm, pndm, lms, heun, euler or euler_ancestral"),
    "--guidance": ("sampling.guidance_scale", "G", "how much the prompt leads, 1 to 5 as a rule; up to 1 there is no "
                                                   "guidance, in half the time"),
    "--eta": ("sampling.eta", "E", "fresh noise in each step of ddim, 0 (none) to 1"),
    "--seed": ("sampling.seed", "N", "0 or more, or random: the same seed gives the same music"),
    "--waveforms": ("sampling.num_waveforms_per_prompt", "N", "takes of each prompt, from the most like it (by CLAP's "
                                                              "score, up to 1) to the least"),
    "--audio-prompt-weight": ("sampling.audio_prompt_weight", "W", "share of --audio-prompt beside a text, 0 to 1"),
    "--strength": ("sampling.strength", "S", "how far new music departs from --init-audio, 1 / steps to 1: all of "
                                         "it (default 0.5), what --extend adds (0.6), --repaint's parts (1)"),
    "--extend": ("sampling.extend", "S", "seconds to add to --init-audio, at its end, or if negative before its start"),
    "--device": ("device", "NAME", "auto, Ascend, CPU or GPU; auto is MindSpore's choice, which the first line says"),
    "--dtype": ("dtype", "NAME", "float32, float16, bfloat16 or hf32"),
}
EXAMPLES = """
examples:
  a quick draft            python musicldm.py --prompt "slow sad piano" --scheduler pndm --steps 20
  the best of four takes   python musicldm.py --prompt "slow sad piano" --waveforms 4 --seed random
  four seconds made anew   python musicldm.py --prompt "slow sad piano" --init-audio song.wav --repaint 4:8
  a song of 10 s as a loop python musicldm.py --prompt "slow sad piano" --init-audio song.wav --loop --repaint 9:1
"""


def parse_arguments(argv):
    """The command line as a namespace; an InputError for what it does not know. `set` holds config overrides."""
    def fail(message):
        raise InputError(message)

    def count(text):
        if not re.fullmatch("[1-9][0-9]{0,3}", text):
            raise argparse.ArgumentTypeError(f"{shown(text)}; valid: 1 to 9999")
        return int(text)

    def part(text):
        if not re.fullmatch(r"\d+(\.\d+)?:\d+(\.\d+)?", text):
            raise argparse.ArgumentTypeError(f"{shown(text)}; valid: seconds, such as 4:8 or 2.5:3")
        return [float(number) for number in text.split(":")]

    def as_meant(key, text):
        """The number that a text is to people, or itself; YAML 1.1 reads 010 as 8, 1:30 as 90 and no as false."""
        if (key, text) == ("sampling.seed", "random"):
            return secrets.randbelow(2 ** 31)
        with contextlib.suppress(ValueError):
            return int(text)
        with contextlib.suppress(ValueError):
            number = float(text)
            return int(number) if number % 1 == 0 else number if math.isfinite(number) else text  # 1e3 is an integer
        return text

    parser = argparse.ArgumentParser(description="Text to music with MusicLDM.", epilog=EXAMPLES, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="what to play; may be repeated")
    parser.add_argument("--prompts-file", metavar="FILE", help="a prompt on each line that is not blank; files are "
                        "named by line and seed, such as musicldm_00001_seed0.wav")
    parser.add_argument("--negative-prompt", action="append", metavar="TEXT",
                        help="what to steer away from, once for all prompts, or once for each")
    parser.add_argument("--audio-prompt", metavar="FILE", help="music to follow, alone or mixed into the prompts: "
                        "nothing of it is kept")
    parser.add_argument("--init-audio", metavar="FILE", help="music to change, under a prompt")
    parser.add_argument("--repaint", type=part, action="append", default=[], metavar="START:END",
                        help="seconds of it to make anew; may be repeated, and cross a loop's seam")
    parser.add_argument("--interpolate", type=count, metavar="N", help="N clips on the way between two prompts")
    defaults = checkpoints.published_config()
    for flag, (key, metavar, text) in SHORTCUTS.items():
        default = functools.reduce(dict.get, key.split("."), defaults)
        parser.add_argument(flag, dest="set", action="append", default=[], metavar=metavar,
                            help=text if default is None else f"{text} (default {default})",
                            type=lambda value, key=key: f"{key}={json.dumps(as_meant(key, value))}")
    parser.add_argument("--loop", dest="set", action="append_const", const="sampling.loop=true",
                        help="a clip that repeats without a seam")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE",
                        help="any key of config.yaml, such as sampling.seed=3")
    parser.add_argument("--weights", metavar="DIR|HUB-ID|demo|random", help="checkpoint folder, hub id such as "
                        f"ucsd-reach/musicldm, our own small one, or random numbers (default {defaults['weights']})")
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), metavar="FILE", help="YAML configuration")
    parser.add_argument("--out", type=pathlib.Path, default="musicldm.wav", metavar="FILE", help="wav, flac or ogg, by "
                        "its ending; if the file is there, a number is added (default musicldm.wav)")
    parser.add_argument("--spectrogram", type=pathlib.Path, metavar="FILE.png", help="also draw the log-mel "
                        "spectrogram: time goes to the right, pitch upwards")
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="waveforms computed together (default 1): "
                        "faster, with more memory")
    parser.add_argument("--resume", action="store_true", help="skip files that are there, whatever made them")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    args, rest = parser.parse_known_args(argv)
    if rest and rest[0].startswith("-"):
        raise checkpoints.unknown("option", rest[0].partition("=")[0], re.findall("--[a-z-]+", parser.format_usage()))
    if rest:
        raise InputError(f"{shown(' '.join(rest))} belongs to no option; valid: a prompt in quotes, such as --prompt "
                         '"slow sad piano"')
    args.set += [f"sampling.repaint={args.repaint}"] if args.repaint else []
    repeated = ("--prompt", "--negative-prompt", "--repaint", "--set", "--resume", "--quiet")
    given = [word.partition("=")[0] for word in argv if word.startswith("--")]
    for name, times in collections.Counter(given + [text.partition("=")[0].strip() for text in args.set]).items():
        if times > 1 and name not in repeated:
            raise InputError(f"{name} is given {times} times; valid: once")
    return args


@contextlib.contextmanager
def kept_graphs(plan, device="CPU"):
    """Compiled graphs in the user's cache folder, from the last run of the same plan and for the next one.

    MindSpore (MS_COMPILER_CACHE_ENABLE) finds a graph by its number in the order of compilation alone, and looks for
    the folder once a process. So a folder serves one plan, all that order and graphs follow from, and one version of
    the code; it appears under its name when a run is through. The KEPT that were used last stay. On a CPU alone:
    nobody has tried it elsewhere.
    """
    sources = [pathlib.Path(module.__file__).read_bytes() for module in (sys.modules[__name__], layers, checkpoints)]
    key = hashlib.sha256(repr((mindspore.__version__, sources, plan)).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "musicldm"
    with contextlib.ExitStack() as stack:
        try:
            if device != "CPU":
                raise OSError("nobody has tried it")
            import fcntl  # not on Windows
            cache.mkdir(parents=True, exist_ok=True)
            for left in cache.glob("*.part"):
                file = os.open(left, os.O_RDONLY)
                with contextlib.suppress(BlockingIOError):  # a run that still goes on holds the lock of its folder
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
                os.close(file)
            if not (cache / key).exists():
                with tempfile.TemporaryFile(dir=cache) as file:  # room for it, or MindSpore complains for each graph
                    file.write(bytes(2 ** 26))
            part = pathlib.Path(tempfile.mkdtemp(dir=cache))
            stack.callback(lambda: shutil.rmtree(part, ignore_errors=True))
            fcntl.flock(os.open(part, os.O_RDONLY), fcntl.LOCK_EX)  # before another process can take it for a leftover
            part = part.rename(part.with_suffix(".part"))
        except (OSError, ImportError):  # then without kept graphs
            os.environ["MS_COMPILER_CACHE_ENABLE"] = "0"
            yield
            return
        os.environ["MS_COMPILER_CACHE_PATH"] = str(cache / key if (cache / key).exists() else part)
        yield
        with contextlib.suppress(OSError):  # the folder is there, from an earlier run or another process
            os.rename(part, cache / key)
        with contextlib.suppress(OSError):
            os.utime(cache / key)
            folders = sorted(set(cache.iterdir()) - set(cache.glob("*.part")), key=os.path.getmtime)
            for old in folders[:-KEPT]:
                shutil.rmtree(old.rename(old.with_suffix(".part")))


def planned(args):
    """Everything that a run needs to know before it loads any weights, all checked: `checked_call`'s and more."""
    prompts = read_prompts(args)
    cfg = load_config(args.config, args.weights, args.set, args.quiet)
    texts, n = list(prompts.values()) or [""], args.interpolate or max(1, len(prompts))
    away = args.negative_prompt  # None, one for all prompts, or a list of one for each
    options = {} if away is None else {"negative_prompt": away[0] if len(away) == 1 else away}
    each = [f"way {i}" for i in range(n)] if args.interpolate else texts  # different, so that the seed is one
    call = checked_call(cfg, each, at_once=args.batch, audio_prompt=args.audio_prompt, init_audio=args.init_audio,
                        **options)
    sampling, takes = call.sampling, call.sampling["num_waveforms_per_prompt"]
    if call.original is not None and np.abs(call.original).max() > 1.1:  # resampling alone may pass 1
        warnings.warn(f"--init-audio reaches {np.abs(call.original).max():.2f}: what stays of it is clipped at 1")
    if away and not call.guided:
        warnings.warn(f"--negative-prompt does nothing with guidance {sampling['guidance_scale']:g}; above 1 it does")
    if sampling["output_type"] != "np":
        raise InputError(f"sampling.output_type is {sampling['output_type']!r}; the command line writes audio: np")
    if args.interpolate and (args.interpolate == 1 or (len(args.prompt), takes) != (2, 1)):
        raise InputError(f"--interpolate {args.interpolate} stands beside --prompt {len(args.prompt)} times and "
                         f"--waveforms {takes}; valid: 2 or more, beside --prompt twice and --waveforms 1")
    samples, _ = clip_size(cfg, sampling["audio_length_in_s"], sampling["loop"])
    if sampling["extend"]:
        samples = len(call.original) + round(abs(sampling["extend"]) * cfg["vocoder"]["sampling_rate"])
    if args.prompts_file:
        names = [f"_{number:05d}_seed{seed}" for number, seed in zip(np.repeat(list(prompts), takes), call.seeds)]
    else:
        names = [(f"_{row // takes + 1}" if n > 1 else "") + (f"_{row % takes + 1}" if takes > 1 else "")
                 for row in range(n * takes)]
    worker = os.environ.get("MS_ROLE") == "MS_WORKER"  # which must not take what others of them write for old
    outs = [args.out] if args.spectrogram is None else [args.out, args.spectrogram]
    paths, *pictures = output_paths(outs, names, args.resume or worker)
    check_output("--out", paths, FORMATS, 2 * samples * min(max(takes, args.batch), n * takes))
    for drawn in pictures:  # none, or one list
        check_output("--spectrogram", drawn, (".png",), 1)

    together = max(1, args.batch // takes)
    groups = [range(first, min(first + together, n)) for first in range(0, n, together)]
    if worker:
        # each process of msrun takes whole groups, so that no file depends on how many processes there are
        if "RANK_ID" not in os.environ:
            raise InputError("RANK_ID is not set; valid on several hosts: msrun with --node_rank")
        groups = groups[int(os.environ["RANK_ID"])::int(os.environ["RANK_SIZE"])]
    own = {group: [path for files in (paths, *pictures) for path in files[group.start * takes:group.stop * takes]]
           for group in groups}
    there = {path: None for files in own.values() for path in files if path.exists()}  # in order
    if there and not args.resume:
        raise InputError(f"{next(iter(there))} is there; valid under msrun: a new --out, or --resume")
    missing = {group: [path for path in files if path not in there] for group, files in own.items()}
    return types.SimpleNamespace(
        **vars(call), cfg=cfg, texts=texts, prompted=bool(prompts), samples=samples, batch=args.batch,
        paths=paths, pictures=pictures, missing={group: files for group, files in missing.items() if files},
        interpolated=args.interpolate, named_by_seed=args.prompts_file is not None)


def what_graphs_follow_from(plan):
    """All that decides which graphs a run compiles, and in which order."""
    cfg, sampling, texts = plan.cfg, plan.sampling, [*plan.texts] if plan.interpolated else []
    for group in plan.missing:
        texts += [] if plan.interpolated else plan.texts[group.start:group.stop]
        texts += plan.negative_prompts[group.start:group.stop] if plan.guided else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will warn
        lengths = [padded_length(cfg, int(mask.sum())) for mask in tokenize(cfg, texts)[1]]
    return ({**cfg, "device": checkpoints.use_device(cfg), "weights": None, "sampling": None}, plan.size, plan.batch,
            sampling["scheduler"], sampling["loop"], plan.guided, sampling["num_waveforms_per_prompt"],
            plan.audio_prompt is None, plan.original is None, plan.prompted, plan.interpolated,
            list(map(len, plan.missing)), lengths)


def produce(plan, params, quiet):
    """Yield for each group {path: bytes} of the files that are missing, and a line about each waveform."""
    sampling, takes = plan.sampling, plan.sampling["num_waveforms_per_prompt"]
    # negative prompts go as vectors, and the original is as long as was asked for already
    length = plan.cfg["sampling"]["audio_length_in_s"] if plan.original is None else None
    cfg = {**plan.cfg, "sampling": {**plan.cfg["sampling"], "negative_prompt": None, "audio_length_in_s": length}}
    weight, rate = sampling["audio_prompt_weight"], cfg["vocoder"]["sampling_rate"]
    seconds = plan.samples / rate
    windows = window_count(cfg, len(plan.original), sampling["extend"]) if sampling["extend"] else 1
    heard = plan.audio_prompt and encode_audio(cfg, plan.audio_prompt[0], params, plan.audio_prompt[1])
    if plan.interpolated:
        way = interpolate(*prompt_vectors(cfg, plan.texts, params, heard, weight), plan.interpolated)
    if len(plan.missing) > 1:
        params = {**params, "unet": prepared(cfg, params["unet"])}
    for group, missing in plan.missing.items():
        here, rows = slice(group.start, group.stop), range(group.start * takes, group.stop * takes)
        toward = way[here] if plan.interpolated else prompt_vectors(
            cfg, plan.texts[here] if plan.prompted else None, params, heard, weight)
        away = encode_prompt(cfg, plan.negative_prompts[here], params) if plan.guided else None
        audio = []
        for first in range(0, len(rows), plan.batch):
            some = rows[first:first + plan.batch]
            prompts = [row // takes - group.start for row in some]
            name = f"{some[0] + 1}/{len(plan.paths)}  " if len(plan.paths) > 1 else ""
            audio.append(generate(cfg, None, params, prompt_embeds=toward[prompts],
                                  negative_prompt_embeds=away[prompts] if plan.guided else None,
                                  init_audio=plan.original, seed=[plan.seeds[row] for row in some],
                                  num_waveforms_per_prompt=1, callback_steps=1,
                                  callback=None if quiet else progress_line(name, windows * plan.evaluations)))
        audio = np.concatenate(audio)
        order, scores = rank(cfg, toward, audio, params) if takes > 1 else (range(len(rows)), None)
        files, lines = {}, []
        for place, i in enumerate(order):
            row = rows[i if plan.named_by_seed else place]  # whose name the file gets: of its seed, or of its place
            path = plan.paths[row]
            if not {path, *(drawn[row] for drawn in plan.pictures)} & {*missing}:
                continue
            files[path] = audio_bytes(audio[i], rate, path.suffix)
            for drawn in plan.pictures:
                files[drawn[row]] = spectrogram_bytes(log_mel(cfg["vocoder"], audio[i]), seconds)
            score = "" if scores is None else f"  score {scores[place]:.3f}"
            lines.append(f"{path}  {seconds:.2f} s  seed {plan.seeds[rows[i]]}{score}")
        yield {path: files[path] for path in missing}, lines


def print_line(text):
    """`print`, with escapes for what standard output's encoding lacks.

    Raises InputError if it is full, BrokenPipeError if nobody reads it.
    """
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again when it exits
        if isinstance(error, BrokenPipeError):
            raise
        raise InputError(f"standard output cannot be written: {error.strerror}") from None


def named_flag(message, argv):
    """The flag that set what a message is about, with a colon, or "": messages name config.yaml's keys."""
    given = {word.partition("=")[0] for word in argv}
    return next((f"{flag}: " for flag, (key, *_) in SHORTCUTS.items() if flag in given and
                 message.startswith((f"{key} ", f"{key.rpartition('.')[2]} "))), "")


def run(argv, keep_graphs):
    """What `main` does, with mistakes as exceptions."""
    start = time.perf_counter()
    args = parse_arguments(argv)
    say = (lambda text: None) if args.quiet else print_line
    plan = planned(args)
    cfg, sampling, seconds = plan.cfg, plan.sampling, plan.samples / plan.cfg["vocoder"]["sampling_rate"]
    weights = min(cfg["weights"], os.path.relpath(cfg["weights"]), key=len)
    say(f"weights {weights}, device {checkpoints.device_in_words(cfg)}, {cfg['dtype']}; {seconds:g} s, "
        f"{sampling['scheduler']}, {sampling['num_inference_steps']} steps, guidance {sampling['guidance_scale']:g}, "
        f"eta {sampling['eta']:g}, seed {sampling['seed']}"
        + ("" if plan.original is None else f", strength {sampling['strength']:g}"))
    if cfg["weights"] == checkpoints.RANDOM:
        say("the weights are random: the result is noise, not music")
    written = 0
    if plan.missing:
        graphs = kept_graphs(what_graphs_follow_from(plan), checkpoints.use_device(cfg)) if keep_graphs else None
        with graphs or contextlib.nullcontext():
            params = checkpoints.load_params(cfg)
            for files, lines in produce(plan, params, args.quiet):
                write_files(files)
                say("\n".join(lines))
                written += len(lines)
    took = time.perf_counter() - start
    say(f"{took:.1f} s in all, " + (f"{took / (written * seconds):.2f} s for each second of audio" if written else
                                    "nothing left to do: --resume keeps files that are there, whatever made them"))


def main(argv=None, keep_graphs=False):
    """The command line: 0 when every file is written, 2 after one line about a mistake, 130 after Ctrl-C, 141 when the
    reader of its output has left.

    keep_graphs: see `kept_graphs`; once a process
    """
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        return 0  # msrun starts the command once more than it has workers, to let them find each other: nothing to do
    argv = sys.argv[1:] if argv is None else argv
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: print(f"musicldm: warning: {message}", file=sys.stderr)
            run(argv, keep_graphs)
    except InputError as error:
        print(f"musicldm: error: {named_flag(str(error), argv)}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmusicldm: interrupted; the files that are written are whole", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what MindSpore makes of Ctrl-C while a graph runs
    os.environ.setdefault("MS_OM_PATH", tempfile.gettempdir())  # its notes on a compilation that was interrupted
    os.environ.setdefault("MS_COMPILER_CACHE_ENABLE", "1")  # "0" keeps no graphs
    gc.freeze()  # or collections would go through MindSpore's modules again and again while it compiles
    sys.exit(main(keep_graphs=os.environ["MS_COMPILER_CACHE_ENABLE"] == "1"))
