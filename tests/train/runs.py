"""A training run small enough for tests: digits, HAT blocks with carriers, seconds on a CPU."""

import contextlib
import json
import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits, imagenet
from fastervit_jax.data import sources
from fastervit_jax.train import loop, schedule, sharding
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.state import create_state, make_model
from fastervit_jax.train.step import make_train_step
from tests.data import mini

CHANGES = {
    "batch_size": 64, "epochs": 2, "learning_rate": 2e-3, "warmup_epochs": 1, "log_every_steps": 4,
    "eval_every_epochs": 1, "model.dim": 4, "model.in_dim": 8, "model.depths": (1, 1, 1, 1),
}  # fmt: skip
FLAGS = [f"--config.{key}={value}" for key, value in CHANGES.items()]


def config(**changes) -> ConfigDict:
    config = digits.get_config()
    config.update_from_flattened_dict({**CHANGES, **changes})
    return config


IMAGENET_CHANGES = {
    "data.dir": str(mini.GOLDEN), "data.image_size": 64, "data.workers": 0, "batch_size": 8, "epochs": 2,
    "warmup_epochs": 1, "cooldown_epochs": 0, "log_every_steps": 1, "augment.mix_group": 4, "bn_group_size": 4,
    "learning_rate_batch": 8, "model.dim": 8, "model.in_dim": 8,
    "model.depths": (1, 1, 1, 1), "model.window_size": (2, 2, 2, 2), "model.ct_size": 1, "model.dtype": "float32",
}  # fmt: skip
IMAGENET_FLAGS = [f"--config.{key}={value}" for key, value in IMAGENET_CHANGES.items()]


def imagenet_config(**changes) -> ConfigDict:
    """The recipe of ImageNet, on the miniature in tests/golden."""
    config = imagenet.get_config()
    config.update_from_flattened_dict({**IMAGENET_CHANGES, **changes})
    return config


def parts(config: ConfigDict, mesh: jax.sharding.Mesh, make_state=create_state, steps_per_epoch: int = 10):
    """Model, state at step 0 (or `abstract_state`, which compiles nothing) and train step, as the loop makes them."""
    model = make_model(config)
    optimizer, rates = make_optimizer(config), schedule.make_schedule(config, steps_per_epoch)
    state = make_state(model, optimizer, config, mesh)
    total_steps = schedule.total_epochs(config) * steps_per_epoch
    return model, state, make_train_step(model, optimizer, rates, config, mesh, total_steps)


def batch_of_digits(step: int, size: int, mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Other digits each step, on the devices."""
    source = sources.digits("train", 64)
    records = [source[(step * size + i) % len(source)] for i in range(size)]
    batch = {name: np.stack([record[name] for record in records]) for name in ("image", "label")}
    return jax.device_put(batch | {"weight": np.ones(size, np.float32)}, sharding.over_batch(mesh))


class Stopped(Exception):
    """Raised in the middle of a run by `stopping`."""


class _Around:
    """A train step that is called as `call(step, state, batch)`, compiled ahead or not."""

    def __init__(self, step: Any, call: Callable):
        self.step, self.call = step, call

    def __call__(self, state, batch):
        return self.call(self.step, state, batch)

    def lower(self, *args):
        lowered = self.step.lower(*args)
        return types.SimpleNamespace(compile=lambda: _Around(lowered.compile(), self.call))


def around_steps(call: Callable) -> Callable:
    """For loop.make_train_step: it then makes steps that are called as `call(step, state, batch)`."""
    make_train_step = loop.make_train_step
    return lambda *args: _Around(make_train_step(*args), call)


@contextlib.contextmanager
def stopping(monkeypatch, after: int):
    """Training that is started within ends with Stopped after so many steps."""

    def call(step, state, batch):
        if int(state.step) == after:
            raise Stopped
        return step(state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", around_steps(call))
        with pytest.raises(Stopped):
            yield


@contextlib.contextmanager
def logged_compilations():
    """For `compilations`: those of all threads."""
    jax.config.update("jax_log_compiles", True)
    try:
        yield
    finally:
        jax.config.update("jax_log_compiles", False)


def compilations(caplog, function: str) -> int:
    """How often a function was compiled."""
    return sum(text.startswith(f"Finished XLA compilation of jit({function})") for text in caplog.messages)


def lines(workdir: pathlib.Path) -> list[dict]:
    """What the run wrote into metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
