"""What a run writes: nothing twice after a kill, nothing under another config."""

import errno
import json
import struct
import sys
from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from fastervit_jax.train import metrics

CONFIG = ConfigDict({"seed": 0, "model": {"dim": 8, "hat": (True, False)}, "log_every_steps": 5})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(path):
    """What TensorBoard reads in a file."""
    data, found = path.read_bytes(), []
    while data:
        length, checksum = struct.unpack("<QI", data[:12])
        body, (sum_of_body,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        assert (checksum, sum_of_body) == (masked_crc32c(data[:8]), masked_crc32c(body))
        found.append(Event.FromString(body))
        data = data[16 + length :]
    return found


def test_going_on_drops_what_was_written_after_the_step(tmp_path):
    with metrics.MetricWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": float(step)})
            writer.write_speed(step, {"step_ms": 10.0 * step})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "train/lo')  # killed here
    with metrics.MetricWriter(tmp_path, 2) as writer:
        writer.write(3, "eval", {"acc1": 4.0})
        writer.write_speed(3, {})
    assert lines(path) == [
        {"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 2.0}, {"step": 3, "eval/acc1": 4.0}]
    assert lines(tmp_path / "speed.jsonl") == [{"step": 1, "speed/step_ms": 10.0}, {"step": 2, "speed/step_ms": 20.0}]


def test_tensorboard_has_the_same_figures(tmp_path):
    with metrics.MetricWriter(tmp_path, 4) as writer:
        writer.write(5, "train", {"loss": 0.5, "accuracy": 0.25, "bad_records": ["a.jpg: truncated"]})
        writer.write_speed(5, {"step_ms": 3.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert path.name.startswith("events.out.tfevents.")
    version, start, *figures = events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, SessionLog.START)  # older files' steps from 5 on are forgotten
    assert [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in figures] == [
        (5, {"train/loss": 0.5, "train/accuracy": 0.25}), (5, {"speed/step_ms": 3.0})]


class FullDisk:
    """A file on a disk with so many bytes left."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def close(self):
        self.file.close()


def test_figures_outlast_a_full_disk(tmp_path, caplog):
    with metrics.MetricWriter(tmp_path, 0) as writer:
        disk = writer.metrics.file = FullDisk(writer.metrics.file, room=30)
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": float(step)})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "train/loss": 1.0}'
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "metrics.jsonl ([Errno 28] No space left on device); its figures are kept" in caplog.text
        disk.room = 1000
        writer.write(4, "train", {"loss": 4.0})
        assert lines(tmp_path / "metrics.jsonl") == [{"step": i, "train/loss": float(i)} for i in (1, 2, 3, 4)]
        disk.room = 0
        writer.write(5, "train", {"loss": 5.0})
    assert "metrics.jsonl: the last 31 bytes of figures are lost" in caplog.text


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with metrics.MetricWriter(tmp_path, 0, config=ConfigDict({"wandb": "vision"})) as writer:
        writer.write(1, "train", {"loss": 1.0})
        writer.write_speed(1, {"step_ms": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def wandb(monkeypatch):
    """A client of Weights & Biases that keeps what it is told."""
    calls = []

    def init(**settings):
        calls.append(("init", settings))
        return SimpleNamespace(
            define_metric=lambda name, step_metric: calls.append(("axis", name, step_metric)),
            log=lambda figures: calls.append(("log", figures)),
            finish=lambda exit_code: calls.append(("finish", exit_code)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return calls


def test_weights_and_biases(tmp_path, wandb):
    config = ConfigDict({"wandb": "vision", "seed": 3})
    metrics.check_wandb(config.wandb)
    with metrics.MetricWriter(tmp_path, 0, config=config) as writer:
        writer.write(1, "train", {"loss": 0.5, "bad_records": ["a.jpg"]})
        writer.write_speed(1, {"step_ms": 3.0})

    def go_on(step):
        with metrics.MetricWriter(tmp_path, step, config=config):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go_on(1)
    with pytest.raises(KeyboardInterrupt):
        go_on(0)  # nothing was saved: not the same run
    first, again, anew = (call[1] for call in wandb if call[0] == "init")
    assert first == {
        "project": "vision", "id": first["id"], "resume": "allow", "name": tmp_path.name, "dir": str(tmp_path),
        "config": {"wandb": "vision", "seed": 3}, "allow_val_change": True}
    assert again == first
    assert anew == {**first, "id": (tmp_path / "wandb_id").read_text()}
    assert anew["id"] != first["id"]
    assert [call for call in wandb if call[0] != "init"] == [
        ("axis", "*", "step"), ("log", {"step": 1, "train/loss": 0.5}), ("log", {"step": 1, "speed/step_ms": 3.0}),
        ("finish", 0), ("axis", "*", "step"), ("finish", 1), ("axis", "*", "step"), ("finish", 1)]


def test_weights_and_biases_when_it_is_not_wanted(tmp_path, wandb):
    with metrics.MetricWriter(tmp_path, 0, config=ConfigDict({"wandb": ""})) as writer:
        writer.write(1, "train", {"loss": 0.5})
    assert wandb == []
    assert not (tmp_path / "wandb_id").exists()


@pytest.mark.parametrize("module", [None, SimpleNamespace()], ids=["not installed", "a mere folder"])
def test_weights_and_biases_without_its_client(module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", module)
    message = r"config.wandb='vision' sends figures to Weights & Biases, .*: pip install wandb, or set --config"
    with pytest.raises(ModuleNotFoundError, match=message):
        metrics.check_wandb("vision")
    with pytest.raises(ModuleNotFoundError, match=message):
        metrics.MetricWriter(tmp_path, 0, config=ConfigDict({"wandb": "vision"}))
    metrics.check_wandb("")


def test_a_started_run_keeps_its_config(tmp_path):
    metrics.claim_workdir(tmp_path, CONFIG, started=False)
    metrics.claim_workdir(tmp_path, CONFIG, started=True)
    free = ConfigDict({**CONFIG, "log_every_steps": 7, "mesh": {"data": 4, "fsdp": 2}, "remat": (True,) * 4})
    metrics.claim_workdir(tmp_path, free, started=True)
    for name in ("accumulate", "bn_group_size"):
        with pytest.raises(ValueError, match=f"{name}: there 'nothing', given 2"):
            metrics.claim_workdir(tmp_path, ConfigDict({**CONFIG, name: 2}), started=True)
    other = ConfigDict({"model": {"dim": 9, "hat": (True, False)}, "log_every_steps": 5, "name": "x"})
    with pytest.raises(ValueError, match=r"model.dim: there 8, given 9\n  name: there 'nothing', given 'x'\n  seed"):
        metrics.claim_workdir(tmp_path, other, started=True)
    metrics.check_config(tmp_path, other, parts=("model.hat",))
    metrics.claim_workdir(tmp_path, other, started=False)
    metrics.claim_workdir(tmp_path, other, started=True)


@pytest.mark.parametrize("name", ["metrics.jsonl", "speed.jsonl"])
def test_a_spoilt_line_is_named(name, tmp_path):
    (tmp_path / name).write_text('{"step": 1}\nnot json\n')
    with pytest.raises(ValueError, match=rf"{name} has a line that is no line of figures: 'not json"):
        metrics.MetricWriter(tmp_path, 2)


def test_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*: expected the one that train.py writes"):
        metrics.check_config(tmp_path, CONFIG)
