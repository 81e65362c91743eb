"""Draw where a model looks, over the photographs: rollout, attention by block and head, Grad-CAM.

    python -m fastervit_jax.attention_maps cat.jpg --checkpoint=runs/digits
    python -m fastervit_jax.attention_maps cat.jpg dog.jpg --checkpoint=weights.safetensors --query=30,100
    python -m fastervit_jax.attention_maps cat.jpg --checkpoint=runs/hat --versus=runs/windows --out=maps

Without --query the maps are those of the class score, that is of the average which the head takes. Those of an image
lie in OUT/NAME, as PNGs and as arrays in maps.npz; docs/attention_maps.md says what they mean.
"""

import argparse
import dataclasses
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from fastervit_jax import compilation_cache, rollout, trained
from fastervit_jax.data import augment
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.weights.torch_file import replacing

COLOURS, ALPHA = "inferno", 0.65
PANEL = 1.3  # inches, in a grid of blocks and heads


@dataclasses.dataclass(frozen=True)
class Asked:
    """A pixel (x, y) of the cropped image, or None for the class score; a block as (stage, number); None: all."""

    query: tuple[int, int] | None = None
    block: tuple[int, int] | None = None
    head: int | None = None
    cam_class: int | None = None
    cam_stage: int = 3


@dataclasses.dataclass(frozen=True)
class Panel:
    """A map, the pixels of the image that all its cells cover together (height, width), and what it is."""

    values: np.ndarray
    covers: tuple[int, int]
    text: str


@dataclasses.dataclass(frozen=True)
class Maps:
    """Where a model looks in one image.

    pictures: panels by file name, a row a block and a column a head. arrays: what maps.npz gets.
    """

    name: str
    pixels: UInt8[np.ndarray, "size size c"]
    rollout: Panel
    grad_cam: Panel
    pictures: dict[str, list[list[Panel]]]
    arrays: dict[str, np.ndarray]


def check(asked: Asked, loaded: trained.Trained) -> list[tuple[int, int]]:
    """The blocks to draw, as (stage, number). Raises ValueError if the model does not have what is asked for."""
    config, size = loaded.model.config, loaded.crop.size
    if asked.query and not all(0 <= at < size for at in asked.query):
        raise ValueError(f"--query={asked.query[0]},{asked.query[1]}: outside the image; expected X,Y in pixels of the "
                         f"cropped image, each from 0 to {size - 1}")
    blocks = [(stage, number) for stage in (2, 3) for number in range(config.depths[stage])]
    if asked.block:
        if asked.block not in blocks:
            raise ValueError(f"--block={asked.block[0]}.{asked.block[1]}: {loaded.name} has the blocks with attention "
                             f"{', '.join(f'{stage}.{number}' for stage, number in blocks)} (stage.number)")
        blocks = [asked.block]
    for stage in sorted({stage for stage, _ in blocks}):
        if asked.head is not None and not 0 <= asked.head < config.num_heads[stage]:
            raise ValueError(f"--head={asked.head}: stage {stage} of {loaded.name} has the heads 0 to "
                             f"{config.num_heads[stage] - 1}{'' if asked.block else '; choose a block with --block'}")
    if asked.cam_class is not None and not 0 <= asked.cam_class < config.num_classes:
        raise ValueError(f"--class={asked.cam_class}: {loaded.name} has the classes 0 to {config.num_classes - 1}")
    return blocks


# Computing


