"""GELU, x Φ(x) with the normal distribution's Φ (the exact one, not tanh's)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# erf(x / sqrt(2)) = x P(x²) on [-END, END], within 2.6e-5: fitted there in the maximum norm. At END it is just over 1.
END = 4.25
ERF = (0.7978046536445618, -0.1326889842748642, 0.019631939008831978, -0.0022171202581375837, 0.00018683704547584057,
       -1.1252811418671627e-05, 4.510825419856701e-07, -1.0655405446868826e-08, 1.1129556304334542e-10)


def erf_sqrt2(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """erf(x / sqrt(2)) within 3e-5, in multiplications and additions only: float32 in and out."""
    x = jnp.clip(x, -END, END)
    square, p = x * x, jnp.full_like(x, ERF[-1])
    for coefficient in ERF[-2::-1]:
        p = p * square + coefficient
    return jnp.clip(x * p, -1.0, 1.0)


def is_16_bit(dtype: Any) -> bool:
    return jnp.dtype(dtype).itemsize == 2


def value(x: Float[Array, "*b"], dtype: Any) -> Float[Array, "*b"]:
    """GELU of float32 numbers, as exact as results of `dtype` need, in float32."""
    return 0.5 * x * (1 + erf_sqrt2(x)) if is_16_bit(dtype) else jax.nn.gelu(x, approximate=False)


def slope(x: Float[Array, "*b"], dtype: Any) -> Float[Array, "*b"]:
    """The derivative of `value`."""
    erf = erf_sqrt2(x) if is_16_bit(dtype) else jax.lax.erf(math.sqrt(0.5) * x)
    return 0.5 * (1 + erf) + math.sqrt(0.5 / math.pi) * x * jnp.exp(-0.5 * x * x)


def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """x Φ(x), in x's dtype.

    16-bit numbers go through `erf_sqrt2`: what it is off is less than they round away but where GELU is next to 0, and
    it costs a fraction of erf, which otherwise takes longer than reading and writing the array. Their gradient is
    computed from x again. float32 goes through erf as the platform has it.
    """
    return _gelu(x) if is_16_bit(x.dtype) else value(x, x.dtype)


@jax.custom_vjp
def _gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return value(x.astype(jnp.float32), x.dtype).astype(x.dtype)


def _forward(x):
    return _gelu(x), x


def _backward(x, d_out):
    # Behind the barrier, XLA does not find what the forward pass has computed, and so does not keep it in float32.
    x, d_out = jax.lax.optimization_barrier((x, d_out))
    return ((d_out.astype(jnp.float32) * slope(x.astype(jnp.float32), x.dtype)).astype(x.dtype),)


_gelu.defvjp(_forward, _backward)
