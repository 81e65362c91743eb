"""A linear layer with GELU after it, and their gradients: an XLA form that runs anywhere, and kernels for GPUs.

Left to XLA, GELU is a pass over memory of its own, over the widest arrays of a block. In the kernels it is computed on
the product's tiles while they are in registers; so is its slope, on the product that brings the gradient.

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
from fastervit_jax.ops.kernels import call, chosen, over_batch

Weights = tuple[Float[Array, "i o"], Float[Array, "o"]]
"""The kernel and bias of a linear layer."""


class Tile(NamedTuple):
    """What a program computes, rows × columns, `depth` products at a time; how many warps do so."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def _tile(rows: int, columns: int) -> Tile:
    """Large tiles where they keep a GPU busy."""
    if pl.cdiv(rows, 128) * pl.cdiv(columns, 128) >= 128:
        return Tile(128, 128, 64, 8, 3)
    return Tile(64, 64, 64, 4, 4) if rows > 32 else Tile(32, 64, 64, 4, 4)


def mlp(
    x: Float[Array, "*b i"], hidden: Weights, out: Weights, *, drop: Callable[[Array], Array] | None = None,
    kernels: str = "auto",
) -> Float[Array, "*b o"]:
    """GELU(x · kernel + bias) · kernel + bias, in x's dtype; `hidden` and `out` are the two layers' kernel and bias.

    Args:
        drop: Applied to what GELU gives and to the result (dropout in training); only XLA's form does that.
        kernels: One of `ops.kernels.KERNELS`. Raises ValueError for "pallas" with `drop`.
    """
    (first, first_bias), (second, second_bias) = ([w.astype(x.dtype) for w in weights] for weights in (hidden, out))
    if chosen(kernels, x.dtype, "dropout" if drop else ""):
        y = _mlp(x.reshape(-1, x.shape[-1]), first, first_bias, second).reshape(*x.shape[:-1], -1)
    else:
        y = gelu.gelu(x @ first + first_bias.reshape((1,) * (x.ndim - 1) + (-1,)))
        y = (drop(y) if drop else y) @ second
    y = y + second_bias.reshape((1,) * (x.ndim - 1) + (-1,))
    return drop(y) if drop else y


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


def _forward_kernel(x_ref, kernel_ref, bias_ref, out_ref, *kept_ref, tile: Tile) -> None:
    product = _Product(*out_ref.shape, tile)
    hidden = product.product(x_ref, kernel_ref, transposed=False) + product.vector(bias_ref)
    for ref in kept_ref:
        product.store(ref, hidden)
    product.store(out_ref, gelu.value(hidden, out_ref.dtype))


def _backward_kernel(d_out_ref, kernel_ref, hidden_ref, d_hidden_ref, d_bias_ref, *, tile: Tile) -> None:
    product = _Product(*d_hidden_ref.shape, tile)
    slope = gelu.slope(product.load(hidden_ref), hidden_ref.dtype)
    d_hidden = product.product(d_out_ref, kernel_ref, transposed=True) * slope
    product.store(d_hidden_ref, d_hidden)
    place = d_bias_ref.at[pl.program_id(1), pl.ds(product.column, tile.columns)]
    plgpu.store(place, d_hidden.sum(axis=0), mask=product.columns)


def _call(kernel, name: str, inputs: tuple, outputs: list, tile: Tile) -> tuple[Array, ...]:
    rows, columns = outputs[0][0]
    grid = pl.cdiv(columns, tile.columns), pl.cdiv(rows, tile.rows)
    return tuple(call(kernel, name, inputs, outputs, grid=grid, warps=tile.warps, stages=tile.stages, tile=tile))


def linear_gelu(
    x: Float[Array, "r i"], kernel: Float[Array, "i h"], bias: Float[Array, "h"], keep: bool
) -> tuple[Float[Array, "r h"], ...]:
    """The kernel on one device: GELU(x · kernel + bias), and with `keep` what GELU is of."""
    output = (len(x), kernel.shape[1]), x.dtype
    return _call(_forward_kernel, "linear_gelu", (x, kernel, bias), [output] * (1 + keep), _tile(*output[0]))


def linear_gelu_backward(
    d_out: Float[Array, "r o"], kernel: Float[Array, "h o"], hidden: Float[Array, "r h"]
) -> tuple[Float[Array, "r h"], Float[Array, "h"]]:
    """The kernel on one device: gradients of `hidden` and of the bias in it, for GELU(hidden) · kernel."""
    tile = _tile(*hidden.shape)
    sums = (pl.cdiv(len(hidden), tile.rows), hidden.shape[1]), jnp.float32
    d_hidden, d_bias = _call(
        _backward_kernel, "linear_gelu_backward", (d_out, kernel, hidden), [(hidden.shape, hidden.dtype), sums], tile)
    return d_hidden, d_bias.sum(0)


_value = over_batch(lambda x, kernel, bias: linear_gelu(x, kernel, bias, False)[0], "b i, i h, h -> b h")
_forward = over_batch(lambda x, kernel, bias: linear_gelu(x, kernel, bias, True), "b i, i h, h -> b h, b h")
_backward = over_batch(linear_gelu_backward, "b o, h o, b h -> b h, h")


@jax.custom_vjp
def _mlp(
    x: Float[Array, "r i"], first: Float[Array, "i h"], bias: Float[Array, "h"], second: Float[Array, "h o"]
) -> Float[Array, "r o"]:
    return _value(x, first, bias) @ second


def _mlp_forward(x, first, bias, second):
    out, hidden = _forward(x, first, bias)
    return out @ second, (x, first, bias, second, out, hidden)


def _mlp_backward(residuals, d_y):
    x, first, bias, second, out, hidden = residuals
    d_hidden, d_bias = _backward(d_y, second, hidden)
    return d_hidden @ first.T, x.T @ d_hidden, d_bias.astype(bias.dtype), out.T @ d_y


_mlp.defvjp(_mlp_forward, _mlp_backward)
