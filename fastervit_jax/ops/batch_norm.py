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
from jaxtyping import Array, Float

from fastervit_jax.ops import gelu

OVER = (1, 2, 3)
"""The axes that statistics are taken over."""


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def batch_norm(
    x: Float[Array, "g n h w c"], scale: Float[Array, "c"], bias: Float[Array, "c"], pivot: Float[Array, "c"],
    epsilon: float, activation: str, dtype: Any,
) -> tuple[Float[Array, "g n h w c"], Float[Array, "g c"], Float[Array, "g c"]]:
    """activation((x - mean) / sqrt(var + epsilon) · scale + bias) in `dtype`, and each group's mean and variance.

    All in between is float32. The variance is the biased one. `pivot` is near the mean: then E[d²] - E[d]², with
    d = x - pivot, does not cancel, and one pass over x does for both. No gradient goes through mean and variance
    that are returned, nor into `pivot`.
    """
    return _forward(x, scale, bias, pivot, epsilon, activation, dtype)[0]


def _forward(x, scale, bias, pivot, epsilon, activation, dtype):
    d = x.astype(jnp.float32) - pivot[None, None, None, None]
    d_mean = d.mean(OVER)
    mean = pivot[None] + d_mean
    var = jnp.maximum((d * d).mean(OVER) - d_mean * d_mean, 0.0)
    inverse = jax.lax.rsqrt(var + epsilon)
    normal = (x.astype(jnp.float32) - _wide(mean)) * _wide(inverse * scale[None]) + bias[None, None, None, None]
    return (activate(normal, activation, dtype), mean, var), (x, scale, bias, mean, inverse)


def _backward(epsilon, activation, dtype, residuals, gradients):
    x, scale, bias, mean, inverse = residuals
    d_out = gradients[0]
    lean = gelu.is_16_bit(x.dtype)

    def through_activation(x, d_out):
        normal = (x.astype(jnp.float32) - _wide(mean)) * _wide(inverse)
        scaled = normal * scale[None, None, None, None] + bias[None, None, None, None]
        return normal, d_out.astype(jnp.float32) * _slope(scaled, activation, dtype)

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
    count = x.size // (x.shape[0] * x.shape[-1])
    d_x = _wide(inverse * scale[None]) * (d_scaled - _wide(d_bias / count) - normal * _wide(d_scale / count))
    return d_x.astype(x.dtype), d_scale.sum(0), d_bias.sum(0), jnp.zeros_like(mean[0])


batch_norm.defvjp(_forward, _backward)
