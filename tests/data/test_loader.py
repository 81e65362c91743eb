"""Batches: what is in them, what fills them up, and what is said and done about images that cannot be read."""

import os
import pathlib
import re
import shutil
import types

import jax
import numpy as np
import pytest

from fastervit_jax.data import decode, folders, loader, records
from fastervit_jax.data.sources import ArraySource
from fastervit_jax.train import sharding
from tests.data import images, mini
from tests.data.feed import assert_same, column, config, evaluation, files, take, train, workers

OVER_BATCH = sharding.over_batch(sharding.make_mesh())
SOURCE = ArraySource(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), np.arange(40, dtype=np.int32), 40)
EMPTY = "ValueError: no image: 0 bytes that begin with b''"


def over_devices(batch_size: int = 16) -> loader.Feed:
    return loader.train_batches(SOURCE, config(batch_size), first_step=0, last_step=5, sharding=OVER_BATCH)


def test_a_batch_lies_over_the_devices():
    batch, reasons = next(feed := over_devices())
    feed.close()
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        "image": ((16, 1, 1, 1), np.uint8), "label": ((16,), np.int32), "weight": ((16,), np.float32)}
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    np.testing.assert_array_equal(batch["weight"], np.ones(16))
    assert reasons == []
    for x in batch.values():
        assert x.sharding == OVER_BATCH
        assert [shard.data.shape[0] for shard in x.addressable_shards] == [2] * jax.device_count() == [2] * 8


def test_a_feed_ends_and_stays_closed():
    feed = train(SOURCE, config(), 0, 5)
    assert len(take(feed)) == 5
    feed.close()
    with pytest.raises(StopIteration):
        next(feed)


def test_arrays_are_evaluated_in_order():
    batches = take(evaluation(SOURCE, config(16)))
    assert column(batches, "weight").tolist() == [1] * 40 + [0] * 8
    assert column(batches, "label").tolist() == [*range(40), *[0] * 8]
    assert column(batches, "image").ravel().tolist() == [*range(40), *[0] * 8]


def test_no_batch_is_only_padding():
    assert [batch["weight"].tolist() for batch in take(evaluation(files(8), config()))] == [[1] * 4] * 2


@pytest.mark.parametrize("in_chans", [1, 3])
def test_evaluation_shows_what_the_decoder_gives(in_chans):
    source, settings = files(5), config(in_chans=in_chans)
    crop = decode.eval_crop(settings)
    found = column(take(evaluation(source, settings)), "image")
    assert found.shape == (8, 10, 10, in_chans)
    np.testing.assert_array_equal(found[:5], [crop(data) for data in source.files])
    assert not found[5:].any()


def test_training_shows_crops_of_the_image():
    """Of images that are all of one colour: that colour, whatever the crop."""
    greys = (10, 90, 170, 250)
    source = type(files(1))(tuple(images.encoded(images.Image.new("RGB", (30, 20), (grey,) * 3)) for grey in greys))
    for batch in take(train(source, config(), 0, 3)):
        np.testing.assert_array_equal(batch["image"], np.broadcast_to(
            np.array(greys, np.uint8)[batch["label"]][:, None, None, None], (4, 10, 10, 3)))


def test_several_labels():
    source = records.open_split("imagenet2012_real", "validation", str(mini.GOLDEN))
    (batch,) = take(evaluation(source, config(8)))
    assert (batch["label"].shape, batch["label"].dtype) == ((8, 1000), np.dtype(bool))
    np.testing.assert_array_equal(batch["label"][:5], [source[i]["label"] for i in range(5)])
    assert not batch["label"][5:].any()
    assert batch["weight"].tolist() == [1] * 5 + [0] * 3


@pytest.fixture(scope="module")
def odd_folders(tmp_path_factory):
    """Two folders of one image a class: every odd and damaged file, and whole ones in place of the damaged."""
    odd, damaged = images.odd(), images.damaged()
    whole = images.jpegs(1)[0]
    # In turns, and two damaged ones beside each other at the end.
    names = [name for pair in zip(list(odd)[: len(damaged)], damaged, strict=True) for name in pair]
    names = [*names[:-1], *list(odd)[len(damaged) :], names[-1]]
    assert sorted(names) == sorted([*odd, *damaged])
    roots = {}
    for kind in ("damaged", "whole"):
        root = roots[kind] = tmp_path_factory.mktemp(kind)
        for i, name in enumerate(names):
            content = odd[name][0] if name in odd else damaged[name][0] if kind == "damaged" else whole
            path = root / "train" / f"{i:02}" / f"{name}.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
    return types.SimpleNamespace(names=names, **{name: folders.open_split("train", str(root))
                                                 for name, root in roots.items()})


