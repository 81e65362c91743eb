"""PyTorch's checkpoint files, read and written without PyTorch, and without running what they hold.

`torch.save` writes an uncompressed zip archive. `NAME/data.pkl` in it is a pickle, a small program that
builds the saved object; its tensors name storages, the bytes of the records `NAME/data/KEY`. Here that
program is interpreted by hand: it can build containers, numbers, texts and tensors, and nothing else.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import mmap
import os
import pathlib
import pickletools
import secrets
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np


class WeightsError(ValueError):
    """A file of weights that cannot be read, or that does not fit the model."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in a file: its shape and dtype are known, its values are read when they are asked for."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    """The values, as a view of the file where that is possible."""
    release: Callable[[], None] = lambda: None
    """Say that the values are not needed for now: a mapped file's pages leave memory. They can be read again."""


RESAVE = ("With PyTorch, if you trust the file: saved = torch.load(OLD, map_location='cpu', weights_only=False), then "
          "torch.save({'state_dict': STATE_DICT}, NEW), where STATE_DICT is the part of `saved` that holds the tensors")

# Larger pickles would take too much memory for what they say: a tensor takes about 150 bytes of it, 30 operations.
LARGEST_PICKLE = 16 * 2**20
MOST_OPERATIONS = 10**6

DTYPES = {
    "float64": np.dtype(np.float64), "float32": np.dtype(np.float32), "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16), "int64": np.dtype(np.int64), "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16), "int8": np.dtype(np.int8), "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32), "uint16": np.dtype(np.uint16), "uint8": np.dtype(np.uint8), "bool": np.dtype(bool),
    "complex64": np.dtype(np.complex64), "complex128": np.dtype(np.complex128),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn), "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz), "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
}  # fmt: skip

STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}  # fmt: skip


def read_torch_file(path: str | os.PathLike) -> tuple[Any, dict[str, Any]]:
    """The object in a file of `torch.save`, with a `StoredArray` for each tensor, and what `write_torch_file` noted.

    Knows tensors and parameters of the dtypes in `DTYPES`, containers, numbers, texts and plain namespaces;
    the file stays mapped as long as one of its arrays is held. Sharing between tensors is kept, in that they are
    views of the same bytes. The checksum of a storage is tested when it is first read.

    Raises WeightsError, saying what to do, for every other content and for damaged files.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(512)
            _check_kind(head)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            records = _zip_records(file, mapped)
        return _TorchFile(mapped, records).read()
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error.__cause__


def _check_kind(head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        return
    if not head:
        raise WeightsError("the file is empty: download or save it again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError("this is a Git LFS pointer, a text that stands for the file: fetch the file itself, "
                           "with `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        raise WeightsError("this is a web page, not a checkpoint: download the file itself")
    if head.startswith((b"\x80", b"\x1f\x8b", b"BZh")) or head[257:262] == b"ustar":
        raise WeightsError("the format is that of PyTorch before 1.6, or of another program; expected the zip format. "
                           f"{RESAVE}")
    raise WeightsError(f"this is no file of torch.save: it begins with {head[:8]!r}, expected a zip archive's b'PK'")


def shown(value: Any) -> str:
    """A text for messages, short whatever a file holds: tuples that share their parts can have endless ones."""
    if isinstance(value, str | bytes):
        return repr(value[:200])
    if isinstance(value, int):
        return repr(value) if abs(value) < 2**64 else "a huge number"
    return repr(value) if isinstance(value, float | None | np.dtype) else type(value).__name__


def check_shape(shape: tuple) -> None:
    """Raises WeightsError for shapes that NumPy cannot have; it refuses huge ones even if they hold nothing."""
    if (len(shape) > 32 or any(type(n) is not int or not 0 <= n < 2**59 for n in shape)
            or math.prod(n for n in shape if n) >= 2**59):
        raise WeightsError(f"a tensor of shape ({', '.join(map(shown, shape[:40]))}): no such tensor can be; expected "
                           "at most 32 axes and 2**59 elements")


@dataclasses.dataclass(frozen=True)
class _Record:
    start: int
    size: int
    crc: int


def _zip_records(file: Any, mapped: mmap.mmap) -> dict[str, _Record]:
    """Where the bytes of each record of an archive lie, without its top folder's name; all within the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    # zipfile's own error for most damage; the others where it trusts a number or a text in the directory
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, MemoryError, OSError, EOFError,
            struct.error) as error:
        raise WeightsError(f"the archive is damaged or was cut off ({error}): download or save it again") from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise WeightsError("this is a TorchScript program, expected a checkpoint: save model.state_dict()")
    records = {}
    for entry in entries:
        name = entry.filename.partition("/")[2]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise WeightsError(f"record {entry.filename!r} is compressed or encrypted: torch.save never does that. "
                               f"{RESAVE}")
        if name in records:
            raise WeightsError(f"two records with the name {entry.filename!r}: the file is damaged. {RESAVE}")
        header = mapped[entry.header_offset : entry.header_offset + 30] if entry.header_offset >= 0 else b""
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise WeightsError(f"no record at {entry.header_offset}, where {entry.filename!r} should be: the file is "
                               "damaged; download or save it again")
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + entry.file_size > len(mapped):
            raise WeightsError(f"record {entry.filename!r} claims {entry.file_size:,} bytes at {start:,}, the file has "
                               f"{len(mapped):,}: it was cut off or altered; download or save it again")
        records[name] = _Record(start, entry.file_size, entry.CRC)
    return records


