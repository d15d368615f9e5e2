"""Checkpoints and configuration: a folder in diffusers' layout becomes a plain dict and a tree of tensors, and back.

Everything odd about a checkpoint ends here: dtypes, shards, weight norm and buffers. The models in musicldm.py see
only nested dicts under the checkpoint's own names, and tensors in its shapes: the path to one, joined by dots, is its
name in the file. A number stays with the word before it (`params["unet"]["down_blocks.0"]`, `"net.0.proj"`), because
a MindSpore graph takes dicts at most six deep.
"""
import contextlib
import copy
import difflib
import functools
import inspect
import json
import math
import mmap
import numbers
import os
import pathlib
import re
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import mindspore
import numpy as np
import safetensors.numpy
import yaml
from mindspore import Tensor

if __package__:  # when the files lie in a package
    from . import layers
else:
    import layers

MODELS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
          "vocoder": "model"}
CONFIG_FILES = {**{model: f"{model}/config.json" for model in MODELS}, "schedule": "scheduler/scheduler_config.json",
                "feature_extractor": "feature_extractor/preprocessor_config.json"}
TOKENIZER_FILES = ("tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer.json",
                   "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
                   "tokenizer/added_tokens.json")  # the first two or the third; the others hold settings
IGNORED_BUFFERS = re.compile(r"\.(position_ids|token_type_ids|relative_position_index|num_batches_tracked)$")
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}  # in an old VAE
WEIGHT_NORM = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
RANDOM, DEMO = "random", "demo"
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# The classes upstream that compute with what is in each folder of a checkpoint.
CLASSES = {"text_encoder": ("transformers", "ClapModel"), "tokenizer": ("transformers", "RobertaTokenizer"),
           "feature_extractor": ("transformers", "ClapFeatureExtractor"),
           "unet": ("diffusers", "UNet2DConditionModel"), "scheduler": ("diffusers", "DDIMScheduler"),
           "vae": ("diffusers", "AutoencoderKL"), "vocoder": ("transformers", "SpeechT5HifiGan")}
SCHEDULER_NAMES = {"DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpm", "PNDMScheduler": "pndm",
                   "LMSDiscreteScheduler": "lms", "HeunDiscreteScheduler": "heun", "EulerDiscreteScheduler": "euler",
                   "EulerAncestralDiscreteScheduler": "euler_ancestral"}

# Those classes' own defaults (__init__ in diffusers 0.33.1 and transformers 4.57.1) of keys that a file may leave out,
# where the default is neither the published value (config.yaml) nor the implemented one.
DEFAULTS = {
    "text_encoder.audio_config": {"patch_embeds_hidden_size": 96, "hidden_size": 768, "depths": [2, 2, 6, 2]},
    "feature_extractor": {"frequency_min": 0, "max_length_s": 10, "truncation": "fusion"},
    "unet": {"in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280, 1280],
             "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
             "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "sample_size": None,
             "class_embed_type": None, "class_embeddings_concat": False, "projection_class_embeddings_input_dim": None},
    "vae": {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [64],
            "layers_per_block": 1, "scaling_factor": 0.18215},
    "vocoder": {"model_in_dim": 80, "upsample_initial_channel": 512, "upsample_rates": [4, 4, 4, 4],
                "upsample_kernel_sizes": [8, 8, 8, 8], "normalize_before": True},
}
DEFAULTS |= {kind: {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "set_alpha_to_one": True,
                    "steps_offset": 0, "timestep_spacing": "linspace"} for kind in SCHEDULER_NAMES}
