"""Checkpoints as they occur: dtypes, shards, weight norm, damage; and the exact size of the published architecture."""
import copy
import json
import math
import mmap
import os
import pathlib
import pickle
import re
import shutil
import sys
import types

import numpy as np
import pytest
from conftest import CASES, GOLDEN, golden_config, relative_error
from safetensors.numpy import load_file, save_file

import musicldm
import weights
from weights import InputError

VOCODER = "vocoder/model.safetensors"
BUFFERS = ("vocoder.mean", "vocoder.scale", "running_mean", "running_var")


@pytest.fixture
def checkpoint(tmp_path):
    return pathlib.Path(shutil.copytree(GOLDEN / "checkpoint", tmp_path / "checkpoint"))


def load(folder):
    return weights.load_params(musicldm.load_config(musicldm.DEFAULT_CONFIG, folder))


def leaves(tree, prefix=""):
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value.asnumpy())]


def assert_same(tree, expected, tolerance=0.0):
    tree, expected = dict(leaves(tree)), dict(leaves(expected))
    assert tree.keys() == expected.keys()
    assert all(np.allclose(tree[name], expected[name], rtol=tolerance, atol=tolerance / 100) for name in tree)


def rewrite(path, change):
    tensors = load_file(path)
    save_file(change(dict(tensors)), path)


def test_parameter_counts_of_the_published_architecture():
    shapes = weights.param_shapes(musicldm.load_config(musicldm.DEFAULT_CONFIG, "random"))
    counts = {model: sum(math.prod(shape) for name, shape in tensors.items() if not f"{model}.{name}".endswith(BUFFERS))
              for model, tensors in shapes.items()}
    assert counts == {"unet": 185_036_552, "vae": 55_376_873, "vocoder": 55_264_897, "text_encoder": 193_913_882}
    assert shapes["vocoder"]["mean"] == shapes["vocoder"]["scale"] == (64,)


def test_tree_has_the_names_of_the_file(params):
    for model, name in weights.MODELS.items():
        stored = load_file(GOLDEN / "checkpoint" / model / f"{name}.safetensors")
        assert {path for path, _ in leaves(params[model])} == {key for key in stored if stored[key].dtype == np.float32}
    block = params["unet"]["down_blocks.1"]["attentions.0"]["transformer_blocks.0"]
    assert np.array_equal(block["ff"]["net.0.proj"]["bias"],
                          load_file(GOLDEN / "checkpoint/unet/diffusion_pytorch_model.safetensors")
                          ["down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.bias"])


@pytest.mark.parametrize("dtype, tolerance", [(np.float16, 1e-3), (np.float64, 0)])
def test_other_float_types(checkpoint, params, dtype, tolerance):
    rewrite(checkpoint / VOCODER, lambda tensors: {name: x.astype(dtype) for name, x in tensors.items()})
    assert_same(load(checkpoint)["vocoder"], params["vocoder"], tolerance)


