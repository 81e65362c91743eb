"""Predictions are those of the model on evaluation's crops, with the run's class names; errors say what is wrong."""

import csv
import json

import jax
import numpy as np
import pytest
from PIL import Image

import fastervit_jax as fv
from configs import cues, digits
from fastervit_jax import predict, trained
from fastervit_jax.data import decode
from tests.onnx_speed import random_variables

SMALL = {"dim": 8, "in_dim": 8, "depths": (1, 1, 1, 1), "window_size": (2, 2, 2, 2), "ct_size": 1,
         "hat": (False, False, False, False), "num_classes": 3}


def save(path, **changes):
    """A small model with random weights in a file."""
    model = fv.create_model("faster_vit_0_224", **{**SMALL, **changes})
    variables = random_variables(model.config)
    fv.save_pretrained(model, variables, path)
    return model, variables


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    return path, *save(path)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "more/c.PNG", "d.png", "e.png")):
        coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
        Image.fromarray(coarse).resize((80 + 10 * i, 64)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def expected(checkpoint, path, side=64):
    """By hand: crop, normalise, apply, softmax."""
    _, model, variables = checkpoint
    crop = decode.EvalCrop(side, 3, 0.875, "center")
    pixels = crop(path.read_bytes()).astype(np.float32) / 255
    image = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return np.asarray(jax.nn.softmax(model.apply(variables, image[None])[0]))


def test_folder_in_batches_as_csv(checkpoint, pictures, tmp_path):
    out = tmp_path / "out.csv"
    predict.main([str(pictures), f"--checkpoint={checkpoint[0]}", "--resolution=64", "--batch=2", "--top=2",
                  f"--csv={out}"])
    rows = list(csv.DictReader(out.read_text().splitlines()))
    files = [pictures / name for name in ("a.png", "b.jpg", "d.png", "e.png", "more/c.PNG")]
    assert [row["image"] for row in rows] == [str(path) for path in files for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * 5
    for i, path in enumerate(files):
        probabilities = expected(checkpoint, path)
        order = np.argsort(-probabilities)
        for row, k in zip(rows[2 * i : 2 * i + 2], order, strict=False):
            assert (row["class"], row["name"]) == (str(k), str(k))
            assert float(row["probability"]) == pytest.approx(probabilities[k], rel=1e-4)
    assert len({row["probability"] for row in rows[::2]}) == 5  # pictures that the model tells apart


def test_compiles_once(checkpoint, pictures, caplog):
    classifier = trained.load(str(checkpoint[0]), resolution=64)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        done = list(predict.predict(classifier, predict.find_images([pictures]), batch=2))  # the last batch has one
    assert len(done) == 5
    assert caplog.text.count("Finished XLA compilation of jit(classify)") == 1


def test_unreadable_images_are_named_and_the_rest_done(checkpoint, pictures, tmp_path, capsys):
    whole = (pictures / "b.jpg").read_bytes()
    (pictures / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (pictures / "d.png").write_text("no image")
    out = tmp_path / "out.json"
    arguments = [str(pictures), f"--checkpoint={checkpoint[0]}", "--resolution=64", "--batch=3"]
    with pytest.raises(SystemExit, match="2 of 5 images could not be read"):
        predict.main([*arguments, f"--json={out}"])
    told = capsys.readouterr().err
    assert "b.jpg: cannot be read as an image (OSError" in told
    assert "d.png: cannot be read as an image (ValueError: no image: 8 bytes" in told
    entries = {entry["image"]: entry for entry in json.loads(out.read_text())}
    assert list(entries) == [str(p) for p in predict.find_images([pictures])]
    assert "ValueError: no image" in entries[str(pictures / "d.png")]["error"]
    for name in ("a.png", "e.png", "more/c.PNG"):
        given = {x["class"]: x["probability"] for x in entries[str(pictures / name)]["top"]}
        np.testing.assert_allclose([given[k] for k in range(3)], expected(checkpoint, pictures / name), rtol=1e-4)


def test_workdir_tells_crop_and_classes(tmp_path, capsys):
    """A digit's picture comes to what the run was evaluated on, pixel for pixel: the whole of it, grey."""
    config = digits.get_config("smoke")
    workdir = tmp_path / "run"
    workdir.mkdir()
    save(workdir / "best.safetensors", in_chans=1, num_classes=10)
    (workdir / "config.json").write_text(config.to_json())
    classifier = trained.load(str(workdir / "best.safetensors"))
    assert classifier.class_names == tuple("0123456789")
    assert (classifier.mean, classifier.std) == ((0.3,), (0.35,))
    picture = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(picture).save(tmp_path / "digit.png")
    np.testing.assert_array_equal(classifier.crop((tmp_path / "digit.png").read_bytes())[..., 0], picture)
    predict.main([str(tmp_path / "digit.png"), f"--checkpoint={workdir / 'best.safetensors'}", "--top=3"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == str(tmp_path / "digit.png")
    assert len(lines) == 3
    assert all(line.split()[1] == "%" and line.split()[2] in "0123456789" for line in lines)


def test_class_names(tmp_path, caplog):
    names = trained.class_names(1000, {})
    assert names[0] == "tench, Tinca tinca"
    assert names[207] == "golden retriever"
    assert names[999].startswith("toilet tissue")
    assert len(set(names)) >= 998  # two words have two meanings each
    assert trained.class_names(1000, {"data": {"source": "imagenet_v2/matched-frequency"}}) == names
    assert trained.class_names(3, {}) == ("0", "1", "2")

    for name in ("rose", "daisy"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "x.png")
    run = digits.get_config().to_dict()
    run["data"] |= {"source": "folder", "dir": str(tmp_path)}
    run["model"] |= {"num_classes": 2}
    assert trained.class_names(2, run) == ("daisy", "rose")
    run["data"]["dir"] = "gone"
    assert trained.class_names(2, run) == ("0", "1")
    assert "the run's dataset cannot be read" in caplog.text

    (tmp_path / "names.txt").write_text("left\nright\n")
    assert trained.class_names(2, run, tmp_path / "names.txt") == ("left", "right")


def test_strips_are_no_files(tmp_path):
    config = cues.get_config().to_dict()
    save(tmp_path / "best.safetensors", **config["model"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"trained on the strips of configs/cues.py, as which image files cannot be"):
        trained.load(str(tmp_path / "best.safetensors"))


def test_errors(checkpoint, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    (tmp_path / "other.pth").write_bytes(b"PK no checkpoint")
    save(tmp_path / "grey.safetensors", in_chans=1)
    save(tmp_path / "headless.safetensors", num_classes=0)
    good = f"--checkpoint={checkpoint[0]}"
    for arguments, message in (
        (["gone.jpg", good], "no file or folder 'gone.jpg'"),
        (["empty", good], "no image in empty; files that end in .jpg"),
        (["pictures", "--checkpoint=gone.pth"], "no file, folder or registered model 'gone.pth'"),
        (["pictures", "--checkpoint=other.pth"], "WeightsError: other.pth"),
        (["pictures", "--checkpoint=pictures"], "pictures: the folder is none of ours"),
        (["pictures", "--checkpoint=headless.safetensors"], "its model has no head"),
        (["pictures", "--checkpoint=grey.safetensors"], "how grey images are normalised: give --mean, one number"),
        (["pictures", good, "--mean=0.5"], r"--mean=\(0.5,\): expected 3 finite number\(s\), one a channel"),
        (["pictures", good, "--crop=0"], "crop 0.0, .*: expected at least 32 pixels, a crop of more than 0"),
        (["pictures", good, "--classes=names.txt"], "names.txt: 2 lines, but the model has 3 classes"),
        (["pictures", good, "--csv=gone/out.csv"], "gone/out.csv: expected the name of a file in a folder that exists"),
    ):
        with pytest.raises(SystemExit, match=message):
            predict.main(arguments)
    assert not list(tmp_path.glob("**/*.csv"))