DEFAULTS["DDIMScheduler"] |= {"clip_sample": True, "timestep_spacing": "leading"}
DEFAULTS["PNDMScheduler"] |= {"skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
DEFAULTS["HeunDiscreteScheduler"] |= {"beta_start": 0.00085, "beta_end": 0.012}

# What the code implements where upstream offers a choice; a checkpoint that says otherwise is refused.
IMPLEMENTED = {
    "text_encoder": {"model_type": "clap", "projection_hidden_act": "relu"},  # AudioLDM's is CLAP's text tower alone
    "text_encoder.text_config": {"hidden_act": "gelu", "position_embedding_type": "absolute"},
    "text_encoder.audio_config": {"hidden_act": "gelu", "enable_fusion": False, "enable_patch_layer_norm": True,
                                  "flatten_patch_embeds": True, "qkv_bias": True, "patch_size": 4,
                                  "patch_stride": [4, 4], "patch_embed_input_channels": 1},
    "unet": {"act_fn": "silu", "class_embed_type": "simple_projection", "class_embeddings_concat": True,
             "flip_sin_to_cos": True, "freq_shift": 0, "center_input_sample": False, "num_attention_heads": None,
             "mid_block_type": "UNetMidBlock2DCrossAttn", "transformer_layers_per_block": 1, "downsample_padding": 1,
             "use_linear_projection": False, "only_cross_attention": False, "dual_cross_attention": False,
             "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "encoder_hid_dim": None,
             "addition_embed_type": None, "conv_in_kernel": 3, "conv_out_kernel": 3, "resnet_out_scale_factor": 1.0,
             "mid_block_scale_factor": 1, "resnet_skip_time_act": False, "time_embedding_act_fn": None,
             "timestep_post_act": None, "cross_attention_norm": None, "attention_type": "default"},
    "vae": {"act_fn": "silu", "latents_mean": None, "latents_std": None, "shift_factor": None,
            "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True},
    "vocoder": {},
    # the code takes the first samples of longer audio: rand_trunc's random ones would give another result each time
    "feature_extractor": {"feature_extractor_type": CLASSES["feature_extractor"][1], "padding": "repeatpad",
                          "truncation": "rand_trunc", "top_db": None},
}
IMPLEMENTED |= {kind: {"beta_schedule": "scaled_linear", "timestep_spacing": "leading",
                       "clip_sample": False, "thresholding": False, "trained_betas": None,
                       "rescale_betas_zero_snr": False} for kind in SCHEDULER_NAMES}
IMPLEMENTED["PNDMScheduler"] |= {"skip_prk_steps": True}
for kind in ("LMSDiscreteScheduler", "HeunDiscreteScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
    IMPLEMENTED[kind] |= {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
IMPLEMENTED["EulerDiscreteScheduler"] |= {"interpolation_type": "linear", "sigma_min": None, "sigma_max": None,
                                          "timestep_type": "discrete", "final_sigmas_type": "zero"}
IMPLEMENTED["DPMSolverMultistepScheduler"] |= {
    "algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "final_sigmas_type": "zero",
    "variance_type": None, "lambda_min_clipped": -math.inf, "use_lu_lambdas": False, "use_flow_sigmas": False}

# The same of a tokenizer's settings, and of tokenizer.json, where a falsy value is as good as another.
TOKENIZER = {"add_prefix_space": False, "split_special_tokens": False, "do_lower_case": False, "padding_side": "right",
             "truncation_side": "right", "bos_token": "<s>", "cls_token": "<s>", "pad_token": "<pad>",
             "eos_token": "</s>", "sep_token": "</s>", "unk_token": "<unk>", "mask_token": "<mask>"}
TOKENIZER_JSON = {"normalizer.type": None, "pre_tokenizer.type": "ByteLevel", "pre_tokenizer.add_prefix_space": False,
                  "pre_tokenizer.use_regex": True, "post_processor.type": "RobertaProcessing", "model.type": "BPE",
                  "model.dropout": None, "model.continuing_subword_prefix": None, "model.end_of_word_suffix": None,
                  "model.byte_fallback": False, "model.ignore_merges": False}


class InputError(ValueError):
    """Something passed in is unusable; the message is one line that names it and says what would be valid."""


class OutOfMemory(InputError):
    """There is too little free memory here and now: fewer at once, a shorter clip, or the same later may work."""


class NotFinite(InputError):
    """What was computed holds NaN or Inf: the weights or the dtype are at fault, not the request."""


# ------------------------------------------------------------------------------------------------------------ folders

def find_weights(weights, quiet=False):
    """A folder path, a hub id, "demo" (beside this file) or "random" -> the folder as str, or "random".

    Hub files are fetched, if `quiet` without progress bars: of each model the float32 files, else the variant fp16's.
    """
    if weights == DEMO:
        weights = str(pathlib.Path(__file__).with_name(DEMO))
    if weights == RANDOM or os.path.isdir(weights):
        return weights
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", weights):
        raise InputError(f"weights: no folder {shown(weights)}; valid: a folder in diffusers' layout, a hub id "
                         f"such as ucsd-reach/musicldm, {DEMO!r} or {RANDOM!r}")
    files = ["model_index.json", *CONFIG_FILES.values(), *TOKENIZER_FILES]
    whole, halves = ({model: [f"{model}/{name}{ending}" for ending in endings] for model, name in MODELS.items()}
                     for endings in ((".safetensors", "-*.safetensors", ".safetensors.index.json"),
                                     (".fp16.safetensors", ".fp16-*.safetensors", ".safetensors.index.fp16.json")))
    try:
        from huggingface_hub import snapshot_download, utils
    except ImportError:
        raise InputError(f"weights: no folder {shown(weights)} here, and huggingface_hub is not installed to fetch it: "
                         "run 'pip install huggingface_hub', or pass a folder that holds "
                         f"{' '.join(files + sum(whole.values(), []))}") from None
    bars = not utils.are_progress_bars_disabled()
    try:
        if quiet and bars:
            utils.disable_progress_bars()
        folder = snapshot_download(weights, allow_patterns=files + sum(whole.values(), []))
        check_index(folder)  # no second search in a folder that is not of this kind
        left = [model for model in MODELS if not any(pathlib.Path(folder, model).glob("*.safetensors"))]
        if left:
            folder = snapshot_download(weights, allow_patterns=files + sum(map(halves.get, left), []))
        return folder
    except InputError:
        raise
    except Exception as error:  # the hub client has many error types; each means that the files could not be had
        raise InputError(f"weights: cannot fetch {weights!r}: {one_line(error)}") from error
    finally:
        if quiet and bars:
            utils.enable_progress_bars()


def one_line(error):
    """The message of an exception, or its type, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def shown(value):
    """A value as a message shows it: in one line of 200 characters at most, and of a dict the keys alone."""
    try:
        text = f"a mapping of {', '.join(map(str, value))}" if isinstance(value, dict) else one_line(repr(value))
    except Exception:  # of its own __repr__, a number of too many digits, too deep a list
        text = f"a value of the type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def listed(names):
    """The first of some names, and how many there are besides."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_json(path):
    """The content of a JSON file; an InputError if it is missing or unreadable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"weights: {path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(unreadable(path, error)) from None


def unreadable(path, error):
    """What to say of a file that cannot be read."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(26) == b"version https://git-lfs.gi":
            return f"weights: {path} is a Git LFS pointer, not the file itself; run 'git lfs pull' where it is from"
    return f"weights: cannot read {path}: {one_line(error)}"


def check_index(folder):
    """The scheduler's class in model_index.json, or None. Refuses another pipeline's index, and other classes."""
    path = pathlib.Path(folder) / "model_index.json"
    index = read_json(path) if path.is_file() else {}
    kind = index.get("_class_name", "MusicLDMPipeline") if isinstance(index, dict) else index
    if kind != "MusicLDMPipeline":
        raise InputError(f"weights: {path} is of {kind!r}; valid: a MusicLDMPipeline, such as ucsd-reach/musicldm")
    for name, (library, wanted) in CLASSES.items():
        valid = {"tokenizer": [wanted, "RobertaTokenizerFast"], "scheduler": SCHEDULER_NAMES}.get(name, [wanted])
        stated = index.get(name, [library, wanted])
        if stated not in [[library, kind] for kind in valid]:
            raise InputError(f"weights: {path}: {name} is {stated!r}; implemented: {library}'s {', '.join(valid)}")
    return index["scheduler"][1] if "scheduler" in index else None


def read_config_files(folder):
    """{section: its config.json, with the reference's defaults} of a checkpoint, refused if it is not implemented."""
    scheduler = check_index(folder)
    paths = {section: pathlib.Path(folder) / name for section, name in CONFIG_FILES.items()}
    vocabulary, merges, tokenizer, *_ = (pathlib.Path(folder) / name for name in TOKENIZER_FILES)
    missing = [str(path) for path in [*paths.values(), *([] if os.path.isfile(tokenizer) else [vocabulary, merges])]
               if not os.path.isfile(path)]
    if missing:
        raise InputError(f"weights: {folder} is incomplete, missing: {', '.join(missing)}")
    files = {section: read_json(path) for section, path in paths.items()}
    path, stated = paths["schedule"], files["schedule"]
    scheduler = scheduler or (isinstance(stated, dict) and stated.get("_class_name")) or CLASSES["scheduler"][1]
    if scheduler not in [*SCHEDULER_NAMES]:  # not in the dict: what a file states may have no hash
        raise InputError(f"weights: {path}: _class_name is {scheduler!r}; implemented: {', '.join(SCHEDULER_NAMES)}")
    files = {section: with_defaults(section if section != "schedule" else scheduler, stated, paths[section])
             for section, stated in files.items()}
    return {**files, "schedule": {**files["schedule"], "_class_name": scheduler}}


def with_defaults(name, stated, path):
    """A section of a checkpoint's configuration, or a part of one, with the reference's defaults."""
    if not isinstance(stated, dict):
        raise InputError(f"weights: {path} must hold a JSON object for {name}")
    complete = {**DEFAULTS.get(name, {}), **stated}
    for key, value in IMPLEMENTED[name].items():
        if complete.get(key, value) != value:
            default = "" if key in stated else ", the reference's default"
            raise InputError(f"weights: {path}: {key} is {shown(complete[key])}{default}; implemented: {value!r}")
    if name == "text_encoder":
        return {**complete, **{part: with_defaults(f"{name}.{part}", stated.get(part) or {}, path)
                               for part in ("text_config", "audio_config")}}
    if name == "feature_extractor":  # transformers computes it, whatever the file says
        rate, seconds = complete.get("sampling_rate", 48000), complete["max_length_s"]
        if not isinstance(rate, int) or not isinstance(seconds, int):
            raise InputError(f"weights: {path}: sampling_rate and max_length_s must be integers")
        return {**complete, "nb_max_samples": seconds * rate}
    return complete


def heads_by_level(unet_cfg):
    """Attention heads at each level, a tuple; diffusers calls their number attention_head_dim."""
    heads = unet_cfg["attention_head_dim"]
    return tuple(heads) if isinstance(heads, (list, tuple)) else (heads,) * len(unet_cfg["block_out_channels"])


def check_config(cfg):
    """Refuse what load_config could not have returned: an InputError that names it."""
    published = published_config()
    merged(published, known_part(cfg, published))
    missing = flatten(published).keys() - flatten(cfg).keys()
    if missing:
        raise InputError(f"cfg lacks {listed(sorted(missing))}; valid: what load_config returned")
    check_architecture(cfg)


def check_architecture(cfg):
    """Refuse numbers that cannot be a network: an InputError that names them and says what would fit."""
    text, audio = cfg["text_encoder"]["text_config"], cfg["text_encoder"]["audio_config"]
    unet, vae, vocoder, schedule = cfg["unet"], cfg["vae"], cfg["vocoder"], cfg["schedule"]
    extractor, mels, side, stages = cfg["feature_extractor"], audio["num_mel_bins"], audio["spec_size"], audio["depths"]
    channels, heads, values = unet["block_out_channels"], heads_by_level(unet), flatten(cfg)

    def require(holds, name, valid):
        if not holds:
            raise InputError(f"{name} is {values[name]}; valid: {valid}")

    may_be_0 = ("sampling.", "schedule.", "text_encoder.text_config.pad_token_id", "feature_extractor.frequency_min")
    for name, value in values.items():
        if not name.startswith(may_be_0):
            numbers = np.hstack(value if isinstance(value, (list, tuple)) else [value])
            require(numbers.dtype.kind not in "if" or (numbers > 0).all(), name, "above 0")
    for name in ("down_block_types", "up_block_types", "attention_head_dim"):
        found = len(heads if name == "attention_head_dim" else unet[name])
        if found != len(channels):
            raise InputError(f"unet.{name} has {found} entries; valid: one for each of block_out_channels")
    for name, plain in (("down_block_types", "DownBlock2D"), ("up_block_types", "UpBlock2D")):
        require({*unet[name]} <= {plain, f"CrossAttn{plain}"}, f"unet.{name}", f"{plain} or CrossAttn{plain}")
    attending = [any(kind.startswith("CrossAttn") for kind in pair)
                 for pair in zip(unet["down_block_types"], unet["up_block_types"][::-1])][:-1] + [True]  # the mid block
    require(not any(c % h for c, h, attends in zip(channels, heads, attending) if attends),
            "unet.attention_head_dim", f"divisors of {channels}")
    for name in ("unet", "vae"):
        require(not any(c % cfg[name]["norm_num_groups"] for c in cfg[name]["block_out_channels"]),
                f"{name}.norm_num_groups", "a divisor of block_out_channels")
    require(text["hidden_size"] % text["num_attention_heads"] == 0,
            "text_encoder.text_config.num_attention_heads", f"a divisor of hidden_size, {text['hidden_size']}")
    require(0 <= text["pad_token_id"] <= text["max_position_embeddings"] - 4,
            "text_encoder.text_config.pad_token_id", "0 or more, small")
    if len(audio["num_attention_heads"]) != len(stages) or any(
            audio["patch_embeds_hidden_size"] * 2 ** i % h for i, h in enumerate(audio["num_attention_heads"])):
        raise InputError("text_encoder.audio_config.num_attention_heads must have an entry for each of depths, a "
                         "divisor of the stage's channels")
    require(audio["hidden_size"] == audio["patch_embeds_hidden_size"] * 2 ** (len(stages) - 1),
            "text_encoder.audio_config.hidden_size", "patch_embeds_hidden_size, doubled after each stage but the last")
    require(side % mels == mels % audio["patch_size"] == 0
            and side % (audio["patch_size"] * audio["window_size"] * 2 ** (len(stages) - 1)) == 0,
            "text_encoder.audio_config.spec_size",
            "a multiple of num_mel_bins, and in every stage of patch_size and window_size")
    require(extractor["feature_size"] == mels, "feature_extractor.feature_size", f"num_mel_bins, {mels}")
    require(1000 <= extractor["sampling_rate"] <= 192000, "feature_extractor.sampling_rate", "1000 to 192000")
    if not 0 <= extractor["frequency_min"] < extractor["frequency_max"] <= extractor["sampling_rate"] / 2:
        raise InputError("feature_extractor: 0, frequency_min, frequency_max and half the sampling_rate must ascend")
    require(extractor["nb_max_samples"] // extractor["hop_length"] < side * (side // mels),
            "feature_extractor.nb_max_samples", f"below {side * (side // mels)} frames")
    if len(vocoder["upsample_rates"]) != len(vocoder["upsample_kernel_sizes"]) or any(
            k < r for k, r in zip(vocoder["upsample_kernel_sizes"], vocoder["upsample_rates"])):
        raise InputError("vocoder.upsample_kernel_sizes must have an entry for each of upsample_rates, none below it")
    if len(vocoder["resblock_kernel_sizes"]) != len(vocoder["resblock_dilation_sizes"]):
        raise InputError("vocoder.resblock_dilation_sizes must have a list for each of resblock_kernel_sizes")
    require(all(k % 2 for k in vocoder["resblock_kernel_sizes"]), "vocoder.resblock_kernel_sizes", "odd numbers")
    require(vocoder["model_in_dim"] % 2 ** (len(vae["block_out_channels"]) - 1) == 0,
            "vocoder.model_in_dim", "what the VAE's scale divides")
    if not unet["in_channels"] == unet["out_channels"] == vae["latent_channels"]:
        raise InputError("unet.in_channels, unet.out_channels and vae.latent_channels must be equal")
    require(unet["projection_class_embeddings_input_dim"] == cfg["text_encoder"]["projection_dim"],
            "unet.projection_class_embeddings_input_dim",
            f"CLAP's projection_dim, {cfg['text_encoder']['projection_dim']}")
    for name in ("vae.in_channels", "vae.out_channels"):
        require(values[name] == 1, name, "1, a spectrogram")
    require(vocoder["upsample_initial_channel"] % 2 ** len(vocoder["upsample_rates"]) == 0,
            "vocoder.upsample_initial_channel", "what halves at each of upsample_rates")
    if not 0 < schedule["beta_start"] <= schedule["beta_end"] < 1:
        raise InputError("schedule.beta_start and beta_end must lie between 0 and 1 in this order")
    if schedule["num_train_timesteps"] < 2 or not 0 <= schedule["steps_offset"] <= 1:
        raise InputError("schedule.num_train_timesteps must be 2 or more, and steps_offset 0 or 1")


# -------------------------------------------------------------------------------------------------------- configuration

DEFAULT_CONFIG = pathlib.Path(__file__).with_name("config.yaml")
CHOICES = {"device": ("auto", "Ascend", "CPU", "GPU"), "dtype": ("float32", "float16", "bfloat16", "hf32"),
           "sampling.output_type": ("np", "mel", "latent"), "schedule.prediction_type": ("epsilon", "v_prediction")}
OPTIONAL = {"sampling.audio_length_in_s": 10.24, "sampling.strength": 0.5, "sampling.extend": 10.0,
            "unet.sample_size": 256}  # or null
RANGES = {"sampling.audio_length_in_s": (0.04, 600), "sampling.num_inference_steps": (1, 999),
          "sampling.guidance_scale": (0, 1000), "sampling.eta": (0, 1), "sampling.seed": (0, math.inf),
          "sampling.callback_steps": (1, math.inf), "sampling.num_waveforms_per_prompt": (1, 1000),
          "sampling.audio_prompt_weight": (0, 1), "sampling.strength": (0.001, 1)}


def unknown(kind, name, valid):
    """An InputError about a name that is not among the valid ones, with the nearest of them."""
    near = difflib.get_close_matches(str(name), valid, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {kind} {shown(name)}: {hint}valid: {', '.join(valid)}")


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
    value = value.item() if isinstance(value, np.generic) else value
    if value is None and name in OPTIONAL:
        return None
    default = OPTIONAL.get(name, default)
    if isinstance(default, float) and isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.)?\d+e[-+]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-5 and 1.5e5 as text
    if name == "sampling.negative_prompt":
        valid = "null, a text, or a list of texts, one a prompt"
        ok = value is None or fits(value, "") or fits(value, [""])
    elif name == "sampling.repaint":
        valid = "a list of parts, each [start, end] in seconds"
        value = value.tolist() if isinstance(value, np.ndarray) else value
        ok = value in (None, [], ()) or fits(value, [[0.0]]) and all(len(part) == 2 for part in value)
    elif name == "unet.attention_head_dim":
        valid, ok = "an integer, or a list of one a level", fits(value, 8) or fits(value, [8])
    elif name == "sampling.seed" and isinstance(value, (list, tuple)) and (fits(value, [0]) or not value):
        return [checked_value(name, seed, default) for seed in value]
    else:
        kind = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text", list: "a list"}
        valid, ok = f"{kind[type(default)]}, such as {default!r}", fits(value, default)
    choices = tuple(SCHEDULER_NAMES.values()) if name == "sampling.scheduler" else CHOICES.get(name)
    if ok and choices:
        valid, ok = ", ".join(choices), value in choices
    if ok and name in RANGES:
        low, high = RANGES[name]
        valid, ok = f"{low} or more" if high == math.inf else f"{low} to {high}", low <= value <= high
    if not ok:
        raise InputError(f"{name} is {shown(value)}; valid: {valid}")
    return float(value) if isinstance(default, float) else value


def merged(base, new, prefix=""):
    """`base` with the values of `new`, an equally nested dict, checked against it; neither is changed."""
    if not isinstance(new, dict):
        name = prefix.rstrip(".") or "the configuration"
        raise InputError(f"{name} is {shown(new)}; valid: a mapping of {', '.join(base)}")
    result = dict(base)
    for key, value in new.items():
        if key not in base:
            raise unknown("config key", f"{prefix}{key}", [prefix + name for name in base])
        result[key] = (merged(base[key], value, f"{prefix}{key}.") if isinstance(base[key], dict)
                       else checked_value(f"{prefix}{key}", value, base[key]))
    return result


def known_part(stated, base):
    """What a nested dict, such as a config.json, states of the keys that `base` has."""
    return {key: known_part(stated[key], value) if isinstance(value, dict) and isinstance(stated[key], dict)
            else stated[key] for key, value in base.items() if key in stated}


def parse_yaml(text, where):
    """The value of a YAML text; an InputError that begins with `where` if it has none."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers raise ValueError
        raise InputError(f"{where}: {one_line(error)}") from None


def read_yaml(path):
    """The content of a YAML file, {} if it is empty; an InputError if it cannot be read."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config: cannot read {path}: {one_line(error)}") from None
    tree = parse_yaml(text, f"config: cannot read {path}")
    return {} if tree is None else tree


@functools.cache
def published_config():
    """The content of the config.yaml beside this module; callers must not change it."""
    return read_yaml(DEFAULT_CONFIG)


def parse_override(text):
    """ "unet.norm_eps=1" -> {"unet": {"norm_eps": 1}}."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"override {shown(text)}; valid: key=value, such as sampling.seed=3")
    tree = parse_yaml(value, f"override {shown(text)}")
    for key in reversed(name.strip().split(".")):
        tree = {key: tree}
    return tree


def load_config(path=DEFAULT_CONFIG, weights=None, overrides=(), quiet=False):
    """The configuration as a nested plain dict: the file, below the checkpoint's own config.json, below `overrides`.

    path: a YAML file; keys it leaves out have the values of the config.yaml beside this module
    weights: a checkpoint folder, a hub id, "demo" or "random"; None keeps the file's. What a checkpoint's files leave
        out has the reference's default
    overrides: texts like "sampling.seed=3", the value in YAML
    quiet: no progress bars while a hub id is fetched
    Raises InputError, one line, for an unreadable file, an unknown key, a wrong type or a value out of range.
    """
    changes = [parse_override(text) for text in overrides] + ([] if weights is None else [{"weights": str(weights)}])
    published = copy.deepcopy(published_config())
    cfg = merged(published, read_yaml(path))
    folder = find_weights(functools.reduce(merged, changes, cfg)["weights"], quiet)
    if folder != RANDOM:
        stated = read_config_files(folder)
        cfg = {**cfg, **merged({section: published[section] for section in stated}, known_part(stated, published))}
        if cfg["sampling"]["scheduler"] == published["sampling"]["scheduler"]:
            cfg["sampling"] = {**cfg["sampling"], "scheduler": SCHEDULER_NAMES[stated["schedule"]["_class_name"]]}
    cfg = {**functools.reduce(merged, changes, cfg), "weights": folder}
    check_architecture(cfg)
    load_vocabulary(cfg)  # refused now rather than when the first prompt is read
    return cfg


# --------------------------------------------------------------------------------------------------------- vocabulary

def byte_characters():
    """GPT-2's printable stand-in for each byte: [chr] of length 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def load_vocabulary(cfg):
    """({token: id}, {"a b": rank of joining a and b}, added, longest) of the checkpoint; for random weights the bytes.

    added: {token: (strips spaces on its left, on its right)} of tokens that are found before any other
    longest: the tokens that a prompt may have, by the text tower's positions and the tokenizer's own limit
    Callers must not change the dicts: later calls return the same ones until a file changes.
    """
    text = cfg["text_encoder"]["text_config"]
    longest = text["max_position_embeddings"] - text["pad_token_id"] - 1
    if cfg["weights"] == RANDOM:
        vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *byte_characters()])}
        return vocab, {}, {token: (token == "<mask>", False) for token in SPECIAL_TOKENS}, longest
    paths = tuple(pathlib.Path(cfg["weights"]) / name for name in TOKENIZER_FILES)
    stats = [path.stat() for path in paths if path.is_file()]  # some of it changes with a file
    versions = tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
    *read, limit = read_tokenizer(paths, text["vocab_size"], versions)
    return *read, int(min(longest, limit or longest))


