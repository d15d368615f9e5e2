#!/usr/bin/env python3
"""Print a table in Markdown and JSON: time, GFLOP/s and memory of every stage, alone or next to diffusers'.

    python tests/benchmark.py [--weights DIR|random] [--stages unet,vae] [--rounds 3] [--seconds 10.24] [--steps 20]
    python tests/benchmark.py --weights DIR --against PYTHON

One clip with guidance. PYTHON has torch 2.13.0, diffusers 0.33.1 and transformers 4.57.1. Each implementation and dtype
has a process that loads its models once; they compute in turn, never two at a time, on all cores. Only ratios from one
run count, as other work moves the times. Everything at full size takes tens of minutes: --stages picks some of
prompt, unet, vae, vocoder, generate (with its four parts), compile, memory, shell (the command line), operators (of a
UNet step) and train (a step of each stage of training/train.py, as its config.yaml has them: forward, backward and
AdamW; the vocoder without discriminators). Linux only.
"""
import argparse
import contextlib
import csv
import functools
import gc
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROMPT = "melodic techno with a fast beat and synths"
PARTS = ("prompt", "unet", "vae", "vocoder")  # of generate, which runs the unet once a step
TRAINING = ("train clap", "train vae", "train vocoder", "train unet")
STAGES = (*PARTS, "generate", "compile", "memory", "shell", "operators", "train")
OURS, OURS_BF16, PEER, PEER_BF16 = [f"{name} {dtype}" for name in ("musicldm", "diffusers")
                                    for dtype in ("float32", "bfloat16")]
SQUARE = 4096  # rows and columns of the matrices that tell the machine's own rate


# -------------------------------------------------------------------------------------------------------------- FLOPs

def doublings(name, last):
    """Between the coarsest of `last` + 1 levels and the output of a layer, in the UNet or the VAE's decoder."""
    block = re.search(r"(down|up)_blocks\.(\d+)", name)
    if block is None:
        return 0 if re.match(r"mid_block|decoder\.mid_block|decoder\.conv_in|post_quant_conv", name) else last
    level = int(block[2]) if block[1] == "up" else last - int(block[2])
    return level + ("upsamplers" in name) - ("downsamplers" in name)


