"""The table has the means and deviations of what the runs wrote, and the plots show the table."""

import csv
import json

import matplotlib.image
import numpy as np
import pytest

from fastervit_jax import sweep_result


def entries(points, seeds=(0, 1), labels=None):
    """Of a sweep.json: `points` are what is shown of the swept keys."""
    return [{"name": f"{i}_seed={seed}", "point": i, "label": labels and labels[i], "shown": shown, "overrides": {},
             "seed": seed, "config": {}} for i, shown in enumerate(points) for seed in seeds]


def result(seed, acc1, **changes):
    return {"seed": seed, "acc1": acc1, "acc5": 99.0, "loss": acc1 / 100, "parameters": 12345, "gflops": 0.25,
            "train_images_per_second": 100.0 + seed, "inference_images_per_second": 200.0 + 10 * seed,
            "memory_gib": 1.5 + seed, "memory_of": "device", "device": "NVIDIA H200", "devices": 1, "jax": "0.10.2",
            **changes}  # fmt: skip


def workdir_of(tmp_path, found, results, curves=()):
    (tmp_path / "sweep.json").write_text(json.dumps({"sweep": "some", "runs": found}))
    for name, written in results.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "result.json").write_text(json.dumps(written))
    for name in curves:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True, exist_ok=True)
        lines = [{"step": 10 * i, "train/loss": 2.0 / i, "train/epoch": i, "eval/acc1": 10.0 * i} for i in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


POINTS = [{"window_size[2]": window, "ct_size": carriers} for window in (3, 4) for carriers in (1, 2)]
RESULTS = {
    "0_seed=0": result(0, 90.0), "0_seed=1": result(1, 94.0), "1_seed=0": result(0, 95.0, memory_gib=None),
    "2_seed=1": result(1, 80.0, train_images_per_second=None),
}  # fmt: skip


def test_a_row_a_point():
    table = sweep_result.rows(entries(POINTS), RESULTS)
    assert [(row["window_size[2]"], row["ct_size"], row["seeds"], row["runs_done"], row["runs"]) for row in table] == [
        (3, 1, "0 1", 2, 2), (3, 2, "0", 1, 2), (4, 1, "1", 1, 2), (4, 2, "", 0, 2)]
    assert [row["acc1"] for row in table] == [92.0, 95.0, 80.0, None]
    assert [row["acc1_std"] for row in table] == [pytest.approx(8**0.5), None, None, None]
    assert [row["loss"] for row in table] == [pytest.approx(0.92), 0.95, 0.8, None]
    assert [row["train_images_per_second"] for row in table] == [100.5, 100.0, None, None]
    assert [row["inference_images_per_second"] for row in table] == [205.0, 200.0, 210.0, None]
    assert [(row["memory_gib"], row["memory_of"]) for row in table] == [
        (2.5, "device"), (None, None), (2.5, "device"), (None, None)]


def test_tables_and_plots_of_a_sweep_under_way(tmp_path):
    workdir = workdir_of(tmp_path, entries(POINTS), RESULTS, ["0_seed=0", "3_seed=0"])
    (workdir / "runs" / "3_seed=1").mkdir()
    (workdir / "runs" / "3_seed=1" / "metrics.jsonl").write_text('{"step": 3')  # just begun
    said = sweep_result.write(workdir)
    text = (workdir / "result.md").read_text()
    table = [
        "| window_size[2] | ct_size | seeds | top-1, % | loss | parameters | GFLOPs | training, images/s | "
        "inference, images/s | memory, GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| 3 | 1 | 0 1 | 92.00 ± 2.83 | 0.9200 | 12,345 | 0.2500 | 100 | 205 | 2.50 |",
        "| 3 | 2 | 0 | 95.00 | 0.9500 | 12,345 | 0.2500 | 100 | 200 |  |",
        "| 4 | 1 | 1 | 80.00 | 0.8000 | 12,345 | 0.2500 |  | 210 | 2.50 |",
        "| 4 | 2 |  |  |  |  |  |  |  |  |",
    ]
    assert [line for line in text.splitlines() if line.startswith("|")] == table
    assert said.splitlines()[:-1] == table
    assert text.startswith("# some\n\n4 of 8 runs are done.\n")
    assert "in use, on a device. Measured on 1 × NVIDIA H200, jax 0.10.2." in text
    with (workdir / "result.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["acc1"] for row in rows] == ["92.0", "95.0", "80.0", ""]
    assert rows[0]["ct_size"] == "1"
    plots = {"accuracy_and_speed.png", "heat_map.png", "curves.png"}
    assert {path.name for path in workdir.iterdir()} == plots | {"runs", "sweep.json", "result.md", "result.csv"}
    for plot in plots:
        assert f"![{plot}]({plot})" in text
        assert np.ptp(matplotlib.image.imread(workdir / plot)[..., :3]) == 1  # black on white

    # Drawn again when more is done.
    (workdir / "runs" / "3_seed=0" / "result.json").write_text(json.dumps(result(0, 70.0)))
    assert "| 4 | 2 | 0 | 70.00 | 0.7000 |" in sweep_result.write(workdir)
    assert "5 of 8 runs are done." in (workdir / "result.md").read_text()


def test_a_sweep_that_has_nothing_yet(tmp_path):
    workdir = workdir_of(tmp_path, entries([{"depths": [1, 2, 3, 4]}], labels=["deep"]), {})
    said = sweep_result.write(workdir)
    assert said.splitlines()[2] == "| deep | 1-2-3-4 |  |  |  |  |  |  |  |  |"
    assert said.endswith(f"result.csv, result.md are in {workdir}")
    assert "0 of 2 runs are done." in (workdir / "result.md").read_text()


def test_pareto_front():
    #          slow, best   dominated    equal to 0   middle      fast       as fast, worse
    points = [(1.0, 90.0), (1.5, 70.0), (1.0, 90.0), (2.0, 80.0), (3.0, 60.0), (3.0, 50.0)]
    assert sweep_result.pareto_front(points) == [0, 2, 3, 4]
    assert sweep_result.pareto_front([]) == []


def test_accuracy_and_speed_shows_means_deviations_and_the_front():
    table = sweep_result.rows(entries(POINTS), RESULTS)
    figure = sweep_result.accuracy_and_speed(list("abcd"), "letters", table)
    inference, training = figure.axes
    assert [text.get_text() for text in inference.texts] == ["a", "b", "c"]
    assert [text.xy for text in inference.texts] == [(205.0, 92.0), (200.0, 95.0), (210.0, 80.0)]
    assert [text.get_text() for text in training.texts] == ["a", "b"]  # c's was not measured
    front = next(line for line in inference.lines if line.get_label() == "Pareto front")
    assert front.get_xydata().tolist() == [[200.0, 95.0], [205.0, 92.0], [210.0, 80.0]]
    (low, high), = inference.containers[0].lines[2][0].get_segments()
    assert (low[1], high[1]) == (pytest.approx(92 - 8**0.5), pytest.approx(92 + 8**0.5))
    front = next(line for line in training.lines if line.get_label() == "Pareto front")
    assert front.get_xydata().tolist() == [[100.0, 95.0], [100.5, 92.0]]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (POINTS, ("window_size[2]", "ct_size")),
        ([{"a": 1, "b": 0.5}, {"a": 2, "b": 0.25}], ("a", "b")),
        ([{"a": 1, "b": 5, "c": 1}, {"a": 1, "b": 6, "c": 2}], ("b", "c")),  # a does not vary
        ([{"a": 1, "b": 5, "c": 1}, {"a": 2, "b": 6, "c": 2}], None),
        ([{"a": 1, "b": True}, {"a": 2, "b": False}], None),
        ([{"a": 1, "b": [1, 2]}, {"a": 2, "b": [2, 1]}], None),
        ([{"a": 1}, {"a": 2}], None),
    ],
)  # fmt: skip
def test_what_has_a_heat_map(points, expected):
    assert sweep_result.heat_map_keys(entries(points)) == expected


