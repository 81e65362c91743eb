"""MLP: linear, GELU, linear. An XLA form that runs anywhere, and kernels for GPUs where they are the faster.

Left to XLA, GELU is a pass over memory of its own, over the widest arrays of a block. In the kernels it is computed on
the first product's tiles while they are in registers; so is its slope, on the product that brings the gradient.

Axes: r rows (tokens of all images), i inputs, h hidden channels, o outputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from fastervit_jax.ops import gelu
from fastervit_jax.ops.kernels import call, chosen, flat, over_batch

Weights = tuple[Float[Array, "i o"], Float[Array, "o"]]
"""The kernel and bias of a linear layer."""
MOST_WIDTH = 512
"""Inputs and outputs up to which "auto" takes the kernels. With more of them the products are most of the time, and
cuBLAS with a pass of GELU after it is as fast (docs/performance.md)."""


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
    width = max(x.shape[-1], out[0].shape[-1])
    if not chosen(kernels, x.dtype, "dropout" if drop else "") or (kernels == "auto" and width > MOST_WIDTH):
        x = gelu.gelu(linear(x, hidden), kernels=kernels)
        return drop(linear(drop(x), out)) if drop else linear(x, out)
    (first, first_bias), (second, second_bias) = ([w.astype(x.dtype) for w in weights] for weights in (hidden, out))
    y = _mlp(flat(x), first, first_bias, second)
    return y.reshape(*x.shape[:-1], y.shape[-1]) + second_bias.reshape((1,) * (x.ndim - 1) + (-1,))


class _Product:
    """A program's tile of left · right, and where it lies."""

    def __init__(self, rows: int, columns: int, tile: Tile):
        self.tile = tile
        self.column, self.row = pl.program_id(0) * tile.columns, pl.program_id(1) * tile.rows
        self.rows = self.row + jnp.arange(tile.rows) < rows
        self.columns = self.column + jnp.arange(tile.columns) < columns
        self.there = self.rows[:, None] & self.columns[None, :]

    def place(self, ref):
        return ref.at[pl.ds(self.row, self.tile.rows), pl.ds(self.column, self.tile.columns)]

    def load(self, ref) -> Array:
        return plgpu.load(self.place(ref), mask=self.there, other=0.0).astype(jnp.float32)

    def store(self, ref, value) -> None:
        plgpu.store(self.place(ref), value.astype(ref.dtype), mask=self.there)

    def vector(self, ref) -> Array:
        place = ref.at[pl.ds(self.column, self.tile.columns)]
        return plgpu.load(place, mask=self.columns, other=0.0).astype(jnp.float32)[None, :]

    def product(self, left_ref, right_ref, transposed: bool) -> Array:
        """In float32. `transposed`: right is (columns, depth)."""
        depth, tile = left_ref.shape[1], self.tile
        precision = jax.lax.Precision.HIGHEST if left_ref.dtype == jnp.float32 else None

        def add(i, total):
            along = pl.ds(i * tile.depth, tile.depth)
            there = i * tile.depth + jnp.arange(tile.depth) < depth
            left = plgpu.load(left_ref.at[pl.ds(self.row, tile.rows), along],
                              mask=self.rows[:, None] & there[None, :], other=0.0)
            columns = pl.ds(self.column, tile.columns)
            if transposed:
                place, mask = right_ref.at[columns, along], self.columns[:, None] & there[None, :]
            else:
                place, mask = right_ref.at[along, columns], there[:, None] & self.columns[None, :]
            right = plgpu.load(place, mask=mask, other=0.0)
            return total + jax.lax.dot_general(
                left, right, (((1,), (int(transposed),)), ((), ())), precision=precision,
                preferred_element_type=jnp.float32)

        return jax.lax.fori_loop(
            0, pl.cdiv(depth, tile.depth), add, jnp.zeros((tile.rows, tile.columns), jnp.float32))


def _forward_kernel(x_ref, kernel_ref, bias_ref, out_ref, *, tile: Tile) -> None:
    product = _Product(*out_ref.shape, tile)
    hidden = product.product(x_ref, kernel_ref, transposed=False) + product.vector(bias_ref)
    product.store(out_ref, gelu.value(hidden, out_ref.dtype, in_kernel=True))


def _backward_kernel(d_out_ref, kernel_ref, hidden_ref, d_hidden_ref, d_bias_ref, *, tile: Tile) -> None:
    product = _Product(*d_hidden_ref.shape, tile)
    slope = gelu.slope(product.load(hidden_ref), hidden_ref.dtype, in_kernel=True)
    d_hidden = product.product(d_out_ref, kernel_ref, transposed=True) * slope
    product.store(d_hidden_ref, d_hidden)
    place = d_bias_ref.at[pl.program_id(1), pl.ds(product.column, tile.columns)]
    plgpu.store(place, d_hidden.sum(axis=0), mask=product.columns)


def _grid(rows: int, columns: int, tile: Tile) -> tuple[int, int]:
    """Tiles of the same rows run side by side: they share cache lines."""
    return pl.cdiv(columns, tile.columns), pl.cdiv(rows, tile.rows)


def forward(
    x: Float[Array, "r i"], kernel: Float[Array, "i h"], bias: Float[Array, "h"]
) -> Float[Array, "r h"]:
    """The kernel on one device: GELU(x · kernel + bias)."""
    shape = len(x), kernel.shape[1]
    tile = LARGE if x.shape[1] > 384 and len(x) > 4096 else SMALL
    return call(_forward_kernel, "linear_gelu", (x, kernel, bias), [(shape, x.dtype)], grid=_grid(*shape, tile),
                warps=tile.warps, stages=tile.stages, tile=tile)[0]


def backward(
    d_out: Float[Array, "r o"], kernel: Float[Array, "h o"], hidden: Float[Array, "r h"]
) -> tuple[Float[Array, "r h"], Float[Array, "h"]]:
    """The kernel on one device: gradients of `hidden` and of the bias in it, for GELU(hidden) · kernel."""
    tile, grid = SMALL, _grid(*hidden.shape, SMALL)
    d_hidden, d_bias = call(
        _backward_kernel, "linear_gelu_backward", (d_out, kernel, hidden),
        [(hidden.shape, hidden.dtype), ((grid[1], hidden.shape[1]), jnp.float32)], grid=grid, warps=tile.warps,
        stages=tile.stages, tile=tile)
    return d_hidden, d_bias.sum(0)


_forward = over_batch(forward, "b i, i h, h -> b h")
_backward = over_batch(backward, "b o, h o, b h -> b h, h")


@jax.custom_vjp
def _mlp(
    x: Float[Array, "r i"], first: Float[Array, "i h"], bias: Float[Array, "h"], second: Float[Array, "h o"]
) -> Float[Array, "r o"]:
    return _forward(x, first, bias) @ second


def _mlp_forward(x, first, bias, second):
    hidden = linear(x, (first, bias))  # the gradient needs it: writing it as well, the kernel would be no faster
    out = gelu.gelu(hidden, kernels="pallas")
    return out @ second, (x, first, bias, second, out, hidden)


def _mlp_backward(residuals, d_y):
    x, first, bias, second, out, hidden = residuals
    d_hidden, d_bias = _backward(d_y, second, hidden)
    return d_hidden @ first.T, x.T @ d_hidden, d_bias.astype(bias.dtype), out.T @ d_y


_mlp.defvjp(_mlp_forward, _mlp_backward)
