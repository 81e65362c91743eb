"""Thousands of mutated files are read or refused with a WeightsError, and nothing else ever happens."""

import collections
import json
import math
import re
import struct
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.weights.torch_bytes import (
    ORDERED_DICT,
    Seed,
    archive,
    deep,
    laughs,
    named,
    number,
    numbers,
    storage,
    tensor,
    text,
)

# Mutated files that are opened, all arrays read and their architecture inferred; and those that are loaded as well.
OPENED, LOADED = 3000, 400

# Files that are wrong in places that nobody thought of


def changed(sequence: Any, kind: str, where: int, length: int, new: Any) -> Any:
    """Bytes or a list with one place changed."""
    at = where % (len(sequence) + 1)
    end = at + length
    return {
        "set": sequence[:at] + new + sequence[at + len(new) :], "insert": sequence[:at] + new + sequence[at:],
        "remove": sequence[:at] + sequence[end:], "repeat": sequence[:end] + sequence[at:],
        "swap": sequence[:at] + sequence[at + 1 : end] + sequence[at : at + 1] + sequence[end:], "cut": sequence[:at],
    }[kind]  # fmt: skip


HUGE = [0, 1, -1, 2, 7, 8, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**62, 2**63 - 1, 2**63,
        2**64 - 1, 2**70, 10**400]  # fmt: skip
# Each makes one object.
OBJECTS = [
    *map(number, [*HUGE, 1 << 20000]), b"N", b"\x88", b")", b"]", b"}", b"\x8f", b"G\x7f\xf8\0\0\0\0\0\0", b"C\x02ab",
    *map(numbers, [(2, 2), (8,), (0, 2**63), (1,) * 40]), *map(text, ["", "0", "1", "storage", "a" * 3000, "\ud800"]),
    laughs(14), deep(3000), ORDERED_DICT, tensor(), storage(),
    *map(named, ["os.system", "torch.Size", "torch.device", "torch.LongStorage", "torch.BFloat16Storage",
                 "torch.storage.UntypedStorage", "torch.float64", "torch._utils._rebuild_tensor_v2",
                 "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter", "argparse.Namespace"]),
]  # fmt: skip
FRAGMENTS = [
    *OBJECTS, *(bytes([code]) for code in b"(tRQb\x81\x86\x85\x87.0219as\x94\x93ue\x90"), b"q\0", b"h\0", b"h\1",
    b"\x8b\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"r\xff\xff\xff\xff",
]  # fmt: skip
JSONS = st.one_of(
    st.sampled_from([*HUGE, math.nan, math.inf, 1e308, 5e-324, True, None, "", "float32", [], {}, [[]], "x" * 3000]),
    st.lists(st.sampled_from([*HUGE, 3, True, False, None, "a", 1.5]), min_size=3, max_size=5))
PLACES = st.one_of(st.integers(0, 500), st.integers(-6000, -1), st.integers(0, 2**20))
BYTES = st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(FRAGMENTS), st.sampled_from(
    [struct.pack(form, value % 2 ** (8 * struct.calcsize(form))) for form in ("<H", "<I", "<Q") for value in HUGE]))
CHANGES = st.tuples(st.sampled_from(["set"] * 6 + ["insert", "insert", "remove", "remove", "repeat", "swap", "cut"]),
                    PLACES, st.one_of(st.integers(1, 8), st.integers(1, 8), st.integers(1, 2000)))
FIELDS = ["size", "checksum", "method", "offset", "flags"]


