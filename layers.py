"""The leaves and blocks that MusicLDM's models are built from, as pure MindSpore functions.

Axis letters: N batch, H time and W frequency of an image (a latent or a log-mel spectrogram), L positions of a
sequence, C channels, I and O channels into and out of a layer, K taps of a convolution.
Activations are channels-last everywhere: images are (N, H, W, C), sequences (N, L, C). A leaf returns its input's
dtype. Parameters are the sub-dict of the checkpoint that holds a layer; leaves take its `weight` and `bias`. Arguments
come in one order: data, conditioning, parameters, then keyword-only numbers.
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
def as_rows(shape):
    return -1, shape[-1]


def linear(x, weight, bias=None):
    """x (..., I), weight (O, I), bias (O,) -> (..., O). Also every 1x1 convolution, (O, I, 1, 1): channels are last."""
    if weight.ndim > 2:
        weight = weight.reshape(weight.shape[0], -1)
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] < 64:  # up to eight times as fast on a CPU: oneDNN packs its second matrix anew each time
        y = ops.MatMul(transpose_b=True)(weight, rows).transpose(1, 0)
    else:
        y = ops.MatMul(transpose_b=True)(rows, weight)
    if bias is not None:
        y = ops.bias_add(y, bias)
    return y.reshape(x.shape[:-1] + (weight.shape[0],))


# -------------------------------------------------------------------------------------------------------- convolution
# A geometry is a tuple of what a convolution over images (N, H, W, C) is but for its weight: N, then pairs (height,
# width) of the sizes of the input and of the output, kernel, stride, dilation and padding, then `scale` 2 to read the
# image as if its pixels were doubled both ways and it was cut to the output's size, and `loop` to repeat it along H.
# Shapes and indices are made by constexpr functions, as arithmetic inside a graph takes milliseconds to compile.

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
    return Tensor(array.reshape(-1).astype(np.int32))


@constexpr
def tap_rows(geometry, channels):
    """For each block of output positions, int32 (positions * K,): the row of the flattened input under each tap.

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
        result += int_tensor(np.where(y_inside[:, :, None] & x_inside[:, None], rows, n * math.prod(size))),
    return result


def with_zeros(x):
    """The pixels of x (..., C) as rows, and a row of zeros after the last."""
    x = x.reshape(as_rows(x.shape))
    return ops.cat((x, ops.zeros((1, x.shape[1]), x.dtype)), 0)


def after(parts, x):
    """x, once the last of the parts is computed: blocks that run one after the other share memory."""
    return ops.Depend()(x, parts[-1]) if len(parts) > 0 else x


def joined(parts):
    return ops.cat(parts, 0) if len(parts) > 1 else parts[0]


def gathered_weight(weight):
    """weight (O, I, KH, KW) as `gathered_convolution` takes it, (O, K * I)."""
    o, i, _, _ = weight.shape
    return weight.reshape(o, i, -1).transpose(0, 2, 1).reshape(o, -1)


def gathered_convolution(x, weight, geometry):
    """A convolution as a gather and a matrix product: what is fast where the native kernel is slow (CPU).

    x (N, H, W, I) or (N, L, I), weight (O, K * I) -> (N * H_out * W_out, O)
    """
    x, parts = with_zeros(x), ()
    for rows in tap_rows(geometry, x.shape[1]):
        taps = ops.gather(x, after(parts, rows), 0).reshape(-1, weight.shape[1])
        parts = parts + (ops.MatMul(transpose_b=True)(taps, weight),)
    return joined(parts)


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
    o, i, *kernel = shape
    g = np.kron(*(fast_filter(taps, outputs)[1] for taps in kernel)).astype(np.float32)
    return Tensor(g), (o * i, -1), (len(g), o, i)


def fast_weight(weight, outputs):
    """weight (O, I, KH, KW) as `fast_convolution` takes it, (products, O, I), for tiles of so many outputs an axis."""
    g, taps, laid_out = fast_weight_transform(weight.shape, outputs)
    return ops.MatMul(transpose_b=True)(g, weight.reshape(taps)).reshape(laid_out)


