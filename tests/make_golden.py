#!/usr/bin/env python3
"""Make golden/: a tiny random checkpoint in the published layout, and what the reference pipeline computes with it.

    pip install torch==2.13.0 diffusers==0.33.1 transformers==4.57.1 "huggingface-hub<1.0" "tokenizers<0.23"
    python tests/make_golden.py
    python tests/make_golden.py schedulers            # instead: golden/schedulers.npz alone, with the stored checkpoint
    python tests/make_golden.py left_out              # instead: golden/left_out.npz and defaults.json alone, likewise
    python tests/make_golden.py training              # instead: golden/training.npz alone, likewise
    python tests/make_golden.py music_in              # instead: golden/music_in.npz alone, likewise
    python tests/make_golden.py tokenizers            # instead: golden/tokenizers/ alone, likewise
    python tests/make_golden.py CHECKPOINT OUT.npz    # instead: ten guided steps of any checkpoint, for parity.py

Run on the CPU with one thread; golden/versions.json says what made the stored files. The tests need only those.
"""
import contextlib
import copy
import functools
import inspect
import json
import pathlib
import platform
import shutil
import sys
import tempfile
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, MusicLDMPipeline, UNet2DConditionModel
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.nn import functional
from transformers import (AddedToken, ClapAudioConfig, ClapConfig, ClapFeatureExtractor, ClapModel, ClapTextConfig,
                          RobertaTokenizer, RobertaTokenizerFast, SpeechT5HifiGan, SpeechT5HifiGanConfig)
from waveforms import SECONDS, SPOKEN, sketch, waveform

GOLDEN = pathlib.Path(__file__).with_name("golden")
CHANNELS = (12, 8, 16)
CORPUS = """A slow blues in the key of A minor with a walking bass line, and soft brushes on the snare drum.
A fast techno track with a strong kick drum, bright synths, deep bass and a rising melody. It's loud, isn't it?
Low quality, average quality, a noisy recording with hum, hiss and distortion; they've tuned at 440 Hz since 1939.
Ambient pads drift over a gentle drone with distant bells, ocean waves and wind. We'll hear 24 voices in 8 parts."""
LONG = " ".join(f"Part {i}: louder and faster than part {i - 1}." for i in range(1, 12))
CASES = {
    "guided": dict(prompt="a fast techno track with bright synths", negative_prompt="low quality", steps=10, height=8),
    "batch": dict(prompt=["a slow blues; it's raining", "", LONG], steps=3, height=11, eta=1.0),
    "variant": dict(prompt="ambient pads, no drums", steps=2, height=5, guidance=1.0, heads=[3, 2, 4],
                    normalize_before=True),
}
STAGES = ("prompt_embeds", "step_latents", "mel", "audio")
SCHEDULERS = {"ddim": "DDIMScheduler", "dpm": "DPMSolverMultistepScheduler", "pndm": "PNDMScheduler",
              "lms": "LMSDiscreteScheduler", "heun": "HeunDiscreteScheduler", "euler": "EulerDiscreteScheduler",
              "euler_ancestral": "EulerAncestralDiscreteScheduler"}
# whose audio is kept when the key is left out of its file
LEFT_OUT = {"scheduler/scheduler_config.json": ("steps_offset", "set_alpha_to_one", "beta_start", "beta_end"),
            "vae/config.json": ("scaling_factor",), "vocoder/config.json": ("normalize_before",)}
TEXTS = [
    "", " ", "techno", " techno", "Techno  with   runs    of spaces ", "tabs\tand\n\nnew\r\nlines \n x\t\t",
    "\n", "  \n  ",
    "It's they're we've I'm she'll he'd IT'S 'tis rock 'n' roll's 'sx 'S ''s",
    "120 bpm, 3/4, ½, ², Ⅻ, ٣, 四五", "x1y22z333",
    "Música électro très gaie 🎹🥁👩🏽\u200d🎤", "悲しいピアノ、雨", "грустная скрипка",
    "naïve café – “musique” → done…", "e\u0301 combining",
    "<mask>", "a <mask> b", "a  \u00a0<mask>  b", "</s>", "a</s>b <s> c <pad>d<unk>", "<mask", "<MASK>",
    "< mask >", "a_b__c", "under_score's",
    "\u00a0nbsp\u2003em\u3000ideographic\u2028line\u0085nel\x1cfs\x00nul\ufeff",
    "!!! ??? ...", "don't…stop", "한국어 음악", "हिन्दी संगीत", "عربي",
    "word " * 2000, "\u200b", "a\u200bb", "𝒻ancy 𝟘𝟙", "ß ẞ ǅ", "ªº", "\U0001fae8", "x" * 300, LONG,
]