def test_heat_map_has_each_mean_in_its_place():
    table = sweep_result.rows(entries(POINTS), RESULTS)
    panel = sweep_result.heat_map(("window_size[2]", "ct_size"), table).axes[0]
    np.testing.assert_array_equal(panel.images[0].get_array().filled(np.nan), [[92.0, 95.0], [80.0, np.nan]])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["3", "4"]
    assert {text.get_position(): text.get_text() for text in panel.texts} == {
        (0, 0): "92.00\n± 2.83", (1, 0): "95.00", (0, 1): "80.00"}
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("ct_size", "window_size[2]")


def test_curves_are_means_of_seeds(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, losses in zip(folders, ([4, 2, 1], [2, 1], [8]), strict=True):
        folder.mkdir()
        lines = [{"step": 5 * i, "train/loss": x, "train/epoch": i / 2} for i, x in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "d").mkdir()  # of a run that has just begun
    (tmp_path / "d" / "metrics.jsonl").touch()
    figure = sweep_result.curves({"1": folders[:2], "2": [*folders[2:], tmp_path / "d"], "3": []}, "keys")
    panel, = figure.axes
    assert [(line.get_label(), line.get_xydata().tolist()) for line in panel.lines] == [
        ("1 train/loss", [[0.5, 3.0], [1.0, 1.5]]), ("2 train/loss", [[0.5, 8.0]])]
    assert figure.legends[0].get_title().get_text() == "keys"
    assert sweep_result.curves({"3": [tmp_path / "d"]}, "keys") is None


def test_what_is_none_or_empty_is_not_taken_for_unknown(tmp_path):
    shown = [{"ct|size": None, "init_from": ""}, {"ct|size": [1, 2], "init_from": "a|b"}]
    workdir = workdir_of(tmp_path, entries(shown), {})
    said = sweep_result.write(workdir).splitlines()
    assert said[0].startswith(r"| ct\|size | init_from | seeds |")
    assert [line.split("  ")[0] for line in said[2:4]] == ["| None | '' |", r"| 1-2 | a\|b |"]
    with (workdir / "result.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["ct|size"], row["init_from"], row["acc1"]) for row in rows] == [
        ("None", "''", ""), ("1-2", "a|b", "")]


def test_several_may_write_the_same_file(tmp_path):
    """Even with one process id, as two pods have."""
    sweep_result.replace(tmp_path / "a", "old")
    with sweep_result.replacing(tmp_path / "a") as first:
        first.write_text("first")
        sweep_result.replace(tmp_path / "a", "second")
        assert (tmp_path / "a").read_text() == "second"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "first")]


def test_a_file_that_is_damaged_is_named(tmp_path):
    workdir = workdir_of(tmp_path, entries(POINTS), RESULTS)
    (workdir / "runs" / "0_seed=0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"runs.0_seed=0.result.json is no JSON"):
        sweep_result.write(workdir)
    assert not (workdir / "result.md").exists()


def test_a_result_without_numbers_is_damaged(tmp_path):
    good = result(0, 90.0)
    (tmp_path / "result.json").write_text(json.dumps(good | {"acc1": None}))
    with pytest.raises(ValueError, match="has acc1 None, no number; put the right one back, or move it away"):
        sweep_result.read_result(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(good))
    assert sweep_result.read_result(tmp_path) == good
