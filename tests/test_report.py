"""The curves that are drawn are the figures that were written, run by run."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from fastervit_jax import report


def write(folder, metrics, speed=(), tail=""):
    folder.mkdir(parents=True)
    for name, lines in (("metrics.jsonl", metrics), ("speed.jsonl", speed)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def write_long(folder, scale=1.0, **changes):
    """Two epochs of 10 steps, a figure each 5 steps and an evaluation each epoch."""
    metrics = [{"step": 0, "train/epoch": 0}]
    for step in (5, 10, 15, 20):
        metrics.append({"step": step, "train/loss": scale * (7 - step / 5), "train/gradient_norm": 2.0 * step,
                        "train/epoch": step / 10, **changes})
        if step % 10 == 0:
            metrics.append({"step": step, "eval/acc1": scale * step, "eval_ema/acc1": scale * (31 - step)})
    return write(folder, metrics, [{"step": 5, "speed/mfu": 0.25}, {"step": 20, "speed/mfu": 0.5}])


def drawn(figure):
    """Title of each panel, and of each line its label, style and points."""
    return {panel.get_title(): [(line.get_label(), line.get_linestyle(), line.get_xydata().tolist())
                                for line in panel.lines] for panel in figure.axes}


def test_curves_of_two_runs(tmp_path):
    write_long(tmp_path / "a")
    write_long(tmp_path / "b", scale=0.5)
    figure = report.figure(report.read_runs([tmp_path / "a", tmp_path / "b"]))
    assert drawn(figure) == {
        "training loss": [("a train/loss", "-", [[0.5, 6.0], [1.0, 5.0], [1.5, 4.0], [2.0, 3.0]]),
                          ("b train/loss", "-", [[0.5, 3.0], [1.0, 2.5], [1.5, 2.0], [2.0, 1.5]])],
        "top-1 accuracy, %": [("a eval/acc1", "-", [[1.0, 10.0], [2.0, 20.0]]),
                              ("a eval_ema/acc1", "--", [[1.0, 21.0], [2.0, 11.0]]),
                              ("b eval/acc1", "-", [[1.0, 5.0], [2.0, 10.0]]),
                              ("b eval_ema/acc1", "--", [[1.0, 10.5], [2.0, 5.5]])],
        "gradient norm": [(f"{name} train/gradient_norm", "-", [[0.5, 10.0], [1.0, 20.0], [1.5, 30.0], [2.0, 40.0]])
                          for name in "ab"],
        "model-FLOPs utilisation": [(f"{name} speed/mfu", "-", [[0.5, 0.25], [2.0, 0.5]]) for name in "ab"],
    }
    loss, accuracy, norm, mfu = figure.axes
    assert loss.lines[0].get_color() == accuracy.lines[1].get_color() != loss.lines[1].get_color()
    assert (norm.get_yscale(), mfu.get_ylim()[0]) == ("log", 0.0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["model", "averaged weights"]
    assert figure.get_supxlabel() == "epoch"


def test_steps_where_a_run_does_not_tell_its_epochs(tmp_path):
    write_long(tmp_path / "a")
    write(tmp_path / "b", [{"step": 3, "train/loss": 1.0}])
    figure = report.figure(report.read_runs([tmp_path / "a", tmp_path / "b"]), ["train/loss"])
    assert drawn(figure) == {"train/loss": [
        ("a train/loss", "-", [[5.0, 6.0], [10.0, 5.0], [15.0, 4.0], [20.0, 3.0]]),
        ("b train/loss", "-", [[3.0, 1.0]])]}
    assert figure.axes[0].lines[1].get_marker() == "."  # a single point can be seen
    assert figure.get_supxlabel() == "step"


def test_a_run_under_way_and_figures_that_are_not_finite(tmp_path):
    lines = [{"step": 1, "train/loss": 2.0, "train/gradient_norm": math.inf, "train/bad_records": ["a.jpg"]},
             {"step": 2, "train/loss": math.nan, "train/gradient_norm": math.nan}, {"step": 3, "train/loss": 1.0}]
    (run,) = report.read_runs([write(tmp_path / "a", lines, tail='{"step": 4, "train/lo')])
    assert run.step == 3
    assert "train/bad_records" not in run.curves
    loss, norm = report.figure([run]).axes
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), [[1, 2], [2, np.nan], [3, 1]])
    np.testing.assert_array_equal(norm.lines[0].get_ydata(), [np.nan, np.nan])
    assert report.table([run]).splitlines()[1].split() == ["a", "3", "-", "-", "-", "-", "1.0000"]


def test_command(tmp_path, capsys):
    write_long(tmp_path / "x" / "run")
    write_long(tmp_path / "y" / "run", scale=2.0)
    out = tmp_path / "curves.png"
    report.main([str(tmp_path / "x" / "run"), str(tmp_path / "y" / "run"), f"--out={out}"])
    head, first, second, last = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "run"
    assert first.split() == [str(tmp_path / "x" / "run"), "20", "2.0", "21.000", "10", "eval_ema", "3.0000"]
    assert second.split() == [str(tmp_path / "y" / "run"), "20", "2.0", "42.000", "10", "eval_ema", "6.0000"]
    assert last == f"curves in {out}"
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.size == (1020, 780)  # two panels by two
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], r"none: no such folder; expected a --workdir of train.py"),
        (["bare"], r"bare: no metrics.jsonl in it; expected a --workdir of train.py"),
        (["empty"], r"empty: its metrics.jsonl has no figures yet; the first ones come after config.log_every_steps"),
        (["spoilt"], r"spoilt/metrics.jsonl, line 2: no line of figures: 'not json'"),
        (["listed"], r"listed/metrics.jsonl, line 1: no line of figures: '\[1\]'"),
        (["good", "--metrics", "eval/acc"], r"no run has 'eval/acc'; there are train/loss"),
        (["good", "--out=curves.pdf"], r"--out=curves.pdf: expected a name that ends in .png"),
        (["good", "--out=no/curves.png"], r"No such file or directory: .*no/curves.png"),
    ],
)
def test_errors(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    write(tmp_path / "empty", [], tail='{"step": 1, "tr')
    write(tmp_path / "good", [{"step": 1, "train/loss": 1.0}])
    write(tmp_path / "spoilt", [{"step": 1, "train/loss": 1.0}], tail="not json\n")
    write(tmp_path / "listed", [], tail="[1]\n")
    with pytest.raises(SystemExit, match=message):
        report.main(arguments)
    assert not list(tmp_path.glob("*.png"))
