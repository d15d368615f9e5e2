import json
import pathlib
import types

import mindspore
import numpy as np
import pytest

import layers
import musicldm
import weights

GOLDEN = pathlib.Path(__file__).with_name("golden")
CASES = json.loads((GOLDEN / "cases.json").read_text())
musicldm.SIZES = 1000  # all of the suite's graphs are kept: compiling them again would take minutes
STAGES = ("prompt_embeds", "step_latents", "mel", "audio")  # of make_golden.py


def golden_config(*overrides):
    return musicldm.load_config(musicldm.DEFAULT_CONFIG, GOLDEN / "checkpoint", overrides)


def case_config(name):
    case = CASES[name]
    overrides = [f"vocoder.normalize_before={str(case.get('normalize_before', False)).lower()}"]
    return golden_config(*overrides, *([f"unet.attention_head_dim={case['heads']}"] if "heads" in case else []))


def case_options(name):
    case = CASES[name]
    options = {"audio_length_in_s": case["height"] * 0.04, "num_inference_steps": case["steps"],
               "guidance_scale": case.get("guidance", 2.0), "eta": case.get("eta", 0.0),
               "negative_prompt": case.get("negative_prompt"), "latents": reference(name)["in_latents"]}
    return {**options, "noise": reference(name)["in_noise"]} if options["eta"] else options


def reference(name):
    """The stored arrays of one case of make_golden.py."""
    with np.load(GOLDEN / "arrays.npz") as file:
        return {key.split(".")[1]: file[key] for key in file.files if key.startswith(f"{name}.")}


def float32_distance(stage):
    """How far the reference in float32 is from itself in float64, in the worst of the cases.

    stage: "prompt_embeds", "step_latents", "mel" or "audio"
    """
    return max(float(reference(name)["from_float64"][STAGES.index(stage)]) for name in CASES)


def relative_error(result, expected):
    """Largest error over largest expected value: the measure of every parity bar."""
    assert result.shape == expected.shape
    return float(np.abs(result.astype(np.float64) - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="session")
def params():
    return weights.load_params(golden_config())


@pytest.fixture(scope="session", autouse=True)
def training(request, tmp_path_factory):
    """(folder, process) of test_training.py's runs, which start early, as they take long; None if no test has them."""
    modules = [item.module for item in request.session.items if {"runs", "corpus"} & {*item.fixturenames}]
    if not modules:
        yield None
        return
    home = tmp_path_factory.mktemp("training")
    process = modules[0].start_runs(home)
    yield home, process
    process.kill()


@pytest.fixture
def ascend(monkeypatch):
    """What an Ascend gets, on the CPU: the device says it is one. A list of (what was asked of it, with what)."""
    asked, named, to = [], mindspore.get_context, mindspore.Tensor.to

    def moved(tensor, place, *others, dtype=None):
        if not isinstance(place, str):
            return to(tensor, place, *others)
        asked.append(("to", place))
        return tensor if dtype is None else to(tensor, dtype)

    card = types.SimpleNamespace(name="Ascend910B4", total_memory=32 * 10 ** 9, free_memory=30 * 10 ** 9)
    monkeypatch.setattr(mindspore, "get_context", lambda name: "Ascend" if name == "device_target" else named(name))
    monkeypatch.setattr(mindspore.Tensor, "to", moved)
    monkeypatch.setattr(mindspore.hal, "get_device_properties", lambda number, device: card)
    for module, name in (("op_precision", "conv_allow_hf32"), ("op_precision", "matmul_allow_hf32"),
                         ("op_tuning", "op_compile")):
        monkeypatch.setattr(getattr(mindspore.device_context.ascend, module), name,
                            lambda value, name=name: asked.append((name, value)))
    monkeypatch.setattr(layers, "fast_convolution", None)
    monkeypatch.setattr(layers, "gathered_convolution", None)
    weights.set_up_ascend.cache_clear()
    yield asked
    weights.set_up_ascend.cache_clear()
