"""Datasets that TFDS prepared, small ones of its own builders: contents, damaged files, errors."""

import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
from array_record.python import array_record_module

from fastervit_jax.data import imagenet, records
from tests.data import mini

GOLDEN = str(mini.GOLDEN)


@pytest.fixture
def copy(tmp_path):
    """Copy a committed dataset; gives the folder of its version. DIR of the copy is tmp_path."""

    def copy_dataset(name: str = "imagenet2012", new_name: str | None = None) -> pathlib.Path:
        shutil.copytree(mini.GOLDEN / name, tmp_path / (new_name or name))
        return next((tmp_path / (new_name or name)).rglob("features.json")).parent

    return copy_dataset


def names(source: records.RecordSource) -> list[str]:
    return [re.search(r"\((.*)\)$", source.record_name(i))[1] for i in range(len(source))]


def assert_is_picture(encoded: bytes, name: str) -> None:
    """The JPEG file is the picture of that name, as near as JPEG is."""
    expected = mini.picture(name, mini.SMALL)
    decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    decoded = decoded[..., None] if decoded.ndim == 2 else decoded[..., ::-1]
    assert decoded.shape == expected.shape
    assert np.abs(decoded.astype(int) - expected).mean() < 10


@pytest.mark.parametrize("split", ["train", "validation"])
def test_imagenet(split):
    source = records.open_split("imagenet2012", split, GOLDEN)
    labels = dict(zip(mini.validation_names(), mini.VALIDATION_LABELS, strict=True))
    if split == "train":
        labels = {name: mini.SYNSETS[name.split("_")[0]] for name in mini.train_names()}
    assert sorted(names(source)) == sorted(labels)
    for i, name in enumerate(names(source)):
        record = source[i]
        assert set(record) == {"image", "label"}
        assert record["label"] == labels[name]
        assert isinstance(record["label"], np.int32)
        assert_is_picture(record["image"], name)
    assert (source.num_classes, source.classes) == (1000, None)
    assert [source.class_names[label] for label in mini.SYNSETS.values()] == list(mini.SYNSETS)
    assert source.class_names == tuple(sorted(source.class_names))


@pytest.mark.parametrize(
    ("name", "classes"),
    [("imagenet_v2", None), ("imagenet_sketch", None), ("imagenet_a", imagenet.IMAGENET_A),
     ("imagenet_r", imagenet.IMAGENET_R)],
)
def test_test_sets(name, classes):
    """Their labels are those of ImageNet's 1000 classes, also where 200 of them occur."""
    source = records.open_split(name, "test", GOLDEN)
    synsets = records.open_split("imagenet2012", "train", GOLDEN).class_names
    assert (source.num_classes, source.class_names, source.classes) == (1000, synsets, classes)
    expected = {entry["file_name"]: entry["label"] for entry in mini.ENTRIES[name]}
    assert sorted(names(source)) == sorted(expected)
    for i, file_name in enumerate(names(source)):
        label = expected[file_name]
        assert source[i]["label"] == (synsets.index(label) if isinstance(label, str) else label)
        assert classes is None or source[i]["label"] in classes
        assert_is_picture(source[i]["image"], file_name)


def test_several_labels():
    source = records.open_split("imagenet2012_real", "validation", GOLDEN)
    expected = {entry["file_name"]: entry["real_label"] for entry in mini.ENTRIES["imagenet2012_real"]}
    found = {name: source[i]["label"] for i, name in enumerate(names(source))}
    assert {name: list(np.flatnonzero(label)) for name, label in found.items()} == expected
    assert {(label.dtype, label.shape) for label in found.values()} == {(np.dtype(bool), (1000,))}
    assert source.multi_label


@pytest.mark.parametrize("name", ["imagenet_v2", "imagenet_v2/matched-frequency", "imagenet_v2:3.0.0",
                                  "imagenet_v2/matched-frequency:3.0.0"])
def test_configurations_and_versions(name):
    assert records.open_split(name, "test", GOLDEN).name == "imagenet_v2/matched-frequency/3.0.0 test"


