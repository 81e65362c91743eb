"""The comparison of speeds tells figures that agree with each other, and goes on where a contestant fails."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fastervit_jax import benchmark_figure, benchmark_ours, benchmark_speed

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def speed(monkeypatch, capsys):
    """Runs the command in the repository's root; its records, and its table."""
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        benchmark_speed.main(["--repeat=3", "--seconds=0.02", *arguments])
        lines = capsys.readouterr().out.splitlines()
        records = [json.loads(line) for line in lines if line.startswith("{")]
        return records, "\n".join(lines[len(records):])

    return run


@pytest.fixture
def without_torch(tmp_path):
    """A Python that has no packages."""
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    path.chmod(0o755)
    return path


def check_timings(record):
    assert record["rounds"] == 3
    assert 0 < record["lowest"] <= record["images_per_second"] <= record["highest"]
    assert record["images_per_second"] == pytest.approx(1e3 * record["batch"] / record["ms"], rel=1e-4)
    assert record["compile_seconds"] > 0


def test_inference_goes_on_without_the_official_package(speed, without_torch, tmp_path):
    out = tmp_path / "results.jsonl"
    out.write_text("{}\n")
    records, table = speed(
        "--variant=testing", "--batch=1", "--resolution=64x96", "--precision=float32", "--ours", "plain/xla",
        "deployed/xla", "--peer", "--modes", "eager", f"--peer-python={without_torch}", f"--out={out}", "--jobs=2")
    *ours, official = records
    assert [x["way"] for x in ours] == ["plain/xla", "deployed/xla"]
    for record in ours:
        check_timings(record)
        assert (record["batch"], record["height"], record["width"], record["beside"]) == (1, 64, 96, 2)
        assert 0 < record["latency_ms"] <= record["latency_p95_ms"]
        assert record["ratio"] is None
        assert 0 < record["model_gflop"] < record["xla_gflop"] * 1.5
    assert (official["family"], official["rounds"]) == ("official", 0)
    assert "torch is not installed" in official["error"]
    assert "pip install" in official["error"]
    assert "fastervit==1.0.0" in official["error"]
    assert f"official eager failed: {official['error']}" in table
    assert [table.count(f"ours {way}") for way in ("plain/xla", "deployed/xla")] == [1, 1]
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{}, *records]


def test_training(speed):
    [record], table = speed("--mode=train", "--variant=testing", "--batch=2", "--resolution=32", "--ours", "plain/xla",
                            "--precision=float32")
    check_timings(record)
    assert (record["mode"], record["batch"], record["height"], record["precision"]) == ("train", 2, 32, "float32")
    assert record["xla_gflop"] > 2 * record["model_gflop"]  # forward and backward
    assert "latency_ms" not in record
    assert table.startswith("train, testing, batch 2, 32×32, float32, cpu")


def test_nothing_could_be_timed(speed, without_torch, capsys):
    with pytest.raises(SystemExit, match="nothing could be timed"):
        speed("--variant", "--timm", "convnext_tiny", "--modes", "eager", f"--peer-python={without_torch}-not")
    assert "No such file or directory; expected a Python program" in capsys.readouterr().out


@pytest.mark.oracle
@pytest.mark.parametrize("mode", ["inference", "train"])
def test_the_official_package_and_timm(speed, mode, monkeypatch, tmp_path):
    # A torchvision built for GPUs lacks its operators beside a CPU's torch; importing it needs their names only.
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nif importlib.util.find_spec('torch'):\n    import torch\n"
        "    library = torch.library.Library('torchvision', 'DEF')\n    for name in ('nms', 'qnms'):\n"
        "        library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    records, table = speed(
        f"--mode={mode}", "--batch=2", "--resolution=64", "--ours", "plain/xla", "--peer", "--modes", "eager", "--timm",
        "swin_tiny_patch4_window7_224", "convnext_tiny", f"--peer-python={os.environ['FASTERVIT_ORACLE']}")
    assert [x["family"] for x in records] == ["ours", "official", "timm", "timm"]
    for record in records:
        check_timings(record)
    ours, official = records[:2]
    assert official["ratio"] == 1
    assert ours["ratio"] == pytest.approx(ours["images_per_second"] / official["images_per_second"], rel=1e-4)
    assert "fastervit 1.0.0" in official["software"]
    assert table.count("official eager") == 1


