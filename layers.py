"""The leaves and blocks that MusicLDM's models are built from, as pure MindSpore functions.

Axis letters: N batch, H time and W frequency of an image (a latent or a log-mel spectrogram), L positions of a
sequence, C channels, I and O channels into and out of a layer, K taps of a convolution.
Activations are channels-last everywhere: images are (N, H, W, C), sequences (N, L, C). A leaf returns its input's
dtype. Parameters are the sub-dict of the checkpoint that holds a layer (weights.py lays it out); leaves take its
`weight` and `bias`. Arguments come in one order: data, conditioning, parameters, then keyword-only numbers.
"""
import numpy as np
from mindspore import Tensor, float32, int32, ops
from mindspore.ops import constexpr

BLOCK = 2 ** 25  # numbers in the largest temporary: more attention scores or taps than this are computed by blocks


def blocks(numbers):
    """How many blocks a temporary of so many numbers is computed in, so that memory does not grow with the clip."""
    return -(-numbers // BLOCK)


def stretched(x, shape):
    """x broadcast to a shape, for arithmetic on large tensors.

    Left to broadcast by itself, MindSpore's CPU arithmetic takes twice the time, and each such operation of a graph
    keeps 16 bytes for every number of its result until the process ends.
    """
    return ops.broadcast_to(x, shape)


def linear(x, weight, bias=None):
    """x (..., I), weight (O, I), bias (O,) -> (..., O). Also every 1x1 convolution, as channels are last."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] < 64:  # up to eight times as fast on a CPU: oneDNN packs its second matrix anew each time
        y = ops.MatMul(transpose_b=True)(weight, rows).transpose(1, 0)
    else:
        y = ops.MatMul(transpose_b=True)(rows, weight)
    if bias is not None:
        y = ops.bias_add(y, bias)
    return y.reshape(x.shape[:-1] + (weight.shape[0],))


@constexpr
def tap_rows(size, out_size, kernel, stride, dilation, padding, scale, loop, begin, end):
    """For output positions and taps of a convolution, the rows of the flattened (H * W, C) input that they multiply.

    Sizes, kernel, stride, dilation and padding are pairs (height, width). Row H * W stands for the zeros outside the
    image. `scale` 2 reads the image as if its pixels were doubled in both directions and it was cut to out_size. With
    `loop` the image repeats itself along its height.
    Returns an int32 Tensor ((end - begin) * K,) for the positions begin to end of the flattened output.
    """
    def along(axis, position):
        limit = (size if scale == 1 else out_size)[axis]
        place = position[:, None] * stride[axis] - padding[axis] + np.arange(kernel[axis]) * dilation[axis]
        if loop and axis == 0:
            place = place % limit
        return place // scale, (place >= 0) & (place < limit)

    y, x = np.divmod(np.arange(begin, end), out_size[1])
    (y, y_inside), (x, x_inside) = along(0, y), along(1, x)
    rows = y[:, :, None] * size[1] + x[:, None, :]
    inside = y_inside[:, :, None] & x_inside[:, None, :]
    return Tensor(np.where(inside, rows, size[0] * size[1]).reshape(-1).astype(np.int32))


def gathered_convolution(x, weight, out_size, *, kernel, stride, dilation, padding, scale, loop):
    """A convolution as a gather and a matrix product: what is fast where the native kernel is slow (CPU).

    x (N, H, W, I), weight (O, K * I) -> (N * H_out * W_out, O)
    """
    n, h, w, i = x.shape
    positions = out_size[0] * out_size[1]
    step = -(-positions // blocks(n * positions * weight.shape[1]))
    x = ops.cat((x.reshape(n, h * w, i), ops.zeros((n, 1, i), x.dtype)), 1)
    parts = ()
    for begin in range(0, positions, step):
        end = min(begin + step, positions)
        rows = tap_rows((h, w), out_size, kernel, stride, dilation, padding, scale, loop, begin, end)
        if begin > 0:
            rows = ops.Depend()(rows, parts[-1])  # one block after the other, so that they share memory
        taps = ops.gather(x, rows, 1).reshape(n * (end - begin), -1)
        parts = parts + (ops.MatMul(transpose_b=True)(taps, weight).reshape(n, end - begin, -1),)
    y = parts[0] if len(parts) == 1 else ops.cat(parts, 1)
    return y.reshape(n * positions, -1)


def native_convolution(x, weight, out_size, *, kernel, stride, dilation, padding, scale, loop):
    """The same by the device's own convolution: x (N, H, W, I), weight (O, I, KH, KW) -> (N * H_out * W_out, O)."""
    n, h, w, i = x.shape
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


def convolution(x, weight, out_size, *, kernel, stride=(1, 1), dilation=(1, 1), padding=(0, 0), scale=1,
                loop=False):
    """The weight's layout, chosen for the device when it was loaded, says which of the two ways computes it."""
    way = gathered_convolution if weight.ndim == 2 else native_convolution
    return way(x, weight, out_size, kernel=kernel, stride=stride, dilation=dilation, padding=padding, scale=scale,
               loop=loop)


def conv2d(x, weight, bias, *, stride=1, upsample_to=None, loop=False):
    """3x3 convolution with padding 1: x (N, H, W, I) -> (N, ceil(H / stride), ceil(W / stride), O).

    `upsample_to` (H_out, W_out) doubles the image first (nearest neighbour), cut to that size:
    diffusers' Upsample2D with its `output_size`. With `loop` the padding in time is the other end of the image, which
    `stride` must divide.
    """
    n, h, w, _ = x.shape
    out_size = ((h - 1) // stride + 1, (w - 1) // stride + 1) if upsample_to is None else upsample_to
    y = convolution(x, weight, out_size, kernel=(3, 3), stride=(stride, stride), padding=(1, 1),
                    scale=1 if upsample_to is None else 2, loop=loop)
    return ops.bias_add(y, bias).reshape(n, out_size[0], out_size[1], -1)


def conv1d(x, weight, bias, *, kernel, dilation=1):
    """x (N, L, I) -> (N, L, O), zero-padded to keep its length; `kernel` is odd."""
    n, l, i = x.shape
    y = convolution(x.reshape(n, l, 1, i), weight, (l, 1), kernel=(kernel, 1), dilation=(dilation, 1),
                    padding=(dilation * (kernel - 1) // 2, 0))
    return ops.bias_add(y, bias).reshape(n, l, -1)


def polyphase(kernel, stride):
    """(first, taps): output position stride * q of a transposed convolution reads inputs q - first and taps - 1 more.

    Position t = stride * q + phase sums the inputs i whose tap k = t + padding - stride * i lies in [0, kernel), with
    HiFi-GAN's padding (kernel - stride) // 2.
    """
    padding = (kernel - stride) // 2
    first = (kernel - 1 - padding) // stride
    return first, first + 1 + (stride - 1 + padding) // stride


def conv_transpose1d(x, weight, bias, *, kernel, stride):
    """x (N, L, I) -> (N, (L - 1) * stride - 2 * ((kernel - stride) // 2) + kernel, O).

    torch's ConvTranspose1d as a plain convolution with one set of output channels for each of the `stride` phases
    (weights.py: `polyphase_weight`), so that no device needs a transposed one.
    """
    n, l, i = x.shape
    first, taps = polyphase(kernel, stride)
    length = (l - 1) * stride - 2 * ((kernel - stride) // 2) + kernel
    rows = (length - 1) // stride + 1
    y = convolution(x.reshape(n, l, 1, i), weight, (rows, 1), kernel=(taps, 1), padding=(first, 0))
    y = ops.bias_add(y.reshape(n * rows * stride, -1), bias).reshape(n, rows * stride, -1)
    return y[:, :length] if length < rows * stride else y


@constexpr
def averages(n, positions, channels, groups):
    """What averages positions, (N, 1, H * W), and the channels of each group, (C, C), as float32 matrices."""
    same_group = np.kron(np.eye(groups), np.full((channels // groups,) * 2, groups / channels))
    return Tensor(np.full((n, 1, positions), 1 / positions, np.float32)), Tensor(same_group.astype(np.float32))


def group_norm(x, weight, bias, *, groups, eps):
    """x (N, H, W, C), normalised over H, W and the C / groups channels of each group; statistics in float32.

    Averages are matrix products: the fast way on a CPU with channels last.
    """
    n, h, w, c = x.shape
    rows = x.reshape(n, h * w, c).astype(float32)
    over_positions, over_group = averages(n, h * w, c, groups)
    mean = ops.MatMul()(ops.BatchMatMul()(over_positions, rows).reshape(n, c), over_group)
    if n == 1:
        rows = ops.bias_add(rows.reshape(-1, c), -mean.reshape(c)).reshape(rows.shape)  # faster than `stretched`
    else:
        rows = rows - stretched(mean.reshape(n, 1, c), rows.shape)
    variance = ops.MatMul()(ops.BatchMatMul()(over_positions, rows * rows).reshape(n, c), over_group)
    scale = weight * ops.rsqrt(variance + eps)
    rows = (rows * stretched(scale.reshape(n, 1, c), rows.shape)).reshape(-1, c).astype(x.dtype)
    return ops.bias_add(rows, bias).reshape(n, h, w, c)


def layer_norm(x, weight, bias, *, eps):
    """x (..., C), normalised over C (Ba et al., 2016)."""
    return ops.LayerNorm(-1, -1, eps)(x, weight, bias)[0]


def gelu(x):
    """The exact GELU, x * Phi(x): CLAP and the UNet were trained with it, not with the tanh approximation."""
    return x * (ops.erf(x * 0.5 ** 0.5) * 0.5 + 0.5)


def tanh(x):
    """Elementwise, by the sigmoid: MindSpore's own tanh is off by up to 1e-4 on a CPU, and passes 1."""
    return ops.sigmoid(x * 2) * 2 - 1


def leaky_relu(x, slope):
    """x where it is positive, x * slope (0 to 1) elsewhere."""
    return ops.maximum(x, x * slope)


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
        y = y + stretched(linear(embedding, **p["time_emb_proj"]).reshape(y.shape[0], 1, 1, -1), y.shape)
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
    bias = stretched(bias.reshape(1, 1, *shape[2:]), shape) + stretched(parting, shape)
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
        y = conv1d(leaky_relu(x, slope), **p["convs1." + str(i)], kernel=kernel, dilation=dilations[i])
        x = x + conv1d(leaky_relu(y, slope), **p["convs2." + str(i)], kernel=kernel)
    return x
