"""Leaves against NumPy and SciPy, each way to convolve too, and what each operator documents."""
import ast
import functools
import pathlib
import re

import mindspore
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Tensor, ops
from scipy import signal, special

import layers


@pytest.fixture
def normal():
    """Float32 arrays of given shapes, the same for a test whatever ran before it."""
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


def layer(weight, bias):
    return {"weight": Tensor(weight), "bias": Tensor(bias)}


@functools.cache
def bar(way, *kernel):
    """How far a convolution may be from float64: three times what float32 costs this way in NumPy.

    That is the largest distance over 1000 random tiles, each with its largest value as the measure. No processor's
    rounding is in it: the order of sums differs between them, the size of what they round does not.
    """
    axes = [layers.fast_filter(taps, int(way[-1])) if way.startswith("fast") and max(kernel) <= 16 else
            (np.ones((1, taps)), np.eye(taps), np.eye(taps)) for taps in kernel]
    a, g, b = (functools.reduce(np.kron, matrices) for matrices in zip(*axes))
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal((len(m.T), n)).astype(np.float32) for m, n in ((g, 5 * 3), (b, 1000 * 3)))

    def convolve(dtype):
        weights, tiles = (g.astype(dtype) @ weight).reshape(-1, 5, 3), (b.astype(dtype) @ x).reshape(-1, 1000, 3)
        return np.tensordot(a.astype(dtype), np.einsum("poi,pti->pto", weights, tiles), 1)

    exact = convolve(np.float64)
    return 3 * (np.abs(convolve(np.float32) - exact).max((0, 2)) / np.abs(exact).max((0, 2))).max()


@pytest.fixture(params=["gathered", "fast 2", "fast 4", "native"])
def way(request, monkeypatch):
    """Convolutions go this way, but that one with a stride is never "fast"."""
    fast_weight = layers.fast_weight
    monkeypatch.setattr(layers, "FEW", 0)
    if request.param == "native":
        monkeypatch.setattr(layers.mindspore, "get_context", lambda name: "Ascend")
    if request.param == "gathered":
        monkeypatch.setattr(layers, "fast_convolution", layers.gathered_convolution)
        monkeypatch.setattr(layers, "fast_weight", lambda weight, outputs: layers.gathered_weight(weight))
    if request.param == "fast 2":
        monkeypatch.setattr(layers, "fast_weight", lambda weight, outputs: fast_weight(weight, 2))
    return request.param


