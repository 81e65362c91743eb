"""Archives, states, notes and safetensors files that are wrong end in a WeightsError that says what is."""

import gzip
import json
import math
import pickle
import tarfile
import zipfile
from typing import Any

import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.weights import pretrained
from fastervit_jax.weights.torch_file import NOTE, WeightsError, read_torch_file, write_torch_file
from tests.weights.torch_bytes import (
    FOUR,
    TEN_GB,
    Record,
    Seed,
    archive,
    in_memory,
    little_memory,
    mapping,
    number,
    program,
    safetensors_file,
    storage,
    tensor,
    torch_records,
)

# Archives that are wrong


def replaced(name: str, **fields: Any) -> list[Record]:
    """A good file with one record changed."""
    records = torch_records(program(mapping({"a": tensor()})), FOUR.tobytes())
    assert f"archive/{name}" in [record.name for record in records]
    return [record._replace(**fields) if record.name == f"archive/{name}" else record for record in records]


GOOD = replaced("version")
WRONG_ARCHIVES = {
    "record twice": ([*GOOD, Record("archive/data/0", bytes(16))], "two records with the name 'archive/data/0'"),
    "record twice, in two folders": ([*GOOD, Record("other/data/0", bytes(16))], "two records with the name"),
    "deflated": (replaced("data/0", method=8), "'archive/data/0' is compressed"),
    "deflated pickle": (replaced("data.pkl", method=8), "'archive/data.pkl' is compressed"),
    "unknown compression": (replaced("data/0", method=123), "'archive/data/0' is compressed"),
    "encrypted": (replaced("data/0", flags=1), "'archive/data/0' is compressed or encrypted"),
    "longer than the file": (replaced("data/0", size=10**6), "claims 1,000,000 bytes.*cut off or altered"),
    "not where it should be": (replaced("data/0", offset=7), "no record at 7, where 'archive/data/0' should be"),
    "outside": (replaced("data/0", offset=10**6), "no record at 1000000"),
    "pickle's checksum": (replaced("data.pkl", checksum=1), "record data.pkl do not match their checksum"),
    "no pickle": (GOOD[1:], "no record data.pkl"),
    "no folder": ([record._replace(name=record.name[8:]) for record in GOOD[:1]], "no record data.pkl"),
    "other archive": ([Record("word/document.xml", b"<xml/>")], "no record data.pkl"),
    "TorchScript": ([*GOOD, Record("archive/constants.pkl", b"\x80\x02).")], r"TorchScript.*save model\.state_dict"),
    "big-endian": (replaced("byteorder", data=b"big"), "big-endian order"),
    "note that is no JSON": ([*GOOD, Record(f"archive/{NOTE}", b"{")], "JSONDecodeError"),
    "note that is no text": ([*GOOD, Record(f"archive/{NOTE}", b"\xff\xff\xff")], "UnicodeDecodeError"),
    "note in a list": ([*GOOD, Record(f"archive/{NOTE}", b"[]")], f"{NOTE} holds list, expected an object"),
    "deep note": ([*GOOD, Record(f"archive/{NOTE}", b"[" * 10**5)], "RecursionError"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_ARCHIVES)
def test_wrong_archives(save, plain, kind):
    records, message = WRONG_ARCHIVES[kind]
    with pytest.raises(plain.WeightsError, match=rf"file\.pth: .*{message}"):
        plain.read_torch_file(save(records))
    assert plain.read_torch_file(save(GOOD))[0].keys() == {"a"}


def test_really_deflated(tmp_path, plain):
    path = tmp_path / "file.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        for record in torch_records(program(mapping({"a": tensor()})), bytes(16)):
            opened.writestr(record.name, record.data)
    with pytest.raises(plain.WeightsError, match=r"is compressed or encrypted.*never does that.*torch\.load"):
        plain.read_torch_file(path)


def test_checksum_is_tested_when_the_array_is_read(save, plain):
    records = replaced("data/0", checksum=1)
    records[0] = Record("archive/data.pkl", program(mapping({"a": tensor(), "b": tensor(storage(key="1"))})))
    saved, _ = plain.read_torch_file(save([*records, Record("archive/data/1", FOUR.tobytes())]))
    np.testing.assert_array_equal(saved["b"].read(), FOUR)
    for _ in range(2):
        with pytest.raises(plain.WeightsError, match="bytes of record data/0 do not match their checksum"):
            saved["a"].read()


def test_changed_number_is_found(files, tmp_path, weights):
    """One bit of one weight."""
    name = "patch_embed.conv_down.3.weight"
    content = files["ours.pth"].read_bytes()
    values = weights[name].tobytes()
    assert content.count(values) == 1
    at = content.index(values) + 17
    path = tmp_path / "file.pth"
    path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    with pytest.raises(WeightsError, match=r"file\.pth: .*do not match their checksum: the file is damaged; download"):
        fv.from_pretrained(path)


@pytest.mark.parametrize("name", ["ours.pth", "ours.safetensors", "official.pth.tar"])
def test_truncated(files, tmp_path, plain, name):
    content, path = files[name].read_bytes(), tmp_path / name
    lengths = {*range(0, 100), *range(len(content) - 30, len(content)), *range(100, len(content), len(content) // 97)}
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(plain.WeightsError, match=rf"{name}: .*(download|save|is cut off|zip archive|save it)"):
            plain.open_source(path)
    path.write_bytes(content)
    assert plain.open_source(path).arrays


def tar_file(path):
    (path.parent / "tensors").write_bytes(b"x" * 100)
    with tarfile.open(path, "w") as opened:
        opened.add(path.parent / "tensors", "tensors")


OTHER_FORMATS = {
    "empty": (b"", "the file is empty: download or save it again"),
    "web page": (b"\n<!DOCTYPE html><html>", "a web page, not a checkpoint: download the file itself"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "LFS pointer.*git lfs pull"),
    "legacy": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.",
               r"before 1\.6.*torch\.load\(OLD.*weights_only=False.*torch\.save\(\{'state_dict'"),
    "pickle": (pickle.dumps({"a": 1}), "before 1.6, or of another program.*torch.load"),
    "gzip": (gzip.compress(b"x"), "before 1.6, or of another program"),
    "tar": (tar_file, "before 1.6, or of another program"),
    "text": (b"hello, world", r"no file of torch\.save: it begins with b'hello, w'"),
    "end of an archive": (archive([]), "no file of torch.save"),
    "NumPy": (np.lib.format.magic(1, 0) + bytes(100), "no file of torch.save"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_other_formats(tmp_path, kind):
    content, message = OTHER_FORMATS[kind]
    path = tmp_path / "file.pth"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"file\.pth: .*{message}"):
        fv.from_pretrained(path)


# Files that are read, but hold no weights, or none that can be used

STATES = {
    "number": (program(number(3)), "it holds int, expected a state dict"),
    "tensor": (program(tensor()), "it holds StoredArray, expected a state dict"),
    "no tensors": (program(mapping({"epoch": number(3), "net": mapping({"a": tensor()})})),
                   "no state dict in it: it has the keys 'epoch', 'net'"),
    "empty": (program(mapping({"state_dict": mapping({})})), "no state dict in it"),
    "entry that is no tensor": (program(mapping({"state_dict": mapping({"a": tensor(), "b": number(1)})})),
                                "entry 'b' of the state dict is int, expected a tensor"),
    "entry that is a list": (program(mapping({"a": tensor(), "b": b"]"})), "entry 'b' of the state dict is list"),
    "same name": (program(mapping({"head.weight": tensor(), "module.head.weight": tensor()})),
                  "'head.weight' and 'module.head.weight' are both 'head.weight', once the prefixes"),
    "same name of several prefixes": (
        program(mapping({"state_dict": mapping({"_orig_mod.module.a": tensor(), "model.a": tensor()})})),
        "'_orig_mod.module.a' and 'model.a' are both 'a'"),
    "huge number as key": (program(b"}" + number(1 << 20000) + tensor() + b"s"), "no FasterViT|key"),
    "huge number as key, no tensors": (program(b"}" + number(1 << 20000) + b"Ns"), "no state dict in it"),
    "huge number twice as key": (program(b"}" + (number(1 << 20000) + b"Ns") * 2), "is there twice|damaged"),
    "other model": (program(mapping({"conv1.weight": tensor(), "fc.weight": tensor()})),
                    "no FasterViT: it lacks 'patch_embed.conv_down.0.weight'. It has 2 arrays: conv1.weight, fc.w"),
    "no axes": (program(mapping({"patch_embed.conv_down.0.weight": tensor()})), "expected 4 axes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_no_weights(save, plain, kind):
    pickled, message = STATES[kind]
    with pytest.raises(plain.WeightsError, match=rf"file\.pth.*: .*{message}"):
        plain.infer(plain.open_source(save(pickled)), {})


def test_state_dict_beside_other_tensors(save):
    """As the checkpoints of PyTorch's ImageNet example have them: best_acc1 is a tensor."""
    saved = {"epoch": number(3), "state_dict": mapping({"a": tensor()}), "best_acc1": tensor(shape=(), strides=())}
    assert list(pretrained.open_source(save(program(mapping(saved)))).arrays) == ["a"]


def rewritten(files, path, changed: dict[str, np.ndarray]):
    """Our file, with some arrays changed, in the format of `path`."""
    if path.suffix == ".safetensors":
        from safetensors import numpy as safetensors

        return safetensors.save_file({**safetensors.load_file(files["ours.safetensors"]), **changed}, path)
    saved, note = read_torch_file(files["ours.pth"])
    write_torch_file(path, {**saved, **{name: in_memory(values) for name, values in changed.items()}}.items(), note)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["head.weight", "levels.0.blocks.0.norm1.running_var"])
def test_weights_that_are_not_finite(files, weights, tmp_path, suffix, name, value):
    path = tmp_path / f"file{suffix}"
    changed = weights[name].copy()
    changed[-1] = value
    rewritten(files, path, {name: changed})
    message = rf"file{suffix}: {name}: {changed[-1].size} of {changed.size} values are NaN or infinite"
    with pytest.raises(WeightsError, match=message):
        fv.from_pretrained(path)


# The last: a NaN that traps.
@pytest.mark.parametrize("bits", [0x7E37E43C8800759C, 0x7FF8000000000000, 0x7FF0000000000000, 0x7FF0000000000001])
def test_float64_weights_that_are_not_finite_in_float32(files, weights, tmp_path, bits):
    from safetensors import numpy as safetensors

    path = tmp_path / "file.safetensors"
    changed = weights["norm.weight"].astype(np.float64)
    changed.view(np.uint64)[3] = bits
    safetensors.save_file({**safetensors.load_file(files["ours.safetensors"]), "norm.weight": changed}, path)
    with pytest.raises(WeightsError, match=r"norm\.weight: 1 of 16 values are NaN or infinite"):
        fv.from_pretrained(path)


WRONG_CONFIGS = {
    "number": (3, "note of its architecture is 3, expected an object"),
    "huge number": ({"dim": 10**400}, "the file states is no FasterViT's"),
    "huge depth": ({"depths": [1, 1, 1, 10**400]}, "the file states is no FasterViT's"),
    "huge rate": ({"drop_rate": 10**400}, "the file states is no FasterViT's"),
    "huge ratio": ({"mlp_ratio": 1e308}, "the file states is"),
    "huge ratio of a huge number": ({"mlp_ratio": 10**400}, "the file states is no FasterViT's"),
    "not a number": ({"mlp_ratio": math.nan}, "the file states is no FasterViT's: mlp_ratio=nan"),
    "text": ({"dim": "2"}, "the file states is no FasterViT's: dim='2'"),
    "list": ({"dim": [2]}, "the file states is no FasterViT's: dim="),
    "dtype": ({"dtype": ["float32"]}, "the file states is no FasterViT's: dtype="),
    "short": ({"depths": [1, 1, 1]}, "the file states is no FasterViT's: depths="),
    "unknown field": ({"colour": 1}, "the file states is no FasterViT's.*colour"),
    "other depths": ({"depths": [1, 1, 1, 2]}, r"the file states is not that of its arrays:\n  depths: stated"),
    "other width": ({"dim": 4}, r"is not that of its arrays:\n  dim: stated 4, by the arrays 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["ours.pth", "ours.safetensors"])
@pytest.mark.parametrize("kind", WRONG_CONFIGS)
def test_wrong_notes(files, tmp_path, plain, kind, name):
    changes, message = WRONG_CONFIGS[kind]
    seed, path = Seed.of(files[name]), tmp_path / name
    config = {**json.loads(seed.note)["config"], **changes} if isinstance(changes, dict) else changes
    path.write_bytes(seed.file(note=json.dumps({"config": config}).encode()))
    with pytest.raises(plain.WeightsError, match=f"(?s){name}: .*{message}"):
        plain.infer(plain.open_source(path), {})


# safetensors


def entry(dtype: str = "F32", shape: tuple = (4,), offsets: tuple = (0, 16)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def with_note(note: str) -> dict:
    return {"__metadata__": {NOTE: note}, "a": entry()}


ENTRY = json.dumps(entry())
WRONG_SAFETENSORS = {
    "empty": (b"", "no safetensors file, or a damaged one"),
    "web page": (b"<!DOCTYPE html><html>", "no safetensors file, or a damaged one"),
    "cut off": (safetensors_file({"a": entry()})[:-1], "no safetensors file, or a damaged one"),
    "longer": (safetensors_file({"a": entry()}) + b"x", "no safetensors file, or a damaged one"),
    "header of 10 GB": (safetensors_file({"a": entry()}, length=TEN_GB), "no safetensors file.*header"),
    "header of 90 MB": (safetensors_file({"a": entry()}, length=9 * 10**7), "no safetensors file.*header"),
    "largest header": (safetensors_file({"a": entry()}, length=2**64 - 1), "no safetensors file.*header"),
    "header of nothing": (safetensors_file(b"", b""), "no safetensors file"),
    "array of 10 GB": (safetensors_file({"a": entry(shape=(TEN_GB // 4,), offsets=(0, TEN_GB))}), "no safetensors"),
    "shape of 10 GB": (safetensors_file({"a": entry(shape=(TEN_GB // 4,))}), "no safetensors"),
    "name twice": (safetensors_file(f'{{"a": {ENTRY}, "a": {json.dumps(entry(offsets=(16, 32)))}}}'.encode(),
                                    2 * FOUR.tobytes()), "no safetensors file, or a damaged one"),
    "same name": (safetensors_file({"a": entry(), "module.a": entry(offsets=(16, 32))}, 2 * FOUR.tobytes()),
                  "are both 'a', once the prefixes"),
    "float8": (safetensors_file({"a": entry("F8_E4M3", (16,))}), "a has dtype F8_E4M3, expected one of F64, F32"),
    "no such dtype": (safetensors_file({"a": entry("F31")}), "no safetensors file.*F31"),
    "huge side that holds nothing": (safetensors_file({"a": entry(shape=(0, 2**63), offsets=(0, 0))}, b""), "shape"),
    "huge sides that hold nothing": (safetensors_file({"a": entry(shape=(0, 2**62, 2**62), offsets=(0, 0))}, b""),
                                     "shape"),
    "many axes": (safetensors_file({"a": entry(shape=(1,) * 70 + (4,))}), "axes"),
    "note that is no JSON": (safetensors_file(with_note("{")), "no safetensors file, or a damaged one"),
    "note in a list": (safetensors_file(with_note("[]")), f"{NOTE} holds list, expected an object"),
    "note of nothing": (safetensors_file(with_note("null")), f"{NOTE} holds NoneType, expected an object"),
    "deep note": (safetensors_file(with_note("[" * 10**5)), "damaged"),
    "huge number in the note": (safetensors_file(with_note("1" * 5000)), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_SAFETENSORS)
def test_wrong_safetensors(tmp_path, plain, kind):
    content, message = WRONG_SAFETENSORS[kind]
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with little_memory(), pytest.raises(plain.WeightsError, match=rf"file\.safetensors: .*{message}"):
        plain.from_pretrained(path)