def test_the_newest_version_and_the_noted_configuration(copy):
    version = copy("imagenet_v2")
    for config, number in (("topimages", "3.0.0"), ("matched-frequency", "3.10.0"), ("matched-frequency", "3.9.0"),
                           ("matched-frequency", "incomplete.AB12CD_4.0.0")):
        shutil.copytree(version, version.parents[1] / config / number)
        mini.edit_info(version.parents[1] / config / number, lambda info, number=number: info.update(version=number))
    data_dir = str(version.parents[2])
    directory = records.open_split("imagenet_v2", "test", data_dir).directory
    assert directory.endswith("imagenet_v2/matched-frequency/3.10.0")
    assert records.open_split("imagenet_v2:3.9.0", "test", data_dir).directory.endswith("matched-frequency/3.9.0")
    assert records.open_split("imagenet_v2/topimages", "test", data_dir).directory.endswith("topimages/3.0.0")
    shutil.rmtree(version.parents[1] / ".config")
    with pytest.raises(ValueError, match="expected one of imagenet_v2/matched-frequency, imagenet_v2/topimages"):
        records.open_split("imagenet_v2", "test", data_dir)


def test_splits_run_over_shards(copy):
    version = copy()
    shards = mini.reshard(version, "train", 5)
    whole = records.open_split("imagenet2012", "train", GOLDEN)
    for split, positions in (("train", range(24)), ("train[2:11]", range(2, 11)),
                             ("train[75%:]+train[:2]", [*range(18, 24), 0, 1])):
        source = records.open_split("imagenet2012", split, str(version.parents[1]))
        assert len(source) == len(positions)
        for i, position in enumerate(positions):
            np.testing.assert_equal(source[i], whole[position])
    # Three of 24 lie in the first shard, five in the second.
    first = records.open_split("imagenet2012", "train[2:11]", str(version.parents[1]))
    assert f"imagenet2012/5.1.0 train[2:11], record 0, {shards[0]} record 2 (n" in first.record_name(0)
    assert f"record 1, {shards[1]} record 0 (n" in first.record_name(1)
    assert f"record 6, {shards[2]} record 0 (n" in first.record_name(6)


def test_reading_needs_no_tensorflow(tmp_path):
    """In a fresh process, which is given the source as worker processes are."""
    source = records.open_split("imagenet2012", "train", GOLDEN)
    source[0]  # opens its files
    (tmp_path / "source.pickle").write_bytes(pickle.dumps(source))
    assert set(vars(pickle.loads(pickle.dumps(source)))) == {"name", "directory", "split", "length", "features"}
    program = """
import importlib.abc, importlib.machinery, pathlib, pickle, sys
imported = []
class Watch(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "tensorflow" else None
    def create_module(self, spec):
        imported.append(spec.name)
        raise ImportError(spec.name)
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Watch())
source = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())
print(*(source[i]["label"] for i in range(len(source))))
from fastervit_jax.data import records
for name in ("imagenet2012", "imagenet2012_real"):
    opened = records.open_split(name, "validation[:3]", sys.argv[2])
    print(opened.record_name(1), len(opened[2]["image"]))
assert "tensorflow" not in sys.modules
assert not imported, imported
"""
    result = subprocess.run([sys.executable, "-c", program, tmp_path / "source.pickle", GOLDEN], check=True, text=True,
                            stdout=subprocess.PIPE)
    assert result.stdout.splitlines()[0].split() == [str(source[i]["label"]) for i in range(24)]


def cut(path: pathlib.Path, size: int) -> None:
    os.truncate(path, size)