def refuse_settings(stated, implemented, path):
    """An InputError for the first setting that is not the implemented one, which is that of what is left out."""
    for key, value in implemented.items():
        if (stated.get(key, value) or None) != (value or None):
            raise InputError(f"weights: {path}: {key} is {stated[key]!r}; implemented: {value!r}")


def content(token):
    """The text of a token, which files give as it is or with its flags."""
    return token["content"] if isinstance(token, dict) else token


def added_tokens(whole, config, special, added):
    """{token: what the files after merges.txt say of it} of the tokens that are looked for before a text is split.

    As in transformers 4.57.1 (`PreTrainedTokenizerBase._from_pretrained`): the configuration lists them with their
    flags; else tokenizer.json does; else their numbers are in added_tokens.json.
    """
    listed = [{**token, "id": int(number)} for number, token in config.get("added_tokens_decoder", {}).items()]
    whole, added = whole.get("added_tokens", []), [{"content": token, "id": number} for token, number in added.items()]
    tokens = {token["content"]: token for token in listed or whole or added}
    for token in whole + added:
        known = tokens.get(token["content"], {})
        if any(token[key] != known.get(key) for key in ("id", "lstrip", "rstrip") if key in token):
            raise InputError(f"the files say different things of the added token {token['content']!r}")
    flags = {content(token): token for token in {**config, **special}.values() if isinstance(token, dict)
             and "content" in token and not listed}
    return {**tokens, **{token: {"lstrip": token == "<mask>", **flags.get(token, {}), **tokens.get(token, {})}
                         for token in SPECIAL_TOKENS}}


