"""What the tests of files share."""

import importlib
import math
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.weights import pretrained
from tests.official import official_weights
from tests.weights.torch_bytes import (
    FOUR,
    ORDERED_DICT,
    Record,
    archive,
    in_memory,
    mapping,
    named,
    number,
    numbers,
    program,
    storage,
    tensor,
    text,
    torch_records,
)


@pytest.fixture
def save(tmp_path):
    """Write a file of a pickle and storages (by default four numbers), or of records; gives its path."""

    def write(pickled: bytes | list[Record], *storages: bytes):
        if isinstance(pickled, bytes):
            pickled = torch_records(pickled, *(storages or (FOUR.tobytes(),)))
        path = tmp_path / "file.pth"
        path.write_bytes(archive(pickled))
        return path

    return write


@pytest.fixture(scope="module")
def plain():
    """The package as users import it. In the tests' own, calls with wrong types end before the code sees them."""

    def ours():
        return [name for name in sys.modules if name.partition(".")[0] == "fastervit_jax"]

    checked, finders = {name: sys.modules.pop(name) for name in ours()}, list(sys.meta_path)
    sys.meta_path[:] = [finder for finder in finders if not type(finder).__module__.startswith("jaxtyping")]
    try:
        weights = {name: importlib.import_module(f"fastervit_jax.weights.{name}")
                   for name in ("torch_file", "sources", "pretrained")}
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(checked)
        sys.meta_path[:] = finders
    return types.SimpleNamespace(**{name: value for module in weights.values() for name, value in vars(module).items()})


# Files of a whole small model


@pytest.fixture(scope="module")
def model():
    return fv.create_model("testing", dim=2, in_dim=2, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), num_classes=3)


@pytest.fixture(scope="module")
def weights(model):
    """Its arrays by official name."""
    return official_weights(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))))


@pytest.fixture(scope="module")
def files(model, weights, tmp_path_factory):
    """The same weights in a .pth and a .safetensors file of ours, and in one that looks like an official checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    arrays = {name: in_memory(values) for name, values in weights.items()}
    paths = {name: folder / name for name in ("ours.pth", "ours.safetensors", "official.pth.tar")}
    for name in ("ours.pth", "ours.safetensors"):
        pretrained.write(paths[name], model.config, arrays, resolution=128)
    paths["official.pth.tar"].write_bytes(archive(official_like(weights)))
    return paths


def official_like(weights: dict[str, np.ndarray]) -> list[Record]:
    """A training checkpoint, as timm's script writes them: all weights lie in one storage."""
    count, state = sum(values.size for values in weights.values()), {}
    offset = 0
    for name, values in weights.items():
        strides = [math.prod(values.shape[axis + 1 :]) for axis in range(values.ndim)]
        state[f"module.{name}"] = tensor(storage(count=count), offset, values.shape, strides)
        offset += values.size
    state["module.norm.num_batches_tracked"] = tensor(storage("torch.LongStorage", "1", 1), 0, (), ())
    metadata = mapping({"_metadata": ORDERED_DICT})
    group_of = mapping({"lr": b"G" + struct.pack(">d", 0.005), "betas": numbers((9, 99)), "params": b"](K\0K\1e"})
    untyped = tensor(storage("torch.storage.UntypedStorage", "2", 8), 0, (4,), (1,), dtype="torch.bfloat16")
    step = b"}(K\0" + mapping({"step": number(3), "exp_avg": untyped}) + b"u"
    saved = {
        "epoch": number(299), "arch": text("faster_vit_0_224"),
        "state_dict": mapping(state, ORDERED_DICT) + metadata + b"b",
        "optimizer": mapping({"state": step, "param_groups": b"]" + group_of + b"a"}), "version": number(2),
        "args": named("argparse.Namespace") + b")\x81" + mapping({"lr": number(1), "mean": b"N"}) + b"b",
        "metric": b"G" + struct.pack(">d", 82.1),
    }  # fmt: skip
    storages = [np.concatenate([values.reshape(-1) for values in weights.values()]).tobytes(), bytes(8), bytes(8)]
    return torch_records(program(mapping(saved)), *storages)
