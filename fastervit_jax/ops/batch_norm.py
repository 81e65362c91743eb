"""Batch norm on batch statistics together with the activation after it, and their gradient.

Left to itself, differentiation keeps arrays in float32 between forward and backward pass, and between the two passes
that the gradient needs: one for the sums, one for what follows from them. Here the input alone is kept, in its own
dtype, and both passes compute the rest from it again.

Axes: g groups of images that share statistics, n images of a group, h and w height and width of a map, c channels.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from fastervit_jax.ops import gelu
from fastervit_jax.ops.kernels import Rows, call, chosen, over_batch

OVER = (1, 2, 3)
"""The axes that statistics are taken over."""
VALUES, WARPS = 4096, 8
"""Values that a program computes, and with how many warps."""
SUM_PROGRAMS, SUM_VALUES = 2112, 1024
"""At most so many programs share the rows that are added up, of which each holds so many values at a time."""

ACTIVATIONS = ("none", "relu", "gelu")


def activate(x: Float[Array, "*b"], activation: str, dtype: Any) -> Float[Array, "*b"]:
    """One of ACTIVATIONS of float32 numbers, rounded to `dtype`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    x = {"none": lambda: x, "relu": lambda: jax.nn.relu(x), "gelu": lambda: gelu.value(x, dtype)}[activation]()
    return x.astype(dtype)


def _slope(x: Array, activation: str, dtype: Any) -> Array | float:
    if activation == "gelu":
        return gelu.slope(x, dtype)
    return (x > 0).astype(x.dtype) if activation == "relu" else 1.0


def _wide(x: Float[Array, "g c"]) -> Float[Array, "g 1 1 1 c"]:
    return x[:, None, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def batch_norm(
    x: Float[Array, "g n h w c"], scale: Float[Array, "c"], bias: Float[Array, "c"], pivot: Float[Array, "c"],
    factor: Float[Array, "g n"] | None, epsilon: float, activation: str, kernels: str,
) -> tuple[Float[Array, "g n h w c"], Float[Array, "g c"], Float[Array, "g c"]]:
    """activation((x - mean) / sqrt(var + epsilon) · scale + bias) in x's dtype, and each group's mean and variance.

    All in between is float32. The variance is the biased one. `pivot` is near the mean: then E[d²] - E[d]², with
    d = x - pivot, does not cancel, and one pass over x does for both. `factor` multiplies the result of each image, for
    drop path. No gradient goes through mean and variance that are returned, nor into `pivot` and `factor`.
    `kernels`: one of `ops.kernels.KERNELS`. With GELU and no `factor` there are three: for what follows the statistics,
    and for the two passes of the gradient. XLA's do not reach the memory's bandwidth, and it makes three of these two.
    """
    return _forward(x, scale, bias, pivot, factor, epsilon, activation, kernels)[0]


def _times(x: Float[Array, "g n h w c"], factor: Float[Array, "g n"] | None) -> Float[Array, "g n h w c"]:
    """In float32."""
    x = x.astype(jnp.float32)
    return x if factor is None else x * factor[:, :, None, None, None]


def _forward(x, scale, bias, pivot, factor, epsilon, activation, kernels):
    d = x.astype(jnp.float32) - pivot[None, None, None, None]
    d_mean = d.mean(OVER)
    mean = pivot[None] + d_mean
    var = jnp.maximum((d * d).mean(OVER) - d_mean * d_mean, 0.0)
    inverse = jax.lax.rsqrt(var + epsilon)
    if _by_kernel(x, activation, factor, kernels):
        y = _normalise(_rows(x), mean, inverse * scale[None], _each(bias, mean)).reshape(x.shape)
    else:
        normal = (x.astype(jnp.float32) - _wide(mean)) * _wide(inverse * scale[None]) + bias[None, None, None, None]
        y = _times(activate(normal, activation, x.dtype), factor).astype(x.dtype)
    return (y, mean, var), (x, scale, bias, factor, mean, inverse)


def _backward(epsilon, activation, kernels, residuals, gradients):
    x, scale, bias, factor, mean, inverse = residuals
    d_out = gradients[0]
    lean = gelu.is_16_bit(x.dtype)
    count = x.size // (x.shape[0] * x.shape[-1])
    none = None if factor is None else jnp.zeros_like(factor)

    if _by_kernel(x, activation, factor, kernels):
        known = _rows(x), _rows(d_out), mean, inverse, _each(scale, mean), _each(bias, mean)
        sums = _sums(*known)
        d_scale, d_bias = sums[:, 0], sums[:, 1]
        d_x = _input_gradient(*known, d_scale / count, d_bias / count).reshape(x.shape)
        return d_x, d_scale.sum(0), d_bias.sum(0), jnp.zeros_like(mean[0]), none

    def through_activation(x, d_out):
        normal = (x.astype(jnp.float32) - _wide(mean)) * _wide(inverse)
        scaled = normal * scale[None, None, None, None] + bias[None, None, None, None]
        return normal, _times(d_out, factor) * _slope(scaled, activation, x.dtype)

    if lean:
        x, d_out = jax.lax.optimization_barrier((x, d_out))
    normal, d_scaled = through_activation(x, d_out)
    # One reduction of two arrays: with two of them, XLA writes d_scaled, and reads it for each.
    zero = jnp.zeros((), jnp.float32)
    d_bias, d_scale = jax.lax.reduce(
        (d_scaled, d_scaled * normal), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), OVER)
    if lean:
        x, d_out, d_bias, d_scale = jax.lax.optimization_barrier((x, d_out, d_bias, d_scale))
    normal, d_scaled = through_activation(x, d_out)
    d_x = _wide(inverse * scale[None]) * (d_scaled - _wide(d_bias / count) - normal * _wide(d_scale / count))
    return d_x.astype(x.dtype), d_scale.sum(0), d_bias.sum(0), jnp.zeros_like(mean[0]), none


