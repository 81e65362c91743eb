"""PyTorch's files: what they hold is read exactly, and written exactly."""

import argparse
import collections
import math
import os
import pickle
import struct
import types
import zipfile

import jax
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.weights.torch_file import DTYPES, StoredArray, read_torch_file, write_torch_file
from tests.weights.torch_bytes import (
    FOUR,
    ORDERED_DICT,
    call,
    in_memory,
    mapping,
    named,
    number,
    numbers,
    program,
    storage,
    tensor,
    text,
)

# Values: 1.5 or the like by its bytes, for each dtype

VALUES = {
    "float64": ("000000000000f83f", 1.5), "float32": ("0000c03f", 1.5), "float16": ("003e", 1.5),
    "bfloat16": ("c03f", 1.5), "int64": ("feffffffffffffff", -2), "int32": ("feffffff", -2), "int16": ("feff", -2),
    "int8": ("fe", -2), "uint64": ("feffffffffffffff", 2**64 - 2), "uint32": ("feffffff", 2**32 - 2),
    "uint16": ("feff", 2**16 - 2), "uint8": ("fe", 254), "bool": ("01", True),
    "complex64": ("0000c03f000000c0", 1.5 - 2j), "complex128": ("000000000000f83f00000000000000c0", 1.5 - 2j),
    "float8_e4m3fn": ("3c", 1.5), "float8_e5m2": ("3e", 1.5), "float8_e4m3fnuz": ("44", 1.5),
    "float8_e5m2fnuz": ("42", 1.5), "float8_e8m0fnu": ("7e", 0.5),
}  # fmt: skip

TYPED = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip

SHAPES = {"vector": ((2,), (1,)), "number": ((), ()), "empty": ((0, 3), (3, 1))}


def check_values(array: StoredArray, dtype: str, shape: tuple[int, ...]):
    values = array.read()
    assert array.shape == values.shape == shape
    assert array.dtype == values.dtype
    assert array.dtype.name == dtype
    assert (values == np.full(shape, VALUES[dtype][1], values.dtype)).all()
    assert [complex(value) for value in values.reshape(-1)] == [complex(VALUES[dtype][1])] * math.prod(shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", TYPED)
def test_typed_storages(save, kind, shape):
    shape, strides = SHAPES[shape]
    one = bytes.fromhex(VALUES[TYPED[kind]][0])
    stored = storage(f"torch.{kind}", "0", 3)
    saved, _ = read_torch_file(save(program(tensor(stored, 1, shape, strides)), bytes(len(one)) + 2 * one))
    check_values(saved, TYPED[kind], shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", sorted({*VALUES, *DTYPES}))
def test_untyped_storages(save, dtype, shape):
    shape, strides = SHAPES[shape]
    one = bytes.fromhex(VALUES[dtype][0])
    stored = storage("torch.storage.UntypedStorage", "0", 3 * len(one))
    made = tensor(stored, 1, shape, strides, dtype=f"torch.{dtype}")
    saved, _ = read_torch_file(save(program(made), bytes(len(one)) + 2 * one))
    check_values(saved, dtype, shape)


def test_empty_storage(save):
    saved, _ = read_torch_file(save(program(tensor(storage(count=0), shape=(3, 0), strides=(1, 1))), b""))
    assert saved.read().shape == (3, 0)


TWELVE = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "expected"),
    [
        (0, (3, 4), (4, 1), TWELVE.reshape(3, 4)),
        (4, (2, 4), (4, 1), TWELVE.reshape(3, 4)[1:]),
        (0, (4, 3), (1, 4), TWELVE.reshape(3, 4).T),
        (1, (3, 2), (4, 2), TWELVE.reshape(3, 4)[:, 1::2]),
        (0, (3,), (5,), TWELVE.reshape(3, 4).diagonal()),
        (2, (5, 2), (0, 1), np.tile(TWELVE[2:4], (5, 1))),
        (11, (), (), TWELVE[11]),
        (11, (1, 1), (100, 7), TWELVE[11:].reshape(1, 1)),
        (0, (2, 2, 3), (6, 3, 1), TWELVE.reshape(2, 2, 3)),
    ],
)
def test_views(save, offset, shape, strides, expected):
    stored = storage(count=12)
    saved, _ = read_torch_file(save(program(tensor(stored, offset, shape, strides)), TWELVE.tobytes()))
    np.testing.assert_array_equal(saved.read(), expected, strict=True)
    old = call("torch._utils._rebuild_tensor", stored, number(offset), numbers(shape), numbers(strides))
    saved, _ = read_torch_file(save(program(old), TWELVE.tobytes()))
    np.testing.assert_array_equal(saved.read(), expected, strict=True)


def test_arrays_are_views_of_the_mapped_file(save):
    made = {"whole": tensor(storage(count=12), 0, (12,), (1,)), "part": tensor(storage(count=12), 4, (2, 2), (1, 2)),
            "other": tensor(storage(key="1"))}
    saved, _ = read_torch_file(save(program(mapping(made)), TWELVE.tobytes(), FOUR.tobytes()))
    whole, part, other = (saved[name].read() for name in made)
    assert np.shares_memory(whole, saved["whole"].read())
    assert np.shares_memory(whole, part)
    assert not np.shares_memory(whole, other)
    assert not whole.flags.writeable
    assert not part.flags.writeable
    saved["whole"].release()
    np.testing.assert_array_equal(whole, TWELVE)
    np.testing.assert_array_equal(saved["whole"].read(), TWELVE)


