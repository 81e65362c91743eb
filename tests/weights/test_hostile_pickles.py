"""Pickles that would run something, lie or take much memory end in a WeightsError that says so, and nothing else."""

import pickle
import re
import struct

import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.weights.torch_file import LARGEST_PICKLE, WeightsError, read_torch_file
from tests.weights.torch_bytes import (
    FOUR,
    ORDERED_DICT,
    TEN_GB,
    call,
    deep,
    group,
    laughs,
    little_memory,
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


def test_plain_package_is_without_type_checks(plain):
    assert plain.WeightsError is not WeightsError
    assert plain.read_torch_file is not read_torch_file
    assert not hasattr(plain.read_torch_file, "__wrapped__")


# Files that would run something


def commands(path: str) -> dict[str, bytes]:
    """Pickles that make a file."""
    shell, code = text(f"touch {path}"), text(f"open({path!r}, 'w').close()")
    return {
        "os": program(call("os.system", shell)),
        "posix": program(call("posix.system", shell)),
        "eval": program(call("builtins.eval", code)),
        "exec": program(call("builtins.exec", code)),
        "old eval": program(call("__builtin__.eval", code)),
        "subprocess": program(call("subprocess.getoutput", shell)),
        "stack": program(text("os") + text("system") + b"\x93" + group(shell) + b"R"),
        "memo": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94h\0h\1\x93" + group(shell) + b"R.",
        "inst": program(b"(" + shell + b"ios\nsystem\n"),
        "in a tensor's hooks": program(
            call("torch._utils._rebuild_tensor_v2", b"N", number(0), numbers(()), numbers(()), b"\x89",
                 call("os.system", shell))),
        "state": program(named("argparse.Namespace") + b")\x81" + mapping({"lr": call("os.system", shell)}) + b"b"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", commands(""))
def test_commands_are_not_run(save, plain, tmp_path, kind):
    sentinel = tmp_path / "ran"
    pickled = commands(str(sentinel))[kind]
    if b"torch._utils" not in pickled:  # the pickle is able to run it
        pickle.loads(pickled)
        assert sentinel.exists()
        sentinel.unlink()
    path = save(pickled)
    expected = {"posix": "posix.system", "eval": "builtins.eval", "exec": "builtins.exec",
                "old eval": "__builtin__.eval", "subprocess": "subprocess.getoutput"}.get(kind, "os.system")
    expected = rf"file\.pth: it refers to '{expected}'.*Nothing in the file was run"
    if kind == "inst":
        expected = r"file\.pth: its pickle uses the operation INST, which torch\.save does not write"
    with pytest.raises(plain.WeightsError, match=expected):
        plain.read_torch_file(path)
    with pytest.raises(WeightsError, match=expected):
        fv.from_pretrained(path)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "name",
    ["torch.load", "torch.Tensor", "torch.nn.Linear", "torch._utils._rebuild_qtensor", "torch.storage._load_from_bytes",
     "numpy.core.multiarray.scalar", "fastervit_jax.weights.torch_file.write_torch_file", "collections.Counter",
     "collections.OrderedDict.fromkeys", "argparse.ArgumentParser", "torch.float32.__class__", "builtins.getattr"])
def test_other_names_are_refused(save, plain, name):
    with pytest.raises(plain.WeightsError, match=rf"refers to '{re.escape(name)}'.*weights_only=False"):
        plain.read_torch_file(save(program(named(name))))


# Pickles that are wrong


def raw_tensor(*arguments: bytes) -> bytes:
    return call("torch._utils._rebuild_tensor_v2", *arguments, b"\x89", ORDERED_DICT)


ONE = numbers((1,))
WRONG_TENSORS = {
    "shape past the end": (tensor(shape=(5,)), r"shape \(5,\).*reaches element 4 of storage .*, which has 4"),
    "offset past the end": (tensor(offset=1), "reaches element 4"),
    "offset past an end of one": (tensor(offset=4, shape=(), strides=()), "reaches element 4"),
    "stride past the end": (tensor(shape=(2,), strides=(4,)), "reaches element 4"),
    "strides past the end together": (tensor(shape=(2, 2), strides=(2, 2)), "reaches element 4"),
    "far offset": (tensor(offset=2**70), "no such tensor can be|reaches element"),
    "empty storage": (tensor(storage(key="1", count=0), shape=(1,)), "which has 0"),
    "dtype larger than the storage": (
        tensor(storage("torch.storage.UntypedStorage", count=16), shape=(3,), dtype="torch.float64"),
        "reaches element 2 of storage .*, which has 2"),
    "negative side": (tensor(shape=(-1,)), "no such tensor can be"),
    "negative stride": (tensor(offset=3, strides=(-1,)), "no such tensor can be"),
    "negative offset": (tensor(offset=-1), "no such tensor can be"),
    "fewer strides": (tensor(shape=(2, 2), strides=(1,)), "no such tensor can be"),
    "fraction": (raw_tensor(storage(), number(0), group(b"G" + bytes(8)), ONE), "no such tensor can be"),
    "bool as a side": (raw_tensor(storage(), number(0), group(b"\x88"), ONE), "no such tensor can be"),
    "list as shape": (raw_tensor(storage(), number(0), b"](K\1e", ONE), "without storage, shape or strides"),
    "no storage": (raw_tensor(text("0"), number(0), ONE, ONE), "without storage, shape or strides"),
    "tensor as storage": (raw_tensor(tensor(), number(0), ONE, ONE), "without storage, shape or strides"),
    "huge side that holds nothing": (tensor(shape=(0, 2**70), strides=(1, 1)), "no such tensor can be"),
    "huge sides that hold nothing": (tensor(shape=(0, 2**62, 2**62), strides=(1, 1, 1)), "no such tensor can be"),
    "huge stride of one": (tensor(shape=(1,), strides=(2**70,)), "no such tensor can be"),
    "huge stride in bytes": (tensor(shape=(1,), strides=(2**62,)), "no such tensor can be"),
    "many axes": (tensor(shape=(1,) * 65, strides=(1,) * 65), "axes"),
    "name as dtype": (
        call("torch._utils._rebuild_tensor_v3", storage(), number(0), ONE, ONE, b"\x89", ORDERED_DICT,
             text("float32")), "a tensor of dtype"),
    "conjugate": (
        call("torch._utils._rebuild_tensor_v2", storage(), number(0), ONE, ONE, b"\x89", ORDERED_DICT,
             mapping({"conj": b"\x88"})), r"marked as .?conj.*resolve_conj"),
    "few arguments": (call("torch._utils._rebuild_tensor_v2", storage()), r"damaged \(TypeError"),
    "storage of another file": (tensor(storage(key="7")), "record 'data/7', which is not in the file"),
    "storage outside": (tensor(storage(key="../data.pkl")), "record 'data/../data.pkl', which is not in the file"),
    "larger storage": (tensor(storage(count=5)), "claims 5 elements of float32 .*holds 16 bytes"),
    "smaller storage": (tensor(storage(count=3)), "claims 3 elements of float32 .*holds 16 bytes"),
    "negative storage": (tensor(storage(count=-4)), "claims -4 elements"),
    "storage of no dtype": (
        group(text("storage"), text("torch.FloatStorage"), text("0"), text("cpu"), number(4)) + b"Q",
        "unknown kind of storage"),
    "no storage's mark": (
        group(text("module"), named("torch.FloatStorage"), text("0"), text("cpu"), number(4)) + b"Q",
        "unknown kind of storage"),
    "number as key of a storage": (
        group(text("storage"), named("torch.FloatStorage"), number(0), text("cpu"), number(4)) + b"Q",
        "unknown kind of storage"),
    "storage without count": (group(text("storage"), named("torch.FloatStorage"), text("0")) + b"Q", "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_TENSORS)
def test_wrong_tensors(save, plain, kind):
    made, message = WRONG_TENSORS[kind]
    with pytest.raises(plain.WeightsError, match=rf"file\.pth: .*{message}"):
        plain.read_torch_file(save(program(mapping({"a": made})), FOUR.tobytes(), b""))


WRONG_PROGRAMS = {
    "nothing": (b"", "damaged"),
    "no end": (b"\x80\x02}", "damaged"),
    "end alone": (program(), "damaged .*stack underflow"),
    "left over": (program(b"NN"), "damaged .*objects left over"),
    "unknown opcode": (program(b"\xff"), "damaged"),
    "opcode of protocol 0": (program(b"I1\n"), "uses the operation INT"),
    "duplicated object": (program(b"N2"), "uses the operation DUP"),
    "extension": (program(b"\x82\x01"), "uses the operation EXT1"),
    "buffer": (program(b"\x97"), "uses the operation NEXT_BUFFER"),
    "no mark": (program(b"Nt"), "damaged"),
    "below the mark": (program(b"N(\x85"), "damaged .*stack underflow"),
    "no such memo": (program(b"h\x05"), r"damaged \(KeyError"),
    "memo of nothing": (program(b"q\0"), r"damaged \(IndexError"),
    "value without key": (program(b"}(" + text("a") + b"u"), "damaged"),
    "items of a list": (program(b"](NNu"), "damaged .*items set in list"),
    "appended to a dict": (program(b"}(Ne"), "damaged .*items appended to dict"),
    "added to a list": (program(b"](N\x90"), "damaged .*items added to list"),
    "list as key": (program(b"}]Ns"), "damaged .*list as a key"),
    "deep tuple as key": (program(b"}" + deep(10**5) + b"Ns"), "damaged .*tuple as a key"),
    "deep tuple in a set": (program(b"\x8f(" + deep(10**5) + b"\x90"), "damaged .*tuple as a key"),
    "state of a list": (program(b"]}b"), "damaged .*state of list"),
    "state of a namespace": (program(named("argparse.Namespace") + b")R]b"), r"damaged \(TypeError"),
    "arguments of a namespace": (program(call("argparse.Namespace", b"N")), "damaged .*with arguments"),
    "arguments of a dict": (program(call("collections.OrderedDict", b"]")), "damaged .*with arguments"),
    "call of a dtype": (program(call("torch.float32", b"N")), r"damaged \(TypeError"),
    "call of a text": (program(text("os.system") + b")R"), r"damaged \(TypeError"),
    "call with a list": (program(named("torch.Size") + b"]R"), r"damaged \(TypeError"),
    "name of no text": (program(b"NN\x93"), "damaged|refers to"),
    "key twice": (program(b"}(" + (text("a") + tensor()) * 2 + b"u"), "key 'a' is there twice"),
    "key twice, apart": (program(b"}" + (text("a") + b"Ns") * 2), "key 'a' is there twice"),
    "equal keys": (program(b"}(K\1N\x88Nu"), "is there twice"),
    "text that is none": (program(b"X\x02\0\0\0\xff\xff"), r"damaged \(UnicodeDecodeError"),
    "name that is none": (program(b"c\xff\n\xff\n"), r"damaged \(UnicodeDecodeError"),
    "name with a backslash": (program(b"ctor\\c\nSize\n"), "damaged|refers to"),
    "large": (program(b"N" * LARGEST_PICKLE), "data.pkl has 16,777,219 bytes, expected at most 16,777,216"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_PROGRAMS)
def test_wrong_programs(save, plain, kind):
    pickled, message = WRONG_PROGRAMS[kind]
    with pytest.raises(plain.WeightsError, match=rf"file\.pth: .*{message}"):
        plain.read_torch_file(save(pickled))


def test_deep_nesting_ends(save, plain):
    """Where it is no key it may stay."""
    namespace = named("argparse.Namespace") + b")\x81"
    for made in (deep(10**5), b"]" * 10**5 + b"a" * (10**5 - 1), (b"}" + text("a")) * 10**5 + b"N" + b"s" * 10**5,
                 (namespace + b"}" + text("a")) * 10**4 + b"N" + b"sb" * 10**4):
        saved, _ = plain.read_torch_file(save(program(mapping({"a": made, "b": tensor()}))))
        np.testing.assert_array_equal(saved["b"].read(), FOUR)


# Much is claimed, little is there

CLAIMS = {
    "storage": (program(tensor(storage(count=TEN_GB // 4), shape=(TEN_GB // 4,))), "claims 2500000000 elements"),
    "shape": (program(tensor(shape=(TEN_GB // 4,))), "reaches element 2,499,999,999"),
    "expanded": (program(tensor(shape=(TEN_GB // 4,), strides=(0,))), "repeats a few stored values"),
    "expanded twice": (program(tensor(shape=(50000, 50000), strides=(0, 0))), "repeats a few stored values"),
    "text": (program(b"\x8d" + struct.pack("<Q", TEN_GB) + b"a"), "damaged"),
    "shorter text": (program(b"X" + struct.pack("<I", 2**32 - 1) + b"a"), "damaged"),
    "bytes": (program(b"\x8e" + struct.pack("<Q", TEN_GB) + b"a"), "damaged"),
    "largest bytes": (program(b"\x8e" + struct.pack("<Q", 2**64 - 1) + b"a"), "damaged"),
    "number": (program(b"\x8b" + struct.pack("<i", 2**31 - 1) + b"a"), "damaged"),
    "frame": (program(b"\x95" + struct.pack("<Q", TEN_GB)), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CLAIMS)
def test_claims_take_no_memory(save, plain, kind):
    pickled, message = CLAIMS[kind]
    path = save(pickled)
    assert path.stat().st_size < 2000
    with little_memory(), pytest.raises(plain.WeightsError, match=rf"file\.pth: .*{message}"):
        plain.read_torch_file(path)


def test_large_memo_index_takes_no_memory(save, plain):
    index = struct.pack("<I", 2**31 - 1)
    with little_memory():
        saved, _ = plain.read_torch_file(save(program(b"](" + tensor() + b"r" + index + b"j" + index + b"e")))
    assert saved[0] is saved[1]
    np.testing.assert_array_equal(saved[0].read(), FOUR)


def test_many_objects_are_refused(save, plain):
    """8 MB of a pickle make 8 million sets, each of more than 200 bytes."""
    with pytest.raises(plain.WeightsError, match="pickle has more than"):
        plain.read_torch_file(save(program(b"(" + b"\x8f" * 8 * 10**6 + b"t")))


LAUGHS = laughs(18)
SHARED = {
    "storage": group(LAUGHS, named("torch.FloatStorage"), text("0"), text("cpu"), number(4)) + b"Q",
    "storage's size": group(text("storage"), named("torch.FloatStorage"), text("0"), text("cpu"), LAUGHS) + b"Q",
    "shape": raw_tensor(storage(), number(0), LAUGHS, numbers((1, 1))),
    "strides": raw_tensor(storage(), number(0), numbers((1, 1)), LAUGHS),
    "offset": raw_tensor(storage(), LAUGHS, ONE, ONE),
    "marks": call("torch._utils._rebuild_tensor_v2", storage(), number(0), ONE, ONE, b"N", b"N", LAUGHS),
    "dtype": call("torch._utils._rebuild_tensor_v3", storage(), number(0), ONE, ONE, b"N", b"N", LAUGHS),
    "device": mapping({"a": call("torch.device", LAUGHS)}),
    "name": LAUGHS + text("system") + b"\x93",
    "namespace": named("argparse.Namespace") + b")\x81" + mapping({"a": LAUGHS}) + b"bQ",
    "key": b"}" + LAUGHS + b"Ns",
    "saved": mapping({"state_dict": LAUGHS}),
    "entry": mapping({"state_dict": mapping({"a": LAUGHS})}),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHARED)
def test_objects_with_endless_texts(save, plain, kind):
    """Megabytes of text in 100 bytes; with twice the levels they would not fit into any memory."""
    path = save(program(SHARED[kind]))
    with little_memory(10**6), pytest.raises(plain.WeightsError) as caught:
        plain.open_source(path)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize("record", range(4))
@pytest.mark.parametrize("field", ["size", "offset"])
def test_claims_of_the_directory_take_no_memory(save, plain, record, field):
    records = torch_records(program(tensor()), FOUR.tobytes())
    records[record] = records[record]._replace(**{field: TEN_GB})
    message = {"size": "claims 10,000,000,000 bytes", "offset": "no record at 10000000000"}[field]
    with little_memory(), pytest.raises(plain.WeightsError, match=message):
        plain.read_torch_file(save(records))


def test_claim_of_the_directory_s_own_size_takes_no_memory(save, plain):
    path = save(program(tensor()))
    content = path.read_bytes()
    end = content[-22:]
    long = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 5, 5, TEN_GB, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, len(content) - 22, 1)
    path.write_bytes(content[:-22] + long + locator + end[:8] + b"\xff" * 12 + end[20:])
    with little_memory(), pytest.raises(plain.WeightsError, match="archive is damaged or was cut off"):
        plain.read_torch_file(path)