def correlate2d(x, weight, bias, *, stride=1, upsample_to=None, loop=False):
    """x (N, H, W, I), weight (O, I, 3, 3): what `convolved` computes, from SciPy in float64."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    if upsample_to is not None:
        x = x.repeat(2, axis=1).repeat(2, axis=2)[:, :upsample_to[0], :upsample_to[1]]
    x = np.pad(np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0))), ((0, 0), (1, 1), (0, 0), (0, 0)),
               mode="wrap" if loop else "constant")
    y = np.stack([[sum(signal.correlate2d(image[..., i], kernel[i], mode="valid") for i in range(len(kernel)))
                   for kernel in weight] for image in x])
    return y.transpose(0, 2, 3, 1)[:, ::stride, ::stride] + bias


def convolved(x, weight, bias, *, stride=1, upsample_to=None, loop=False):
    """conv2d of an image (N, H, W, C)."""
    return layers.conv2d(Tensor(x), layer(weight, bias), loop, stride, upsample_to).asnumpy()


SIZES = [
    ((5, 4), {}), ((1, 1), {}), ((5, 4), {"stride": 2}), ((6, 2), {"stride": 2}), ((3, 1), {"stride": 2}),
    ((3, 2), {"upsample_to": (6, 4)}), ((3, 2), {"upsample_to": (5, 4)}), ((3, 2), {"upsample_to": (5, 3)}),
    ((5, 4), {"loop": True}), ((1, 3), {"loop": True}), ((6, 3), {"loop": True, "stride": 2}),
    ((2, 1), {"loop": True, "stride": 2}), ((3, 2), {"loop": True, "upsample_to": (6, 4)}),
    ((1, 2), {"loop": True, "upsample_to": (2, 3)}),
]


@pytest.mark.parametrize("size, options", SIZES)
def test_the_definition_of_a_convolution(size, options, normal):
    x, weight, stride = normal(2, *size, 3).astype(np.float64), normal(5, 3, 3, 3), options.get("stride", 1)
    geometry = layers.geometry2d(x.shape, stride, options.get("upsample_to"), options.get("loop", False))
    assert np.allclose(layers.plain_convolution(x, weight, geometry), correlate2d(x, weight, 0, **options), atol=1e-12)


@pytest.mark.parametrize("size, options", SIZES)
def test_conv2d(size, options, way, normal):
    x, weight, bias = normal(2, *size, 3), normal(5, 3, 3, 3), normal(5)
    y = convolved(x, weight, bias, **options)
    assert relative_error(y, correlate2d(x, weight, bias, **options)) < bar(way, 3, 3)


@pytest.mark.parametrize("mode, flags, exact", [
    ("BF16", "avx512_bf16 amx_bf16", False), ("bf16", "amx_bf16", False), ("BF16", "avx512_bf16", True),
    ("STRICT", "amx_bf16", True), (None, "amx_bf16", True), ("BF16", None, True)])
def test_products_in_bfloat16_are_not_for_the_fast_way(mode, flags, exact, monkeypatch, tmp_path, normal):
    path = tmp_path / "cpuinfo"
    if flags:
        path.write_text(f"flags : fpu {flags} xsave\n")
    monkeypatch.setattr(layers.pathlib, "Path", lambda name: path)
    monkeypatch.delenv("ONEDNN_DEFAULT_FPMATH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", mode)
    monkeypatch.setattr(layers, "fast_convolution", None)
    x, weight, bias = normal(1, 4, 4, 4), normal(5, 4, 3, 3), normal(5)
    if exact:
        with pytest.raises(TypeError):
            convolved(x, weight, bias)
    else:
        assert relative_error(convolved(x, weight, bias), correlate2d(x, weight, bias)) < bar("gathered", 3, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_few_channels(channels, monkeypatch, normal):
    """They take the native way on a CPU too, and it alone."""
    monkeypatch.setattr(layers, "fast_convolution", None)
    x, weight, bias = normal(2, 5, 4, channels), normal(5, channels, 3, 3), normal(5)
    if channels == 4:
        with pytest.raises(TypeError):
            convolved(x, weight, bias)
    else:
        assert relative_error(convolved(x, weight, bias), correlate2d(x, weight, bias)) < bar("native", 3, 3)


@pytest.mark.parametrize("kernel, outputs, products", [
    (1, 4, 1), (3, 2, 4), (3, 4, 6), (4, 4, 7), (5, 4, 35), (7, 4, 35), (8, 4, 35),
    (9, 4, 42), (11, 4, 42), (16, 4, 49)])
def test_fast_filters_correlate(kernel, outputs, products):
    a, g, b = layers.fast_filter(kernel, outputs)
    assert len(g) == len(b) == a.shape[1] == products and products <= len(a) * kernel
    filtered, signal_ = np.split(np.random.default_rng(0).standard_normal(len(a) + 2 * kernel - 1), [kernel])
    assert np.allclose(a @ ((g @ filtered) * (b @ signal_)), np.correlate(signal_, filtered, "valid"), atol=1e-13)
    assert all(np.array_equal(x, x.astype(np.float32)) for x in (a, b))  # so that every machine has the same


@pytest.mark.parametrize("block", [1, 300, 2000])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("options", [{"stride": 2}, {"upsample_to": (13, 5)}, {"loop": True}])
def test_convolution_by_blocks(options, way, n, block, monkeypatch, normal):
    x, weight, bias = normal(n, 7, 3, 2), normal(4, 2, 3, 3), normal(4)
    sizes, read_rows = [], layers.read_rows
    monkeypatch.setattr(layers, "BLOCK", block)
    monkeypatch.setattr(layers, "read_rows", lambda x, rows: (
        sizes.append(rows.size * x.shape[1]), read_rows(x, rows))[1])
    y = convolved(x, weight, bias, **options)
    assert relative_error(y, correlate2d(x, weight, bias, **options)) < bar(way, 3, 3)
    assert (way == "native") == (not sizes)
    assert max(sizes, default=0) <= block + 36 * 2 * 3  # a row of 3 tiles is not split


@pytest.mark.parametrize("stride", [1, 3])
def test_a_kernel_of_one_column(stride, way, normal):
    """On an image of several, as a period discriminator's."""
    x, weight, bias = normal(2, 7, 3, 4), normal(5, 4, 5, 1), normal(5)
    geometry = 2, (7, 3), ((7 - 1) // stride + 1, 3), (5, 1), (stride, 1), (1, 1), (2, 0), 1, False
    y = layers.convolution(Tensor(x), layer(weight, bias), geometry).asnumpy()
    padded = np.pad(x.astype(np.float64), ((0, 0), (2, 2), (0, 0), (0, 0)))
    expected = np.stack([[sum(signal.correlate2d(image[..., i], kernel[i], mode="valid") for i in range(4))
                          for kernel in weight] for image in padded]).transpose(0, 2, 3, 1)[:, ::stride] + bias
    assert relative_error(y, expected) < bar(way if stride == 1 else "gathered", 5, 1)


@pytest.mark.parametrize("kernel, dilation", [(3, 1), (7, 1), (3, 5), (11, 3), (17, 1)])
def test_conv1d(kernel, dilation, way, normal):
    x, weight, bias = normal(2, 13, 3), normal(5, 3, kernel), normal(5)
    y = layers.conv1d(Tensor(x), layer(weight, bias), dilation).asnumpy()
    spread = np.zeros((5, 3, dilation * (kernel - 1) + 1))
    spread[..., ::dilation] = weight
    half = dilation * (kernel - 1) // 2
    padded = np.pad(x.astype(np.float64), ((0, 0), (half, half), (0, 0)))
    expected = np.stack([[sum(signal.correlate(clip[:, i], taps[i], mode="valid") for i in range(3)) for taps in spread]
                         for clip in padded]).transpose(0, 2, 1) + bias
    plain = layers.plain_convolution(x[:, :, None].astype(np.float64), weight[..., None],
                                     layers.geometry1d(x.shape, weight.shape, dilation))
    assert np.allclose(plain[:, :, 0] + bias, expected, atol=1e-12)
    assert relative_error(y, expected) < bar(way, kernel)


@pytest.mark.parametrize("kernel, stride", [(16, 5), (16, 4), (8, 2), (4, 2), (16, 8), (3, 1), (5, 3)])
def test_conv_transpose1d(kernel, stride, way, normal):
    x, weight, bias = normal(2, 7, 3), normal(3, 4, kernel), normal(4)
    y = layers.conv_transpose1d(Tensor(x), layer(weight, bias), stride).asnumpy()
    spread = np.zeros((2, 6 * stride + 1, 3))
    spread[:, ::stride] = x
    padding = (kernel - stride) // 2
    full = np.stack([[sum(np.convolve(clip[:, i], weight[i, o].astype(np.float64)) for i in range(3)) for o in range(4)]
                     for clip in spread])
    expected = full[:, :, padding:full.shape[2] - padding].transpose(0, 2, 1) + bias
    assert relative_error(y, expected) < bar(way, layers.polyphase(kernel, stride)[1])


@pytest.mark.parametrize("n", [2, 8, 63, 64])
def test_linear(n, normal):
    x, weight, bias = normal(n, 4), normal(5, 4), normal(5)
    product, image = x.astype(np.float64) @ weight.T, weight.reshape(5, 4, 1, 1)
    for linear in (layers.linear, layers.bert_linear):
        assert relative_error(linear(Tensor(x), layer(weight, bias)).asnumpy(), product + bias) < 1e-6
    assert relative_error(layers.linear(Tensor(x), {"weight": Tensor(weight)}).asnumpy(), product) < 1e-6
    assert relative_error(layers.conv1x1(Tensor(x), layer(image, bias)).asnumpy(), product + bias) < 1e-6


@pytest.mark.parametrize("offset", [0, 3, 300])
def test_group_norm(offset, normal):
    x, weight, bias = normal(2, 30, 4, 6) * np.float32(0.5) + np.float32(offset), normal(6), normal(6)
    y = layers.group_norm(Tensor(x), layer(weight, bias), 3, 1e-5).asnumpy()
    groups = x.astype(np.float64).reshape(2, 120, 3, 2)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * weight + bias
    assert relative_error(y, expected) < 1e-6 * (1 + offset)


def test_group_norm_of_a_constant_is_its_bias(normal):
    x, weight, bias = np.full((1, 30, 4, 6), 3.3, np.float32), normal(6), normal(6)
    y = layers.group_norm(Tensor(x), layer(weight, bias), 3, 1e-6).asnumpy()
    assert np.abs((y - bias) / weight).max() < 5e-3


def test_layer_norm(normal):
    x, weight, bias = normal(2, 3, 8), normal(8), normal(8)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * weight + bias
    assert relative_error(layers.layer_norm(Tensor(x), layer(weight, bias), 1e-5).asnumpy(), expected) < 1e-6


def test_gelu_is_exact():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    assert np.abs(layers.gelu(Tensor(x)).asnumpy() - x * special.ndtr(x.astype(np.float64))).max() < 1e-6


def test_leaky_relu():
    x = np.linspace(-6, 6, 1001).astype(np.float32)
    assert np.abs(layers.leaky_relu(Tensor(x), 0.1).asnumpy() - np.where(x > 0, x, 0.1 * x.astype(np.float64))
                  ).max() < 1e-6


@pytest.mark.parametrize("rows", [[[4, 2], [-1, 1]], [[4, -1, 0], [0, 2, 0]], [[1, 1, 1], [1, 1, 4]]])
def test_rows_are_read_and_gradients_added_where_they_were_read(rows, normal):
    x, rows = normal(5, 3), np.array(rows, np.int32)

    def total(x):
        y = layers.read_rows(x, Tensor(rows))
        return (y * y).sum()

    read, gradient = layers.read_rows(Tensor(x), Tensor(rows)).asnumpy(), mindspore.grad(total)(Tensor(x)).asnumpy()
    assert np.array_equal(read, np.concatenate([x, np.zeros((1, 3), np.float32)])[rows])
    assert np.allclose(gradient, 2 * x * np.bincount(rows[rows >= 0], minlength=5)[:, None])


def test_tanh():
    x = np.linspace(-12, 12, 10001, dtype=np.float32)
    y = layers.tanh(Tensor(x)).asnumpy()
    assert np.abs(y - np.tanh(x.astype(np.float64))).max() < 3e-6 and np.abs(y).max() <= 1


def attend_by_scipy(q, k, v, bias, heads):
    split = [x.astype(np.float64).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v)]
    scores = split[0] @ split[1].transpose(0, 1, 3, 2) / split[0].shape[-1] ** 0.5 + (0 if bias is None else bias)
    return (special.softmax(scores, axis=-1) @ split[2]).transpose(0, 2, 1, 3).reshape(q.shape)