@constexpr
def tile_rows(geometry, weight_shape):
    """For each block of tiles, what they read and where their outputs are, both int32.

    The row of the flattened input at each place of each tile, (inputs * tiles,), as in `tap_rows`; and for each
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
        result += (int_tensor(read), int_tensor(order)),
    return result


@constexpr
def fast_transforms(geometry, weight_shape):
    """B (products, inputs) and A (outputs, products) for flattened tiles, float32, and the shapes between the steps."""
    (a_h, b_h), (a_w, b_w) = fast_filters(geometry[3], weight_shape[0])
    a, b, (products, o, i) = np.kron(a_h, a_w), np.kron(b_h, b_w), weight_shape
    shapes = (b.shape[1], -1), (products, -1, i), (products, -1), (-1, o)
    return Tensor(b.astype(np.float32)), Tensor(a.astype(np.float32)), shapes


def fast_convolution(x, weight, geometry):
    """The same, of stride 1, in two to four times fewer multiplications (Lavin & Gray, 2016, arXiv 1509.09308).

    x (N, H, W, I) or (N, L, I), weight (products, O, I) from `fast_weight` -> (N * H_out * W_out, O)
    The input is cut into overlapping tiles, each of which becomes `products` numbers a channel; there the convolution
    is one matrix product for each of these; what comes out becomes the tile's outputs.
    """
    x, parts = with_zeros(x), ()
    to_products, to_outputs, (inputs, deep, wide, outputs) = fast_transforms(geometry, weight.shape)
    for read, order in tile_rows(geometry, weight.shape):
        tiles = ops.MatMul()(to_products, ops.gather(x, after(parts, read), 0).reshape(inputs)).reshape(deep)
        tiles = ops.BatchMatMul(transpose_b=True)(tiles, weight).reshape(wide)
        parts = parts + (ops.gather(ops.MatMul()(to_outputs, tiles).reshape(outputs), order, 0),)
    return joined(parts)


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
def device():
    return mindspore.get_context("device_target")


@constexpr
def products_are_exact():
    """Whether a CPU multiplies float32 numbers as they are.

    Asked for bfloat16 (weights.py: `tensor_dtype`), oneDNN rounds them if the processor has AMX. That is too coarse for
    `fast_convolution`, whose sums cancel.
    """
    asked = os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT").upper() not in ("STRICT", "F32")
    cpu = pathlib.Path("/proc/cpuinfo")
    return not (asked and cpu.exists() and "amx_bf16" in cpu.read_text())


def convolution(x, weight, geometry):
    """By the way that is fast on the device: x (N, H, W, I) or (N, L, I) -> (N * H_out * W_out, O).

    weight (O, I, KH, KW), or what `fast_weight` or `gathered_weight` made of it before: worth it for many calls.
    """
    if weight.ndim == 3:
        return fast_convolution(x, weight, geometry)
    if weight.ndim == 2:
        return gathered_convolution(x, weight, geometry)
    if device() != "CPU":
        return native_convolution(x, weight, geometry)
    if weight.dtype == float32 and geometry[4] == (1, 1) and products_are_exact():
        weight = ops.Depend()(weight, x)  # not before x is there, or all weights of a graph would be in memory at once
        return fast_convolution(x, fast_weight(weight, 4), geometry)
    return gathered_convolution(x, gathered_weight(weight), geometry)


def conv2d(x, weight, bias, *, stride=1, upsample_to=None, loop=False):
    """3x3 convolution with padding 1: x (N, H, W, I) -> (N, ceil(H / stride), ceil(W / stride), O).

    `upsample_to` (H_out, W_out) doubles the image first (nearest neighbour), cut to that size:
    diffusers' Upsample2D with its `output_size`. With `loop` the padding in time is the other end of the image, which
    `stride` must divide.
    """
    geometry = geometry2d(x.shape, stride, upsample_to, loop)
    return ops.bias_add(convolution(x, weight, geometry), bias).reshape(out_shape(x.shape, geometry, bias.shape))


def conv1d(x, weight, bias, *, kernel, dilation=1):
    """x (N, L, I) -> (N, L, O), zero-padded to keep its length; `kernel` is odd."""
    geometry, weight = geometry1d(x.shape, kernel, dilation), ops.expand_dims(weight, -1)
    return ops.bias_add(convolution(x, weight, geometry), bias).reshape(out_shape(x.shape, geometry, bias.shape))


@constexpr
def polyphase_taps(kernel, stride):
    """Which tap of a transposed convolution each phase of the plain one has where, (phases * taps,); none: `kernel`."""
    first, taps = polyphase(kernel, stride)
    k = np.arange(stride)[:, None] + (kernel - stride) // 2 + stride * (first - np.arange(taps))
    return int_tensor(np.where((k >= 0) & (k < kernel), k, kernel))


def polyphase_weight(weight, kernel, stride):
    """A transposed convolution's weight (I, O, K) -> the plain one's (stride * O, I, taps, 1)."""
    i, o, _ = weight.shape
    taps = ops.gather(ops.cat((weight, ops.zeros((i, o, 1), weight.dtype)), 2), polyphase_taps(kernel, stride), 2)
    return taps.reshape(i, o, stride, -1).transpose(2, 1, 0, 3).reshape(stride * o, i, -1, 1)


def conv_transpose1d(x, weight, bias, *, kernel, stride):
    """torch's ConvTranspose1d with HiFi-GAN's padding: x (N, L, I), weight (I, O, K) -> (N, transposed_length, O).

    As a plain convolution with one set of output channels for each of the `stride` phases, so that no device needs a
    transposed one.
    """
    geometry = geometry_transposed1d(x.shape, kernel, stride)
    n, rows, length = x.shape[0], geometry[2][0], transposed_length(x.shape[1], kernel, stride)
    y = convolution(x, polyphase_weight(weight, kernel, stride), geometry).reshape(n * rows * stride, -1)
    y = ops.bias_add(y, bias).reshape(n, rows * stride, -1)
    return y[:, :length] if length < rows * stride else y


@constexpr
def over_positions(shape):
    """Of images (N, ..., C): what averages all positions of each, (N, 1, positions), and what repeats a row at each."""
    n, *size, _ = shape
    positions = math.prod(size)
    return Tensor(np.full((n, 1, positions), 1 / positions, np.float32)), Tensor(np.ones((n, positions, 1), np.float32))


@constexpr
def over_group(channels, groups):
    """What averages the channels of each group, (C, C)."""
    return Tensor(np.kron(np.eye(groups), np.full((channels // groups,) * 2, groups / channels)).astype(np.float32))


def group_norm(x, weight, bias, *, groups, eps):
    """x (N, H, W, C), normalised over H, W and the C / groups channels of each group; statistics in float32.

    Averages and repetitions are matrix products: the fast way on a CPU with channels last.
    """
    n, c = x.shape[0], x.shape[-1]
    (average, repeat), group = over_positions(x.shape), over_group(c, groups)
    rows = x.reshape(n, -1, c).astype(float32)
    mean = ops.MatMul()(ops.BatchMatMul()(average, rows).reshape(n, c), group)
    rows = rows - ops.BatchMatMul()(repeat, mean.reshape(n, 1, c))
    variance = ops.MatMul()(ops.BatchMatMul()(average, rows * rows).reshape(n, c), group)
    rows = rows * ops.BatchMatMul()(repeat, (weight * ops.rsqrt(variance + eps)).reshape(n, 1, c))
    return ops.bias_add(rows.reshape(-1, c).astype(x.dtype), bias).reshape(x.shape)


def layer_norm(x, weight, bias, *, eps):
    """x (..., C), normalised over C (Ba et al., 2016)."""
    return ops.LayerNorm(-1, -1, eps)(x, weight, bias)[0]


def gelu(x):
    """The exact GELU, x * Phi(x): CLAP and the UNet were trained with it, not with the tanh approximation."""
    return x * (ops.erf(x * 0.5 ** 0.5) * 0.5 + 0.5)


def tanh(x):
    """Elementwise, by the sigmoid: MindSpore's own tanh is off by up to 1e-4 on a CPU, and passes 1."""
    return ops.sigmoid(x * 2) * 2 - 1


