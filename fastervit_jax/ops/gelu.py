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


def erf_sqrt2_by_exp(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """erf(x / sqrt(2)) within 3e-7, for kernels of float32, which have no erf (Abramowitz and Stegun, 7.1.26)."""
    z = math.sqrt(0.5) * jnp.abs(x)
    t, p = 1 / (1 + 0.3275911 * z), 0.0
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = (p + coefficient) * t
    return jnp.sign(x) * (1 - p * jnp.exp(-z * z))


def is_16_bit(dtype: Any) -> bool:
    return jnp.dtype(dtype).itemsize == 2


def value(x: Float[Array, "*b"], dtype: Any, in_kernel: bool = False) -> Float[Array, "*b"]:
    """GELU of float32 numbers, as exact as results of `dtype` need, in float32."""
    if in_kernel or is_16_bit(dtype):
        return 0.5 * x * (1 + _erf_sqrt2(x, dtype, in_kernel))
    return jax.nn.gelu(x, approximate=False)


def slope(x: Float[Array, "*b"], dtype: Any, in_kernel: bool = False) -> Float[Array, "*b"]:
    """The derivative of `value`."""
    density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)
    return 0.5 * (1 + _erf_sqrt2(x, dtype, in_kernel)) + x * density


def _erf_sqrt2(x: Array, dtype: Any, in_kernel: bool) -> Array:
    if is_16_bit(dtype):
        return erf_sqrt2(x)
    return erf_sqrt2_by_exp(x) if in_kernel else jax.lax.erf(math.sqrt(0.5) * x)


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