def _by_kernel(x: Array, activation: str, factor: Array | None, kernels: str) -> bool:
    return activation == "gelu" and factor is None and chosen(kernels, x.dtype, "")


def _rows(x: Float[Array, "g n h w c"]) -> Float[Array, "g r c"]:
    return x.reshape(len(x), -1, x.shape[-1])


def _each(vector: Float[Array, "c"], groups: Float[Array, "g c"]) -> Float[Array, "g c"]:
    return jnp.broadcast_to(vector, groups.shape)


def _normalise_kernel(x_ref, mean_ref, gain_ref, bias_ref, out_ref) -> None:
    rows, tile = Rows(x_ref.shape, pl.program_id(0), VALUES), pl.program_id(1)
    mean, gain, bias = (rows.vector(ref) for ref in (mean_ref, gain_ref, bias_ref))
    normal = (rows.load(x_ref, tile) - mean) * gain + bias
    rows.store(out_ref, tile, gelu.value(normal, out_ref.dtype, in_kernel=True))


def normalise(
    x: Float[Array, "g r c"], mean: Float[Array, "g c"], gain: Float[Array, "g c"], bias: Float[Array, "g c"]
) -> Float[Array, "g r c"]:
    """The kernel on one device: GELU((x - mean) · gain + bias)."""
    return call(_normalise_kernel, "batch_norm_gelu", (x, mean, gain, bias), [(x.shape, x.dtype)],
                grid=(len(x), Rows(x.shape, values=VALUES).tiles), warps=WARPS)[0]


def _through_gelu(rows: Rows, tile: Any, x_ref, d_out_ref, *vectors) -> tuple[Array, Array]:
    """Of a tile, the normalised values, and the gradient of what GELU gets."""
    mean, inverse, scale, bias = vectors
    normal = (rows.load(x_ref, tile) - mean) * inverse
    return normal, rows.load(d_out_ref, tile) * gelu.slope(normal * scale + bias, x_ref.dtype, in_kernel=True)


def _sums_kernel(x_ref, d_out_ref, mean_ref, inverse_ref, scale_ref, bias_ref, sums_ref) -> None:
    rows = Rows(x_ref.shape, pl.program_id(0), SUM_VALUES)
    vectors = [rows.vector(ref) for ref in (mean_ref, inverse_ref, scale_ref, bias_ref)]

    def tile(place):
        normal, d_scaled = _through_gelu(rows, place, x_ref, d_out_ref, *vectors)
        return d_scaled * normal, d_scaled

    rows.add_up(tile, sums_ref, pl.program_id(1), sums_ref.shape[1])


def sums(
    x: Float[Array, "g r c"], d_out: Float[Array, "g r c"], mean: Float[Array, "g c"], inverse: Float[Array, "g c"],
    scale: Float[Array, "g c"], bias: Float[Array, "g c"],
) -> Float[Array, "g 2 c"]:
    """The kernel on one device: gradients of scale and bias of each group, from that of GELU's output."""
    programs = min(max(1, SUM_PROGRAMS // len(x)), Rows(x.shape, values=SUM_VALUES).tiles)
    partial = (len(x), programs, 2, x.shape[2]), jnp.float32
    return call(_sums_kernel, "batch_norm_sums", (x, d_out, mean, inverse, scale, bias), [partial],
                grid=(len(x), programs), warps=WARPS)[0].sum(1)


def _input_gradient_kernel(x_ref, d_out_ref, mean_ref, inverse_ref, scale_ref, bias_ref, d_scale_ref, d_bias_ref,
                           d_x_ref) -> None:
    rows, tile = Rows(x_ref.shape, pl.program_id(0), VALUES), pl.program_id(1)
    vectors = _, inverse, scale, _ = [rows.vector(ref) for ref in (mean_ref, inverse_ref, scale_ref, bias_ref)]
    normal, d_scaled = _through_gelu(rows, tile, x_ref, d_out_ref, *vectors)
    d_normal = d_scaled - rows.vector(d_bias_ref) - normal * rows.vector(d_scale_ref)
    rows.store(d_x_ref, tile, inverse * scale * d_normal)


def input_gradient(
    x: Float[Array, "g r c"], d_out: Float[Array, "g r c"], mean: Float[Array, "g c"], inverse: Float[Array, "g c"],
    scale: Float[Array, "g c"], bias: Float[Array, "g c"], d_scale: Float[Array, "g c"], d_bias: Float[Array, "g c"],
) -> Float[Array, "g r c"]:
    """The kernel on one device. `d_scale` and `d_bias` are what `sums` gives, divided by how many values it sums."""
    return call(_input_gradient_kernel, "batch_norm_gradient", (x, d_out, mean, inverse, scale, bias, d_scale, d_bias),
                [(x.shape, x.dtype)], grid=(len(x), Rows(x.shape, values=VALUES).tiles), warps=WARPS)[0]


_normalise = over_batch(normalise, "g r c, g c, g c, g c -> g r c", split=("g", "r"))
_input_gradient = over_batch(
    input_gradient, "g r c, g r c, g c, g c, g c, g c, g c, g c -> g r c", split=("g", "r"))
_sums = over_batch(sums, "g r c, g r c, g c, g c, g c, g c -> g two c", split=("g", "r"))

batch_norm.defvjp(_forward, _backward)