@pytest.mark.parametrize("masked", [False, True])
def test_multi_head_attention(masked, normal):
    q, k, v = normal(2, 5, 6), normal(2, 5, 6), normal(2, 5, 6)
    bias = np.where(np.arange(5) < 3, 0, -65504).astype(np.float32)[None, None, None] if masked else None
    y = layers.multi_head_attention(Tensor(q), Tensor(k), Tensor(v), None if bias is None else Tensor(bias), 3)
    assert relative_error(y.asnumpy(), attend_by_scipy(q, k, v, bias, 3)) < 2e-6


@pytest.mark.parametrize("l, block", [(13, 78), (13, 400), (7, 100), (2, 12)])
def test_attention_by_blocks(l, block, monkeypatch, normal):
    sizes, attend = [], layers.attend
    monkeypatch.setattr(layers, "BLOCK", block)
    q, k, v = normal(2, l, 6), normal(2, l, 6), normal(2, l, 6)
    expected, given = attend_by_scipy(q, k, v, None, 3), (Tensor(q), Tensor(k), Tensor(v), None, 3)
    in_graph = mindspore.jit(layers.multi_head_attention)(*given)
    monkeypatch.setattr(layers, "attend", lambda q, *others: sizes.append(q.shape[2]) or attend(q, *others))
    y = layers.multi_head_attention(*given)
    assert max(relative_error(x.asnumpy(), expected) for x in (y, in_graph)) < 2e-6
    assert max(sizes) <= -(-block // (6 * l)) and len(sizes) * max(sizes) >= l


def operators(path):
    """The names X of every ops.X in a source file."""
    tree = ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))
    return sorted({node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                   and isinstance(node.value, ast.Name) and node.value.id == "ops"})


@pytest.mark.parametrize("name", operators(layers.__file__))
def test_every_operator_documents_ascend(name):
    documentation = getattr(ops, name).__doc__
    reference = re.search(r"Refer to :func:`mindspore\.ops\.(\w+)`", documentation)
    if reference:
        documentation = getattr(ops, reference[1]).__doc__
    platforms = documentation.split("Supported Platforms:")[1].strip().splitlines()[0]
    assert "Ascend" in platforms and "CPU" in platforms


def test_importing_sets_no_context():
    assert mindspore.get_context("device_target") == "CPU"
