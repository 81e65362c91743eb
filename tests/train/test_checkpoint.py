"""Checkpoints: what comes back is what was saved, and nothing that happens to the files gives anything else."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastervit_jax.train import checkpoint, digest, sharding
from fastervit_jax.train.checkpoint import CheckpointError, Checkpoints
from tests.train.damage import folders, make_state, same

ROOT = pathlib.Path(__file__).parents[2]
FSDP = sharding.make_mesh(data=2, fsdp=4)


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    """A workdir with steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, keep=3, keep_best=True, say=pytest.fail) as checkpoints:
        checkpoints.save(states[1], 1, acc1=0.25)
        checkpoints.save(states[2], 2, extra={"note": [1.5]})
    return workdir


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


def rewrite(path, **changes):
    """Meta that is whole, but other than it was."""
    meta = json.loads(path.read_text())
    del meta["checksum"]
    meta |= changes
    path.write_text(json.dumps({**meta, "checksum": checkpoint._checksum(meta)}))


# What comes back


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (8, 1), (1, 8)])
def test_restored_on_other_devices(shape, saved, states):
    mesh = sharding.make_mesh(jax.devices()[:shape[0] * shape[1]], data=shape[0], fsdp=shape[1])
    target = digest.abstract(make_state(0, mesh))
    with Checkpoints(saved, keep=3, keep_best=True, say=pytest.fail) as checkpoints:
        state, meta = checkpoints.restore(target)
    assert same(state, states[2])
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(target), strict=True))
    assert (meta["step"], meta["acc1"], meta["extra"]) == (2, None, {"note": [1.5]})
    assert len(meta["digests"]) == len(jax.tree.leaves(state)) == 43


def test_without_averages(opened, states, tmp_path):
    state = states[1].replace(ema=None)
    with opened() as checkpoints:
        assert checkpoints.restore(state) is None
        checkpoints.save(state, 1)
        assert same(checkpoints.restore(state)[0], state)
        with pytest.raises(CheckpointError, match=r"1 has other arrays: 32, expected 43; of these it lacks ema/"):
            checkpoints.restore(states[1])
        checkpoints.save(states[2], 2)
        with pytest.raises(CheckpointError, match="2 has other arrays: 43, expected 32; of these it lacks none"):
            checkpoints.restore(state)
    assert folders(tmp_path) == ["1", "2"]


def test_state_may_be_donated_at_once(opened, states):
    """The copies have every bit of it, those of NaNs too."""
    train = jax.jit(lambda state: jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, state), donate_argnums=0)
    state = jax.tree.map(jnp.copy, states[1])
    with opened() as checkpoints:
        for step in (1, 2):
            checkpoints.save(state, step)
            state = train(state)
    with opened() as checkpoints:
        assert same(checkpoints.restore(states[1])[0], train(jax.tree.map(jnp.copy, states[1])))


def test_states_that_lie_otherwise_than_the_first(opened, states):
    """Say one that was given new weights: slower, but right."""
    whole = jax.device_put(states[3], sharding.replicated(FSDP))
    with opened() as checkpoints:
        checkpoints.restore(states[1])
        checkpoints.save(states[2], 2)
        checkpoints.save(whole, 3)
    with opened() as checkpoints:
        assert same(checkpoints.restore(states[1])[0], states[3])


