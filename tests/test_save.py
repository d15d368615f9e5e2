"""Saved checkpoints against the files that diffusers and transformers wrote (golden/checkpoint)."""
import json
import pathlib

import mindspore
import numpy as np
import pytest
from conftest import GOLDEN, golden_config
from safetensors.numpy import load_file

import musicldm
import weights
from weights import InputError

CHECKPOINT = GOLDEN / "checkpoint"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def replaced(tree, path, value):
    """A copy of a parameter tree with another value at a path; None removes it."""
    key, *rest = path
    new = replaced(tree.get(key, {}), rest, value) if rest else value
    return {**{name: x for name, x in tree.items() if name != key}, **({} if new is None else {key: new})}


def test_files_equal_those_of_diffusers_and_transformers(tmp_path):
    """Byte for byte, twice; with their integer buffers."""
    params = weights.load_params(golden_config())
    for name in ("first", "second"):
        weights.save_params(golden_config(), params, tmp_path / name)
    saved = contents(tmp_path / "first")
    assert contents(tmp_path / "second") == saved
    expected = contents(CHECKPOINT)
    assert saved.keys() == expected.keys()
    assert [name for name in saved if name.endswith(("safetensors", ".txt")) and saved[name] != expected[name]] == []
    assert json.loads(saved["tokenizer/vocab.json"]) == json.loads(expected["tokenizer/vocab.json"])


def test_config_files_agree_with_those_of_diffusers_and_transformers(tmp_path, params):
    """All that is stated is stated there too, with the same value, but for a key that those files leave open."""
    weights.save_params(golden_config(), params, tmp_path / "saved")
    files = [name for name in contents(tmp_path / "saved") if name.endswith(".json") and "vocab" not in name]
    differences = {}
    for name in files:
        stated, expected = (weights.flatten(json.loads((folder / name).read_text()))
                            for folder in (tmp_path / "saved", CHECKPOINT))
        differences |= {f"{name}: {key}": (value, expected.get(key, "absent")) for key, value in stated.items()
                        if value != expected.get(key, "absent")}
    assert differences == {"text_encoder/config.json: text_config.pad_token_id": (1, "absent")}  # 1 is the default
    assert len(files) == 9


@pytest.mark.parametrize("source, sample_size", [(CHECKPOINT, None), ("random", 51)])
def test_round_trip(tmp_path, source, sample_size):
    small = ["unet.block_out_channels=[32,32,32,32]", "vae.block_out_channels=[32,32,32]",
             "vocoder.upsample_initial_channel=64", "text_encoder.text_config.vocab_size=300",
             "text_encoder.text_config.num_hidden_layers=1", "text_encoder.audio_config.depths=[1,1,1,1]",
             "unet.attention_head_dim=[2,2,4,8]", "unet.sample_size=51", "schedule.beta_end=0.02"]
    cfg = musicldm.load_config(weights=source, overrides=small if source == "random" else [])
    params = weights.load_params(cfg)
    weights.save_params(cfg, params, tmp_path / "saved")
    again = musicldm.load_config(weights=tmp_path / "saved")
    assert json.loads((tmp_path / "saved/unet/config.json").read_text())["sample_size"] == sample_size
    assert {**again, "sampling": cfg["sampling"], "weights": cfg["weights"]} == cfg
    assert weights.load_vocabulary(again) == weights.load_vocabulary(cfg)
    before, after = weights.flatten(params), weights.flatten(weights.load_params(again))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name].asnumpy(), after[name].asnumpy()) for name in before)


def test_float16(tmp_path, params):
    weights.save_params(golden_config(), params, tmp_path / "saved", "float16")
    for model, name in weights.MODELS.items():
        saved, expected = (load_file(folder / model / f"{name}.safetensors")
                           for folder in (tmp_path / "saved", CHECKPOINT))
        assert saved.keys() == expected.keys()
        for key, x in expected.items():
            assert np.array_equal(saved[key], x if x.dtype == np.int64 else x.astype(np.float16))
            assert saved[key].dtype == (np.int64 if x.dtype == np.int64 else np.float16)


