#!/usr/bin/env python3
"""Train one of MusicLDM's models on a corpus (data.py): CLAP, the VAE, the vocoder, or the UNet.

    python training/train.py unet --data CORPUS --out RUN --weights DIR --steps 20000

RUN holds the run's settings (run.json), its state (state.safetensors: written whole, every few minutes and on Ctrl-C)
and at the end, or where it was stopped, a checkpoint in the published layout (checkpoint/), with all that was not
trained from --weights. The same command goes on with a run that was stopped. A run follows from its seed: the draws of
step n come from (seed, n).
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
import types

if __name__ == "__main__":
    os.environ.setdefault("GLOG_v", "4")  # MindSpore reads it when it is imported: no lines of its own
    os.environ.setdefault("MS_OM_PATH", tempfile.gettempdir())  # its notes on a compilation that failed
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what MindSpore makes of Ctrl-C while a graph runs

import mindspore
import numpy as np
import safetensors.numpy
from mindspore import Parameter, Tensor, ops

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import data
import losses
import mixup
import musicldm
import weights as checkpoints
from musicldm import vae_factor
from weights import InputError

DEFAULTS = pathlib.Path(__file__).with_name("config.yaml")
RANGES = {"batch": (1, 4096), "crop": (0.08, 600), "segment": (0.08, 600), "learning_rate": (0, 1),
          "warmup": (0, math.inf), "halving": (0, math.inf), "weight_decay": (0, 1), "clip": (1e-6, math.inf),
          "ema": (0, 1), "save_minutes": (0, math.inf), "report_steps": (1, math.inf), "mixes": (0, 100),
          "drop": (0, 1), "captions": (0, 1), "snr_cap": (0, math.inf), "snr_power": (0, 1),
          "kl_weight": (0, math.inf), "mel_weight": (0, math.inf), "feature_weight": (0, math.inf),
          "adversarial_from": (0, math.inf), "through_vae": (0, 1), "discriminator_learning_rate": (0, 1)}
MEL_WINDOWS = (256, 512, 1024, 2048, 4096)  # samples
FREE = ("save_minutes", "report_steps")  # settings that a run may change when it goes on
BETAS, EPSILON = (0.9, 0.99), 1e-8  # AdamW's
STATE = ("weights", "first", "second", "average")  # AdamW's weights and moments, and EMA's weights


# ----------------------------------------------------------------------------------------------------------- settings

def stage_settings(stage, overrides=()):
    """The section of config.yaml for a stage with "key=value" overrides, checked; else an InputError."""
    settings = checkpoints.read_yaml(DEFAULTS)[stage]
    for text in overrides:
        settings = checkpoints.merged(settings, checkpoints.parse_override(text))
    for name, value in settings.items():
        low, high = RANGES.get(name, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not low <= value <= high:
            raise InputError(f"{name} is {value}; valid: {low} to {high}")
    if settings.get("mixup", "none") not in ("bam", "blm", "none"):
        raise InputError(f"mixup is {settings['mixup']!r}; valid: bam, blm, none")
    if not all(channels > 0 for channels in settings.get("discriminator_channels", [])):
        raise InputError(f"discriminator_channels is {settings['discriminator_channels']}; valid: above 0")
    if not all(size in MEL_WINDOWS for size in settings.get("mel_windows", [])):
        raise InputError(f"mel_windows is {settings['mel_windows']}; valid: of {', '.join(map(str, MEL_WINDOWS))}")
    return settings


# ---------------------------------------------------------------------------------------------------------- optimizer

def make_network(flat):
    """A network to train: {name: array} becomes a tree of Parameters, and the vectors that AdamW and EMA work on."""
    leaves = [Parameter(Tensor(array), name=name) for name, array in flat.items()]
    vector = np.concatenate([array.ravel() for array in flat.values()])
    network = types.SimpleNamespace(
        tree=checkpoints.nest(dict(zip(flat, leaves))), leaves=leaves, shapes={k: v.shape for k, v in flat.items()},
        state={name: Parameter(Tensor(vector), name=f"state.{name}") for name in STATE})
    restore(network, dict(zip(STATE, (vector, np.zeros_like(vector), np.zeros_like(vector), vector))))
    return network


def vectors(network):
    """{name: np.float32 (numbers,)} of a network's state, which shares their memory: not to be kept over a step."""
    return {name: x.asnumpy() for name, x in network.state.items()}


def restore(network, state):
    """Put `vectors` back. On a CPU the leaves then are parts of the memory of the vector of weights."""
    arrays = {name: state[name].copy() for name in STATE}
    for name, array in arrays.items():
        network.state[name].set_data(Tensor.from_numpy(array))
    for leaf, part in zip(network.leaves, split(network, arrays["weights"]).values()):
        leaf.set_data(Tensor.from_numpy(part))


