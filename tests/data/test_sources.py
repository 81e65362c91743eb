"""The digits source: its split, its images, its errors."""

import numpy as np
import pytest
import sklearn.datasets

from fastervit_jax.data import sources
from tests.train import runs


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


def test_record():
    record = sources.digits("train", 16)[3]
    assert record["image"].shape == (16, 16, 1)
    assert record["image"].dtype == np.uint8
    assert record["label"].dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "split", "message"),
    [
        ({"data.source": "mnist"}, "train", r"unknown data source 'mnist' .*expected one of \['digits'\]"),
        ({}, "test", r"unknown split 'test': expected one of \('train', 'validation'\)"),
        ({"model.in_chans": 3}, "train", r"config.model.in_chans=3: digits has 1; give --config.model.in_chans=1"),
        ({"model.num_classes": 5}, "train", r"config.model.num_classes=5: digits has 10; give"),
    ],
)
def test_what_does_not_fit(changes, split, message):
    with pytest.raises(ValueError, match=message):
        sources.make_source(runs.config(**changes), split)