def record(family, way, rate, **others):
    return {"benchmark": "speed", "family": family, "model": "faster_vit_0_224", "way": way, "mode": "inference",
            "batch": 128, "height": 224, "width": 224, "precision": "bfloat16", "device": "NVIDIA H200",
            "date": "2026-11-26", "images_per_second": rate, "lowest": rate - 1, "highest": rate + 1,
            "ms": 128e3 / rate, **others}


def test_ratios_are_to_the_fastest_mode():
    failed = {**record("official", "max-autotune", 1.0), "error": "RuntimeError: no"}
    for name in ("images_per_second", "lowest", "highest", "ms"):
        del failed[name]
    records = [record("ours", "deployed/auto", 6000.0, computation_ms=2.0, memory_ms=5.0),
               record("official", "eager", 1000.0), record("official", "reduce-overhead", 4000.0), failed]
    benchmark_speed.compare(records)
    assert [x.get("ratio") for x in records] == [1.5, 0.25, 1, None]
    assert [x.get("utilisation") for x in records] == pytest.approx([0.09375, 0.015625, 0.0625, None])
    heading, columns, ours, eager, _, failure = benchmark_speed.table(records).splitlines()
    assert heading == "inference, faster_vit_0_224, batch 128, 224×224, bfloat16, NVIDIA H200"
    assert columns.endswith("of peak      bound ms")
    assert ours.split() == ["ours", "deployed/auto", "6,000.0", "5,999.0–6,001.0", "21.333", "1.50", "9.4%", "5.000",
                            "memory"]
    assert eager.split() == ["official", "eager", "1,000.0", "999.0–1,001.0", "128.000", "0.25", "1.6%"]
    assert failure == "official max-autotune failed: RuntimeError: no"


def test_timings_are_of_the_middle_round():
    assert benchmark_speed.timings(8, [0.2, 0.1, 0.4], []) == {
        "images_per_second": 40, "lowest": 20, "highest": 80, "ms": 200}
    single = [i / 1e3 for i in range(1, 101)]
    found = benchmark_speed.timings(1, [0.1], single[::-1])
    assert (found["latency_ms"], found["latency_p95_ms"]) == pytest.approx((50.5, 95))


@pytest.mark.parametrize(("rooms", "runs"), [(3, ["abc"]), (2, ["abc", "c"]), (1, ["abc", "bc", "c"]),
                                             (0, ["abc", "a", "b", "c"])])
def test_those_without_memory_are_run_again_with_fewer(monkeypatch, rooms, runs):
    seen = []

    def heat(specs, *_):
        seen.append("".join(x["way"] for x in specs))
        return [{**x, "ms": 1.0} if i < rooms else {**x, "error": "CUDA out of memory. Tried to allocate"}
                for i, x in enumerate(specs)]

    monkeypatch.setattr(benchmark_speed, "_heat", heat)
    found = benchmark_speed.race([{"way": way} for way in "abc"], 1, 1, 1.0, "python")
    assert seen == runs
    assert [x["way"] for x in found] == ["a", "b", "c"]
    assert all(("ms" in x) == (rooms > 0) for x in found)


def test_bounds_are_those_of_the_data_sheet():
    assert benchmark_ours.bound(989e9, 4.8e9, "NVIDIA H200", "bfloat16") == {"computation_ms": 1, "memory_ms": 1}
    found = benchmark_ours.bound(989e9, 3.35e9, "NVIDIA H100 80GB HBM3", "float32")
    assert found == {"computation_ms": None, "memory_ms": 1}
    assert benchmark_ours.bandwidth("NVIDIA A100-SXM4-80GB") == 2.039e12
    assert benchmark_ours.bandwidth("NVIDIA H100 PCIe") is None
    assert benchmark_ours.bound(1.0, None, "cpu", "bfloat16") == {"computation_ms": None, "memory_ms": None}