@dataclasses.dataclass(frozen=True)
class _Global:
    """What a pickle may name: `make` builds it from arguments, or it is just a value."""

    name: str
    make: Callable[..., Any] | None = None
    value: Any = None


@dataclasses.dataclass(frozen=True)
class _Storage:
    record: str
    dtype: np.dtype
    count: int


class _TorchFile:
    def __init__(self, mapped: mmap.mmap, records: dict[str, _Record]):
        self.mapped, self.records = mapped, records
        self.checked: set[str] = set()

    def read(self) -> tuple[Any, dict[str, Any]]:
        if "data.pkl" not in self.records:
            raise WeightsError(f"no record data.pkl in the archive: it is no file of torch.save. {RESAVE}")
        if "byteorder" in self.records and self.bytes("byteorder", 16) != b"little":
            raise WeightsError(f"the numbers are in big-endian order, expected little. {RESAVE}")
        program = self.bytes("data.pkl", LARGEST_PICKLE)
        known = {g.name: g for g in (
            *(_Global(f"torch {name}", value=DTYPES[dtype]) for name, dtype in STORAGES.items()),
            *(_Global(f"torch {name}", value=dtype) for name, dtype in DTYPES.items()),
            _Global("torch.storage UntypedStorage", value=DTYPES["uint8"]),
            _Global("torch Size", lambda sides: sides),
            _Global("torch device", lambda *names: ":".join(map(shown, names)).replace("'", "")),
            _Global("collections OrderedDict", collections.OrderedDict),
            _Global("argparse Namespace", argparse.Namespace),
            _Global("types SimpleNamespace", argparse.Namespace),
            _Global("torch._utils _rebuild_tensor", self.tensor),
            _Global("torch._utils _rebuild_tensor_v2", self.tensor_v2),
            _Global("torch._utils _rebuild_tensor_v3", self.tensor_v3),
            _Global("torch._utils _rebuild_parameter", lambda data, *rest: data),
            _Global("torch._utils _rebuild_parameter_with_state", lambda data, *rest: data),
        )}
        note = {}
        try:
            saved = _interpret(program, known, self.storage)
            if NOTE in self.records:
                note = json.loads(self.bytes(NOTE, LARGEST_PICKLE))
        except WeightsError:
            raise
        # What a damaged program or note does to an interpreter that trusts it: all of these mean the same here.
        # (A name with a backslash is a DeprecationWarning, where warnings are errors.)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, struct.error,
                DeprecationWarning) as error:
            raise WeightsError(f"the pickle in it is damaged ({type(error).__name__}: {error}): download or save it "
                               "again") from error
        if not isinstance(note, dict):
            raise WeightsError(f"record {NOTE} holds {type(note).__name__}, expected an object of JSON")
        return saved, note

    def bytes(self, name: str, limit: int) -> bytes:
        record = self.records[name]
        if record.size > limit:
            raise WeightsError(f"record {name} has {record.size:,} bytes, expected at most {limit:,}. {RESAVE}")
        self.check(name)
        return self.mapped[record.start : record.start + record.size]

    def check(self, name: str) -> None:
        """Compare a record with its checksum, once; 0 means that the writer made none."""
        record = self.records[name]
        if name not in self.checked and record.crc:
            with memoryview(self.mapped) as whole, whole[record.start : record.start + record.size] as part:
                if zlib.crc32(part) != record.crc:
                    raise WeightsError(f"the bytes of record {name} do not match their checksum: the file is damaged; "
                                       "download or save it again")
        self.checked.add(name)

    def storage(self, identity: Any) -> _Storage:
        kind, dtype, key, _, count = identity
        if kind != "storage" or not isinstance(dtype, np.dtype) or not isinstance(key, str):
            raise WeightsError(f"unknown kind of storage ({', '.join(map(shown, identity))})")
        name = f"data/{key}"
        if name not in self.records:
            raise WeightsError(f"a tensor lies in record {shown(name)}, which is not in the file: download or save it "
                               "again")
        held = self.records[name].size
        if type(count) is not int or count < 0 or count * dtype.itemsize != held:
            raise WeightsError(f"storage {shown(key)} claims {shown(count)} elements of {dtype} ({dtype.itemsize} "
                               f"bytes each), record {shown(name)} holds {held:,} bytes: the file was altered; "
                               "download or save it again")
        return _Storage(name, dtype, count)

    def tensor(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *, dtype: np.dtype | None = None,
               flags: Mapping[str, bool] | None = None) -> StoredArray:
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
            raise WeightsError("a tensor without storage, shape or strides")
        check_shape(shape)
        if len(shape) != len(strides) or any(type(n) is not int or not 0 <= n < 2**59 for n in (offset, *strides)):
            raise WeightsError(f"a tensor of shape {shape}, strides ({', '.join(map(shown, strides[:40]))}) at "
                               f"{shown(offset)}: no such tensor can be")
        if flags:
            if not isinstance(flags, dict):
                raise TypeError(f"flags in {type(flags).__name__}")
            raise WeightsError(f"a tensor marked as {', '.join(map(shown, flags))}, to be computed when it is read; "
                               "expected values, of .resolve_conj().resolve_neg()")
        record = self.records[storage.record]
        dtype = storage.dtype if dtype is None else dtype  # strides count elements of the tensor's dtype
        count = record.size // dtype.itemsize
        last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= count:
            raise WeightsError(f"a tensor of shape {shape}, strides {strides} at {offset} reaches element {last:,} of "
                               f"storage {storage.record!r}, which has {count:,}: the file was altered")
        if math.prod(shape) * dtype.itemsize > max(len(self.mapped), 2**20):
            raise WeightsError(f"a tensor of shape {shape} repeats a few stored values to more than the whole file; "
                               f"expected it to be saved in full, with .contiguous(). {RESAVE}")

        def read() -> np.ndarray:
            self.check(storage.record)
            if 0 in shape:
                return np.zeros(shape, dtype)
            stored = np.frombuffer(self.mapped, np.uint8, record.size, record.start)  # keeps the file mapped
            return np.ndarray(shape, dtype, stored, offset * dtype.itemsize, [s * dtype.itemsize for s in strides])

        def release() -> None:
            start = record.start // mmap.PAGESIZE * mmap.PAGESIZE
            if record.size and hasattr(mmap, "MADV_DONTNEED"):
                self.mapped.madvise(mmap.MADV_DONTNEED, start, record.start + record.size - start)

        return StoredArray(shape, dtype, read, release)

    def tensor_v2(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, grad: bool, hooks: Any,
                  flags: Mapping[str, bool] | None = None) -> StoredArray:
        return self.tensor(storage, offset, shape, strides, flags=flags)

    def tensor_v3(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, grad: bool, hooks: Any,
                  dtype: np.dtype, flags: Mapping[str, bool] | None = None) -> StoredArray:
        if not isinstance(dtype, np.dtype):
            raise WeightsError(f"a tensor of dtype {shown(dtype)}")
        return self.tensor(storage, offset, shape, strides, dtype=dtype, flags=flags)


