"""The result of a sweep, from its workdir: result.csv and result.md with a row a point, and plots.

`python -m fastervit_jax.sweep --workdir=DIR --result` makes them, at any time; a sweep does at its end. Plots are
accuracy_and_speed.png, curves.png, and heat_map.png where two swept keys are numbers; docs/ablate.md says more.
"""

import csv
import io
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastervit_jax import report
from fastervit_jax.weights.torch_file import replacing

CURVES = ("train/loss", "eval/loss", "eval/acc1", "eval_ema/loss", "eval_ema/acc1")
MEANS = ("loss", "train_images_per_second", "inference_images_per_second")
HEADS = {
    "seeds": ("seeds", "{}"), "acc1": ("top-1, %", "{:.2f}"), "loss": ("loss", "{:.4f}"),
    "parameters": ("parameters", "{:,}"), "gflops": ("GFLOPs", "{:.4f}"),
    "train_images_per_second": ("training, images/s", "{:,.0f}"),
    "inference_images_per_second": ("inference, images/s", "{:,.0f}"), "memory_gib": ("memory, GiB", "{:.2f}"),
}  # fmt: skip
"""Columns of result.md beside the swept keys: title and format."""
COLUMNS = ("label", "runs_done", "runs", "acc1_std", "memory_of", *HEADS)
"""Those of result.csv."""


