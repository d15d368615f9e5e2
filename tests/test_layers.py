"""Leaves against NumPy and SciPy, the two convolutions against each other, and what each operator documents."""
import ast
import pathlib

import mindspore
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Tensor, ops
from scipy import signal, special

import layers
import weights

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def laid_out(weight, native):
    return Tensor(np.ascontiguousarray(weights.lay_out("conv.weight", weight, {}, native)))


def correlate2d(x, weight, bias, stride):
    """x (N, H, W, I), weight (O, I, 3, 3), zero padding 1."""
    y = np.stack([[sum(signal.correlate2d(image[..., i], kernel[i], mode="same") for i in range(len(kernel)))
                   for kernel in weight] for image in x])
    return y.transpose(0, 2, 3, 1)[:, ::stride, ::stride] + bias


@pytest.mark.parametrize("native", [False, True], ids=["gathered", "native"])
@pytest.mark.parametrize("size, stride", [((5, 4), 1), ((5, 4), 2), ((6, 2), 2), ((1, 1), 1), ((3, 1), 2)])
def test_conv2d(size, stride, native):
    x, weight, bias = normal(2, *size, 3), normal(5, 3, 3, 3), normal(5)
    y = layers.conv2d(Tensor(x), laid_out(weight, native), Tensor(bias), stride=stride)
    assert relative_error(y.asnumpy(), correlate2d(x, weight, bias, stride)) < 1e-6


@pytest.mark.parametrize("native", [False, True], ids=["gathered", "native"])
@pytest.mark.parametrize("out_size", [(6, 4), (5, 4), (5, 3)])
def test_conv2d_after_upsampling(out_size, native):
    x, weight, bias = normal(2, 3, 2, 4), normal(5, 4, 3, 3), normal(5)
    y = layers.conv2d(Tensor(x), laid_out(weight, native), Tensor(bias), upsample_to=out_size)
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)[:, :out_size[0], :out_size[1]]
    assert relative_error(y.asnumpy(), correlate2d(doubled, weight, bias, 1)) < 1e-6


@pytest.mark.parametrize("native", [False, True], ids=["gathered", "native"])
@pytest.mark.parametrize("kernel, dilation", [(3, 1), (7, 1), (3, 5), (11, 3)])
def test_conv1d(kernel, dilation, native):
    x, weight, bias = normal(2, 13, 3), normal(5, 3, kernel), normal(5)
    y = layers.conv1d(Tensor(x), laid_out(weight, native), Tensor(bias), kernel=kernel, dilation=dilation)
    spread = np.zeros((5, 3, dilation * (kernel - 1) + 1), np.float32)
    spread[..., ::dilation] = weight
    half = dilation * (kernel - 1) // 2
    padded = np.pad(x, ((0, 0), (half, half), (0, 0)))
    expected = np.stack([[sum(signal.correlate(clip[:, i], taps[i], mode="valid") for i in range(3)) for taps in spread]
                         for clip in padded]).transpose(0, 2, 1) + bias
    assert relative_error(y.asnumpy(), expected) < 1e-6


@pytest.mark.parametrize("native", [False, True], ids=["gathered", "native"])
@pytest.mark.parametrize("kernel, stride", [(16, 5), (16, 4), (8, 2), (4, 2), (16, 8), (3, 1), (5, 3)])
def test_conv_transpose1d(kernel, stride, native):
    x, weight, bias = normal(2, 7, 3), normal(3, 4, kernel), normal(4)
    laid = weights.lay_out("upsampler.0.weight", weight, {"vocoder": {"upsample_rates": [stride]}}, native)
    y = layers.conv_transpose1d(Tensor(x), Tensor(np.ascontiguousarray(laid)), Tensor(bias), kernel=kernel, stride=stride)
    spread = np.zeros((2, 6 * stride + 1, 3))
    spread[:, ::stride] = x
    padding = (kernel - stride) // 2
    full = np.stack([[sum(np.convolve(clip[:, i], weight[i, o]) for i in range(3)) for o in range(4)] for clip in spread])
    expected = full[:, :, padding:full.shape[2] - padding].transpose(0, 2, 1) + bias
    assert relative_error(y.asnumpy(), expected) < 1e-6


