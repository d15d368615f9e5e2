"""What an Ascend gets, without one: every operator with its shapes against CANN's published limits, and a fake device.

`Recorder` runs the models with shapes in place of tensors, at the published sizes. That its shapes are MindSpore's is
tested first: every operator it recorded of the tiny checkpoint is computed by MindSpore.
"""
import collections
import contextlib
import functools
import itertools
import math
import pathlib
import types

import mindspore
import numpy as np
import pytest
import yaml
from conftest import golden_config
from mindspore import Tensor, ops

import layers
import musicldm
import weights
from weights import InputError

LIMITS = yaml.safe_load(pathlib.Path(__file__).with_name("ascend_limits.yaml").read_text(encoding="utf-8"))
BYTES = {mindspore.float32: 4, mindspore.int32: 4, mindspore.float16: 2, mindspore.bfloat16: 2}
Call = collections.namedtuple("Call", "name inputs numbers outputs")  # inputs and outputs are (shape, dtype)


class Shape:
    """A tensor's shape and dtype. It counts as memory while it lives, unless it is another view of `base`."""

    def __init__(self, recorder, shape, dtype, base=None):
        self.recorder, self.shape, self.dtype, self.base = recorder, tuple(map(int, shape)), dtype, base
        self.bytes = 0 if base is not None else math.prod(self.shape) * BYTES[dtype]
        recorder.live += self.bytes
        recorder.peak = max(recorder.peak, recorder.live)

    def __del__(self):
        self.recorder.live -= self.bytes

    def reshape(self, *shape):
        shape = shape[0] if isinstance(shape[0], tuple) else shape
        known = math.prod(size for size in shape if size != -1)
        shape = tuple(math.prod(self.shape) // known if size == -1 else size for size in shape)
        assert math.prod(shape) == math.prod(self.shape)
        return Shape(self.recorder, shape, self.dtype, self)

    def transpose(self, *axes):
        return self.recorder.call("Transpose", [self], [self.shape[axis] for axis in axes], self.dtype, axes)

    def expand_dims(self, axis):
        return self.reshape(self.shape[:axis] + (1,) + self.shape[axis:])

    def squeeze(self, axis):
        return self.reshape(self.shape[:axis] + self.shape[axis + 1:])

    def mean(self, axis):
        return self.recorder.ReduceMean()(self, axis)

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if index[0] is ...:
            index = (slice(None),) * (len(self.shape) - len(index) + 1) + index[1:]
        parts = itertools.zip_longest(self.shape, index, fillvalue=slice(None))
        shape = [len(range(size)[part]) for size, part in parts if isinstance(part, slice)]
        if math.prod(shape) == math.prod(self.shape):
            return self.reshape(tuple(shape))
        return self.recorder.call("StridedSlice", [self], shape, self.dtype, index)

    def arithmetic(self, name, other, swapped=False):
        if not isinstance(other, Shape):
            return self.recorder.call(name, [self], self.shape, self.dtype, (other, swapped))
        dtype = max(self.dtype, other.dtype, key=BYTES.get)
        inputs = [self.recorder.Cast()(x, dtype) for x in ((other, self) if swapped else (self, other))]
        return self.recorder.call(name, inputs, np.broadcast_shapes(self.shape, other.shape), dtype)

    def __add__(self, other):
        return self if isinstance(other, (int, float)) and other == 0 else self.arithmetic("Add", other)

    def __truediv__(self, other):
        return self.arithmetic("Div", other)

    def __sub__(self, other):
        return self.arithmetic("Sub", other)

    def __mul__(self, other):
        return self.arithmetic("Mul", other)

    __radd__, __rmul__ = __add__, __mul__


class Once:
    """The counter of a loop in a graph, whose turns are alike: it takes one."""
    shape, dtype, turns = (), mindspore.int32, 0

    def __lt__(self, count):
        return self.turns < 1

    def __add__(self, step):
        self.turns += step
        return self

    def reshape(self, *shape):
        return Tensor(np.zeros(shape, np.int32))


class Recorder:
    """In place of mindspore.ops: calls, what was called, and `peak`, the most bytes that lived at once."""

    def __init__(self):
        self.calls, self.live, self.peak, self.count = {}, 0, 0, collections.Counter()
        for name in ("Rsqrt", "Erf", "Sigmoid", "SiLU", "ReLU"):
            setattr(self, name.lower(), lambda x, name=name: self.call(name, [x], x.shape, x.dtype))

    def of(self, x):
        """A constant of the graph as a Shape."""
        return x if isinstance(x, Shape) else Shape(self, x.shape, x.dtype)

    def call(self, name, inputs, shape, dtype, numbers=()):
        output = Shape(self, shape, dtype)
        self.count[name] += 1
        called = Call(name, tuple((x.shape, x.dtype) for x in inputs), tuple(numbers), (output.shape, output.dtype))
        self.calls[repr(called)] = called
        return output

    def Cast(self):
        return lambda x, dtype: x if x.dtype == dtype else self.call("Cast", [self.of(x)], x.shape, dtype, (dtype,))

    def Depend(self):
        return lambda x, other: x

    def ExpandDims(self):
        return lambda x, axis: x.reshape(*x.shape, 1) if axis == -1 else x.expand_dims(axis)

    def Reshape(self):
        return lambda x, shape: x.reshape(shape)

    def Flatten(self):
        return lambda x: x.reshape(x.shape[0], -1)

    def matmul(self, name, transpose_b):
        def product(x, y):
            x, y = self.of(x), self.of(y)
            (m, k), (l, n) = x.shape[-2:], y.shape[-2:][::-1 if transpose_b else 1]
            assert k == l and x.dtype == y.dtype and x.shape[:-2] == y.shape[:-2]
            return self.call(name, [x, y], (*x.shape[:-2], m, n), x.dtype, (transpose_b,))
        return product

    def MatMul(self, transpose_b=False):
        return self.matmul("MatMul", transpose_b)

    def BatchMatMul(self, transpose_b=False):
        return self.matmul("BatchMatMul", transpose_b)

    def BiasAdd(self):
        return lambda x, bias: self.call("BiasAdd", [x, bias], x.shape, x.dtype)

    def Gather(self):
        return self.gather

    def gather(self, x, index, axis):
        x, index = self.of(x), self.of(index)
        return self.call("Gather", [x, index], x.shape[:axis] + index.shape + x.shape[axis + 1:], x.dtype, (axis,))

    def tensor_scatter_update(self, x, index, update):
        return self.call("ScatterUpdate", [x, self.of(index), update], x.shape, x.dtype)

    def zeros(self, shape, dtype):
        return self.call("Zeros", [], shape, dtype, (shape, dtype))

    def zeros_like(self, x):
        return self.zeros(x.shape, x.dtype)

    def Transpose(self):
        return lambda x, axes: x.transpose(*axes)

    def Concat(self, axis):
        return lambda parts: self.cat(parts, axis)

    def cat(self, parts, axis):
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.call("Concat", list(parts), shape, parts[0].dtype, (axis,))

    def Split(self, axis, parts):
        def split(x):
            shape = list(x.shape)
            shape[axis] //= parts
            return tuple(self.call("Split", [x], shape, x.dtype, (axis, parts)) for _ in range(parts))
        return split

    def broadcast_to(self, x, shape):
        x = self.of(x)
        assert np.broadcast_shapes(x.shape, shape) == tuple(shape)
        return x if x.shape == tuple(shape) else self.call("BroadcastTo", [x], shape, x.dtype, (shape,))

    def ReduceMean(self, keep_dims=False):
        def mean(x, axis):
            shape = [size for i, size in enumerate(x.shape) if i != axis]
            return self.call("ReduceMean", [x], shape[:axis] + [1] * keep_dims + shape[axis:], x.dtype,
                             (axis, keep_dims))
        return mean

    def Softmax(self, axis):
        return lambda x: self.call("Softmax", [x], x.shape, x.dtype, (axis,))

    def LayerNorm(self, begin, parameters, eps):
        return lambda x, weight, bias: (self.call("LayerNorm", [x, weight, bias], x.shape, x.dtype,
                                                  (begin, parameters, eps)),)

    def clamp(self, x, low, high):
        return self.call("Clamp", [x], x.shape, x.dtype, (low, high))

    def Conv2D(self, channels, kernel, pad_mode, pad, stride, dilation):
        def convolve(x, weight):
            (n, i, *size), (o, wanted, *taps) = x.shape, weight.shape
            assert (i, o, tuple(taps)) == (wanted, channels, tuple(kernel)) and pad_mode == "pad"
            out = [(size[a] + sum(pad[2 * a:2 * a + 2]) - dilation[a] * (kernel[a] - 1) - 1) // stride[a] + 1
                   for a in (0, 1)]
            return self.call("Conv2D", [x, weight], (n, o, *out), x.dtype, (channels, kernel, pad, stride, dilation))
        return convolve


COMPUTE = {  # a recorded operator by MindSpore, of its inputs and numbers
    "Transpose": lambda x, *axes: ops.Transpose()(x, axes), "StridedSlice": lambda x, *index: x[index],
    "Add": lambda x, y, swapped=False: x + y, "Sub": lambda x, y, swapped=False: x - y,
    "Mul": lambda x, y, swapped=False: x * y, "Div": lambda x, y, swapped=False: x / y,
    "Rsqrt": ops.rsqrt, "Erf": ops.erf, "Sigmoid": ops.sigmoid, "SiLU": ops.silu, "ReLU": ops.relu,
    "Cast": ops.cast, "MatMul": lambda x, y, b: ops.MatMul(transpose_b=b)(x, y),
    "BatchMatMul": lambda x, y, b: ops.BatchMatMul(transpose_b=b)(x, y),
    "BiasAdd": lambda x, bias: ops.BiasAdd()(x, bias),
    "Gather": lambda x, index, axis: ops.Gather()(x, index, axis), "ScatterUpdate": ops.tensor_scatter_update,
    "Zeros": ops.zeros, "Concat": lambda *parts: ops.cat(parts[:-1], parts[-1]),
    "Split": lambda x, axis, parts: ops.Split(axis, parts)(x)[0], "BroadcastTo": ops.broadcast_to,
    "ReduceMean": lambda x, axis, keep: ops.ReduceMean(keep)(x, axis), "Softmax": lambda x, axis: ops.Softmax(axis)(x),
    "LayerNorm": lambda x, weight, bias, *numbers: ops.LayerNorm(*numbers)(x, weight, bias)[0],
    "Clamp": ops.clamp,
    "Conv2D": lambda x, weight, channels, kernel, pad, stride, dilation: ops.Conv2D(
        channels, kernel, pad_mode="pad", pad=pad, stride=stride, dilation=dilation)(x, weight)}


@contextlib.contextmanager
def recording():
    recorder, named = Recorder(), mindspore.get_context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mindspore, "get_context", lambda name: "Ascend" if name == "device_target" else named(name))
        for module in (layers, musicldm):
            patch.setattr(module, "ops", recorder)
        patch.setattr(layers, "Tensor", lambda x, *dtype: Once() if isinstance(x, int) else Tensor(x, *dtype))
        yield recorder


