"""The synthetic task: what is drawn, and that only carrier tokens bring its two ends together."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cues as recipe
from fastervit_jax.data import cues, sources
from fastervit_jax.train.state import make_model


def test_patterns_can_be_told_apart():
    patterns = cues.patterns()
    assert patterns.shape == (6, 4, 4)
    assert (patterns.sum((1, 2)) == 8).all()
    for one, other in itertools.combinations(patterns, 2):
        assert (one != other).sum() >= 8


def test_a_label_follows_from_what_is_drawn():
    source = cues.open_split("validation[:200]", 160)
    patterns, labels = cues.patterns(), []
    for i in range(len(source)):
        record = source[i]
        image = record["image"]
        assert image.shape == (32, 160, 1)
        assert set(np.unique(image)) == {0, 128, 255}
        assert (image[:, 24:136] == 128).all()
        found = []
        for part in (image[:, :24, 0], image[:, 136:, 0]):
            rows, cols = (np.flatnonzero((part != 128).any(axis)) for axis in (1, 0))
            cells = part[rows[0] : rows[0] + 16 : 4, cols[0] : cols[0] + 16 : 4] == 255
            found.append([(cells == pattern).all() for pattern in patterns].index(True))
        mark, cue = found
        assert mark < 4 <= cue
        assert record["label"] == (mark if cue == 4 else {0: 1, 1: 0, 2: 3, 3: 2}[mark])
        labels.append(record["label"] == mark)
    assert 0.6 < np.mean(labels) < 0.8


def test_splits_are_always_the_same_and_differ():
    train, again, validation = (cues.open_split(name, 160) for name in ("train", "train", "validation"))
    assert (len(train), len(validation)) == (16_384, 2_048)
    np.testing.assert_array_equal(train.marks, again.marks)
    np.testing.assert_array_equal(train.corners, again.corners)
    assert (train.marks[:2048] != validation.marks).any()
    swapped = train.marks[:, 1] == 5
    assert swapped.mean() == pytest.approx(0.3, abs=1e-4)
    config = recipe.get_config()
    source = sources.make_source(config, "train[:10%]+validation")
    assert len(source) == 1638 + 2048
    np.testing.assert_array_equal(source.marks[1638:], validation.marks)


def test_too_narrow():
    with pytest.raises(ValueError, match=r"image_size=40: the strips of cues are at least 48 pixels wide"):
        cues.open_split("train", 40)


def test_adding_up_scores_is_not_enough():
    assert cues.additive_bound() == pytest.approx(0.85)


@pytest.mark.parametrize("carriers", [False, True])
def test_only_carrier_tokens_see_both_ends(key, carriers):
    """Which cells of the last map depend on pixels of the left end, and which on the right one's."""
    config = recipe.get_config().unlock()
    config.model.hat = (False, False, carriers, False)
    model = make_model(config)
    images = jax.random.normal(key, (1, 32, 160, 1))
    variables = jax.jit(model.init)(key, images)
    # Away from the initial weights, at which tokens look at carrier tokens with a weight of e⁻⁸.
    variables = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(key, x.shape) * (x.ndim > 1), variables)

    @jax.jit
    def last_map(images):
        return model.apply(variables, images, method="features")[-1]

    assert last_map(images).shape == (1, 1, 5, 128)
    seen = []
    for end in (slice(0, cues.END), slice(160 - cues.END, 160)):
        changed = images.at[:, :, end].add(1.0)
        seen.append(np.asarray((last_map(changed) != last_map(images)).any((0, 1, 3))))
    both = seen[0] & seen[1]
    assert both.all() if carriers else not both.any(), seen
    assert jnp.stack(seen).any(1).all()