def compute(loaded: trained.Trained, pixels: UInt8[np.ndarray, "size size c"], asked: Asked) -> Maps:
    """All maps of one image."""
    blocks, config, size = check(asked, loaded), loaded.model.config, loaded.crop.size
    images = augment.normalise(jnp.asarray(pixels)[None], loaded.mean, loaded.std)
    logits, attention = rollout.capture(loaded.model, loaded.variables, images)
    grids = {stage: rollout.make_grid(config, stage, size, size) for stage in (2, 3)}
    seen = _asked_rows(attention, config, grids, images.shape, asked)
    first = grids[2].height, grids[2].width

    def panel(values: np.ndarray, stride: int, text: str) -> Panel:
        return Panel(values, (values.shape[0] * stride, values.shape[1] * stride), text)

    whole = rollout.back_to_stage_2(attention, config, images.shape, seen[2], 2).reshape(first)
    predicted = int(logits[0].argmax())
    shown = predicted if asked.cam_class is None else asked.cam_class
    cam = rollout.grad_cam(loaded.model, loaded.variables, images, shown, stage=asked.cam_stage)[0]
    text = f"class {shown}{', predicted' if shown == predicted else f' (predicted: {predicted})'}"
    pictures: dict[str, list[list[Panel]]] = {}
    arrays = {"image": pixels, "logits": logits[0], "rollout": whole, "grad_cam": cam}
    for stage in sorted({stage for stage, _ in blocks}):
        numbers = [number for other, number in blocks if other == stage]
        heads = range(config.num_heads[stage]) if asked.head is None else [asked.head]
        grid, stride = grids[stage], 4 * 2**stage
        by_head = {head: _through_blocks(attention, config, grids, images.shape, seen[stage], stage, head)
                   for head in (None, *heads)}
        rows = {"rollout": [], "window_attention": [], "carrier_attention": []}
        for number in numbers:
            block, title = attention[stage][f"blocks_{number}"], f"block {stage}.{number}"
            labels = {None: "all heads", **{head: f"head {head}" for head in heads}}
            rows["rollout"].append([panel(by_head[head][number].reshape(first), 16, f"{title}, {label}")
                                    for head, label in labels.items()])
            arrays[f"stage{stage}_block{number}_rollout"] = by_head[None][number].reshape(first)
            windows, to_carriers = rollout.window_maps(block["attention"]["weights"], grid, seen[stage])
            windows[windows == 0] = np.nan  # in windows of which nothing is asked
            rows["window_attention"].append([
                panel(windows[0, head], stride, f"{title}, head {head}" +
                      (f"\nto carriers {to_carriers[0, head]:.1%}" if grid.ct_size else "")) for head in heads])
            if grid.ct_size:
                carriers = rollout.carrier_maps(block["carrier_attention"]["weights"], grid, seen[stage])
                rows["carrier_attention"].append([
                    Panel(carriers[0, head], (grid.high * stride, grid.wide * stride), f"{title}, head {head}")
                    for head in heads])
            for kind, captured in block.items():
                arrays[f"stage{stage}_block{number}_{kind}"] = captured["weights"]
        pictures |= {f"{kind}_stage{stage}": panels for kind, panels in rows.items()}
    what = "class score" if asked.query is None else f"query {asked.query[0]},{asked.query[1]}"
    return Maps(loaded.name, pixels, panel(whole, 16, f"rollout, {what}"),
                panel(cam, 4 * 2**asked.cam_stage, f"Grad-CAM, stage {asked.cam_stage}, {text}"), pictures, arrays)


def _asked_rows(
    attention: dict, config: ModelConfig, grids: dict[int, rollout.Grid], shape: tuple[int, ...], asked: Asked
) -> dict[int, np.ndarray]:
    """For stages 2 and 3, the weights of the last map's cells that are asked for."""
    if asked.query:
        return {stage: rollout.query_rows(grid, stage, shape, *asked.query) for stage, grid in grids.items()}
    last = rollout.class_rows(grids[3], 1)
    matrix = rollout.stage_matrix(attention[3], grids[3], propagate=config.do_propagation)
    return {2: last @ matrix[0] @ rollout.downsample_matrix(grids[2].height, grids[2].width), 3: last}


def _through_blocks(
    attention: dict, config: ModelConfig, grids: dict[int, rollout.Grid], shape: tuple[int, ...], rows: np.ndarray,
    stage: int, head: int | None,
) -> list[np.ndarray]:
    """Rollout of one head (None: their average) through the stage's first 1, 2, … blocks, back to stage 2's map."""
    found = [rows @ matrix[0] for matrix in
             rollout.stage_matrices(attention[stage], grids[stage], propagate=config.do_propagation, head=head)]
    if stage == 3:
        down = rollout.downsample_matrix(grids[2].height, grids[2].width)
        found = [rollout.back_to_stage_2(attention, config, shape, row @ down, 2) for row in found]
    return [row[0] for row in found]


# Drawing


