"""The benchmarks run and tell what they say they tell; how fast is for people to read."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import QUICKLY

ROOT = pathlib.Path(__file__).parents[1]


def figures(*arguments, devices=1):
    environment = {**os.environ, "XLA_FLAGS": f"{QUICKLY} --xla_force_host_platform_device_count={devices}"}
    process = subprocess.run([sys.executable, "-m", "fastervit_jax.benchmark", *arguments], cwd=ROOT, env=environment,
                             text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_data():
    lines = figures("data", "--images=12", "--batch=4", "--seconds=0.2", "--repeat=2", "--workers", "1")
    rounds, medians = ([line for line in lines if ("median" in line) == last] for last in (False, True))
    assert [line["way"] for line in medians][:2] == ["plain loop", "feed, 1 workers"]
    for line in medians:
        rates = [r["images_per_second"] for r in rounds if r["way"] == line["way"]]
        assert len(rates) == 2
        assert 0 < line["lowest"] == min(rates) < line["median"] < line["highest"] == max(rates)
        assert 70 < line["mean_kilobytes"] < 110


def test_input():
    lines = figures("input", "--variant=testing", "--batch=8", "--images=12", "--steps=2", "--workers", "1")
    assert lines[1]["compile_seconds"] > 0
    rounds = lines[2:]
    assert [line["round"] for line in rounds] == [0, 1, 2]
    for line in rounds:
        assert line["batch"] == 8
        assert 0 <= line["waiting"] < 1
        assert line["augmentation_share"] == round(line["augmentation_share"], 4) > 0


def test_train():
    changes = {"data.image_size": 32, "model.hat": (False,) * 4, "augment.mix_group": 4, "augment.rand_augment_ops": 0,
               "bn_group_size": 0, "mesa": 0.0}
    [line] = figures("train", "--variant=testing", "--batch=4", "--devices", "2", "--steps=2", "--repeat=1", "--set",
                     *(f"{key}={value}" for key, value in changes.items()), devices=2)
    assert (line["variant"], line["devices"], line["batch"], line["efficiency"]) == ("testing", 2, 8, 1)
    assert line["images_per_second"] == pytest.approx(8e3 / line["step_ms"], rel=1e-3)
    assert line["save_holds_host_ms"] > 0
    # With one round they are the same. The steps beside it go on until it is done, on the same two cores.
    assert line["save_costs_steps"] == line["lowest_save_costs_steps"] == line["highest_save_costs_steps"]
