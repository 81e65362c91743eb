"""FasterViT (arXiv 2306.06189) in plain float64 NumPy: slow, explicit, eval mode only.

A reference to test faster code against. It takes the official state-dict names and layouts (linear: out, in;
conv: OIHW), any image size, and any number of windows, square or not. A stage uses carrier tokens when its `hat`
flag is set and its padded map holds more than one window; `weights` has no say in that. Missing layer scales
(gamma) are 1.

Axes: B batch, H W rows and columns of a map, C channels, N tokens, h heads, K head width, w window side,
t carrier tokens per window and side. Maps are (B, H, W, C); token sequences (N, C).
"""

import numpy as np
from scipy.special import erf

TOKEN_NORM_EPS, MAP_NORM_EPS = 1e-5, 1e-6
STEM_BN_EPS, BN_EPS = 1e-4, 1e-5


# Elementary layers. `p` is the weight dict, `name` a prefix of state-dict keys.
def gelu(x):
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def linear(p, name, x):
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def batch_norm(p, name, x, eps):
    x = (x - p[f"{name}.running_mean"]) / np.sqrt(p[f"{name}.running_var"] + eps)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def layer_norm(p, name, x, eps):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def conv3x3(p, name, x, stride=1, depthwise=False):
    """3x3 convolution with one pixel of zeros on all four sides: a sum over the nine taps."""
    weight = p[f"{name}.weight"]  # (out, in, 3, 3), or (C, 1, 3, 3) if depthwise
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = 0.0
    for row in range(3):
        for col in range(3):
            tap = padded[:, row : row + height : stride, col : col + width : stride]
            kernel = weight[:, :, row, col]
            total = total + (tap * kernel[:, 0] if depthwise else tap @ kernel.T)
    return total + p[f"{name}.bias"] if f"{name}.bias" in p else total


# Position terms: functions of coordinates.
def coordinate_mlp(p, name, coordinates):
    return linear(p, f"{name}.cpb_mlp.2", np.maximum(linear(p, f"{name}.cpb_mlp.0", coordinates), 0))


def raster(rows, cols):
    """Row and column of every token of a grid, in raster order."""
    return [(row, col) for row in range(rows) for col in range(cols)]


