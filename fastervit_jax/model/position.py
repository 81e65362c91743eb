"""Position terms: small networks of token coordinates.

No parameter here has a shape that depends on the window or the image, so the same
parameters serve every window size, carrier count and resolution.

Axes: n tokens of a rows × cols grid in raster order, h heads, c channels.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

HIDDEN = 512


def relative_coordinates(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-spaced coordinates of every relative offset on a grid, and which offset each pair of tokens has.

    An offset d of a side of s tokens becomes t = 8 d / (s - 1), then sign(t) log2(|t| + 1) / 3,
    which lies in [-1.06, 1.06]; a side of one token has the coordinate 0.

    Returns:
      table: float32 ((2 rows - 1) (2 cols - 1), 2), (row, col) coordinates of the offsets.
      index: int32 (n, n), for tokens i and j the table's row for the offset i - j.
    """

    def log_spaced(side: int) -> np.ndarray:
        t = 8.0 * np.arange(1 - side, side) / max(side - 1, 1)
        return np.sign(t) * np.log2(np.abs(t) + 1.0) / 3.0

    table = np.stack(np.meshgrid(log_spaced(rows), log_spaced(cols), indexing="ij"), axis=-1)
    row, col = np.divmod(np.arange(rows * cols), cols)
    row_offset = row[:, None] - row[None, :] + rows - 1
    col_offset = col[:, None] - col[None, :] + cols - 1
    return table.reshape(-1, 2).astype(np.float32), (row_offset * (2 * cols - 1) + col_offset).astype(np.int32)


def absolute_coordinates(rows: int, cols: int) -> np.ndarray:
    """float32 (n, 2): (i - side // 2) / (side // 2) for the row and the column of each token; 0 on a side of one."""

    def centred(side: int) -> np.ndarray:
        return (np.arange(side) - side // 2) / max(side // 2, 1)

    grid = np.stack(np.meshgrid(centred(rows), centred(cols), indexing="ij"), axis=-1)
    return grid.reshape(-1, 2).astype(np.float32)


def _of_two(coordinates: Float[Array, "n 2"], kernel: Float[Array, "2 f"], *_: Any, **__: Any) -> Float[Array, "n f"]:
    """The product as two multiplications: XLA fuses them with bias and ReLU, and on GPUs they are in float32, where
    products are in TF32. What else `Dense` says (dimension numbers, precision) does not matter here."""
    return coordinates[:, :1] * kernel[:1] + coordinates[:, 1:] * kernel[1:]


class CoordinateMLP(nn.Module):
    """(row, col) → 512 → `features`, in float32: coordinates lose too much in bfloat16 and there are few of them."""

    features: int

    @nn.compact
    def __call__(self, coordinates: Float[Array, "n 2"]) -> Float[Array, "n f"]:
        normal = nn.initializers.normal(0.02)
        x = nn.relu(nn.Dense(HIDDEN, kernel_init=normal, dot_general=_of_two, name="hidden")(coordinates))
        return nn.Dense(self.features, use_bias=False, kernel_init=normal, name="out")(x)


class RelativePositionBias(nn.Module):
    """Bias of every pair of grid tokens for each head, 16 sigmoid(MLP(log-spaced offset)) (Swin v2's form).

    `leading` tokens that stand before the grid's (a window's carrier tokens) get zero rows and columns.
    """

    heads: int

    @nn.compact
    def __call__(self, rows: int, cols: int, leading: int = 0) -> Float[Array, "h n n"]:
        table, index = relative_coordinates(rows, cols)
        values = 16.0 * nn.sigmoid(CoordinateMLP(self.heads, name="mlp")(jnp.asarray(table)))
        bias = jnp.moveaxis(values[index], -1, 0)
        return jnp.pad(bias, ((0, 0), (leading, 0), (leading, 0)))


class AbsolutePosition(nn.Module):
    """Embedding of each token of a grid, MLP(centred coordinates)."""

    width: int

    @nn.compact
    def __call__(self, rows: int, cols: int) -> Float[Array, "n c"]:
        return CoordinateMLP(self.width, name="mlp")(jnp.asarray(absolute_coordinates(rows, cols)))


Network = type[AbsolutePosition | RelativePositionBias]


@functools.cache
def _shapes(kind: Network, size: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Of the parameters of a module, by path; the grid does not matter."""
    params = jax.eval_shape(lambda: kind(size, parent=None).init(jax.random.key(0), 1, 1))["params"]
    return {path: x.shape for path, x in flatten_dict(params).items()}


def of_all_blocks(
    kind: Network, size: int, networks: Sequence[Mapping[str, Any]], *grid: int
) -> Float[Array, "k ..."] | None:
    """What modules of a kind and size give for the same grid, where `networks` are the parameters of each of k.

    A GPU needs ten small kernels for a network, forward and backward: here, ten for all of them. None if parameters are
    missing, have other shapes, or are more: the modules themselves then say which, or compute the same.
    """
    if any({path: jnp.shape(x) for path, x in flatten_dict(params).items()} != _shapes(kind, size)
           for params in networks):
        return None
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *networks)
    return jax.vmap(lambda params: kind(size, parent=None).apply({"params": params}, *grid))(stacked)