def test_what_is_kept(opened, states, tmp_path):
    accuracies = {1: 0.5, 2: 0.7, 3: 0.7, 4: float("nan"), 5: None}
    kept = {1: ["1"], 2: ["1", "2"], 3: ["2", "3"], 4: ["2", "3", "4"], 5: ["2", "4", "5"]}
    with opened(keep=2) as checkpoints:
        assert checkpoints.best is checkpoints.latest is None
        for step, acc1 in accuracies.items():
            assert checkpoints.is_best(acc1) == (step in (1, 2))
            checkpoints.save(states[step], step, acc1=acc1)
            checkpoints._wait()
            assert folders(tmp_path) == kept[step]
            assert checkpoints.latest == step
            assert checkpoints.best == {"step": min(step, 2), "acc1": accuracies[min(step, 2)]}
    with opened(keep=1) as checkpoints:  # resumed
        assert checkpoints.latest == 5
        assert checkpoints.restore(states[1])[1]["step"] == 5
        assert checkpoints.best == {"step": 2, "acc1": 0.7}
        before = (tmp_path / "checkpoints" / "5" / "meta" / "metadata").stat()
        checkpoints.save(states[5], 5, wait=True)
        assert (tmp_path / "checkpoints" / "5" / "meta" / "metadata").stat() == before
        checkpoints.save(states[1], 6, acc1=0.6)
        checkpoints._wait()
        assert folders(tmp_path) == ["2", "6"]
        checkpoints.save(states[1], 7, acc1=0.8)
    assert folders(tmp_path) == ["7"]
    with opened(keep=1, keep_best=False) as checkpoints:
        checkpoints.save(states[1], 8, acc1=0.1)
    assert folders(tmp_path) == ["8"]


def test_evaluated_after_it_was_saved(opened, states, told, monkeypatch):
    with opened() as checkpoints:
        checkpoints.save(states[1], 1, extra="not evaluated")
        checkpoints.evaluated(1, 0.5, "evaluated")
        assert checkpoints.best == {"step": 1, "acc1": 0.5}
        assert not checkpoints.is_best(0.5)
        assert not told
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_change_meta", failing)
            checkpoints.evaluated(1, 0.75, "again")
        assert told == ["the evaluation of step 1 could not be noted in its checkpoint (OSError: [Errno 28] No space "
                        "left on device); a run that goes on from there does it again"]
    with opened() as checkpoints:
        state, meta = checkpoints.restore(states[2])
        assert same(state, states[1])
        assert checkpoints.best == meta["best"] == {"step": 1, "acc1": 0.5}
        assert (meta["acc1"], meta["extra"]) == (0.5, "evaluated")


def test_restored_variables(saved, states, tmp_path, told):
    abstract = jax.eval_shape(lambda: states[2].variables)
    for ema, expected in ((False, states[2].variables), (True, states[2].ema)):
        for lie in (sharding.replicated(FSDP), sharding.shardings(abstract, FSDP)):
            step, variables = checkpoint.restore_variables(saved, abstract, lie, ema=ema, say=pytest.fail)
            assert step == 2
            assert same(variables, expected)
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    next((tmp_path / "checkpoints" / "2" / "variables").rglob("d/*")).write_bytes(b"")
    lie = sharding.replicated(FSDP)
    step, variables = checkpoint.restore_variables(tmp_path, abstract, lie, ema=True, say=told.append)
    assert step == 1
    assert same(variables, states[1].ema)
    assert len(told) == 1
    assert "the checkpoint of step 2 is damaged (ValueError: variables/" in told[0]
    assert "has 0 bytes, expected " in told[0]
    assert "took the one of step 1" in told[0]
    assert folders(tmp_path) == ["1", "2"]
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*none/checkpoints: expected a workdir"):
        checkpoint.restore_variables(tmp_path / "none", abstract, lie, ema=False, say=pytest.fail)
    assert not (tmp_path / "none").exists()


# Damage


