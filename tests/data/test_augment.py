"""Augmentation: values where they can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from fastervit_jax.data import augment


def test_normalise():
    images = jnp.asarray([[[[0, 255]]], [[[51, 102]]]], jnp.uint8)
    expected = np.array([[[[-1.0, 2.0]]], [[[0.0, -0.4]]]])
    np.testing.assert_allclose(augment.normalise(images, (0.2, 0.5), (0.2, 0.25)), expected, atol=1e-6)


def test_no_zoom_and_no_shift_change_nothing(key):
    images = jax.random.randint(key, (3, 8, 6, 2), 0, 256).astype(jnp.uint8)
    np.testing.assert_allclose(augment.random_zoom_shift(key, images, 0.0, 0.0), images, atol=1e-3)


def centres(images):
    """Mass, and mean row and column, of each image."""
    rows, cols = np.meshgrid(np.arange(64), np.arange(64), indexing="ij")
    mass = images.sum((1, 2))
    return mass, np.stack([(images * rows).sum((1, 2)) / mass, (images * cols).sum((1, 2)) / mass], axis=1)


def test_shift_and_zoom_keep_to_their_ranges(key):
    square = jnp.zeros((200, 64, 64, 1), jnp.uint8).at[:, 24:40, 24:40].set(200)
    for zoom, shift in ((0.0, 0.1), (0.25, 0.0)):
        images = np.asarray(augment.random_zoom_shift(key, square, zoom, shift))[..., 0]
        mass, centre = centres(images)
        offsets = centre - 31.5
        if shift:
            assert 6.0 < np.abs(offsets).max() <= 6.4 + 1e-3  # 0.1 of 64 pixels
            np.testing.assert_allclose(mass, 16 * 16 * 200, rtol=1e-3)
            assert len(np.unique(offsets.round(3))) > 300  # each image and side its own
        else:
            np.testing.assert_allclose(offsets, 0, atol=1e-2)
            areas = mass / (16 * 16 * 200)
            assert 0.75**2 - 0.02 < areas.min() < 0.65
            assert 1.4 < areas.max() < 1.25**2 + 0.02


def test_every_step_has_its_own_randomness(key):
    images = jax.random.randint(key, (2, 8, 8, 1), 0, 256).astype(jnp.uint8)
    first, second = (augment.random_zoom_shift(k, images, 0.2, 0.2) for k in jax.random.split(key))
    assert np.abs(first - second).max() > 1