def read_sweep(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The runs of the sweep in a workdir, as sweep.json has them, done or not.

    Raises FileNotFoundError if there is no sweep.json, ValueError if it is something else.
    """
    path = workdir / "sweep.json"
    if not path.exists():
        what = "no such folder" if not workdir.is_dir() else "no sweep.json in it"
        raise FileNotFoundError(f"{workdir}: {what}; expected the --workdir of a sweep")
    return _read(path)["runs"]


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); put the right one back, or move it away") from error


def read_result(folder: pathlib.Path) -> dict[str, Any]:
    """What a run has written that is done. Raises ValueError if that is damaged."""
    path = folder / "result.json"
    result = _read(path)
    needed = {"seed", "acc1", "parameters", "gflops", "memory_gib", "memory_of", "device", "devices", "jax", *MEANS}
    if not isinstance(result, dict) or not needed <= result.keys():
        missing = ", ".join(sorted(needed - result.keys())) if isinstance(result, dict) else "figures"
        raise ValueError(f"{path} has no {missing}; put the right one back, or move it away")
    for name in ("acc1", "loss", "parameters", "gflops"):
        if not isinstance(result[name], int | float):
            raise ValueError(f"{path} has {name} {result[name]!r}, no number; put the right one back, or move it away")
    return result


def text(value: Any) -> str:
    """2-3-6-5 for a tuple, '' for an empty text; otherwise as Python has it."""
    return "-".join(map(text, value)) if isinstance(value, list | tuple) else str(value) or "''"


def rows(entries: Sequence[dict[str, Any]], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each point, of the runs that are done: `results` has them by name.

    acc1 (%), loss and images a second are means over seeds, acc1_std the sample standard deviation (None for less than
    two), memory_gib the most. What is not known is None.
    """
    table = []
    for point in sorted({entry["point"] for entry in entries}):
        runs = [entry for entry in entries if entry["point"] == point]
        done = [results[run["name"]] for run in runs if run["name"] in results]
        row = {"label": runs[0]["label"] or ""} if any(entry["label"] for entry in entries) else {}
        row |= {key: x if isinstance(x, int | float) else text(x) for key, x in runs[0]["shown"].items()}
        row |= {"seeds": " ".join(str(result["seed"]) for result in done), "runs_done": len(done), "runs": len(runs)}
        accuracies = [result["acc1"] for result in done]
        row["acc1"] = statistics.fmean(accuracies) if done else None
        row["acc1_std"] = statistics.stdev(accuracies) if len(done) > 1 else None
        for name in MEANS:
            known = [result[name] for result in done if result[name] is not None]
            row[name] = statistics.fmean(known) if known else None
        for name in ("parameters", "gflops"):
            row[name] = done[0][name] if done else None
        known = [result for result in done if result["memory_gib"] is not None]
        row["memory_gib"] = max((result["memory_gib"] for result in known), default=None)
        row["memory_of"] = " ".join(sorted({result["memory_of"] for result in known})) or None
        table.append(row)
    return table


def markdown(
    name: str, table: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]], plots: Sequence[str]
) -> str:
    """The table for reading, and the plots below it."""
    swept = [key for key in table[0] if key == "label" or key not in COLUMNS]
    heads = [*(key.replace("|", r"\|") for key in swept), *(head for head, _ in HEADS.values())]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in table:
        cells = [str(row[key]).replace("|", r"\|") for key in swept]
        for key, (_, form) in HEADS.items():
            cell = "" if row[key] is None else form.format(row[key])
            if key == "acc1" and row["acc1_std"] is not None:
                cell += f" ± {row['acc1_std']:.2f}"
            cells.append(cell)
        lines.append("| " + " | ".join(cells) + " |")
    done, total = (sum(row[key] for row in table) for key in ("runs_done", "runs"))
    about = [f"# {name}", f"{done} of {total} runs are done."]
    if results:
        where = sorted({f"{result['devices']} × {result['device']}, jax {result['jax']}" for result in results})
        of = sorted({result["memory_of"] for result in results})
        about.append(
            "Top-1 and loss are those of the last evaluation, mean ± standard deviation over seeds. GFLOPs are of one "
            "image's forward pass, two for each product. Images a second: training without evaluation and saving; "
            "inference of the forward pass alone, on one device. Memory is the most that was in use, "
            f"{' or '.join({'device': 'on a device', 'process': 'by the whole process'}[x] for x in of)}. "
            f"Measured on {'; '.join(where)}.")
    return "\n\n".join([*about, "\n".join(lines), *(f"![{plot}]({plot})" for plot in plots)]) + "\n"


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the (speed, accuracy) pairs that no other is at least as good as in both; slowest first."""
    front = [i for i, (x, y) in enumerate(points)
             if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)]
    return sorted(front, key=lambda i: points[i])


def accuracy_and_speed(names: Sequence[str], keys: str, table: Sequence[dict[str, Any]]) -> Figure:
    """Top-1 over images a second, in inference and in training: a dot a point of the sweep, a line for the best.

    `names` are those of the points, `keys` says what they are values of.
    """
    drawn = Figure(figsize=(11, 5), dpi=120, layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    for panel, key in zip(axes, ("inference_images_per_second", "train_images_per_second"), strict=True):
        shown = [(name, row) for name, row in zip(names, table, strict=True)
                 if row["acc1"] is not None and row[key] is not None]
        places = [(row[key], row["acc1"]) for _, row in shown]
        front = pareto_front(places)
        for i, (name, row) in enumerate(shown):
            colour = "tab:blue" if i in front else "0.55"
            panel.errorbar(*places[i], yerr=row["acc1_std"] or 0.0, fmt="o", color=colour, capsize=2, markersize=5)
            panel.annotate(name, places[i], xytext=(5, 4), textcoords="offset points", fontsize="x-small", color=colour)
        panel.plot(*zip(*(places[i] for i in front), strict=True) if front else ((), ()), color="tab:blue",
                   linewidth=1, zorder=0, label="Pareto front")
        panel.set_xlabel(HEADS[key][0])
        panel.grid(alpha=0.3)
        panel.margins(x=0.12)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("top-1, %")
    axes[0].legend(fontsize="small", frameon=False)
    drawn.suptitle(keys, fontsize="medium")
    return drawn


def heat_map_keys(entries: Sequence[dict[str, Any]]) -> tuple[str, str] | None:
    """The two swept keys if there are exactly two with several values, and all of these are numbers."""
    shown = [entry["shown"] for entry in entries]
    keys = [key for key in shown[0] if len({text(values[key]) for values in shown}) > 1]
    numbers = all(type(values[key]) in (int, float) for values in shown for key in keys)
    return (keys[0], keys[1]) if len(keys) == 2 and numbers else None


def heat_map(keys: tuple[str, str], table: Sequence[dict[str, Any]]) -> Figure:
    """Mean top-1 for each pair of values: the first key downwards, the second one to the right. Empty: not done."""
    down, right = (sorted({row[key] for row in table}) for key in keys)
    values = [[math.nan] * len(right) for _ in down]
    drawn = Figure(figsize=(2.5 + 1.1 * len(right), 1.8 + 0.7 * len(down)), dpi=120, layout="constrained")
    panel = drawn.subplots()
    for row in table:
        if row["acc1"] is not None:
            i, j = down.index(row[keys[0]]), right.index(row[keys[1]])
            values[i][j] = row["acc1"]
            spread = "" if row["acc1_std"] is None else f"\n± {row['acc1_std']:.2f}"
            panel.text(j, i, f"{row['acc1']:.2f}{spread}", ha="center", va="center", fontsize="small",
                       bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 1.5})
    drawn.colorbar(panel.imshow(values, cmap="viridis", aspect="auto"), label="top-1, %")
    panel.set_xticks(range(len(right)), [str(x) for x in right])
    panel.set_yticks(range(len(down)), [str(x) for x in down])
    panel.set_xlabel(keys[1])
    panel.set_ylabel(keys[0])
    return drawn


def mean_curves(runs: Sequence[report.Run], name: str) -> report.Run:
    """The mean of some runs, at the steps that all of them have."""
    curves = {}
    for metric in runs[0].curves:
        found = [dict(run.curves.get(metric, ())) for run in runs]
        steps = sorted(set(found[0]).intersection(*found))
        curves[metric] = [(step, statistics.fmean(curve[step] for curve in found)) for step in steps]
    return report.Run(name, {metric: curve for metric, curve in curves.items() if curve})


def curves(folders: dict[str, list[pathlib.Path]], keys: str) -> Figure | None:
    """Losses and accuracies over epochs: a curve for the name of a point, the mean of its runs; None for no figures."""
    means = []
    for name, paths in folders.items():
        begun = [report.read_run(path, name) for path in paths
                 if (path / "metrics.jsonl").exists() and "\n" in (path / "metrics.jsonl").read_text()]
        if begun and (mean := mean_curves(begun, name)).curves:
            means.append(mean)
    metrics = [metric for metric in CURVES if any(metric in run.curves for run in means)]
    if not metrics:
        return None
    drawn = report.figure(means, metrics)
    for legend in drawn.legends:
        legend.set_title(keys)
    return drawn


def write(workdir: pathlib.Path) -> str:
    """Write the tables and plots of what is there so far, each whole or not at all; returns result.md's table.

    Raises FileNotFoundError if the workdir has no sweep, ValueError if a file in it is not what it should be.
    """
    entries = read_sweep(workdir)
    folders = {entry["name"]: workdir / "runs" / entry["name"] for entry in entries}
    results = {name: read_result(folder) for name, folder in folders.items() if (folder / "result.json").exists()}
    table = rows(entries, results)
    labelled = any(entry["label"] for entry in entries)
    keys = "" if labelled else ", ".join(entries[0]["shown"])
    names = {entry["point"]: entry["label"] or ", ".join(
        f"{key}={text(x)}" if labelled else text(x) for key, x in entry["shown"].items()) for entry in entries}
    figures = {}
    if results:
        figures["accuracy_and_speed.png"] = accuracy_and_speed([names[i] for i in sorted(names)], keys, table)
        if pair := heat_map_keys(entries):
            figures["heat_map.png"] = heat_map(pair, table)
    if drawn := curves({name: [folders[entry["name"]] for entry in entries if entry["point"] == point]
                        for point, name in names.items()}, keys):
        figures["curves.png"] = drawn
    for name, figure in figures.items():
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)
        replace(workdir / name, buffer.getvalue())
    lines = io.StringIO()
    writer = csv.DictWriter(lines, table[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    replace(workdir / "result.csv", lines.getvalue())
    whole = markdown(_read(workdir / "sweep.json")["sweep"], table, list(results.values()), list(figures))
    replace(workdir / "result.md", whole)
    shown = "\n".join(line for line in whole.splitlines() if line.startswith("|"))
    return f"{shown}\n{', '.join(['result.csv', 'result.md', *figures])} are in {workdir}"


def replace(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file so that a kill leaves the old one or the new one, never a part; several processes may do so."""
    with replacing(path) as new:
        new.write_bytes(content if isinstance(content, bytes) else content.encode())