def _interpret(program: bytes, known: Mapping[str, _Global], find_storage: Callable[[Any], _Storage]) -> Any:
    """Build the object that a pickle describes from containers, numbers, texts, storages and what is `known`."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_from(start: int) -> list[Any]:
        if not (marks[-1] if marks else 0) <= start <= len(stack):
            raise IndexError("stack underflow")
        items = stack[start:]
        del stack[start:]
        return items

    def pop() -> Any:
        return pop_from(len(stack) - 1)[0]

    def pop_mark() -> list[Any]:
        return pop_from(marks.pop())

    def find(name: str) -> Any:
        if name not in known:
            raise WeightsError(
                f"it refers to {shown(name.replace(' ', '.'))}, which is not among what checkpoints are read with: "
                f"tensors, containers, numbers, texts and plain namespaces. Nothing in the file was run. {RESAVE}")
        return known[name] if known[name].make else known[name].value

    def call(function: Any, arguments: tuple) -> Any:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError(f"{type(function).__name__} called with {type(arguments).__name__}")
        if function.make in (collections.OrderedDict, argparse.Namespace) and arguments:
            raise TypeError(f"{function.name} with arguments")
        return function.make(*arguments)

    def set_items(target: dict, items: list[Any]) -> None:
        if not isinstance(target, dict):
            raise TypeError(f"items set in {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            check_key(key)
            if key in target:
                raise WeightsError(f"key {shown(key)} is there twice: the file was altered. {RESAVE}")
            target[key] = value

    def check_key(key: Any) -> None:
        if not isinstance(key, str | bytes | int | float | bool | None):
            raise TypeError(f"{type(key).__name__} as a key")

    for number, (operation, argument, _) in enumerate(pickletools.genops(program)):
        if number > MOST_OPERATIONS:
            raise WeightsError(f"its pickle has more than {MOST_OPERATIONS:,} operations: no checkpoint does. {RESAVE}")
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                result = pop()
                if stack:
                    raise ValueError("objects left over")
                return result
            case "MARK":
                marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case ("BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"
                  | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"):
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_SET":
                stack.append(set())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop_from(len(stack) - int(operation.name[-1]))))
            case "APPEND" | "APPENDS":
                items = pop_mark() if operation.name == "APPENDS" else [pop()]
                if not isinstance(stack[-1], list):
                    raise TypeError(f"items appended to {type(stack[-1]).__name__}")
                stack[-1].extend(items)
            case "ADDITEMS":
                items = pop_mark()
                for item in items:
                    check_key(item)
                if not isinstance(stack[-1], set):
                    raise TypeError(f"items added to {type(stack[-1]).__name__}")
                stack[-1].update(items)
            case "SETITEM" | "SETITEMS":
                items = pop_mark() if operation.name == "SETITEMS" else pop_from(len(stack) - 2)
                set_items(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(find(argument))
            case "STACK_GLOBAL":
                module, name = pop_from(len(stack) - 2)
                if not isinstance(module, str) or not isinstance(name, str):
                    raise TypeError(f"{type(module).__name__} and {type(name).__name__} as a name")
                stack.append(find(f"{module} {name}"))
            case "REDUCE" | "NEWOBJ":
                function, arguments = pop_from(len(stack) - 2)
                stack.append(call(function, arguments))
            case "BUILD":
                state = pop()
                if isinstance(stack[-1], argparse.Namespace):
                    stack[-1].__dict__ = state
                elif not isinstance(stack[-1], collections.OrderedDict):  # there: versions of modules
                    raise TypeError(f"state of {type(stack[-1]).__name__}")
            case "BINPERSID":
                stack.append(find_storage(pop()))
            case name:
                raise WeightsError(f"its pickle uses the operation {name}, which torch.save does not write. {RESAVE}")
    raise ValueError("no end")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A path beside `path` to write to; what is there at the end takes the place of `path`, all at once.

    Each writer has its own, so that several at a time do not mix. A link stays, and what it points to is replaced.
    """
    path = pathlib.Path(path).resolve()
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


