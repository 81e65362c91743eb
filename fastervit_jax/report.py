"""Draw the curves of one or more runs of train.py into one PNG, and print a line a run.

    python -m fastervit_jax.report runs/digits
    python -m fastervit_jax.report runs/small runs/large --out=both.png --metrics train/loss eval/acc1

A run may be under way. A solid line in a panel of evaluations is the model itself, a dashed one its averaged weights.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogFormatter, PercentFormatter

PANELS = {
    "training loss": ("train/loss",),
    "training accuracy": ("train/accuracy",),
    "evaluation loss": ("eval/loss", "eval_ema/loss"),
    "top-1 accuracy, %": ("eval/acc1", "eval_ema/acc1"),
    "top-5 accuracy, %": ("eval/acc5", "eval_ema/acc5"),
    "learning rate": ("train/learning_rate",),
    "gradient norm": ("train/gradient_norm",),
    "parameter norm": ("train/parameter_norm",),
    "MESA loss": ("train/mesa",),
    "images a second": ("speed/images_per_second",),
    "model-FLOPs utilisation": ("speed/mfu",),
    "wait for input": ("speed/input_wait",),
    "device memory, GiB": ("speed/memory_gib",),
}
"""What is drawn where `--metrics` does not say it: titles, and names in metrics.jsonl and speed.jsonl."""

FRACTIONS = ("train/accuracy", "speed/mfu", "speed/input_wait")
FROM_ZERO = ("speed/images_per_second", "speed/mfu", "speed/input_wait", "speed/memory_gib")
LOGARITHMIC = ("train/gradient_norm",)  # it has outliers
EPOCH = "train/epoch"


@dataclasses.dataclass(frozen=True)
class Run:
    """`curves` maps a metric to its (step, value) pairs, in the order in which they were written."""

    name: str
    curves: dict[str, list[tuple[int, float]]]

    @property
    def step(self) -> int:
        """The last one that there is a figure of."""
        return max(step for curve in self.curves.values() for step, _ in curve)

    @property
    def steps_per_epoch(self) -> float | None:
        """None if the run does not tell."""
        return next((step / epoch for step, epoch in self.curves.get(EPOCH, ()) if epoch > 0), None)

    def best(self) -> tuple[float, int, str] | None:
        """Highest top-1 accuracy of all evaluations (%), the first step that has it, and its metric."""
        found = [(value, -step, name) for name in PANELS["top-1 accuracy, %"]
                 for step, value in self.curves.get(name, ()) if math.isfinite(value)]
        value, step, name = max(found, default=(None, 0, ""))
        return None if value is None else (value, -step, name)


def read_run(folder: str | pathlib.Path, name: str) -> Run:
    """The figures in a workdir of train.py. A last line that is not whole, of a run under way, is left out.

    Raises FileNotFoundError if there is no metrics.jsonl, ValueError if it is empty or has a line of something else.
    """
    folder = pathlib.Path(folder)
    if not (folder / "metrics.jsonl").exists():
        what = "no such folder" if not folder.is_dir() else "no metrics.jsonl in it"
        raise FileNotFoundError(f"{folder}: {what}; expected a --workdir of train.py")
    curves: dict[str, list[tuple[int, float]]] = {}
    for path in (folder / "metrics.jsonl", folder / "speed.jsonl"):
        whole = path.read_text().split("\n")[:-1] if path.exists() else []
        for number, text in enumerate(whole, 1):
            try:
                line = json.loads(text)
                step = line.pop("step")
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no line of figures: {text[:80]!r}") from error
            for metric, value in line.items():
                if isinstance(value, int | float):
                    curves.setdefault(metric, []).append((step, float(value)))
    if not curves:
        raise ValueError(f"{folder}: its metrics.jsonl has no figures yet; the first ones come after "
                         "config.log_every_steps steps")
    return Run(name, curves)


def read_runs(folders: Sequence[str | pathlib.Path]) -> list[Run]:
    """The runs, called after their folders; by the whole path where two have the same name."""
    names = [pathlib.Path(folder).resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def panels(runs: Sequence[Run], metrics: Sequence[str] | None) -> dict[str, tuple[str, ...]]:
    """Titles and metrics of what is drawn: each of `metrics`, or if it is None what there is of `PANELS`."""
    there = {metric for run in runs for metric in run.curves}
    if metrics is None:
        found = {title: tuple(name for name in names if name in there) for title, names in PANELS.items()}
        return {title: names for title, names in found.items() if names}
    for metric in metrics:
        if metric not in there:
            raise ValueError(f"no run has {metric!r}; there are {', '.join(sorted(there))}")
    return {metric: (metric,) for metric in metrics}


def figure(runs: Sequence[Run], metrics: Sequence[str] | None = None) -> Figure:
    """A panel a metric, a colour a run; over epochs if all runs tell how many steps one has, otherwise over steps."""
    shown = panels(runs, metrics)
    in_epochs = all(run.steps_per_epoch for run in runs)
    columns = min(4, math.ceil(math.sqrt(len(shown))))
    rows = math.ceil(len(shown) / columns)
    drawn = Figure(figsize=(max(5.5, 4.25 * columns), 3 * rows + 0.5), dpi=120, layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, sharex=True).flat
    for panel, (title, names) in zip(axes, shown.items(), strict=False):
        for run, colour in zip(runs, _colours(len(runs)), strict=True):
            for name in names:
                _draw(panel, run, name, colour, run.steps_per_epoch if in_epochs else 1.0)
        _dress(panel, title, names)
    for panel in axes[len(shown):]:
        panel.remove()
    drawn.supxlabel("epoch" if in_epochs else "step", fontsize="medium")
    if len(runs) == 1:
        drawn.suptitle(runs[0].name)
    else:
        keys = [Line2D([], [], color=colour, linewidth=2, label=run.name)
                for run, colour in zip(runs, _colours(len(runs)), strict=True)]
        drawn.legend(handles=keys, loc="outside upper center", ncols=min(len(runs), 2 * columns), frameon=False)
    return drawn


def _colours(count: int) -> list[tuple[float, ...]]:
    return [colormaps["tab10"](i) if count <= 10 else colormaps["turbo"](i / (count - 1)) for i in range(count)]


def _draw(panel: Axes, run: Run, name: str, colour: tuple[float, ...], unit: float) -> None:
    """A line of the run's figures, broken where they are not finite."""
    curve = run.curves.get(name, [])
    panel.plot(
        [step / unit for step, _ in curve], [value if math.isfinite(value) else math.nan for _, value in curve],
        color=colour, linewidth=1.2, alpha=0.85, linestyle="--" if name.startswith("eval_ema/") else "-",
        marker="." if len(curve) <= 30 else "", markersize=5, label=f"{run.name} {name}")


