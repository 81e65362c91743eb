"""What a run writes: nothing twice after a kill, nothing under another config."""

import json

import pytest
from ml_collections import ConfigDict

from fastervit_jax.train import metrics

CONFIG = ConfigDict({"seed": 0, "model": {"dim": 8, "hat": (True, False)}, "log_every_steps": 5})


def test_going_on_drops_what_was_written_after_the_step(tmp_path):
    with metrics.MetricWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "train/lo')  # killed here
    with metrics.MetricWriter(tmp_path, 2) as writer:
        writer.write(3, "eval", {"acc1": 4.0})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}, {"step": 3, "eval/acc1": 4.0}]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_started_run_keeps_its_config(tmp_path):
    metrics.claim_workdir(tmp_path, CONFIG, started=False)
    metrics.claim_workdir(tmp_path, CONFIG, started=True)
    free = ConfigDict({**CONFIG, "log_every_steps": 7})
    metrics.claim_workdir(tmp_path, free, started=True)
    other = ConfigDict({"model": {"dim": 9, "hat": (True, False)}, "log_every_steps": 5, "name": "x"})
    with pytest.raises(ValueError, match=r"model.dim: there 8, given 9\n  name: there 'nothing', given 'x'\n  seed"):
        metrics.claim_workdir(tmp_path, other, started=True)
    metrics.check_config(tmp_path, other, parts=("model.hat",))
    metrics.claim_workdir(tmp_path, other, started=False)
    metrics.claim_workdir(tmp_path, other, started=True)


def test_a_spoilt_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl has a line that is no line of figures: 'not json"):
        metrics.MetricWriter(tmp_path, 2)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*: expected the one that train.py writes"):
        metrics.check_config(tmp_path, CONFIG)
