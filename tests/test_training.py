"""Training: what differentiates, against torch's autograd on the reference's own modules; runs; and bad input."""
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mindspore
import numpy as np
import pytest
import safetensors.numpy
import soundfile
from conftest import ENVIRONMENT, GOLDEN, free_port, golden_config, relative_error
from mindspore import Tensor, ops
from scipy import signal as dsp
from scipy import stats
from waveforms import SECONDS, SPOKEN, sketch, waveform

import musicldm
import weights
from weights import InputError

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "training"))
import data
import losses
import mixup
import train


@pytest.fixture(scope="module")
def stored():
    with np.load(GOLDEN / "training.npz") as file:
        return {name: file[name] for name in file.files}


def gradients(loss, network, arrays):
    """{"loss": ..., name: sketch of its gradient} of a loss over a network's tree."""
    value, grads = mindspore.jit(mindspore.value_and_grad(loss, None, mindspore.ParameterTuple(network.leaves)))(
        *map(Tensor, arrays))
    return {"loss": sketch(value.asnumpy()), **{name: sketch(x.asnumpy()) for name, x in zip(network.shapes, grads)}}


def compare(found, stored, model):
    """Every tensor's gradient to 1e-4 of its largest number; none is missing."""
    names, sketches = stored[f"{model}.names"].tolist(), stored[f"{model}.sketches"]
    assert sorted(found) == sorted(names)
    ends = np.cumsum([len(found[name]) for name in names])
    wanted = dict(zip(names, np.split(sketches, ends[:-1]), strict=True))
    scale = max(np.abs(x).max() for x in wanted.values())
    for name, x in wanted.items():
        # a gradient that is zero but for rounding (a key's bias: softmax does not see it) is held to the others
        error = np.abs(found[name] - x).max() / max(np.abs(x).max(), 1e-3 * scale)
        assert error < 1e-4, f"{name}: {error}"


def test_unet_with_a_timestep_a_sample(stored, params):
    cfg = golden_config()
    network, unet = train.make_network(train.trained(params["unet"])), musicldm.frozen(cfg["unet"])
    labels, tree = stored["in_labels"] / np.linalg.norm(stored["in_labels"], axis=1, keepdims=True), network.tree
    sinusoids = musicldm.timestep_embedding([0, 400, 999], cfg["unet"]["block_out_channels"][0])

    def loss(x, noise, sinusoids, labels):
        error = musicldm.unet(x, sinusoids, labels, tree, unet, False) - noise
        return (error * error).mean()

    x, noise = (np.ascontiguousarray(stored[name].transpose(0, 2, 3, 1)) for name in ("in_x", "in_noise"))
    compare(gradients(loss, network, [x, noise, sinusoids, labels]), stored, "unet")


def test_vae(stored, params):
    cfg = golden_config()
    network, vae = train.make_network(train.trained(params["vae"])), musicldm.frozen(cfg["vae"])
    tree = network.tree

    def loss(mel, z):
        mean, log_variance = musicldm.vae_encode(mel, tree, vae)
        error = musicldm.vae_decode(mean + ops.exp(log_variance / 2) * z, tree, vae, False) - mel
        return (error * error).mean() + losses.kl_divergence(mean, log_variance)

    z = np.ascontiguousarray(stored["in_z"].transpose(0, 2, 3, 1))
    compare(gradients(loss, network, [stored["log_mel"], z]), stored, "vae")


def test_vocoder(stored, params):
    cfg = golden_config()
    network = train.make_network(train.trained(params["vocoder"], ("mean", "scale")))
    tree, vocoder = train.with_constants(network, params["vocoder"]), musicldm.frozen(cfg["vocoder"])

    def loss(mel, weights):
        return (musicldm.hifigan(mel, tree, vocoder)[:, :weights.shape[1]] * weights).mean()

    compare(gradients(loss, network, [stored["log_mel"], stored["in_weights"]]), stored, "vocoder")