def test_bfloat16(checkpoint, params):
    """The file is written by hand from the format's description, as NumPy has no bfloat16."""
    tensors, header, data = load_file(checkpoint / VOCODER), {}, b""
    for name, x in tensors.items():
        bits = (np.ascontiguousarray(x).view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": list(x.shape), "data_offsets": [len(data), len(data) + len(bits)]}
        data += bits
    text = json.dumps(header).encode()
    (checkpoint / VOCODER).write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert_same(load(checkpoint)["vocoder"], params["vocoder"], 2 ** -7)


@pytest.mark.parametrize("index", [0, 1])
def test_weight_norm_is_folded(checkpoint, params, index):
    def split(tensors):
        g_name, v_name = weights.WEIGHT_NORM[index]
        for name in [name for name in tensors if name.endswith(".weight")]:
            x, stem = tensors.pop(name), name[:-len("weight")]
            length = np.linalg.norm(x.reshape(len(x), -1), axis=1).reshape(-1, *[1] * (x.ndim - 1))
            tensors |= {stem + g_name: length, stem + v_name: x * 3}
        return tensors

    rewrite(checkpoint / VOCODER, split)
    assert_same(load(checkpoint)["vocoder"], params["vocoder"], 1e-5)


def test_shards_with_an_index(checkpoint, params):
    path = checkpoint / VOCODER
    tensors = load_file(path)
    path.unlink()
    parts = {"model-00001-of-00002.safetensors": list(tensors)[::2],
             "model-00002-of-00002.safetensors": list(tensors)[1::2]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, path.with_name(name))
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load(checkpoint)["vocoder"], params["vocoder"])
    path.with_name("model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors is missing"):
        load(checkpoint)


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_a_variant(checkpoint, params, sharded):
    """As diffusers' save_pretrained(variant="fp16") names them."""
    for model, name in weights.MODELS.items():
        path, weight_map = checkpoint / model / f"{name}.safetensors", {}
        tensors = {key: x.astype(np.float16) if x.dtype == np.float32 else x for key, x in load_file(path).items()}
        path.unlink()
        for i in range(2) if sharded else ():
            part = f"{name}.fp16-0000{i + 1}-of-00002.safetensors"
            keys = list(tensors)[i::2]
            save_file({key: tensors[key] for key in keys}, path.with_name(part))
            weight_map |= dict.fromkeys(keys, part)
        if sharded:
            path.with_name(f"{name}.safetensors.index.fp16.json").write_text(json.dumps({"weight_map": weight_map}))
        else:
            save_file(tensors, path.with_name(f"{name}.fp16.safetensors"))
    tree = load(checkpoint)
    for model in weights.MODELS:
        assert_same(tree[model], params[model], 1e-3)
    whole = GOLDEN / "checkpoint" / VOCODER
    shutil.copy(whole, checkpoint / VOCODER)  # what is not rounded is preferred
    assert_same(load(checkpoint)["vocoder"], params["vocoder"])


def test_old_names_of_the_attention_in_a_vae(checkpoint, params):
    """As older versions of diffusers wrote them, and it reads them today (`_convert_deprecated_attention_blocks`)."""
    def rename(tensors):
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        named = {re.sub(r"(?<=attentions\.0\.)(to_q|to_k|to_v|to_out\.0)(?=\.)", lambda m: old[m[0]], name): x
                 for name, x in tensors.items()}
        assert len(named.keys() - tensors.keys()) == 16
        return named

    rewrite(checkpoint / "vae/diffusion_pytorch_model.safetensors", rename)
    assert_same(load(checkpoint)["vae"], params["vae"])


def share_in_memory(array):
    """Of the pages that hold an array: 1.0 if they are all in this process's memory."""
    if not os.path.exists("/proc/self/pagemap"):
        pytest.skip("only Linux tells what is in memory")
    first, last = array.ctypes.data // mmap.PAGESIZE, (array.ctypes.data + array.nbytes - 1) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb") as file:  # of 8 bytes a page, the highest bit tells
        file.seek(8 * first)
        return (np.frombuffer(file.read(8 * (last + 1 - first)), "<u8") >> 63).mean()


def test_released_parameters_leave_memory_and_come_back(checkpoint):
    tree, stored = load(checkpoint)["vocoder"], load_file(checkpoint / VOCODER)
    for _ in range(2):
        assert all(share_in_memory(array) == 0 for _, array in leaves(tree))
        for name, array in leaves(tree):
            assert np.array_equal(array, stored[name]) and share_in_memory(array) == 1
        weights.release(tree)


def test_memory_of_its_own_goes_with_the_tensor():
    array = np.arange(2 ** 20, dtype=np.float32).reshape(16, -1)
    tensor = weights.in_own_memory(array)
    own = tensor.asnumpy()
    assert np.array_equal(own, array) and share_in_memory(own) == 1
    del tensor
    assert share_in_memory(own) == 0


def test_random_params_are_seeded_and_shaped(params):
    cfg = golden_config()
    first, second, other = (weights.random_params(cfg, seed) for seed in (3, 3, 4))
    assert_same(first, second)
    shapes = [{name: x.shape for name, x in leaves(tree)} for tree in (first, params)]
    assert shapes[0] == shapes[1]
    weight, another = (tree["unet"]["conv_in"]["weight"].asnumpy() for tree in (first, other))
    assert not np.array_equal(weight, another)