NOTE = "fastervit_jax.json"
"""Name of the record with our own note in files that we write; PyTorch does not look at it."""


def write_torch_file(path: str | os.PathLike, arrays: Iterable[tuple[str, StoredArray]], note: dict[str, Any]) -> None:
    """Write a state dict of float32 and int64 arrays for `torch.load`, one array at a time, and `note` beside it.

    The file appears under its name when it is complete.
    """
    storages = {np.dtype(np.float32): "FloatStorage", np.dtype(np.int64): "LongStorage"}

    def text(value: str) -> bytes:
        encoded = value.encode()
        return b"X" + struct.pack("<I", len(encoded)) + encoded

    def number(value: int) -> bytes:
        return b"\x8a\x08" + struct.pack("<q", value)

    def numbers(values: Iterable[int]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    ordered_dict = b"ccollections\nOrderedDict\n)R"
    program = [b"\x80\x02", ordered_dict, b"("]
    with replacing(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, data: Any, size: int) -> None:
            entry = zipfile.ZipInfo(f"archive/{name}")
            entry.file_size = size
            # Bytes begin at multiples of 64, as PyTorch's do, so that they can be mapped.
            used = archive.fp.tell() + 30 + len(entry.filename) + 4
            entry.extra = struct.pack("<2sH", b"FB", -used % 64) + bytes(-used % 64)
            with archive.open(entry, "w") as file:
                file.write(data)

        for key, (name, array) in enumerate(arrays):
            values = np.asarray(array.read(), order="C")
            write(f"data/{key}", values.reshape(-1).view(np.uint8).data, values.nbytes)
            array.release()
            strides = [math.prod(array.shape[axis + 1 :]) for axis in range(len(array.shape))]
            program += [
                text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", text("storage"),
                f"ctorch\n{storages[values.dtype]}\n".encode(), text(str(key)), text("cpu"), number(values.size),
                b"tQ", number(0), numbers(array.shape), numbers(strides), b"\x89", ordered_dict, b"tR"]
        program += [b"u."]
        for name, data in {"data.pkl": b"".join(program), "byteorder": b"little", "version": b"3\n",
                           NOTE: json.dumps(note).encode()}.items():
            write(name, data, len(data))
