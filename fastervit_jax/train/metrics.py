"""Where a run's figures and its config are kept: WORKDIR/metrics.jsonl, tensorboard/, config.json."""

import contextlib
import json
import os
import pathlib
from typing import Any

import jax
import tensorboardX
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

# What may differ between the starts of one run: it changes neither the model nor the numbers.
FREE = ("log_every_steps", "checkpoint_every_epochs", "keep_checkpoints", "data.dir", "data.workers", "data.timeout",
        "data.max_bad_fraction")


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


class MetricWriter(contextlib.AbstractContextManager):
    """Writes figures as lines of JSON and for TensorBoard; only the first of several processes writes.

    A run that goes on from `first_step` drops what a killed one wrote for later steps.
    """

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self.enabled = jax.process_index() == 0
        if not self.enabled:
            return
        path = workdir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # killed while it was written
        _replace(path, "".join(line for line in lines if self._step(path, line) <= first_step))
        self.file = path.open("a")
        self.board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)

    @staticmethod
    def _step(path: pathlib.Path, line: str) -> int:
        try:
            return json.loads(line)["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} has a line that is no line of figures: {line!r}; mend it or move the file "
                             "away") from error

    def write(self, step: int, prefix: str, figures: dict[str, float | list[str]]) -> None:
        """One line. Lists of texts are for metrics.jsonl only."""
        if not self.enabled:
            return
        named = {f"{prefix}/{name}": value for name, value in figures.items()}
        self.file.write(json.dumps({"step": step, **named}) + "\n")
        self.file.flush()
        for name, value in named.items():
            if not isinstance(value, list):
                self.board.add_scalar(name, value, step)

    def __exit__(self, *exception: Any) -> None:
        if self.enabled:
            self.file.close()
            self.board.close()
