"""PyTorch's files assembled by hand, opcode by opcode, so that they can be wrong in every place."""

import contextlib
import itertools
import json
import pickletools
import struct
import sys
import tracemalloc
import zipfile
import zlib
from typing import Any, NamedTuple

import numpy as np

from fastervit_jax.weights.torch_file import NOTE, StoredArray

# Pickles by hand


def text(value: str) -> bytes:
    encoded = value.encode("utf8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8b" + struct.pack("<i", value.bit_length() // 8 + 1) + value.to_bytes(
        value.bit_length() // 8 + 1, "little", signed=True)


def named(name: str) -> bytes:
    """'torch.FloatStorage'."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def numbers(values: Any) -> bytes:
    return group(*map(number, values))


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + group(*arguments) + b"R"


def mapping(entries: dict[str, bytes], start: bytes = b"}") -> bytes:
    return start + b"(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


ORDERED_DICT = named("collections.OrderedDict") + b")R"


def storage(kind: str = "torch.FloatStorage", key: str = "0", count: int = 4) -> bytes:
    return group(text("storage"), named(kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(stored: bytes | None = None, offset: int = 0, shape: tuple = (4,), strides: tuple = (1,),
           dtype: str | None = None) -> bytes:
    """By default of float32, with all of the 16 bytes of record data/0."""
    last = () if dtype is None else (named(dtype),)
    return call(f"torch._utils._rebuild_tensor_v{2 if dtype is None else 3}",
                storage() if stored is None else stored, number(offset), numbers(shape), numbers(strides), b"\x89",
                ORDERED_DICT, *last)


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


# Archives by hand


class Record(NamedTuple):
    """A record of an archive, and what its directory says of it where that is not so."""

    name: str
    data: bytes
    size: int | None = None
    checksum: int | None = None
    method: int = 0
    offset: int | None = None
    flags: int = 0


def archive(records: list[Record]) -> bytes:
    body, directory = b"", b""
    for r in records:
        name = r.name.encode("utf8", "surrogatepass")
        checksum = zlib.crc32(r.data) if r.checksum is None else r.checksum
        size = len(r.data) if r.size is None else r.size
        offset = len(body) if r.offset is None else r.offset
        long = max(size, offset) >= 2**32 - 1
        extra = struct.pack("<2H3Q", 1, 24, size, size, offset) if long else b""
        size, offset = (2**32 - 1, 2**32 - 1) if long else (size, offset)
        body += struct.pack("<4s5H3I2H", b"PK\3\4", 20, r.flags, r.method, 0, 33, checksum, size, size, len(name), 0)
        body += name + r.data
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, r.flags, r.method, 0, 33, checksum, size, size,
                                 len(name), len(extra), 0, 0, 0, 0, offset) + name + extra
    counts = len(records) % 2**16
    return body + directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, counts, counts, len(directory), len(body), 0)


def torch_records(pickled: bytes, *storages: bytes) -> list[Record]:
    return [Record("archive/data.pkl", pickled), Record("archive/byteorder", b"little"),
            *(Record(f"archive/data/{key}", data) for key, data in enumerate(storages)),
            Record("archive/version", b"3\n")]


FOUR = np.array([1.5, -2.0, 0.25, 8.0], np.float32)


@contextlib.contextmanager
def little_memory(limit: int = 64 * 2**20):
    """Python and NumPy may take no more than `limit`, the process, in all, no more than 64 MiB."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert peak < limit
    assert taken < 64 * 2**20


def in_memory(values: np.ndarray) -> StoredArray:
    return StoredArray(values.shape, values.dtype, lambda: values)


TEN_GB = 10**10


def deep(levels: int) -> bytes:
    return b")" + b"\x85" * levels


def laughs(levels: int) -> bytes:
    """A tuple whose text has 2**levels parts."""
    return b")" + b"q\0h\0\x86" * levels


def safetensors_file(header: dict | bytes, data: bytes = FOUR.tobytes(), length: int | None = None) -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


class Seed(NamedTuple):
    """A good file, taken apart so that each part can be changed and the others, lengths and checksums, follow."""

    records: list[Record] | None
    program: list[bytes]
    note: bytes
    header: dict[str, Any]
    data: bytes

    @classmethod
    def of(cls, path) -> "Seed":
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            length = 8 + struct.unpack("<Q", content[:8])[0]
            header = json.loads(content[8:length])
            return cls(None, [], header["__metadata__"][NOTE].encode(), header, content[length:])
        with zipfile.ZipFile(path) as opened:
            records = [Record(each.filename, opened.read(each)) for each in opened.infolist()]
        parts = {record.name: record.data for record in records}
        pickled = parts["archive/data.pkl"]
        starts = [start for _, _, start in pickletools.genops(pickled)] + [len(pickled)]
        operations = [pickled[start:end] for start, end in itertools.pairwise(starts)]
        return cls(records, operations, parts.get(f"archive/{NOTE}", b"{}"), {}, b"")

    def file(self, *, note: bytes | None = None, pickled: bytes | None = None, records: list[Record] | None = None,
             header: bytes | None = None) -> bytes:
        """The file with some parts changed."""
        if self.records is None:
            if note is not None:
                metadata = {"format": "pt", NOTE: note.decode("utf8", "replace")}
                header = json.dumps({**self.header, "__metadata__": metadata}).encode()
            return safetensors_file(self.header if header is None else header, self.data)
        new = {"archive/data.pkl": pickled, f"archive/{NOTE}": note}
        records = self.records if records is None else records
        if note is not None and f"archive/{NOTE}" not in [record.name for record in records]:
            records = [*records, Record(f"archive/{NOTE}", note)]
        return archive([record._replace(data=record.data if new.get(record.name) is None else new[record.name])
                        for record in records])
