"""GELU, x Φ(x) with the normal distribution's Φ (the exact one, not tanh's): an XLA form, and a kernel
a direction for GPUs.

Axes: r rows (tokens or pixels of all images), c channels.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from fastervit_jax.ops.kernels import Rows, call, chosen, flat, over_batch

# log2 Φ(-t) as a polynomial of t, fitted in the maximum norm of t Φ(-t) on [0, 5] and on [0, 6]. With the first GELU is
# within 5e-6, its slope within 2e-5, and what is left of GELU below 0, down to -5, within 0.2 %: 16-bit numbers round
# more away. With the second both are as exact as float32. Both polynomials fall beyond, as they should.
LOG2_TAIL_16 = (-1.0000251489515501, -1.1504898199286606, -0.4613474956679154, -0.050150207868055595,
                0.0063233137866388995, -0.0003625304721497769)
LOG2_TAIL_32 = (-0.9999999768561342, -1.1511055702089625, -0.4592094149848348, -0.052475559405990725,
                0.006996744631860841, -4.0093678041376074e-05, -0.00026055778718998737, 7.091944482088145e-05,
                -1.000856087697878e-05, 7.677741993572462e-07, -2.518989342489406e-08)
BEYOND = 16.0
"""There, Φ(-t) is 0 in float32."""
BLOCK, WARPS = 1024, 4
"""Values that a program of the forward kernel computes, and with how many warps."""
SUM_PROGRAMS, SUM_VALUES, SUM_WIDTH, SUM_WARPS = 1056, 2048, 256, 8
"""At most so many programs of the backward kernel share an array, of which each holds so many values at a time, of so
many channels, with so many warps."""


def is_16_bit(dtype: Any) -> bool:
    return jnp.dtype(dtype).itemsize == 2


def _horner(coefficients: Sequence[float], t: Array) -> Array:
    return functools.reduce(lambda total, coefficient: total * t + coefficient, reversed(coefficients))


def _tail(x: Float[Array, "*b"], dtype: Any) -> tuple[Array, Array, Sequence[float]]:
    """t = |x|, Φ(-t), and the polynomial that gives its logarithm."""
    t = jnp.abs(x)
    t = jnp.where(t > BEYOND, BEYOND, t)  # a kernel's minimum would be BEYOND for NaN
    polynomial = LOG2_TAIL_16 if is_16_bit(dtype) else LOG2_TAIL_32
    return t, jnp.exp2(_horner(polynomial, t)), polynomial


def value(x: Float[Array, "*b"], dtype: Any, in_kernel: bool = False) -> Float[Array, "*b"]:
    """GELU of float32 numbers, as exact as results of `dtype` need, in float32.

    16-bit results take a fraction of the time that erf does, with which reading and writing an array takes less than
    computing it. Kernels have no erf.
    """
    if not in_kernel and not is_16_bit(dtype):
        return jax.nn.gelu(x, approximate=False)
    t, tail, _ = _tail(x, dtype)
    return jnp.maximum(x, 0.0) - t * tail  # x < 0: x Φ(x) = -t Φ(-t); x > 0: x Φ(x) = x - t Φ(-t)


def slope(x: Float[Array, "*b"], dtype: Any, in_kernel: bool = False) -> Float[Array, "*b"]:
    """The derivative of `value`."""
    if not in_kernel and not is_16_bit(dtype):
        density = math.sqrt(0.5 / math.pi) * jnp.exp(-0.5 * x * x)
        return 0.5 * (1 + jax.lax.erf(math.sqrt(0.5) * x)) + x * density
    t, tail, polynomial = _tail(x, dtype)
    exponent = [math.log(2) * i * coefficient for i, coefficient in enumerate(polynomial)][1:]
    negative = tail * (1 + t * _horner(exponent, t))  # of t Φ(-t)
    return jnp.where(x < 0, negative, 1 - negative)


def gelu(x: Float[Array, "*b c"], *, kernels: str = "auto") -> Float[Array, "*b c"]:
    """x Φ(x), in x's dtype. The gradient of 16-bit numbers is computed from x again.

    `kernels`: one of `ops.kernels.KERNELS`.
    """
    if chosen(kernels, x.dtype, ""):
        return _gelu(x, True)
    return _gelu(x, False) if is_16_bit(x.dtype) else value(x, x.dtype)


def _forward_kernel(x_ref, out_ref) -> None:
    size, first = x_ref.shape[0], pl.program_id(0) * BLOCK
    place = pl.ds(first, BLOCK)
    masked = {} if size % BLOCK == 0 else {"mask": first + jnp.arange(BLOCK) < size}
    x = plgpu.load(x_ref.at[place], **masked, **({"other": 0.0} if masked else {}))
    plgpu.store(out_ref.at[place], value(x.astype(jnp.float32), x.dtype, in_kernel=True).astype(x.dtype), **masked)


def forward(x: Float[Array, "r c"]) -> Float[Array, "r c"]:
    """The kernel on one device."""
    out, = call(_forward_kernel, "gelu", [x.reshape(-1)], [((x.size,), x.dtype)], grid=(pl.cdiv(x.size, BLOCK),),
                warps=WARPS)
    return out.reshape(x.shape)


def _backward_kernel(x_ref, d_out_ref, d_x_ref, sums_ref) -> None:
    rows = Rows(x_ref.shape, None, SUM_VALUES, SUM_WIDTH, pl.program_id(0))

    def tile(place):
        d_x = rows.load(d_out_ref, place) * slope(rows.load(x_ref, place), d_x_ref.dtype, in_kernel=True)
        rows.store(d_x_ref, place, d_x)
        return (d_x,)

    rows.add_up(tile, sums_ref, pl.program_id(1), sums_ref.shape[0])


def backward(x: Float[Array, "r c"], d_out: Float[Array, "r c"]) -> tuple[Float[Array, "r c"], Float[Array, "c"]]:
    """The gradient's kernel on one device: that of x, and its sum over rows, float32 (a bias's in x)."""
    rows, blocks = Rows(x.shape, None, SUM_VALUES, SUM_WIDTH), pl.cdiv(x.shape[1], SUM_WIDTH)
    programs = min(max(1, SUM_PROGRAMS // max(1, blocks)), rows.tiles)
    d_x, sums = call(
        _backward_kernel, "gelu_backward", (x, d_out), [(x.shape, x.dtype), ((programs, 1, x.shape[1]), jnp.float32)],
        grid=(blocks, programs), warps=SUM_WARPS)
    return d_x, sums.sum((0, 1))


by_kernel = over_batch(forward, "b c -> b c")
gradient_by_kernel = over_batch(backward, "b c, b c -> b c, c")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gelu(x: Float[Array, "*b c"], kernel: bool) -> Float[Array, "*b c"]:
    if kernel:
        return by_kernel(flat(x)).reshape(x.shape)
    return value(x.astype(jnp.float32), x.dtype).astype(x.dtype)


def _forward(x, kernel):
    return _gelu(x, kernel), x


def _backward(kernel, x, d_out):
    if kernel:
        return (gradient_by_kernel(flat(x), flat(d_out))[0].reshape(x.shape),)
    # Behind the barrier, XLA does not find what the forward pass has computed, and so does not keep it in float32.
    x, d_out = jax.lax.optimization_barrier((x, d_out))
    return ((d_out.astype(jnp.float32) * slope(x.astype(jnp.float32), x.dtype)).astype(x.dtype),)


_gelu.defvjp(_forward, _backward)