def split(network, vector):
    """{name: array} of one of a network's vectors."""
    ends = np.cumsum([math.prod(shape) for shape in network.shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in
            zip(network.shapes.items(), np.split(vector, ends[:-1]))}


def make_update(network, settings, processes):
    """update(value, grads, rate, average_decay, power1, power2): one step of AdamW (Loshchilov & Hutter, 2017,
    algorithm 2) and of the average of the weights, in a graph, after a loss of some value; returns the gradients' norm.
    The powers are the betas' at this step.

    The gradients are one vector: its norm, a collective over processes and AdamW then are a few operators, not
    hundreds.
    """
    state, leaves = network.state, mindspore.ParameterTuple(network.leaves)
    sizes = tuple(math.prod(leaf.shape) for leaf in leaves)
    begins = tuple(int(begin) for begin in np.cumsum([0, *sizes])[:-1])
    (beta1, beta2), decay, clip = BETAS, settings["weight_decay"], settings["clip"]
    weights, first, second, averages = (state[name] for name in STATE)
    reduce, shared = ops.AllReduce() if processes > 1 else None, musicldm.layers.on_cpu()
    adam = ops.Adam()  # in place, where arithmetic would need a vector more for each of its steps
    each = ops.HyperMap()  # a loop over hundreds of tensors is deeper than a graph may be

    def flattened(grad):
        return ops.Reshape()(grad, (-1,))

    def put(leaf, begin, size):
        return ops.assign(leaf, ops.Reshape()(ops.Slice()(weights, (begin,), (size,)), leaf.shape))

    def update(value, grads, rate, average_decay, power1, power2):
        g = ops.Concat(0)(each(flattened, grads))
        if reduce is not None:
            g = reduce(g) * (1 / processes)
        norm = ops.sqrt(ops.MatMul()(g.reshape(1, -1), g.reshape(-1, 1)).reshape(()))
        g = g * ops.minimum(clip / (norm + 1e-6), Tensor(1.0, g.dtype))
        # not before all that reads the leaves is through, as they may share the memory of the weights
        ops.assign(weights, ops.Depend()(weights, (value, g)) * (1 - rate * decay))
        adam(weights, first, second, power1, power2, rate, beta1, beta2, EPSILON, g)
        ops.assign(averages, averages + (1 - average_decay) * (weights - averages))
        if not shared:
            each(put, leaves, begins, sizes)
        return norm

    return update


def schedule(settings, step, rate):
    """The numbers that `update` takes at a step, counted from 0, as float32 scalars."""
    rate *= min(1.0, (step + 1) / max(1, settings["warmup"]))
    rate *= 0.5 ** (step / settings["halving"]) if settings["halving"] else 1.0
    average = min(settings["ema"], (1 + step) / (10 + step))
    return [Tensor(np.float32(x)) for x in (rate, average, BETAS[0] ** (step + 1), BETAS[1] ** (step + 1))]


# ------------------------------------------------------------------------------------------------------------- stages
# A stage is a namespace:
#   networks {name: make_network(...)}, what is trained; a checkpoint takes `model` from the network of that name
#   rates {name: learning rate}
#   batch(step) -> np.float32 or np.int32 arrays whose first axis is the batch; every process makes the whole of it
#   losses(step) -> {network: loss(*batch) -> (loss, ...)} in the order of their updates
#   starts {name: step} of a network that does not learn from step 0 on
#   finish(cfg, params) -> (cfg, params) of the checkpoint

def trained(params, skipped=()):
    """{name: np.float32} of the parameters of one model, without those whose name ends in `skipped`."""
    return {name: musicldm.to_numpy(x) for name, x in checkpoints.flatten(params).items()
            if not name.endswith(tuple(skipped))}


def with_constants(network, params):
    """The network's tree, with what is not trained beside what is."""
    flat = dict(zip(network.shapes, network.leaves))
    return checkpoints.nest({name: flat.get(name, x) for name, x in checkpoints.flatten(params).items()})


def draws(seed, step):
    """The random numbers of one step."""
    return np.random.default_rng([seed, step])


def pick(tracks, n, rng):
    """n tracks, none twice before all were taken."""
    order = np.concatenate([rng.permutation(len(tracks)) for _ in range(math.ceil(n / len(tracks)))])
    return [tracks[i] for i in order[:n]]


def clap_inputs(cfg, waveforms):
    """What clap_audio takes of waveforms at the feature extractor's rate: np.float32 (n, frames, mels)."""
    tower = cfg["text_encoder"]["audio_config"]
    frames = tower["spec_size"] * (tower["spec_size"] // tower["num_mel_bins"])
    return musicldm.stretch(musicldm.clap_features(cfg, waveforms)[:, 0], frames).astype(np.float32)


def whole_batch(x, processes, rank):
    """Rows (n, ...) of every process as one array, in a graph: a sum of arrays that are zero but for one's own rows."""
    if processes == 1:
        return x
    parts = [x if i == rank else ops.zeros_like(x) for i in range(processes)]
    return ops.AllReduce()(ops.Concat(0)(parts))


def clap_loss(tree, cfg, processes=1, rank=0):
    """loss(features, ids, positions, mask), `losses.contrastive` of both towers over the batch of all processes."""
    audio_encoder, audio_projection = tree["audio_model"]["audio_encoder"], tree["audio_projection"]
    text_model, text_projection = tree["text_model"], tree["text_projection"]  # the whole tree is too deep for a graph
    scale_text, scale_audio = tree["logit_scale_t"], tree["logit_scale_a"]
    tower, text_cfg = (musicldm.frozen(cfg[name]) for name in ("audio_config", "text_config"))

    def loss(features, ids, positions, mask):
        heard = losses.unit(musicldm.clap_audio(features, audio_encoder, audio_projection, tower))
        read = losses.unit(musicldm.clap_text(ids, positions, mask, text_model, text_projection, text_cfg))
        return losses.contrastive(whole_batch(read, processes, rank), whole_batch(heard, processes, rank), scale_text,
                                  scale_audio)

    return loss


def clap_stage(cfg, params, settings, tracks, seed, processes, rank):
    """Contrastive learning of both towers; the audio tower's batch norm keeps its statistics (`start_from_random`)."""
    captioned = [track for track in tracks if track.get("captions")]
    network = make_network(trained(params["text_encoder"], ("running_mean", "running_var")))
    loss = clap_loss(with_constants(network, params["text_encoder"]), cfg["text_encoder"], processes, rank)
    rate, count = cfg["feature_extractor"]["sampling_rate"], settings["batch"]
    every = musicldm.tokenize(cfg, [text for track in captioned for text in track["captions"]])[1].sum(1)
    length = musicldm.padded_length(cfg, int(every.max()))

    def batch(step):
        rng = draws(seed, step)
        chosen = pick(captioned, count, rng)
        texts = [str(rng.choice(track["captions"])) for track in chosen]
        waveforms = [data.random_crop(track, settings["crop"], rate, rng) for track in chosen]
        return [clap_inputs(cfg, waveforms), *musicldm.text_inputs(cfg, *musicldm.tokenize(cfg, texts), length)]

    return types.SimpleNamespace(networks={"text_encoder": network}, rates={"text_encoder": settings["learning_rate"]},
                                 batch=batch, losses=lambda step: {"text_encoder": loss},
                                 finish=lambda cfg, params: (cfg, params))


def frame_count(cfg, seconds, multiple=1):
    """The log-mel frames of so many seconds, a multiple of `multiple`, at least that."""
    hop = math.prod(cfg["vocoder"]["upsample_rates"])
    return max(1, round(seconds * cfg["vocoder"]["sampling_rate"] / hop / multiple)) * multiple


def random_waveforms(cfg, tracks, n, frames, rng):
    """np.float32 (n, frames * hop): crops of n tracks at the vocoder's rate; published hop 160."""
    rate, hop = cfg["vocoder"]["sampling_rate"], math.prod(cfg["vocoder"]["upsample_rates"])
    return np.stack([data.random_crop(track, frames * hop / rate, rate, rng) for track in pick(tracks, n, rng)])


def log_mels(cfg, waveforms):
    return np.stack([musicldm.log_mel(cfg["vocoder"], waveform) for waveform in waveforms])


def vae_stage(cfg, params, settings, tracks, seed, processes, rank):
    """Reconstruction of log-mel spectrograms; `finish` measures scaling_factor."""
    network, vae, kl_weight = make_network(trained(params["vae"])), musicldm.frozen(cfg["vae"]), settings["kl_weight"]
    tree = network.tree
    frames = frame_count(cfg, settings["crop"], vae_factor(cfg))

    def batch(step):
        rng = draws(seed, step)
        mel = log_mels(cfg, random_waveforms(cfg, tracks, settings["batch"], frames, rng))
        size = (len(mel), frames // vae_factor(cfg), mel.shape[2] // vae_factor(cfg), vae["latent_channels"])
        return [mel, rng.standard_normal(size, np.float32)]

    def loss(mel, noise):
        mean, log_variance = musicldm.vae_encode(mel, tree, vae)
        decoded = musicldm.vae_decode(mean + ops.exp(log_variance / 2) * noise, tree, vae, False)
        return ops.abs(decoded - mel).mean() + kl_weight * losses.kl_divergence(mean, log_variance)

    def finish(cfg, params):
        unscaled = {**cfg, "vae": {**cfg["vae"], "scaling_factor": 1.0}}
        waveforms = random_waveforms(cfg, tracks, min(64, 4 * len(tracks)), frames, draws(seed, 2 ** 32))
        latents = musicldm.encode_latents(unscaled, waveforms, params, cfg["vocoder"]["sampling_rate"])
        return {**cfg, "vae": {**cfg["vae"], "scaling_factor": 1 / float(latents.std())}}, params

    return types.SimpleNamespace(networks={"vae": network}, rates={"vae": settings["learning_rate"]}, batch=batch,
                                 losses=lambda step: {"vae": loss}, finish=finish)


def vocoder_stage(cfg, params, settings, tracks, seed, processes, rank):
    """HiFi-GAN: the mel loss alone at first, then with its discriminators."""
    network = make_network(trained(params["vocoder"], ("mean", "scale")))
    tree, vocoder = with_constants(network, params["vocoder"]), musicldm.frozen(cfg["vocoder"])
    mel_weight, feature_weight = settings["mel_weight"], settings["feature_weight"]
    channels = tuple(settings["discriminator_channels"])
    shapes = losses.discriminator_shapes(channels)
    judges = make_network(dict(checkpoints.random_arrays(shapes, draws(seed, 2 ** 32 + 1))))
    judges_tree = judges.tree
    factor = vae_factor(cfg) if settings["through_vae"] else 1
    frames = frame_count(cfg, settings["crop"], factor)
    hop, windows = math.prod(vocoder["upsample_rates"]), settings["mel_windows"]

    def batch(step):
        rng = draws(seed, step)
        waveforms = random_waveforms(cfg, tracks, settings["batch"], frames, rng)
        mel = log_mels(cfg, waveforms)
        through = round(settings["through_vae"] * len(mel))
        if through:
            p, vae = mindspore.mutable(params["vae"]), musicldm.frozen(cfg["vae"])
            mean, _ = musicldm.vae_encode(Tensor(mel[:through]), p, vae)
            mel[:through] = musicldm.to_numpy(musicldm.vae_decode(mean, p, vae, False))
        return [mel, waveforms]

    def fake(mel, real):
        return musicldm.hifigan(mel, tree, vocoder)[:, :real.shape[1]]  # the published one has 32 samples more

    def mel_distance(made, real):
        total = 0.0
        for size in windows:  # a longer one has as many more bands, to tell apart frequencies that are closer
            total = total + losses.mel_distance(made, real, size, hop, vocoder["model_in_dim"] * size // 1024,
                                                vocoder["sampling_rate"])
        return mel_weight / len(windows) * total

    def mel_loss(mel, real):
        return mel_distance(fake(mel, real), real)

    def generator_loss(mel, real):
        made = fake(mel, real)
        scores, features = losses.discriminators(made, judges_tree, channels)
        _, wanted = losses.discriminators(real, judges_tree, channels)
        return (mel_distance(made, real) + losses.adversarial(scores)
                + feature_weight * losses.feature_matching(wanted, features))

    def discriminator_loss(mel, real):
        both = ops.Concat(0)((real, ops.stop_gradient(fake(mel, real))))
        return losses.discrimination(losses.discriminators(both, judges_tree, channels)[0])

    return types.SimpleNamespace(
        networks={"vocoder": network, "discriminators": judges},
        rates={"vocoder": settings["learning_rate"], "discriminators": settings["discriminator_learning_rate"]},
        batch=batch, finish=lambda cfg, params: (cfg, params), starts={"discriminators": settings["adversarial_from"]},
        losses=lambda step: {"vocoder": mel_loss} if step < settings["adversarial_from"] else {
            "discriminators": discriminator_loss, "vocoder": generator_loss})


def segments(tracks, seconds):
    """Tracks cut into segments of `seconds`: [(track, start)]. A rest is kept if it is at least half a segment; a
    shorter track is one segment."""
    found = []
    for track in tracks:
        length = track["samples"] / track["rate"]
        found += [(track, i * seconds) for i in range(max(1, round(length / seconds)))]
    return found


def as_part(track, start, seconds):
    """The manifest's facts of a segment: its file, its tempo, and its downbeats from its own start."""
    beats = [beat - start for beat in track["downbeats"] if start <= beat < start + seconds]
    return {"audio": track["audio"], "tempo": track.get("tempo"), "downbeats": beats}


def make_examples(cfg, params, settings, tracks, seed, say):
    """What the UNet learns from, made once: the latents and CLAP vectors of all segments and of their mixes.

    -> {"latents": [(rows, W, C)], "vectors": (n, D), "captions": [(m, D)] (m 0 for mixes), "empty": (D,)}
    """
    rng, rate, seconds = draws(seed, 2 ** 32 + 2), cfg["vocoder"]["sampling_rate"], settings["segment"]
    row = musicldm.row_samples(cfg)
    eighth = max(1, round(settings["crop"] * rate / row) // 8)  # of a crop, in rows
    parts = segments(tracks, seconds)
    facts = [as_part(track, start, min(seconds, track["samples"] / track["rate"] - start)) for track, start in parts]

    def cut(x, row):
        """To whole eighths of a crop, as each length compiles the encoder once more; x has `row` numbers a row."""
        return x[:max(1, (len(x) + row // 2) // (eighth * row)) * eighth * row]

    def encoded(waveform):
        waveform = cut(waveform, row)
        latents = musicldm.encode_latents(cfg, waveform, params, rate)[0].transpose(1, 2, 0)
        return latents, musicldm.encode_audio(cfg, waveform, params, rate)[0]

    def sound(i):
        track, start = parts[i]
        return data.crop(track, start, min(seconds, track["samples"] / track["rate"] - start), rate)

    latents, heard, read, texts = [], [], [], {}
    began = time.perf_counter()
    for i, (track, _) in enumerate(parts):
        x, vector = encoded(sound(i))
        for text in track.get("captions", []):
            if text not in texts:
                texts[text] = musicldm.encode_prompt(cfg, text, params)[0]
        latents.append(x)
        heard.append(vector)
        read.append(np.array([texts[text] for text in track.get("captions", [])], np.float32).reshape(-1, len(vector)))
        if i % 200 == 199:
            say(f"{i + 1} of {len(parts)} segments encoded, {time.perf_counter() - began:.0f} s")

    fitting = mixup.partners(facts) if settings["mixup"] != "none" else [[]] * len(parts)
    say(f"{sum(map(bool, fitting))} of {len(parts)} segments have a partner of their tempo in another track")
    for count in range(round(settings["mixes"] * len(parts))):
        if count % 200 == 199:
            say(f"{count + 1} mixes tried, {time.perf_counter() - began:.0f} s")
        i = count % len(parts)
        if not fitting[i]:
            continue
        j = int(rng.choice(fitting[i]))
        beats = [mixup.draw_downbeat(facts[k]["downbeats"], len(latents[k]) * row / rate, settings["crop"], rng)
                 for k in (i, j)]
        if None in beats:
            continue
        if settings["mixup"] == "bam":
            a, b = (round(beat * rate) for beat in beats)
            mixed, vector = encoded(mixup.mix(sound(i), sound(j), a, b, mixup.draw_lambda(rng)).astype(np.float32))
        else:
            a, b = (round(beat * rate / row) for beat in beats)
            mixed = cut(mixup.mix(latents[i], latents[j], a, b, np.float32(mixup.draw_lambda(rng))), 1)
            mel = musicldm.decode_latents(cfg, mixed.transpose(2, 0, 1)[None], params)
            vector = musicldm.encode_audio(cfg, musicldm.vocode(cfg, mel, params), params, rate)[0]
        latents.append(mixed)
        heard.append(vector)
        read.append(np.zeros((0, len(vector)), np.float32))
    say(f"{len(latents) - len(parts)} mixes made")
    return {"latents": latents, "vectors": np.stack(heard), "captions": read,
            "empty": musicldm.encode_prompt(cfg, "", params)[0]}


def kept_examples(path, make, rank=0):
    """`make()`, or what it made before for the same run. Of several processes the first makes it, the others wait."""
    while rank and not path.exists():
        time.sleep(1)
    if path.exists():
        with np.load(path) as file:
            ends, captions = file["ends"], file["caption_ends"]
            return {"latents": np.split(file["latents"], ends[:-1]), "vectors": file["vectors"],
                    "captions": np.split(file["captions"], captions[:-1]), "empty": file["empty"]}
    made = make()

    def write(part):
        with part.open("wb") as file:
            np.savez(file, latents=np.concatenate(made["latents"]), ends=np.cumsum([len(x) for x in made["latents"]]),
                     captions=np.concatenate(made["captions"]), empty=made["empty"], vectors=made["vectors"],
                     caption_ends=np.cumsum([len(x) for x in made["captions"]]))

    write_whole(path, write)
    return made


def loss_weights(cfg, timesteps, cap, power):
    """Weights of the square errors of eps at timesteps (n,): min(SNR, cap) / SNR, or 1 where cap is 0, times
    (1 + 1 / SNR) ** power. Of v they are alpha-bar times these, as its errors are larger."""
    alphas = musicldm.alphas_cumprod(cfg["schedule"])[timesteps]
    snr = alphas / (1 - alphas)
    return (np.minimum(snr, cap) / snr if cap else 1) * (1 + 1 / snr) ** power


def unet_stage(cfg, params, settings, tracks, seed, processes, rank, folder=None, say=print):
    """Prediction of latents' noise, or of their velocity, as the checkpoint's schedule says, under the CLAP vector of
    their audio, or for a share of them of a caption."""
    examples = kept_examples(folder / "examples.npz",
                             lambda: make_examples(cfg, params, settings, tracks, seed, say), rank)
    network, unet = make_network(trained(params["unet"])), musicldm.frozen(cfg["unet"])
    tree = network.tree
    rows = frame_count(cfg, settings["crop"], vae_factor(cfg)) // vae_factor(cfg)
    long_enough = [i for i, x in enumerate(examples["latents"]) if len(x) >= rows]
    alphas, predicted = musicldm.alphas_cumprod(cfg["schedule"]), cfg["schedule"]["prediction_type"]

    def batch(step):
        rng, x, conditions = draws(seed, step), [], []
        for i in pick(long_enough, settings["batch"], rng):
            latents, texts = examples["latents"][i], examples["captions"][i]
            start = rng.integers(len(latents) - rows + 1)
            x.append(latents[start:start + rows])
            chance = rng.random(2)
            conditions.append(examples["empty"] if chance[0] < settings["drop"] else
                              texts[rng.integers(len(texts))] if len(texts) and chance[1] < settings["captions"] else
                              examples["vectors"][i])
        x = np.stack(x)
        # one in each 1 / batch of the schedule: each is uniform, and the loss varies less (after Kingma et al., 2021,
        # arXiv 2107.00630, who shift a single draw)
        timesteps = ((rng.permutation(len(x)) + rng.random(len(x))) / len(x) * len(alphas)).astype(int)
        noise, alpha = rng.standard_normal(x.shape, np.float32), alphas[timesteps][:, None, None, None]
        wanted, weights = noise, loss_weights(cfg, timesteps, settings["snr_cap"], settings["snr_power"])
        if predicted == "v_prediction":
            wanted, weights = np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * x, weights * alphas[timesteps]
        return [musicldm.add_noise(x, noise, alpha), wanted, np.stack(conditions),
                musicldm.timestep_embedding(timesteps, unet["block_out_channels"][0]), weights.astype(np.float32)]

    def loss(x, wanted, conditions, sinusoids, weights):
        error = musicldm.unet(x, sinusoids, conditions, tree, unet, False) - wanted
        return ((error * error).reshape(x.shape[0], -1).mean(1) * weights).mean()

    return types.SimpleNamespace(networks={"unet": network}, rates={"unet": settings["learning_rate"]}, batch=batch,
                                 losses=lambda step: {"unet": loss}, finish=lambda cfg, params: (cfg, params))


STAGES = {"clap": clap_stage, "vae": vae_stage, "vocoder": vocoder_stage, "unet": unet_stage}


def check_memory(cfg, stage, settings):
    """Refuse a batch whose step would not fit: an InputError with an estimate, from the peaks of runs on a CPU.

    1 GB, 66 bytes a number to learn, and for each example a multiple of all layers' outputs, by the stage.
    """
    tower, unet, vae, vocoder = (cfg[name] for name in ("text_encoder", "unet", "vae", "vocoder"))
    frames, mels, factor = frame_count(cfg, settings["crop"]), vocoder["model_in_dim"], vae_factor(cfg)
    if stage == "clap":
        tower, kept = tower["audio_config"], 62
        side, width = tower["spec_size"] // tower["patch_size"], tower["patch_embeds_hidden_size"]
        outputs = [(side // 2 ** i) ** 2 * width * 2 ** i * depth for i, depth in enumerate(tower["depths"])]
    elif stage == "vocoder":
        lengths = frames * np.cumprod(vocoder["upsample_rates"])
        convolutions, kept = 2 * sum(map(len, vocoder["resblock_dilation_sizes"])), 17
        outputs = [int(length) * vocoder["upsample_initial_channel"] // 2 ** (i + 1) * convolutions
                   for i, length in enumerate(lengths)]
    else:
        model, scale, kept = (vae, 1, 34) if stage == "vae" else (unet, factor, 100)
        outputs = [frames * mels // scale ** 2 // 4 ** i * channels * (model["layers_per_block"] + 1)
                   for i, channels in enumerate(model["block_out_channels"])]
    numbers = sum(map(math.prod, checkpoints.param_shapes(cfg)[{"clap": "text_encoder"}.get(stage, stage)].values()))
    need, free = 1e9 + 66 * numbers + 4 * settings["batch"] * kept * sum(outputs), musicldm.free_memory(cfg)
    if need > free:
        raise InputError(f"a step of {stage} with batch {settings['batch']} would take about {need / 1e9:.1f} GB of "
                         f"memory, and {free / 1e9:.1f} are free; valid: a smaller batch or crop")


def check_tracks(cfg, stage, settings, tracks):
    """Refuse what a stage could not learn from, before hours are spent on it: an InputError."""
    if cfg["weights"] == checkpoints.RANDOM and (stage == "unet" or settings.get("through_vae")):
        raise InputError(f"--weights is random; valid for {stage}: a checkpoint of what it learns from, "
                         f"{'CLAP and the VAE' if stage == 'unet' else 'the VAE'}, such as RUN/checkpoint")
    if stage == "clap" and sum(bool(track.get("captions")) for track in tracks) < 2:
        raise InputError("--data: fewer than two tracks have captions; valid for clap: captions for every track")
    if stage == "vocoder":
        shortest = 2 * max(settings["mel_windows"]) / cfg["vocoder"]["sampling_rate"]
        if settings["crop"] < shortest:
            raise InputError(f"crop is {settings['crop']:g}; valid: from {shortest:g}, twice the longest of "
                             "mel_windows")
    if stage == "unet":
        longest = min(settings["segment"], max(track["samples"] / track["rate"] for track in tracks))
        if longest < settings["crop"]:
            raise InputError(f"crop is {settings['crop']:g}; valid: up to {longest:g}, the longest segment of --data")


# ---------------------------------------------------------------------------------------------------------------- run

def start_from_random(cfg, tracks, seed, folder):
    """A checkpoint with random weights in `folder`, with what the corpus says: the vocabulary of the captions, and the
    statistics of the audio tower's batch norm."""
    params = checkpoints.random_params(cfg, seed)
    last = params["vocoder"]["conv_post"]  # near silence, as HiFi-GAN begins: a tanh at its ends does not learn
    last["weight"] = last["weight"] * 0.01
    captions = [text for track in tracks for text in track.get("captions", [])]
    vocabulary = data.learn_vocabulary(captions, cfg["text_encoder"]["text_config"]["vocab_size"])
    params["text_encoder"]["logit_scale_a"] = params["text_encoder"]["logit_scale_t"] = Tensor(
        np.float32(math.log(1 / 0.07)))  # as CLIP begins
    rng, rate = draws(seed, 2 ** 32), cfg["feature_extractor"]["sampling_rate"]
    heard = clap_inputs(cfg, [data.random_crop(track, 10.0, rate, rng) for track in pick(tracks, 64, rng)])
    norm = params["text_encoder"]["audio_model"]["audio_encoder"]["batch_norm"]
    norm["running_mean"], norm["running_var"] = (Tensor(x.astype(np.float32)) for x in (
        heard.mean((0, 1)), heard.var((0, 1))))
    checkpoints.save_params(cfg, params, folder, vocabulary=vocabulary)


def write_whole(path, write):
    """A file that is there whole or not at all; write(path) writes it."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"--out {path}: cannot be written: {checkpoints.one_line(error)}") from None
    finally:
        part.unlink(missing_ok=True)


def save_state(folder, networks, step, history):
    arrays = {f"{name}.{kind}": x for name, network in networks.items() for kind, x in vectors(network).items()}
    arrays["losses"] = np.array(history, np.float32).reshape(step, -1)
    write_whole(folder / "state.safetensors", lambda part: safetensors.numpy.save_file(arrays, part))


def load_state(folder, networks):
    """(step, losses) of the last saved state, whose vectors the networks take; (0, []) if there is none."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0, []
    try:
        state = safetensors.numpy.load(path.read_bytes())
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"--out: cannot read {path}: {checkpoints.one_line(error)}") from None
    for name, network in networks.items():
        restore(network, {kind: state[f"{name}.{kind}"] for kind in network.state})
    return len(state["losses"]), state["losses"].tolist()


def check_run(folder, described):
    """Make `folder` the run that `described` describes, or see that it is; an InputError names the difference."""
    path = folder / "run.json"
    if path.exists():
        known = checkpoints.read_json(path)
        for name in described:
            if known.get(name) != described[name]:
                if name == "manifest":
                    raise InputError(f"--data: manifest.jsonl is not the one that --out {folder} began with; valid: a "
                                     "new folder, or the same corpus")
                raise InputError(f"--out {folder} holds another run: its {name} is {known.get(name)!r:.200}, not "
                                 f"{described[name]!r:.200}; valid: a new folder, or the same run")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            full = any(folder.iterdir())
        except OSError as error:
            raise InputError(f"--out {folder}: cannot be made: {error.strerror}") from None
        if full:
            raise InputError(f"--out {folder} is not empty and holds no run; valid: a new folder, or the same run")
        write_whole(path, lambda part: part.write_text(json.dumps(described, indent=1)))


def write_checkpoint(folder, cfg, params):
    """The folder's checkpoint anew: the old one stays until the new one is whole."""
    new, old = folder / "checkpoint.new", folder / "checkpoint"
    shutil.rmtree(new, ignore_errors=True)
    checkpoints.save_params(cfg, params, new)
    shutil.rmtree(old, ignore_errors=True)
    new.rename(old)


def make_step(loss, network, settings, processes):
    """One jitted training step of a network: step(*schedule(...), *batch) -> (loss, norm of the gradients)."""
    value_and_grad = mindspore.value_and_grad(loss, None, mindspore.ParameterTuple(network.leaves))
    update = make_update(network, settings, processes)
    reduce = ops.AllReduce() if processes > 1 else None

    @mindspore.jit
    def step(rate, average_decay, power1, power2, *batch):  # a tuple of them would be a constant
        value, grads = value_and_grad(*batch)
        norm = update(value, grads, rate, average_decay, power1, power2)
        if reduce is not None:
            value = reduce(value) * (1 / processes)
        return value, norm

    return step


def distribution():
    """(processes, rank) under msrun, (1, 0) otherwise. msrun's scheduler stays here until the others are through."""
    if os.environ.get("MS_ROLE") not in ("MS_WORKER", "MS_SCHED"):
        return 1, 0
    import mindspore.communication as communication
    communication.init()
    return communication.get_group_size(), communication.get_rank()


def any_of(stopped, processes):
    """Whether a signal came to one of the processes: all of them must take the same steps."""
    if processes == 1:
        return bool(stopped)
    return ops.AllReduce()(Tensor(np.array([len(stopped)], np.float32))).asnumpy()[0] > 0


@contextlib.contextmanager
def stopping():
    """A list that is no longer empty when SIGINT or SIGTERM came."""
    stopped = []
    before = {kind: signal.signal(kind, lambda number, frame: stopped.append(number))
              for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def train(stage, data_folder, out, weights="random", config=musicldm.DEFAULT_CONFIG, overrides=(), steps=1000, seed=0,
          say=print):
    """Train a stage up to `steps` in all and write its checkpoint; the losses, np.float32 (steps, networks).

    Returns fewer losses if SIGINT or SIGTERM came: the state is saved, and the next call goes on.
    Raises InputError, before anything is computed, for what cannot be trained, and for a loss that is not finite.
    """
    settings = stage_settings(stage, overrides)
    cfg = musicldm.load_config(config, weights)
    if cfg["dtype"] != "float32":
        raise InputError(f"dtype is {cfg['dtype']}; valid for training: float32")
    processes, rank = distribution()
    if settings["batch"] % processes:
        raise InputError(f"batch is {settings['batch']}; valid in {processes} processes: a multiple of that")
    tracks = data.of_split(data.read_manifest(data_folder), "train")  # reads all of the music
    check_tracks(cfg, stage, settings, tracks)
    check_memory(cfg, stage, {**settings, "batch": settings["batch"] // processes})
    folder = pathlib.Path(out)
    manifest = hashlib.sha256((pathlib.Path(data_folder) / "manifest.jsonl").read_bytes()).hexdigest()
    described = {"stage": stage, "seed": seed, "weights": weights, "manifest": manifest,
                 "settings": {name: value for name, value in settings.items() if name not in FREE},
                 "architecture": {name: cfg[name] for name in (*checkpoints.MODELS, "schedule", "feature_extractor")}}
    if rank == 0:
        check_run(folder, described)
    if cfg["weights"] == checkpoints.RANDOM:
        if rank == 0 and not (folder / "start").exists():
            start_from_random(cfg, tracks, seed, folder / "start")
        if processes > 1:
            ops.AllReduce()(Tensor(np.zeros(1, np.float32))).asnumpy()  # wait for it
        cfg = musicldm.load_config(config, str(folder / "start"))
    params = checkpoints.load_params(cfg)
    more = {"folder": folder, "say": say} if stage == "unet" else {}
    task = STAGES[stage](cfg, params, settings, tracks, seed, processes, rank, **more)
    numbers = sum(sum(math.prod(shape) for shape in network.shapes.values()) for network in task.networks.values())
    say(f"{stage}: {len(tracks)} tracks, {numbers} numbers to learn, batch {settings['batch']}")
    step, history = load_state(folder, task.networks)
    if step:
        say(f"goes on from step {step}")
    compiled, saved, reported = {}, time.monotonic(), (time.monotonic(), step)
    with stopping() as stopped:
        while step < steps and not any_of(stopped, processes):
            share = slice(rank * settings["batch"] // processes, (rank + 1) * settings["batch"] // processes)
            arrays = [Tensor(np.ascontiguousarray(x[share])) for x in task.batch(step)]
            values = {name: 0.0 for name in task.networks}
            for name, loss in task.losses(step).items():
                if (name, loss) not in compiled:
                    compiled[name, loss] = make_step(loss, task.networks[name], settings, processes)
                taken = step - vars(task).get("starts", {}).get(name, 0)
                value, norm = compiled[name, loss](*schedule(settings, taken, task.rates[name]), *arrays)
                values[name], norm = float(value.asnumpy()), float(norm.asnumpy())
                if not math.isfinite(values[name] + norm):
                    raise InputError(f"the loss of {name} is {values[name]:g} and its gradient's norm {norm:g} at step "
                                     f"{step + 1}; the state saved last is kept: lower learning_rate or clip, and "
                                     "start anew in another folder")
            history.append(list(values.values()))
            step += 1
            now = time.monotonic()
            if step % settings["report_steps"] == 0 or step == steps:
                recent = np.mean(history[reported[1]:], axis=0)
                figures = "  ".join(f"{name} {value:.4f}" for name, value in zip(values, recent))
                say(f"step {step}/{steps}  {figures}  {(now - reported[0]) / (step - reported[1]):.2f} s a step")
                reported = now, step
            if rank == 0 and now - saved > 60 * settings["save_minutes"]:
                save_state(folder, task.networks, step, history)
                saved = now
        if rank == 0:
            save_state(folder, task.networks, step, history)
    if rank == 0:
        for name, network in task.networks.items():
            if name in checkpoints.MODELS:
                flat = {key: Tensor(x) for key, x in split(network, vectors(network)["average"]).items()}
                params = {**params, name: checkpoints.nest({**checkpoints.flatten(params[name]), **flat})}
        write_checkpoint(folder, *task.finish(cfg, params))
    return np.array(history, np.float32).reshape(step, -1)


def main(argv=None):
    """The command line: 0 when the run is through, 2 after one line about a mistake, 130 after Ctrl-C."""
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        distribution()
        return 0

    def fail(message):
        raise InputError(message)

    parser = argparse.ArgumentParser(description="Train one of MusicLDM's models.", allow_abbrev=False)
    parser.error = fail
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with manifest.jsonl")
    parser.add_argument("--out", required=True, metavar="RUN", help="a new folder, or a run to go on with")
    parser.add_argument("--weights", default="random", metavar="DIR|HUB-ID|demo|random",
                        help="what the run starts from (default random)")
    parser.add_argument("--config", default=str(musicldm.DEFAULT_CONFIG), metavar="FILE",
                        help="the architecture of random weights, such as training/demo.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the stage: see "
                        "training/config.yaml")
    parser.add_argument("--steps", type=int, default=1000, metavar="N", help="steps in all (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (default 0)")
    try:
        args = parser.parse_args(argv)
        if args.steps < 1 or args.seed < 0:
            raise InputError(f"--steps {args.steps}, --seed {args.seed}; valid: 1 or more, 0 or more")
        done = train(args.stage, args.data, args.out, args.weights, args.config, args.set, args.steps, args.seed,
                     lambda text: print(text, flush=True))
    except InputError as error:
        print(f"train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntrain: interrupted before the first step", file=sys.stderr)
        return 130
    return 0 if len(done) >= args.steps else 130


if __name__ == "__main__":
    sys.exit(main())
