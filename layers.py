"""The layers and blocks that MusicLDM's models are built from, as pure MindSpore functions.

Axis letters: N batch, H time and W frequency of an image (a latent or a log-mel spectrogram), L positions of a
sequence, C channels, which come last: images are (N, H, W, C), sequences (N, L, C). I and O are channels into and out
of a layer, K taps of a convolution, KH and KW its kernel's height and width, D channels of an attention head, M
queries, E channels of the embedding of time and class, P positions of all N (N * H * W or N * L).
A layer returns its input's dtype. Parameters `p` are the sub-dict of the checkpoint that holds it. Layers take their
arguments in one order: data and its sizes, conditioning, parameters, numbers.

If you come from PyTorch: MindSpore compiles what is under @mindspore.jit, and all that it calls, for each new set of
shapes. While it compiles it runs Python's branches and loops, and unrolls them. Tensors are the graph's inputs, and so
are parameters, which mindspore.mutable wraps; every other argument is a constant of the graph. So is what a @constexpr
function returns, which plain Python runs during compilation. ops.X()(...) makes an operator and applies it; ops.x(...)
does the same after checks that take longer to compile. ops.Depend()(x, y) is x, but not before y is there.
bias_rows, softmax_rows and read_rows are operators with gradients of our own: see the last section.
"""
import functools
import math
import os
import pathlib

import mindspore
import numpy as np
from mindspore import Tensor, bfloat16, float32, int32, nn, ops
from mindspore.ops import constexpr

BLOCK = 2 ** 25  # numbers in the largest temporary: more attention scores or taps than this are computed by blocks
FEW = 4  # input channels from which on a CPU convolves faster our way than its own


@constexpr
def nth(name, number):
    """The checkpoint's name for one of several layers; a graph's own code has no f-strings."""
    return f"{name}.{number}"


@constexpr
def on_cpu():
    return mindspore.get_context("device_target") == "CPU"