def flip(path: pathlib.Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is not there"),
        (lambda path: cut(path, 0), "is empty"),
        (lambda path: cut(path, path.stat().st_size // 2), "has 0 records; dataset_info.json says 5"),
        (lambda path: cut(path, path.stat().st_size // 4 * 3), "is damaged or cut off"),
        (lambda path: cut(path, path.stat().st_size - 1), "is damaged or cut off"),
        (lambda path: path.write_bytes(b"\xff\xd8" * 70_000), "is damaged or cut off"),
        (lambda path: flip(path, 64 + 40 + 100), r"is damaged or cut off \(.*hash mismatch"),
        (lambda path: shutil.copy(path.with_name(path.name.replace("-00002-", "-00000-")), path),
         "has 3 records; dataset_info.json says 5"),
    ],
    ids=["missing", "empty", "half", "three quarters", "a byte short", "other bytes", "flipped bit", "another shard"],
)
def test_damaged_shards_are_named_at_the_start(copy, damage, message):
    version = copy()
    shards = mini.reshard(version, "train", 5)
    damage(shards[2])
    shards[4].unlink()
    with pytest.raises(ValueError, match="2 of 5 shards cannot be used") as error:
        records.open_split("imagenet2012", "train", str(version.parents[1]))
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert re.match(f"{re.escape(str(shards[2]))} {message}", lines[1])
    assert lines[2] == f"{shards[4]} is not there"
    assert lines[3].startswith("copy them again")
    # What the bad shards are no part of can be read.
    assert len(records.open_split("imagenet2012", "train[:2]", str(version.parents[1]))) == 2


def test_a_damaged_record_raises_alone(copy):
    version = copy()
    (path,) = mini.shards(version, "train")
    whole = records.open_split("imagenet2012", "train", GOLDEN)
    encoded = whole[7]["image"]
    flip(path, path.read_bytes().index(encoded[-200:]) + 100)
    source = records.open_split("imagenet2012", "train", str(version.parents[1]))
    for i in range(24):
        if i == 7:
            where = re.escape(f"imagenet2012/5.1.0 train, record 7, {path} record 7: cannot be read (")
            with pytest.raises(ValueError, match=where):
                source[i]
            assert source.record_name(i) == f"imagenet2012/5.1.0 train, record 7, {path} record 7"
        else:
            np.testing.assert_equal(source[i], whole[i])


def test_no_flipped_byte_goes_unseen(copy):
    """Wherever a byte is flipped: an error that names the file, or the same records."""
    version = copy("imagenet_a")
    (path,) = mini.shards(version, "test")
    content = path.read_bytes()
    whole = records.open_split("imagenet_a", "test", GOLDEN)
    expected = [whole[i] for i in range(4)]
    seen = 0
    for position in np.random.RandomState(0).randint(len(content.rstrip(b"\0")), size=60):
        flip(path, position)
        try:
            source = records.open_split("imagenet_a", "test", str(version.parents[1]))
            found, message = [source[i] for i in range(4)], ""
        except ValueError as error:
            found, message = None, str(error)
        if found is None:
            assert str(path) in message
            seen += 1
        else:
            np.testing.assert_equal(found, expected)
        path.write_bytes(content)
    assert seen > 5


def test_open_files(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, hard), hard))
        records.allow_open_files(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    with pytest.raises(OSError, match=r"1024 shards need about 1280 open files, and the system allows 1024 a process"):
        records.allow_open_files(1024)


def test_tfrecord_is_refused_with_the_command_that_converts(copy):
    version = copy()
    mini.edit_info(version, lambda info: info.update(fileFormat="tfrecord"))
    with pytest.raises(ValueError, match="holds tfrecord files, which have no random access") as error:
        records.open_split("imagenet2012", "train", str(version.parents[1]))
    assert str(error.value).endswith(f"    tfds convert_format --dataset_version_dir={version} "
                                     "--out_file_format=array_record")
    # As that command leaves it.
    mini.edit_info(version, lambda info: info.update(alternativeFileFormats=["array_record"]))
    source = records.open_split("imagenet2012", "train[3:]", str(version.parents[1]))
    np.testing.assert_equal(source[2], records.open_split("imagenet2012", "train", GOLDEN)[5])


def test_a_dataset_of_ones_own(copy, tmp_path):
    """Its name is not TFDS's, and it has neither supervised keys nor file names."""
    version = copy("imagenet_a", "my_bugs")
    (path,) = mini.shards(version, "test")
    path.rename(path.with_name(path.name.replace("imagenet_a", "my_bugs")))
    mini.edit_info(version, lambda info: [info.pop(key) for key in ("supervisedKeys", "moduleName", "name")])
    mini.edit_info(version, lambda info: info.update(name="my_bugs"))
    features = json.loads((version / "features.json").read_text())
    del features["featuresDict"]["features"]["file_name"]
    (version / "features.json").write_text(json.dumps(features))
    source = records.open_split("my_bugs", "test", str(tmp_path))
    original = records.open_split("imagenet_a", "test", GOLDEN)
    for i in range(4):
        np.testing.assert_equal(source[i], original[i])
    assert source.classes is None
    assert source.record_name(1).endswith("00000-of-00001 record 1")


@pytest.mark.parametrize(
    ("feature", "change", "message"),
    [
        ("label", {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}},
         "label feature 'label' is Text.*; expected a ClassLabel, or a sequence of them"),
        ("label", {"pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
                   "classLabel": {}}, "does not say how many classes it has"),
        ("image", {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}},
         "feature 'image' is Text.*; expected an Image of uint8"),
    ],
)
def test_features_that_are_not_images_with_classes(copy, feature, change, message):
    version = copy()
    features = json.loads((version / "features.json").read_text())
    features["featuresDict"]["features"][feature] = change
    (version / "features.json").write_text(json.dumps(features))
    if "classLabel" in change:
        (version / "label.labels.txt").unlink()
    with pytest.raises(ValueError, match=message):
        records.open_split("imagenet2012", "train", str(version.parents[1]))