@functools.lru_cache(4)  # reading takes a quarter of the time of encoding a prompt
def read_tokenizer(paths, size, versions):
    """`load_vocabulary` of TOKENIZER_FILES, but for the positions; `versions` is only part of the cache's key.

    Refused are ids from `size` on, and what RobertaTokenizer or RobertaTokenizerFast would make of the files otherwise.
    """
    vocab_path, merges_path, whole_path, config_path, *_ = paths
    whole, config, special, added = (read_json(path) if path.is_file() else {} for path in paths[2:])
    try:
        model = whole.get("model", {})
        read = model.get("vocab"), [merge if isinstance(merge, str) else " ".join(merge)
                                    for merge in model.get("merges", [])]
        vocab, merges = read
        if vocab_path.is_file() or not whole:
            lines = merges_path.read_text(encoding="utf-8").split("\n")
            vocab, merges = read_json(vocab_path), [*filter(None, lines[lines[0].startswith("#version"):])]
        tokens = added_tokens(whole, config, special, added)
        numbers = {token: said["id"] for token, said in tokens.items() if "id" in said}
        if whole and ({**read[0], **numbers}, read[1]) != ({**vocab, **numbers}, merges):
            raise InputError("tokenizer.json holds another vocabulary than vocab.json and merges.txt")
        settings = config if "added_tokens_decoder" in config else {**config, **special}
        extra = [settings.get(name) or [] for name in ("additional_special_tokens", "extra_special_tokens")]
        extra = [content(token) for some in extra for token in (some.values() if isinstance(some, dict) else some)]
        for token in extra + [token for token, said in tokens.items() if said.get("single_word")]:
            if token not in tokens or tokens[token].get("single_word"):
                raise InputError(f"the added token {token!r} has no number, or is for single words alone")
        refuse_settings({key: content(value) for key, value in settings.items() if key in TOKENIZER}, TOKENIZER,
                        config_path)
        if whole:
            refuse_settings({"pre_tokenizer.type": None, "post_processor.type": None, **flatten(
                {**whole, "model": {**model, "vocab": None, "merges": None}})}, TOKENIZER_JSON, whole_path)
        vocab, longest = {**vocab, **numbers}, config.get("model_max_length", config.get("max_len"))
        if longest is not None and longest < 3:
            raise InputError(f"model_max_length is {longest!r}; valid: 3 or more")
        if not ({*map(type, vocab.values())} == {int} and 0 <= min(vocab.values()) and max(vocab.values()) < size):
            raise InputError(f"its tokens' numbers must be integers below the vocab_size, {size}")
        missing = [token for token in SPECIAL_TOKENS if token not in vocab]
        if missing:
            raise InputError(f"it lacks the tokens {' '.join(missing)}")
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith("weights: ") else f"weights: {vocab_path.parent}: {text}") from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"weights: cannot read {vocab_path.parent}: {one_line(error)}") from None
    strips = {token: (said.get("lstrip", False), said.get("rstrip", False)) for token, said in tokens.items()}
    return vocab, {merge: rank for rank, merge in enumerate(merges)}, strips, longest