def build():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(CORPUS.splitlines(), vocab_size=499, min_frequency=1, show_progress=False,
                            special_tokens=["<s>", "<pad>", "</s>", "<unk>"])
    bpe.add_special_tokens(["<mask>"])
    folder = GOLDEN / "checkpoint" / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save_model(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocab["<mask>"] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    tokenizer = RobertaTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=48)
    clap = ClapModel(ClapConfig(
        projection_dim=24,
        text_config=dict(vocab_size=len(vocab), max_position_embeddings=50, hidden_size=24, intermediate_size=40,
                         num_hidden_layers=2, num_attention_heads=3, projection_dim=24),
        audio_config=dict(projection_dim=24, patch_embeds_hidden_size=4, hidden_size=32, depths=[1, 1, 2, 1],
                          num_attention_heads=[1, 1, 2, 2])))
    unet = UNet2DConditionModel(
        in_channels=8, out_channels=8, layers_per_block=1, block_out_channels=CHANNELS, cross_attention_dim=CHANNELS,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",), norm_num_groups=4, attention_head_dim=4,
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=24, class_embeddings_concat=True)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=8, layers_per_block=1, block_out_channels=(8, 8, 12),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4,
        scaling_factor=0.9)
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(
        model_in_dim=16, sampling_rate=16000, upsample_initial_channel=24, upsample_rates=[5, 8, 4],
        upsample_kernel_sizes=[16, 16, 8], resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5], [1, 3]],
        normalize_before=False))
    scheduler = DDIMScheduler(beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", steps_offset=1,
                              clip_sample=False, set_alpha_to_one=False)
    extractor = ClapFeatureExtractor(frequency_min=50, frequency_max=14000, truncation="rand_trunc",
                                     padding="repeatpad")
    pipe = MusicLDMPipeline(vae=vae, text_encoder=clap, tokenizer=tokenizer, feature_extractor=extractor, unet=unet,
                            scheduler=scheduler, vocoder=vocoder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def initialise(pipe):
    """Random weights as healthy as trained ones: each layer gives unit deviation, the mel one of 2 and the audio 0.15.

    Every layer is scaled when it first runs, on what those before it give. The UNet's last one is then fitted to find
    its input, as a denoiser finds the noise, so that latents keep their size; and CLAP's two towers lose most of what
    their vectors have in common, so that inputs differ in direction.
    """
    clap, unet, vae, vocoder = (model.eval() for model in (pipe.text_encoder, pipe.unet, pipe.vae, pipe.vocoder))
    last = unet.up_blocks[-1].resnets[-1]
    gains = {vae.decoder.conv_out: 2.0, vocoder.conv_post: 0.15, last.conv2: 0.3}
    hooks, done = [], set()

    def scale(layer, inputs, output):
        if layer in done:
            return output
        done.add(layer)
        factor = gains.get(layer, 1.0) / output.std()
        for x in layer.parameters():
            x.mul_(factor)
        return output * factor

    for model in (clap, unet, vae, vocoder):
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            if x.is_floating_point() and "logit_scale" not in name:
                x.normal_(std=1 if "embeddings" in name else 0.2)
                if "norm" in name.lower() and name.endswith("weight") or name.endswith(("var", "scale")):
                    x.abs_().add_(1)
        hooks += [layer.register_forward_hook(scale) for layer in model.modules()
                  if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d))]

    unet.conv_in.weight[:, :, 1, 1] *= 6  # a clear way for the UNet's input: past the deep layers, through a
    last.conv_shortcut.weight[:, :-unet.conv_in.out_channels] *= 0.3
    unet.conv_norm_out.bias.add_(1.5)  # nearly linear activation

    def centred(tower, projection):
        projection.linear2.bias.sub_(0.9 * tower().mean(0))
        return functional.normalize(tower())

    tokens = pipe.tokenizer(CORPUS.splitlines() + TEXTS[2:], padding=True, truncation=True, max_length=48,
                            return_tensors="pt")
    vectors = centred(lambda: clap.text_projection(clap.text_model(**tokens).pooler_output), clap.text_projection)
    latents = torch.randn(len(vectors), 8, 16, 4)
    times, seen = torch.linspace(1, 951, len(vectors)).long(), []
    hooks.append(unet.conv_out.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0])))
    unet(latents, times, None, class_labels=vectors)
    columns = functional.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    columns = torch.cat([columns, torch.ones(len(columns), 1)], 1)
    fit = torch.linalg.lstsq(columns, latents.flatten(2).transpose(1, 2).flatten(0, 1).double()).solution
    unet.conv_out.weight.mul_(0.2).add_(fit[:-1].T.reshape(unet.conv_out.weight.shape))
    unet.conv_out.bias.mul_(0.2).add_(fit[-1])
    mel = vae.decode(latents).sample
    vae.decoder.conv_out.bias.sub_(3)
    vae.encode(mel - 3)
    vocoder(mel[:, 0] - 3)
    features, heard_first = heard(pipe), clap.audio_model.audio_encoder.batch_norm
    heard_first.running_mean.add_(features.mean((0, 1, 2)))
    heard_first.running_var.mul_(features.var((0, 1, 2)))
    centred(lambda: clap.audio_projection(clap.audio_model(features).pooler_output), clap.audio_projection)
    for hook in hooks:
        hook.remove()