def _draw(axes: Axes, pixels: np.ndarray, panel: Panel, norm: Normalize, query: tuple[int, int] | None) -> None:
    """A map over the photograph, which stays clear under cells that are NaN."""
    height, width = pixels.shape[:2]
    axes.imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    axes.imshow(panel.values, cmap=COLOURS, norm=norm, alpha=ALPHA, interpolation="nearest",
                extent=(0, panel.covers[1], panel.covers[0], 0))
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    if query:
        axes.plot(query[0] + 0.5, query[1] + 0.5, "+", color="cyan", markersize=6)


def _photograph(axes: Axes, pixels: np.ndarray, query: tuple[int, int] | None) -> None:
    height, width = pixels.shape[:2]
    axes.imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255,
                extent=(0, width, height, 0))
    axes.tick_params(labelsize="small")
    if query:
        axes.plot(query[0] + 0.5, query[1] + 0.5, "+", color="cyan", markersize=12, markeredgewidth=2)


def _norm(panels: Sequence[Panel]) -> Normalize:
    return Normalize(0.0, max(float(np.nanmax(panel.values, initial=0.0)) for panel in panels) or 1.0)


def photograph(maps: Maps, query: tuple[int, int] | None) -> Figure:
    """The image as the model gets it, with its pixels counted along the sides."""
    drawn = Figure(figsize=(4.5, 4.5), dpi=120, layout="constrained")
    _photograph(drawn.subplots(), maps.pixels, query)
    return drawn


def beside(every: Sequence[Maps], choose: Callable[[Maps], Panel], query: tuple[int, int] | None) -> Figure:
    """The photograph, and one map of each model, each with its own scale."""
    drawn = Figure(figsize=(3.9 * (1 + len(every)), 4.1), dpi=120, layout="constrained")
    left, *axes = drawn.subplots(1, 1 + len(every))
    _photograph(left, every[0].pixels, query)
    for panel_axes, maps in zip(axes, every, strict=True):
        panel = choose(maps)
        norm = _norm([panel])
        _draw(panel_axes, maps.pixels, panel, norm, query)
        panel_axes.set_title(f"{maps.name}\n{panel.text}" if len(every) > 1 else panel.text, fontsize="medium")
        drawn.colorbar(ScalarMappable(norm, COLOURS), ax=panel_axes, shrink=0.8)
    return drawn


def by_block(every: Sequence[Maps], picture: str, query: tuple[int, int] | None) -> Figure:
    """A grid of blocks and heads for each model, side by side; a row has one scale."""
    grids = [maps.pictures.get(picture) for maps in every]
    height = max(len(rows or [[]]) for rows in grids) * (PANEL + 0.35) + 0.5
    widths = [max(3.0, PANEL * (len(rows[0]) + 0.7)) if rows else 3.0 for rows in grids]
    drawn = Figure(figsize=(sum(widths), height), dpi=100)
    parts = drawn.subfigures(1, len(every), width_ratios=widths, squeeze=False)[0]
    for part, maps, rows in zip(parts, every, grids, strict=True):
        part.suptitle(f"{maps.name}\n{picture.replace('_', ' ').replace('stage', 'stage ')}", fontsize="small")
        if rows:
            _draw_grid(part, maps.pixels, rows, height, query)
        else:
            part.text(0.5, 0.5, "no carrier tokens", ha="center", va="center")
    return drawn


def _draw_grid(
    part: SubFigure, pixels: np.ndarray, rows: list[list[Panel]], height: float, query: tuple[int, int] | None
) -> None:
    columns = len(rows[0])
    grid = part.subplots(len(rows), columns + 1, squeeze=False, width_ratios=[1] * columns + [0.08], gridspec_kw={
        "left": 0.02, "right": 1 - 0.5 / (columns + 0.7), "bottom": 0.02, "top": 1 - 0.75 / height, "hspace": 0.35,
        "wspace": 0.06})
    for axes, panels in zip(grid, rows, strict=True):
        norm = _norm(panels)
        for panel_axes, panel in zip(axes, panels, strict=False):
            _draw(panel_axes, pixels, panel, norm, query)
            panel_axes.set_title(panel.text, fontsize=6, pad=2)
        part.colorbar(ScalarMappable(norm, COLOURS), cax=axes[-1]).ax.tick_params(labelsize=6)