def test_clap(stored, params):
    cfg = golden_config()
    network = train.make_network(train.trained(params["text_encoder"], ("running_mean", "running_var")))
    loss = train.clap_loss(train.with_constants(network, params["text_encoder"]), cfg["text_encoder"])
    rate = cfg["feature_extractor"]["sampling_rate"]
    features = train.clap_inputs(cfg, [waveform(seconds, rate) for seconds in SECONDS])
    texts = musicldm.text_inputs(cfg, *musicldm.tokenize(cfg, SPOKEN), 48)
    compare(gradients(loss, network, [features, *texts]), stored, "text_encoder")


def test_latents_and_log_mel_equal_the_references(stored, params):
    cfg = golden_config()
    waves = np.stack([waveform(seconds, 16000)[:6400] for seconds in SECONDS[1:]])
    mel = np.stack([musicldm.log_mel(cfg["vocoder"], wave) for wave in waves])
    assert relative_error(mel, stored["log_mel"]) < 2e-5
    latents = musicldm.encode_latents(cfg, waves, params)
    assert latents.dtype == np.float32 and relative_error(latents, stored["latents"]) < 2e-5
    shorter = musicldm.encode_latents(cfg, waves[:1, :5761], params)  # 37 frames: silence fills the last row up
    assert shorter.shape == (1, 8, 10, 4)
    again = musicldm.encode_latents(cfg, [musicldm.resample(waves[0], 16000, 44100)], params, 44100)
    assert relative_error(again[:, :, 1:-1], latents[:1, :, 1:-1]) < 0.05


