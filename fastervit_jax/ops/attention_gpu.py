"""Attention within windows as one kernel a direction.

A program has one head and a few windows: it reads q, k and v of a window where the linear layer has written them, keeps
scores and softmax in registers, and writes heads side by side. Neither transposes nor scores go through memory. The
backward kernel computes the scores again, and adds up the bias' gradient over its windows.

Axes: b windows (of all images), t tokens of a window, h heads, d width of a head; c = h · d, e = 3 c.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from fastervit_jax.ops.kernels import call, over_batch, padded

MOST_TOKENS, MOST_WIDTH = 128, 128
"""A tile of scores must fit into a program's registers."""
MASKED = -1e30
"""Score of a token that is not there: finite, so that a row of them has no NaN."""


def unfit(tokens: int, width: int) -> str:
    """Why there is no kernel for windows of so many tokens and heads of this width; "" where there is one."""
    if tokens > MOST_TOKENS:
        return f"windows of {tokens} tokens, more than {MOST_TOKENS}"
    return f"heads of width {width}, more than {MOST_WIDTH}" if width > MOST_WIDTH else ""


def _warps(tokens: int) -> int:
    return {16: 1, 32: 2, 64: 4, 128: 8}[padded(tokens)]


def _windows(count: int, heads: int) -> int:
    """Windows of a program: a few, so that it loads the bias once for them, and still enough programs for a GPU."""
    most = 8
    while most > 1 and heads * count < 1024 * most:
        most //= 2
    return most


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Sum over axis contract[0] of a and contract[1] of b, in float32; exact products where a and b are float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
                               preferred_element_type=jnp.float32)


class _Tiles:
    """Where a program's tiles are, and what of them is there."""

    def __init__(self, qkv_ref, bias_ref, windows: int):
        self.bias_ref, self.windows = bias_ref, windows
        self.count, self.tokens, channels = qkv_ref.shape
        self.heads = bias_ref.shape[0]
        self.width = channels // (3 * self.heads)
        self.head, self.group = pl.program_id(0), pl.program_id(1)
        self.rows, self.columns = pl.ds(0, padded(self.tokens)), padded(self.width)
        token = jnp.arange(self.rows.size) < self.tokens
        self.pairs = token[:, None] & token[None, :]
        self.there = token[:, None] & (jnp.arange(self.columns) < self.width)[None, :]

    def place(self, ref, i, part: int) -> tuple:
        """The reference and the mask of window i of this program: of q, k, v (`part` 0, 1, 2), or of the output (0)."""
        window = self.group * self.windows + i
        column = (part * self.heads + self.head) * self.width
        mask = self.there if self.count % self.windows == 0 else self.there & (window < self.count)
        return ref.at[window, self.rows, pl.ds(column, self.columns)], mask

    def load(self, ref, i, part: int = 0) -> Array:
        where, mask = self.place(ref, i, part)
        return plgpu.load(where, mask=mask, other=0.0)

    def store(self, ref, i, value, part: int = 0) -> None:
        where, mask = self.place(ref, i, part)
        plgpu.store(where, value.astype(ref.dtype), mask=mask)

    def bias(self) -> Array:
        return plgpu.load(self.bias_ref.at[self.head, self.rows, self.rows], mask=self.pairs, other=MASKED)


def _forward_kernel(qkv_ref, bias_ref, out_ref, *, scale: float, windows: int) -> None:
    tiles = _Tiles(qkv_ref, bias_ref, windows)
    bias = tiles.bias()

    def window(i, carry):
        q, k, v = (tiles.load(qkv_ref, i, part) for part in range(3))
        scores = scale * _dot(q, k, (1, 1)) + bias
        weights = jnp.exp(scores - scores.max(axis=1)[:, None])
        out = _dot(weights.astype(v.dtype), v, (1, 0)) / weights.sum(axis=1)[:, None]
        tiles.store(out_ref, i, out)
        return carry

    jax.lax.fori_loop(0, windows, window, None)


def _backward_kernel(qkv_ref, bias_ref, d_out_ref, d_qkv_ref, d_bias_ref, *, scale: float, windows: int) -> None:
    tiles = _Tiles(qkv_ref, bias_ref, windows)
    bias = tiles.bias()

    def window(i, d_bias):
        q, k, v = (tiles.load(qkv_ref, i, part) for part in range(3))
        d_out = tiles.load(d_out_ref, i)
        scores = scale * _dot(q, k, (1, 1)) + bias
        weights = jnp.exp(scores - scores.max(axis=1)[:, None])
        weights = weights / weights.sum(axis=1)[:, None]
        tiles.store(d_qkv_ref, i, _dot(weights.astype(v.dtype), d_out, (0, 0)), part=2)
        d_weights = _dot(d_out, v, (1, 1))
        d_scores = weights * (d_weights - (weights * d_weights).sum(axis=1)[:, None])
        rounded = d_scores.astype(q.dtype)
        tiles.store(d_qkv_ref, i, scale * _dot(rounded, k, (1, 0)), part=0)
        tiles.store(d_qkv_ref, i, scale * _dot(rounded, q, (0, 0)), part=1)
        return d_bias + d_scores

    d_bias = jax.lax.fori_loop(0, windows, window, jnp.zeros_like(bias))
    plgpu.store(d_bias_ref.at[tiles.group, tiles.head, tiles.rows, tiles.rows], d_bias, mask=tiles.pairs)


def _grid(count: int, heads: int) -> tuple[int, int]:
    """Heads of a window run side by side: they share cache lines."""
    return heads, pl.cdiv(count, _windows(count, heads))


def forward(qkv: Float[Array, "b t e"], bias: Float[Array, "h t t"], scale: float) -> Float[Array, "b t c"]:
    """The kernel on one device."""
    count, tokens, channels = qkv.shape
    heads = len(bias)
    return call(
        _forward_kernel, "window_attention", (qkv, bias), [((count, tokens, channels // 3), qkv.dtype)],
        grid=_grid(count, heads), warps=_warps(tokens), scale=scale, windows=_windows(count, heads))[0]


def backward(
    qkv: Float[Array, "b t e"], bias: Float[Array, "h t t"], d_out: Float[Array, "b t c"], scale: float
) -> tuple[Float[Array, "b t e"], Float[Array, "h t t"]]:
    """Gradients of qkv and bias from that of the output, on one device."""
    count, tokens, _ = qkv.shape
    grid = _grid(count, len(bias))
    d_qkv, d_bias = call(
        _backward_kernel, "window_attention_backward", (qkv, bias, d_out),
        [(qkv.shape, qkv.dtype), ((grid[1], *bias.shape), jnp.float32)],
        grid=grid, warps=_warps(tokens), scale=scale, windows=_windows(count, len(bias)))
    return d_qkv, d_bias.sum(0)


_forward = over_batch(forward, "b t e, h t s -> b t c", static=1)
_backward = over_batch(backward, "b t e, h t s, b t c -> b t e, h t s", static=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def attention(qkv: Float[Array, "b t e"], bias: Float[Array, "h t t"], scale: float) -> Float[Array, "b t c"]:
    """softmax(scale · q kᵀ + bias) v, with its gradient, wherever the windows lie. `bias` is float32."""
    return _forward(qkv, bias, scale)


def _attention_forward(qkv, bias, scale):
    return _forward(qkv, bias, scale), (qkv, bias)


def _attention_backward(scale, residuals, d_out):
    return _backward(*residuals, d_out, scale)


attention.defvjp(_attention_forward, _attention_backward)