def recorded(cfg, seconds, n, loop=False):
    """{model: Recorder} of n waveforms at once: a prompt of the longest length, and guidance."""
    dtype, found = weights.tensor_dtype({**cfg, "device": "CPU"} if cfg["dtype"] != "bfloat16" else cfg), {}
    text, audio, vae = map(musicldm.frozen, (*(cfg["text_encoder"][f"{kind}_config"] for kind in ("text", "audio")),
                                             cfg["vae"]))
    unet = musicldm.frozen(cfg["unet"])
    (channels, h, w), side = musicldm.clip_size(cfg, seconds, loop)[1], audio["spec_size"]
    frames, length = 4 * h, musicldm.padded_length(cfg, 10 ** 6)
    frames = min(frames + loop * 2 * musicldm.hifigan_reach(cfg["vocoder"]), 1024)
    for model in ("clap_text", "clap_audio", "unet", "schedulers", "vae_encode", "vae_decode", "vocoder"):
        with recording() as recorder:
            shape = functools.partial(Shape, recorder)
            p = {name: weights.nest({key: shape(size, dtype) for key, size in sizes.items()})
                 for name, sizes in weights.param_shapes(cfg).items()}
            recorder.parameters = recorder.live
            tower = p["text_encoder"]
            if model == "clap_text":
                ids = shape((1, length), mindspore.int32)
                musicldm.clap_text.__wrapped__(ids, ids, shape((1, 1, 1, length), mindspore.float32),
                                               tower["text_model"], tower["text_projection"], text)
            if model == "clap_audio":
                x = shape((1, side * side // audio["num_mel_bins"], audio["num_mel_bins"]), dtype)
                musicldm.clap_audio.__wrapped__(x, tower["audio_model"]["audio_encoder"], tower["audio_projection"],
                                                audio)
            if model == "unet":
                musicldm.guided_prediction.__wrapped__(
                    shape((n, h, w, channels), dtype), shape((1, unet["block_out_channels"][0]), dtype),
                    shape((2 * n, cfg["text_encoder"]["projection_dim"]), dtype), shape((), dtype), p["unet"], unet,
                    loop)
            if model == "schedulers":  # one operator at a time, between the steps
                latents = functools.partial(shape, (n, h, w, channels), dtype)
                for name in musicldm.SCHEDULERS:
                    sample = musicldm.make_scheduler(
                        name, cfg["schedule"], 6, float(name == "ddim"), iter(latents, None))
                    for x in sample(lambda x, t: latents(), latents(), musicldm.scheduler_timesteps(
                            name, 6, cfg["schedule"])):
                        recorder.Cast()(x, mindspore.float32)
            if model == "vae_encode":
                musicldm.vae_encode.__wrapped__(shape((1, 4 * h, 4 * w), dtype), p["vae"], vae)
            if model == "vae_decode":
                musicldm.vae_decode.__wrapped__(shape((1, h, w, channels), dtype), p["vae"], vae, loop)
            if model == "vocoder":
                musicldm.hifigan.__wrapped__(shape((1, frames, cfg["vocoder"]["model_in_dim"]), dtype), p["vocoder"],
                                             musicldm.frozen(cfg["vocoder"]))
        found[model] = recorder
    return found


def over_limits(call):
    """What a recorded operator has that its row of the table does not allow, as texts."""
    if call.name not in LIMITS:
        return [f"no row for {call.name}"]
    row, found = LIMITS[call.name], []
    for shape, dtype in (*call.inputs, call.outputs):
        kind = "indices" if dtype == mindspore.int32 else "dtypes"
        if str(dtype).lower() not in row.get(kind, []):
            found.append(f"{kind}: {dtype}")
        if len(shape) > row["rank"]:
            found.append(f"rank: {len(shape)}")
        if max(shape, default=1) > row.get("axis", 2 ** 31 - 1):
            found.append(f"axis: {max(shape)}")
    if len(call.inputs) > row.get("inputs", 3):
        found.append(f"inputs: {len(call.inputs)}")
    if call.name == "Conv2D":
        (_, _, height, width), (_, taps, pad, stride, dilation) = call.inputs[0][0], call.numbers
        found += [f"{name}: {value}" for name, value in {
            "height": height, "width": width, "taps": max(taps), "padding": max(pad), "stride": max(stride),
            "dilation": max(dilation)}.items() if value > row[name]]
    return [f"{call.name} {text}" for text in found]


@pytest.mark.parametrize("block", [layers.BLOCK, 2 ** 9])
@pytest.mark.parametrize("loop", [False, True])
def test_the_recorder_gives_mindspore_s_shapes(loop, block, monkeypatch):
    monkeypatch.setattr(layers, "BLOCK", block)
    for model, recorder in recorded(golden_config(), 0.32, 2, loop).items():
        for call in recorder.calls.values():
            inputs = [mindspore.ops.zeros(shape, dtype) for shape, dtype in call.inputs]
            output = COMPUTE[call.name](*inputs, *call.numbers)
            assert (output.shape, output.dtype) == call.outputs, f"{model}: {call}"


@pytest.mark.parametrize("seconds, n, loop", [(0.04, 1, False), (10.24, 1, False), (10.24, 16, True), (600, 1, False)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_operator_is_within_what_cann_publishes(dtype, seconds, n, loop, ascend):
    cfg = musicldm.load_config(weights="random", overrides=[f"dtype={dtype}"])
    calls = [call for recorder in recorded(cfg, seconds, n, loop).values() for call in recorder.calls.values()]
    assert len(calls) > 400 and not sorted({text for call in calls for text in over_limits(call)})


def test_every_row_is_of_an_operator_that_is_used():
    cfg = golden_config()
    used = {call.name for dtype, seconds in (("float32", 0.32), ("float16", 600))
            for recorder in recorded({**cfg, "dtype": dtype}, seconds, 1).values() for call in recorder.calls.values()}
    assert used == set(LIMITS) and all(row["source"] for row in LIMITS.values())


def convolution(height, width, taps, padding):
    """Of one channel, which keeps its size where the padding is half of the taps."""
    image = (1, 1, height, width), mindspore.float32
    return Call("Conv2D", (image, ((1, 1, *taps), mindspore.float32)), (1, taps, (padding,) * 4, (1, 1), (1, 1)), image)


@pytest.mark.parametrize("call, found", [
    (convolution(163872, 1, (11, 1), 25), ["Conv2D height: 163872"]), (convolution(1, 163872, (1, 11), 25), []),
    (convolution(1, 10 ** 6 + 1, (1, 3), 1), ["Conv2D axis: 1000001"] * 2),
    (convolution(4, 4, (3, 257), 256), ["Conv2D taps: 257", "Conv2D padding: 256"]),
    (Call("Erf", (((1,), mindspore.bfloat16),), (), ((1,), mindspore.float32)), ["Erf dtypes: BFloat16"]),
    (Call("Concat", (((1,), mindspore.float32),) * 33, (0,), ((33,), mindspore.float32)), ["Concat inputs: 33"]),
    (Call("Add", (((1,) * 9, mindspore.float32),), (), ((1,), mindspore.float32)), ["Add rank: 9"]),
    (Call("Roll", (), (), ((1,), mindspore.float32)), ["no row for Roll"])])
def test_what_is_over_a_limit_is_found(call, found):
    assert over_limits(call) == found


def test_means_and_repetitions_are_no_matrix_products(ascend):
    """Which an Ascend 910A or 310P computes in float16."""
    with recording() as recorder:
        p, x = ({name: Shape(recorder, (8,), mindspore.float16) for name in ("weight", "bias")},
                Shape(recorder, (2, 5, 3, 8), mindspore.float16))
        layers.group_norm(x, p, 4, 1e-5)
    assert set(recorder.count) == {"Cast", "ReduceMean", "BroadcastTo", "Mul", "Add", "Rsqrt", "BiasAdd"}
    statistics = [call for call in recorder.calls.values() if call.name in ("ReduceMean", "Rsqrt")]
    assert all(dtype == mindspore.float32 for call in statistics for _, dtype in call.inputs)


@pytest.mark.parametrize("seconds, n", [(0.04, 1), (10.24, 1), (10.24, 32), (60, 4), (600, 1)])
def test_the_estimate_of_memory_covers_what_lives_at_once(seconds, n, ascend, monkeypatch):
    cfg = musicldm.load_config(weights="random", overrides=["device=Ascend"])
    peak = max(recorder.peak for recorder in recorded(cfg, seconds, n).values())
    shape = (n, *musicldm.clip_size(cfg, seconds)[1])
    monkeypatch.setattr(weights, "card", lambda cfg: types.SimpleNamespace(free_memory=peak))
    with pytest.raises(InputError, match=f"^{n} at once with latents of {shape[2]} x 16 would take about "):
        musicldm.check_memory(cfg, shape, True)
    monkeypatch.setattr(weights, "card", lambda cfg: types.SimpleNamespace(free_memory=3 * peak + 4e9))
    musicldm.check_memory(cfg, shape, True)  # and not by far too much


@pytest.mark.parametrize("dtype, hf32", [("float32", False), ("hf32", True)])
def test_a_device_is_set_up_first_and_has_each_parameter_once(dtype, hf32, ascend, monkeypatch):
    """And a run without a callback does not look at its latents before they are done."""
    cfg, predict, to_numpy = golden_config(f"dtype={dtype}"), musicldm.guided_prediction, musicldm.to_numpy
    for part in (cfg["text_encoder"]["text_config"], cfg["unet"]):
        part["compiled_for"] = "this test"  # MindSpore takes a graph again that it has for the same arguments
    monkeypatch.setattr(musicldm, "guided_prediction", lambda *given: ascend.append(("step", None)) or predict(*given))
    monkeypatch.setattr(musicldm, "to_numpy", lambda x: ascend.append(("read", None)) or to_numpy(x))
    params = weights.load_params(cfg)
    loaded = len(weights.flatten(params))
    assert ascend == [("conv_allow_hf32", hf32), ("matmul_allow_hf32", hf32), ("op_compile", False)] + [
        ("to", "Ascend")] * loaded
    latents = musicldm.generate(cfg, "a", params, num_inference_steps=3, audio_length_in_s=0.32, output_type="latent")
    # check_memory asks the card; then two prompts are read, and the latents when all is done
    assert [name for name, _ in ascend[3 + loaded:]] == ["to", "read", "read", "step", "step", "step", "read"]
    assert latents.dtype == np.float32


def test_hf32_is_one_choice_a_process(ascend, monkeypatch):
    def once(value):
        raise RuntimeError("The 'conv_allow_hf32' can not be set repeatedly.")

    weights.use_device({"device": "auto", "dtype": "float32"})
    monkeypatch.setattr(mindspore.device_context.ascend.op_precision, "conv_allow_hf32", once)
    weights.use_device({"device": "auto", "dtype": "float16"})  # asks for the same
    with pytest.raises(InputError, match="^dtype: this process has computed without hf32 before; valid: "):
        weights.use_device({"device": "auto", "dtype": "hf32"})


def test_the_device_that_computes_is_named(ascend, monkeypatch):
    cfg = {"device": "auto", "dtype": "float32"}
    assert weights.device_in_words(cfg) == "Ascend910B4 with 32 GB"
    monkeypatch.setattr(mindspore, "set_device", lambda *given: None)  # does not move it
    monkeypatch.setattr(mindspore, "get_context", lambda name: "CPU")
    assert weights.device_in_words(cfg) == "CPU"
    with pytest.raises(InputError, match="^device is Ascend, but MindSpore computes on CPU; valid: auto, CPU$"):
        weights.device_in_words({**cfg, "device": "Ascend"})


def test_no_graphs_are_kept_of_a_device(ascend, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MS_COMPILER_CACHE_ENABLE", "1")
    with musicldm.kept_graphs("a plan", "Ascend"):
        assert musicldm.os.environ["MS_COMPILER_CACHE_ENABLE"] == "0"
    assert not list(tmp_path.iterdir())
