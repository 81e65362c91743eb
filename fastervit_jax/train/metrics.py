"""Where a run's figures and its config are kept: WORKDIR/metrics.jsonl, speed.jsonl, tensorboard/, config.json."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

# What may differ between the starts of one run: it changes neither the model nor the numbers.
FREE = (
    "log_every_steps", "eval_every_epochs", "checkpoint_every_epochs", "keep_checkpoints", "keep_best",
    "max_bad_steps", "stuck_after", "profile", "wandb", "mesh.data", "mesh.fsdp", "remat", "kernels",
    "data.dir", "data.workers", "data.timeout", "data.max_bad_fraction",
)  # fmt: skip


def _replace(path: pathlib.Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one, never a part."""
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)


def claim_workdir(workdir: pathlib.Path, config: ConfigDict, *, started: bool) -> None:
    """Keep the resolved config in the workdir; where a run has `started` to save, check that it is the same one."""
    if started:
        check_config(workdir, config)
    elif jax.process_index() == 0:
        _replace(workdir / "config.json", json.dumps(json.loads(config.to_json()), indent=2) + "\n")


def check_config(workdir: pathlib.Path, config: ConfigDict, parts: tuple[str, ...] = ("",)) -> None:
    """Compare `config`, or the parts of it that begin with `parts`, with that of the run in the workdir.

    Raises FileNotFoundError if there is no run, ValueError that lists what differs.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"no config.json in {workdir}: expected the one that train.py writes at the start of a "
                                "run; put it back, or give another --workdir")
    mine, theirs = (flatten_dict(json.loads(text), sep=".") for text in (config.to_json(), path.read_text()))
    missing = object()
    different = [
        f"  {key}: there {theirs.get(key, 'nothing')!r}, given {mine.get(key, 'nothing')!r}"
        for key in sorted({*mine, *theirs} - set(FREE))
        if key.startswith(parts) and mine.get(key, missing) != theirs.get(key, missing)
    ]
    if different:
        raise ValueError("\n".join([
            f"{workdir} holds a run with another config:", *different,
            "Give the same config, with the same --config.KEY=VALUE changes, or another --workdir."]))


def check_wandb(project: str) -> None:
    """Raises ModuleNotFoundError if `project` is not empty and the client of Weights & Biases cannot be imported."""
    if project:
        _wandb_init(project)


def _wandb_init(project: str) -> Callable[..., Any]:
    try:
        from wandb import init  # a mere folder named wandb, as the client leaves them, has none
    except ImportError as error:
        raise ModuleNotFoundError(
            f"config.wandb={project!r} sends figures to Weights & Biases, whose client cannot be imported ({error}): "
            "pip install wandb, or set --config.wandb=''", name="wandb") from error
    return init


class MetricWriter(contextlib.AbstractContextManager):
    """Writes figures as lines of JSON and for TensorBoard, and for Weights & Biases where config.wandb names a project.

    metrics.jsonl has only what a run that was killed and goes on repeats bit for bit; what depends on the clock is in
    speed.jsonl. A run that goes on from `first_step` drops what a killed one wrote for later steps and, where that step
    is `to_evaluate` again, of its evaluation, and goes on in the same run of Weights & Biases. Only the first of
    several processes writes.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int, *, to_evaluate: bool = False,
                 config: ConfigDict | None = None):
        self.enabled = jax.process_index() == 0
        if not self.enabled:
            return
        paths = workdir / "metrics.jsonl", workdir / "speed.jsonl"
        for path in paths:
            _drop_later(path, first_step, to_evaluate)
        self.run = _wandb_run(workdir, first_step, config) if config is not None and config.wandb else None
        self.metrics, self.speed = map(_Appended, paths)
        self.board = _events(workdir / "tensorboard", first_step)

    def write(self, step: int, prefix: str, figures: dict[str, float | int | list[str]]) -> None:
        """One line of metrics.jsonl. Lists of texts go nowhere else."""
        if self.enabled:
            self._write(self.metrics, step, prefix, figures)

    def write_speed(self, step: int, figures: dict[str, float]) -> None:
        """One line of speed.jsonl, none where there are no figures."""
        if self.enabled and figures:
            self._write(self.speed, step, "speed", figures)

    def _write(self, file: "_Appended", step: int, prefix: str, figures: dict[str, float | int | list[str]]) -> None:
        named = {f"{prefix}/{name}": value for name, value in figures.items()}
        file.write((json.dumps({"step": step, **named}) + "\n").encode())
        scalars = {name: value for name, value in named.items() if not isinstance(value, list)}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.board.write(_record(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))
        if self.run is not None:
            self.run.log({"step": step, **scalars})

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        if self.enabled:
            for file in (self.metrics, self.speed, self.board):
                file.close()
            if self.run is not None:
                self.run.finish(exit_code=0 if kind is None else 1)


class _Appended:
    """A file that is added to. What a full disk does not take is kept, and written before what comes next."""

    def __init__(self, path: pathlib.Path):
        self.path, self.file = path, path.open("ab", buffering=0)
        self.left, self.failing = b"", False

    def write(self, data: bytes) -> None:
        self.left += data
        try:
            while self.left:
                self.left = self.left[self.file.write(self.left):]
        except OSError as error:
            if not self.failing:
                logging.warning("cannot write to %s (%s); its figures are kept until it is possible", self.path, error)
            self.failing = True
        else:
            self.failing = False

    def close(self) -> None:
        self.write(b"")
        if self.left:
            logging.error("%s: the last %d bytes of figures are lost", self.path, len(self.left))
        self.file.close()


def _drop_later(path: pathlib.Path, first_step: int, to_evaluate: bool) -> None:
    """Leave only the lines up to `first_step`, without its evaluation if it is `to_evaluate`; a new file is empty."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # killed while it was written
    _replace(path, "".join(line for line in lines if _place(path, line) <= (first_step, not to_evaluate)))


def _place(path: pathlib.Path, line: str) -> tuple[int, bool]:
    """Its step, and whether it is of an evaluation."""
    try:
        figures = json.loads(line)
        return figures["step"], any(name.startswith("eval") for name in figures)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a line that is no line of figures: {line!r}; mend it or move the file "
                         "away") from error


def _events(folder: pathlib.Path, first_step: int) -> _Appended:
    """A new file of events for TensorBoard, which then forgets what older ones say of later steps."""
    folder.mkdir(exist_ok=True)
    board = _Appended(folder / f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}")
    now = time.time()
    board.write(_record(Event(wall_time=now, file_version="brain.Event:2")))
    board.write(_record(Event(wall_time=now, step=first_step + 1, session_log=SessionLog(status=SessionLog.START))))
    return board


def _record(event: Event) -> bytes:
    """As TensorFlow's TFRecord files have it: length, its checksum, data, its checksum."""
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join([length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))])


def _wandb_run(workdir: pathlib.Path, first_step: int, config: ConfigDict) -> Any:
    """The run of Weights & Biases for this workdir: a new one at the start, later the one whose id is kept there."""
    init = _wandb_init(config.wandb)
    path = workdir / "wandb_id"
    if first_step == 0 or not path.exists():
        _replace(path, secrets.token_hex(4))
    run = init(
        project=config.wandb, id=path.read_text(), resume="allow", name=workdir.name, dir=str(workdir),
        config=json.loads(config.to_json()), allow_val_change=True)
    # Its own count of steps cannot go back, so that it would drop the evaluation that a stopped run does again.
    run.define_metric("*", step_metric="step")
    return run