@pytest.mark.parametrize("how", ["train", "evaluation"])
def test_files_that_cannot_be_read_keep_their_place(odd_folders, how, caplog):
    names, odd, damaged = odd_folders.names, images.odd(), images.damaged()

    def batches(source):
        return take(train(source, config(), 0, 12) if how == "train" else evaluation(source, config()))

    whole = batches(odd_folders.whole)
    assert [batch["reasons"] for batch in whole] == [[]] * len(whole)
    assert not caplog.records
    found = batches(odd_folders.damaged)
    np.testing.assert_array_equal(column(found, "label"), column(whole, "label"))
    seen = set()
    for batch, expected in zip(found, whole, strict=True):
        reasons = iter(batch["reasons"])
        for image, label, weight, there, pixels in zip(batch["image"], batch["label"], batch["weight"],
                                                       expected["weight"], expected["image"], strict=True):
            name = names[label]
            if not there:
                assert not weight  # padding of the evaluation
            elif name in odd:
                assert weight == 1, name
                np.testing.assert_array_equal(image, pixels)
                assert abs(image.mean((0, 1)) - odd[name][1]).max() < 12, name
                seen.add(name)
            else:
                assert weight == 0, name
                assert not image.any()
                path = odd_folders.damaged.record_name(label)
                assert path.endswith(f"/train/{label:02}/{name}.jpg")
                assert re.match(rf"{re.escape(path)}: \w+Error: .*({damaged[name][1]})", next(reasons)), name
                seen.add(name)
        assert not list(reasons)
    assert seen == set(names)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", f"cannot read {reason}; it counts for nothing") for batch in found for reason in batch["reasons"]]