def flops(cfg, seconds, tokens):
    """{part: FLOPs}, two a multiply-add, of the convolutions, linear layers and attention for one clip with guidance.

    tokens: the padded length of each text that is encoded
    """
    import musicldm
    import weights
    (_, h, w), shapes, vocoder = musicldm.clip_size(cfg, seconds)[1], weights.param_shapes(cfg), cfg["vocoder"]
    last = {model: len(cfg[model]["block_out_channels"]) - 1 for model in ("unet", "vae")}
    lengths = [h * 2 ** last["vae"]]
    for kernel, stride in zip(vocoder["upsample_kernel_sizes"], vocoder["upsample_rates"]):
        lengths.append((lengths[-1] - 1) * stride - 2 * ((kernel - stride) // 2) + kernel)

    def total(model, positions):
        """`positions` of a layer's name: how often its weight is used."""
        count = 0
        for name, shape in shapes[model].items():
            if name.endswith(".weight") and len(shape) > 1:
                count += positions(name) * math.prod(shape)
            if name.endswith(("to_q.weight", "query.weight")):  # attention's q k^T, and its product with v
                count += 2 * positions(name) ** 2 * shape[0]
        return 2 * count

    def in_text(name, length):
        return length if "model.encoder" in name else name.startswith(("text_model.pooler", "text_projection"))

    def in_unet(name):
        scale = 2 ** (last["unet"] - doublings(name, last["unet"]))
        return 1 if re.search("time_emb|class_emb", name) else math.ceil(h / scale) * math.ceil(w / scale)

    def in_vae(name):
        return h * w * 4 ** doublings(name, last["vae"]) if name.startswith(("post_quant_conv", "decoder")) else 0

    def in_vocoder(name):
        layer, number = re.match(r"([a-z_]+)\.?(\d*)", name).groups()
        if layer == "resblocks":
            return lengths[1 + int(number) // len(vocoder["resblock_kernel_sizes"])]
        # a transposed convolution uses its weight at each position of its input
        return lengths[int(number) if layer == "upsampler" else 0 if layer == "conv_pre" else -1]

    return {"prompt": sum(total("text_encoder", lambda name: in_text(name, length)) for length in tokens),
            "unet": 2 * total("unet", in_unet), "vae": total("vae", in_vae), "vocoder": total("vocoder", in_vocoder)}


# ------------------------------------------------------------------------------------------------------------ workers
# Each loads its models and returns what there is to tell, and {stage: function of no arguments}; neither's Python has
# what the other imports.

def timed(function):
    def run():
        start = time.perf_counter()
        function()
        return {"seconds": time.perf_counter() - start}
    return run


def timed_again(function):
    """The same of a second call right after a first: a run's steps follow one another."""
    def run():
        function()
        return timed(function)()
    return run


def timed_steps(function, steps):
    """The same of a function that takes a callback, with the mean time of the steps after the first, and the rest."""
    def run():
        start, ends = time.perf_counter(), []
        function(lambda *_: ends.append(time.perf_counter()))
        seconds, step = time.perf_counter() - start, (ends[-1] - ends[0]) / (steps - 1)
        return {"seconds": seconds, "step": step, "rest": seconds - steps * step}
    return run


def musicldm_stages(args, dtype):
    sys.path.insert(0, str(ROOT))
    import mindspore
    from mindspore.common import api

    import musicldm
    import weights
    gc.freeze()  # as the command line does
    compiling, compile_graph = [], api._JitExecutor.compile  # there is no public way to time it

    def timed_compile(*given, **named):
        start = time.perf_counter()
        phase = compile_graph(*given, **named)
        compiling.append(time.perf_counter() - start)
        return phase

    api._JitExecutor.compile = timed_compile
    start = time.perf_counter()
    cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, args.weights,
                               [f"dtype={dtype}", f"sampling.audio_length_in_s={args.seconds}"])
    params = weights.load_params(cfg)
    load = time.perf_counter() - start
    rng, (_, (c, h, w)) = np.random.default_rng(0), musicldm.clip_size(cfg, args.seconds)
    factor = 2 ** (len(cfg["vae"]["block_out_channels"]) - 1)
    latents = rng.standard_normal((1, c, h, w), np.float32)
    mel = rng.standard_normal((1, h * factor, w * factor), np.float32)
    embeds = rng.standard_normal((2, cfg["text_encoder"]["projection_dim"]), np.float32)
    few_steps = {**cfg["sampling"], "strength": 1.0, "num_inference_steps": 4}

    def matmul():
        product, square = mindspore.jit(mindspore.ops.matmul), mindspore.ops.ones((SQUARE, SQUARE))
        run = timed(lambda: product(square, square).asnumpy())
        return {"seconds": min(run()["seconds"] for _ in range(4))}

    def operators():
        """{operator: [calls, ms] of a UNet step}, by MindSpore's profiler, from 10 steps after the first ones."""
        with tempfile.TemporaryDirectory() as folder:
            profiler = mindspore.Profiler(start_profile=False, output_path=folder,
                                          activities=[mindspore.profiler.ProfilerActivity.CPU])
            at = {3: profiler.start, 13: profiler.stop}
            musicldm.denoise(cfg, latents, iter(()), embeds, params, {**few_steps, "num_inference_steps": 15},
                             lambda step, *_: at[step]() if step in at else None)
            (path,) = pathlib.Path(folder).rglob("cpu_op_type_info_*.csv")
            with path.open() as file:
                return {row["op_type"]: [int(row["type_occurrences"]) / 10, float(row["total_compute_time"]) / 10]
                        for row in csv.DictReader(file)}

    tokens = [math.ceil(musicldm.tokenize(cfg, text)[1].sum() / 16) * 16 for text in (PROMPT, "")]
    count = {**flops(cfg, args.seconds, tokens), "matmul": 2 * SQUARE ** 3}
    count["generate"] = args.steps * count["unet"] + sum(count[part] for part in PARTS if part != "unet")
    return {"load": load, "gflop": {stage: n / 1e9 for stage, n in count.items()},
            "versions": {"mindspore": mindspore.__version__, "numpy": np.__version__}}, {
        "matmul": matmul,
        "operators": operators,
        "compiler": lambda: {"seconds": sum(compiling)},
        "prompt": timed(lambda: musicldm.encode_prompt(cfg, [PROMPT, ""], params)),
        "unet": timed_steps(lambda callback: musicldm.denoise(
            cfg, latents, iter(()), embeds, params, few_steps, callback), few_steps["num_inference_steps"]),
        "vae": timed(lambda: musicldm.decode_latents(cfg, latents, params)),
        "vocoder": timed(lambda: musicldm.vocode(cfg, mel, params)),
        "generate": timed_steps(lambda callback: musicldm.generate(
            cfg, PROMPT, params, num_inference_steps=args.steps, callback=callback), args.steps),
        **training_steps(cfg, params)}


def training_steps(cfg, params):
    """{"train clap": function of no arguments, ...}: a step of training/train.py on noise; the first call compiles."""
    sys.path.insert(0, str(ROOT / "training"))
    import soundfile
    import train
    from mindspore import Tensor

    @functools.cache
    def step(stage):
        settings, noise = train.stage_settings(stage), np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            soundfile.write(folder / "noise.wav", noise.uniform(-0.5, 0.5, 163840), 16000)
            track = {"audio": "noise.wav", "path": folder / "noise.wav", "rate": 16000, "samples": 163840,
                     "captions": [PROMPT], "downbeats": []}
            more = {"folder": folder, "say": lambda text: None} if stage == "unet" else {}
            task = train.STAGES[stage](cfg, params, settings, [track, track], 0, 1, 0, **more)
            ((name, loss),) = task.losses(0).items()
            given = train.schedule(settings, 0, task.rates[name]) + [Tensor(x) for x in task.batch(0)]
        compiled = train.make_step(loss, task.networks[name], settings, 1)
        return lambda: compiled(*given)[0].asnumpy()

    return {name: timed_again(lambda name=name: step(name.split()[1])()) for name in TRAINING}


def torch_training_steps(pipe):
    """The same with torch's autograd and AdamW, on the same shapes."""
    import torch
    import yaml
    from transformers.audio_utils import mel_filter_bank
    vocoder, clap, tokens = pipe.vocoder.config, pipe.text_encoder, pipe.tokenizer
    every = yaml.safe_load((ROOT / "training" / "config.yaml").read_text())
    factor, bands = pipe.vae_scale_factor, vocoder.model_in_dim
    hop = math.prod(vocoder.upsample_rates)
    filters = torch.tensor(mel_filter_bank(513, bands, 0, vocoder.sampling_rate / 2, vocoder.sampling_rate, "slaney",
                                           "slaney"), dtype=torch.float32)

    def frames(stage, multiple=factor):
        return round(every[stage]["crop"] * vocoder.sampling_rate / hop / multiple) * multiple

    def log_mel(x):
        spectrum = torch.stft(x, 1024, hop, window=torch.hann_window(1024), center=False, return_complex=True)
        return torch.log(torch.clamp(torch.sqrt(torch.view_as_real(spectrum).pow(2).sum(-1) + 1e-9).transpose(1, 2)
                                     @ filters, min=1e-5))

    def loss_and_model(stage):
        n = every[stage]["batch"]
        if stage == "unet":
            config, rows = pipe.unet.config, frames("unet") // factor
            x, noise = torch.randn(2, n, config.in_channels, rows, bands // factor)
            t, labels = torch.randint(1000, (n,)), torch.randn(n, config.projection_class_embeddings_input_dim)
            return lambda: (pipe.unet(x, t, None, class_labels=labels).sample - noise).pow(2).mean(), pipe.unet
        if stage == "vae":
            mel = torch.randn(n, 1, frames("vae"), bands)

            def loss():
                posterior = pipe.vae.encode(mel).latent_dist
                return (pipe.vae.decode(posterior.sample()).sample - mel).abs().mean() + 1e-4 * posterior.kl().mean()
            return loss, pipe.vae
        if stage == "vocoder":
            mel, real = torch.randn(n, frames("vocoder"), bands), torch.randn(n, frames("vocoder") * hop)
            return lambda: (log_mel(pipe.vocoder(mel)[:, :real.shape[1]]) - log_mel(real)).abs().mean(), pipe.vocoder
        given = tokens([PROMPT] * n, return_tensors="pt")
        extractor = pipe.feature_extractor
        frames_heard = extractor.nb_max_samples // extractor.hop_length + 1
        features = torch.randn(n, 1, frames_heard, extractor.feature_size)

        def loss():
            text = torch.nn.functional.normalize(clap.get_text_features(**given), dim=-1)
            audio = torch.nn.functional.normalize(clap.get_audio_features(input_features=features), dim=-1)
            logits, labels = text @ audio.T, torch.arange(n)
            return (torch.nn.functional.cross_entropy(logits * clap.logit_scale_t.exp(), labels)
                    + torch.nn.functional.cross_entropy(logits.T * clap.logit_scale_a.exp(), labels)) / 2
        return loss, clap

    @functools.cache
    def step(stage):
        loss, model = loss_and_model(stage)
        optimizer = torch.optim.AdamW(model.requires_grad_(True).parameters(), 1e-4)

        def run():
            with torch.enable_grad():
                optimizer.zero_grad()
                loss().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        return run

    return {name: timed_again(lambda name=name: step(name.split()[1])()) for name in TRAINING}


def diffusers_stages(args, dtype):
    import diffusers
    import torch
    import transformers
    torch.set_num_threads(os.cpu_count())
    torch.set_grad_enabled(False)
    start, kind = time.perf_counter(), {"dtype": getattr(torch, dtype)}
    pipe = diffusers.MusicLDMPipeline.from_pretrained(args.weights, torch_dtype=kind["dtype"])
    load = time.perf_counter() - start
    pipe.set_progress_bar_config(disable=True)
    vocoder, factor = pipe.vocoder.config, pipe.vae_scale_factor
    h = math.ceil(round(args.seconds * vocoder.sampling_rate) / (math.prod(vocoder.upsample_rates) * factor))
    latents = torch.randn(1, pipe.unet.config.in_channels, h, vocoder.model_in_dim // factor, **kind)
    mel = torch.randn(1, 1, h * factor, vocoder.model_in_dim, **kind)
    embeds = torch.randn(2, pipe.text_encoder.config.projection_dim, **kind)
    return {"load": load, "versions": {module.__name__: module.__version__
                                       for module in (torch, diffusers, transformers)}}, {
        "prompt": timed(lambda: pipe._encode_prompt(PROMPT, "cpu", 1, True)),
        "unet": timed(lambda: pipe.unet(torch.cat([latents, latents]), 1, None, class_labels=embeds)),
        "probe": timed(lambda: pipe.unet(latents[:, :, :16], 1, None, class_labels=embeds[:1])),
        "vae": timed(lambda: pipe.vae.decode(latents / pipe.vae.config.scaling_factor)),
        "vocoder": timed(lambda: pipe.mel_spectrogram_to_waveform(mel)),
        "generate": timed_steps(lambda callback: pipe(
            PROMPT, audio_length_in_s=args.seconds, num_inference_steps=args.steps, callback=callback), args.steps),
        **torch_training_steps(pipe)}


def peak_memory():
    status = pathlib.Path("/proc/self/status").read_text()
    return {"GB": int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9}


def work(args):
    """A line of JSON on standard output about itself, then one for each line of standard input, a stage's name."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that what libraries print does not come between
    name, dtype = args.worker.split()
    about, stages = (musicldm_stages if name == "musicldm" else diffusers_stages)(args, dtype)
    print(json.dumps(about), file=replies)
    for line in sys.stdin:
        print(json.dumps({**stages, "memory": peak_memory}[line.strip()]()), file=replies)


# ---------------------------------------------------------------------------------------------------------- measuring

def with_cache(folder):
    """The environment for MindSpore's compile cache in a folder, for processes that compile the same in one order.

    The cache numbers graphs as they come: another order would give a process the wrong ones.
    """
    return {**os.environ, "MS_COMPILER_CACHE_ENABLE": "1", "MS_COMPILER_CACHE_PATH": str(folder)}


@contextlib.contextmanager
def worker(kind, args, cache):
    """(what it tells about itself, a function of a stage's name that waits for what it measured)."""
    command = [args.against if kind.startswith("diffusers") else sys.executable, __file__, "--worker", kind,
               "--weights", args.weights, "--seconds", str(args.seconds), "--steps", str(args.steps)]
    with subprocess.Popen(command, env=with_cache(cache), text=True, bufsize=1, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # leaving closes its input, which ends it
        def reply(to):
            line = process.stdout.readline()
            print(f"{kind}, {to}: {line.strip()}", file=sys.stderr)
            return json.loads(line) if line else sys.exit(f"benchmark: {kind} ended at: {to}")

        def ask(stage):
            print(stage, file=process.stdin)
            return reply(stage)

        yield reply("loading"), ask


def compilation(args, folder):
    """{"first run", "kept graphs": {what: [seconds, one a round]}} for two processes with one compile cache.

    "compiler" is the time in MindSpore's compiler; "first calls" is what the first call of each part takes more than
    the second, which counts memory that is new to the process too. Without the UNet's later steps: they compile
    nothing, and are slower in a process's first call.
    """
    result = {name: {"compiler": [], "first calls": []} for name in ("first run", "kept graphs")}
    for i in range(args.rounds):
        for name in result:
            with worker(OURS, args, folder / f"compile {i}") as (_, ask):
                calls = [(ask(part), ask(part)) for part in PARTS]
                result[name]["compiler"].append(ask("compiler")["seconds"])
                result[name]["first calls"].append(sum(
                    first.get("rest", first["seconds"]) - second.get("rest", second["seconds"])
                    for first, second in calls))
    return result


def memory(args, kinds, folder):
    """{kind: peak GB of a process that runs the whole pipeline once}, compiling included."""
    peaks = {}
    for kind in kinds:
        with worker(kind, args, folder / f"memory {kind}") as (_, ask):
            ask("generate")
            peaks[kind] = ask("memory")["GB"]
    return peaks


def shell(args, folder):
    """Seconds of the command line in bfloat16, from its start to its end, twice with one cache folder."""
    command = [sys.executable, str(ROOT / "musicldm.py"), "--weights", args.weights, "--prompt", PROMPT, "--quiet",
               "--steps", str(args.steps), "--seconds", str(args.seconds), "--dtype", "bfloat16",
               "--out", str(folder / "out.wav")]
    run = timed(lambda: subprocess.run(command, env={**os.environ, "XDG_CACHE_HOME": str(folder)}, check=True))
    return {name: run()["seconds"] for name in ("first run", "second run")}


def too_slow(asks):
    """Whether diffusers in bfloat16 is not worth waiting for: minutes a UNet pair where a processor has no AVX-512."""
    plain, half = (min(asks[kind]("probe")["seconds"] for _ in range(2)) for kind in (PEER, PEER_BF16))
    if half > 5 * plain:
        print(f"{PEER_BF16} is left out: {half / plain:.0f} times slower than float32 here\n")
    return half > 5 * plain


def rounds(args, kinds, folder):
    """{kind: what it tells}, {kind: {stage: [reply, one a round]}}: the stages by turns in all kinds."""
    asked = [stage for stage in (*PARTS, "generate") if stage in args.stages or "generate" in args.stages]
    asked += TRAINING if "train" in args.stages else ()
    about, asks, replies = {}, {}, {}
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            about[kind], asks[kind] = stack.enter_context(worker(kind, args, folder / kind))
            if kind == PEER_BF16 and too_slow(asks):
                continue
            own = ["unet"] if kind == PEER_BF16 else asked + ["matmul"] if kind.startswith("musicldm") else asked
            replies[kind] = {stage: [] for stage in own if kind.endswith("float32") or stage not in TRAINING}
            for stage in replies[kind]:  # the first call compiles, and does not count; generate then finds all compiled
                if stage != "generate":
                    asks[kind](stage)
        for i in range(args.rounds):
            for stage in [*asked, "matmul"]:
                for kind in [*replies][::(-1) ** i]:
                    if stage in replies[kind]:
                        replies[kind][stage].append(asks[kind](stage))
    return about, replies


def derived(args, replies):
    """{stage: [seconds]}, of the stages and of what follows from them."""
    seconds = {stage: [reply["step" if stage == "unet" and "step" in reply else "seconds"] for reply in replies[stage]]
               for stage in replies}
    if {"vae", "vocoder"} <= seconds.keys():
        seconds["vae + vocoder"] = [sum(pair) for pair in zip(seconds["vae"], seconds["vocoder"])]
    if "generate" in seconds:
        seconds["generate 200"] = [reply["seconds"] + (200 - args.steps) * reply["step"]
                                   for reply in replies["generate"]]
    return seconds


# ---------------------------------------------------------------------------------------------------------- reporting

def table(*rows):
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""])


def report(args, result):
    samples, median = result["samples"], statistics.median
    names = {"prompt": "prompt encoding", "unet": "UNet pair", "vae": "VAE decode", "load": "loading",
             "matmul": f"matmul of {SQUARE} x {SQUARE}", "generate": f"generate, {args.steps} steps",
             "generate 200": f"generate, 200 steps, extrapolated from {args.steps}", "memory": "peak memory, GB"}
    rows = [("", "dtype", "best, s", "median, s", "GFLOP", "GFLOP/s", "share of the matmul's")]
    for kind in (OURS, OURS_BF16):
        gflop = result["about"].get(kind, {}).get("gflop", {})
        for what, values in samples[kind].items():
            best, rate = min(values), ("", "", "")
            if what in gflop:
                share = gflop[what] / best / (gflop["matmul"] / min(samples[kind]["matmul"]))
                rate = f"{gflop[what]:.1f}", f"{gflop[what] / best:.0f}", f"{share:.0%}"
            rows.append((names.get(what, what), kind.split()[1], f"{best:.3f}", f"{median(values):.3f}", *rate))
    print(table(*rows))
    rows = [("", "ours", "diffusers", "ours, best", "diffusers, best", "ratio of minima", "ratio of medians")]
    for kind, peer in ((OURS, PEER), (OURS_BF16, PEER), (OURS_BF16, PEER_BF16)):
        for what in [what for what in samples[kind] if what in samples.get(peer, {})]:
            a, b = samples[kind][what], samples[peer][what]
            rows.append((names.get(what, what), kind.split()[1], peer.split()[1], f"{min(a):.3f}", f"{min(b):.3f}",
                         f"{min(a) / min(b):.2f}", f"{median(a) / median(b):.2f}"))
    if args.against:
        print(table(*rows))
    operators = sorted(result.get("operators", {}).items(), key=lambda item: -item[1][1])
    if operators:
        total = sum(ms for _, (_, ms) in operators)
        print(table(("operator", "calls a step", "ms a step", "share"),
                    *((name, f"{calls:.0f}", f"{ms:.1f}", f"{ms / total:.1%}") for name, (calls, ms) in operators)))
    for run, times in result.get("compile", {}).items():
        for what, seconds in times.items():
            print(f"compile, {run}, {what}: best {min(seconds):.1f} s, median {median(seconds):.1f} s")
    for name, seconds in result.get("shell", {}).items():
        print(f"shell, {name}: {seconds:.1f} s")
    print(json.dumps(result))


def machine():
    cpu = pathlib.Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpu)
    return {"processor": model[1] if model else platform.machine(), "cores": os.cpu_count(),
            "amx_bf16": "amx_bf16" in cpu, "python": platform.python_version()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="random", metavar="DIR|random")
    parser.add_argument("--against", metavar="PYTHON", help="compare with diffusers, which this Python has")
    parser.add_argument("--stages", default=",".join(STAGES), metavar="A,B", help="some of %(default)s")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=float, default=10.24, metavar="S", help="length of the clip")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of generate, 2 or more")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    args.stages = args.stages.split(",")
    if not {*args.stages} <= {*STAGES} or args.rounds < 1 or args.steps < 2:
        parser.error(f"valid: --stages {','.join(STAGES)}, --rounds 1 or more, --steps 2 or more")
    if args.against and args.weights == "random":
        parser.error("--against needs the folder of a checkpoint in --weights: diffusers has no random ones")
    kinds = [OURS, OURS_BF16] + ([PEER] + [PEER_BF16] * ("unet" in args.stages) if args.against else [])
    result = {"machine": machine(), "options": vars(args), "about": {}, "samples": {kind: {} for kind in kinds}}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if "compile" in args.stages:
            result["compile"] = compilation(args, folder)
        if "operators" in args.stages:
            with worker(OURS, args, folder / "operators") as (_, ask):
                result["operators"] = ask("operators")
        if "shell" in args.stages:
            result["shell"] = shell(args, folder)
        if "memory" in args.stages:
            for kind, peak in memory(args, [kind for kind in kinds if kind != PEER_BF16], folder).items():
                result["samples"][kind]["memory"] = [peak]
        if {*PARTS, "generate", "train"} & {*args.stages}:
            result["about"], replies = rounds(args, kinds, folder)
            for kind in replies:
                result["samples"][kind] |= {"load": [result["about"][kind]["load"]], **derived(args, replies[kind])}
    report(args, result)


if __name__ == "__main__":
    main()