def absolute_embedding(p, name, rows, cols):
    """(rows * cols, C): P_w or P_c, each axis normalised by its own side."""

    def coordinate(index, side):
        return (index - side // 2) / (side // 2) if side // 2 else 0.0

    coordinates = np.array([(coordinate(row, rows), coordinate(col, cols)) for row, col in raster(rows, cols)])
    return coordinate_mlp(p, name, coordinates)


def relative_bias(p, name, rows, cols):
    """(h, N, N): bias of [query, key] on a grid of N = rows * cols tokens, by offset query - key."""

    def coordinate(offset, side):
        t = 8 * offset / (side - 1) if side > 1 else 0.0
        return np.sign(t) * np.log2(abs(t) + 1) / 3

    offsets = [(dr, dc) for dr in range(1 - rows, rows) for dc in range(1 - cols, cols)]
    mlp_in = np.array([(coordinate(dr, rows), coordinate(dc, cols)) for dr, dc in offsets])
    mlp_out = 16 / (1 + np.exp(-coordinate_mlp(p, name, mlp_in)))
    of_offset = dict(zip(offsets, mlp_out, strict=True))
    grid = raster(rows, cols)
    bias = np.array([[of_offset[qr - kr, qc - kc] for kr, kc in grid] for qr, qc in grid])  # (N, N, h)
    return bias.transpose(2, 0, 1)


# Attention and MLP, on one token sequence (N, C).
def attention(p, name, x, heads, bias):
    """`bias` is (h, M, M) with M <= N: it applies to the last M tokens, the leading N - M have none."""
    tokens, channels = x.shape
    qkv = linear(p, f"{name}.qkv", x).reshape(tokens, 3, heads, channels // heads)
    lead = tokens - bias.shape[1]
    merged = []
    for head in range(heads):
        q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]  # (N, K)
        scores = q @ k.T * (channels // heads) ** -0.5
        scores[lead:, lead:] += bias[head]
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        merged.append(scores / scores.sum(-1, keepdims=True) @ v)
    return linear(p, f"{name}.proj", np.concatenate(merged, -1))


def mlp(p, name, x):
    return linear(p, f"{name}.fc2", gelu(linear(p, f"{name}.fc1", x)))


def transformer(p, block, x, heads, bias, prefix, gammas):
    """Residual attention, then residual MLP. `prefix` is 'hat_' for the carrier branch, '' for the windows."""
    gamma_attn, gamma_mlp = (p.get(f"{block}.{gamma}", 1.0) for gamma in gammas)
    normed = layer_norm(p, f"{block}.{prefix}norm1", x, TOKEN_NORM_EPS)
    x = x + gamma_attn * attention(p, f"{block}.{prefix}attn", normed, heads, bias)
    return x + gamma_mlp * mlp(p, f"{block}.{prefix}mlp", layer_norm(p, f"{block}.{prefix}norm2", x, TOKEN_NORM_EPS))


# The two kinds of stage.
def conv_block(p, block, x):
    y = gelu(batch_norm(p, f"{block}.norm1", conv3x3(p, f"{block}.conv1", x), BN_EPS))
    y = batch_norm(p, f"{block}.norm2", conv3x3(p, f"{block}.conv2", y), BN_EPS)
    return x + p.get(f"{block}.gamma", 1.0) * y


def carrier_init(p, name, x, w, t):
    """(B, H, W, C) padded map -> (B, H / w * t, W / w * t, C) carrier tokens on their raster grid."""
    x = conv3x3(p, f"{name}.pos_embed", x, depthwise=True)
    sides = x.shape[1:3]
    outs = [t * side // w for side in sides]
    strides = [side // out for side, out in zip(sides, outs, strict=True)]
    kernels = [side - (out - 1) * stride for side, out, stride in zip(sides, outs, strides, strict=True)]
    carriers = np.zeros((x.shape[0], *outs, x.shape[3]))
    for row, col in raster(*outs):
        top, left = row * strides[0], col * strides[1]
        carriers[:, row, col] = x[:, top : top + kernels[0], left : left + kernels[1]].mean((1, 2))
    return carriers


def hat_block(p, block, x, carriers, heads, w, t, propagate):
    """One block on one image. x: (H, W, C), sides multiples of w; carriers: (H / w * t, W / w * t, C) or None."""
    height, width, channels = x.shape
    if carriers is not None:
        rows, cols = carriers.shape[:2]
        tokens = carriers.reshape(rows * cols, channels) + absolute_embedding(p, f"{block}.hat_pos_embed", rows, cols)
        bias = relative_bias(p, f"{block}.hat_attn.pos_emb_funct", rows, cols)
        tokens = transformer(p, block, tokens, heads, bias, "hat_", ("gamma1", "gamma2"))
        carriers = tokens.reshape(rows, cols, channels)

    embedding = absolute_embedding(p, f"{block}.pos_embed", w, w)
    bias = relative_bias(p, f"{block}.attn.pos_emb_funct", w, w)
    new_x, new_carriers = np.zeros_like(x), None if carriers is None else np.zeros_like(carriers)
    for i, j in raster(height // w, width // w):
        window = np.s_[i * w : (i + 1) * w, j * w : (j + 1) * w]
        own = np.s_[i * t : (i + 1) * t, j * t : (j + 1) * t]
        z = x[window].reshape(w * w, channels) + embedding
        if carriers is not None:
            z = np.concatenate([carriers[own].reshape(t * t, channels), z])
        z = transformer(p, block, z, heads, bias, "", ("gamma3", "gamma4"))
        new_x[window] = z[-w * w :].reshape(w, w, channels)
        if carriers is not None:
            new_carriers[own] = z[: t * t].reshape(t, t, channels)
            if propagate:
                nearest = [index * t // w for index in range(w)]
                new_x[window] += p.get(f"{block}.gamma1", 1.0) * new_carriers[own][nearest][:, nearest]
    return new_x, new_carriers


def hat_stage(p, level, x, depth, heads, w, t, hat, do_propagation):
    height, width = x.shape[1:3]
    x = np.pad(x, ((0, 0), (0, -height % w), (0, -width % w), (0, 0)))
    use_carriers = hat and x.shape[1] * x.shape[2] > w * w
    carriers = carrier_init(p, f"{level}.global_tokenizer", x, w, t) if use_carriers else [None] * len(x)
    images = []
    for image, carrier in zip(x, carriers, strict=True):
        for i in range(depth):
            propagate = do_propagation and i == depth - 1
            image, carrier = hat_block(p, f"{level}.blocks.{i}", image, carrier, heads, w, t, propagate)
        images.append(image[:height, :width])
    return np.stack(images)


def forward(weights, images, *, depths, num_heads, window_size, ct_size, hat, do_propagation=False,
            layer_norm_last=False) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits (pooled features if there is no head) and the four stage maps, before the downsamplers, NHWC."""
    p = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x = np.asarray(images, np.float64)
    for conv, norm in ((0, 1), (3, 4)):
        x = conv3x3(p, f"patch_embed.conv_down.{conv}", x, stride=2)
        x = np.maximum(batch_norm(p, f"patch_embed.conv_down.{norm}", x, STEM_BN_EPS), 0)
    stages = []
    for s in range(4):
        level = f"levels.{s}"
        if s < 2:
            for i in range(depths[s]):
                x = conv_block(p, f"{level}.blocks.{i}", x)
        else:
            x = hat_stage(p, level, x, depths[s], num_heads[s], window_size[s], ct_size, hat[s], do_propagation)
        stages.append(x)
        if s < 3:
            x = layer_norm(p, f"{level}.downsample.norm", x, MAP_NORM_EPS)
            x = conv3x3(p, f"{level}.downsample.reduction.0", x, stride=2)
    x = layer_norm(p, "norm", x, MAP_NORM_EPS) if layer_norm_last else batch_norm(p, "norm", x, BN_EPS)
    x = x.mean((1, 2))
    return (linear(p, "head", x) if "head.weight" in p else x), stages