@pytest.mark.parametrize("how", ["train", "evaluation"])
def test_a_damaged_record_keeps_its_place(tmp_path, how):
    shutil.copytree(mini.GOLDEN / "imagenet2012", tmp_path / "imagenet2012")
    (path,) = mini.shards(tmp_path / "imagenet2012" / "5.1.0", "train")
    whole = records.open_split("imagenet2012", "train", str(mini.GOLDEN))
    content = bytearray(path.read_bytes())
    content[content.index(whole[7]["image"][-200:]) + 100] ^= 0x10
    path.write_bytes(content)
    source = records.open_split("imagenet2012", "train", str(tmp_path))

    def batches(source):
        return take(train(source, config(), 0, 6) if how == "train" else evaluation(source, config()))

    expected, found = batches(whole), batches(source)
    position = column(found, "weight").tolist().index(0)
    assert position == 7 or how == "train"
    (reason,) = [reason for batch in found for reason in batch["reasons"]]
    name = f"imagenet2012/5.1.0 train, record 7, {path} record 7"
    assert reason.startswith(f"{name}: cannot be read (")
    damaged = expected[position // 4]
    damaged["reasons"] = [reason]
    for name in ("image", "label", "weight"):  # its label cannot be read either
        damaged[name][position % 4] = 0
    assert_same(found, expected)


def test_a_file_that_is_gone(odd_folders, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(odd_folders.whole.root, root)
    source = folders.open_split("train", str(root))
    path = pathlib.Path(source.record_name(2))
    path.unlink()
    batch = take(evaluation(source, config()), 1)[0]
    assert batch["weight"].tolist() == [1, 1, 0, 1]
    assert batch["reasons"] == [f"{path}: FileNotFoundError: [Errno 2] No such file or directory: '{path}'"]


@pytest.mark.parametrize("seed", range(5))
def test_so_many_bad_images_are_allowed_in_every_epoch(seed):
    """Two of twenty, wherever the shuffle puts them and in whichever epoch the run goes on."""
    settings = config(seed=seed, max_bad_fraction=0.1)
    source = files(20, bad=(3, 11))
    for first_step in (0, 3, 4):
        found = take(train(source, settings, first_step, 25))
        expected = (column(found, "label") == 3) | (column(found, "label") == 11)
        np.testing.assert_array_equal(column(found, "weight") == 0, expected)


@pytest.mark.parametrize("seed", range(5))
def test_one_bad_image_more_ends_the_run(seed):
    source, settings = files(20, bad=(3, 11, 17)), config(seed=seed, max_bad_fraction=0.1)
    labels = column(take(train(source, config(seed=seed), 0, 5)), "label")
    order = [int(label) for label in labels if label in (3, 11, 17)]
    seen = 4 * (labels.tolist().index(order[-1]) // 4 + 1)
    with pytest.raises(loader.FeedError) as error:
        take(train(source, settings))
    assert str(error.value) == "\n".join([
        f"3 of {seen} images of files could not be read, more than config.data.max_bad_fraction=0.1 allows:",
        *(f"  file {label}: {EMPTY}" for label in order), "Mend them, remove them, or allow for more."])


@pytest.mark.parametrize("how", [train, evaluation])
def test_none_or_all_may_be_bad(how):
    one, every = files(6, bad=(5,)), files(6, bad=tuple(range(6)))
    with pytest.raises(loader.FeedError, match=r"^1 of \d images of files could not .*\.max_bad_fraction=0 allows:"):
        take(how(one, config(max_bad_fraction=0.0)), 2)
    assert not column(take(how(every, config()), 2), "weight").any()


def test_too_many_bad_images_end_an_evaluation():
    settings = config(max_bad_fraction=0.25)
    assert column(take(evaluation(files(9, bad=(0, 8)), settings)), "weight").sum() == 7
    with pytest.raises(loader.FeedError, match=r"^3 of 9 images of files could not be read, .*=0.25 allows:\n"
                       rf"  file 0: {EMPTY}\n  file 4: {EMPTY}\n  file 8: {EMPTY}\nMend them"):
        take(evaluation(files(9, bad=(0, 4, 8)), settings))


@pytest.mark.parametrize("count", [loader.LISTED, loader.LISTED + 1])
def test_the_list_of_bad_images_is_cut(count):
    source = files(40, bad=tuple(range(count)))
    with pytest.raises(loader.FeedError) as error:
        take(evaluation(source, config(40, max_bad_fraction=(count - 1) / 40)))
    first, *listed, last = str(error.value).splitlines()
    assert first.startswith(f"{count} of 40 images of files could not be read, more than ")
    assert listed == [f"  file {i}: {EMPTY}" for i in range(20)] + ["  ..."] * (count - 20)
    assert last == "Mend them, remove them, or allow for more."


@pytest.mark.parametrize("make", [
    lambda: over_devices(12), lambda: loader.eval_batches(SOURCE, config(12), sharding=OVER_BATCH)])
def test_batch_that_does_not_divide(make):
    with pytest.raises(ValueError, match="batch size 12 does not divide over 8 devices; expected a multiple of 8"):
        make()


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"config\.data\.crop_scale"):
        train(files(4), config(crop_scale=(0.0, 1.0)))
    with pytest.raises(ValueError, match=r"config\.data\.eval_mode"):
        evaluation(files(4), config(eval_mode="middle"))


def memory(monkeypatch, size: int) -> None:
    """Shared memory of so many bytes."""
    assert size % 16 == 0
    monkeypatch.setattr(os, "statvfs", lambda folder: types.SimpleNamespace(f_bavail=size // 16, f_frsize=16))


def test_shared_memory_that_is_too_small(monkeypatch, tmp_path):
    memory(monkeypatch, 2 * 13 * 2**20)
    loader.check_shared_memory(3, 2**20, 2, tmp_path)
    with pytest.raises(loader.FeedError, match=re.escape(
            f"{tmp_path} has room for 0.03 GiB, but 3 workers with batches of 1.0 MiB take up to 0.03 GiB of it. Make "
            "/dev/shm larger (docker run --shm-size), or lower config.data.workers or config.batch_size")):
        loader.check_shared_memory(3, 2**20 + 1, 2, tmp_path)
    loader.check_shared_memory(0, 2**40, 2, tmp_path)  # threads need none
    loader.check_shared_memory(3, 2**40, 2, tmp_path / "none")  # another system


@pytest.mark.parametrize("processes", [1, 2])
def test_shared_memory_is_checked_before_workers_start(monkeypatch, processes):
    """Each process's share of the batch counts."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    need = 2 * 9 * (16 * 10 * 10 * 3) // processes  # for training and an evaluation
    memory(monkeypatch, need - 16)
    before = workers(os.getpid())
    with pytest.raises(loader.FeedError, match=r"but 2 workers with batches of 0.0 MiB take up to"):
        train(files(4), config(16, workers=2))
    assert workers(os.getpid()) == before
    memory(monkeypatch, need)
    monkeypatch.setattr(loader, "HostBatches", lambda dataset, workers, timeout: (workers, timeout))
    assert train(files(4), config(16, workers=2, timeout=7.0))._batches == (2, 7.0)