def changed(key, value):
    def change(checkpoint):
        path = checkpoint / key.split(":")[0]
        config = json.loads(path.read_text())
        node = config
        *sections, name = key.split(":")[1].split(".")
        for section in sections:
            node = node[section]
        node[name] = value
        path.write_text(json.dumps(config))
    return change


def damaged(path, change):
    return lambda checkpoint: rewrite(checkpoint / path, change)


def without(*names):
    return lambda tensors: {name: x for name, x in tensors.items() if name not in names}


def replaced(name, value):
    return lambda tensors: {**tensors, name: value}


def cut(path, keep):
    return lambda checkpoint: (checkpoint / path).write_bytes((checkpoint / path).read_bytes()[:keep])


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 76628\n"


def audio_ldm(checkpoint):
    """AudioLDM's folder: CLAP's text tower alone, and no feature extractor."""
    changed("model_index.json:_class_name", "AudioLDMPipeline")(checkpoint)
    shutil.rmtree(checkpoint / "feature_extractor")


@pytest.mark.parametrize("damage, message", [
    (lambda c: shutil.rmtree(c), "no folder .*valid: a folder in diffusers' layout, a hub id"),
    (lambda c: shutil.rmtree(c / "unet"), "is incomplete, missing: .*unet/config.json"),
    (lambda c: (c / "tokenizer/merges.txt").unlink(), "missing: .*merges.txt"),
    (lambda c: (c / VOCODER).unlink(), "vocoder/model.safetensors is missing"),
    (lambda c: (c / "unet/config.json").write_text("{"), "cannot read .*unet/config.json"),
    (lambda c: (c / "unet/config.json").write_text("[1]"), "must hold a JSON object"),
    (lambda c: [(c / "tokenizer/tokenizer_config.json").unlink(),
                (c / "tokenizer/vocab.json").write_text('{"<s>": 0}')], "lacks the tokens <pad>"),
    (cut(VOCODER, -4), "cannot read .*vocoder/model.safetensors"), (cut(VOCODER, 100), "cannot read .*vocoder"),
    (cut(VOCODER, 0), "cannot read .*vocoder"),
    (damaged(VOCODER, without("conv_pre.bias", "upsampler.1.weight")), "2 missing: conv_pre.bias, upsampler.1.weight"),
    (damaged(VOCODER, replaced("extra.weight", np.ones(3, np.float32))), "1 unexpected: extra.weight"),
    (damaged(VOCODER, replaced("conv_pre.bias", np.ones(3, np.float32))), r"conv_pre.bias \(3,\) instead of \(24,\)"),
    (damaged(VOCODER, replaced("conv_pre.bias", np.ones(24, np.int64))), r"not floating-point: conv_pre.bias \(I64\)"),
    (damaged(VOCODER, replaced("conv_pre.bias", np.full(24, np.nan, np.float32))),
     "NaN or Inf in .*vocoder: conv_pre.bias"),
    (lambda c: (c / VOCODER).rename(c / "vocoder/pytorch_model.bin"),
     "vocoder/model.safetensors is missing, and pytorch_model.bin could run code .*valid: .*save_pretrained"),
    (lambda c: (c / VOCODER).write_text(LFS_POINTER), "model.safetensors is a Git LFS pointer.*run 'git lfs pull'"),
    (lambda c: (c / "tokenizer/vocab.json").write_text(LFS_POINTER), "vocab.json is a Git LFS pointer"),
    (changed("model_index.json:_class_name", "StableDiffusionPipeline"),
     "model_index.json is of 'StableDiffusionPipeline'; valid: a MusicLDMPipeline"),
    (audio_ldm, "model_index.json is of 'AudioLDMPipeline'; valid: a MusicLDMPipeline"),
    (lambda c: (c / "model_index.json").write_text("[]"), r"model_index.json is of \[\]"),
    (changed("model_index.json:tokenizer", ["transformers", "T5Tokenizer"]),
     r"tokenizer is \['transformers', 'T5Tokenizer'\]; implemented: transformers's RobertaTokenizer, Roberta"),
    (changed("model_index.json:scheduler", ["diffusers", "DDPMScheduler"]),
     r"scheduler is \['diffusers', 'DDPMScheduler'\]; implemented: diffusers's DDIMScheduler, DPMSolver"),
    (lambda c: [(c / "model_index.json").unlink(), changed("scheduler/scheduler_config.json:_class_name", "X")(c)],
     "_class_name is 'X'; implemented: DDIMScheduler, DPMSolver"),
    (changed("text_encoder/config.json:model_type", "clap_text_model"),
     "model_type is 'clap_text_model'; implemented: 'clap'"),
    (changed("unet/config.json:act_fn", "relu"), "act_fn is 'relu'; implemented: 'silu'"),
    (changed("scheduler/scheduler_config.json:prediction_type", "sample"),
     "schedule.prediction_type is 'sample'; valid: epsilon, v_prediction"),
    (changed("text_encoder/config.json:text_config.hidden_act", "relu"), "hidden_act is 'relu'"),
    (changed("vae/config.json:scaling_factor", "big"), "vae.scaling_factor is 'big'; valid: a finite number"),
])
def test_unusable_checkpoints(checkpoint, damage, message):
    damage(checkpoint)
    with pytest.raises(InputError, match=message) as error:
        load(checkpoint)
    assert "\n" not in str(error.value)


