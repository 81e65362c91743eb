"""Preparing ImageNet: what is checked before the build, and the build itself on miniature archives."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from fastervit_jax.data import prepare, records
from tests.data import mini

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    mini.write_archives(folder, per_class=2, sides=mini.SMALL)
    return folder


def check(folder: pathlib.Path) -> None:
    prepare.check_archives([folder / TRAIN, folder / VALIDATION])


def test_whole_archives_of_a_part_of_imagenet(archives, capsys):
    check(archives)
    assert capsys.readouterr().out.splitlines() == [
        f"{archives / TRAIN} holds 4 of ImageNet's 1000 classes: the dataset will be that part of it.",
        f"{archives / VALIDATION} holds the first 8 of 50,000 validation images: the dataset will be that part.",
    ]


def test_all_of_imagenet_needs_no_note(tmp_path, capsys):
    synsets = prepare.class_synsets()
    assert (len(synsets), synsets[0], synsets[999]) == (1000, "n01440764", "n15075141")
    (tmp_path / TRAIN).write_bytes(mini.tar({f"{s}.tar": mini.tar({f"{s}_1.JPEG": b"image"}) for s in synsets}))
    (tmp_path / VALIDATION).write_bytes(mini.tar({name: b"image" for name in mini.validation_names(50_000)}))
    check(tmp_path)
    assert capsys.readouterr().out == ""


def member_starts(path: pathlib.Path) -> list[int]:
    with tarfile.open(path) as archive:
        return [member.offset for member in archive.getmembers()]


def cut(path: pathlib.Path, size: int) -> None:
    os.truncate(path, size)


@pytest.mark.parametrize("file", [TRAIN, VALIDATION])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is not there"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a file"),
        (lambda path: cut(path, 0), "is empty"),
        (lambda path: path.write_bytes(b"<html>Please log in</html>" * 50), r"is no tar file, or a damaged one \("),
        (lambda path: path.write_bytes(b"PK\3\4"), r"is no tar file, or a damaged one \("),
        (lambda path: cut(path, member_starts(path)[3] + 512 + 300), "is cut off after [0-9,]+ bytes, in {fourth}, "),
        (lambda path: cut(path, member_starts(path)[3] + 512), "is cut off after [0-9,]+ bytes, in {fourth}, which"),
        (lambda path: cut(path, member_starts(path)[3] + 100), "is cut off after [0-9,]+ bytes, behind {third}"),
        (lambda path: cut(path, member_starts(path)[3]), "is cut off after [0-9,]+ bytes, behind {third}"),
    ],
    ids=["missing", "folder", "empty", "page", "zip", "in a member", "behind a header", "in a header", "between"],
)
def test_archives_that_are_not_whole(archives, file, damage, message):
    with tarfile.open(archives / file) as archive:
        names = archive.getnames()
    damage(archives / file)
    expected = message.format(third=re.escape(names[2]), fourth=re.escape(names[3]))
    with pytest.raises(ValueError, match=rf"{re.escape(str(archives / file))} {expected}") as error:
        check(archives)
    other = ({TRAIN, VALIDATION} - {file}).pop()
    assert f"{archives / other} " not in str(error.value)


def test_every_archive_is_told_of(archives):
    (archives / TRAIN).unlink()
    cut(archives / VALIDATION, 0)
    with pytest.raises(ValueError, match="cannot be used") as error:
        check(archives)
    assert str(error.value).splitlines()[1:3] == [f"{archives / TRAIN} is not there",
                                                  f"{archives / VALIDATION} is empty"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"train/n01751748.tar": mini.tar({"n01751748_1.JPEG": b""})}, "a member 'train/n01751748.tar'; expected n#"),
        ({"n01751748_1.JPEG": b"image"}, "has a member 'n01751748_1.JPEG'; expected n########.tar, one a class"),
        ({"n00000001.tar": mini.tar({"n00000001_1.JPEG": b""})}, "n00000001.tar, which is none of the 1000 classes"),
        ({"n01751748.tar": b"image" * 400}, "has n01751748.tar, which is no tar file itself"),
        ({"n01751748.tar": b""}, "has n01751748.tar, which is no tar file itself"),
        ({"n01751748.tar": mini.tar({"n02105855_1.JPEG": b""})}, "whose first member is 'n02105855_1.JPEG'; exp"),
        ({}, "holds nothing"),
    ],
)
def test_train_archives_of_another_kind(archives, members, message):
    (archives / TRAIN).write_bytes(mini.tar(members))
    with pytest.raises(ValueError, match=message):
        check(archives)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000003.JPEG"],
         "has 'ILSVRC2012_val_00000003.JPEG' where ILSVRC2012_val_00000002.JPEG is expected: labels go by position"),
        (["val/ILSVRC2012_val_00000001.JPEG"], "has 'val/ILSVRC2012_val_00000001.JPEG' where ILSVRC2012_val_00000001"),
        ([], "holds nothing"),
    ],
)
def test_validation_archives_whose_labels_would_be_wrong(archives, names, message):
    (archives / VALIDATION).write_bytes(mini.tar({name: b"image" for name in names}))
    with pytest.raises(ValueError, match=message):
        check(archives)


def test_archives_are_not_read_through(archives):
    """One of 2 TB, on a disk that has not that much: what lies between the headers is skipped."""
    size = 2 << 40
    header = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
    header.size = size
    (archives / VALIDATION).write_bytes(header.tobuf(tarfile.GNU_FORMAT))
    cut(archives / VALIDATION, 512 + size + 1024)
    start = time.monotonic()
    check(archives)
    assert time.monotonic() - start < 5


def test_packages(monkeypatch):
    find_spec = importlib.util.find_spec
    for lacking in (("tensorflow",), ("importlib_resources",), ("tensorflow", "importlib_resources")):
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name, lacking=lacking: None if name in lacking else find_spec("json"))
        with pytest.raises(ValueError, match=rf"preparing needs {' and '.join(lacking)} .*: pip install tensorflow "
                                             "importlib_resources$"):
            prepare.check_packages()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find_spec("json"))
    prepare.check_packages()


def test_disk_space(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(300e9, 200e9, 100e9))
    prepare.check_space(tmp_path / "not" / "there", int(90e9))
    with pytest.raises(OSError, match=r"there: 100.0 GB are free, 153.0 GB are needed, .* folder as --data_dir"):
        prepare.check_space(tmp_path / "not" / "there", int(150e9))


def run(python: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([python, "-m", "fastervit_jax.data.prepare", *arguments], cwd=ROOT, capture_output=True,
                          text=True, check=False)


def test_command_names_the_paths_that_it_expects(tmp_path):
    result = run(sys.executable, "imagenet2012", f"--manual_dir={tmp_path / 'a'}", f"--data_dir={tmp_path / 'b'}")
    assert result.returncode == 1
    for name in (TRAIN, VALIDATION):
        assert f"{tmp_path}/a/{name} is not there\n" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "b").exists()


def test_what_is_not_prepared(tmp_path):
    with pytest.raises(ValueError, match=r"TensorFlow Datasets [0-9.]+ has no dataset 'my_birds'"):
        prepare.prepare("my_birds", "", str(tmp_path))
    with pytest.raises(ValueError, match=f"imagenet2012_real is made from {VALIDATION}: give the folder that holds "
                                         "them as --manual_dir=FOLDER"):
        prepare.prepare("imagenet2012_real", "", str(tmp_path))


def test_what_is_there_is_left_alone(tmp_path, capsys):
    shutil.copytree(mini.GOLDEN / "imagenet2012", tmp_path / "imagenet2012")
    (tmp_path / "imagenet2012" / "incomplete.AB12CD_5.1.0").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    prepare.prepare("imagenet2012", "", str(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/imagenet2012/5.1.0 is there already: nothing to do.", "train: 24 images", "validation: 8 images",
        "To train on it:", "    python train.py --config=configs/imagenet.py:faster_vit_0_224 --workdir=runs/imagenet "
        f"--config.data.dir={tmp_path}"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    (shard,) = mini.shards(tmp_path / "imagenet2012" / "5.1.0", "validation")
    cut(shard, 70_000)
    with pytest.raises(ValueError, match=rf"1 of 1 shards cannot be used:\n{re.escape(str(shard))} is damaged"):
        prepare.prepare("imagenet2012", "", str(tmp_path))


def test_a_configuration_is_not_another(tmp_path):
    """imagenet_v2 is matched-frequency for TFDS, also where another configuration is there."""
    shutil.copytree(mini.GOLDEN / "imagenet_v2" / "matched-frequency", tmp_path / "imagenet_v2" / "topimages")
    assert records.is_there("imagenet_v2", str(tmp_path))
    assert prepare._with_config("imagenet_v2") == "imagenet_v2/matched-frequency"
    assert prepare._with_config("imagenet_v2:3.0.0") == "imagenet_v2/matched-frequency:3.0.0"
    assert prepare._with_config("imagenet_v2/topimages") == "imagenet_v2/topimages"
    assert prepare._with_config("imagenet2012") == "imagenet2012"


def test_what_a_killed_build_leaves_is_not_a_dataset(tmp_path, capsys, monkeypatch):
    left = tmp_path / "imagenet2012" / "incomplete.AB12CD_5.1.0"
    shutil.copytree(mini.GOLDEN / "imagenet2012" / "5.1.0", left)
    assert not records.is_there("imagenet2012", str(tmp_path))
    with pytest.raises(ValueError, match="is not there"):
        prepare.prepare("imagenet2012", str(tmp_path), str(tmp_path))
    assert capsys.readouterr().out == (f"{left} was left by a build that did not end: delete it, unless that build "
                                       "still runs.\n")


def tensorflow_python() -> str:
    assert "FASTERVIT_TENSORFLOW" in os.environ, "FASTERVIT_TENSORFLOW should name a Python that has TensorFlow"
    return os.environ["FASTERVIT_TENSORFLOW"]


@pytest.mark.tensorflow
def test_imagenet_from_its_archives(tmp_path):
    """TFDS's own builder, on miniature archives: labels and bytes that went in come out here, without TensorFlow."""
    python = tensorflow_python()
    data = tmp_path / "data"
    mini.write_archives(tmp_path, per_class=8)
    arguments = ("imagenet2012", f"--manual_dir={tmp_path}", f"--data_dir={data}")

    # Killed while it writes, it leaves nothing that counts as a dataset.
    killed = subprocess.Popen([python, "-m", "fastervit_jax.data.prepare", *arguments], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(data.glob("imagenet2012/incomplete.*")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not records.is_there("imagenet2012", str(data))

    first = run(python, *arguments)
    assert first.returncode == 0, first.stderr
    assert "holds 4 of ImageNet's 1000 classes" in first.stdout
    assert "was left by a build that did not end" in first.stdout
    assert "train: 32 images\nvalidation: 8 images\nTo train on it:\n" in first.stdout
    assert f"--config.data.dir={data}" in first.stdout

    assert "tensorflow" not in sys.modules
    labels = {"train": {name: mini.SYNSETS[name.split("_")[0]] for name in mini.train_names(8)},
              "validation": dict(zip(mini.validation_names(), mini.VALIDATION_LABELS, strict=True))}
    for split, expected in labels.items():
        source = records.open_split("imagenet2012", split, str(data))
        found = {re.search(r"\((.*)\)$", source.record_name(i))[1]: source[i] for i in range(len(source))}
        assert {name: record["label"] for name, record in found.items()} == expected
        assert {name: record["image"] for name, record in found.items()} == {name: mini.jpeg(name) for name in expected}
    assert json.loads((data / "imagenet2012/5.1.0/dataset_info.json").read_text())["fileFormat"] == "array_record"

    before = {path: path.stat().st_mtime_ns for path in data.rglob("*")}
    second = run(python, *arguments)
    assert second.returncode == 0
    assert f"{data}/imagenet2012/5.1.0 is there already: nothing to do." in second.stdout
    assert {path: path.stat().st_mtime_ns for path in data.rglob("*")} == before


@pytest.mark.tensorflow
def test_the_committed_datasets_are_what_their_command_writes(tmp_path):
    result = subprocess.run([tensorflow_python(), "-m", "tests.data.mini", tmp_path], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name, split in [("imagenet2012", "train"), ("imagenet2012", "validation"), ("imagenet2012_real", "validation"),
                        *((name, "test") for name in ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch"))]:
        made, kept = (records.open_split(name, split, str(folder)) for folder in (tmp_path, mini.GOLDEN))
        assert len(made) == len(kept)
        for i in range(len(made)):
            # The bytes of an image may differ with the version of the library that encodes it.
            np.testing.assert_equal(made[i]["label"], kept[i]["label"])
            assert made.record_name(i).split("(")[1] == kept.record_name(i).split("(")[1]
    kept, made = ({str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (mini.GOLDEN, tmp_path))
    assert kept == made
