"""ImageNet's recipe on the miniature that TFDS's own builder prepared: train, go on, evaluate, without TensorFlow."""

import contextlib
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from fastervit_jax.data import loader, randaugment, sources
from fastervit_jax.train import loop, sharding
from tests import QUICKLY
from tests.data import images
from tests.train import runs
from tests.train.test_loop import ROOT

DATASETS = {"imagenet2012": 8, "imagenet_v2": 5, "imagenet_a": 4, "imagenet_r": 4, "imagenet_sketch": 4,
            "imagenet2012_real": 4}  # images that count; one of ReaL's five has no label


def train(config, workdir):
    return loop.train(config, workdir, jax.devices()[:1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("imagenet")
    return workdir, train(runs.imagenet_config(**{"data.workers": 2}), workdir)


def test_it_trains(whole):
    workdir, result = whole
    written = runs.lines(workdir)
    losses = [line["train/loss"] for line in written if "train/loss" in line]
    assert len(losses) == 6
    assert all(line["train/bad_images"] == 0 for line in written if "train/loss" in line)
    assert losses[0] == pytest.approx(np.log(1000), abs=0.5)
    assert result["images"] == 8


def test_it_goes_on_with_other_workers(whole, tmp_path, monkeypatch):
    with runs.stopping(monkeypatch, after=4):
        train(runs.imagenet_config(**{"data.workers": 1}), tmp_path)
    assert train(runs.imagenet_config(), tmp_path) == whole[1]
    assert runs.lines(tmp_path) == runs.lines(whole[0])


def run(*arguments, fails=False):
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_FLAGS": QUICKLY}
    process = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert (process.returncode != 0) == fails, process.stderr
    return process.stderr if fails else process.stdout


def test_one_table_of_all_datasets(whole):
    out = run("eval.py", f"--workdir={whole[0]}", "--config=configs/imagenet.py", *runs.IMAGENET_FLAGS,
              "--config.data.eval_crop=1.0", f"--datasets={','.join(DATASETS)},imagenet2012@validation[:50%]")
    out = out.splitlines()
    assert len(out) == 14
    lines = [json.loads(line) for line in out[7:]]
    assert [line["dataset"] for line in lines] == [*DATASETS, "imagenet2012"]
    assert [line["images"] for line in lines] == [*DATASETS.values(), 4]
    assert lines[6]["split"] == "validation[:50%]"
    for text, line in zip(out, lines, strict=False):
        assert text.startswith(f"{line['dataset']} {line['split']} ")
        assert f"* Acc@1 {line['acc1']:.3f} " in text
        # A model that knows nothing yet: the loss is that of a guess among the classes that there are.
        classes = 200 if line["dataset"] in ("imagenet_a", "imagenet_r") else 1000
        assert line["loss"] == pytest.approx(np.log(classes), abs=0.4)


def test_evaluation_of_a_run_refuses_another_image_size(whole):
    error = run("eval.py", f"--workdir={whole[0]}", "--config=configs/imagenet.py", *runs.IMAGENET_FLAGS,
                "--config.data.image_size=96", fails=True)
    assert "data.image_size: there 64, given 96" in error
    error = run("eval.py", "--datasets=digits", "--split=train", fails=True)
    assert "give --datasets=NAME@SPLIT" in error


def test_no_evaluation_starts_before_all_datasets_are_there(whole, tmp_path):
    arguments = ("eval.py", f"--workdir={tmp_path / 'none'}", "--config=configs/imagenet.py", *runs.IMAGENET_FLAGS)
    assert "no dataset 'imagnet_a' in" in run(*arguments, "--datasets=imagenet2012,imagnet_a", fails=True)
    assert "config.batch_size=0: expected at least 1" in run(*arguments, "--config.batch_size=0", fails=True)


def folder_config(root, damaged):
    """A folder of 16 training and 4 other images, the fourth of which is damaged or is left out."""
    for i, data in enumerate(images.jpegs(20)):
        path = root / ("train" if i < 16 else "val") / "ab"[i % 2] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"nothing" if damaged and i in (3, 17) else data)
    return runs.imagenet_config(**{
        "data.source": "folder", "data.dir": str(root), "model.num_classes": 2, "data.max_bad_fraction": 0.25,
        "augment.rand_augment_ops": 0, "epochs": 1, "warmup_epochs": 0})


def test_bad_images_are_counted_and_named(tmp_path):
    config = folder_config(tmp_path / "images", damaged=True)
    result = train(config, tmp_path / "run")
    lines = runs.lines(tmp_path / "run")
    bad = [line for line in lines if line.get("train/bad_images")]
    assert [line["train/bad_images"] for line in bad] == [1]
    (text,) = bad[0]["train/bad_records"]
    assert text.startswith(str(tmp_path / "images/train/b/03.jpg"))
    assert "no image: 7 bytes" in text
    assert result["images"] == 3
    assert [text.partition(":")[0] for text in result["bad_records"]] == [str(tmp_path / "images/val/b/17.jpg")]
    config.data.max_bad_fraction = 0.05
    with pytest.raises(RuntimeError, match=r"1 of 8 images of .* not be read, more than .*0.05 allows:\n.*03.jpg"):
        train(config, tmp_path / "other")


def test_several_labels_cannot_be_trained_on(tmp_path):
    config = runs.imagenet_config(**{"data.source": "imagenet2012_real", "data.train_split": "validation"})
    with pytest.raises(ValueError, match=r"imagenet2012_real.* has several labels an image, which are for evaluation"):
        train(config, tmp_path)


def test_pictures(tmp_path):
    plain = [f"--config.augment.{knob}=0.0" for knob in ("mixup", "cutmix", "flip", "erase_prob")]
    out = run("-m", "fastervit_jax.data.show", "--config=configs/imagenet.py", *runs.IMAGENET_FLAGS, *plain,
              "--config.augment.rand_augment_ops=0", "--images=4", f"--out={tmp_path}")
    assert out.split() == [str(tmp_path / "train.png"), str(tmp_path / "rand_augment")]
    assert {path.stem for path in (tmp_path / "rand_augment").iterdir()} == set(randaugment.OPS)
    # Nothing is switched on, so the pictures are the crops as the feed gives them.
    config = runs.imagenet_config(batch_size=4)
    sheet = np.asarray(Image.open(tmp_path / "train.png"))
    over_batch = sharding.over_batch(sharding.make_mesh(jax.devices()[:1]))
    source = sources.make_source(config, "train")
    feed = loader.train_batches(source, config, first_step=0, last_step=1, sharding=over_batch)
    with contextlib.closing(feed):
        batch, _ = next(feed)
    for i, pixels in enumerate(np.asarray(batch["image"])):
        np.testing.assert_array_equal(sheet[:64, 68 * i : 68 * i + 64], pixels)
    # Invert at any magnitude is 255 minus the image.
    inverted = np.asarray(Image.open(tmp_path / "rand_augment" / "Invert.png"))[:64, :64]
    unchanged = np.asarray(Image.open(tmp_path / "rand_augment" / "SolarizeAdd.png"))[:64, :64]  # magnitude 0
    np.testing.assert_array_equal(inverted, 255 - unchanged)


def test_reading_and_training_never_import_tensorflow(tmp_path):
    flags = [f"--workdir={tmp_path}", "--config=configs/imagenet.py", *runs.IMAGENET_FLAGS]
    program = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('tensorflow' in sys.modules))\n"
        f"sys.argv = ['train.py', *{flags!r}]\n"
        "runpy.run_path('train.py', run_name='__main__')\n")
    out = run("-c", program)
    assert out.splitlines()[-1] == "False"
    assert " * Acc@1" in out