def tokenizers():
    """golden/tokenizers/: the tokenizer with added tokens as it may be saved, and what the reference makes of texts."""
    texts = [*(text for text in TEXTS if len(text) < 300), "a synthwave  <drop>  kick[808] it", "synthwavesynthwaves",
             "x<drop>y <mask>  z", " [808] <DROP>\tsynth wave[808]<drop>", "  synthwave\n<drop>\n", LONG]
    folder, ids = GOLDEN / "tokenizers", {}
    shutil.rmtree(folder, ignore_errors=True)
    for name, kind in dict(slow=RobertaTokenizer, fast=RobertaTokenizerFast).items():
        tokenizer = kind.from_pretrained(GOLDEN / "checkpoint" / "tokenizer", model_max_length=20)
        tokenizer.add_tokens(["synthwave", AddedToken("<drop>", lstrip=True, rstrip=True)])
        tokenizer.add_special_tokens({"additional_special_tokens": ["[808]"]})
        tokenizer.save_pretrained(folder / name)
    # as transformers before 4.34 saved it, and as 5 does: what is left of the files says it all
    for name, source, left in (("old", "slow", ["vocab.json", "merges.txt", "added_tokens.json",
                                                "special_tokens_map.json"]), ("new", "fast", ["tokenizer.json"])):
        (folder / name).mkdir()
        for file in left:
            shutil.copy(folder / source / file, folder / name)
        config = json.loads((folder / source / "tokenizer_config.json").read_text())
        del config["added_tokens_decoder"], config["extra_special_tokens"]
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config, indent=0) + "\n")
    for name in ("slow", "fast", "old", "new"):
        kind = RobertaTokenizerFast if name in ("fast", "new") else RobertaTokenizer
        tokenizer = kind.from_pretrained(folder / name)
        ids[name] = [[text, tokenizer(text, truncation=True, max_length=tokenizer.model_max_length).input_ids]
                     for text in texts]
    (folder / "ids.json").write_text(json.dumps(ids, ensure_ascii=True) + "\n")


@contextlib.contextmanager
def given_noise(draws):
    """The arrays of an iterator as the noise that schedulers draw."""
    with contextlib.ExitStack() as stack:
        for name in ("ddim", "euler_ancestral_discrete"):
            stack.enter_context(mock.patch(f"diffusers.schedulers.scheduling_{name}.randn_tensor",
                                           lambda shape, **kwargs: torch.from_numpy(next(draws)).to(kwargs["dtype"])))
        yield