def tokenizer_files(cfg, vocabulary):
    """{name: text} of TOKENIZER_FILES: those of the checkpoint, or what they hold of (vocab, ranks)."""
    if vocabulary is None and cfg["weights"] != RANDOM:
        paths = {name: pathlib.Path(cfg["weights"]) / name for name in TOKENIZER_FILES}
        return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
    vocab, ranks = vocabulary or load_vocabulary(cfg)[:2]
    merges = ["#version: 0.2", *sorted(ranks, key=ranks.get), ""]
    return dict(zip(TOKENIZER_FILES, (json.dumps(vocab, ensure_ascii=False), "\n".join(merges))))


# ------------------------------------------------------------------------------------------------------------- shapes
# Of each layer and model, under the checkpoint's own names: nested dicts of {"weight": shape, "bias": shape}.

def linear_shapes(i, o, bias=True):
    return {"weight": (o, i), "bias": (o,)} if bias else {"weight": (o, i)}


def conv_shapes(i, o, *kernel):
    return {"weight": (o, i, *kernel), "bias": (o,)}


def norm_shapes(c):
    return {"weight": (c,), "bias": (c,)}


def resnet_shapes(i, o, time_embedding=None):
    return {"norm1": norm_shapes(i), "conv1": conv_shapes(i, o, 3, 3),
            **({"time_emb_proj": linear_shapes(time_embedding, o)} if time_embedding else {}),
            "norm2": norm_shapes(o), "conv2": conv_shapes(o, o, 3, 3),
            **({"conv_shortcut": conv_shapes(i, o, 1, 1)} if i != o else {})}


def attention_shapes(c, bias):
    return {**{name: linear_shapes(c, c, bias) for name in ("to_q", "to_k", "to_v")}, "to_out.0": linear_shapes(c, c)}


def spatial_transformer_shapes(c):
    block = {"norm1": norm_shapes(c), "attn1": attention_shapes(c, bias=False),
             "norm2": norm_shapes(c), "attn2": attention_shapes(c, bias=False),
             "norm3": norm_shapes(c), "ff": {"net.0.proj": linear_shapes(c, 8 * c), "net.2": linear_shapes(4 * c, c)}}
    return {"norm": norm_shapes(c), "proj_in": conv_shapes(c, c, 1, 1), "transformer_blocks.0": block,
            "proj_out": conv_shapes(c, c, 1, 1)}


def unet_shapes(cfg):
    channels, layers = cfg["block_out_channels"], cfg["layers_per_block"]
    first, last, time_dim = channels[0], len(channels) - 1, 4 * channels[0]
    embedding = 2 * time_dim  # class_embeddings_concat: the time embedding and the projected CLAP vector
    shapes = {"time_embedding": {"linear_1": linear_shapes(first, time_dim),
                                 "linear_2": linear_shapes(time_dim, time_dim)},
              "class_embedding": linear_shapes(cfg["projection_class_embeddings_input_dim"], time_dim),
              "conv_in": conv_shapes(cfg["in_channels"], first, 3, 3)}
    c, skips = first, [first]
    for i, (o, kind) in enumerate(zip(channels, cfg["down_block_types"])):
        for j in range(layers):
            shapes[f"down_blocks.{i}.resnets.{j}"] = resnet_shapes(c, o, embedding)
            if kind.startswith("CrossAttn"):
                shapes[f"down_blocks.{i}.attentions.{j}"] = spatial_transformer_shapes(o)
            c = o
            skips.append(c)
        if i < last:
            shapes[f"down_blocks.{i}.downsamplers.0.conv"] = conv_shapes(c, c, 3, 3)
            skips.append(c)
    resnet = resnet_shapes(c, c, embedding)
    shapes["mid_block"] = {"resnets.0": resnet, "attentions.0": spatial_transformer_shapes(c), "resnets.1": resnet}
    for i, (o, kind) in enumerate(zip(reversed(channels), cfg["up_block_types"])):
        for j in range(layers + 1):
            shapes[f"up_blocks.{i}.resnets.{j}"] = resnet_shapes(c + skips.pop(), o, embedding)
            if kind.startswith("CrossAttn"):
                shapes[f"up_blocks.{i}.attentions.{j}"] = spatial_transformer_shapes(o)
            c = o
        if i < last:
            shapes[f"up_blocks.{i}.upsamplers.0.conv"] = conv_shapes(c, c, 3, 3)
    return {**shapes, "conv_norm_out": norm_shapes(c), "conv_out": conv_shapes(c, cfg["out_channels"], 3, 3)}


def vae_shapes(cfg):
    channels, layers, latent = cfg["block_out_channels"], cfg["layers_per_block"], cfg["latent_channels"]
    deepest = channels[-1]
    mid = {"resnets.0": resnet_shapes(deepest, deepest),
           "attentions.0": {"group_norm": norm_shapes(deepest), **attention_shapes(deepest, bias=True)},
           "resnets.1": resnet_shapes(deepest, deepest)}

    def half(i, o, channels, layers, levels, sampler):
        """The encoder or the decoder, whose channels go from the first level on."""
        shapes = {"conv_in": conv_shapes(i, channels[0], 3, 3), "mid_block": mid,
                  "conv_norm_out": norm_shapes(channels[-1]), "conv_out": conv_shapes(channels[-1], o, 3, 3)}
        for level, (before, c) in enumerate(zip([channels[0], *channels], channels)):
            for j in range(layers):
                shapes[f"{levels}.{level}.resnets.{j}"] = resnet_shapes(c if j else before, c)
            if level < len(channels) - 1:
                shapes[f"{levels}.{level}.{sampler}.0.conv"] = conv_shapes(c, c, 3, 3)
        return shapes

    return {"encoder": half(cfg["in_channels"], 2 * latent, channels, layers, "down_blocks", "downsamplers"),
            "quant_conv": conv_shapes(2 * latent, 2 * latent, 1, 1),
            "post_quant_conv": conv_shapes(latent, latent, 1, 1),
            "decoder": half(latent, cfg["out_channels"], channels[::-1], layers + 1, "up_blocks", "upsamplers")}


def bert_attention_shapes(c):
    return {"self": {name: linear_shapes(c, c) for name in ("query", "key", "value")},
            "output.dense": linear_shapes(c, c)}


