"""Where a FasterViT looks: attention rollout through windows and carrier tokens, and Grad-CAM, as arrays.

Attention rollout (Abnar & Zuidema, Quantifying Attention Flow in Transformers, ACL 2020, arXiv 2005.00928) takes an
attention and the residual connection around it as the matrix (Ā + I) / 2, where Ā is the attention averaged over its
heads, and layers that follow each other as the product of their matrices. Values, MLPs, norms and layer scale are
left out. What is particular to hierarchical attention is in `stage_matrices`.

Axes: b images, h heads, n windows (row by row), t tokens of a window with its carrier tokens before them, m cells of a
stage's map, row by row (raster order), k carrier tokens of an image in raster order of their own grid. All matrices
have what is computed in rows and what it is computed from in columns.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.hat import average_pool, upsample_nearest
from fastervit_jax.model.variants import ModelConfig

Images = Float[Array, "b high wide c"] | Float[np.ndarray, "b high wide c"]
Weights = Float[Array, "_ h _ _"] | Float[np.ndarray, "_ h _ _"]
StageAttention = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""A stage's part of what `model.apply(..., mutable=["attention"])` captures: block → kind → "weights" → array."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a stage cuts its map: `height` × `width` cells into `rows` × `cols` windows of `window` × `window`.

    `ct_size` is the side of a window's carrier tokens, 0 where there are none. The map is padded at the right and the
    bottom to `high` × `wide` cells, which the windows fill.
    """

    height: int
    width: int
    window: int
    ct_size: int

    @property
    def rows(self) -> int:
        return -(-self.height // self.window)

    @property
    def cols(self) -> int:
        return -(-self.width // self.window)

    @property
    def high(self) -> int:
        return self.rows * self.window

    @property
    def wide(self) -> int:
        return self.cols * self.window

    def real(self) -> Int[np.ndarray, "m"]:
        """Which cells of the padded map, in raster order, are the map's."""
        return np.arange(self.high * self.wide).reshape(self.high, self.wide)[: self.height, : self.width].reshape(-1)

    def window_cells(self) -> Int[np.ndarray, "n cells"]:
        """For each window the cells of the padded map that are its tokens."""
        cells = np.arange(self.high * self.wide)
        return rearrange(cells, "(i p j q) -> (i j) (p q)", i=self.rows, p=self.window, q=self.window)

    def window_carriers(self) -> Int[np.ndarray, "n carriers"]:
        """For each window its carrier tokens, by their place in the raster order of all of them."""
        side = self.ct_size
        return rearrange(np.arange(self.rows * self.cols * side**2), "(i p j q) -> (i j) (p q)", i=self.rows, p=side,
                         q=side)


def make_grid(config: ModelConfig, stage: int, height: int, width: int) -> Grid:
    """The grid of stage 2 or 3 for images of `height` × `width` pixels. Raises ValueError for another stage."""
    if stage not in (2, 3):
        raise ValueError(f"stage={stage!r}: expected 2 or 3, the stages that have attention")
    stride = 4 * 2**stage
    grid = Grid(-(-height // stride), -(-width // stride), config.window_size[stage], 0)
    several = grid.rows * grid.cols > 1
    return dataclasses.replace(grid, ct_size=config.ct_size) if config.hat[stage] and several else grid


def pool_matrix(grid: Grid) -> Float[np.ndarray, "k m"]:
    """First carrier tokens from the map: a carrier is the average of the cells under its patch of the pooling.

    The depthwise 3×3 convolution before the pooling is left out. Cells that are padding have no column, so that the
    rows of patches which reach into it sum to less than 1.
    """
    cells = grid.high * grid.wide
    one_hot = np.eye(cells, dtype=np.float32).reshape(cells, grid.high, grid.wide, 1)
    pooled = np.asarray(average_pool(jnp.asarray(one_hot), grid.window, grid.ct_size), np.float64)
    return pooled.reshape(cells, -1).T[:, grid.real()]


def downsample_matrix(height: int, width: int) -> Float[np.ndarray, "m cells"]:
    """From a stage's map of height × width to the next one's, which halves it: averages of 3×3 cells with stride 2.

    Weights of the convolution are left out, and so are cells beyond the border.
    """
    sides = []
    for side in (height, width):
        distance = np.abs(2 * np.arange(-(-side // 2))[:, None] - np.arange(side)[None, :])
        seen = (distance <= 1).astype(np.float64)
        sides.append(seen / seen.sum(1, keepdims=True))
    return np.kron(*sides)


def with_residual(weights: Weights, head: int | None = None) -> Float[np.ndarray, "_ t t"]:
    """(Ā + I) / 2, in float64: Ā is the average over the heads, or one head's attention.

    Raises ValueError if there is no such head.
    """
    heads = weights.shape[1]
    if head is not None and not 0 <= head < heads:
        raise ValueError(f"head {head}: expected one of 0 to {heads - 1}")
    mean = np.asarray(weights if head is None else weights[:, head : head + 1], np.float64).mean(1)
    return (mean + np.eye(mean.shape[-1])[None]) / 2


def stage_matrices(
    attention: StageAttention, grid: Grid, *, propagate: bool, head: int | None = None
) -> Iterator[Float[np.ndarray, "b m m"]]:
    """Rollout of a stage: after each of its blocks the matrix from the stage's first map to the map there.

    With X the map's cells and C the carrier tokens, both as rows of weights of the first map's cells, a stage begins at
    X = I and C = `pool_matrix`. In each block

        C ← (Ā_c + I) / 2 · C                        carrier tokens attend over the image,
        [C_w; X_w] ← (Ā_w + I) / 2 · [C_w; X_w]      then each window w with its own,

    and at the end of the last one, with `propagate`, X ← (X + U C) / 2, where U gives each cell the carrier token that
    is added to it: the two are taken half and half, as an attention and its residual are. Without carrier tokens
    only windows attend, and what lies in another one stays at 0.

    Cells of padding are tokens like others, but begin at 0: nothing of the image is in them. What rows lose in
    that way is left out at the end, and each row is divided by its sum, so that it sums to 1.

    attention: captured["attention"]["stages_2"], or of stage 3. propagate: the config's `do_propagation`. head: take
    one head's attention, not the average.
    """
    cells, real = grid.window_cells(), grid.real()
    names = sorted(attention, key=lambda name: int(name.removeprefix("blocks_")))
    batch = attention[names[0]]["attention"]["weights"].shape[0] // len(cells)
    x = np.zeros((batch, grid.high * grid.wide, len(real)))
    x[:, real, np.arange(len(real))] = 1
    if grid.ct_size:
        carriers = np.repeat(pool_matrix(grid)[None], batch, axis=0)
        own = grid.window_carriers()
        order = jnp.arange(grid.ct_size**2, dtype=jnp.float32).reshape(1, 1, -1, 1)
        near = np.asarray(upsample_nearest(order, grid.ct_size, grid.window), int).reshape(-1)
    for name in names:
        block = attention[name]
        z = x[:, cells]
        if grid.ct_size:
            carriers = with_residual(block["carrier_attention"]["weights"], head) @ carriers
            z = np.concatenate([carriers[:, own], z], axis=2)
        within = rearrange(with_residual(block["attention"]["weights"], head), "(b n) t s -> b n t s", b=batch)
        z = within @ z
        x[:, cells] = z[:, :, grid.ct_size**2 :]
        if grid.ct_size:
            carriers[:, own] = z[:, :, : grid.ct_size**2]
            if propagate and name == names[-1]:
                x[:, cells] = (x[:, cells] + z[:, :, near]) / 2
        yield x[:, real] / x[:, real].sum(-1, keepdims=True)


def stage_matrix(
    attention: StageAttention, grid: Grid, *, propagate: bool, head: int | None = None
) -> Float[np.ndarray, "b m m"]:
    """The whole stage as one matrix over its map, whose rows sum to 1: the last of `stage_matrices`."""
    *_, matrix = stage_matrices(attention, grid, propagate=propagate, head=head)
    return matrix


def window_maps(
    weights: Weights, grid: Grid, rows: Float[np.ndarray, "b m"]
) -> tuple[Float[np.ndarray, "b h high wide"], Float[np.ndarray, "b h"]]:
    """What the cells, weighted by `rows` (of sum 1), take from the cells of their windows, head by head, in float64.

    With one cell of weight 1, its row of the window attention. Returns the weights of the cells, 0 in windows of which
    none is asked, and what of the sum of 1 goes to carrier tokens. The rest, if any, goes to padding.
    """
    cells, real, leading = grid.window_cells(), grid.real(), grid.ct_size**2
    asked = np.zeros((len(rows), grid.high * grid.wide))
    asked[:, real] = rows
    weights = rearrange(np.asarray(weights, np.float64), "(b n) h t s -> b n h t s", n=len(cells))
    taken = np.einsum("bnt,bnhts->bhns", asked[:, cells], weights[:, :, :, leading:])
    maps = np.zeros((*taken.shape[:2], grid.high * grid.wide))
    maps[:, :, cells] = taken[..., leading:]
    maps = maps[:, :, real].reshape(*maps.shape[:2], grid.height, grid.width)
    return maps, taken[..., :leading].sum((2, 3))


def carrier_maps(
    weights: Weights, grid: Grid, rows: Float[np.ndarray, "b m"]
) -> Float[np.ndarray, "b h high wide"]:
    """What the carrier tokens of the cells' windows take from all carrier tokens of the image, head by head, float64.

    A window has the weight of its cells in `rows` (of sum 1), its carrier tokens equal parts of it. The result is on
    the grid of carrier tokens and sums to 1.

    Raises ValueError for a grid without carrier tokens.
    """
    if not grid.ct_size:
        raise ValueError(f"a map of {grid.height} × {grid.width} cells in {grid.rows} × {grid.cols} windows without "
                         "carrier tokens: expected a stage that has hat=True, and several windows")
    asked = np.zeros((len(rows), grid.high * grid.wide))
    asked[:, grid.real()] = rows
    own = grid.window_carriers()
    parts = np.zeros((len(rows), own.size))
    parts[:, own] = asked[:, grid.window_cells()].sum(2, keepdims=True) / grid.ct_size**2
    taken = np.einsum("bt,bhts->bhs", parts, np.asarray(weights, np.float64))
    return taken.reshape(*taken.shape[:2], grid.rows * grid.ct_size, grid.cols * grid.ct_size)


# With a model


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: FasterViT, variables: Mapping[str, Any], images: Images) -> tuple[Array, Mapping[str, Any]]:
    return model.apply(variables, images, mutable=["attention"])


def capture(
    model: FasterViT, variables: Mapping[str, Any], images: Images
) -> tuple[Float[np.ndarray, "b classes"], dict[int, StageAttention]]:
    """Logits, and what each attention of stages 2 and 3 weighs: stage → "blocks_0" → kind → "weights" → array.

    The kinds are "attention", (b n, h, t, t), and where there are carrier tokens "carrier_attention", (b, h, k, k).
    """
    logits, captured = _apply(model, variables, images)
    captured = jax.device_get(captured["attention"])
    return np.asarray(logits), {stage: captured[f"stages_{stage}"] for stage in (2, 3)}


def _matrix(attention: Mapping[int, StageAttention], config: ModelConfig, grid: Grid, stage: int) -> np.ndarray:
    return stage_matrix(attention[stage], grid, propagate=config.do_propagation)


def back_to_stage_2(
    attention: Mapping[int, StageAttention], config: ModelConfig, images_shape: tuple[int, ...],
    rows: Float[np.ndarray, "b m"], stage: int,
) -> Float[np.ndarray, "b cells"]:
    """Weights of a stage's last map, as weights of the map that comes into stage 2. Sums stay.

    rows · M_2 for stage 2; for stage 3 rows · M_3 · D · M_2, with `stage_matrix` and `downsample_matrix`.
    """
    grids = {i: make_grid(config, i, *images_shape[1:3]) for i in (2, 3)}
    rows = rows[:, None]
    if stage == 3:
        rows = rows @ _matrix(attention, config, grids[3], 3) @ downsample_matrix(grids[2].height, grids[2].width)[None]
    return (rows @ _matrix(attention, config, grids[2], 2))[:, 0]


def class_rows(grid: Grid, batch: int) -> Float[np.ndarray, "b m"]:
    """The weights that the head gives to the cells of the last map: all the same, for it averages them."""
    cells = grid.height * grid.width
    return np.full((batch, cells), 1 / cells)


def query_rows(
    grid: Grid, stage: int, images_shape: tuple[int, ...], x: int | Int[np.ndarray, "b"], y: int | Int[np.ndarray, "b"]
) -> Float[np.ndarray, "b m"]:
    """Weight 1 for the cell of a stage's map that has the pixel (x, y), in each image's own place or in the same one.

    Raises ValueError for a pixel outside the images.
    """
    batch, height, width = images_shape[:3]
    x, y = np.broadcast_to(x, (batch,)), np.broadcast_to(y, (batch,))
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    if outside.any():
        i = int(outside.argmax())
        raise ValueError(f"query x={x[i]}, y={y[i]}: outside the image of {width} × {height} pixels; expected x from 0 "
                         f"to {width - 1} and y from 0 to {height - 1}")
    stride = 4 * 2**stage
    rows = np.zeros((batch, grid.height * grid.width))
    rows[np.arange(batch), y // stride * grid.width + x // stride] = 1
    return rows


def class_map(
    model: FasterViT, variables: Mapping[str, Any], images: Images
) -> Float[np.ndarray, "b height width"]:
    """Rollout from the head to the map that comes into stage 2: cells of 16 pixels, float64, of sum 1 for each image.

    The average of M_3's rows, times D, times M_2 (see `back_to_stage_2`). It is the same for all classes, as the head
    sees nothing but the average of the last map; `grad_cam` is another for each.
    """
    _, attention = capture(model, variables, images)
    grids = {stage: make_grid(model.config, stage, *images.shape[1:3]) for stage in (2, 3)}
    seen = back_to_stage_2(attention, model.config, images.shape, class_rows(grids[3], len(images)), 3)
    return seen.reshape(len(images), grids[2].height, grids[2].width)


def query_map(
    model: FasterViT, variables: Mapping[str, Any], images: Images, x: int | Int[np.ndarray, "b"],
    y: int | Int[np.ndarray, "b"], *, stage: int = 2,
) -> Float[np.ndarray, "b height width"]:
    """Rollout from the cell of a stage that has the pixel (x, y) to the map that comes into stage 2.

    x counts columns, y rows, of the images as they are given; the same for all of them, or one each. The result is
    float64, in cells of 16 pixels, and sums to 1 for each image.

    Raises ValueError for a pixel outside the images, or a stage other than 2 and 3.
    """
    grid = make_grid(model.config, stage, *images.shape[1:3])
    rows = query_rows(grid, stage, images.shape, x, y)
    _, attention = capture(model, variables, images)
    seen = back_to_stage_2(attention, model.config, images.shape, rows, stage)
    first = make_grid(model.config, 2, *images.shape[1:3])
    return seen.reshape(len(images), first.height, first.width)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _gradient(
    model: FasterViT, variables: Mapping[str, Any], images: Images, classes: Int[Array, "b"] | None, stage: int
) -> tuple[Array, Array]:
    """A stage's map, and the gradient of each image's logit with respect to it."""

    def logit(x: Array) -> Array:
        logits = model.apply(variables, x, stage, method="from_stage")
        chosen = logits.argmax(-1) if classes is None else classes
        return jnp.take_along_axis(logits, chosen[:, None], axis=-1).sum()

    x = model.apply(variables, images, method="features")[stage]
    return x, jax.grad(logit)(x)


def grad_cam(
    model: FasterViT, variables: Mapping[str, Any], images: Images, classes: int | Int[np.ndarray, "b"] | None = None,
    *, stage: int = 3,
) -> Float[np.ndarray, "b height width"]:
    """Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391, equations 1 and 2) on a stage's map, 0 to 3, float32.

    ReLU(Σ_c α_c X_c), where X is the map as `features` gives it, and α_c the gradient of the class's logit with
    respect to channel c, averaged over the cells. classes: one for all images, or one each; None: the predicted ones.

    Raises ValueError for a class or stage that the model does not have, or a model without a head.
    """
    count = model.config.num_classes
    if not count:
        raise ValueError("num_classes=0: Grad-CAM needs a model with a head")
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage={stage!r}: expected 0, 1, 2 or 3")
    if classes is not None:
        classes = np.broadcast_to(classes, (len(images),))
        if classes.min() < 0 or classes.max() >= count:
            raise ValueError(f"class {classes.min() if classes.min() < 0 else classes.max()}: expected one of 0 to "
                             f"{count - 1}")
        classes = jnp.asarray(classes)
    x, gradient = (np.asarray(array, np.float32) for array in _gradient(model, variables, images, classes, stage))
    return np.maximum(np.einsum("bhwc,bc->bhw", x, gradient.mean((1, 2))), 0)