def run(pipe, case, rng):
    case = {**dict(negative_prompt=None, guidance=2.0, eta=0.0), **case}
    prompts = [case["prompt"]] if isinstance(case["prompt"], str) else case["prompt"]
    shape = (len(prompts), 8, case["height"], pipe.vocoder.config.model_in_dim // 4)
    out = {"in_latents": rng.standard_normal(shape).astype(np.float32)}
    noise = rng.standard_normal((case["steps"], *out["in_latents"].shape)).astype(np.float32)
    if case["eta"] or case.get("scheduler") == "euler_ancestral":
        out["in_noise"] = noise
    if "heads" in case:
        config = {**pipe.unet.config, "attention_head_dim": case["heads"]}
        unet = UNet2DConditionModel.from_config(config).eval().to(pipe.unet.dtype)
        unet.load_state_dict(pipe.unet.state_dict())
        pipe.unet = unet
    if "normalize_before" in case:
        pipe.vocoder.config.normalize_before = case["normalize_before"]
    steps, seen, draws = [], {}, iter(noise)
    decode, features = pipe.vae.decode, pipe.text_encoder.get_text_features

    def keep(name, function):
        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.setdefault(name, getattr(result, "sample", result).numpy().copy())
            return result
        return wrapped

    with mock.patch.object(pipe.vae, "decode", keep("mel", decode)), \
            mock.patch.object(pipe.text_encoder, "get_text_features", keep("prompt_embeds", features)), \
            given_noise(draws):
        audio = pipe(case["prompt"], audio_length_in_s=case["height"] * 0.04, num_inference_steps=case["steps"],
                     guidance_scale=case["guidance"], eta=case["eta"], negative_prompt=case["negative_prompt"],
                     latents=torch.from_numpy(out["in_latents"]).to(pipe.unet.dtype),
                     callback=lambda i, t, x: steps.append(x.numpy().copy())).audios
    mel = seen["mel"][:, 0]
    print({name: round(float(np.std(x)), 3) for name, x in dict(latents=steps[-1], mel=mel, audio=audio).items()},
          "cosines", np.round(seen["prompt_embeds"] @ seen["prompt_embeds"].T, 2).tolist())
    return {**out, "prompt_embeds": seen["prompt_embeds"], "step_latents": np.stack(steps), "mel": mel, "audio": audio}


def analytic_noise(x, t):
    """The noise that test_schedulers.py predicts too."""
    return (0.6 * np.sin(x) + 0.5 * np.cos(t / 100) * x).astype(np.float32)


def schedulers():
    """golden/schedulers.npz: every scheduler alone under an analytic prediction, and the mel of four guided steps.

    golden/schedulers.json: what each one's file says when it is saved in the place of the checkpoint's.
    """
    pipe = MusicLDMPipeline.from_pretrained(GOLDEN / "checkpoint")
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    x, noise = np.random.default_rng(1).standard_normal((2, 25, 12)).astype(np.float32)
    x, arrays, files = x[0], {"in_x": x[0], "in_noise": noise}, {}

    def states(scheduler, steps, **options):
        scheduler.set_timesteps(steps)
        latents, found = torch.from_numpy(x) * scheduler.init_noise_sigma, []
        with given_noise(iter(noise)):
            for t in scheduler.timesteps:
                predicted = torch.from_numpy(analytic_noise(scheduler.scale_model_input(latents, t).numpy(), int(t)))
                latents = scheduler.step(predicted, t, latents, **options).prev_sample
                found.append(latents.numpy().copy())
        return np.stack(found)

    for name, kind in SCHEDULERS.items():
        make = functools.partial(getattr(diffusers, kind).from_config, config,
                                 **({"skip_prk_steps": True} if name == "pndm" else {}))
        for steps in (1, 2, 4, 10, 25):
            for eta in (0.0, 1.0) if name == "ddim" else (0.0,):
                scheduler = make()
                arrays[f"{name}.{steps}.{eta:g}.states"] = states(scheduler, steps, **({"eta": eta} if eta else {}))
                arrays[f"{name}.{steps}.{eta:g}.timesteps"] = scheduler.timesteps.numpy().astype(np.int16)
        if name != "pndm":  # which combines velocities there and noises here
            arrays[f"{name}.velocity"] = states(make(prediction_type="v_prediction"), 10)
        pipe.scheduler = make()
        files[kind] = json.loads(pipe.scheduler.to_json_string())
        result = run(pipe, {**CASES["guided"], "steps": 4, "scheduler": name}, np.random.default_rng(2))
        arrays |= {"in_latents": result["in_latents"], f"{name}.mel": result["mel"]}
        arrays |= {"in_latent_noise": result["in_noise"]} if "in_noise" in result else {}
    pipe.scheduler = diffusers.DDIMScheduler.from_config(config, prediction_type="v_prediction")
    arrays["velocity.mel"] = run(pipe, {**CASES["guided"], "steps": 4}, np.random.default_rng(2))["mel"]
    np.savez_compressed(GOLDEN / "schedulers.npz", **arrays)
    (GOLDEN / "schedulers.json").write_text(json.dumps(files, indent=0) + "\n")


def music_in():
    """golden/music_in.npz: variations with every scheduler and repainting, put together from diffusers' parts."""
    import librosa
    pipe = MusicLDMPipeline.from_pretrained(GOLDEN / "checkpoint")
    rng, steps, height, arrays = np.random.default_rng(6), 4, 8, {}
    mel = librosa.feature.melspectrogram(y=waveform(0.4, 16000)[:height * 640], sr=16000, n_fft=1024, hop_length=160,
                                         power=1.0, pad_mode="reflect", n_mels=16, fmin=0, fmax=8000)[:, :height * 4]
    mel = torch.from_numpy(np.log(np.maximum(mel, 1e-5)).T.astype(np.float32))[None, None]
    known = pipe.vae.encode(mel).latent_dist.mean * pipe.vae.config.scaling_factor
    arrays["in_latents"] = rng.standard_normal(known.shape, np.float32)
    arrays["in_noise"] = rng.standard_normal((steps, *known.shape), np.float32)
    noise, prompts = torch.from_numpy(arrays["in_latents"]), ["", "a slow blues"]
    tokens = pipe.tokenizer(prompts, padding=True, return_tensors="pt")
    labels = functional.normalize(pipe.text_encoder.get_text_features(**tokens), dim=-1)

    def run_from(name, strength, kept):
        scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(
            pipe.scheduler.config, **({"skip_prk_steps": True} if name == "pndm" else {}))
        scheduler.set_timesteps(steps)
        timesteps = torch.tensor(list(dict.fromkeys(scheduler.timesteps.tolist())))[steps - int(steps * strength):]
        if name == "pndm":  # a plain end of its list has no second evaluation to take twice, and stops a step early
            timesteps = torch.cat((timesteps[:2], timesteps[1:]))
        if name == "heun":
            timesteps = timesteps.repeat_interleave(2)[1:]
        if name == "lms":  # its order follows from the place in the list: of a plain end, weights without their history
            scheduler.timesteps, scheduler.sigmas = timesteps, scheduler.sigmas[-len(timesteps) - 1:]
        x, states = scheduler.add_noise(known, noise, timesteps[:1]), []
        if strength == 1:
            x = torch.where(kept, x, noise * scheduler.init_noise_sigma)
        with given_noise(iter(arrays["in_noise"])):
            for t, following in zip(timesteps, [*timesteps[1:], None]):
                both = torch.cat([scheduler.scale_model_input(x, t)] * 2)
                away, toward = pipe.unet(both, t, None, class_labels=labels).sample.chunk(2)
                x = scheduler.step(away + 2.0 * (toward - away), t, x).prev_sample
                if kept.any():
                    end = scheduler.final_alpha_cumprod if name == "ddim" else torch.tensor(1.0)
                    back = (end ** 0.5 * known + (1 - end) ** 0.5 * noise if following is None else
                            scheduler.add_noise(known, noise, following[None]))
                    x = torch.where(kept, back, x)
                states.append(x.numpy().copy())
        return np.stack(states)

    rows = torch.arange(height)[:, None]
    for name in SCHEDULERS:
        arrays[f"{name}.variation"] = run_from(name, 0.5, rows < 0)
    for name in ("ddim", "dpm"):
        arrays[f"{name}.repainted"] = run_from(name, 1.0, (rows < 2) | (rows >= 5))
    print({key: round(float(value.std()), 3) for key, value in arrays.items()})
    np.savez_compressed(GOLDEN / "music_in.npz", **arrays)


def left_out():
    """golden/defaults.json: what the classes take for keys; golden/left_out.npz: audio of checkpoints without one."""
    classes = {"text_encoder": ClapConfig, "text_encoder.text_config": ClapTextConfig,
               "text_encoder.audio_config": ClapAudioConfig, "vocoder": SpeechT5HifiGanConfig,
               "unet": UNet2DConditionModel, "vae": AutoencoderKL,
               **{kind: getattr(diffusers, kind) for kind in SCHEDULERS.values()}}
    defaults = {name: {key: parameter.default for key, parameter in inspect.signature(kind).parameters.items()
                       if parameter.default is not parameter.empty} for name, kind in classes.items()}
    defaults["feature_extractor"] = ClapFeatureExtractor().to_dict()  # also what is computed from others
    (GOLDEN / "defaults.json").write_text(json.dumps(defaults, indent=0) + "\n")
    arrays = {}
    for name, keys in LEFT_OUT.items():
        for key in keys:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(shutil.copytree(GOLDEN / "checkpoint", folder, dirs_exist_ok=True), name)
                stated = json.loads(path.read_text())
                del stated[key]
                path.write_text(json.dumps(stated))
                pipe = MusicLDMPipeline.from_pretrained(folder)
            pipe.set_progress_bar_config(disable=True)
            result = run(pipe, {**CASES["guided"], "steps": 3}, np.random.default_rng(3))
            arrays |= {"in_latents": result["in_latents"], f"{name}:{key}": result["audio"][:, :1920]}
    np.savez_compressed(GOLDEN / "left_out.npz", **arrays)


def heard(pipe):
    """The extractor's features of the test waveforms."""
    extractor = pipe.feature_extractor
    waveforms = [waveform(seconds, extractor.sampling_rate)[:extractor.nb_max_samples] for seconds in SECONDS]
    return extractor(waveforms, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features.float()


def gradients(model, loss):
    """Of a scalar loss with respect to all parameters that it depends on: {name: what `sketch` keeps}."""
    model.zero_grad()
    value = loss()
    value.backward()
    return {"loss": sketch(value.detach().numpy()), **{
        name: sketch(x.grad.numpy()) for name, x in model.named_parameters() if x.grad is not None}}


@torch.enable_grad()
def training():
    """golden/training.npz: losses and their gradients by torch's autograd, the VAE's latents, log-mel spectrograms."""
    import librosa
    pipe = MusicLDMPipeline.from_pretrained(GOLDEN / "checkpoint")
    clap, unet, vae, vocoder = (model.eval() for model in (pipe.text_encoder, pipe.unet, pipe.vae, pipe.vocoder))
    rng, arrays = np.random.default_rng(3), {}

    def given(name, *shape):
        arrays[f"in_{name}"] = rng.standard_normal(shape, np.float32)
        return torch.from_numpy(arrays[f"in_{name}"])

    def keep(kind, found):
        arrays.update({f"{kind}.names": list(found), f"{kind}.sketches": np.concatenate([*found.values()])})

    x, noise, timesteps = given("x", 3, 8, 8, 4), given("noise", 3, 8, 8, 4), torch.tensor([0, 400, 999])
    labels = functional.normalize(given("labels", 3, 24))
    keep("unet", gradients(unet, lambda: ((unet(x, timesteps, None, class_labels=labels).sample - noise) ** 2).mean()))

    waves = [waveform(seconds, 16000)[:6400] for seconds in SECONDS[1:]]
    mels = [librosa.feature.melspectrogram(y=wave, sr=16000, n_fft=1024, hop_length=160, center=True, power=1.0,
                                           pad_mode="reflect", n_mels=16, fmin=0, fmax=8000)[:, :40] for wave in waves]
    mel = torch.from_numpy(np.log(np.maximum(mels, 1e-5)).transpose(0, 2, 1).astype(np.float32))[:, None]
    arrays["log_mel"] = mel[:, 0].numpy()
    z = given("z", 3, 8, 10, 4)

    def vae_loss():
        latents = vae.encode(mel).latent_dist
        arrays["latents"] = (latents.mean * vae.config.scaling_factor).detach().numpy()
        decoded = vae.decode(latents.mean + latents.std * z).sample
        return ((decoded - mel) ** 2).mean() + latents.kl().mean() / latents.mean[0].numel()

    keep("vae", gradients(vae, vae_loss))
    weights = given("weights", 3, 40 * 160)
    keep("vocoder", gradients(vocoder, lambda: (vocoder(mel[:, 0])[:, :40 * 160] * weights).mean()))
    extractor = pipe.feature_extractor
    features = extractor([waveform(seconds, extractor.sampling_rate)[:extractor.nb_max_samples] for seconds in SECONDS],
                         sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features.float()
    tokens = pipe.tokenizer(SPOKEN, padding=True, truncation=True, max_length=48, return_tensors="pt")

    def clap_loss():
        out, own = clap(**tokens, input_features=features), torch.arange(len(features))
        return sum(functional.cross_entropy(logits, own) for logits in (out.logits_per_text, out.logits_per_audio)) / 2

    keep("text_encoder", gradients(clap, clap_loss))
    np.savez_compressed(GOLDEN / "training.npz", **arrays)


def hear(pipe):
    """What the audio tower makes of the test waveforms and the prompts; every 25th frame of the features."""
    features, prompts = heard(pipe), CASES["batch"]["prompt"]
    tokens = pipe.tokenizer(prompts, padding=True, truncation=True, max_length=48, return_tensors="pt")
    out, exact = (copy.deepcopy(pipe.text_encoder).to(dtype)(**tokens, input_features=features.to(dtype))
                  for dtype in (torch.float32, torch.float64))
    distance = ((out.audio_embeds - exact.audio_embeds).abs().max() / exact.audio_embeds.abs().max()).numpy()
    print("cosines of audio", np.round((out.audio_embeds @ out.audio_embeds.T).numpy(), 3).tolist(),
          "float32 from float64", distance)
    return {"features": features[:, :, ::25].numpy(), "audio_embeds": out.audio_embeds.numpy(),
            "from_float64": distance, "cosines": (out.text_embeds @ out.audio_embeds.T).numpy()}


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if sys.argv[1:] in (["schedulers"], ["left_out"], ["tokenizers"], ["training"], ["music_in"]):
        return globals()[sys.argv[1]]()
    if sys.argv[1:]:
        pipe = MusicLDMPipeline.from_pretrained(sys.argv[1])
        pipe.set_progress_bar_config(disable=True)
        case = {**CASES["guided"], "height": pipe.unet.config.sample_size}
        np.savez_compressed(sys.argv[2], **{f"guided.{key}": value for key, value in run(pipe, case, rng).items()})
        return
    pipe = build()
    initialise(pipe)
    pipe.save_pretrained(GOLDEN / "checkpoint")
    wide = MusicLDMPipeline.from_pretrained(GOLDEN / "checkpoint", torch_dtype=torch.float64)
    wide.set_progress_bar_config(disable=True)
    arrays = {}
    for number, (name, case) in enumerate(CASES.items()):
        narrow, exact = (run(p, case, np.random.default_rng(number)) for p in (pipe, wide))
        distance = [np.abs(narrow[key] - exact[key]).max() / np.abs(exact[key]).max() for key in STAGES]
        print("float32 from float64", dict(zip(STAGES, distance)))
        arrays |= {f"{name}.{key}": value for key, value in {**narrow, "from_float64": np.array(distance)}.items()}
    np.savez_compressed(GOLDEN / "arrays.npz", **arrays)
    np.savez_compressed(GOLDEN / "audio.npz", **hear(pipe))
    tokens = [[text, pipe.tokenizer(text, truncation=True, max_length=48).input_ids] for text in TEXTS]
    dump = dict(ensure_ascii=True, indent=0)
    (GOLDEN / "tokens.json").write_text(json.dumps(tokens, **dump) + "\n")
    (GOLDEN / "cases.json").write_text(json.dumps(CASES, **dump) + "\n")
    versions = dict(python=platform.python_version(), torch=torch.__version__, diffusers=diffusers.__version__,
                    transformers=transformers.__version__, numpy=np.__version__)
    (GOLDEN / "versions.json").write_text(json.dumps(versions, indent=0) + "\n")
    schedulers()
    left_out()
    training()
    music_in()
    tokenizers()


if __name__ == "__main__":
    main()