def clap_text_shapes(cfg):
    c, wide = cfg["hidden_size"], cfg["intermediate_size"]
    layer = {"attention": {**bert_attention_shapes(c), "output.LayerNorm": norm_shapes(c)},
             "intermediate.dense": linear_shapes(c, wide), "output.dense": linear_shapes(wide, c),
             "output.LayerNorm": norm_shapes(c)}
    return {"embeddings": {"word_embeddings.weight": (cfg["vocab_size"], c),
                           "position_embeddings.weight": (cfg["max_position_embeddings"], c),
                           "token_type_embeddings.weight": (cfg["type_vocab_size"], c), "LayerNorm": norm_shapes(c)},
            "pooler.dense": linear_shapes(c, c),
            "encoder": {f"layer.{i}": layer for i in range(cfg["num_hidden_layers"])}}


def clap_audio_shapes(cfg):
    c, mels, last = cfg["patch_embeds_hidden_size"], cfg["num_mel_bins"], len(cfg["depths"]) - 1
    shapes = {"patch_embed": {"proj": conv_shapes(1, c, cfg["patch_size"], cfg["patch_size"]), "norm": norm_shapes(c)},
              "batch_norm": {**norm_shapes(mels), "running_mean": (mels,), "running_var": (mels,)}}
    for i, (depth, heads) in enumerate(zip(cfg["depths"], cfg["num_attention_heads"])):
        wide = int(cfg["mlp_ratio"] * c)
        block = {"layernorm_before": norm_shapes(c), "layernorm_after": norm_shapes(c),
                 "attention.self.relative_position_bias_table": ((2 * cfg["window_size"] - 1) ** 2, heads),
                 "attention": bert_attention_shapes(c), "intermediate.dense": linear_shapes(c, wide),
                 "output.dense": linear_shapes(wide, c)}
        shapes |= {f"layers.{i}.blocks.{j}": block for j in range(depth)}
        if i < last:
            shapes[f"layers.{i}.downsample"] = {"norm": norm_shapes(4 * c),
                                                "reduction": linear_shapes(4 * c, 2 * c, bias=False)}
            c *= 2
    return {**shapes, "norm": norm_shapes(c)}


def clap_shapes(cfg):
    text, audio, out = cfg["text_config"], cfg["audio_config"], cfg["projection_dim"]
    second = linear_shapes(out, out)
    return {"logit_scale_a": (), "logit_scale_t": (), "text_model": clap_text_shapes(text),
            "text_projection": {"linear1": linear_shapes(text["hidden_size"], out), "linear2": second},
            "audio_model.audio_encoder": clap_audio_shapes(audio),
            "audio_projection": {"linear1": linear_shapes(audio["hidden_size"], out), "linear2": second}}