def attend(q, k, v, bias, *, heads):
    """softmax(q k^T / sqrt(C / heads) + bias) v, each head on its own; softmax in float32.

    q, k, v (N, L, C); bias broadcasts to (N, heads, L, L), or is None -> (N, L, C). Vaswani et al., 2017, equation 1.
    """
    n, l, c = q.shape
    q = (q * (c // heads) ** -0.5).reshape(n, l, heads, -1).transpose(0, 2, 1, 3)
    k = k.reshape(n, l, heads, -1).transpose(0, 2, 1, 3)
    v = v.reshape(n, l, heads, -1).transpose(0, 2, 1, 3)
    count = blocks(n * heads * l * l)
    y = attended(q, k, v, bias) if count == 1 or bias is not None else attended_by_blocks(q, k, v, count)
    return y.transpose(0, 2, 1, 3).reshape(n, l, c)


def attended(q, k, v, bias):
    """Scaled queries q (N, heads, M, D), k and v (N, heads, L, D) -> (N, heads, M, D)."""
    scores = ops.BatchMatMul(transpose_b=True)(q, k).astype(float32)
    if bias is not None:
        scores = scores + bias
    return ops.BatchMatMul()(ops.softmax(scores, -1).astype(v.dtype), v)


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


def attention(x, p, *, heads):
    """diffusers' Attention without its norm: x (N, L, C) -> (N, L, C)."""
    q, k, v = linear(x, **p["to_q"]), linear(x, **p["to_k"]), linear(x, **p["to_v"])
    return linear(attend(q, k, v, None, heads=heads), **p["to_out.0"])


def transformer_block(x, p, *, heads):
    """diffusers' BasicTransformerBlock (norms' eps 1e-5): x (N, L, C).

    There is no text sequence, so attn2 attends to x as attn1 does.
    """
    x = x + attention(layer_norm(x, **p["norm1"], eps=1e-5), p["attn1"], heads=heads)
    x = x + attention(layer_norm(x, **p["norm2"], eps=1e-5), p["attn2"], heads=heads)
    hidden, gate = ops.chunk(linear(layer_norm(x, **p["norm3"], eps=1e-5), **p["ff"]["net.0.proj"]), 2, -1)
    return x + linear(hidden * gelu(gate), **p["ff"]["net.2"])


def spatial_transformer(x, p, *, heads, groups):
    """diffusers' Transformer2DModel (norm's eps 1e-6): x (N, H, W, C), attended to as H * W positions."""
    n, h, w, c = x.shape
    y = linear(group_norm(x, **p["norm"], groups=groups, eps=1e-6), **p["proj_in"]).reshape(n, h * w, c)
    y = transformer_block(y, p["transformer_blocks.0"], heads=heads)
    return x + linear(y, **p["proj_out"]).reshape(n, h, w, c)


def image_attention(x, p, *, groups):
    """The attention block of diffusers' VAE (eps 1e-6), one head over all positions: x (N, H, W, C)."""
    n, h, w, c = x.shape
    y = group_norm(x, **p["group_norm"], groups=groups, eps=1e-6).reshape(n, h * w, c)
    return x + attention(y, p, heads=1).reshape(n, h, w, c)


def resnet(x, embedding, p, *, groups, eps, loop=False):
    """diffusers' ResnetBlock2D: x (N, H, W, I) -> (N, H, W, O).

    embedding (N, E): silu of the embedding of time and class; None in the VAE
    """
    y = conv2d(ops.silu(group_norm(x, **p["norm1"], groups=groups, eps=eps)), **p["conv1"], loop=loop)
    if embedding is not None:
        (_, repeat), embedding = over_positions(y.shape), linear(embedding, **p["time_emb_proj"])
        y = y + ops.BatchMatMul()(repeat.astype(y.dtype), ops.expand_dims(embedding, 1)).reshape(y.shape)
    y = conv2d(ops.silu(group_norm(y, **p["norm2"], groups=groups, eps=eps)), **p["conv2"], loop=loop)
    if "conv_shortcut" in p:
        x = linear(x, **p["conv_shortcut"])
    return x + y


def bert_attention(x, bias, p, *, heads):
    """transformers' RobertaAttention without its norm: x (N, L, C), bias as in `attend`."""
    q, k, v = (linear(x, **p["self"]["query"]), linear(x, **p["self"]["key"]), linear(x, **p["self"]["value"]))
    return linear(attend(q, k, v, bias, heads=heads), **p["output"]["dense"])


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
        y = conv1d(ops.leaky_relu(x, slope), **p["convs1." + str(i)], kernel=kernel, dilation=dilations[i])
        x = x + conv1d(ops.leaky_relu(y, slope), **p["convs2." + str(i)], kernel=kernel)
    return x