def blocks(numbers):
    """How many blocks a temporary of so many numbers is computed in, so that memory does not grow with the clip."""
    return -(-numbers // BLOCK)


def int_tensor(array):
    return Tensor(array.astype(np.int32))


# ----------------------------------------------------------------------------------------------- blocks of UNet and VAE

def resnet(x, embedding, p, groups, eps, loop):
    """diffusers' ResnetBlock2D: x (N, H, W, I) -> (N, H, W, O). embedding (N, E) is after its silu; None in the VAE."""
    y = conv2d(silu(group_norm(x, p["norm1"], groups, eps)), p["conv1"], loop)
    if "time_emb_proj" in p:
        y = y + at_positions(linear(embedding, p["time_emb_proj"]), y.shape).reshape(y.shape)  # a broadcast
    y = conv2d(silu(group_norm(y, p["norm2"], groups, eps)), p["conv2"], loop)
    return y + (conv1x1(x, p["conv_shortcut"]) if "conv_shortcut" in p else x)


def spatial_transformer(x, p, heads, groups):
    """diffusers' Transformer2DModel (norm's eps 1e-6): x (N, H, W, C), attended to as H * W positions."""
    y = conv1x1(group_norm(x, p["norm"], groups, 1e-6), p["proj_in"])
    y = transformer_block(y.reshape(y.shape[0], -1, y.shape[3]), p["transformer_blocks.0"], heads)
    return x + conv1x1(y.reshape(x.shape), p["proj_out"])


def transformer_block(x, p, heads):
    """diffusers' BasicTransformerBlock (norms' eps 1e-5): x (N, L, C). There is no text: attn2 attends to x too."""
    x = x + attention(layer_norm(x, p["norm1"], 1e-5), p["attn1"], heads)
    x = x + attention(layer_norm(x, p["norm2"], 1e-5), p["attn2"], heads)
    y, gate = halves(linear(layer_norm(x, p["norm3"], 1e-5), p["ff"]["net.0.proj"]))
    return x + linear(y * gelu(gate), p["ff"]["net.2"])


def image_attention(x, p, groups):
    """The attention block of diffusers' VAE (eps 1e-6), one head over all positions: x (N, H, W, C)."""
    y = group_norm(x, p["group_norm"], groups, 1e-6).reshape(x.shape[0], -1, x.shape[3])
    return x + attention(y, p, heads=1).reshape(x.shape)


def attention(x, p, heads):
    """diffusers' Attention without its norm: x (N, L, C)."""
    y = multi_head_attention(linear(x, p["to_q"]), linear(x, p["to_k"]), linear(x, p["to_v"]), None, heads)
    return linear(y, p["to_out.0"])


def conv2d(x, p, loop, stride=1, upsample_to=None, padding=1):
    """3x3 convolution: x (N, H, W, I) -> (N, H_out, W_out, O), of the size of x over the stride, rounded up.

    With `loop` the padding in time is the other end of the image, and the stride must divide H.
    upsample_to: (H_out, W_out) to which the image is cut, doubled first (nearest neighbour; diffusers' Upsample2D)
    padding: 0 pads below and to the right alone, H and W even, as a VAE's encoder does (diffusers' Downsample2D)
    """
    return convolution(x, p, geometry2d(x.shape, stride, upsample_to, loop, padding))


# ---------------------------------------------------------------------------------------------- blocks of CLAP's towers

def bert_layer(x, mask, p, heads, eps):
    """transformers' RobertaLayer (norms after the residuals): x (N, L, C), mask (N, 1, 1, L) added to the scores."""
    y = bert_attention(x, mask, p["attention"], heads)
    x = layer_norm(x + y, p["attention"]["output"]["LayerNorm"], eps)
    y = bert_linear(gelu(bert_linear(x, p["intermediate"]["dense"])), p["output"]["dense"])
    return layer_norm(x + y, p["output"]["LayerNorm"], eps)


def bert_attention(x, bias, p, heads):
    """transformers' RobertaAttention without its norm: x (N, L, C), bias as in `multi_head_attention`."""
    q, k, v = (bert_linear(x, p["self"]["query"]), bert_linear(x, p["self"]["key"]), bert_linear(x, p["self"]["value"]))
    return bert_linear(multi_head_attention(q, k, v, bias, heads), p["output"]["dense"])


def swin_block(x, p, window, shift, heads, eps):
    """transformers' ClapAudioLayer: x (N, size, size, C), each position attending to those in its window."""
    n, size, _, c = x.shape
    l, count = window * window, size * size // (window * window)
    rows, inverse, places, mask = windows(size, window, shift)
    y = layer_norm(x, p["layernorm_before"], eps).reshape(n, size * size, c)
    y = ops.gather(y, rows, 1).reshape(n * count, l, c)
    bias = ops.gather(p["attention"]["self"]["relative_position_bias_table"], places, 0).transpose(1, 0)
    # a product instead of a broadcast: its gradient, a sum over windows, is four times as fast
    ones = ops.zeros((n * count, 1), bias.dtype) + 1
    bias = ops.MatMul()(ones, bias.reshape(1, -1)).reshape(n, count, heads, l, l)
    bias = bias + mask if shift else bias
    y = bert_attention(y, bias.reshape(-1, heads, l, l), p["attention"], heads)
    x = x + ops.gather(y.reshape(n, size * size, c), inverse, 1).reshape(x.shape)
    y = gelu(linear(layer_norm(x, p["layernorm_after"], eps), p["intermediate"]["dense"]))
    return x + linear(y, p["output"]["dense"])


def relative_positions(window):
    """For each pair of places in a window, the row of the table of biases: int (window ** 2, window ** 2)."""
    y, x = np.divmod(np.arange(window * window), window)
    return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1


@constexpr
def windows(size, window, shift):
    """What attention in shifted windows (Liu et al., 2021, figure 4) reads, L = window * window, as Tensors.

    The row of the flattened image (size * size) at each place of each window, and its inverse; the row of the table of
    relative positions for each pair of places (L * L); and a mask (windows, 1, L, L), added to the scores.
    The image is rolled by `shift`, so that the last windows hold its first rows and columns too: the mask is -100
    between places that are neighbours by that alone.
    """
    def split(image):
        windowed = image.reshape(size // window, window, size // window, window).transpose(0, 2, 1, 3)
        return windowed.reshape(-1, window * window)

    rows = split(np.roll(np.arange(size * size).reshape(size, size), (-shift, -shift), (0, 1))).reshape(-1)
    places = relative_positions(window)
    wrapped = np.arange(size) >= size - shift
    region = split(2 * wrapped[:, None] + wrapped)
    mask = np.where(region[:, None, :, None] == region[:, None, None], 0, -100)  # not -inf: as in the reference
    return (*(int_tensor(x.reshape(-1)) for x in (rows, np.argsort(rows), places)), Tensor(mask.astype(np.float32)))


def patch_merging(x, p):
    """transformers' ClapAudioPatchMerging: x (N, size, size, C) -> (N, size / 2, size / 2, 2 C)."""
    n, size, _, c = x.shape
    x = x.reshape(n, size // 2, 2, size // 2, 2, c).transpose(0, 1, 3, 4, 2, 5).reshape(n, size // 2, size // 2, 4 * c)
    return linear(layer_norm(x, p["norm"], 1e-5), p["reduction"])


# --------------------------------------------------------------------------------------------------- blocks of HiFi-GAN

def hifigan_block(x, p, dilations, slope):
    """HiFi-GAN's residual block (Kong et al., 2020, type 1): x (N, L, C)."""
    for i in range(len(dilations)):
        y = conv1d(leaky_relu(x, slope), p[nth("convs1", i)], dilations[i])
        x = x + conv1d(leaky_relu(y, slope), p[nth("convs2", i)])
    return x


def conv1d(x, p, dilation=1):
    """x (N, L, I) -> (N, L, O), zero-padded to keep its length; weight (O, I, K), K odd."""
    geometry = geometry1d(x.shape, p["weight"].shape, dilation)
    p = {"weight": ops.ExpandDims()(p["weight"], -1), "bias": p["bias"]}
    return convolution(x, p, geometry)


def conv_transpose1d(x, p, stride):
    """torch's ConvTranspose1d with HiFi-GAN's padding: x (N, L, I), weight (I, O, K) -> (N, stride * L, O).

    It is one sample longer if K - stride is odd. As a plain convolution with one set of output channels for each of
    the `stride` phases, so that no device needs a transposed one.
    """
    i, o, kernel = p["weight"].shape
    geometry, sort = polyphase_layout(x.shape, kernel, stride)
    taps = ops.MatMul()(p["weight"].reshape(-1, kernel), ops.Cast()(sort, p["weight"].dtype))
    weight = taps.reshape(i, o, stride, -1).transpose(2, 1, 0, 3).reshape(stride * o, i, -1, 1)
    bias = ops.broadcast_to(p["bias"].reshape(1, -1), (stride, o)).reshape(-1)
    y = convolution(x, {"weight": weight, "bias": bias}, geometry).reshape(x.shape[0], -1, o)
    # a slice that is all of it takes MindSpore long
    return y[:, :x.shape[1] * stride + 1] if (kernel - stride) % 2 else y


def polyphase(kernel, stride):
    """(first, taps): the `stride` outputs of a transposed convolution from stride * q on read `taps` inputs, from
    q - first on.

    Position t = stride * q + phase sums the inputs i whose tap k = t + padding - stride * i lies in [0, kernel), with
    HiFi-GAN's padding (kernel - stride) // 2.
    """
    padding = (kernel - stride) // 2
    first = (kernel - 1 - padding) // stride
    return first, first + 1 + (stride - 1 + padding) // stride


@constexpr
def polyphase_layout(shape, kernel, stride):
    """The geometry of the plain convolution, of whose outputs each holds `stride` samples, and float32 (K, phases *
    taps), which sorts the taps of a transposed convolution's weight by phase."""
    n, l, _ = shape
    first, taps = polyphase(kernel, stride)
    k = np.arange(stride)[:, None] + (kernel - stride) // 2 + stride * (first - np.arange(taps))
    sort = np.arange(kernel)[:, None] == k.reshape(-1)
    out_size = l + (kernel - stride) % 2, 1
    return (n, (l, 1), out_size, (taps, 1), (1, 1), (1, 1), (first, 0), 1, False), Tensor(sort.astype(np.float32))


# ----------------------------------------------------------------------------------------- products, norms, activations

@constexpr
def row_shape(shape):
    """The shape (P, C) of (..., C)."""
    return -1, shape[-1]


@constexpr
def positions(shape):
    """The shape (..., any C) of what is at the positions of (..., C)."""
    return *shape[:-1], -1


def in_rows(x):
    """x (..., C) -> (P, C). What is called often takes its shapes from constexpr: they compile faster."""
    return ops.Reshape()(x, row_shape(x.shape))


def linear(x, p):
    """x (..., I), weight (O, I), bias (O,) if there is one -> (..., O)."""
    y = ops.MatMul(transpose_b=True)(in_rows(x), p["weight"])
    y = ops.BiasAdd()(y, p["bias"]) if "bias" in p else y
    return ops.Reshape()(y, positions(x.shape))


def conv1x1(x, p):
    """x (..., I), weight (O, I, 1, 1) or another that flattens to (O, I), such as whole patches' -> (..., O)."""
    return linear(x, {"weight": ops.Flatten()(p["weight"]), "bias": p["bias"]})


def bert_linear(x, p):
    """`linear`, for few rows, such as a prompt's tokens, as (W x^T)^T, which is faster on a CPU: oneDNN packs a
    product's second matrix anew each time."""
    rows = in_rows(x)
    if rows.shape[0] >= 64:
        return linear(x, p)
    y = ops.MatMul(transpose_b=True)(p["weight"], rows)
    return ops.Reshape()(ops.BiasAdd()(ops.Transpose()(y, (1, 0)), p["bias"]), positions(x.shape))


def layer_norm(x, p, eps):
    """x (..., C), normalised over C (Ba et al., 2016), in float32."""
    y, weight, bias = ops.Cast()(x, float32), ops.Cast()(p["weight"], float32), ops.Cast()(p["bias"], float32)
    if on_cpu():  # by products: three times as fast as the operator, whose gradient uses one core
        y = in_rows(y)
        average, along_row, _ = along_rows(y.shape)
        y = y - ops.MatMul()(ops.MatMul()(y, average), along_row)
        scale = ops.rsqrt(ops.MatMul()(y * y, average) + eps)
        y = add_bias(y * ops.MatMul()(scale, ops.Reshape()(weight, along_row.shape)), bias)
        return ops.Cast()(ops.Reshape()(y, x.shape), x.dtype)
    return ops.Cast()(ops.LayerNorm(-1, -1, eps)(y, weight, bias)[0], x.dtype)


@constexpr
def along_rows(shape):
    """Float32 (C, 1) of 1 / C, and ones, (1, C) and (1, P), for rows (P, C)."""
    p, c = shape
    return tuple(Tensor(x.astype(np.float32)) for x in (np.full((c, 1), 1 / c), np.ones((1, c)), np.ones((1, p))))


def gelu(x):
    """The exact GELU, x * Phi(x): CLAP and the UNet were trained with it, not with the tanh approximation."""
    y = ops.Cast()(x, float32) if x.dtype == bfloat16 else x  # CANN's aclnnErf takes no bfloat16 on an Atlas A2
    return x * ops.Cast()(ops.erf(y * 0.5 ** 0.5) * 0.5 + 0.5, x.dtype)


def silu(x):
    """x * sigmoid(x). The gradient of MindSpore's own computes the sigmoid once more."""
    return x * ops.sigmoid(x) if on_cpu() else ops.silu(x)


def leaky_relu(x, slope):
    """x where it is positive, else slope * x. MindSpore's own is a maximum, whose gradient takes far longer."""
    return x + ops.relu(x * (slope - 1))


def tanh(x):
    """Elementwise, by the sigmoid: MindSpore's own tanh is off by up to 1e-4 on a CPU, and passes 1."""
    return ops.sigmoid(x * 2) * 2 - 1


def halves(x):
    """x (..., 2 C) -> (..., C) twice. CANN names bfloat16 for slices, not for Split (ops-math, conversion/split)."""
    c = x.shape[-1] // 2
    return (x[..., :c], x[..., c:]) if x.dtype == bfloat16 else ops.Split(-1, 2)(x)


def group_norm(x, p, groups, eps):
    """x (N, H, W, C), normalised over H, W and the C / groups channels of each group; statistics in float32.

    In rows throughout: MindSpore frees the memory of what is reshaped late, and a VAE would take twice as much.
    """
    shape, y = x.shape, in_rows(ops.Cast()(x, float32))
    y = y + at_positions(group_means(y, shape, groups) * -1, shape)  # the gradient of a difference negates (P, C)
    y = y * at_positions(p["weight"] * ops.rsqrt(group_means(y * y, shape, groups) + eps), shape)
    return ops.Reshape()(add_bias(ops.Cast()(y, x.dtype), p["bias"]), shape)


def add_bias(x, bias):
    """x (P, C) + bias (C,), of an image. `linear` has many more of them, and each takes MindSpore's compiler longer."""
    return bias_rows(x, bias) if on_cpu() else ops.BiasAdd()(x, bias)


# Matrix products average and repeat fast on a CPU with channels last. Elsewhere means stay means: MindSpore has an
# Ascend 910A or 310P multiply matrices in float16 (op_api_util.cc, GetCubeMathType), where y * y overflows.

def group_means(x, shape, groups):
    """x (P, C) -> for each channel the mean over H, W and the C / groups channels of its group, (N, C)."""
    n, c = shape[0], shape[3]
    if on_cpu():
        images, average, group = averages(shape, groups)
        means = ops.BatchMatMul()(average, ops.Reshape()(x, images))
        return ops.MatMul()(in_rows(means), group)
    means = ops.ReduceMean(True)(ops.ReduceMean()(x.reshape(n, -1, c), 1).reshape(n, groups, c // groups), 2)
    return ops.broadcast_to(means, (n, groups, c // groups)).reshape(n, c)


def at_positions(x, shape):
    """x (N, C) at all positions of each image of a shape (N, H, W, C): (P, C)."""
    if on_cpu():
        places, ones = repeats(shape, x.dtype)
        return in_rows(ops.BatchMatMul()(ones, ops.Reshape()(x, places)))
    n, c = x.shape
    return ops.broadcast_to(x.reshape(n, 1, c), (n, shape[1] * shape[2], c)).reshape(-1, c)


@constexpr
def averages(shape, groups):
    """The shape (N, H * W, C), and what averages positions, (N, 1, H * W), and the channels of each group, (C, C)."""
    n, h, w, c = shape
    return ((n, h * w, c), Tensor(np.full((n, 1, h * w), 1 / (h * w), np.float32)),
            Tensor(np.kron(np.eye(groups), np.full((c // groups, c // groups), groups / c)).astype(np.float32)))


@constexpr
def repeats(shape, dtype):
    """The shape (N, 1, C) and what repeats that at all positions of each image (N, H, W, C), (N, H * W, 1)."""
    n, h, w, _ = shape
    return (n, 1, -1), Tensor(np.ones((n, h * w, 1)), dtype)


# ------------------------------------------------------------------------------------------------------------ attention

def multi_head_attention(q, k, v, bias, heads):
    """softmax(q k^T / sqrt(C / heads) + bias) v, each head on its own; softmax in float32.

    q, k, v (N, L, C); bias broadcasts to (N, heads, L, L), or is None -> (N, L, C). Vaswani et al., 2017, equation 1.
    The heads come before L by a gather where x.reshape(N, L, heads, D).transpose(0, 2, 1, 3) would do: it is faster.
    """
    shape, (rows, to_heads, from_heads, scale, count) = q.shape, head_order(q.shape, heads)
    q = take_rows(ops.Reshape()(q * scale, rows), to_heads)
    k = take_rows(ops.Reshape()(k, rows), to_heads)
    v = take_rows(ops.Reshape()(v, rows), to_heads)
    y = attend(q, k, v, bias) if count == 1 or bias is not None else attend_by_blocks(q, k, v, count)
    return ops.Reshape()(take_rows(ops.Reshape()(y, rows), from_heads), shape)


def attend(q, k, v, bias):
    """Scaled queries q (N, heads, M, D), k and v (N, heads, L, D) -> (N, heads, M, D)."""
    scores = ops.Cast()(ops.BatchMatMul(transpose_b=True)(q, k), float32)
    scores = scores if bias is None else scores + bias
    shares = softmax_rows(scores) if on_cpu() else ops.Softmax(-1)(scores)
    return ops.BatchMatMul()(ops.Cast()(shares, v.dtype), v)


def attend_by_blocks(q, k, v, count):
    """The same, `count` blocks of queries one after the other: every query has its own softmax, so nothing changes."""
    n, heads, l, d = q.shape
    size = -(-l // count)
    q = ops.cat((q, ops.zeros((n, heads, count * size - l, d), q.dtype)), 2) if count * size > l else q
    q = q.reshape(n, heads, count, size, d).transpose(2, 0, 1, 3, 4)
    y, i = ops.zeros_like(q), Tensor(0, int32)
    while i < count:
        y = ops.tensor_scatter_update(y, i.reshape(1, 1), attend(ops.gather(q, i, 0), k, v, None).expand_dims(0))
        i = i + 1
    return y.transpose(1, 2, 0, 3, 4).reshape(n, heads, count * size, d)[:, :, :l]


@constexpr
def head_order(shape, heads):
    """How (N, L, C) is split into heads, and joined.

    The shape (P * heads, D) of rows to gather; which they are, int32 (N, heads, L), and which on the way back, (P,
    heads); D ** -0.5; and how many blocks the scores are computed in.
    """
    n, l, c = shape
    order = np.arange(n * l * heads)
    return ((-1, c // heads), int_tensor(order.reshape(n, l, heads).transpose(0, 2, 1)),
            int_tensor(order.reshape(n, heads, l).transpose(0, 2, 1).reshape(n * l, heads)),
            (c // heads) ** -0.5, blocks(n * heads * l * l))


def take_rows(x, rows):
    """`read_rows` where the device is a CPU, or what is the same elsewhere if no row is -1."""
    return read_rows(x, rows) if on_cpu() else ops.Gather()(x, rows, 0)


# ---------------------------------------------------------------------------------------------------------- convolution
# What a convolution is, and three ways to compute it. A geometry describes one but for its weight: (N, input size,
# output size, kernel, stride, dilation, padding, scale, loop). Sizes and the four after them are pairs (height, width).
# `scale` 2 reads the image as if its pixels were doubled both ways and it was cut to the output's size; `loop` repeats
# it along H. A sequence is an image one pixel wide. Rows are the positions of all images one after the other, (P, C).

def plain_convolution(x, weight, geometry):
    """The definition, of NumPy arrays, for readers and tests: x (N, H, W, I), weight (O, I, KH, KW)."""
    _, _, size, kernel, stride, dilation, padding, scale, loop = geometry
    x = x.repeat(scale, axis=1).repeat(scale, axis=2)
    x = x[:, :size[0], :size[1]] if scale > 1 else x
    for axis in (0, 1):  # zeros, or the loop's other end, before and after the image
        before = padding[axis]
        after = max(0, (size[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1 - before
                    - x.shape[1 + axis])
        pads = [(before, after) if i == 1 + axis else (0, 0) for i in range(4)]
        x = np.pad(x, pads, mode="wrap" if loop and axis == 0 else "constant")
    y = 0
    for i, j in np.ndindex(*kernel):
        rows, columns = (tap * dilation[axis] + stride[axis] * np.arange(size[axis]) for axis, tap in enumerate((i, j)))
        y = y + x[:, rows][:, :, columns] @ weight[:, :, i, j].T
    return y


def convolution(x, p, geometry):
    """By the way that is fast on the device: x (N, H, W, I) or (N, L, I) -> (N, H_out, W_out, O) or (N, H_out, O).

    p: bias (O,), and weight (O, I, KH, KW), or what `fast_weight` (three axes) or `gathered_weight` (two) made of it
        before: worth it for many calls
    """
    compute = way_to_convolve(p["weight"].shape, p["weight"].dtype, geometry)
    y = add_bias(compute(in_rows(x), p["weight"], geometry), p["bias"])
    return ops.Reshape()(y, output_shape(x.shape, geometry))


@constexpr
def output_shape(shape, geometry):
    """(N, H_out, W_out, any O) of an image of a shape, (N, H_out, any O) of a sequence."""
    n, _, out_size, *_ = geometry
    return n, *out_size[:len(shape) - 2], -1


@constexpr
def way_to_convolve(shape, dtype, geometry):
    """Which of the ways below is for a weight of this shape and dtype."""
    if not on_cpu():
        return native_convolution
    if len(shape) < 4:
        return fast_convolution if len(shape) == 3 else gathered_convolution
    if shape[1] < FEW and dtype == float32:
        return native_convolution
    _, _, _, kernel, stride, *_ = geometry
    return fast_from_checkpoint if max(kernel) <= 16 and is_fast(dtype, stride) else gathered_from_checkpoint


def is_fast(dtype, stride):
    """Whether `fast_convolution` is for this on a CPU: its sums cancel, so the CPU must multiply exactly.

    Asked for bfloat16 (weights.py: `tensor_dtype`), oneDNN rounds the factors if the processor has AMX.
    """
    asked = os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT").upper() not in ("STRICT", "F32")
    cpu = pathlib.Path("/proc/cpuinfo")
    rounded = asked and cpu.exists() and "amx_bf16" in cpu.read_text()
    return dtype == float32 and stride == (1, 1) and not rounded


@constexpr
def geometry2d(shape, stride, upsample_to, loop, padding=1):
    """Of an image (N, H, W, C)."""
    out_size = upsample_to or tuple((size - 1) // stride + 1 for size in shape[1:3])
    return (shape[0], shape[1:3], out_size, (3, 3), (stride, stride), (1, 1), (padding, padding),
            2 if upsample_to else 1, loop)


@constexpr
def geometry1d(shape, weight_shape, dilation):
    """Of a sequence (N, L, I) and a weight (O, I, K); the output is as long."""
    (n, l, _), kernel = shape, weight_shape[2]
    return n, (l, 1), (l, 1), (kernel, 1), (1, 1), (dilation, 1), (dilation * (kernel - 1) // 2, 0), 1, False


def native_convolution(x, weight, geometry):
    """By the device's own operator: x (N * H * W, I), weight (O, I, KH, KW) -> (N * H_out * W_out, O).

    A sequence lies along the width, as in MindSpore's Conv1d. CANN takes a height of up to 100,000, and a width of up
    to 2 ** 32 - 1 (its TBE source, FMAP_H_MAX and FMAP_W_MAX); the vocoder has 163,872 samples at once.
    """
    n, *pairs, scale, loop = geometry
    if pairs[0][1] == 1 and weight.shape[3] == 1:
        pairs, weight = [pair[::-1] for pair in pairs], weight.reshape(*weight.shape[:2], 1, -1)
    (h, w), out_size, kernel, stride, dilation, padding = pairs
    o, i = weight.shape[:2]
    x = x.reshape(n, h, w, i)
    if scale > 1:
        x = ops.broadcast_to(x.reshape(n, h, 1, w, 1, i), (n, h, scale, w, scale, i))
        h, w = out_size
        x = x.reshape(n, x.shape[1] * scale, x.shape[3] * scale, i)[:, :h, :w]
    if loop:
        x = ops.cat((x[:, h - padding[0]:], x, x[:, :padding[0]]), 1)
        h, padding = h + 2 * padding[0], (0, padding[1])
    # the far sides get what out_size needs, which is not what the near sides get in a transposed convolution
    bottom = max(0, (out_size[0] - 1) * stride[0] + dilation[0] * (kernel[0] - 1) + 1 - padding[0] - h)
    right = max(0, (out_size[1] - 1) * stride[1] + dilation[1] * (kernel[1] - 1) + 1 - padding[1] - w)
    convolve = ops.Conv2D(o, kernel, pad_mode="pad", pad=(padding[0], bottom, padding[1], right), stride=stride,
                          dilation=dilation)
    return convolve(x.transpose(0, 3, 1, 2), weight).transpose(0, 2, 3, 1).reshape(-1, o)


def gathered_weight(weight):
    """weight (O, I, KH, KW) as `gathered_convolution` takes it, (O, K * I)."""
    o, i, _, _ = weight.shape
    return weight.reshape(o, i, -1).transpose(0, 2, 1).reshape(o, -1)


def gathered_convolution(x, weight, geometry):
    """A convolution as a gather and a matrix product: what is fast where the native kernel is slow (CPU).

    x (N * H * W, I), weight (O, K * I) from `gathered_weight` -> (N * H_out * W_out, O)
    """
    def block(x, rows):
        return ops.MatMul(transpose_b=True)(ops.Flatten()(read_rows(x, rows)), weight)

    return in_blocks(block, x, tap_rows(geometry, x.shape[1]))


def gathered_from_checkpoint(x, weight, geometry):
    return gathered_convolution(x, gathered_weight(weight), geometry)


def padded_image(geometry, size):
    """The image that a convolution reads, (N, height, width), of at least `size`: at each place, padding before it
    included, the row of the flattened input, or -1 for a zero outside."""
    n, in_size, out_size, *_, padding, scale, loop = geometry
    rows = 1 + np.arange(n * math.prod(in_size)).reshape(n, *in_size).repeat(scale, axis=1).repeat(scale, axis=2)
    rows = rows[:, :out_size[0], :out_size[1]] if scale > 1 else rows
    above, left = ((before, max(0, size[i] - before - rows.shape[1 + i])) for i, before in enumerate(padding))
    rows = np.pad(rows, ((0, 0), above, (0, 0)), mode="wrap" if loop else "constant")
    return np.pad(rows, ((0, 0), (0, 0), left)) - 1


@constexpr
def tap_rows(geometry, channels):
    """For each block of output positions, int32 (positions, K): the row of the flattened input under each tap, -1 where
    there is none."""
    _, _, out_size, kernel, stride, dilation, *_ = geometry
    span = [(kernel[i] - 1) * dilation[i] + 1 for i in (0, 1)]
    image = padded_image(geometry, [(out_size[i] - 1) * stride[i] + span[i] for i in (0, 1)])
    taps = np.lib.stride_tricks.sliding_window_view(image, span, (1, 2))
    taps = taps[:, ::stride[0], ::stride[1], ::dilation[0], ::dilation[1]]
    rows = taps[:, :out_size[0], :out_size[1]].reshape(-1, math.prod(kernel))
    step = -(-len(rows) // blocks(rows.size * channels))
    return tuple(int_tensor(rows[begin:begin + step]) for begin in range(0, len(rows), step))


def in_blocks(function, x, rows):
    """What function(x, block) makes of all blocks of rows, one after the other: they share memory."""
    if len(rows) == 1:
        return function(x, rows[0])
    parts = ()
    for block in rows:
        parts = parts + (function(ops.Depend()(x, parts), block),)
    return ops.Concat(0)(parts)


def fast_convolution(x, weight, geometry):
    """Winograd's way, for stride 1: two to four times fewer multiplications (Lavin & Gray, 2016, arXiv 1509.09308).

    x (N * H * W, I), weight (products, O, I) from `fast_weight` -> (N * H_out * W_out, O)
    The input is cut into overlapping tiles, each of which becomes `products` numbers a channel; there the convolution
    is one matrix product for each of these; what comes out becomes the tile's outputs.
    """
    to_products, to_outputs, products_shape, outputs_shape, rows = fast_constants(geometry, weight.shape)

    def block(x, rows):
        tiles = ops.MatMul()(to_products, ops.Flatten()(read_rows(x, rows[0]))).reshape(products_shape)
        tiles = ops.Flatten()(ops.BatchMatMul(transpose_b=True)(tiles, weight))
        return read_rows(ops.MatMul()(to_outputs, tiles).reshape(outputs_shape), rows[1])

    return in_blocks(block, x, rows)


def fast_weight(weight, outputs):
    """weight (O, I, KH, KW) as `fast_convolution` takes it, (products, O, I), for tiles of so many outputs an axis."""
    g, taps, laid_out = fast_weight_transform(weight.shape, outputs)
    return ops.MatMul(transpose_b=True)(g, weight.reshape(taps)).reshape(laid_out)


def fast_from_checkpoint(x, weight, geometry):
    # not before x is there, or all weights of a graph would be in memory at once
    return fast_convolution(x, fast_weight(ops.Depend()(weight, x), 4), geometry)


def prepared_weight(weight, stride):
    """A Tensor (O, I, KH, KW) as `convolution` multiplies with it on a CPU, in NumPy: MindSpore would compile each."""
    array = weight.asnumpy()
    if not is_fast(weight.dtype, (stride, stride)):
        return np.ascontiguousarray(gathered_weight(array))
    # the largest weights are for the smallest images, which have few tiles of 4 by 4 outputs
    g, taps, laid_out = fast_weight_transform(weight.shape, 4 if weight.size < 2 ** 20 else 2)
    return (g.asnumpy() @ array.reshape(taps).T).reshape(laid_out)


def prepared_shapes(shape):
    """The shapes that `prepared_weight` has of a kernel of a shape (O, I, KH, KW)."""
    o, i, *kernel = shape
    products = (math.prod(len(fast_filter(taps, outputs)[1]) for taps in kernel) for outputs in (2, 4))
    return (o, math.prod(kernel) * i), *((n, o, i) for n in products)


@constexpr
def fast_weight_transform(shape, outputs):
    """G of both axes at once (products, K), float32, and the shapes before and after it."""
    g = np.kron(*(fast_filter(taps, outputs)[1] for taps in shape[2:])).astype(np.float32)
    return Tensor(g), (-1, g.shape[1]), (len(g), -1, shape[1])


@constexpr
def fast_constants(geometry, weight_shape):
    """(to_products, to_outputs, products_shape, outputs_shape, rows) of `fast_convolution`.

    Float32 (products, inputs) and (outputs, products), `toom_cook`'s B and A of both axes at once, for flattened tiles;
    two shapes between the steps; and `tile_rows`.
    """
    (a_h, b_h), (a_w, b_w) = fast_filters(geometry[3], weight_shape[0])
    a, b, (products, o, i) = np.kron(a_h, a_w), np.kron(b_h, b_w), weight_shape
    return (Tensor(b.astype(np.float32)), Tensor(a.astype(np.float32)), (products, -1, i), (-1, o),
            tile_rows(geometry, weight_shape))


def tile_rows(geometry, weight_shape):
    """For each block of tiles, what they read and where their outputs are, both int32.

    The row of the flattened input at each place of each tile, (inputs, tiles), as in `tap_rows`; and for each
    position of the flattened output, in order, its row among (outputs * tiles). The places of a tile are `dilation`
    apart; the tiles of a dilated convolution interleave.
    """
    n, _, out_size, kernel, _, dilation, *_ = geometry
    along = []
    for (a, b), size, step in zip(fast_filters(kernel, weight_shape[0]), out_size, dilation):
        tile = np.arange(-(-size // (step * len(a))) * step)
        origin = tile // step * step * len(a) + tile % step
        along.append([origin + step * np.arange(places)[:, None] for places in (b.shape[1], len(a))])
    (y, y_out), (x, x_out) = along

    def in_tiles(geometry, y, x):  # the row at each place of each tile: (places, N * tiles along H, tiles along W)
        image = padded_image(geometry, (y.max() + 1, x.max() + 1))
        return image[:, y][..., x].transpose(1, 3, 0, 2, 4).reshape(len(y) * len(x), -1, x.shape[1])

    read = in_tiles(geometry, y, x)
    written = in_tiles((n, out_size, out_size, (0, 0), 1, False), y_out, x_out)  # the output, without padding
    groups = read.shape[1] // dilation[0]
    step = -(-groups // blocks(read[0].size * weight_shape[0] * max(weight_shape[1:]))) * dilation[0]
    result = ()
    for begin in range(0, read.shape[1], step):
        places = written[:, begin:begin + step].reshape(-1)
        order = np.argsort(places)[(places < 0).sum():]
        result += (int_tensor(read[:, begin:begin + step].reshape(len(read), -1)), int_tensor(order)),
    return result


def fast_filters(kernel, products):
    """`fast_filter` for height and width of a kernel that takes so many products a tile, with 2 or 4 outputs."""
    for outputs in (2, 4):
        (a_h, g_h, b_h), (a_w, g_w, b_w) = (fast_filter(taps, outputs) for taps in kernel)
        if len(g_h) * len(g_w) == products:
            return (a_h, b_h), (a_w, b_w)


@functools.cache
def fast_filter(kernel, outputs):
    """`toom_cook`'s matrices for one axis of a convolution; a kernel of more than 4 taps has 16 outputs, always.

    It is split in parts of 4 taps: the correlation over parts is itself done in fewer products (Kronecker).
    """
    if kernel <= 4:
        return toom_cook(outputs if kernel > 1 else 1, kernel)
    outer, inner = toom_cook(4, -(-kernel // 4)), toom_cook(4, 4)
    a, g, b = (np.kron(x, y) for x, y in zip(outer, inner))
    part, place = np.divmod(np.arange(b.shape[1]), 7)  # toom_cook(4, 4) reads 7 inputs; a part begins 4 after the last
    return a, g[:, :kernel], (b @ np.eye(kernel + 24)[4 * part + place])[:, :kernel + 15]


POINTS = (0, 1, -1, 1 / 2, -2, -1 / 2)  # exact in float32, and their first powers differ little in size


def toom_cook(outputs, taps):
    """Matrices (A, G, B) for a correlation y of d with g in outputs + taps - 1 products: y = A ((G g) * (B d)).

    Polynomials are evaluated at points, the last of them infinity, multiplied there, and interpolated; a correlation
    is the transpose of that (Winograd, 1980). Points: Barabasz et al., 2018, arXiv 1803.10986.
    """
    points = np.array(POINTS[:outputs + taps - 2])
    others = [np.delete(points, j) for j in range(len(points))]

    def evaluation(size):
        return np.vstack([np.vander(points, size, increasing=True), np.eye(size)[-1:]])

    interpolation = [*(np.append(np.poly(other)[::-1], 0) for other in others), np.atleast_1d(np.poly(points))[::-1]]
    scale = [*(np.prod(point - other) for point, other in zip(points, others)), 1]  # in G, so that B is exact
    return evaluation(outputs).T, evaluation(taps) / np.array(scale)[:, None], np.array(interpolation)


# ----------------------------------------------------------------------------------------------------------- gradients
# Three operators whose gradients, `bprop`, are faster on a CPU than MindSpore's: training alone uses those. Products
# with ones sum and repeat there, as MindSpore's sums and broadcasts use one core.

class RowBias(nn.Cell):
    """ops.BiasAdd of x (P, C) and bias (C,)."""

    def construct(self, x, bias):
        return ops.BiasAdd()(x, bias)

    def bprop(self, x, bias, _, gradient):
        return gradient, ops.MatMul()(along_rows(x.shape)[2], gradient).reshape(-1)


class RowSoftmax(nn.Cell):
    """ops.Softmax over the last axis of x (..., L)."""

    def construct(self, x):
        return ops.Softmax(-1)(x)

    def bprop(self, x, y, gradient):
        _, along_row, _ = along_rows(in_rows(x).shape)
        y, weighted = in_rows(y), in_rows(y * gradient)
        total = ops.MatMul()(ops.MatMul(transpose_b=True)(weighted, along_row), along_row)
        return (ops.Reshape()(weighted - y * total, x.shape),)


class RowReader(nn.Cell):
    """x (P, C), int32 rows (...) -> (..., C), zeros where a row is -1.

    Of the operators that read rows, EmbeddingLookup alone uses all cores of a CPU. Its own gradient is a sparse tensor;
    this one is the sum of what was read of each row, by lookups again where they are few, as UnsortedSegmentSum uses
    one core.
    """

    def construct(self, x, rows):
        return ops.EmbeddingLookup()(x, rows, 0)

    def bprop(self, x, rows, _, gradient):
        places = readers(rows, x.shape[0])
        if len(places) > 16:
            return ops.UnsortedSegmentSum()(gradient, rows, x.shape[0]), ops.zeros_like(rows)
        gradient = in_rows(gradient)
        parts = [ops.EmbeddingLookup()(gradient, place, 0) for place in places]
        return parts[0] if len(parts) == 1 else ops.AddN()(parts), ops.zeros_like(rows)


@constexpr
def readers(rows, count):
    """Where each of `count` rows is read: int32 (count,) of its first place in the flattened rows, its second, ..., -1
    where there is none."""
    flat = rows.asnumpy().reshape(-1)
    order = np.argsort(flat, kind="stable")[(flat < 0).sum():]
    read = flat[order]
    nth_reader = np.arange(len(read)) - np.searchsorted(read, read)
    places = np.full((nth_reader.max() + 1, count), -1)
    places[nth_reader, read] = order
    return tuple(int_tensor(place) for place in places)


bias_rows, softmax_rows, read_rows = RowBias(), RowSoftmax(), RowReader()