def vocoder_shapes(cfg):
    mels, c = cfg["model_in_dim"], cfg["upsample_initial_channel"]
    shapes = {"mean": (mels,), "scale": (mels,), "conv_pre": conv_shapes(mels, c, 7)}
    kernels = cfg["resblock_kernel_sizes"]
    for i, kernel in enumerate(cfg["upsample_kernel_sizes"]):
        shapes[f"upsampler.{i}"] = {"weight": (c, c // 2, kernel), "bias": (c // 2,)}
        c //= 2
        for j, (size, dilations) in enumerate(zip(kernels, cfg["resblock_dilation_sizes"])):
            for k in range(len(dilations)):
                for name in ("convs1", "convs2"):
                    shapes[f"resblocks.{i * len(kernels) + j}.{name}.{k}"] = conv_shapes(c, c, size)
    return {**shapes, "conv_post": conv_shapes(c, 1, 7)}


def param_shapes(cfg):
    """{model: {tensor name: shape}} of everything a checkpoint of this configuration holds, as its files lay it out."""
    shapes = {"text_encoder": clap_shapes, "unet": unet_shapes, "vae": vae_shapes, "vocoder": vocoder_shapes}
    return {model: flatten(of_model(cfg[model])) for model, of_model in shapes.items()}


# -------------------------------------------------------------------------------------------------------------- files

def shard_paths(folder, model):
    """The safetensors files of a model: one, or those that its index names; a variant's if there are no others."""
    folder, name = pathlib.Path(folder) / model, MODELS[model]
    ways = [(folder / f"{name}{variant}.safetensors", folder / f"{name}.safetensors.index{variant}.json")
            for variant in ("", ".fp16", ".bf16")]
    path, index = next((way for way in ways if any(map(os.path.isfile, way))), ways[0])
    if not os.path.isfile(index):
        pickles = sorted(file.name for file in folder.glob("*.bin"))
        if pickles and not os.path.isfile(path):
            raise InputError(f"weights: {path} is missing, and {pickles[0]} could run code when it is read; valid: "
                             "what diffusers' MusicLDMPipeline.from_pretrained(FOLDER).save_pretrained(NEW) writes")
        return [path]
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    names = list(names.values()) if isinstance(names, dict) else []
    if not names or not all(isinstance(name, str) and name and name == pathlib.PurePath(name).name for name in names):
        raise InputError(f"weights: {index} must hold a weight_map of tensor names to files beside it")
    return [path.with_name(name) for name in sorted(set(names))]


def stored_tensors(folder, model):
    """{name: array} over all shards: mapped from the files, nothing is read yet. bfloat16 comes as its uint16 bits."""
    arrays = {}
    for path in shard_paths(folder, model):
        try:
            with safetensors.safe_open(path, "np") as file:  # checks the header and that the file is whole
                names = file.keys()
            raw = np.memmap(path, np.uint8, "r")
        except FileNotFoundError:
            raise InputError(f"weights: {path} is missing") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(unreadable(path, error)) from None
        start = 8 + int(raw[:8].view("<u8")[0])  # the format: header length, JSON header, data
        header = json.loads(raw[8:start].tobytes())
        for name in names:
            begin, end = (start + offset for offset in header[name]["data_offsets"])
            dtype = DTYPES.get(header[name]["dtype"])
            arrays[name] = raw[begin:end].view(dtype).reshape(header[name]["shape"]) if dtype else header[name]["dtype"]
    return {name: array for name, array in arrays.items() if not IGNORED_BUFFERS.search("." + name)}


def find_sources(shapes, stored, where):
    """{parameter: the names that hold it in the file: its own, an old one, or two under weight norm}, all checked."""
    sources, wanted = {}, {}
    for name, shape in shapes.items():
        ways = [(name,)]
        if name.endswith(".weight"):
            ways += [tuple(name[:-len("weight")] + part for part in pair) for pair in WEIGHT_NORM]
        ways += [(name.replace(f".{new}.", f".{old}."),) for new, old in OLD_ATTENTION.items()
                 if f".attentions.0.{new}." in name]
        sources[name] = next((names for names in ways if stored.keys() >= set(names)), (name,))
        length = shape[:1] + (1,) * (len(shape) - 1)
        wanted |= zip(sources[name], (shape,) if len(sources[name]) == 1 else (length, shape))
    check_shapes(wanted, stored, where)
    return sources


def check_shapes(shapes, stored, where):
    """An InputError with all that differs from `shapes` in `stored`, {name: array, or a text if it holds no floats}."""
    whole = next(iter(shapes))
    prefix = next((name.removesuffix(whole) for name in stored if name.endswith("." + whole)), None)
    if prefix and all(name.startswith(prefix) for name in stored):
        raise InputError(f"{where}: all names begin with {prefix!r}; valid: the same names without it")
    problems = {"missing": [name for name in shapes if name not in stored],
                "unexpected": [name for name in stored if name not in shapes]}
    stored = {name: stored[name] for name in shapes if name in stored}
    problems["not floating-point"] = [f"{name} ({x})" for name, x in stored.items() if isinstance(x, str)]
    problems["of the wrong shape"] = [f"{name} {x.shape} instead of {shapes[name]}" for name, x in stored.items()
                                      if not isinstance(x, str) and x.shape != shapes[name]]
    found = [f"{len(names)} {kind}: {listed(names)}" for kind, names in problems.items() if names]
    if found:
        raise InputError(f"{where}: {'; '.join(found)}")


def check_weights(cfg):
    """{model: (`stored_tensors`, `find_sources`)}, nothing read yet; all that is wrong in the files is told at once."""
    checked, problems = {}, []
    for model, shapes in param_shapes(cfg).items():
        try:
            stored = stored_tensors(cfg["weights"], model)
            checked[model] = stored, find_sources(shapes, stored, pathlib.Path(cfg["weights"]) / model)
        except InputError as error:
            problems.append(str(error).removeprefix("weights: "))
    if problems:
        raise InputError(f"weights: {'; '.join(problems)}")
    return checked


def as_float32(array):
    """Any float dtype, bfloat16 as its uint16 bits -> np.float32."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def fold_weight_norm(g, v):
    """weight = g * v / |v|, the length taken over all axes but the first (Salimans & Kingma, 2016, equation 2)."""
    length = np.sqrt(np.sum(v.astype(np.float64) ** 2, axis=tuple(range(1, v.ndim)), keepdims=True))
    return (g * (v / length)).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------- tree

def nest(flat):
    """{"a.0.b.weight": x} -> {"a.0": {"b": {"weight": x}}}; "net.0.proj" is one key."""
    tree = {}
    for name, value in flat.items():
        *path, leaf = re.findall(r"[A-Za-z]\w*(?:\.\d+(?:\.proj(?=\.))?)*", name)
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def flatten(tree, name=""):
    """The inverse of `nest`."""
    if not isinstance(tree, dict):
        return {name: tree}
    return {path: leaf for key, value in tree.items()
            for path, leaf in flatten(value, f"{name}.{key}" if name else key).items()}


def random_arrays(shapes, rng):
    """Yield (name, float32 array), scaled so that signals neither vanish nor explode."""
    for name, shape in shapes.items():
        if name.endswith(("bias", "mean", "relative_position_bias_table")):
            yield name, np.zeros(shape, np.float32)
        elif len(shape) < 2:
            yield name, np.ones(shape, np.float32)
        else:
            fan_in = 2 * shape[0] if name.startswith("upsampler.") else math.prod(shape[1:])
            yield name, rng.standard_normal(shape, np.float32) * np.float32(fan_in ** -0.5)


# ---------------------------------------------------------------------------------------------------------- computing

# MindSpore's compiler and executor are one a process: two threads inside at once get wrong numbers.
LOCK = threading.RLock()


@functools.cache
def computing_process():
    """The id of the process that computed first; one forked from it still finds that here."""
    return os.getpid()


def one_at_a_time(function):
    """The function for callers in any number of threads, which wait for each other; it may call others of its kind.

    It raises InputError in a process that was forked after computing, where it would wait for ever: a fork takes none
    of MindSpore's threads along. And for parameters in the second place, where data come.
    """
    @functools.wraps(function)
    def call(*given, **named):
        if len(given) > 1 and isinstance(given[1], dict) and given[1].keys() & MODELS.keys():
            name, places = function.__name__, inspect.getfullargspec(function).args
            raise InputError(f"{name} got the parameters second; valid: {name}({', '.join(places)})")
        if computing_process() != os.getpid():
            raise InputError("this process was forked from one that had computed with MindSpore; valid: to fork before "
                             "that, or to start processes by multiprocessing's 'spawn'")
        with LOCK:
            return function(*given, **named)

    return call


# ------------------------------------------------------------------------------------------------------------ loading

@functools.cache  # MindSpore takes each of these once a process
def set_up_ascend(hf32):
    """What MindSpore must know before an Ascend's first operator: it asks once (op_api_util.cc, IsAllowConvHF32).

    CANN convolves float32 as HF32, with 11 bits of mantissa, unless it is told not to. And for the operators without an
    ACLNN kernel (Conv2D, BiasAdd, LayerNorm, Gather) MindSpore compiles one for every shape anew, unless it is told to
    look among the compiled ones first: 600 or 40 s for a first image (Comfy-Org/ComfyUI, pull request 10050).
    """
    ascend = mindspore.device_context.ascend
    try:
        ascend.op_precision.conv_allow_hf32(hf32)
        ascend.op_precision.matmul_allow_hf32(hf32)
    except RuntimeError:
        raise InputError(f"dtype: this process has computed {'without' if hf32 else 'with'} hf32 before; valid: one of "
                         "the two a process") from None
    with contextlib.suppress(RuntimeError):  # the caller has set it before
        ascend.op_tuning.op_compile(False)


def use_device(cfg):
    """Point MindSpore at cfg["device"] and return its name: "Ascend", "CPU" or "GPU"; an InputError if it cannot."""
    current = mindspore.get_context("device_target")
    device = current if cfg["device"] == "auto" else cfg["device"]
    number = os.environ.get("DEVICE_ID")  # msrun gives each process its own
    if device != current or (device != "CPU" and number):
        try:
            mindspore.set_device(device, *([int(number)] if number else []))
        except (RuntimeError, ValueError, TypeError):  # also once MindSpore has computed on another device
            raise InputError(f"device: this MindSpore has no {device}; valid: auto, {current}") from None
        if mindspore.get_context("device_target") != device:
            raise InputError(f"device is {device}, but MindSpore computes on {current}; valid: auto, {current}")
    if device == "Ascend":
        set_up_ascend(cfg["dtype"] == "hf32")
    elif device == "CPU":  # or the thread that waits for a graph spins, and takes a processor from those that compute
        os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")
    return device


def card(cfg):
    """The Ascend that cfg means: its `name`, and `total_memory` and `free_memory` in bytes. None for another device."""
    if use_device(cfg) != "Ascend":
        return None
    Tensor(0, mindspore.int32).to("Ascend")  # MindSpore knows no memory of a device that nothing has used
    return mindspore.hal.get_device_properties(0, "Ascend")


def device_in_words(cfg):
    """The device that computes, such as "CPU" or "Ascend 910B4 with 32 GB"."""
    used = card(cfg)
    return f"{used.name} with {used.total_memory / 1e9:.0f} GB" if used else use_device(cfg)


def tensor_dtype(cfg):
    """The MindSpore dtype that cfg["dtype"] means on cfg["device"].

    MindSpore has no bfloat16 arithmetic on a CPU. There it means float32 tensors which oneDNN 3 (MindSpore 2.9 and
    later) multiplies in bfloat16 if the processor has AMX; oneDNN reads the wish once, at the process's first product.
    """
    if cfg["dtype"] == "bfloat16" and use_device(cfg) == "CPU":
        os.environ.setdefault("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
        return mindspore.float32
    return mindspore.float32 if cfg["dtype"] == "hf32" else getattr(mindspore, cfg["dtype"])


def parameter(array, cfg):
    """An array as a Tensor of the dtype that cfg computes in, on an Ascend in its memory.

    A compiled function would copy it there at every call (graph_scheduler, PrepareDataForHostTensorQueue).
    """
    device, dtype = use_device(cfg), tensor_dtype(cfg)
    tensor = Tensor.from_numpy(np.asarray(array, order="C"))  # shares the memory: may stay mapped from the file
    if device == "Ascend":
        return tensor.to("Ascend", dtype=dtype)
    if dtype != tensor.dtype:
        return one_at_a_time(tensor.astype)(dtype)
    tensor.stored = array.reshape(-1)[:1]  # an np.memmap knows its mapping, and its copy in a pickle has none
    return tensor


def release(tree):
    """Give back the memory of parameters that are mapped from files; they stay usable, and are read again when used."""
    stored = (getattr(leaf, "stored", None) for leaf in flatten(tree).values())
    for mapping in {getattr(array, "_mmap", None) for array in stored} - {None}:
        if hasattr(mmap, "MADV_DONTNEED"):
            mapping.madvise(mmap.MADV_DONTNEED)


def in_own_memory(array):
    """A copy as a Tensor whose memory goes back with its last reference in Python; what shares it reads zeros then.

    For arguments of compiled functions: MindSpore would keep them until the function's next call.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return Tensor.from_numpy(array)
    pages = mmap.mmap(-1, array.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)  # as NumPy does for its own: to be given a page takes longer than to fill it
    own = np.frombuffer(pages, array.dtype).reshape(array.shape)
    own[...] = array
    tensor = Tensor.from_numpy(own)
    weakref.finalize(tensor, pages.madvise, mmap.MADV_DONTNEED)
    return tensor


def random_params(cfg, seed):
    """A parameter tree of cfg's architecture with random values: the shapes and the cost of the real one, no music."""
    rng = np.random.default_rng(seed)
    return {model: nest({name: parameter(array, cfg) for name, array in random_arrays(shapes, rng)})
            for model, shapes in param_shapes(cfg).items()}


def load_params(cfg):
    """{model: nested dict of Tensors} from the folder cfg["weights"], or `random_params` with seed 0 for "random".

    Tensors may stay mapped from the files: leave those unchanged while the parameters are in use. Points MindSpore at
    cfg["device"] for the rest of the process. Raises InputError if a file is missing, cut or unreadable, or if a tensor
    is missing, unexpected, of another shape or type than the configuration asks for, or not finite.
    """
    if cfg["weights"] == RANDOM:
        return random_params(cfg, seed=0)
    use_device(cfg)
    checked, params, broken = check_weights(cfg), {}, []
    with ThreadPoolExecutor() as pool:  # the time goes into touching memory, which NumPy does outside Python's lock
        for model in [*checked]:
            stored, sources = checked.pop(model)  # so that no file stays mapped of which nothing is shared

            def load(name):
                arrays = [as_float32(stored[source]) for source in sources[name]]
                array = arrays[0] if len(arrays) == 1 else fold_weight_norm(*arrays)
                if not np.isfinite(array).all():
                    broken.append(f"{pathlib.Path(cfg['weights']) / model}: {name}")
                return array

            arrays = pool.map(load, sources)
            # not in the pool: MindSpore sometimes dies when several threads convert a dtype
            params[model] = nest({name: parameter(array, cfg) for name, array in zip(sources, arrays)})
            release(params[model])
    if broken:
        raise InputError(f"weights: NaN or Inf in {listed(sorted(broken))}")
    return params


# ------------------------------------------------------------------------------------------------------------- saving

def config_files(cfg):
    """{file: contents} that make diffusers and transformers build cfg: cfg, IMPLEMENTED, and what follows from cfg."""
    text, extractor, levels = cfg["text_encoder"], cfg["feature_extractor"], len(cfg["vae"]["block_out_channels"])
    projection = {"projection_dim": text["projection_dim"]}
    follows = {
        "text_encoder.text_config": projection,
        "text_encoder.audio_config": projection,
        "unet": {"cross_attention_dim": cfg["unet"]["block_out_channels"]},
        "vae": {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels},
        "vocoder": {"model_type": "hifigan"},
        "feature_extractor": {"max_length_s": extractor["nb_max_samples"] // extractor["sampling_rate"]}}

    def stated(name, section):
        own = {key: stated(f"{name}.{key}", value) if isinstance(value, dict) else value
               for key, value in section.items()}
        return {**IMPLEMENTED.get(name, {}), **own, **follows.get(name, {})}

    files = {path: stated(section, cfg[section]) for section, path in CONFIG_FILES.items()}
    scheduler = next(kind for kind, name in SCHEDULER_NAMES.items() if name == cfg["sampling"]["scheduler"])
    files[CONFIG_FILES["schedule"]] |= {**IMPLEMENTED[scheduler], "_class_name": scheduler}
    for model in MODELS:
        library, name = CLASSES[model]
        files[CONFIG_FILES[model]] |= {"_class_name": name} if library == "diffusers" else {"architectures": [name]}
    index = {"_class_name": "MusicLDMPipeline", **CLASSES, "scheduler": ("diffusers", scheduler)}
    return {**files, "model_index.json": index,
            "tokenizer/tokenizer_config.json": {"tokenizer_class": CLASSES["tokenizer"][1],
                                                "model_max_length": load_vocabulary(cfg)[3]}}


def clap_buffers(cfg):
    """transformers' integer buffers. Without one it draws the weights beside it anew (`_initialize_missing_keys`)."""
    prefix, index = "audio_model.audio_encoder", layers.relative_positions(cfg["audio_config"]["window_size"])
    positions = np.arange(cfg["text_config"]["max_position_embeddings"])[None]
    return {"text_model.embeddings.position_ids": positions,
            "text_model.embeddings.token_type_ids": np.zeros_like(positions),
            f"{prefix}.batch_norm.num_batches_tracked": np.array(0),
            **{f"{prefix}.layers.{i}.blocks.{j}.attention.self.relative_position_index": index
               for i, depth in enumerate(cfg["audio_config"]["depths"]) for j in range(depth)}}


def checked_tree(cfg, params, may_be_prepared=False):
    """A tree as {"model.name": Tensor}, checked against cfg; may_be_prepared: its UNet, by layers.prepared_weight."""
    shapes = flatten(param_shapes(cfg))
    flat = {name: x if isinstance(x, Tensor) and x.is_floating_point()
            else f"{type(x).__name__} {getattr(x, 'dtype', '')}".strip() for name, x in flatten(params).items()}
    for name in [name for name in shapes if may_be_prepared and name.startswith("unet.") and len(shapes[name]) == 4]:
        if getattr(flat.get(name), "shape", None) in layers.prepared_shapes(shapes[name]):
            shapes[name] = flat[name].shape
    check_shapes(shapes, flat, "params")
    return flat


def checked_arrays(cfg, params, dtype):
    """{model: {name: array of `dtype`}} as files hold them; an InputError if there are none."""
    shapes, flat = param_shapes(cfg), checked_tree(cfg, params)
    with np.errstate(over="ignore"):  # told below
        arrays = {model: {name: flat[f"{model}.{name}"].asnumpy().astype(dtype, order="C", copy=False)
                          for name in shapes[model]} for model in shapes}
    broken = [f"{model}.{name}" for model in arrays for name, x in arrays[model].items() if not np.isfinite(x).all()]
    if broken:
        raise InputError(f"params: NaN or Inf in {dtype}: {listed(broken)}")
    return arrays


def save_params(cfg, params, folder, dtype="float32", vocabulary=None):
    """Write a checkpoint that load_params and diffusers' MusicLDMPipeline.from_pretrained read: all of it or nothing.

    params: a tree such as load_params(cfg) returns, of any float dtype
    folder: a new or an empty one
    dtype: "float32" or "float16"
    vocabulary: another one, the first two of what `load_vocabulary` returns; None keeps the files of cfg["weights"]
    Raises InputError for a tree that is not of cfg's architecture or not finite in `dtype`, a folder that holds
    something, and one that cannot be written.
    """
    if dtype not in ("float32", "float16"):
        raise InputError(f"dtype is {shown(dtype)}; valid: float32, float16")
    folder = pathlib.Path(folder).resolve()
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        if os.path.exists(folder) and os.listdir(folder):
            raise InputError(f"folder {folder} is not empty; valid: a new or an empty one")
        arrays = checked_arrays(cfg, params, dtype)
        arrays["text_encoder"] |= clap_buffers(cfg["text_encoder"])
        contents, tokenizer = config_files(cfg), tokenizer_files(cfg, vocabulary)
        if TOKENIZER_FILES[0] not in tokenizer:  # RobertaTokenizer wants it
            contents["model_index.json"]["tokenizer"] = ("transformers", "RobertaTokenizerFast")
        texts = {**{name: json.dumps(content, indent=2) for name, content in contents.items()}, **tokenizer}
        part.mkdir()
        for name, text in texts.items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_text(text, encoding="utf-8")
        for model, name in MODELS.items():
            data = safetensors.numpy.save(arrays[model], {"format": "pt"})  # transformers refuses a file without
            (part / model / f"{name}.safetensors").write_bytes(data)
        part.rename(folder)
    except OSError as error:
        raise InputError(f"folder {folder} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