def first_digest_changed(meta):
    meta_digests = json.loads(meta.read_text())["digests"]
    rewrite(meta, digests={**meta_digests, "params/scale": "0" * 16})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (first_digest_changed, "1 of 43 arrays do not have the digest that was saved: params/scale"),
        (lambda meta: meta.write_text(meta.read_text().replace('"acc1": null', '"acc1": 9999')), "the checksum"),
        (lambda meta: meta.unlink(), "FileNotFoundError"),
        (lambda meta: rewrite(meta, step=3), "it holds step 3"),
        (lambda meta: rewrite(meta, version=2), "its format is of version 2, expected 1"),
        (lambda meta: shutil.rmtree(meta.parents[1] / "ema"), r"ema/\S* is missing, expected"),
    ],
)
def test_older_step_instead_of_a_damaged_one(damage, reason, opened, states, copied, tmp_path, told):
    damage(tmp_path / "checkpoints" / "2" / "meta" / "metadata")
    with opened() as checkpoints:
        assert checkpoints.latest == 2
        state, meta = checkpoints.restore(states[5])
        assert meta["step"] == checkpoints.latest == 1
        assert same(state, states[1])
        assert len(told) == 1
        assert re.fullmatch(
            rf"the checkpoint of step 2 is damaged \(.*{reason}.*\): it is set aside as \S*checkpoints/damaged_2, and "
            r"the run goes on after step 1", told[0])
        assert folders(tmp_path) == ["1", "damaged_2"]
        assert checkpoints.best == {"step": 1, "acc1": 0.25}
        checkpoints.save(states[3], 2)
        assert same(checkpoints.restore(states[5])[0], states[3])
    assert folders(tmp_path) == ["1", "2", "damaged_2"]
    assert len(told) == 1


def test_no_start_from_nothing_when_all_are_damaged(opened, states, copied, tmp_path):
    for step in ("1", "2"):
        (tmp_path / "checkpoints" / step / "optimizer" / "manifest.ocdbt").unlink()
    for _ in range(2):  # nothing has changed
        with opened() as checkpoints, pytest.raises(CheckpointError) as error:
            checkpoints.restore(states[1])
        first, *rest = str(error.value).split("\n")
        assert "can be used; expected one that is whole: put back its files, or remove the folder" in first
        assert [line.partition(":")[0] for line in rest] == ["  step 2", "  step 1"]
        assert all("optimizer/manifest.ocdbt is missing" in line for line in rest)
        assert folders(tmp_path) == ["1", "2"]


def test_damaged_files():
    """Bits flipped, files cut off, lost and zeroed; in a process of its own, since orbax's reads that fail complain
    later, in their threads."""
    command = [sys.executable, "-m", "tests.train.damage", "--cases=16", "--seed=1000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *cases, summary = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 0, done.stderr
    assert summary == {"cases": 16, "failures": 0}
    assert sum(case["result"] == "older" for case in cases) >= 12


# Saves that fail


@pytest.mark.parametrize("broken", ["_write", "_finish"])
def test_save_that_fails(broken, opened, states, tmp_path, told, monkeypatch):
    with opened(keep=2) as checkpoints:
        checkpoints.save(states[1], 1, acc1=0.1)
        checkpoints._wait()
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, broken, failing)
            checkpoints.save(states[2], 2, acc1=0.5)
            checkpoints._wait()
        assert told == ["the save of step 2 failed (OSError: [Errno 28] No space left on device); nothing of it is "
                        "kept. The newest checkpoint is that of step 1"]
        assert folders(tmp_path) == ["1"]
        assert checkpoints.latest == 1
        assert checkpoints.best == {"step": 2, "acc1": 0.5}
        checkpoints.save(states[2], 2)
        checkpoints.save(states[3], 3)
    assert len(told) == 1
    assert folders(tmp_path) == ["1", "2", "3"]  # of those that are there, step 1 is the best
    with opened() as checkpoints:
        assert same(checkpoints.restore(states[1])[0], states[3])


def test_part_that_cannot_be_written(monkeypatch):
    """Raised, after all the others are written."""
    waited = []

    def part(name, error):
        def result():
            waited.append(name)
            if error:
                raise error

        return types.SimpleNamespace(result=result)

    class Handler:
        async def async_save(self, folder, args):
            return [part(f"{folder.name} 1", OSError(folder.name) if folder.name == "ema" else None),
                    part(f"{folder.name} 2", None)]

    monkeypatch.setattr(checkpoint, "_handler", Handler)
    items = {"variables": {"x": 1}, "ema": {"x": 1}, "optimizer": {"x": 1}}
    with pytest.raises(OSError, match="ema"):
        checkpoint._write(pathlib.Path("folder"), items)
    assert waited == [f"{item} {i}" for item in ("variables", "ema", "optimizer") for i in (1, 2)]
    assert not items


