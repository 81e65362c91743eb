"""Digests: the same however arrays lie, and another after every change."""


import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fastervit_jax.train import digest, sharding
from tests.train.damage import make_state


def mixed(x):
    x = x.astype(np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return x ^ (x >> np.uint64(16))


def expected_digest(x):
    """In plain NumPy: two sums over values and their places in the whole array."""
    x = np.ascontiguousarray(x)
    words = x.ravel().view(f"u{x.itemsize}").astype(np.uint64)
    keys = mixed((np.arange(words.size, dtype=np.uint64) + np.uint64(0x9E3779B9)) & np.uint64(0xFFFFFFFF))
    first = mixed(words ^ keys)
    second = mixed((first + np.uint64(0x85EBCA6B)) & np.uint64(0xFFFFFFFF))
    return "".join(f"{int(x.sum()) & 0xFFFFFFFF:08x}" for x in (first, second))


def digests(tree):
    compiled = digest.Digests(tree)
    found = compiled.read(compiled.start(tree))
    assert len(found) == len(jax.tree.leaves(tree)[0].sharding.device_set)
    assert all(texts == found[0] for texts in found)
    return found[0]


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 8), (2, 4), (4, 2)])
def test_digests_are_the_same_however_arrays_lie(shape, monkeypatch):
    mesh = sharding.make_mesh(jax.devices()[:shape[0] * shape[1]], data=shape[0], fsdp=shape[1])
    state = make_state(3, mesh)
    expected = {name: expected_digest(np.asarray(x))
                for name, x in zip(digest.names(state), jax.tree.leaves(state), strict=True)}
    assert len(set(expected.values())) == 40  # some scalars, and arrays of ones, are the same
    assert digests(state) == expected
    if shape == (2, 4):
        both = NamedSharding(mesh, PartitionSpec("fsdp", "data"))
        kernel = jax.device_put(state.params["layer_0"]["kernel"], both)
        assert digests({"kernel": kernel})["kernel"] == expected["params/layer_0/kernel"]
        monkeypatch.setattr(digest, "AT_ONCE", 1000)  # in many programs
        assert digests(state) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32, np.uint32, np.int8, np.bool_])
def test_digests_see_every_change(dtype):
    x = np.random.default_rng(0).integers(0, 2, (4, 6)).astype(dtype)
    x[0, :2] = 0, 1
    changed = {"one value": x.copy(), "swapped": x.copy(), "moved": np.roll(x, 1, axis=0), "turned": x.T.copy()}
    changed["one value"][2, 3] = ~x[2, 3] if dtype == np.bool_ else x[2, 3] + dtype(1)
    changed["swapped"][0, :2] = 1, 0
    if np.dtype(dtype).kind in "fV":
        word = f"u{x.itemsize}"
        changed |= {name: x.copy() for name in ("minus zero", "nan", "another nan")}
        changed["minus zero"][0, 0] = -0.0
        changed["nan"][0, 0] = np.nan
        changed["another nan"][0, 0] = np.nan
        changed["another nan"].view(word)[0, 0] += 1
    arrays = jax.tree.map(jnp.asarray, {"x": x, **changed})
    found = digests(arrays)
    assert len(set(found.values())) == len(found)
    assert found == {name: expected_digest(np.asarray(x)) for name, x in arrays.items()}


def test_no_digest_of_what_has_more_bytes():
    with pytest.raises(TypeError, match="state/key has dtype key<fry>: expected numbers or bools of at most 4 bytes"):
        digest.Digests({"state": {"key": jax.random.key(0)}})
