"""Packed states: exactly the same arrays, and the same training."""

import jax
import numpy as np
import pytest

from fastervit_jax.train import loop, packing, sharding
from fastervit_jax.train.state import abstract_state
from tests.train import runs

CHANGES = {"ema_decay": 0.9, "bn_group_size": 16}


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


def test_training_is_the_same(monkeypatch, tmp_path):
    """Stopped and going on, too: figures, evaluations and checkpoints are those of a run that packs nothing."""
    config = runs.config(**CHANGES)
    loop.train(config, tmp_path / "plain")
    monkeypatch.setitem(packing.SMALL, "cpu", 2**16)
    make_train_step, batches = loop.make_train_step, []

    def make_stopping_step(*args):
        train_step = make_train_step(*args)

        def step(packed, batch):
            assert isinstance(packed, list)
            if len(batches) == 25:
                raise runs.Stopped
            batches.append(batch)
            return train_step(packed, batch)

        step.lower = train_step.lower
        return step

    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_train_step", make_stopping_step)
        with pytest.raises(runs.Stopped):
            loop.train(config, tmp_path / "packed")
    loop.train(config, tmp_path / "packed")
    plain, packed = (runs.lines(tmp_path / name) for name in ("plain", "packed"))
    assert [line["step"] for line in plain] == [line["step"] for line in packed]
    for a, b in zip(plain, packed, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=2e-3)