def test_parameters(save):
    new = call("torch._utils._rebuild_parameter", tensor(), b"\x88", ORDERED_DICT)
    stateful = call("torch._utils._rebuild_parameter_with_state", tensor(), b"\x88", ORDERED_DICT, mapping({}))
    saved, _ = read_torch_file(save(program(mapping({"a": new, "b": stateful}))))
    for name in "ab":
        np.testing.assert_array_equal(saved[name].read(), FOUR, strict=True)


def test_ordered_dict_with_metadata(save):
    metadata = mapping({"_metadata": mapping({"": mapping({"version": number(1)})}, ORDERED_DICT)})
    saved, _ = read_torch_file(save(program(mapping({"b": tensor(), "a": tensor()}, ORDERED_DICT) + metadata + b"b")))
    assert type(saved) is collections.OrderedDict
    assert list(saved) == ["b", "a"]


@pytest.mark.parametrize("name", ["argparse.Namespace", "types.SimpleNamespace"])
@pytest.mark.parametrize("made", [b")\x81", b")R"])
def test_namespaces(save, name, made):
    saved, _ = read_torch_file(save(program(named(name) + made + mapping({"lr": number(3), "w": tensor()}) + b"b")))
    assert saved.lr == 3
    np.testing.assert_array_equal(saved.w.read(), FOUR)


def test_sizes_and_devices(save):
    made = {"size": call("torch.Size", numbers((2, 3))), "device": call("torch.device", text("cuda"), number(1)),
            "dtype": named("torch.bfloat16")}
    saved, _ = read_torch_file(save(program(mapping(made))))
    assert saved == {"size": (2, 3), "device": "cuda:1", "dtype": DTYPES["bfloat16"]}


PLAIN = {
    "numbers": [0, 1, -1, 255, 256, 65535, 65536, 2**31 - 1, -(2**31), 2**40, -(10**30), 7**1000, 1.5, -0.0, math.inf],
    "texts": ["", "é", "x" * 300, "\ud800", "\0"], "constants": [None, True, False],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)], "nested": {"a": {"b": [{}, [], [[1]]]}},
    "many": list(range(3000)), "dicts": {str(n): n for n in range(3000)}, 3: "a number as key", None: 1, 2.5: 2,
}  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_of_every_protocol(save, protocol):
    again = ["the same"]
    value = {**PLAIN, "again": [again, again], "bytes": b"xy" * 200 if protocol > 2 else None,
             "sets": [set(), {1, "two"}] if protocol > 3 else None}
    saved, note = read_torch_file(save(pickle.dumps(value, protocol)))
    assert saved == value
    assert repr(saved) == repr(value)  # 1, 1.0 and True are equal
    assert saved["again"][0] is saved["again"][1]
    assert note == {}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_named_objects_of_every_protocol(save, protocol):
    value = [collections.OrderedDict(b=1, a=[2]), argparse.Namespace(lr=0.5, opt="lamb"),
             types.SimpleNamespace(lr=0.5, opt="lamb")]
    (ordered, *namespaces), _ = read_torch_file(save(pickle.dumps(value, protocol)))
    assert list(ordered.items()) == [("b", 1), ("a", [2])]
    assert [vars(namespace) for namespace in namespaces] == [{"lr": 0.5, "opt": "lamb"}] * 2


# Our own files


BITS = np.array([0x7FC00001, 0xFFA00000, 0x7F800000, 0xFF800000, 0x80000000, 1, 0x3F800000], np.uint32)
ARRAYS = {
    "weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "bits": BITS.view(np.float32),
    "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T, "strided": np.arange(10, dtype=np.float32)[::3],
    "reversed": np.arange(3, dtype=np.float32)[::-1][:1], "number": np.array(2.5, np.float32),
    "count": np.array(-(2**63), np.int64), "empty": np.zeros((0, 3), np.float32), "none": np.zeros((2, 0), np.int64),
    "ünï.cödé": np.array([2**63 - 1, -1], np.int64),
}  # fmt: skip


def test_round_trip(tmp_path):
    path = tmp_path / "ours.pth"
    write_torch_file(path, ((name, in_memory(values)) for name, values in ARRAYS.items()), {"said": ["ä", 1]})
    saved, note = read_torch_file(path)
    assert note == {"said": ["ä", 1]}
    assert list(saved) == list(ARRAYS)
    for name, values in ARRAYS.items():
        assert saved[name].dtype == values.dtype
        assert saved[name].read().shape == saved[name].shape == values.shape
        assert saved[name].read().tobytes() == values.tobytes()
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        for entry in opened.infolist():
            header = path.read_bytes()[entry.header_offset :][:30]
            assert (entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))) % 64 == 0
            assert entry.filename.startswith("archive/")
    assert os.listdir(tmp_path) == ["ours.pth"]


def test_failed_write_leaves_the_old_file(tmp_path):
    def read():
        raise RuntimeError("no values")

    path = tmp_path / "ours.pth"
    path.write_bytes(b"old")
    arrays = [("a", in_memory(FOUR)), ("b", StoredArray((4,), FOUR.dtype, read))]
    with pytest.raises(RuntimeError, match="no values"):
        write_torch_file(path, arrays, {})
    assert os.listdir(tmp_path) == ["ours.pth"]
    assert path.read_bytes() == b"old"


def test_files_of_all_kinds_load_the_same(files, model):
    loaded = {name: fv.from_pretrained(path) for name, path in files.items()}
    assert loaded["ours.pth"][0].config == loaded["ours.safetensors"][0].config == model.config
    for _, variables in loaded.values():
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True),
                     variables, loaded["ours.pth"][1])
