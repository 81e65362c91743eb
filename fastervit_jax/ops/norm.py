"""Layer norm over channels: an XLA form that runs anywhere, and a kernel a direction for GPUs behind it.

XLA's own kernels for it, forward and above all backward, take several times what reading and writing the arrays takes.

Axes: r rows (tokens or pixels of all images), c channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from fastervit_jax.ops.kernels import call, chosen, over_batch, padded

MOST_CHANNELS = 8192
"""A row must fit into a program's registers."""
TILE = 4096
"""Values that a program holds at a time, of several rows where they are short."""
PROGRAMS = 1024
"""At most so many share the rows: each adds up the gradients of scale and bias over its own."""


def layer_norm(
    x: Float[Array, "*b c"], scale: Float[Array, "c"], bias: Float[Array, "c"], epsilon: float, *,
    kernels: str = "auto",
) -> Float[Array, "*b c"]:
    """(x - mean) / sqrt(var + epsilon) · scale + bias over the last axis, in x's dtype.

    Mean and variance (in two passes, for accuracy), and all else, are float32 whatever the input is.
    `kernels`: one of `ops.kernels.KERNELS`.
    """
    channels = x.shape[-1]
    unfit = f"{channels} channels, more than {MOST_CHANNELS}" if channels > MOST_CHANNELS else ""
    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    if chosen(kernels, x.dtype, unfit):
        return _layer_norm(x.reshape(-1, channels), scale, bias, epsilon).reshape(x.shape)
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    deviation = jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + epsilon)
    shape = (1,) * (x.ndim - 1) + (channels,)
    return (wide * (deviation * scale.reshape(shape)) + bias.reshape(shape)).astype(x.dtype)


class _Rows:
    """The rows of a program, a tile at a time."""

    def __init__(self, x_ref, epsilon: float):
        self.count, self.channels = x_ref.shape
        self.columns, self.epsilon = padded(self.channels), epsilon
        self.rows = max(1, TILE // self.columns)
        self.column = jnp.arange(self.columns) < self.channels

    def place(self, ref, tile) -> tuple:
        first = tile * self.rows
        there = (first + jnp.arange(self.rows) < self.count)[:, None] & self.column[None, :]
        return ref.at[pl.ds(first, self.rows), pl.ds(0, self.columns)], there

    def load(self, ref, tile) -> Array:
        where, there = self.place(ref, tile)
        return plgpu.load(where, mask=there, other=0.0).astype(jnp.float32)

    def store(self, ref, tile, value) -> None:
        where, there = self.place(ref, tile)
        plgpu.store(where, value.astype(ref.dtype), mask=there)

    def vector(self, ref) -> Array:
        return plgpu.load(ref.at[pl.ds(0, self.columns)], mask=self.column, other=0.0)[None, :]

    def mean(self, x: Array) -> Array:
        return (x.sum(axis=1) * (1 / self.channels))[:, None]

    def normalised(self, x: Array) -> tuple[Array, Array]:
        """x without mean and deviation, and one over the deviation."""
        x = jnp.where(self.column[None, :], x - self.mean(x), 0.0)
        deviation = jax.lax.rsqrt(self.mean(x * x) + self.epsilon)
        return x * deviation, deviation


def _forward_kernel(x_ref, scale_ref, bias_ref, out_ref, *, epsilon: float) -> None:
    rows, tile = _Rows(x_ref, epsilon), pl.program_id(0)
    x, _ = rows.normalised(rows.load(x_ref, tile))
    rows.store(out_ref, tile, x * rows.vector(scale_ref) + rows.vector(bias_ref))


def _backward_kernel(x_ref, scale_ref, d_out_ref, d_x_ref, d_scale_ref, d_bias_ref, *, epsilon: float) -> None:
    rows, program = _Rows(x_ref, epsilon), pl.program_id(0)
    tiles = pl.cdiv(pl.cdiv(rows.count, rows.rows), d_scale_ref.shape[0])
    scale = rows.vector(scale_ref)

    def tile(i, sums):
        place = program * tiles + i
        x, deviation = rows.normalised(rows.load(x_ref, place))
        d_out = rows.load(d_out_ref, place)
        d_x = d_out * scale
        d_x = deviation * (d_x - rows.mean(d_x) - x * rows.mean(d_x * x))
        rows.store(d_x_ref, place, d_x)
        return sums[0] + d_out * x, sums[1] + d_out

    zeros = jnp.zeros((rows.rows, rows.columns), jnp.float32)
    d_scale, d_bias = jax.lax.fori_loop(0, tiles, tile, (zeros, zeros))
    for ref, value in ((d_scale_ref, d_scale), (d_bias_ref, d_bias)):
        plgpu.store(ref.at[program, pl.ds(0, rows.columns)], value.sum(axis=0), mask=rows.column)


def _tiles(x: Float[Array, "r c"]) -> int:
    return pl.cdiv(len(x), max(1, TILE // padded(x.shape[1])))


def _warps(channels: int) -> int:
    return max(4, min(16, padded(channels) // 512))


def forward(
    x: Float[Array, "r c"], scale: Float[Array, "c"], bias: Float[Array, "c"], epsilon: float
) -> Float[Array, "r c"]:
    """The kernel on one device."""
    return call(_forward_kernel, "layer_norm", (x, scale, bias), [(x.shape, x.dtype)], grid=(_tiles(x),),
                warps=_warps(x.shape[1]), epsilon=epsilon)[0]


def backward(
    x: Float[Array, "r c"], scale: Float[Array, "c"], d_out: Float[Array, "r c"], epsilon: float
) -> tuple[Float[Array, "r c"], Float[Array, "c"], Float[Array, "c"]]:
    """Gradients of x, scale and bias from that of the output, on one device."""
    programs = min(PROGRAMS, _tiles(x))
    sums = ((programs, x.shape[1]), jnp.float32)
    d_x, d_scale, d_bias = call(
        _backward_kernel, "layer_norm_backward", (x, scale, d_out), [(x.shape, x.dtype), sums, sums],
        grid=(programs,), warps=_warps(x.shape[1]), epsilon=epsilon)
    return d_x, d_scale.sum(0), d_bias.sum(0)


_forward = over_batch(forward, "b c, c, c -> b c", static=1)
_backward = over_batch(backward, "b c, c, b c -> b c, c, c", static=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _layer_norm(x, scale, bias, epsilon):
    return _forward(x, scale, bias, epsilon)


def _layer_norm_forward(x, scale, bias, epsilon):
    return _forward(x, scale, bias, epsilon), (x, scale)


def _layer_norm_backward(epsilon, residuals, d_out):
    return _backward(*residuals, d_out, epsilon)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
