"""Layer norm over channels: an XLA form that runs anywhere, and a kernel a direction for GPUs behind it.

XLA's own kernels for it, forward and above all backward, take several times what reading and writing the arrays takes.

Axes: r rows (tokens or pixels of all images), c channels.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from fastervit_jax.ops.kernels import Rows, call, chosen, flat, over_batch, padded

MOST_CHANNELS = 8192
"""A row must fit into a program's registers."""
SCALE, BIAS = 0, 1
"""Rows of the one array that kernels get them as: each array of its own would be one more copied out of others."""
PROGRAMS = 1056
"""At most so many share the rows, 8 for each of the 132 processors of an H100 or H200: each adds up the gradients of
scale and bias over its own."""


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
        return _layer_norm(flat(x), jnp.stack([scale, bias]), epsilon).reshape(x.shape)
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    deviation = jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + epsilon)
    shape = (1,) * (x.ndim - 1) + (channels,)
    return (wide * (deviation * scale.reshape(shape)) + bias.reshape(shape)).astype(x.dtype)


class _Rows(Rows):
    """The rows of a program, and what layer norm makes of them."""

    def mean(self, x: Array) -> Array:
        return (x.sum(axis=1) * (1 / self.channels))[:, None]

    def normalised(self, x: Array, epsilon: float) -> tuple[Array, Array]:
        """x without mean and deviation, and one over the deviation."""
        x = jnp.where(self.column[None, :], x - self.mean(x), 0.0)
        deviation = jax.lax.rsqrt(self.mean(x * x) + epsilon)
        return x * deviation, deviation


def _forward_kernel(x_ref, vectors_ref, out_ref, *, epsilon: float) -> None:
    rows, tile = _Rows(x_ref.shape), pl.program_id(0)
    scale, bias = (rows.vector(vectors_ref, row) for row in (SCALE, BIAS))
    x, _ = rows.normalised(rows.load(x_ref, tile), epsilon)
    rows.store(out_ref, tile, x * scale + bias)


def _backward_kernel(x_ref, vectors_ref, d_out_ref, d_x_ref, sums_ref, *, epsilon: float) -> None:
    rows = _Rows(x_ref.shape)
    scale = rows.vector(vectors_ref, SCALE)

    def tile(place):
        x, deviation = rows.normalised(rows.load(x_ref, place), epsilon)
        d_out = rows.load(d_out_ref, place)
        d_x = d_out * scale
        d_x = deviation * (d_x - rows.mean(d_x) - x * rows.mean(d_x * x))
        rows.store(d_x_ref, place, d_x)
        return d_out * x, d_out

    rows.add_up(tile, sums_ref, pl.program_id(0), sums_ref.shape[0])


def _warps(channels: int) -> int:
    return max(4, min(16, padded(channels) // 512))


def forward(x: Float[Array, "r c"], vectors: Float[Array, "2 c"], epsilon: float) -> Float[Array, "r c"]:
    """The kernel on one device. `vectors` are scale and bias."""
    return call(_forward_kernel, "layer_norm", (x, vectors), [(x.shape, x.dtype)], grid=(Rows(x.shape).tiles,),
                warps=_warps(x.shape[1]), epsilon=epsilon)[0]


def backward(
    x: Float[Array, "r c"], vectors: Float[Array, "2 c"], d_out: Float[Array, "r c"], epsilon: float
) -> tuple[Float[Array, "r c"], Float[Array, "2 c"]]:
    """Gradients of x, and of scale and bias, from that of the output, on one device."""
    programs = min(PROGRAMS, Rows(x.shape).tiles)
    d_x, sums = call(
        _backward_kernel, "layer_norm_backward", (x, vectors, d_out),
        [(x.shape, x.dtype), ((programs, 2, x.shape[1]), jnp.float32)], grid=(programs,), warps=_warps(x.shape[1]),
        epsilon=epsilon)
    return d_x, sums.sum(0)


_forward = over_batch(forward, "b c, two c -> b c", static=1)
_backward = over_batch(backward, "b c, two c, b c -> b c, two c", static=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _layer_norm(x, vectors, epsilon):
    return _forward(x, vectors, epsilon)


_layer_norm.defvjp(
    lambda x, vectors, epsilon: (_forward(x, vectors, epsilon), (x, vectors)),
    lambda epsilon, residuals, d_out: _backward(*residuals, d_out, epsilon))