DEFAULTS = json.loads((GOLDEN / "defaults.json").read_text())  # of the reference's classes, by section
DEFAULTS["text_encoder"]["model_type"] = "clap"
for kind in weights.SCHEDULER_NAMES:  # where a class has no such key, what another takes that is made of its file
    DEFAULTS[kind] = {"set_alpha_to_one": True, "clip_sample": False, "thresholding": False,
                      "rescale_betas_zero_snr": False, **DEFAULTS[kind]}


def with_scheduler(checkpoint, kind):
    """Put a scheduler in the place of the checkpoint's, as diffusers saves it."""
    stated = json.loads((GOLDEN / "schedulers.json").read_text())[kind]
    (checkpoint / "scheduler/scheduler_config.json").write_text(json.dumps(stated))
    changed("model_index.json:scheduler", ["diffusers", kind])(checkpoint)


@pytest.mark.parametrize("name", weights.IMPLEMENTED)
def test_a_key_that_is_left_out_has_the_default_of_the_reference(checkpoint, name):
    """Or is refused, if that default is not what the file stated: where it is not implemented, or fits no tensors."""
    section, _, inner = name.partition(".")
    if name in weights.SCHEDULER_NAMES:
        with_scheduler(checkpoint, name)
        section = "schedule"
    path, whole = checkpoint / weights.CONFIG_FILES[section], musicldm.load_config(weights=checkpoint)
    text, held = path.read_text(), whole[section][inner] if inner else whole[section]
    for key in json.loads(text)[inner] if inner else json.loads(text):
        stated, default = json.loads(text), DEFAULTS[name].get(key)
        value = (stated[inner] if inner else stated).pop(key)
        path.write_text(json.dumps(stated))
        try:
            cfg = musicldm.load_config(weights=checkpoint)
        except InputError:
            assert value != default, key
            continue
        assert weights.IMPLEMENTED[name].get(key, default) == default, key
        if f"{name}.{key}" in DEFAULTS:
            default = {inner_key: DEFAULTS[f"{name}.{key}"][inner_key] for inner_key in held[key]}
        wanted = {**held, **({key: default} if key in held else {})}
        if inner:
            wanted = {**whole[section], inner: wanted}
        assert cfg == {**whole, section: wanted}, key


with np.load(GOLDEN / "left_out.npz") as file:
    LEFT_OUT = dict(file)


@pytest.mark.parametrize("name", sorted(LEFT_OUT.keys() - {"in_latents"}))
def test_audio_without_a_key_equals_the_reference(checkpoint, params, name):
    """make_golden.py's left_out()."""
    path, key = name.split(":")
    stated = json.loads((checkpoint / path).read_text())
    del stated[key]
    (checkpoint / path).write_text(json.dumps(stated))
    cfg = musicldm.load_config(weights=checkpoint)
    audio = musicldm.generate(cfg, CASES["guided"]["prompt"], params, num_inference_steps=3, audio_length_in_s=0.32,
                              negative_prompt=CASES["guided"]["negative_prompt"], latents=LEFT_OUT["in_latents"])
    assert relative_error(audio[:, :1920], LEFT_OUT[name]) < 2e-4


