"""Where arrays lie, and that it changes nothing: data, fsdp, both, and one device compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fastervit_jax.train import sharding
from fastervit_jax.train.state import abstract_state
from tests.train import runs

# All that the devices have to agree on: averages, MESA, LAMB's norms, statistics of groups, parts of a batch.
# Arrays of a smaller model are not divided.
CHANGES = {"model.dim": 8, "ema_decay": 0.9, "mesa": 1.0, "mesa_start_ratio": 0.1, "optimizer": "lamb",
           "learning_rate": 5e-3, "bn_group_size": 16, "accumulate": 2, "remat": (False, True, True, False),
           "augment.flip": 0.5}
STEPS = 6


def started(devices: int, fsdp: int, state=None):
    """State, train step and mesh on so many devices; from the given state's values."""
    mesh = sharding.make_mesh(jax.devices()[:devices], fsdp=fsdp)
    config = runs.config(**CHANGES)
    if state is None:
        _, state, train_step = runs.parts(config, mesh)
    else:
        _, abstract, train_step = runs.parts(config, mesh, abstract_state)
        state = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), state, abstract)
    return state, train_step, mesh


def trained(state, train_step, mesh):
    """The state after some steps, and the figures of each."""
    figures = []
    for step in range(STEPS):
        state, metrics = train_step(state, runs.batch_of_digits(step, 64, mesh))
        figures.append(jax.device_get(metrics))
    assert train_step._cache_size() == 1
    return state, figures


@pytest.fixture(scope="module")
def alone():
    """On one device: the first state, and what becomes of it."""
    state, train_step, mesh = started(1, 1)
    first = jax.device_get(state)
    return first, *trained(state, train_step, mesh)


@pytest.mark.parametrize("fsdp", [1, 8, 4])
def test_every_mesh_computes_the_same(fsdp, alone):
    first, last, expected = alone
    state, figures = trained(*started(8, fsdp, first))
    for step, (here, there) in enumerate(zip(figures, expected, strict=True)):
        assert set(here) == set(there)
        for name in ("loss", "mesa", "gradient_norm", "parameter_norm"):
            np.testing.assert_allclose(here[name], there[name], rtol=1e-4, atol=1e-6, err_msg=f"{name}, step {step}")
    assert figures[-1]["mesa"] > 0
    for here, there in zip(jax.tree.leaves(state.ema), jax.tree.leaves(last.ema), strict=True):
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-4)


def test_an_eighth_of_the_bytes_on_each_device(alone):
    """Of parameters, optimiser state and averages, read from the arrays, whose values are those on one device."""
    state, _, mesh = started(8, 8)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), alone[0])
    for tree in (state.params, state.opt_state, state.ema):
        arrays = jax.tree.leaves(tree)
        there = [sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards if shard.device == device)
                 for device in mesh.devices.flat]
        assert len(set(there)) == 1
        whole = sum(x.nbytes for x in arrays)
        # Vectors and small kernels are whole on each device: 5 % of this small model, 0.3 % of FasterViT-0.
        assert whole / 8 <= there[0] <= whole / 8 + 0.05 * whole


def test_rules():
    mesh = sharding.make_mesh(fsdp=4)
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in {
        "kernel": (3, 3, 64, 128), "square": (64, 64), "first": (256, 6), "odd": (63, 65), "small": (8, 8),
        "vector": (4096,), "number": ()}.items()}
    assert {name: x.spec for name, x in sharding.shardings(tree, mesh).items()} == {
        "kernel": PartitionSpec(None, None, None, "fsdp"), "square": PartitionSpec(None, "fsdp"),
        "first": PartitionSpec("fsdp"), "odd": PartitionSpec(), "small": PartitionSpec(), "vector": PartitionSpec(),
        "number": PartitionSpec()}
    split, whole = 9 * 64 * 128 + 64 * 64 + 256 * 6, 63 * 65 + 64 + 4096 + 1
    text = sharding.describe(tree, mesh)
    assert "mesh: data=2, fsdp=4" in text
    assert f"fsdp divides: 3 arrays, {split:,} values, {split / 2**20:.1f} MiB a device" in text
    assert f"on each device: 4 arrays, {whole:,} values, {4 * whole / 2**20:.1f} MiB a device" in text


@pytest.mark.parametrize(("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, -1, (2, 4)), (4, 2, (4, 2))])
def test_mesh(data, fsdp, shape):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.flatten().tolist() == jax.devices()


@pytest.mark.parametrize(("data", "fsdp"), [(-1, 3), (4, 1), (16, -1)])
def test_a_mesh_that_does_not_fit(data, fsdp):
    with pytest.raises(ValueError, match=rf"data={data}, config.mesh.fsdp={fsdp}: there are 8 devices; expected"):
        sharding.make_mesh(data=data, fsdp=fsdp)


@pytest.mark.parametrize(("data", "fsdp"), [(-1, -1), (0, 1), (1, -2)])
def test_a_mesh_that_cannot_be(data, fsdp):
    with pytest.raises(ValueError, match="expected two numbers of devices of at least 1, one of which may be -1"):
        sharding.make_mesh(data=data, fsdp=fsdp)
