"""The step is the feed's only state: batches do not depend on where a run is stopped, on workers or on processes."""

import collections
import os

import numpy as np
import pytest

from tests.data import feed
from tests.data.feed import assert_same, column, config, evaluation, files, of_processes, take, train

SOURCE = files(13, bad=(5,))
"""Of no multiple of a batch of 4, and one cannot be read."""
STEPS = 10
"""Three epochs and an image."""


@pytest.fixture(scope="module")
def whole():
    """The batches of an unbroken run on one process without workers."""
    return take(train(SOURCE, config(), 0, STEPS))


def crops(batches) -> dict[int, list[bytes]]:
    """For each record that can be read its crops, in the order of the run."""
    found = collections.defaultdict(list)
    for image, label, weight in zip(*(column(batches, name) for name in ("image", "label", "weight")), strict=True):
        if weight:
            found[int(label)].append(image.tobytes())
    return found


def test_each_epoch_has_every_record_once_in_another_order(whole):
    labels = column(whole, "label").tolist()
    epochs = [labels[:13], labels[13:26], labels[26:39]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(13))] * 3
    assert len({tuple(epoch) for epoch in [*epochs, range(13)]}) == 4
    np.testing.assert_array_equal(column(whole, "weight") == 0, column(whole, "label") == 5)


def test_crops_differ_in_each_epoch(whole):
    found = crops(whole)
    assert sorted(found) == [i for i in range(13) if i != 5]
    for label, images in found.items():
        assert len(set(images)) == len(images) >= 3, label


def test_crops_differ_within_an_epoch():
    source = type(SOURCE)((SOURCE.files[0],) * 13)
    images = [image.tobytes() for image in column(take(train(source, config(), 0, STEPS)), "image")]
    assert len(set(images)) == 4 * STEPS


def test_the_same_seed_gives_the_same_and_another_does_not(whole):
    assert_same(take(train(SOURCE, config(), 0, STEPS)), whole)
    other = take(train(SOURCE, config(seed=1), 0, STEPS))
    assert column(other, "label").tolist() != column(whole, "label").tolist()
    first, second = crops(whole), crops(other)
    assert not any(set(first[label]) & set(second[label]) for label in first)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers(whole, workers):
    """All batches are kept to the end: what a worker shares of its memory is not used again under them."""
    assert_same(take(train(SOURCE, config(workers=workers), 0, STEPS)), whole)
    assert not feed.workers(os.getpid())


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes(monkeypatch, whole, processes):
    found = of_processes(monkeypatch, processes, lambda: train(SOURCE, config(), 0, STEPS))
    assert_same(found, whole)


def test_a_run_goes_on_from_every_step(whole):
    for step in range(1, STEPS):
        assert_same(take(train(SOURCE, config(), step, STEPS)), whole[step:])
    assert take(train(SOURCE, config(), STEPS, STEPS)) == []


def test_a_run_goes_on_with_workers(whole):
    """From an odd step, so that the first worker makes what was the second one's."""
    assert_same(take(train(SOURCE, config(workers=2), 3, STEPS)), whole[3:])


def test_the_number_of_processes_changes_in_an_epoch(monkeypatch, whole):
    found = []
    for processes, first, last in ((1, 0, 2), (2, 2, 5), (4, 5, 8), (1, 8, 10)):
        found += of_processes(monkeypatch, processes, lambda first=first, last=last: train(
            SOURCE, config(), first, last))
    labels = column(found, "label").tolist()
    assert [sorted(labels[start : start + 13]) for start in (0, 13, 26)] == [list(range(13))] * 3
    assert_same(found, whole)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("count", [13, 16, 3])
def test_evaluation_has_every_record_once_in_order(monkeypatch, processes, count):
    source = files(count, bad=(1,))
    batches = of_processes(monkeypatch, processes, lambda: evaluation(source, config(batch_size=8)))
    padding = -count % 8
    assert column(batches, "label").tolist() == [*range(count), *[0] * padding]
    assert column(batches, "weight").tolist() == [1, 0, *[1] * (count - 2), *[0] * padding]
    assert not column(batches, "image")[count:].any()
    assert [batch["reasons"] for batch in batches] == [["file 1: ValueError: no image: 0 bytes that begin with b''"],
                                                       *[[]] * (len(batches) - 1)]
    assert_same(batches, take(evaluation(source, config(batch_size=8))))


@pytest.mark.parametrize("count", [13, 3])
def test_evaluation_with_workers(count):
    """Of three records there is one batch, and nothing to do for the second worker."""
    source = files(count, bad=(1,))
    assert_same(take(evaluation(source, config(workers=2))), take(evaluation(source, config())))
