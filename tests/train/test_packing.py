"""Packed states: exactly the same arrays, and the same training."""

import json
import threading
import weakref

import jax
import numpy as np
import pytest

from fastervit_jax.train import checkpoint, digest, loop, packing, sharding
from fastervit_jax.train.checkpoint import Checkpoints
from fastervit_jax.train.state import abstract_state
from tests.train import runs
from tests.train.damage import make_state

# Rounding differences grow with the learning rate.
CHANGES = {"ema_decay": 0.9, "bn_group_size": 16, "learning_rate": 5e-4}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, a, b)).count(False) == 0


@pytest.mark.parametrize("fsdp", [1, 4])
def test_what_is_packed_comes_back(monkeypatch, fsdp):
    mesh = sharding.make_mesh(fsdp=fsdp)
    _, state, _ = runs.parts(runs.config(**CHANGES), mesh)
    monkeypatch.setitem(packing.SMALL, "cpu", 3000)
    packs = packing.Packing(state)
    packed = packs.pack(state)
    assert len(packed) < len(jax.tree.leaves(state)) / 2
    same(packs.unpack(packed), state)
    large = [x for x in jax.tree.leaves(state) if x.size > 3000]
    assert large
    assert all(any(x is y for y in packed) for x in large)
    assert [x.sharding for x in packed] == packs.shardings
    stacked = [x for x in packed if not any(x is y for y in large)]
    assert any("fsdp" in x.sharding.spec for x in stacked) == (fsdp > 1)


def test_nothing_is_packed_on_a_cpu():
    _, state, _ = runs.parts(runs.config(), sharding.make_mesh(), abstract_state)
    packs = packing.Packing(state)
    assert packs.pack(state) is packs.unpack(state) is state


def test_checkpoints_do_not_depend_on_packing(monkeypatch, tmp_path):
    """What was saved packed has the same digests as what was not, and is restored either way."""
    mesh = sharding.make_mesh(fsdp=4)
    _, state, _ = runs.parts(runs.config(**CHANGES), mesh)
    monkeypatch.setitem(packing.SMALL, "cpu", 3000)
    packs = packing.Packing(state)

    def opened(packing):
        return Checkpoints(tmp_path, keep=3, keep_best=False, say=pytest.fail, packing=packing)

    with opened(packs) as checkpoints:
        checkpoints.save(packs.pack(state), 1)
        checkpoints.save(packs.pack(state), 2, wait=True)
        same(checkpoints.restore(digest.abstract(state))[0], state)
    with opened(None) as checkpoints:
        same(checkpoints.restore(digest.abstract(state))[0], state)
        checkpoints.save(state, 3, wait=True)
    with opened(packs) as checkpoints:
        restored, meta = checkpoints.restore(digest.abstract(state))
    same(restored, state)
    assert meta["step"] == 3
    digests = [json.loads((tmp_path / "checkpoints" / str(step) / "meta/metadata").read_text())["digests"]
               for step in (1, 2, 3)]
    assert digests[0] == digests[1] == digests[2]
    assert len(digests[0]) == len(jax.tree.leaves(state))


def test_spent_states_are_freed_when_nothing_is_saved(monkeypatch, tmp_path):
    """As a save goes on, what is spent is kept; then it goes, two states a step. There is a limit."""
    going_on = threading.Event()
    monkeypatch.setattr(checkpoint, "_write", lambda folder, items: going_on.wait(60))
    state = make_state(1, sharding.make_mesh())
    with Checkpoints(tmp_path, keep=1, keep_best=False, say=pytest.fail) as checkpoints:
        checkpoints.save(state, 1)
        spent = [jax.numpy.ones(i + 1) for i in range(checkpoint.SPENT + 3)]
        left = [weakref.ref(x) for x in spent]
        while spent:
            checkpoints.free(spent.pop(0))
        assert [x() is None for x in left] == [True] * 3 + [False] * checkpoint.SPENT
        going_on.set()
        checkpoints._saving.result()
        for count in (6, 8):  # the first one also takes the last place
            checkpoints.free(None)
            assert sum(x() is None for x in left) == count


def test_training_is_the_same(monkeypatch, tmp_path, caplog):
    """Stopped and going on, too: figures, evaluations and checkpoints are those of a run that packs nothing. Each time
    the step is compiled once."""
    config = runs.config(**CHANGES, **{"data.train_split": "train[:704]"})  # twice eleven steps
    loop.train(config, tmp_path / "plain")
    monkeypatch.setitem(packing.SMALL, "cpu", 2**16)
    batches = []

    def call(step, packed, batch):
        assert isinstance(packed, list)
        if len(batches) == 13:
            raise runs.Stopped
        batches.append(batch)
        return step(packed, batch)

    with runs.logged_compilations():
        with monkeypatch.context() as patch:
            patch.setattr(loop, "make_train_step", runs.around_steps(call))
            with pytest.raises(runs.Stopped):
                loop.train(config, tmp_path / "packed")
        loop.train(config, tmp_path / "packed")
    assert runs.compilations(caplog, "packed_step") == 2
    plain, packed = (runs.lines(tmp_path / name) for name in ("plain", "packed"))
    assert [line["step"] for line in plain] == [line["step"] for line in packed]
    for a, b in zip(plain, packed, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-3)
