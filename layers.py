"""The leaves and blocks that MusicLDM's models are built from, as pure MindSpore functions.

Axis letters: N batch, H time and W frequency of an image (a latent or a log-mel spectrogram), L positions of a
sequence, C channels, I and O channels into and out of a layer, K taps of a convolution.
Activations are channels-last everywhere: images are (N, H, W, C), sequences (N, L, C), or (N * L, C) beside their
`shape` (N, L, C). A leaf returns its input's dtype. Parameters are the sub-dict of the checkpoint that holds a layer;
leaves take its `weight` and `bias`. Arguments come in one order: data, conditioning, parameters, then keyword-only
numbers.

Some of the style is for MindSpore's compiler. It runs all that is in a graph symbolically for every new set of shapes,
Python's own tuples and loops too: milliseconds for arithmetic on a shape, for unpacking or slicing a tuple, for the
checks of a function in `ops` where there is a primitive. So shapes, indices and other constants come from constexpr
functions, which are plain Python.
"""
import math
import os
import pathlib

import mindspore
import numpy as np
from mindspore import Tensor, float32, int32, ops
from mindspore.ops import constexpr

BLOCK = 2 ** 25  # numbers in the largest temporary: more attention scores or taps than this are computed by blocks


def blocks(numbers):
    """How many blocks a temporary of so many numbers is computed in, so that memory does not grow with the clip."""
    return -(-numbers // BLOCK)


@constexpr
def nth(name, number):
    """The checkpoint's name for one of several layers."""
    return f"{name}.{number}"


@constexpr
def as_rows(shape):
    return -1, shape[-1]


@constexpr
def with_last(shape, last):
    return *shape[:-1], last


@constexpr
def has_axes(shape, number):
    return len(shape) == number


@constexpr
def is_prompt(shape):
    return 8 <= math.prod(shape[:-1]) < 64


def linear(x, weight, bias=None):
    """x (..., I), weight (O, I), bias (O,) -> (..., O). Also every 1x1 convolution, (O, I, 1, 1): channels are last."""
    if has_axes(weight.shape, 4):
        weight = ops.Flatten()(weight)
    rows = x if has_axes(x.shape, 2) else x.reshape(as_rows(x.shape))
    if is_prompt(x.shape):  # faster on a CPU, where oneDNN packs its second matrix anew each time
        y = ops.Transpose()(ops.MatMul(transpose_b=True)(weight, rows), (1, 0))
    else:
        y = ops.MatMul(transpose_b=True)(rows, weight)
    if bias is not None:
        y = ops.BiasAdd()(y, bias)
    return y if has_axes(x.shape, 2) else y.reshape(with_last(x.shape, weight.shape[0]))


# -------------------------------------------------------------------------------------------------------- convolution
# A geometry is a tuple of what a convolution over images (N, H, W, C) is but for its weight: N, then pairs (height,
# width) of the sizes of the input and of the output, kernel, stride, dilation and padding, then `scale` 2 to read the
# image as if its pixels were doubled both ways and it was cut to the output's size, and `loop` to repeat it along H.

def polyphase(kernel, stride):
    """(first, taps): output position stride * q of a transposed convolution reads inputs q - first and taps - 1 more.

    Position t = stride * q + phase sums the inputs i whose tap k = t + padding - stride * i lies in [0, kernel), with
    HiFi-GAN's padding (kernel - stride) // 2.
    """
    padding = (kernel - stride) // 2
    first = (kernel - 1 - padding) // stride
    return first, first + 1 + (stride - 1 + padding) // stride


def transposed_length(length, kernel, stride):
    """Of `conv_transpose1d`'s output."""
    return (length - 1) * stride - 2 * ((kernel - stride) // 2) + kernel


@constexpr
def geometry2d(shape, stride, upsample_to, loop):
    out_size = upsample_to or tuple((size - 1) // stride + 1 for size in shape[1:3])
    return shape[0], shape[1:3], out_size, (3, 3), (stride, stride), (1, 1), (1, 1), 2 if upsample_to else 1, loop


@constexpr
def geometry1d(shape, kernel, dilation):
    """A sequence (N, L, C) is an image one pixel wide; the output is as long."""
    n, l, _ = shape
    return n, (l, 1), (l, 1), (kernel, 1), (1, 1), (dilation, 1), (dilation * (kernel - 1) // 2, 0), 1, False


@constexpr
def geometry_transposed1d(shape, kernel, stride):
    """For `conv_transpose1d`: an output position holds `stride` samples."""
    n, l, _ = shape
    first, taps = polyphase(kernel, stride)
    length = -(-transposed_length(l, kernel, stride) // stride)
    return n, (l, 1), (length, 1), (taps, 1), (1, 1), (1, 1), (first, 0), 1, False


@constexpr
def out_shape(shape, geometry, bias_shape):
    """The shape (N, H, W, C) or (N, L, C) of the output for an input's shape."""
    return shape[0], *geometry[2][:len(shape) - 2], bias_shape[0]


def read_along(axis, place, geometry):
    """Places along an axis of what is convolved -> where in the input they are, and whether they are inside."""
    _, size, out_size, *_, scale, loop = geometry
    limit = (size if scale == 1 else out_size)[axis]
    if loop and axis == 0:
        place = place % limit
    return place // scale, (place >= 0) & (place < limit)


def int_tensor(array):
    return Tensor(array.astype(np.int32))


@constexpr
def tap_rows(geometry, channels):
    """For each block of output positions, int32 (positions, K): the row of the flattened input under each tap.

    Row N * H * W stands for the zeros outside the image.
    """
    n, size, out_size, kernel, stride, dilation, padding, *_ = geometry
    positions = n * math.prod(out_size)
    step, result = -(-positions // blocks(positions * math.prod(kernel) * channels)), ()
    for begin in range(0, positions, step):
        image, *place = np.unravel_index(np.arange(begin, min(begin + step, positions)), (n, *out_size))
        (y, y_inside), (x, x_inside) = (
            read_along(axis, place[axis][:, None] * stride[axis] - padding[axis]
                       + np.arange(kernel[axis]) * dilation[axis], geometry) for axis in (0, 1))
        rows = (image[:, None, None] * size[0] + y[:, :, None]) * size[1] + x[:, None]
        rows = np.where(y_inside[:, :, None] & x_inside[:, None], rows, n * math.prod(size))
        result += int_tensor(rows.reshape(len(rows), -1)),
    return result


@constexpr
def zero_row(shape, dtype):
    return Tensor(np.zeros((1, shape[-1])), dtype)


def with_zeros(x):
    """The pixels of x (..., C) as rows, and a row of zeros after the last."""
    return ops.Concat(0)((x.reshape(as_rows(x.shape)), zero_row(x.shape, x.dtype)))


def in_blocks(function, x, rows):
    """What function(x, block) makes of all blocks of rows, one after the other: they share memory."""
    parts = ()
    for block in rows:
        parts = parts + (function(ops.Depend()(x, parts), block),)
    return ops.Concat(0)(parts) if len(parts) > 1 else parts[0]


def gathered_weight(weight):
    """weight (O, I, KH, KW) as `gathered_convolution` takes it, (O, K * I)."""
    o, i, _, _ = weight.shape
    return weight.reshape(o, i, -1).transpose(0, 2, 1).reshape(o, -1)


def gathered_convolution(x, weight, geometry):
    """A convolution as a gather and a matrix product: what is fast where the native kernel is slow (CPU).

    x (N, H, W, I) or (N, L, I), weight (O, K * I) -> (N * H_out * W_out, O)
    """
    def block(x, rows):
        return ops.MatMul(transpose_b=True)(ops.Flatten()(ops.Gather()(x, rows, 0)), weight)

    return in_blocks(block, with_zeros(x), tap_rows(geometry, x.shape[-1]))


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


def fast_filter(kernel, outputs):
    """`toom_cook`'s matrices for one axis of a convolution; a kernel of more than 4 taps has 8 outputs, always.

    It is split in parts of 4 taps: the correlation over parts is itself done in fewer products (Kronecker).
    """
    if kernel <= 4:
        return toom_cook(outputs if kernel > 1 else 1, kernel)
    outer, inner = toom_cook(2, -(-kernel // 4)), toom_cook(4, 4)
    a, g, b = (np.kron(x, y) for x, y in zip(outer, inner))
    part, place = np.divmod(np.arange(b.shape[1]), 7)
    return a, g[:, :kernel], (b @ np.eye(kernel + 16)[4 * part + place])[:, :kernel + 7]


def fast_filters(kernel, products):
    """`fast_filter` for height and width of a kernel that takes so many products a tile, with 2 or 4 outputs."""
    for outputs in (2, 4):
        (a_h, g_h, b_h), (a_w, g_w, b_w) = (fast_filter(taps, outputs) for taps in kernel)
        if len(g_h) * len(g_w) == products:
            return (a_h, b_h), (a_w, b_w)


@constexpr
def fast_weight_transform(shape, outputs):
    """G of both axes at once (products, K), float32, and the shapes before and after it."""
    g = np.kron(*(fast_filter(taps, outputs)[1] for taps in shape[2:])).astype(np.float32)
    return Tensor(g), (-1, g.shape[1]), (len(g), -1, shape[1])


def fast_weight(weight, outputs):
    """weight (O, I, KH, KW) as `fast_convolution` takes it, (products, O, I), for tiles of so many outputs an axis."""
    g, taps, laid_out = fast_weight_transform(weight.shape, outputs)
    return ops.MatMul(transpose_b=True)(g, weight.reshape(taps)).reshape(laid_out)


@constexpr
def tile_rows(geometry, weight_shape):
    """For each block of tiles, what they read and where their outputs are, both int32.

    The row of the flattened input at each place of each tile, (inputs, tiles), as in `tap_rows`; and for each
    position of the flattened output, in order, its row among (outputs * tiles). The places of a tile are `dilation`
    apart, and as many tiles lie one between the other.
    """
    n, size, out_size, kernel, _, dilation, padding, *_ = geometry
    transforms = fast_filters(kernel, weight_shape[0])

    def along(axis, tile):
        (outputs, _), inputs = (x.shape for x in transforms[axis])
        step = dilation[axis]
        origin = tile // step * step * outputs + tile % step
        read = origin + step * np.arange(inputs[1])[:, None] - padding[axis]
        return *read_along(axis, read, geometry), origin + step * np.arange(outputs)[:, None]

    rows, columns = (-(-out_size[axis] // (dilation[axis] * len(transforms[axis][0]))) * dilation[axis]
                     for axis in (0, 1))
    x, x_inside, x_out = along(1, np.arange(columns))
    groups = n * rows // dilation[0]
    step = -(-groups // blocks(n * rows * columns * weight_shape[0] * max(weight_shape[1:])))
    result = ()
    for begin in range(0, groups, step):
        image, tile = np.divmod(np.arange(begin * dilation[0], min(begin + step, groups) * dilation[0]), rows)
        y, y_inside, y_out = along(0, tile)
        read = np.where(y_inside[:, None, :, None] & x_inside[:, None],
                        ((image * size[0] + y) * size[1])[:, None, :, None] + x[:, None], n * math.prod(size))
        written = ((image * out_size[0] + y_out) * out_size[1])[:, None, :, None] + x_out[:, None]
        inside = np.flatnonzero((y_out < out_size[0])[:, None, :, None] & (x_out < out_size[1])[:, None])
        order = np.empty_like(inside)
        order[written.reshape(-1)[inside] - written.min()] = inside
        result += (int_tensor(read.reshape(math.prod(read.shape[:2]), -1)), int_tensor(order)),
    return result


@constexpr
def fast_transforms(geometry, weight_shape):
    """B (products, inputs) and A (outputs, products) for flattened tiles, float32, and two shapes between the steps."""
    (a_h, b_h), (a_w, b_w) = fast_filters(geometry[3], weight_shape[0])
    a, b, (products, o, i) = np.kron(a_h, a_w), np.kron(b_h, b_w), weight_shape
    return Tensor(b.astype(np.float32)), Tensor(a.astype(np.float32)), (products, -1, i), (-1, o)


def fast_convolution(x, weight, geometry):
    """The same, of stride 1, in two to four times fewer multiplications (Lavin & Gray, 2016, arXiv 1509.09308).

    x (N, H, W, I) or (N, L, I), weight (products, O, I) from `fast_weight` -> (N * H_out * W_out, O)
    The input is cut into overlapping tiles, each of which becomes `products` numbers a channel; there the convolution
    is one matrix product for each of these; what comes out becomes the tile's outputs.
    """
    to_products, to_outputs, products, outputs = fast_transforms(geometry, weight.shape)

    def block(x, rows):
        tiles = ops.MatMul()(to_products, ops.Flatten()(ops.Gather()(x, rows[0], 0))).reshape(products)
        tiles = ops.Flatten()(ops.BatchMatMul(transpose_b=True)(tiles, weight))
        return ops.Gather()(ops.MatMul()(to_outputs, tiles).reshape(outputs), rows[1], 0)

    return in_blocks(block, with_zeros(x), tile_rows(geometry, weight.shape))


def native_convolution(x, weight, geometry):
    """The same by the device's own convolution: weight (O, I, KH, KW)."""
    n, (h, w), out_size, kernel, stride, dilation, padding, scale, loop = geometry
    i = weight.shape[1]
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
    convolve = ops.Conv2D(weight.shape[0], kernel, pad_mode="pad", pad=(padding[0], bottom, padding[1], right),
                          stride=stride, dilation=dilation)
    return convolve(x.transpose(0, 3, 1, 2), weight).transpose(0, 2, 3, 1).reshape(-1, weight.shape[0])


@constexpr
def on_cpu():
    return mindspore.get_context("device_target") == "CPU"


def products_are_exact():
    """Whether a CPU multiplies float32 numbers as they are.

    Asked for bfloat16 (weights.py: `tensor_dtype`), oneDNN rounds them if the processor has AMX. That is too coarse for
    `fast_convolution`, whose sums cancel.
    """
    asked = os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT").upper() not in ("STRICT", "F32")
    cpu = pathlib.Path("/proc/cpuinfo")
    return not (asked and cpu.exists() and "amx_bf16" in cpu.read_text())


@constexpr
def is_fast(weight_shape, dtype, geometry):
    """Whether `fast_convolution` takes a weight: one prepared for it, or one of a checkpoint that it is good for."""
    return len(weight_shape) == 3 or (
        len(weight_shape) == 4 and dtype == float32 and geometry[4] == (1, 1) and products_are_exact())


def convolution(x, weight, geometry):
    """By the way that is fast on the device: x (N, H, W, I) or (N, L, I) -> (N * H_out * W_out, O).

    weight (O, I, KH, KW), or what `fast_weight` or `gathered_weight` made of it before: worth it for many calls.
    """
    if not on_cpu():
        return native_convolution(x, weight, geometry)
    if is_fast(weight.shape, weight.dtype, geometry):
        if has_axes(weight.shape, 4):  # not before x is there, or all weights of a graph would be in memory at once
            weight = fast_weight(ops.Depend()(weight, x), 4)
        return fast_convolution(x, weight, geometry)
    return gathered_convolution(x, gathered_weight(weight) if has_axes(weight.shape, 4) else weight, geometry)


def conv2d(x, weight, bias, *, stride=1, upsample_to=None, loop=False):
    """3x3 convolution with padding 1: x (N, H, W, I) -> (N, ceil(H / stride), ceil(W / stride), O).

    `upsample_to` (H_out, W_out) doubles the image first (nearest neighbour), cut to that size:
    diffusers' Upsample2D with its `output_size`. With `loop` the padding in time is the other end of the image, which
    `stride` must divide.
    """
    geometry = geometry2d(x.shape, stride, upsample_to, loop)
    return ops.BiasAdd()(convolution(x, weight, geometry), bias).reshape(out_shape(x.shape, geometry, bias.shape))


def conv1d(x, weight, bias, *, kernel, dilation=1):
    """x (N, L, I) -> (N, L, O), zero-padded to keep its length; `kernel` is odd."""
    geometry, weight = geometry1d(x.shape, kernel, dilation), ops.ExpandDims()(weight, -1)
    return ops.BiasAdd()(convolution(x, weight, geometry), bias).reshape(out_shape(x.shape, geometry, bias.shape))


@constexpr
def polyphase_layout(shape, stride):
    """What sorts the taps of a transposed convolution's weight by phase, (K, phases * taps), and the shapes after."""
    i, o, kernel = shape
    first, taps = polyphase(kernel, stride)
    k = np.arange(stride)[:, None] + (kernel - stride) // 2 + stride * (first - np.arange(taps))
    sort = np.arange(kernel)[:, None] == k.reshape(-1)
    return Tensor(sort.astype(np.float32)), (-1, kernel), (i, o, stride, taps), (stride * o, i, taps, 1)


def polyphase_weight(weight, kernel, stride):
    """A transposed convolution's weight (I, O, K) -> the plain one's (stride * O, I, taps, 1)."""
    layout = polyphase_layout(weight.shape, stride)
    taps = ops.MatMul()(weight.reshape(layout[1]), ops.Cast()(layout[0], weight.dtype)).reshape(layout[2])
    return ops.Transpose()(taps, (2, 1, 0, 3)).reshape(layout[3])


@constexpr
def whole_periods(shape, kernel, stride, bias_shape):
    """The shape (N, L, O) of `conv_transpose1d`'s output with its last period of `stride` samples whole."""
    return shape[0], -(-transposed_length(shape[1], kernel, stride) // stride) * stride, bias_shape[0]


def conv_transpose1d(x, weight, bias, *, kernel, stride):
    """torch's ConvTranspose1d with HiFi-GAN's padding: x (N, L, I), weight (I, O, K) -> (N, transposed_length, O).

    As a plain convolution with one set of output channels for each of the `stride` phases, so that no device needs a
    transposed one.
    """
    geometry, shape = geometry_transposed1d(x.shape, kernel, stride), whole_periods(x.shape, kernel, stride, bias.shape)
    y = convolution(x, polyphase_weight(weight, kernel, stride), geometry).reshape(as_rows(shape))
    y, length = ops.BiasAdd()(y, bias).reshape(shape), transposed_length(x.shape[1], kernel, stride)
    return y[:, :length] if length < shape[1] else y


@constexpr
def over_positions(shape):
    """What averages all positions of each image (N, ..., C), (N, positions of all)."""
    n, *size, _ = shape
    return Tensor(np.kron(np.eye(n), np.full(math.prod(size), 1 / math.prod(size))).astype(np.float32))


@constexpr
def at_positions(shape, dtype):
    """What repeats a row at all positions of each image (N, ..., C), (positions of all, N)."""
    n, *size, _ = shape
    return Tensor(np.kron(np.eye(n), np.ones((math.prod(size), 1))), dtype)


@constexpr
def over_group(channels, groups):
    """What averages the channels of each group, (C, C)."""
    return Tensor(np.kron(np.eye(groups), np.full((channels // groups,) * 2, groups / channels)).astype(np.float32))


def group_norm(x, weight, bias, *, groups, eps):
    """x (N, H, W, C), normalised over H, W and the C / groups channels of each group; statistics in float32.

    Averages and repetitions are matrix products: the fast way on a CPU with channels last.
    """
    average, repeat, group = over_positions(x.shape), at_positions(x.shape, float32), over_group(x.shape[3], groups)
    rows = ops.Cast()(x.reshape(as_rows(x.shape)), float32)
    mean = ops.MatMul()(ops.MatMul()(average, rows), group)
    rows = rows - ops.MatMul()(repeat, mean)
    variance = ops.MatMul()(ops.MatMul()(average, rows * rows), group)
    rows = rows * ops.MatMul()(repeat, weight * ops.rsqrt(variance + eps))
    return ops.BiasAdd()(ops.Cast()(rows, x.dtype), bias).reshape(x.shape)


def layer_norm(x, weight, bias, *, eps):
    """x (..., C), normalised over C (Ba et al., 2016)."""
    return ops.LayerNorm(-1, -1, eps)(x, weight, bias)[0]


def gelu(x):
    """The exact GELU, x * Phi(x): CLAP and the UNet were trained with it, not with the tanh approximation."""
    return x * (ops.erf(x * 0.5 ** 0.5) * 0.5 + 0.5)


def tanh(x):
    """Elementwise, by the sigmoid: MindSpore's own tanh is off by up to 1e-4 on a CPU, and passes 1."""
    return ops.sigmoid(x * 2) * 2 - 1


@constexpr
def swapped(n, a, b):
    """The rows of (N, A, B) in the order of (N, B, A): on a CPU to gather rows is faster than to transpose them."""
    return int_tensor(np.arange(n * a * b).reshape(n, a, b).transpose(0, 2, 1).reshape(-1))


@constexpr
def heads_apart(shape, heads):
    n, l, c = shape
    return n, heads, l, c // heads


@constexpr
def attention_blocks(shape):
    n, heads, l, _ = shape
    return blocks(n * heads * l * l)


def split_heads(rows, shape):
    """rows (N * L, C) -> shape (N, heads, L, C / heads)."""
    return ops.Gather()(rows.reshape(as_rows(shape)), swapped(shape[0], shape[2], shape[1]), 0).reshape(shape)


def attend(q, k, v, bias, *, shape, heads):
    """softmax(q k^T / sqrt(C / heads) + bias) v, each head on its own; softmax in float32.

    q, k, v (N * L, C) of the shape (N, L, C); bias broadcasts to (N, heads, L, L), or is None -> (N * L, C).
    Vaswani et al., 2017, equation 1.
    """
    apart = heads_apart(shape, heads)
    count, scale = attention_blocks(apart), apart[3] ** -0.5
    queries, k, v = split_heads(q * scale, apart), split_heads(k, apart), split_heads(v, apart)
    y = attended(queries, k, v, bias) if count == 1 or bias is not None else attended_by_blocks(queries, k, v, count)
    return ops.Gather()(y.reshape(as_rows(apart)), swapped(apart[0], apart[1], apart[2]), 0).reshape(as_rows(shape))


def attended(q, k, v, bias):
    """Scaled queries q (N, heads, M, D), k and v (N, heads, L, D) -> (N, heads, M, D)."""
    scores = ops.Cast()(ops.BatchMatMul(transpose_b=True)(q, k), float32)
    if bias is not None:
        scores = scores + bias
    return ops.BatchMatMul()(ops.Cast()(ops.Softmax(-1)(scores), v.dtype), v)


def attended_by_blocks(q, k, v, count):
    """The same, `count` blocks of queries one after the other: every query has its own softmax, so nothing changes."""
    n, heads, l, d = q.shape
    size = -(-l // count)
    q = ops.cat((q, ops.zeros((n, heads, count * size - l, d), q.dtype)), 2) if count * size > l else q
    q = q.reshape(n, heads, count, size, d).transpose(2, 0, 1, 3, 4)
    y, i = ops.zeros_like(q), Tensor(0, int32)
    while i < count:
        y = ops.tensor_scatter_update(y, i.reshape(1, 1), attended(ops.gather(q, i, 0), k, v, None).expand_dims(0))
        i = i + 1
    return y.transpose(1, 2, 0, 3, 4).reshape(n, heads, count * size, d)[:, :, :l]


def attention(x, p, *, shape, heads):
    """diffusers' Attention without its norm: x (N * L, C) of the shape (N, L, C)."""
    q, k, v = linear(x, **p["to_q"]), linear(x, **p["to_k"]), linear(x, **p["to_v"])
    return linear(attend(q, k, v, None, shape=shape, heads=heads), **p["to_out.0"])


def transformer_block(x, p, *, shape, heads):
    """diffusers' BasicTransformerBlock (norms' eps 1e-5): x (N * L, C) of the shape (N, L, C).

    There is no text sequence, so attn2 attends to x as attn1 does.
    """
    x = x + attention(layer_norm(x, **p["norm1"], eps=1e-5), p["attn1"], shape=shape, heads=heads)
    x = x + attention(layer_norm(x, **p["norm2"], eps=1e-5), p["attn2"], shape=shape, heads=heads)
    halves = ops.Split(-1, 2)(linear(layer_norm(x, **p["norm3"], eps=1e-5), **p["ff"]["net.0.proj"]))
    return x + linear(halves[0] * gelu(halves[1]), **p["ff"]["net.2"])


@constexpr
def as_sequence(shape):
    return shape[0], math.prod(shape[1:-1]), shape[-1]


def spatial_transformer(x, p, *, heads, groups):
    """diffusers' Transformer2DModel (norm's eps 1e-6): x (N, H, W, C), attended to as H * W positions."""
    y = group_norm(x, **p["norm"], groups=groups, eps=1e-6).reshape(as_rows(x.shape))
    y = transformer_block(linear(y, **p["proj_in"]), p["transformer_blocks.0"], shape=as_sequence(x.shape), heads=heads)
    return x + linear(y, **p["proj_out"]).reshape(x.shape)


def image_attention(x, p, *, groups):
    """The attention block of diffusers' VAE (eps 1e-6), one head over all positions: x (N, H, W, C)."""
    y = group_norm(x, **p["group_norm"], groups=groups, eps=1e-6).reshape(as_rows(x.shape))
    return x + attention(y, p, shape=as_sequence(x.shape), heads=1).reshape(x.shape)


def resnet(x, embedding, p, *, groups, eps, loop=False):
    """diffusers' ResnetBlock2D: x (N, H, W, I) -> (N, H, W, O).

    embedding (N, E): silu of the embedding of time and class; None in the VAE
    """
    y = conv2d(ops.silu(group_norm(x, **p["norm1"], groups=groups, eps=eps)), **p["conv1"], loop=loop)
    if embedding is not None:
        embedding = ops.MatMul()(at_positions(y.shape, y.dtype), linear(embedding, **p["time_emb_proj"]))
        y = y + embedding.reshape(y.shape)
    y = conv2d(ops.silu(group_norm(y, **p["norm2"], groups=groups, eps=eps)), **p["conv2"], loop=loop)
    if "conv_shortcut" in p:
        x = linear(x, **p["conv_shortcut"])
    return x + y


def bert_attention(x, bias, p, *, heads):
    """transformers' RobertaAttention without its norm: x (N, L, C), bias as in `attend`."""
    y = x.reshape(as_rows(x.shape))
    q, k, v = (linear(y, **p["self"]["query"]), linear(y, **p["self"]["key"]), linear(y, **p["self"]["value"]))
    return linear(attend(q, k, v, bias, shape=x.shape, heads=heads), **p["output"]["dense"]).reshape(x.shape)


def bert_layer(x, bias, p, *, heads, eps):
    """transformers' RobertaLayer (norms after the residuals): x (N, L, C), attention bias (N, 1, 1, L)."""
    y = bert_attention(x, bias, p["attention"], heads=heads)
    x = layer_norm(x + y, **p["attention"]["output"]["LayerNorm"], eps=eps)
    y = linear(gelu(linear(x, **p["intermediate"]["dense"])), **p["output"]["dense"])
    return layer_norm(x + y, **p["output"]["LayerNorm"], eps=eps)


def relative_positions(window):
    """For each pair of places in a window, the row of the table of biases: int (window ** 2, window ** 2)."""
    y, x = np.divmod(np.arange(window * window), window)
    return (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1


@constexpr
def windows(size, window, shift):
    """What attention in shifted windows (Liu et al., 2021, figure 4) reads, L = window * window, as Tensors.

    The row of the flattened image (size * size) at each place of each window, and its inverse; the row of the table of
    relative positions for each pair of places (L * L); and a bias (windows, 1, L, L) that parts what is no neighbour.
    The image is rolled by `shift`, so that the last windows hold its first rows and columns too.
    """
    def split(image):
        windowed = image.reshape(size // window, window, size // window, window).transpose(0, 2, 1, 3)
        return windowed.reshape(-1, window * window)

    rows = split(np.roll(np.arange(size * size).reshape(size, size), (-shift, -shift), (0, 1))).reshape(-1)
    places = relative_positions(window)
    wrapped = np.arange(size) >= size - shift
    region = split(2 * wrapped[:, None] + wrapped)
    bias = np.where(region[:, None, :, None] == region[:, None, None], 0, -100)  # not -inf: as in the reference
    return (*(Tensor(x.reshape(-1).astype(np.int32)) for x in (rows, np.argsort(rows), places)),
            Tensor(bias.astype(np.float32)))


def swin_block(x, p, *, size, window, shift, heads, eps):
    """transformers' ClapAudioLayer: x (N, size * size, C), each position attending to those in its window."""
    n, l, c = x.shape
    rows, inverse, places, parting = windows(size, window, shift)
    y = ops.gather(layer_norm(x, **p["layernorm_before"], eps=eps), rows, 1).reshape(-1, window * window, c)
    shape = (n, l // window ** 2, heads, window ** 2, window ** 2)
    bias = ops.gather(p["attention"]["self"]["relative_position_bias_table"], places, 0).transpose(1, 0)
    bias = ops.broadcast_to(bias.reshape(1, 1, *shape[2:]), shape) + ops.broadcast_to(parting, shape)
    y = bert_attention(y, bias.reshape(-1, *shape[2:]), p["attention"], heads=heads)
    x = x + ops.gather(y.reshape(n, l, c), inverse, 1)
    y = gelu(linear(layer_norm(x, **p["layernorm_after"], eps=eps), **p["intermediate"]["dense"]))
    return x + linear(y, **p["output"]["dense"])


def patch_merging(x, p, *, size):
    """transformers' ClapAudioPatchMerging: x (N, size * size, C) -> (N, size * size / 4, 2 C)."""
    n, _, c = x.shape
    x = x.reshape(n, size // 2, 2, size // 2, 2, c).transpose(0, 1, 3, 4, 2, 5).reshape(n, -1, 4 * c)
    return linear(layer_norm(x, **p["norm"], eps=1e-5), **p["reduction"])


def hifigan_block(x, p, *, kernel, dilations, slope):
    """HiFi-GAN's residual block (Kong et al., 2020, type 1): x (N, L, C)."""
    for i in range(len(dilations)):
        y = conv1d(ops.leaky_relu(x, slope), **p[nth("convs1", i)], kernel=kernel, dilation=dilations[i])
        x = x + conv1d(ops.leaky_relu(y, slope), **p[nth("convs2", i)], kernel=kernel)
    return x
