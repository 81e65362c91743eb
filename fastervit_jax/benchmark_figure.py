"""Draw published ImageNet-1K accuracy against measured speed of inference.

    python -m fastervit_jax.benchmark figure results.jsonl --out speed.png

The files are those that `python -m fastervit_jax.benchmark speed --out` has written; of the same contestant the last
line counts. Batches, devices and precisions have panels of their own; only images of 224×224 are drawn, which is what
the accuracies were published for. No accuracy is measured here.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

PUBLISHED = {
    **{f"faster_vit_{i}_224": x for i, x in enumerate((82.1, 83.2, 84.2, 84.9, 85.4, 85.6, 85.8))},
    "swin_tiny_patch4_window7_224": 81.3, "swin_small_patch4_window7_224": 83.0, "swin_base_patch4_window7_224": 83.5,
    "convnext_tiny": 82.1, "convnext_small": 83.1, "convnext_base": 83.8,
}
"""Top-1, %, trained on ImageNet-1K at 224×224, from the papers: FasterViT, Swin Transformer, ConvNeXt."""

Curves = dict[str, list[tuple[float, float, str]]]


def read(paths: Iterable[pathlib.Path]) -> list[dict[str, Any]]:
    """The lines of files of results. Raises ValueError for a line that is none."""
    records = []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: expected JSON, found {line[:80]!r}") from error
    return records


def curves(records: Iterable[dict[str, Any]]) -> dict[str, Curves]:
    """For each panel's title the lines in it: images a second, accuracy and name of each model, by accuracy.

    A line takes the fastest mode of each model; that of this package only deployed ones.
    Raises ValueError if there is nothing to draw.
    """
    last = {}
    for x in records:
        if (x.get("benchmark") == "speed" and x["mode"] == "inference" and "images_per_second" in x
                and x["model"].split(".")[0] in PUBLISHED and x["height"] == x["width"] == 224
                and (x["family"] != "ours" or x["way"].startswith("deployed/"))):
            last[tuple(x[name] for name in ("device", "batch", "precision", "family", "model", "way"))] = x
    panels: dict[tuple, dict[str, dict[str, dict]]] = {}
    for (device, batch, precision, family, model, _), x in last.items():
        label = {"ours": "FasterViT, this package, deployed", "official": "FasterViT, official, fastest mode"}.get(
            family, f"{'Swin' if model.startswith('swin') else 'ConvNeXt'}, timm, fastest mode")
        line = panels.setdefault((device, batch, precision), {}).setdefault(label, {})
        if model not in line or line[model]["images_per_second"] < x["images_per_second"]:
            line[model] = x
    if not panels:
        raise ValueError("no measurement of inference at 224×224 of a model with a published accuracy; "
                         f"known are {', '.join(PUBLISHED)}")
    drawn = {}
    for (device, batch, precision), lines in panels.items():
        dates = sorted({x["date"] for line in lines.values() for x in line.values()})
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        drawn[f"{device}, batch {batch}, {precision}, {when}"] = {
            label: sorted([(x["images_per_second"], PUBLISHED[name.split(".")[0]], name) for name, x in line.items()],
                          key=lambda point: point[1])
            for label, line in lines.items()}
    return drawn


def figure(panels: dict[str, Curves]) -> Figure:
    """A panel a title, a line a family of models."""
    drawn = Figure(figsize=(7 * len(panels), 5), dpi=120, layout="constrained")
    for axes, (title, lines) in zip(drawn.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        for label, points in lines.items():
            dashed = "official" in label
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="s" if dashed else "o", label=label,
                      linestyle="--" if dashed else "-")
            for x, y, name in points:
                short = name.removeprefix("faster_vit_").removesuffix("_224").split("_")
                axes.annotate(short[0] if len(short) == 1 else short[1][0].upper(), (x, y), fontsize="small",
                              xytext=(5, 4), textcoords="offset points")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("images a second, measured")
        axes.set_ylabel("ImageNet-1K top-1, published, %")
        axes.set_title(title, fontsize="medium")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small", frameon=False)
    return drawn


def draw(records: Iterable[dict[str, Any]], out: pathlib.Path) -> None:
    """Writes the figure. Raises ValueError if there is nothing to draw."""
    FigureCanvasAgg(figure(curves(records))).print_png(out)
    print(f"accuracy against speed in {out}")


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fastervit_jax.benchmark figure", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="files of results")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE.png")
    given = parser.parse_args(arguments)
    if given.out.suffix.lower() != ".png":
        parser.error(f"--out {given.out}: expected a name that ends in .png")
    try:
        draw(read(given.results), given.out)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