def test_features_that_cannot_be_chosen(copy):
    version = copy("imagenet2012_real")
    mini.edit_info(version, lambda info: info.pop("supervisedKeys"))
    features = json.loads((version / "features.json").read_text())
    del features["featuresDict"]["features"]["original_label"]
    (version / "features.json").write_text(json.dumps(features))
    with pytest.raises(ValueError, match=r"no supervised keys and 0 features that could be the label \(none\)"):
        records.open_split("imagenet2012_real", "validation", str(version.parents[1]))


def test_labels_that_are_not_known(copy):
    """ImageNet's test split has -1."""
    from tensorflow_datasets.proto import tf_example_pb2

    version = copy()
    (path,) = mini.shards(version, "train")
    reader = array_record_module.ArrayRecordReader(str(path))
    examples = [tf_example_pb2.Example.FromString(record) for record in reader.read_all()]
    reader.close()
    examples[0].features.feature["label"].int64_list.value[0] = -1
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for example in examples:
        writer.write(example.SerializeToString())
    writer.close()
    with pytest.raises(ValueError, match=r"train, record 0, .*: its label is -1; expected 0 to 999"):
        records.open_split("imagenet2012", "train", str(version.parents[1]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet2012", r"no dataset 'imagenet2012' in \S+: expected digits, folder, or a prepared dataset, which "
         r"would be in \S+/imagenet2012/VERSION. .*--config.data.dir=FOLDER(?s:.*)\n    python -m fastervit_jax.data."
         r"prepare imagenet2012 --manual_dir=FOLDER_WITH_ITS_ARCHIVES --data_dir=\S+$"),
        ("my_birds/small", r"\n    python -m fastervit_jax.data.prepare my_birds/small --data_dir=\S+$"),
        ("imagenet_a:9.0.0", "no version 9.0.0 of 'imagenet_a:9.0.0' in .*; there are 0.1.0"),
        ("imagenet_v2/topimages", "expected one of imagenet_v2/matched-frequency"),
        ("a b", "dataset 'a b': expected NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION"),
    ],
)
def test_datasets_that_are_not_there(tmp_path, name, message):
    data_dir = GOLDEN if name.startswith("imagenet_") else str(tmp_path)
    with pytest.raises(ValueError, match=message):
        records.open_split(name, "train", data_dir)


def test_the_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=rf"in {tmp_path}/tensorflow_datasets \(TFDS's default, as config.data.dir"):
        records.open_split("imagenet_a", "test", "")
    monkeypatch.setenv("TFDS_DATA_DIR", GOLDEN)
    assert len(records.open_split("imagenet_a", "test", "")) == 4
