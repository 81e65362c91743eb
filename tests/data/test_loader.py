"""Batches: every image, once an epoch, the same from whatever step the run goes on."""

import itertools

import jax
import numpy as np
import pytest

from fastervit_jax.data import loader
from fastervit_jax.data.sources import ArraySource
from fastervit_jax.train import sharding

OVER_BATCH = sharding.over_batch(sharding.make_mesh())
SOURCE = ArraySource(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), np.arange(40, dtype=np.int32), 40)


def labels(batches, count=None):
    return [np.asarray(batch["label"]).tolist() for batch in itertools.islice(batches, count)]


def train(first_step=0, seed=0, **changes):
    return loader.train_batches(SOURCE, **{"batch_size": 16, "seed": seed, "first_step": first_step,
                                           "sharding": OVER_BATCH, **changes})


def test_an_epoch_has_every_image_once():
    seen = np.concatenate(labels(train(), 5)).tolist()  # 80 images: two epochs of 40, over the ends of batches
    assert sorted(seen[:40]) == sorted(seen[40:]) == list(range(40))
    assert seen[:40] != seen[40:]
    assert seen[:40] != list(range(40))


def test_the_step_is_the_only_state():
    whole = labels(train(), 9)
    for step in (1, 2, 5):
        assert labels(train(first_step=step), 9 - step) == whole[step:]
    assert labels(train(seed=1), 9) != whole


def test_images_belong_to_their_labels_and_lie_over_the_devices():
    batch = next(train())
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    assert batch["image"].dtype == np.uint8
    assert batch["image"].sharding == OVER_BATCH
    assert len(batch["label"].addressable_shards) == jax.device_count() == 8


def test_evaluation_has_every_image_once_and_masks_the_rest():
    batches = list(loader.eval_batches(SOURCE, batch_size=16, sharding=OVER_BATCH))
    weights = np.concatenate([batch["weight"] for batch in batches])
    assert weights.tolist() == [1.0] * 40 + [0.0] * 8
    assert np.concatenate(labels(batches))[:40].tolist() == list(range(40))


@pytest.mark.parametrize("feed", [lambda: train(batch_size=12),
                                  lambda: loader.eval_batches(SOURCE, batch_size=12, sharding=OVER_BATCH)])
def test_batch_that_does_not_divide(feed):
    with pytest.raises(ValueError, match="batch size 12 does not divide over 8 devices; expected a multiple of 8"):
        next(feed())