def test_linear():
    x, weight, bias = normal(2, 3, 4), normal(5, 4), normal(5)
    assert relative_error(layers.linear(Tensor(x), Tensor(weight), Tensor(bias)).asnumpy(), x @ weight.T + bias) < 1e-6


@pytest.mark.parametrize("offset", [0, 3, 300])
def test_group_norm(offset):
    x, weight, bias = normal(2, 30, 4, 6) * np.float32(0.5) + np.float32(offset), normal(6), normal(6)
    y = layers.group_norm(Tensor(x), Tensor(weight), Tensor(bias), groups=3, eps=1e-5).asnumpy()
    groups = x.astype(np.float64).reshape(2, 120, 3, 2)
    mean, variance = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    expected = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * weight + bias
    assert relative_error(y, expected) < 1e-6 * (1 + offset)


def test_group_norm_of_a_constant_is_its_bias():
    x, weight, bias = np.full((1, 30, 4, 6), 3.3, np.float32), normal(6), normal(6)
    y = layers.group_norm(Tensor(x), Tensor(weight), Tensor(bias), groups=3, eps=1e-6).asnumpy()
    assert np.abs(y - bias).max() < 5e-3


def test_layer_norm():
    x, weight, bias = normal(2, 3, 8), normal(8), normal(8)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5) * weight + bias
    assert relative_error(layers.layer_norm(Tensor(x), Tensor(weight), Tensor(bias), eps=1e-5).asnumpy(), expected) < 1e-6


def test_gelu_is_exact():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    assert np.abs(layers.gelu(Tensor(x)).asnumpy() - x * special.ndtr(x.astype(np.float64))).max() < 1e-6


def test_leaky_relu():
    assert np.allclose(layers.leaky_relu(Tensor(np.float32([-2, 0, 3])), 0.1).asnumpy(), [-0.2, 0, 3])


def test_tanh():
    x = np.linspace(-12, 12, 10001, dtype=np.float32)
    y = layers.tanh(Tensor(x)).asnumpy()
    assert np.abs(y - np.tanh(x.astype(np.float64))).max() < 3e-6 and np.abs(y).max() <= 1


@pytest.mark.parametrize("masked", [False, True])
def test_attend(masked):
    q, k, v = normal(2, 5, 6), normal(2, 5, 6), normal(2, 5, 6)
    bias = np.where(np.arange(5) < 3, 0, -65504).astype(np.float32)[None, None, None] if masked else None
    y = layers.attend(Tensor(q), Tensor(k), Tensor(v), None if bias is None else Tensor(bias), heads=3).asnumpy()
    split = [x.astype(np.float64).reshape(2, 5, 3, 2).transpose(0, 2, 1, 3) for x in (q, k, v)]
    scores = split[0] @ split[1].transpose(0, 1, 3, 2) / 2 ** 0.5 + (0 if bias is None else bias)
    expected = (special.softmax(scores, axis=-1) @ split[2]).transpose(0, 2, 1, 3).reshape(2, 5, 6)
    assert relative_error(y, expected) < 2e-6


def operators(path):
    """The names X of every ops.X in a source file."""
    tree = ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))
    return sorted({node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                   and isinstance(node.value, ast.Name) and node.value.id == "ops"})


@pytest.mark.parametrize("name", operators(layers.__file__))
def test_every_operator_documents_ascend(name):
    documentation = getattr(ops, name).__doc__
    platforms = documentation.split("Supported Platforms:")[1].strip().splitlines()[0]
    assert "Ascend" in platforms and "CPU" in platforms


def test_importing_sets_no_context():
    assert mindspore.get_context("device_target") == "CPU"