@pytest.mark.parametrize("name, key, default", [
    ("scheduler/scheduler_config.json", "clip_sample", "True"),
    ("scheduler/scheduler_config.json", "beta_schedule", "'linear'"),
    ("feature_extractor/preprocessor_config.json", "truncation", "'fusion'"),
    ("unet/config.json", "class_embed_type", "None")])
def test_a_default_that_is_not_implemented_is_refused_as_if_it_were_stated(checkpoint, name, key, default):
    stated = json.loads((checkpoint / name).read_text())
    del stated[key]
    (checkpoint / name).write_text(json.dumps(stated))
    with pytest.raises(InputError, match=f"{name}: {key} is {default}, the reference's default; implemented: "):
        load(checkpoint)


def test_what_a_config_file_leaves_to_the_checkpoint_is_not_taken_from_it(checkpoint, tmp_path):
    """The published values in config.yaml are for random weights; a checkpoint's own files are complete."""
    (tmp_path / "my.yaml").write_text("vae: {scaling_factor: 3.0}\nsampling: {seed: 5}")
    stated = json.loads((checkpoint / "vae/config.json").read_text())
    del stated["scaling_factor"]
    (checkpoint / "vae/config.json").write_text(json.dumps(stated))
    cfg = musicldm.load_config(tmp_path / "my.yaml", checkpoint)
    assert cfg["vae"]["scaling_factor"] == 0.18215 and cfg["sampling"]["seed"] == 5
    assert musicldm.load_config(weights="random")["vae"]["scaling_factor"] == 1.075324296951294


@pytest.mark.parametrize("kind, name", weights.SCHEDULER_NAMES.items())
def test_the_scheduler_that_a_checkpoint_was_saved_with_is_the_default(checkpoint, params, kind, name, tmp_path):
    with_scheduler(checkpoint, kind)
    cfg = musicldm.load_config(weights=checkpoint)
    assert cfg["sampling"]["scheduler"] == name and cfg["schedule"] == golden_config()["schedule"]
    with np.load(GOLDEN / "schedulers.npz") as golden:
        options = {"num_inference_steps": 4, "audio_length_in_s": 0.32, "output_type": "mel",
                   "negative_prompt": CASES["guided"]["negative_prompt"], "latents": golden["in_latents"],
                   "noise": golden["in_latent_noise"]}
        mel = musicldm.generate(cfg, CASES["guided"]["prompt"], params, **options)
        assert relative_error(mel, golden[f"{name}.mel"]) < 3e-5
    assert musicldm.load_config(weights=checkpoint, overrides=["sampling.scheduler=heun"])["sampling"][
        "scheduler"] == "heun"
    weights.save_params(cfg, params, tmp_path / "saved")
    saved, expected = (json.loads((folder / "scheduler/scheduler_config.json").read_text())
                       for folder in (tmp_path / "saved", checkpoint))
    assert {key: expected[key] for key in saved} == saved and saved["_class_name"] == kind
    assert json.loads((tmp_path / "saved/model_index.json").read_text())["scheduler"] == ["diffusers", kind]


@pytest.mark.parametrize("kind, key, value", [
    ("DPMSolverMultistepScheduler", "use_karras_sigmas", True), ("DPMSolverMultistepScheduler", "solver_order", 3),
    ("PNDMScheduler", "skip_prk_steps", False), ("EulerDiscreteScheduler", "timestep_spacing", "trailing"),
    ("LMSDiscreteScheduler", "use_beta_sigmas", True), ("EulerAncestralDiscreteScheduler", "clip_sample", True),
    ("HeunDiscreteScheduler", "use_karras_sigmas", True)])