def failing(*_):
    raise OSError(28, "No space left on device")


def half_removed(path):
    (path / "optimizer" / "manifest.ocdbt").unlink()
    failing()


def test_last_save_is_tried_twice(opened, states, tmp_path, told, monkeypatch):
    tries, write = [], checkpoint._write

    def failing_once(*arguments):
        tries.append(arguments)
        if len(tries) == 1:
            failing()
        write(*arguments)

    with opened() as checkpoints:
        monkeypatch.setattr(checkpoint, "_write", failing_once)
        checkpoints.save(states[1], 1, wait=True)
        assert folders(tmp_path) == ["1"]
        assert len(told) == 2
        assert "the save of step 1 failed" in told[0]
        assert "The newest checkpoint is none" in told[0]
        assert told[1] == "the save of step 1 is tried once more"
        monkeypatch.setattr(checkpoint, "_write", failing)
        with pytest.raises(CheckpointError, match="step 2 could not be saved, in two tries: OSError"):
            checkpoints.save(states[2], 2, wait=True)
    assert folders(tmp_path) == ["1"]


def test_old_step_that_cannot_be_removed(opened, states, tmp_path, told, monkeypatch):
    with opened(keep=1) as checkpoints:
        checkpoints.save(states[1], 1, wait=True)
        monkeypatch.setattr(checkpoint.shutil, "rmtree", half_removed)
        checkpoints.save(states[2], 2, wait=True)
        monkeypatch.undo()
    assert len(told) == 1
    assert "step 1, which is to be kept no longer, could not be removed: OSError" in told[0]
    assert folders(tmp_path) == ["1.orbax-checkpoint-tmp-old", "2"]  # it is no step any more
    with opened(keep=1) as checkpoints:
        assert checkpoints.restore(states[1])[1]["step"] == 2
        checkpoints.save(states[3], 3)
    assert folders(tmp_path) == ["3"]


def test_the_copy_is_given_up_when_it_is_written(opened, states, monkeypatch):
    write, finish, live = checkpoint._write, checkpoint._finish, []

    def then(function, *args):
        live.append(sum(x.nbytes for x in jax.live_arrays()))
        return function(*args)

    monkeypatch.setattr(checkpoint, "_write", lambda *args: then(write, *args))
    monkeypatch.setattr(checkpoint, "_finish", lambda *args: then(finish, *args))
    with opened() as checkpoints:
        checkpoints.save(states[1], 1)
    assert live[0] - live[1] == sum(x.nbytes for x in jax.tree.leaves(states[1]))


def test_no_room_for_a_copy(opened, states, told, monkeypatch):
    monkeypatch.setattr(checkpoint, "has_room", lambda state: False)
    with opened() as checkpoints:
        for step in (1, 2):
            checkpoints.save(states[step], step)
            assert checkpoints._saving is None  # it has waited
        assert told == ["the devices have no room for a copy of the training state: training waits for each save"]
        assert same(checkpoints.restore(states[1])[0], states[2])


@pytest.mark.parametrize(
    ("memory", "room"),
    [
        (None, True),  # a CPU says nothing
        ({"peak_bytes_in_use": 1000, "bytes_limit": 1400}, True),
        ({"peak_bytes_in_use": 1001, "bytes_limit": 1400}, False),
    ],
)
def test_room_for_a_copy(memory, room):
    class Device:
        def memory_stats(self):
            return memory

    device = Device()
    shard = types.SimpleNamespace(device=device, data=np.zeros(50, np.float32))
    array = types.SimpleNamespace(addressable_shards=[shard])
    assert checkpoint.has_room([array, array]) == room