def test_half_precision_parameters_are_saved_as_they_are(tmp_path, params):
    half = {model: weights.nest({name: mindspore.Tensor(x.asnumpy().astype(np.float16))
                                 for name, x in weights.flatten(tree).items()}) for model, tree in params.items()}
    weights.save_params(golden_config(), half, tmp_path / "saved")
    saved, expected = (load_file(folder / "vocoder/model.safetensors") for folder in (tmp_path / "saved", CHECKPOINT))
    assert all(np.array_equal(saved[key], x.astype(np.float16).astype(np.float32)) for key, x in expected.items())


BIAS = ("unet", "conv_in", "bias")


def vector(value, dtype=np.float32, size=12):
    return mindspore.Tensor(np.full(size, value, dtype))


@pytest.mark.parametrize("change, dtype, message", [
    (lambda p: replaced(p, BIAS, None), "float32", "1 missing: unet.conv_in.bias$"),
    (lambda p: replaced(p, ("unet", "more.0", "bias"), p["unet"]["conv_in"]["bias"]), "float32",
     "unexpected: unet.more.0.bias"),
    (lambda p: replaced(replaced(p, BIAS, vector(1, size=3)), ("vae", "quant_conv", "bias"), None), "float32",
     r"1 missing: vae.quant_conv.bias; 1 of the wrong shape: unet.conv_in.bias \(3,\) instead of \(12,\)"),
    (lambda p: replaced(p, BIAS, vector(1, np.int32)), "float32", "not floating-point: .*Tensor Int32"),
    (lambda p: replaced(p, BIAS, np.ones(12, np.float32)), "float32", r"unet.conv_in.bias \(ndarray float32\)"),
    (lambda p: {model: p[model] for model in ("unet", "vae")}, "float32",
     "missing: text_encoder.logit_scale_a, .* and 220 more$"),
    (lambda p: replaced(p, BIAS, vector(7e4)), "float16", "NaN or Inf in float16: unet.conv_in.bias$"),
    (lambda p: replaced(p, BIAS, vector(np.nan)), "float32", "NaN or Inf in float32: unet.conv_in.bias"),
    (lambda p: None, "float32", "missing: .*1 unexpected"),
    (lambda p: p, "bfloat16", "dtype is 'bfloat16'; valid: float32, float16"),
])
def test_unusable_parameters(tmp_path, params, change, dtype, message):
    with pytest.raises(InputError, match=message) as error:
        weights.save_params(golden_config(), change(params), tmp_path / "saved", dtype)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_only_an_empty_folder_is_replaced(tmp_path, params):
    used, file, empty, link = (tmp_path / name for name in ("used", "file", "empty", "link"))
    used.mkdir(), empty.mkdir(), link.symlink_to(empty)
    (used / "mine").write_text("mine"), file.write_text("mine")
    for folder, message in [(used, "not empty; valid: a new or an empty one"), (file, "Not a directory"),
                            (file / "below", "Not a directory"), (tmp_path / "no" / "folder", "No such file")]:
        with pytest.raises(InputError, match=message):
            weights.save_params(golden_config(), params, folder)
    weights.save_params(golden_config(), params, link)
    assert (empty / "model_index.json").is_file() and len(list(tmp_path.iterdir())) == 4
    assert contents(used) == {"mine": b"mine"} and file.read_text() == "mine"


@pytest.mark.parametrize("raised, expected, message", [
    (OSError(28, "No space left on device"), InputError, "saved cannot be written: No space left on device$"),
    (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
])
def test_nothing_is_left_of_an_interrupted_save(tmp_path, monkeypatch, params, raised, expected, message):
    """The third file of weights cannot be written."""
    write, written = pathlib.Path.write_bytes, []

    def write_bytes(path, data):
        if len(written) == 2:
            raise raised
        written.append(path.name)
        write(path, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
    with pytest.raises(expected, match=message):
        weights.save_params(golden_config(), params, tmp_path / "saved")
    assert len(written) == 2 and not list(tmp_path.iterdir())
