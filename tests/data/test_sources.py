"""Digits and folders, and what all kinds of sources have in common: splits, names, errors."""

import os
import pickle
import subprocess

import numpy as np
import pytest
import sklearn.datasets
from ml_collections import ConfigDict

from fastervit_jax.data import folders, imagenet, sources
from tests.data import mini


def config(source: str, directory: str = "", in_chans: int = 3, num_classes: int = 1000) -> ConfigDict:
    return ConfigDict({"data": {"source": source, "dir": directory, "image_size": 16, "eval_split": "train[:5]"},
                       "model": {"in_chans": in_chans, "num_classes": num_classes}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, 7 and 5 train images, 2 and 1 for validation; some files that are no images, and nested folders."""
    root = tmp_path_factory.mktemp("folder")
    for name in ("train/dog/b.JPG", "train/dog/a.jpeg", "train/dog/more/c.png", "train/dog/d.webp", "train/dog/e.bmp",
                 "train/dog/f.tiff", "train/dog/g.ppm", "train/cat/1.gif", "train/cat/10.tif", "train/cat/2.jpg",
                 "train/cat/3.jpg", "train/cat/4.jpg", "val/dog/y.jpg", "val/dog/x.jpg", "val/cat/z.jpg",
                 "train/dog/notes.txt", "train/dog/._a.jpeg", "train/.cache/a.jpg", "train/list.jpg", "README"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def identities(source: sources.Source) -> list[bytes]:
    images = [source[i]["image"] for i in range(len(source))]
    return [image if isinstance(image, bytes) else image.tobytes() for image in images]


@pytest.fixture(params=["digits", "folder", "imagenet2012"])
def make(request, folder):
    """For each kind, a function from a split to its source."""
    configs = {"digits": config("digits", in_chans=1, num_classes=10), "folder": config("folder", str(folder), 3, 2),
               "imagenet2012": config("imagenet2012", str(mini.GOLDEN))}
    return lambda split: sources.make_source(configs[request.param], split)


def test_splits_mean_the_same_everywhere(make):
    train, validation = identities(make("train")), identities(make("validation"))
    n = len(train)
    for split, expected in {
        "train[:50%]": train[: round(n / 2)],
        "train[3:8]": train[3:8],
        "train[-4:]": train[-4:],
        "train[:10%]+train[50%:75%]": train[: round(n / 10)] + train[round(n / 2) : round(0.75 * n)],
        "validation+train[2:4]": validation + train[2:4],
        "all": train + validation,
    }.items():
        source = make(split)
        assert identities(source) == expected, split
        assert len(source) == len(expected)
        assert source.name.endswith(f" {split}")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("test", "split 'test' of .*: Unknown split 'test'.*; there are train, validation; expected one of these"),
        ("dev", "Unknown split 'dev'"),
        ("train[", r"Unrecognized split format: 'train\['"),
        ("train[:200%]", r"boundaries should be in \[-100, 100\]"),
        ("train[5:99999]", r"Requested slice \[5:99999\] incompatible with \d+ examples"),
        ("train[7:3]", r"asks for train\[7:3\], which holds no image"),
        ("train[:0]+validation", r"asks for train\[0:0\], which holds no image"),
        ("all[:5]", "'all' does not support slice"),
        ("", "Unrecognized split format: ''"),
    ],
)
def test_wrong_splits(make, split, message):
    with pytest.raises(ValueError, match=message):
        make(split)


def test_what_every_source_has(make):
    source = make("train[1:4]")
    assert isinstance(source, sources.Source)
    assert source.classes is None
    assert source.multi_label is False
    assert len(source.class_names) == source.num_classes
    label = source[0]["label"]
    assert isinstance(label, np.int32)
    assert 0 <= label < source.num_classes
    for copy in (pickle.loads(pickle.dumps(source)), source):
        assert [copy.record_name(i) for i in range(3)] == [source.record_name(i) for i in range(3)]
        np.testing.assert_equal(copy[2], source[2])
        np.testing.assert_equal(copy[-1], source[2])
        with pytest.raises(IndexError):
            copy[3]
    assert len({source.record_name(i) for i in range(3)}) == 3


def test_digits_split_is_fixed_and_stratified():
    train, validation = (sources.digits(split, 8) for split in sources.SPLITS)
    assert (len(train), len(validation)) == (1442, 355)
    data = sklearn.datasets.load_digits()
    counts = np.bincount(data.target)
    np.testing.assert_array_equal(np.bincount(validation.labels), counts // 5)
    np.testing.assert_array_equal(np.bincount(train.labels), counts - counts // 5)

    # Every scan is in one of the two, once.
    exact = np.rint(data.images * (255 / 16)).astype(np.uint8)
    both = np.concatenate([train.images[..., 0], validation.images[..., 0]])
    np.testing.assert_array_equal(np.sort(both.reshape(1797, -1), axis=0), np.sort(exact.reshape(1797, -1), axis=0))
    zeros = exact[data.target == 0]
    np.testing.assert_array_equal(validation.images[validation.labels == 0][:2, ..., 0], zeros[[4, 9]])


def test_digits_are_enlarged():
    small, large = (sources.digits("train", size) for size in (8, 64))
    assert large.images.shape == (1442, 64, 64, 1)
    assert large.images.dtype == np.uint8
    # Bilinear: the four pixels around the middle of a scan's pixel lie 1/16 of a pixel to either side of it.
    middles = large.images[..., 0].astype(float).reshape(1442, 8, 8, 8, 8)[:, :, 3:5, :, 3:5].mean((2, 4))
    mix = 15 / 16 * np.eye(8) + (np.eye(8, k=1) + np.eye(8, k=-1)) / 32
    expected = mix @ small.images[..., 0].astype(float) @ mix.T
    np.testing.assert_allclose(middles[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1.5)
    np.testing.assert_array_equal(large.labels, small.labels)


def test_digits_in_colour():
    grey, colour = (sources.make_source(config("digits", "", channels, 10), "train") for channels in (1, 3))
    assert colour.images.shape == (1442, 16, 16, 3)
    np.testing.assert_array_equal(colour.images, np.concatenate([grey.images] * 3, axis=-1))


def test_digits_record():
    source = sources.digits("validation[5:9]", 16)
    whole = sources.digits("validation", 16)
    assert source[3]["image"].shape == (16, 16, 1)
    assert source[3]["image"].dtype == np.uint8
    np.testing.assert_equal(source[3], whole[8])
    assert source.record_name(3) == "digits validation[5:9], image 3"
    assert source.class_names[7] == "7"


def test_folder_lists_images_by_class(folder):
    train = folders.open_split("train", str(folder))
    expected = ["cat/1.gif", "cat/10.tif", "cat/2.jpg", "cat/3.jpg", "cat/4.jpg", "dog/a.jpeg", "dog/b.JPG",
                "dog/d.webp", "dog/e.bmp", "dog/f.tiff", "dog/g.ppm", "dog/more/c.png"]
    assert [train.record_name(i) for i in range(len(train))] == [f"{folder}/train/{name}" for name in expected]
    assert [train[i]["image"].decode() for i in range(len(train))] == [f"train/{name}" for name in expected]
    assert [train[i]["label"] for i in range(len(train))] == [0] * 5 + [1] * 7
    assert train.class_names == ("cat", "dog")
    validation = folders.open_split("validation", str(folder))
    assert [validation[i]["image"] for i in range(3)] == [b"val/cat/z.jpg", b"val/dog/x.jpg", b"val/dog/y.jpg"]
    across = folders.open_split("train[4:6]+validation[1:2]", str(folder))
    assert [record["label"] for record in (across[0], across[1], across[2])] == [0, 1, 1]


def test_folder_may_be_called_validation_and_lack_classes_there(tmp_path):
    for name in ("train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "validation/c/1.jpg", "minival/b/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"")
    assert folders.open_split("validation", str(tmp_path))[0]["label"] == 2
    assert folders.open_split("minival", str(tmp_path))[0]["label"] == 1
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="has both val and validation; expected one of the two"):
        folders.open_split("validation", str(tmp_path))


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        ([], "train", "has no folders; expected train/CLASS/IMAGE and val/CLASS/IMAGE"),
        (["val/a/1.jpg"], "validation", "has no folder train, whose folders are the classes; it has val"),
        (["train/1.jpg"], "train", "train has no folders; expected one a class"),
        (["train/a/1.jpg", "train/b/1.txt", "train/b/2"], "train",
         r"no image in \S+/train/b \(2 other files\); files that end in .jpg .jpeg .png .webp"),
        (["train/a/1.jpg", "val/x.jpg"], "validation", "no image in .*/val; expected a folder a class"),
        (["train/a/1.jpg", "val/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"], "validation",
         "val has 2 classes that train has not: b, c"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, files, split, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        folders.open_split(split, str(tmp_path))


def test_folder_knob():
    with pytest.raises(ValueError, match=r"needs the folder of the images: give --config.data.dir=FOLDER"):
        sources.make_source(config("folder"), "train")
    with pytest.raises(ValueError, match=r"no folder '/nowhere' \(config.data.dir\)"):
        sources.make_source(config("folder", "/nowhere"), "train")


@pytest.mark.parametrize(
    ("name", "in_chans", "num_classes", "message"),
    [
        ("digits", 2, 10, r"config.model.in_chans=2: images of digits have 1 channel"),
        ("digits", 1, 5, r"config.model.num_classes=5: digits has 10; give --config.model.num_classes=10"),
        ("folder", 3, 1000, "num_classes=1000: folder has 2"),
        ("folder", 4, 2, r"config.model.in_chans=4: images of folder have 1 channel \(grey\) or 3 \(RGB\); give"),
        ("imagenet_v2", 3, 200, "num_classes=200: imagenet_v2 has 1000"),
        ("imagenet_v2", 2, 1000, "in_chans=2: images of imagenet_v2 have 1 channel"),
    ],
)
def test_model_must_fit(folder, name, in_chans, num_classes, message):
    directory = str(folder) if name == "folder" else str(mini.GOLDEN)
    split = "test" if name == "imagenet_v2" else "train"
    with pytest.raises(ValueError, match=message):
        sources.make_source(config(name, directory, in_chans, num_classes), split)


def test_grey_models_take_files(folder):
    assert len(sources.make_source(config("folder", str(folder), 1, 2), "train")) == 12


def test_another_dataset_than_the_config_names():
    source = sources.make_source(config("imagenet2012", str(mini.GOLDEN)), "test", name="imagenet_a")
    assert source.name == "imagenet_a/0.1.0 test"


def test_default_eval_split(folder):
    knobs = config("imagenet2012", str(mini.GOLDEN))
    splits = {name: sources.default_eval_split(name, knobs) for name in
              ("imagenet2012", "imagenet2012:5.1.0", "imagenet_v2", "imagenet2012_real", "digits")}
    assert splits == {"imagenet2012": "train[:5]", "imagenet2012:5.1.0": "validation", "imagenet_v2": "test",
                      "imagenet2012_real": "validation", "digits": "validation"}
    assert sources.default_eval_split("folder", config("digits", str(folder))) == "validation"


def test_default_eval_split_is_not_guessed(tmp_path):
    for name in ("train/a/1.jpg", "holdout/a/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"has the splits holdout, train: say which one is .* as folder@SPLIT"):
        sources.default_eval_split("folder", config("digits", str(tmp_path)))


def test_class_tables():
    for table in (imagenet.IMAGENET_A, imagenet.IMAGENET_R):
        assert len(table) == 200
        assert list(table) == sorted(set(table))
        assert table[0] >= 0
        assert table[-1] <= 999
    # The classes of the real test sets' first synsets: stingray and robin; goldfish and great white shark.
    assert imagenet.IMAGENET_A[0] == 6
    assert imagenet.IMAGENET_R[:2] == (1, 2)


@pytest.mark.oracle
def test_class_tables_against_timm():
    assert "FASTERVIT_ORACLE" in os.environ, "FASTERVIT_ORACLE should name a Python with timm"
    program = ("import importlib.util, pathlib; "
               "folder = pathlib.Path(importlib.util.find_spec('timm').origin).parent / 'data' / '_info'; "
               "print(*((folder / f'imagenet_{x}_{y}.txt').read_text().replace(chr(10), ' ') "
               "for x, y in (('a', 'indices'), ('r', 'indices'), ('a', 'synsets'), ('r', 'synsets'))), sep=chr(10))")
    result = subprocess.run([os.environ["FASTERVIT_ORACLE"], "-c", program], capture_output=True, text=True, check=True)
    a, r, a_synsets, r_synsets = (line.split() for line in result.stdout.splitlines())
    assert tuple(map(int, a)) == imagenet.IMAGENET_A
    assert tuple(map(int, r)) == imagenet.IMAGENET_R
    # Their synsets are those that TFDS's labels have at these indices.
    names = sources.make_source(config("imagenet_a", str(mini.GOLDEN)), "test").class_names
    assert [names[i] for i in imagenet.IMAGENET_A] == a_synsets
    assert [names[i] for i in imagenet.IMAGENET_R] == r_synsets