def mutated(draw: Any, seed: Seed) -> bytes:
    """A file with one to four places of one of its parts changed."""
    parts = ["file", "note", "config"]
    parts += ["header", "entry"] if seed.records is None else [
        "object", "object", "object", "program", "pickle", "directory", "records"]
    part = draw(st.sampled_from(parts))
    times = range(draw(st.integers(1, 4)))
    if part == "config":
        stated = dict(json.loads(seed.note).get("config", {"dim": 2, "in_dim": 2, "depths": [1, 1, 1, 1]}))
        for _ in times:
            stated[draw(st.sampled_from([*stated, "mlp_ratio", "x"]))] = draw(JSONS)
        return seed.file(note=json.dumps(draw(st.sampled_from([{"config": stated}] * 9 + [{}, stated]))).encode())
    if part == "entry":
        header = {key: dict(value) for key, value in seed.header.items()}
        for _ in times:
            key = draw(st.sampled_from(sorted(header)))
            header[key][draw(st.sampled_from([*header[key], "x"]))] = draw(JSONS)
        return seed.file(header=json.dumps(header).encode())
    if part == "records":
        records = list(seed.records)
        for _ in times:
            new = draw(st.sampled_from(seed.records))
            field = draw(st.sampled_from([*FIELDS, "name", "data"]))
            value = {"name": f"archive/data/{draw(st.integers(0, 9))}", "data": draw(BYTES)}.get(field)
            if value is None:
                value = draw(st.sampled_from(HUGE)) % 2 ** {"size": 64, "offset": 64, "checksum": 32}.get(field, 16)
            records = changed(records, *draw(CHANGES), [new._replace(**{field: value})])
        return archive(records)
    if part == "object":
        operations = list(seed.program)
        places = [at for at, operation in enumerate(operations) if operation[:1] in b"cXJK\x8aNG\x88\x89)"]
        for _ in times:
            new = st.one_of(st.sampled_from(OBJECTS), st.sampled_from([operations[at] for at in places]))
            operations[draw(st.sampled_from(places))] = draw(new)
        return seed.file(pickled=b"".join(operations))
    if part == "program":
        operations = seed.program
        for _ in times:
            fragment = draw(st.one_of(st.sampled_from(FRAGMENTS), st.sampled_from(seed.program)))
            operations = changed(operations, *draw(CHANGES), [fragment])
        return seed.file(pickled=b"".join(operations))
    whole = seed.file()
    tail = whole.index(b"PK\1\2") if part == "directory" else 0
    content = {"file": whole, "note": seed.note, "directory": whole[tail:], "pickle": b"".join(seed.program),
               "header": json.dumps(seed.header).encode()}[part]
    for _ in times:
        content = changed(content, *draw(CHANGES), draw(BYTES))
    return {"file": lambda: content, "directory": lambda: whole[:tail] + content,
            "note": lambda: seed.file(note=content), "pickle": lambda: seed.file(pickled=content),
            "header": lambda: seed.file(header=content)}[part]()


# The same files every time.
RUN = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}


def attempts(files, folder, examples: int, attempt: Any, error: type, **others: Any) -> collections.Counter:
    """Call attempt(path) for mutated files; it may raise `error` alone. How many it has read and refused."""
    seeds, counts = {path.name: Seed.of(path) for path in files.values()}, collections.Counter()

    @settings(**{**RUN, "max_examples": examples, **others})
    @given(st.data())
    def run(data):
        name = data.draw(st.sampled_from([*seeds, "official.pth.tar", "official.pth.tar"]))
        path = folder / name
        path.unlink(missing_ok=True)  # the one before may be mapped
        path.write_bytes(mutated(data.draw, seeds[name]))
        try:
            attempt(path)
            counts["read"] += 1
        except error:
            counts["refused"] += 1

    run()
    return counts


def opening(plain) -> Any:
    def attempt(path):
        source, refused = plain.open_source(path), None
        for array in source.arrays.values():
            try:
                values = array.read()
                assert values.shape == array.shape
                assert values.dtype == array.dtype
            except plain.WeightsError as error:
                refused = error
        plain.infer(source, {})
        if refused:
            raise refused

    return attempt


def test_mutated_files_are_read_or_refused(files, tmp_path, plain):
    counts = attempts(files, tmp_path, OPENED, opening(plain), plain.WeightsError)
    assert min(counts["read"], counts["refused"]) > OPENED // 20
    assert counts.total() >= OPENED


def test_mutated_files_are_loaded_or_refused(files, tmp_path, plain):
    counts = attempts(files, tmp_path, LOADED, plain.from_pretrained, plain.WeightsError)
    assert min(counts["read"], counts["refused"]) > LOADED // 40
    assert counts.total() >= LOADED


SIDES = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 49, 53, 64, 512, 1000, 2**20, 2**58])


def test_mutated_shapes_are_of_a_model_or_refused(files, plain):
    sources = [plain.open_source(path) for path in files.values()]
    counts = collections.Counter()

    @settings(**RUN, max_examples=OPENED)
    @given(st.data())
    def run(data):
        source = data.draw(st.sampled_from(sources))
        shapes = {name: array.shape for name, array in source.arrays.items()}
        told = [name for name in shapes if re.search(r"conv_down|blocks\.0\.(hat_)?(attn|mlp|pos|gamma)|head", name)]
        for name in data.draw(st.lists(st.sampled_from(told), min_size=1, max_size=4, unique=True)):
            shape = list(shapes[name])
            if shape and data.draw(st.booleans()):
                shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(SIDES)
                shapes[name] = tuple(shape)
            elif data.draw(st.booleans()):
                shapes[name] = tuple(data.draw(st.lists(SIDES, max_size=5)))
            else:
                del shapes[name]
        nearest = data.draw(st.sampled_from([source.nearest, None, "faster_vit_4_21k_224"]))
        try:
            found = plain.architecture.infer(
                shapes, nearest=nearest, stated=data.draw(st.sampled_from([source.stated, None])))
            counts["read"] += 1
        except plain.WeightsError:
            counts["refused"] += 1
        else:
            assert shapes["patch_embed.conv_down.3.weight"][0] == found.config.dim
            assert found.config.num_classes == (shapes["head.weight"][0] if "head.weight" in shapes else 0)

    run()
    assert min(counts["read"], counts["refused"]) > OPENED // 10
