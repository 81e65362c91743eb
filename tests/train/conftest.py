"""What the tests of checkpoints share."""

import pytest

from fastervit_jax.train import sharding
from fastervit_jax.train.checkpoint import Checkpoints
from tests.train.damage import make_state


@pytest.fixture(scope="module")
def states():
    return {step: make_state(step, sharding.make_mesh(data=2, fsdp=4)) for step in range(1, 6)}


@pytest.fixture
def told():
    return []


@pytest.fixture
def opened(tmp_path, told):
    """Opens the checkpoints of a run."""

    def open_(keep=3, keep_best=True):
        return Checkpoints(tmp_path, keep=keep, keep_best=keep_best, say=told.append)

    return open_