def test_what_is_not_implemented_of_a_scheduler_is_refused(checkpoint, kind, key, value):
    with_scheduler(checkpoint, kind)
    changed(f"scheduler/scheduler_config.json:{key}", value)(checkpoint)
    with pytest.raises(InputError, match=f"scheduler_config.json: {key} is {value!r}; implemented: "):
        load(checkpoint)


def test_everything_wrong_is_listed_at_once(checkpoint):
    rewrite(checkpoint / VOCODER, without("conv_pre.bias"))
    (checkpoint / "vae/diffusion_pytorch_model.safetensors").unlink()
    rewrite(checkpoint / "unet/diffusion_pytorch_model.safetensors", without("conv_out.bias", "conv_in.weight"))
    every = "unet.*2 missing: conv_in.weight, conv_out.bias.*vae/.*is missing.*vocoder.*missing: conv_pre.bias"
    with pytest.raises(InputError, match=every):
        load(checkpoint)


def test_a_changed_configuration_changes_no_later_one(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("sampling: {seed: 3}")
    cfg = weights.load_config(path, "random")
    cfg["unet"]["block_out_channels"][0], cfg["vae"]["layers_per_block"] = 7, 7
    assert weights.load_config(path, "random")["unet"]["block_out_channels"] == [128, 256, 384, 640]
    assert weights.load_config(path, "random")["vae"]["layers_per_block"] == 2


def test_checkpoint_config_is_below_overrides_and_above_the_file(checkpoint):
    cfg = musicldm.load_config(musicldm.DEFAULT_CONFIG, checkpoint, ["vae.scaling_factor=1.5e5"])
    assert cfg["vae"]["scaling_factor"] == 150000.0 and cfg["vae"]["layers_per_block"] == 1
    assert cfg["unet"]["block_out_channels"] == [12, 8, 16] and cfg["sampling"]["num_inference_steps"] == 200


def test_parameters_can_be_pickled_and_copied(params):
    copies = pickle.loads(pickle.dumps(params)), copy.deepcopy(params)
    for tree in copies:
        weights.release(tree)  # of what is not mapped from a file nothing is released
        found, wanted = weights.flatten(tree), weights.flatten(params)
        assert [*found] == [*wanted]
        assert all(np.array_equal(found[name].asnumpy(), x.asnumpy()) for name, x in wanted.items())


def test_a_hub_id_without_huggingface_hub_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub.*unet/config.json"):
        musicldm.load_config(musicldm.DEFAULT_CONFIG, "ucsd-reach/musicldm")


@pytest.mark.parametrize("dtype, tolerance", [("float16", 2e-2), ("bfloat16", 5e-2)])
def test_half_precision(params, dtype, tolerance, monkeypatch):
    """bfloat16 on a CPU is float32 unless the processor has AMX and has not multiplied in float32 before, as here."""
    mel = np.random.default_rng(0).standard_normal((1, 32, 16)).astype(np.float32)
    whole, cfg = musicldm.vocode(golden_config(), mel, params), golden_config(f"dtype={dtype}")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")  # what it would set itself, and leave to the other tests
    result = musicldm.vocode(cfg, mel, weights.load_params(cfg))
    assert result.dtype == np.float32 and relative_error(result, whole) < tolerance


@pytest.mark.parametrize("device, current, number, expected", [
    ("auto", "CPU", "1", []), ("auto", "Ascend", None, []), ("auto", "Ascend", "1", [("Ascend", 1)]),
    ("Ascend", "CPU", "1", [("Ascend", 1)]), ("CPU", "Ascend", None, [("CPU",)])])
def test_each_process_of_msrun_takes_its_own_device(monkeypatch, device, current, number, expected):
    chosen = []
    monkeypatch.setattr(weights, "set_up_ascend", lambda hf32: None)
    monkeypatch.setattr(weights.mindspore, "get_context", lambda name: chosen[-1][0] if chosen else current)
    monkeypatch.setattr(weights.mindspore, "set_device", lambda *given: chosen.append(given))
    monkeypatch.delenv("DEVICE_ID", raising=False)
    if number:
        monkeypatch.setenv("DEVICE_ID", number)
    used = weights.use_device({"device": device, "dtype": "float32"})
    assert used == (current if device == "auto" else device) and chosen == expected
