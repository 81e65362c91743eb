"""MLP: linear, GELU, linear. An XLA form that runs anywhere, and kernels for GPUs where they are the faster.

Left to XLA, GELU is a pass over memory of its own, over the widest arrays of a block, and so is the sum that is the
gradient of the bias before it. In the kernels GELU is computed on the first product's tiles while they are in
registers, and that sum where GELU's gradient is.

Axes: r rows (tokens of all images), i inputs, h hidden channels, o outputs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from fastervit_jax.ops import gelu, mlp_hopper
from fastervit_jax.ops.kernels import call, chosen, flat, on_hopper, over_batch

Weights = tuple[Float[Array, "i o"], Float[Array, "o"]]
"""The kernel and bias of a linear layer."""
MOST_WIDTH = 512
"""Inputs and outputs up to which "auto" takes, in inference, one kernel for the first product and GELU. With more of
them the products are most of the time, and cuBLAS with a pass of GELU after it is as fast (docs/performance.md)."""


class Tile(NamedTuple):
    """What a program computes, rows × columns, `depth` products at a time, and with how many warps."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


SMALL, LARGE = Tile(64, 128, 32, warps=4, stages=4), Tile(128, 128, 64, warps=8, stages=3)
"""The faster of eleven, of widths up to 384 or few rows, and else."""


def linear(x: Float[Array, "*b i"], weights: Weights) -> Float[Array, "*b o"]:
    """x · kernel + bias, in x's dtype."""
    kernel, bias = (w.astype(x.dtype) for w in weights)
    return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def mlp(
    x: Float[Array, "*b i"], hidden: tuple[Float[Array, "i h"], Float[Array, "h"]],
    out: tuple[Float[Array, "h o"], Float[Array, "o"]], *, drop: Callable[[Array], Array] | None = None,
    kernels: str = "auto",
) -> Float[Array, "*b o"]:
    """GELU(x · kernel + bias) · kernel + bias, in x's dtype; `hidden` and `out` are the two layers' kernel and bias.

    Args:
        drop: Applied to what GELU gives and to the result (dropout in training); only XLA's form does that.
        kernels: One of `ops.kernels.KERNELS`. Raises ValueError for "pallas" with `drop`.
    """
    if not chosen(kernels, x.dtype, "dropout" if drop else ""):
        x = gelu.gelu(linear(x, hidden), kernels=kernels)
        return drop(linear(drop(x), out)) if drop else linear(x, out)
    (first, first_bias), (second, second_bias) = ([w.astype(x.dtype) for w in weights] for weights in (hidden, out))
    fused = kernels == "pallas" or max(x.shape[-1], second.shape[-1]) <= MOST_WIDTH
    y = _mlp(flat(x), first, first_bias, second, fused)
    return y.reshape(*x.shape[:-1], y.shape[-1]) + second_bias.reshape((1,) * (x.ndim - 1) + (-1,))


def _forward_kernel(x_ref, kernel_ref, bias_ref, out_ref, *, tile: Tile) -> None:
    depth = x_ref.shape[1]
    columns, rows = (pl.ds(pl.program_id(i) * size, size) for i, size in enumerate((tile.columns, tile.rows)))
    column_there = columns.start + jnp.arange(tile.columns) < out_ref.shape[1]
    row_there = rows.start + jnp.arange(tile.rows) < out_ref.shape[0]
    precision = jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def add(i, total):
        along = pl.ds(i * tile.depth, tile.depth)
        there = along.start + jnp.arange(tile.depth) < depth
        x = plgpu.load(x_ref.at[rows, along], mask=row_there[:, None] & there[None, :], other=0.0)
        kernel = plgpu.load(kernel_ref.at[along, columns], mask=there[:, None] & column_there[None, :], other=0.0)
        return total + jnp.dot(x, kernel, precision=precision, preferred_element_type=jnp.float32)

    hidden = jax.lax.fori_loop(
        0, pl.cdiv(depth, tile.depth), add, jnp.zeros((tile.rows, tile.columns), jnp.float32))
    hidden += plgpu.load(bias_ref.at[columns], mask=column_there, other=0.0).astype(jnp.float32)[None, :]
    out = gelu.value(hidden, out_ref.dtype, in_kernel=True).astype(out_ref.dtype)
    plgpu.store(out_ref.at[rows, columns], out, mask=row_there[:, None] & column_there[None, :])


def _hopper(x: Array, hidden: int, outputs: int) -> bool:
    """Whether a kernel for Hopper GPUs does it."""
    return gelu.is_16_bit(x.dtype) and mlp_hopper.fits(*x.shape, hidden, outputs) and on_hopper()


def forward(
    x: Float[Array, "r i"], kernel: Float[Array, "i h"], bias: Float[Array, "h"]
) -> Float[Array, "r h"]:
    """The kernel on one device: GELU(x · kernel + bias)."""
    rows, columns = len(x), kernel.shape[1]
    if _hopper(x, columns, outputs=1):
        return mlp_hopper.forward(x, kernel, bias)
    tile = LARGE if x.shape[1] > 384 and rows > 4096 else SMALL
    # Tiles of the same rows run side by side: they share cache lines.
    grid = pl.cdiv(columns, tile.columns), pl.cdiv(rows, tile.rows)
    return call(_forward_kernel, "linear_gelu", (x, kernel, bias), [((rows, columns), x.dtype)], grid=grid,
                warps=tile.warps, stages=tile.stages, tile=tile)[0]


def forward_with_hidden(
    x: Float[Array, "r i"], kernel: Float[Array, "i h"], bias: Float[Array, "h"]
) -> tuple[Float[Array, "r h"], Float[Array, "r h"]]:
    """On one device, what GELU gets, which the gradient needs, and what it gives."""
    if _hopper(x, kernel.shape[1], outputs=2):
        return mlp_hopper.forward_with_hidden(x, kernel, bias)
    hidden = linear(x, (kernel, bias))  # if it wrote this, too, the kernel above would be no faster
    return hidden, gelu.forward(hidden)


_forward = over_batch(forward, "b i, i h, h -> b h")
_forward_with_hidden = over_batch(forward_with_hidden, "b i, i h, h -> b h, b h")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _mlp(
    x: Float[Array, "r i"], first: Float[Array, "i h"], bias: Float[Array, "h"], second: Float[Array, "h o"],
    fused: bool,
) -> Float[Array, "r o"]:
    """Without the last bias. `fused`: in inference with one kernel for the first product and GELU."""
    return (_forward(x, first, bias) if fused else gelu.by_kernel(linear(x, (first, bias)))) @ second


def _mlp_forward(x, first, bias, second, fused):
    hidden, out = _forward_with_hidden(x, first, bias)
    return out @ second, (x, first, second, out, hidden)


def _mlp_backward(fused, residuals, d_y):
    x, first, second, out, hidden = residuals
    d_hidden, d_bias = gelu.gradient_by_kernel(hidden, d_y @ second.T)
    return d_hidden @ first.T, x.T @ d_hidden, d_bias.astype(hidden.dtype), out.T @ d_y


_mlp.defvjp(_mlp_forward, _mlp_backward)