def _dress(panel: Axes, title: str, names: tuple[str, ...]) -> None:
    panel.set_title(title, fontsize="medium")
    panel.tick_params(which="both", labelsize="small", labelbottom=True)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    if names[0] in FRACTIONS:
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    if names[0] in LOGARITHMIC and any((line.get_ydata() > 0).any() for line in panel.lines):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(LogFormatter())
        panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    if names[0] in FROM_ZERO:
        top = panel.dataLim.ymax
        panel.set_ylim(0, 1.1 * top if 0 < top < math.inf else None)
    if len(names) > 1:
        keys = [Line2D([], [], color="0.3", linestyle=style, label=text)
                for style, text in (("-", "model"), ("--", "averaged weights"))]
        panel.legend(handles=keys, fontsize="small", frameon=False)


def table(runs: Sequence[Run]) -> str:
    """A line a run: its last step, its best top-1 accuracy (%) and where that was, its last training loss."""
    rows = [("run", "step", "epoch", "best acc1", "at step", "of", "last loss")]
    for run in runs:
        best = run.best()
        epoch = run.step / run.steps_per_epoch if run.steps_per_epoch else None
        loss = run.curves.get("train/loss")
        rows.append((
            run.name, f"{run.step:,}", "-" if epoch is None else f"{epoch:.1f}",
            *(("-", "-", "-") if best is None else (f"{best[0]:.3f}", f"{best[1]:,}", best[2].split("/")[0])),
            f"{loss[-1][1]:.4f}" if loss else "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                          zip(row[1:], widths[1:], strict=True))]) for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastervit_jax.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a workdir of train.py")
    parser.add_argument("--out", default="report.png", type=pathlib.Path, help="the PNG (default: %(default)s)")
    parser.add_argument("--metrics", nargs="+", metavar="NAME",
                        help="what to draw, by the names in metrics.jsonl and speed.jsonl\n"
                             "(default: losses, accuracies, learning rate, norms and speed)")
    given = parser.parse_args(arguments)
    try:
        if given.out.suffix.lower() != ".png":
            raise ValueError(f"--out={given.out}: expected a name that ends in .png")
        runs = read_runs(given.runs)
        drawn = figure(runs, given.metrics)
        FigureCanvasAgg(drawn).print_png(given.out)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(table(runs))
    print(f"curves in {given.out}")


if __name__ == "__main__":
    main()