@pytest.mark.parametrize("size", [512, 1024, 2048])
def test_the_loss_sees_the_spectrogram_that_scipy_makes(size):
    x = np.random.default_rng(0).standard_normal((2, 4800)).astype(np.float32) * 0.1
    _, _, found = dsp.stft(x, window="hann", nperseg=size, noverlap=size - 160, boundary=None, padded=False)
    filters = musicldm.mel_filters(16000, size, 0, 8000, size // 16)
    expected = np.log(np.maximum(np.abs(found).transpose(0, 2, 1) * (size / 2) @ filters, 1e-5))
    made = losses.log_mel(Tensor(x), size, 160, size // 16, 16000).asnumpy().reshape(2, -1, size // 16)
    assert np.abs(made - expected[:, :made.shape[1]]).max() < 1e-4


def test_discriminators_and_their_losses():
    """HiFi-GAN's section 2.3 and equations 1, 2 and 4, by SciPy's correlation: waveform 0 is real, waveform 1 fake."""
    rng, x = np.random.default_rng(0), waveform(0.04, 16000)[:2 * 319].reshape(2, 319)
    flat = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in
            losses.discriminator_shapes((2, 4)).items()}
    found, features = losses.discriminators(Tensor(x), weights.nest({k: Tensor(p) for k, p in flat.items()}), (2, 4))

    period, scale = [(5, 3), (5, 3), (5, 1), (3, 1)], [(15, 1), (41, 4), (5, 1), (3, 1)]  # kernel, stride
    judges = [(f"period.{p}", period, x[:, :319 // p * p].reshape(2, -1, p)) for p in (2, 3, 5, 7, 11)]
    judges += [(f"scale.{i}", scale, x[:, :319 // k * k].reshape(2, -1, k).mean(2, keepdims=True))
               for i, k in enumerate((1, 2, 4))]
    seen, scores = [], []
    for judge, stack, y in judges:
        y = y[:, None]  # (N, C, H, W)
        for i, (kernel, stride) in enumerate(stack):
            weight, bias = (flat[f"{judge}.convs.{i}.{name}"] for name in ("weight", "bias"))
            y = np.pad(y, ((0, 0), (0, 0), (kernel // 2, kernel // 2), (0, 0)))
            y = np.stack([[dsp.correlate(image, filters, "valid")[0] + b for filters, b in zip(weight, bias)]
                          for image in y])[:, :, ::stride]
            if i < len(stack) - 1:
                y = np.where(y > 0, y, 0.1 * y)
                seen.append(y)
        scores.append(y)
    assert len(found) == len(scores) and len(features) == len(seen)
    for made, wanted in zip((*found, *features), scores + seen):
        assert relative_error(made.asnumpy().transpose(0, 3, 1, 2), wanted) < 1e-5
    for value, wanted in (
            (losses.discrimination(found), sum(((y[0] - 1) ** 2).mean() + (y[1] ** 2).mean() for y in scores)),
            (losses.adversarial([y[1:] for y in found]), sum(((y[1] - 1) ** 2).mean() for y in scores)),
            (losses.feature_matching([y[:1] for y in features], [y[1:] for y in features]),
             sum(np.abs(y[0] - y[1]).mean() for y in seen))):
        assert float(value) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("audio, rate, message", [
    ([np.zeros(10), np.zeros(11)], 16000, "several lengths"), (np.zeros(10, int), 16000, "floating-point"),
    (np.array([np.nan]), 16000, "NaN"), (np.zeros(10), 10, "sampling_rate"),
])
def test_what_cannot_be_encoded(audio, rate, message, params):
    with pytest.raises(InputError, match=message):
        musicldm.encode_latents(golden_config(), audio, params, rate)


# -------------------------------------------------------------------------------------------------------------- mixup

def test_tempos_of_one_group():
    tracks = [{"tempo": tempo, "downbeats": [0.0]} for tempo in (120, 121, 60, 240, 125, 90)]
    songs = [{**track, "audio": "one.wav"} for track in tracks[:2]] + [{**tracks[0], "audio": "two.wav"}]
    assert mixup.partners(songs) == [[2], [2], [0, 1]]
    assert mixup.partners([*tracks, {"tempo": 120}, {"tempo": None, "downbeats": [0.0]}]) == [
        [1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [], [], [], []]


def test_downbeats_coincide_and_nothing_else_is_heard():
    rng = np.random.default_rng(0)
    a, b = np.zeros(1000), np.zeros(900)
    a[[100, 350]], b[[40, 290]] = 1.0, 10.0
    mixed = mixup.mix(a, b, 100, 40, 0.25)
    assert len(mixed) == 860 and np.flatnonzero(mixed).tolist() == [0, 250]
    assert np.array_equal(mixed[[0, 250]], [0.25 + 7.5] * 2)
    x, y = rng.standard_normal((2, 20, 4, 8)).astype(np.float32)
    weight = np.float32(0.3)
    assert np.array_equal(mixup.mix(x, y, 5, 2, weight), weight * x[5:] + (1 - weight) * y[2:17])


def test_lambda_is_beta_and_downbeats_leave_enough():
    rng = np.random.default_rng(0)
    assert stats.kstest([mixup.draw_lambda(rng) for _ in range(2000)], stats.beta(5, 5).cdf).pvalue > 0.01
    drawn = {mixup.draw_downbeat([0.5, 2.5, 4.5, 6.5], 8.0, 3.0, rng) for _ in range(100)}
    assert drawn == {0.5, 2.5, 4.5} and mixup.draw_downbeat([6.0], 8.0, 3.0, rng) is None


# ---------------------------------------------------------------------------------------------------------- optimizer

@pytest.mark.parametrize("shared", [True, False])
def test_steps_are_those_of_adamw(shared, monkeypatch):
    """Against Loshchilov & Hutter's algorithm 2 in float64, with warm-up, halving, clipping and averaged weights."""
    rng = np.random.default_rng(0)
    flat = {name: np.float32(rng.standard_normal(shape)) for name, shape in (("a", (5, 3)), ("b", 15), ("c", ()))}
    network, x = train.make_network(flat), rng.standard_normal((5, 3)).astype(np.float32)
    first, second, scale = network.leaves
    if not shared:  # as elsewhere than on a CPU
        monkeypatch.setattr(musicldm.layers, "on_cpu", lambda: False)
        for leaf, array in zip(network.leaves, flat.values()):
            leaf.set_data(Tensor(array.copy()))
    settings = {"weight_decay": 0.1, "clip": 2.0, "warmup": 3, "halving": 2, "ema": 0.9}

    def loss(x):
        return (first * x).sum() ** 2 + (second * x.reshape(-1)).sum() ** 2 + scale * scale

    step = train.make_step(loss, network, settings, 1)
    w = np.concatenate([array.ravel() for array in flat.values()]).astype(np.float64)
    m, v, average, seen = np.zeros_like(w), np.zeros_like(w), w, x.ravel().astype(np.float64)
    for n in range(1, 7):
        g = 2 * np.concatenate([w[:15] @ seen * seen, w[15:30] @ seen * seen, w[30:]])
        norm = np.linalg.norm(g)
        g, rate, ema = g * min(1, 2 / norm), 0.01 * min(1, n / 3) / 2 ** ((n - 1) / 2), min(0.9, n / (9 + n))
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w - rate * (m / (1 - 0.9 ** n) / (np.sqrt(v / (1 - 0.99 ** n)) + 1e-8) + 0.1 * w)
        average = ema * average + (1 - ema) * w
        _, found = step(*train.schedule(settings, n - 1, 0.01), Tensor(x))
        assert float(found.asnumpy()) == pytest.approx(norm, rel=1e-5)
    for name, wanted in (("weights", w), ("average", average), ("first", m), ("second", v)):
        assert relative_error(train.vectors(network)[name], wanted) < 2e-6, name
    assert relative_error(np.concatenate([leaf.asnumpy().ravel() for leaf in network.leaves]), w) < 2e-6


# --------------------------------------------------------------------------------------------------------------- runs

CAPTIONS = ["fast drums", "slow piano", "a low tone", "a high tone", "bright synths", "dark bass", "soft bells",
            "noise"]
TINY = {"clap": {"batch": 8, "crop": 1.0, "learning_rate": 3e-3, "warmup": 10},
        "vae": {"batch": 4, "crop": 0.32, "learning_rate": 5e-3, "warmup": 10},
        "vocoder": {"batch": 4, "crop": 0.16, "learning_rate": 3e-3, "warmup": 10, "discriminator_channels": [2, 4],
                    "adversarial_from": 50, "mel_windows": [512, 1024]},
        "unet": {"batch": 8, "crop": 0.32, "segment": 1.28, "learning_rate": 5e-3, "warmup": 10, "ema": 0.9}}
STEPS = {"clap": 80, "vae": 90, "vocoder": 52, "unet": 60}


def overrides(stage, **more):
    return [f"{name}={value}" for name, value in {**TINY[stage], "report_steps": 100, **more}.items()]


def write_corpus(folder, n=8, rate=16000, seconds=1.28):
    """n clips of a beat and a tone, each its own, of tempo 94 or 188, with a downbeat every 0.32 s."""
    folder.mkdir()
    t, lines = np.arange(round(seconds * rate)) / rate, []
    for i in range(n):
        beat = np.exp(-40 * (t % (0.16 + 0.16 * (i % 2))))
        audio = 0.5 * beat * np.sin(2 * np.pi * 150 * (i + 1) * t)
        soundfile.write(folder / f"{i}.wav", audio, rate)
        lines.append({"audio": f"{i}.wav", "captions": [CAPTIONS[i], f"music {CAPTIONS[i]}"],
                      "tempo": 93.75 * (1 + i % 2), "downbeats": [0.0, 0.32, 0.64, 0.96]})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


ARCHITECTURE = """
text_encoder:
  projection_dim: 16
  text_config: {vocab_size: 280, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2}
  audio_config:
    {spec_size: 64, patch_embeds_hidden_size: 8, hidden_size: 16, depths: [1, 1], num_attention_heads: [2, 2]}
feature_extractor: {sampling_rate: 16000, hop_length: 640, nb_max_samples: 16000, frequency_max: 8000.0}
unet:
  in_channels: 4
  out_channels: 4
  block_out_channels: [16, 32]
  down_block_types: [DownBlock2D, CrossAttnDownBlock2D]
  up_block_types: [CrossAttnUpBlock2D, UpBlock2D]
  layers_per_block: 1
  norm_num_groups: 8
  projection_class_embeddings_input_dim: 16
vae: {latent_channels: 4, block_out_channels: [8, 16, 16], layers_per_block: 1, norm_num_groups: 8}
vocoder:
  upsample_initial_channel: 16
  upsample_rates: [10, 16]
  upsample_kernel_sizes: [20, 32]
  resblock_kernel_sizes: [3]
  resblock_dilation_sizes: [[1, 3]]
"""


def readme_commands(start, folder):
    """The arguments of the commands in training/README.md that begin with `start`, at work in a folder."""
    text = (pathlib.Path(train.__file__).with_name("README.md")).read_text(encoding="utf-8")
    return [[str(folder / part) if part.startswith("runs/") else part for part in shlex.split(line)[2:]]
            for line in text.splitlines() if line.startswith(f"python {start}")]


def run(command, env=ENVIRONMENT):
    """What a command printed that ends well."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:]
    return done.stdout


def stage_command(arguments, home):
    """A command of training/README.md, but tiny and short."""
    arguments = [str(home / "tiny.yaml") if part.endswith(".yaml") else part for part in arguments]
    sets = [part for text in overrides(arguments[0]) for part in ("--set", text)]
    return [sys.executable, train.__file__, *arguments, "--data", str(home / "corpus"), "--steps",
            str(STEPS[arguments[0]]), "--seed", "4", *sets]


def run_all_stages(home):
    """{stage: (folder, losses)} of training/README.md's commands."""
    write_corpus(home / "corpus")
    (home / "tiny.yaml").write_text(ARCHITECTURE)
    for arguments in readme_commands("training/train.py", home):
        run(stage_command(arguments, home))
    return {stage: (home / "runs" / stage, safetensors.numpy.load_file(
        home / "runs" / stage / "state.safetensors")["losses"]) for stage in STEPS}


with_runs = pytest.mark.beside([run_all_stages])


@pytest.fixture
def runs(beside):
    return beside(run_all_stages)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus")


@with_runs
@pytest.mark.parametrize("stage", ["clap", "vae", "vocoder", "unet"])
def test_every_stage_learns(stage, runs):
    history = runs[stage][1][:50 if stage == "vocoder" else None, 0]
    assert len(history) and np.mean(history[-10:]) < np.mean(history[:5]) / 2


@with_runs
def test_the_discriminators_learn_when_their_time_has_come(runs):
    _, history = runs["vocoder"]
    assert np.all(history[:50, 1] == 0) and np.all(history[50:, 1] > 0)


@with_runs
def test_what_was_trained_plays(runs, tmp_path):
    out, ((*arguments,),) = tmp_path / "a.wav", readme_commands("musicldm.py", runs["unet"][0].parents[1])
    assert musicldm.main([*arguments, "--seconds", "1.28", "--steps", "5", "--out", str(out), "--quiet"]) == 0
    audio, rate = soundfile.read(out)
    # louder than silence in 16 bits; how loud, after so few steps, a rounding decides
    assert (len(audio), rate) == (20480, 16000) and audio.std() > 10 * 2 ** -15


@with_runs
def test_stages_leave_the_others_as_they_were(runs):
    loaded = {stage: weights.load_params(musicldm.load_config(weights=str(folder / "checkpoint")))
              for stage, (folder, _) in runs.items()}
    for stage, before, model in (("vae", "clap", "vae"), ("vocoder", "vae", "vocoder"), ("unet", "vocoder", "unet")):
        for name in weights.MODELS:
            same = all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in zip(
                weights.flatten(loaded[stage][name]).values(), weights.flatten(loaded[before][name]).values()))
            assert same == (name != model)


@with_runs
def test_scaling_factor_makes_unit_latents(runs, corpus):
    cfg = musicldm.load_config(weights=str(runs["vae"][0] / "checkpoint"))
    audio = np.stack([soundfile.read(path)[0] for path in sorted(corpus.glob("*.wav"))])
    assert musicldm.encode_latents(cfg, audio, weights.load_params(cfg)).std() == pytest.approx(1, rel=0.1)


@with_runs
def test_conditions_and_mixes(runs, corpus):
    with np.load(runs["unet"][0] / "examples.npz") as file:
        ends, captions, vectors = file["ends"], file["caption_ends"], file["vectors"]
    counts, texts = np.diff(ends, prepend=0), np.diff(captions, prepend=0)
    assert (counts[:8] == 32).all() and (texts[:8] == 2).all() and (texts[8:] == 0).all()
    assert len(ends) == 16 and set(counts[8:]) <= {8, 16, 24, 32}  # cut at a downbeat: 0.32 s are 8 rows
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


# a process of its own, as a thread of the tests would come too late: steps are faster than a graph compiles
SIGNALLED = """
import subprocess, sys
process = subprocess.Popen(sys.argv[3:], stdout=subprocess.PIPE, text=True)
for line in process.stdout:
    if line.startswith(f"step {sys.argv[1]}/"):
        process.send_signal(int(sys.argv[2]))
        break
process.stdout.read()
sys.exit(process.wait() % 256)
"""


def stop_and_go_on(home):
    """The folder of the first stage's run once more, but stopped, gone on with, killed and gone on with."""
    arguments, *_ = readme_commands("training/train.py", home)
    command = stage_command(arguments, home) + ["--set", "save_minutes=0.0", "--set", "report_steps=1"]
    out = command.index("--out") + 1
    command[out] = broken = f"{command[out]}-stopped"

    def signalled(step, number):
        return subprocess.run([sys.executable, "-c", SIGNALLED, str(step), str(int(number)), *command],
                              env=ENVIRONMENT).returncode

    assert signalled(3, signal.SIGINT) == 130 and (pathlib.Path(broken) / "checkpoint" / "vae").is_dir()
    assert signalled(60, signal.SIGKILL) == 256 - signal.SIGKILL
    assert re.search("goes on from step (59|6.|7.)$", run(command), re.MULTILINE)
    return pathlib.Path(broken)


@pytest.mark.beside([run_all_stages, stop_and_go_on])
def test_a_run_is_its_seed_and_goes_on_after_ctrl_c_and_a_kill(runs, beside):
    (whole, _), broken = runs["clap"], beside(stop_and_go_on)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    assert "state.safetensors" in map(str, files) and len(files) > 10
    assert files == [path.relative_to(broken) for path in sorted(broken.rglob("*")) if path.is_file()]
    for path in files:
        assert (whole / path).read_bytes() == (broken / path).read_bytes(), path


def step_as_one_and_two(home):
    """The states after a step of one process and of two, in the stage whose loss is of the whole batch at once."""
    msrun, states = pathlib.Path(sys.executable).with_name("msrun"), []
    on_two = [str(msrun), "--worker_num", "2", "--local_worker_num", "2", "--join", "True", "--log_dir",
              str(home / "logs"), "--master_port", free_port()]
    for launch, folder in (([sys.executable], home / "as-one"), (on_two, home / "as-two")):
        run([*launch, train.__file__, "clap", "--data", str(home / "corpus"), "--weights",
             str(home / "runs" / "unet" / "checkpoint"), "--out", str(folder), "--steps", "1",
             *(part for text in overrides("clap") for part in ("--set", text))], env={  # msrun starts the PATH's python
                 **ENVIRONMENT, "PATH": f"{msrun.parent}{os.pathsep}{ENVIRONMENT['PATH']}"})
        states.append(safetensors.numpy.load_file(folder / "state.safetensors"))
    return states


@pytest.mark.beside([run_all_stages, step_as_one_and_two])
def test_two_processes_take_the_step_of_one(beside):
    one, two = beside(step_as_one_and_two)
    for name in one:
        error = np.abs(one[name] - two[name])
        if name.endswith(("weights", "average")):  # AdamW's first step is the gradient's sign: not where it is rounding
            gradient = np.abs(one[f"{name.split('.')[0]}.first"])
            error = error[gradient >= 1e-3 * gradient.max()]
        assert error.max() <= 1e-5 * np.abs(one[name]).max(), name


# ---------------------------------------------------------------------------------------------------------- bad input

def line_of(**change):
    record = {"audio": "0.wav", "captions": ["a"], "tempo": 120, "downbeats": [0.0, 0.5], **change}
    return json.dumps({name: value for name, value in record.items() if value != "left out"})


@pytest.mark.parametrize("line, message", [
    ("{", "line 2: not JSON"), ("[]", "line 2: valid is an object"), (line_of(audio="left out"), "key audio"),
    (line_of(audio="none.wav"), "cannot read none.wav: there is no"), (line_of(caption=["a"]), "mean .captions."),
    (line_of(audio="text.wav"), "cannot read text.wav"),
    (line_of(audio="nan.wav"), "nan.wav holds NaN or Inf"), (line_of(audio="empty.wav"), "empty.wav is empty"),
    (line_of(audio="silent.wav"), "silent.wav is silent"),
    (line_of(captions="a"), "captions is 'a'"), (line_of(captions=[1]), r"captions is \[1\]"),
    (line_of(captions=[" "]), "captions is"), (line_of(tempo="fast"), "tempo is 'fast'"),
    (line_of(tempo=0), "tempo is 0"),
    (line_of(tempo=1000), "valid: 20 to 400"), (line_of(downbeats=[-1.0]), "downbeats must rise"),
    (line_of(downbeats=[0.5, 0.2]), "downbeats must rise"), (line_of(downbeats=[99.0]), "1.28 s"),
    (line_of(downbeats=["0"]), "downbeats is"), (line_of(audio="samples.raw"), "cannot read samples.raw"),
])
def test_a_manifest_is_refused_by_its_line(line, message, corpus, tmp_path, capsys):
    folder = shutil.copytree(corpus, tmp_path / "bad")
    soundfile.write(folder / "empty.wav", np.zeros(0), 16000)
    soundfile.write(folder / "silent.wav", np.zeros(1600), 16000)
    soundfile.write(folder / "nan.wav", np.array([0.5, np.nan, 0.1] * 99), 16000, "FLOAT")
    (folder / "text.wav").write_text("not audio")
    (folder / "samples.raw").write_bytes(bytes(400))
    (folder / "manifest.jsonl").write_text(f"{line_of()}\n{line}\n")
    assert train.main(["vae", "--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error)
    assert not (tmp_path / "run").exists()


def test_ten_bad_lines_are_told_at_once(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "bad")
    (folder / "manifest.jsonl").write_text("{\n" * 12)
    with pytest.raises(InputError, match=r"line 1: .*line 10: .*; and 2 more$") as caught:
        data.read_manifest(folder)
    assert "line 11" not in str(caught.value)


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "cannot read nowhere/manifest.jsonl"), (["--set", "batch=0"], "batch is 0"),
    (["--set", "bach=1"], "did you mean 'batch'"), (["--set", "crop=long"], "crop is 'long'"),
    (["--steps", "0"], "--steps 0"), (["--seed", "-1"], "--seed -1"), (["--weights", "nowhere"], "no folder 'nowhere'"),
    (["--out", "{corpus}"], "holds no run"), (["--out", "{corpus}/0.wav/run"], "cannot be made"),
    (["--out", "{corpus}/0.wav"], "cannot be made"),
    (["--set", "batch"], "key=value"),
    (["--set", "batch=4096", "--set", "crop=600"], "GB of memory"),
])
def test_mistakes_are_one_line(arguments, message, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [text.format(corpus=corpus) for text in arguments]
    assert train.main(["vae", "--data", str(corpus), "--out", "run", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "run" / "state.safetensors").exists()


@pytest.mark.parametrize("stage, arguments, message", [
    ("unet", [], "--weights is random; valid for unet: a checkpoint of what it learns from, CLAP and the VAE"),
    ("vocoder", [], "--weights is random; valid for vocoder"), ("clap", [], "two tracks have captions"),
    ("unet", ["--set", "crop=2.0"], "crop is 2; valid: up to 1.28"),
    ("unet", ["--set", "segment=0.64"], "crop is 5.12; valid: up to 0.64"),
    ("vocoder", ["--set", "crop=0.12"], "crop is 0.12; valid: from 0.128, twice the longest of mel_windows"),
    ("vocoder", ["--set", "mel_windows=[1000]"], "mel_windows is [1000]; valid: of 256, 512"),
])
def test_what_a_stage_could_not_learn_from_is_refused_first(stage, arguments, message, corpus, tmp_path, capsys):
    tracks = [json.loads(line) for line in (corpus / "manifest.jsonl").read_text().splitlines()]
    (corpus / "manifest.jsonl").write_text("\n".join(json.dumps({**track, "captions": []}) for track in tracks))
    arguments += ["--weights", str(GOLDEN / "checkpoint")] if arguments else []
    assert train.main([stage, "--data", str(corpus), "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "run").exists()


def test_of_several_processes_one_makes_the_examples(tmp_path):
    made = {"latents": [np.ones((2, 3)), np.zeros((1, 3))], "vectors": np.eye(2), "empty": np.ones(2),
            "captions": [np.ones((1, 2)), np.zeros((0, 2))]}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(train.kept_examples, tmp_path / "examples.npz", None, 1)
        train.kept_examples(tmp_path / "examples.npz", lambda: made)
        read = waiting.result(timeout=10)
    assert read.keys() == made.keys() and [*map(len, read["captions"])] == [1, 0]
    assert all(np.array_equal(a, b) for a, b in zip(read["latents"], made["latents"], strict=True))


@with_runs
def test_another_run_is_not_gone_on_with(runs, corpus):
    folder = runs["vae"][0]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    start = str(runs["clap"][0] / "checkpoint")
    for change, message in (
            (dict(seed=5), "its seed is 4"), (dict(overrides=overrides("vae", batch=2)), "its settings"),
            (dict(weights=str(GOLDEN / "checkpoint")), "its weights"), (dict(stage="unet"), "its stage")):
        arguments = dict(stage="vae", data_folder=corpus, out=folder, weights=start,
                         config=folder.parents[1] / "tiny.yaml",
                         overrides=overrides("vae"), steps=1, seed=4)
        with pytest.raises(InputError, match=message):
            train.train(**{**arguments, **change})
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@with_runs
def test_a_loss_that_is_not_finite_keeps_the_last_state(runs, corpus, tmp_path, monkeypatch):
    out = shutil.copytree(runs["clap"][0], tmp_path / "run")
    before, inputs = (out / "state.safetensors").read_bytes(), train.clap_inputs
    monkeypatch.setattr(train, "clap_inputs", lambda *given: inputs(*given) * np.float32(np.nan))
    with pytest.raises(InputError, match="the loss of text_encoder is .* norm nan at step 81; .*: lower learning_rate"):
        train.train("clap", corpus, out, "random", runs["clap"][0].parents[1] / "tiny.yaml", overrides("clap"),
                    STEPS["clap"] + 3, 4, say=lambda text: None)
    assert (out / "state.safetensors").read_bytes() == before


def test_weights_of_the_noise_are_those_of_the_formulas():
    cfg, timesteps = golden_config(), np.array([0, 10, 300, 999])
    alphas = musicldm.alphas_cumprod(cfg["schedule"])[timesteps].astype(np.float64)
    snr = alphas / (1 - alphas)
    assert np.array_equal(train.loss_weights(cfg, timesteps, 0, 0), np.ones(4))
    assert np.allclose(train.loss_weights(cfg, timesteps, 5, 0) * snr, np.minimum(snr, 5), rtol=1e-4)
    # v = alpha ** 0.5 * noise - (1 - alpha) ** 0.5 * signal: an error of the noise makes one 1 / alpha ** 0.5 as large
    assert np.allclose(train.loss_weights(cfg, timesteps, 0, 1), 1 / alphas, rtol=1e-4)


def test_velocities_weigh_and_say_what_noise_does(params, tmp_path):
    cfg, rng = golden_config(), np.random.default_rng(0)
    made = {"latents": [rng.standard_normal((16, 16, 8), np.float32) for _ in range(8)],
            "vectors": rng.standard_normal((8, 16), np.float32), "captions": [np.zeros((0, 16), np.float32)] * 8,
            "empty": np.zeros(16, np.float32)}
    train.kept_examples(tmp_path / "examples.npz", lambda: made)
    settings = train.stage_settings("unet", ["batch=8", "crop=0.64"])
    (x, noise, *_, weights), (same, velocity, *_, lighter) = (train.unet_stage(
        {**cfg, "schedule": {**cfg["schedule"], "prediction_type": kind}}, params, settings, [], 0, 1, 0, tmp_path
    ).batch(3) for kind in ("epsilon", "v_prediction"))
    alpha = (lighter / weights)[:, None, None, None]  # the error of the noise is alpha ** 0.5 that of the velocity
    assert np.array_equal(x, same)
    assert np.allclose(musicldm.noise_of_velocity(velocity, x, alpha), noise, rtol=0, atol=1e-5)
    timesteps = [np.abs(musicldm.alphas_cumprod(cfg["schedule"]) - a).argmin() for a in alpha.ravel()]
    assert sorted(np.array(timesteps) * 8 // 1000) == list(range(8))