def test_what_is_timed_together():
    given = benchmark_speed.options(
        ["--variant", "faster_vit_0_224", "faster_vit_4_21k_384", "--resolution", "224", "384x512", "--batch", "1", "8",
         "--ours", "plain/auto", "--peer", "--modes", "eager", "default", "--timm", "convnext_tiny"])
    groups = benchmark_speed.contestants(given)
    assert len(groups) == 2 * 2 * 3
    assert [(x["family"], x["way"]) for x in groups[0]] == [
        ("ours", "plain/auto"), ("official", "eager"), ("official", "default")]
    assert "any_res" not in groups[0][1]
    assert groups[1][1]["any_res"] == "faster_vit_4_21k_384_any_res"  # 224 is not what it was trained at
    assert [(x["model"], x["batch"]) for x in groups[2]] == [("convnext_tiny", 1)] * 2
    assert {(x["height"], x["width"]) for x in groups[-1]} == {(384, 512)}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--variant=faster_vit_7"], "unknown model 'faster_vit_7': did you mean"),
    (["--resolution=31"], "'31': expected SIDE or HEIGHTxWIDTH in pixels, at least 32"),
    (["--ours", "fast"], "--ours fast: expected plain or deployed, a slash, and auto, xla or pallas"),
    (["--mode=train", "--ours", "deployed/xla"], "--ours deployed/xla: expected plain, a slash"),
    (["--batch", "8", "0"], "--batch 0: expected at least 1"),
    (["--figure=a.pdf"], "--figure a.pdf: expected a name that ends in .png"),
])
def test_refusals(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_speed.options(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_figure(tmp_path):
    results, out = tmp_path / "results.jsonl", tmp_path / "speed.png"
    larger = {"model": "faster_vit_2_224"}
    lines = [
        record("ours", "deployed/auto", 100.0), record("ours", "deployed/auto", 9000.0),  # the last line counts
        record("ours", "deployed/xla", 8000.0), record("ours", "plain/auto", 99_999.0),
        record("ours", "deployed/auto", 3000.0, **larger), record("official", "eager", 1000.0),
        record("official", "default", 2000.0), record("official", "eager", 500.0, **larger),
        record("timm", "eager", 4000.0, model="swin_tiny_patch4_window7_224"),
        record("timm", "eager", 5000.0, model="convnext_tiny.fb_in1k"),
        record("ours", "deployed/auto", 700.0, height=256), record("ours", "deployed/auto", 70.0, mode="train"),
        record("ours", "deployed/auto", 50.0, batch=1, date="2026-11-27"), {"benchmark": "speed", **larger,
        "mode": "inference", "error": "no"}, {"benchmark": "data"},
    ]
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    panels = benchmark_figure.curves(benchmark_figure.read([results]))
    assert list(panels) == [
        "NVIDIA H200, batch 128, bfloat16, 2026-11-26", "NVIDIA H200, batch 1, bfloat16, 2026-11-27"]
    axes, single = benchmark_figure.figure(panels).axes
    assert axes.get_xscale() == "log"
    drawn = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert drawn == {
        "FasterViT, this package, deployed": [(9000, 82.1), (3000, 84.2)],
        "FasterViT, official, fastest mode": [(2000, 82.1), (500, 84.2)],
        "Swin, timm, fastest mode": [(4000, 81.3)], "ConvNeXt, timm, fastest mode": [(5000, 82.1)]}
    assert [list(line.get_xdata()) for line in single.lines] == [[50]]
    command = [sys.executable, "-m", "fastervit_jax.benchmark", "figure", results, "--out", out]
    subprocess.run(command, cwd=ROOT, check=True)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_figure_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="no measurement of inference at 224×224"):
        benchmark_figure.draw([record("ours", "plain/xla", 1.0)], tmp_path / "speed.png")