def write(every: Sequence[Maps], asked: Asked, folder: pathlib.Path) -> list[str]:
    """Writes the pictures and maps.npz of one image, each whole or not at all; gives the names of the files."""
    figures = {"photograph": lambda: photograph(every[0], asked.query),
               "rollout": lambda: beside(every, lambda maps: maps.rollout, asked.query),
               "grad_cam": lambda: beside(every, lambda maps: maps.grad_cam, asked.query)}
    for picture in sorted({name for maps in every for name in maps.pictures}):
        if any(maps.pictures.get(picture) for maps in every):
            figures[picture] = lambda picture=picture: by_block(every, picture, asked.query)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        with replacing(folder / f"{name}.png") as partial:
            FigureCanvasAgg(draw()).print_png(partial)
    arrays = dict(every[0].arrays)
    for maps in every[1:]:
        arrays |= {f"versus_{name}": array for name, array in maps.arrays.items()}
    with replacing(folder / "maps.npz") as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return [*(f"{name}.png" for name in figures), "maps.npz"]


def run(images: Sequence[pathlib.Path], models: Sequence[trained.Trained], asked: Asked, out: pathlib.Path) -> None:
    """All that the command does. Everything that is asked for is checked before anything is written."""
    names = [path.stem for path in images]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"several images are called {name!r}, which names their folder in {out}: rename them, or "
                             "draw them with another --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out={out}: a file; expected a folder, or a new name")
    for loaded in models:
        print(loaded.describe())
        check(asked, loaded)
        cut = dataclasses.replace(loaded.crop, channels=models[0].crop.channels)
        if cut != models[0].crop:
            raise ValueError(f"{loaded.name} sees images as {loaded.crop}, {models[0].name} as {models[0].crop}: "
                             "expected two models that see the same part of them, in the same size")
    read = [[trained.read_image(path, loaded.crop) for loaded in models] for path in images]
    for name, pixels in zip(names, read, strict=True):
        every = [compute(loaded, given, asked) for loaded, given in zip(models, pixels, strict=True)]
        files = write(every, asked, out / name)
        print(f"{out / name}: {', '.join(files)}")
        for loaded in models:
            size = loaded.crop.size
            stages = [stage for stage in (2, 3) if rollout.make_grid(loaded.model.config, stage, size, size).ct_size]
            if not stages:
                print(f"{loaded.name} has no carrier tokens in images of {size} pixels: no carrier attention to draw")


def _pair(separator: str, expected: str) -> Callable[[str], tuple[int, int]]:
    """Reads two whole numbers."""
    def read(text: str) -> tuple[int, int]:
        first, _, second = text.partition(separator)
        try:
            return int(first), int(second)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}") from error

    return read


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastervit_jax.attention_maps", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", type=pathlib.Path)
    parser.add_argument("--versus", metavar="FILE_OR_FOLDER", help="another model, drawn beside it")
    parser.add_argument("--query", type=_pair(",", "X,Y, whole numbers"), metavar="X,Y",
                        help="a pixel of the cropped image, column and row, as photograph.png counts them;\n"
                             "by default the class score")
    parser.add_argument("--block", type=_pair(".", "STAGE.NUMBER, whole numbers, such as 2.0"), metavar="STAGE.NUMBER",
                        help="one block, 2.0 say, of stage 2 or 3 only")
    parser.add_argument("--head", type=int, metavar="NUMBER", help="one head only, from 0")
    parser.add_argument("--class", type=int, dest="cam_class", metavar="NUMBER",
                        help="the class of Grad-CAM, from 0; by default the predicted one")
    parser.add_argument("--grad_cam_stage", type=int, default=3, choices=range(4),
                        help="the stage whose map Grad-CAM is on (default: %(default)s)")
    parser.add_argument("--out", default="attention_maps", type=pathlib.Path, metavar="DIR",
                        help="folder for the results (default: %(default)s)")
    trained.add_arguments(parser)
    given = parser.parse_args(arguments)
    logging.basicConfig(format="%(levelname)s %(message)s")
    asked = Asked(given.query, given.block, given.head, given.cam_class, given.grad_cam_stage)
    checkpoints = [given.checkpoint, *([given.versus] if given.versus else [])]
    try:
        with jax.default_matmul_precision("highest"):
            models = [trained.load(checkpoint, **trained.given(given)) for checkpoint in checkpoints]
            run(given.images, models, asked, given.out)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    compilation_cache.enable()
    main()
