import functools
import gc
import json
import os
import pathlib
import socket
import types
from concurrent.futures import ThreadPoolExecutor

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
ENVIRONMENT = dict(os.environ)  # for subprocesses: a test that sets variables may run beside the one that starts them


def free_port():
    """For msrun's --master_port, whose default may be taken."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


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


def pytest_collection_finish():
    gc.freeze()  # compiling a graph collects often: what is loaded by now need not be looked at each time


def pytest_configure(config):
    config.addinivalue_line("markers", "beside(functions): see the fixture of this name")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)  # last, so that they need not wait


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """beside(function) -> what function(home) returned: one of those that the session's tests name by @mark.beside.

    They start subprocesses that take long. They run one after the other, in the order of the tests, on half of the
    processors, while the tests run on the others: MindSpore waits for work by spinning, so two processes on the same
    processors would slow each other several times.
    """
    functions = dict.fromkeys(function for item in request.session.items for mark in item.iter_markers("beside")
                              for function in mark.args[0])
    home, place, ours = tmp_path_factory.mktemp("beside"), lambda processors: None, ()
    theirs = ours
    if functions and hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) > 1:
        processors = sorted(os.sched_getaffinity(0))
        ours, theirs = processors[::2], processors[1::2]
        place = functools.partial(os.sched_setaffinity, 0)  # the calling thread, and what it starts
    place(ours)
    with ThreadPoolExecutor(1, initializer=place, initargs=(theirs,)) as pool:
        futures = {function: pool.submit(function, home) for function in functions}
        yield lambda function: futures[function].result()
        pool.shutdown(cancel_futures=True)


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
