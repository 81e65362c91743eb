"""Augmentation: values where they can be worked out by hand, and distributions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ml_collections import ConfigDict

from fastervit_jax.data import augment
from fastervit_jax.data.randaugment import OPS
from fastervit_jax.train.sharding import make_mesh, over_batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFF = {
    "flip": 0.0, "zoom": 0.0, "shift": 0.0, "color_jitter": 0.0, "rand_augment_ops": 0, "rand_augment_prob": 0.5,
    "rand_augment_magnitude": 9.0, "rand_augment_std": 0.5, "erase_prob": 0.0, "erase_mode": "pixel",
    "erase_area": (0.02, 1 / 3), "erase_aspect": (0.3, 3.3), "mixup": 0.0, "cutmix": 0.0, "mix_prob": 1.0,
    "cutmix_switch": 0.5, "mix_group": 8,
}
ALL = {"flip": 0.5, "zoom": 0.1, "shift": 0.1, "color_jitter": 0.4, "rand_augment_ops": 2, "erase_prob": 0.25}
COLLECTIVES = re.compile(r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast")


def settings(**changes):
    return ConfigDict({**OFF, **changes})


def random_images(key, *shape):
    return jax.random.randint(key, shape, 0, 256).astype(jnp.uint8)


@functools.cache
def jitted_augment(config, devices, mean, std):
    mesh, config = make_mesh(jax.devices()[:devices]), ConfigDict(dict(config))

    def both(key, images):
        augment_key, erase_key = jax.random.split(key)
        return augment.erase(erase_key, augment.augment(augment_key, images, config, mean, std, mesh), config, mesh)

    return mesh, jax.jit(both)


def augmented(key, images, config, devices=1, mean=MEAN, std=STD):
    mesh, jitted = jitted_augment(tuple(config.items()), devices, mean, std)
    return np.asarray(jitted(key, jax.device_put(images, over_batch(mesh))))


def mixed(key, images, targets, weights, config):
    jitted = jax.jit(lambda *args: augment.mix(*args, config))
    return (np.asarray(x) for x in jitted(key, jnp.asarray(images), jnp.asarray(targets), jnp.asarray(weights)))


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


@pytest.mark.parametrize("through_augment", [False, True])
def test_shift_and_zoom_keep_to_their_ranges(key, through_augment):
    square = jnp.zeros((200, 64, 64, 1), jnp.uint8).at[:, 24:40, 24:40].set(200)
    for zoom, shift in ((0.0, 0.1), (0.25, 0.0)):
        if through_augment:  # normalised with these, pixels stay what they were
            images = augmented(key, square, settings(zoom=zoom, shift=shift), mean=(0.0,), std=(1 / 255,))[..., 0]
        else:
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
    images = random_images(key, 2, 8, 8, 1)
    first, second = (augment.random_zoom_shift(k, images, 0.2, 0.2) for k in jax.random.split(key))
    assert np.abs(first - second).max() > 1
    images = random_images(key, 32, 24, 20, 3)
    first, second = (augmented(k, images, settings(**ALL)) for k in jax.random.split(key))
    assert (np.abs(first - second) > 0.1).any((1, 2, 3)).sum() > 16


@pytest.mark.parametrize("channels", [1, 3])
def test_with_everything_off_it_normalises(key, channels):
    images = random_images(key, 4, 8, 6, channels)
    expected = jax.jit(lambda x: augment.normalise(x, MEAN[:channels], STD[:channels]))(images)
    result = augmented(key, images, settings(), mean=MEAN[:channels], std=STD[:channels])
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, expected)


def test_devices_do_not_talk_and_do_not_change_the_result(key):
    images = random_images(key, 32, 24, 20, 3)
    one = augmented(key, images, settings(**ALL), devices=1)
    np.testing.assert_array_equal(augmented(key, images, settings(**ALL), devices=8), one)

    mesh, jitted = jitted_augment(tuple(settings(**ALL).items()), 8, MEAN, STD)
    compiled = jitted.lower(key, jax.device_put(images, over_batch(mesh))).compile().as_text()
    assert "num_partitions=8" in compiled
    assert "while" in compiled
    assert not COLLECTIVES.findall(compiled)


def test_devices_do_not_talk_to_mix_their_own_groups(key):
    mesh = make_mesh()
    images = jax.device_put(jnp.ones((32, 8, 8, 3)), over_batch(mesh))
    others = [jax.device_put(x, over_batch(mesh)) for x in (jnp.ones((32, 5)), jnp.ones(32))]
    for changes in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}):
        jitted = jax.jit(lambda *args, c=changes: augment.mix(*args, settings(mix_group=4, **c)))
        assert not COLLECTIVES.findall(jitted.lower(key, images, *others).compile().as_text())


def test_flip(key):
    images = random_images(key, 4000, 2, 3, 1)
    result = augmented(key, images, settings(flip=0.3), mean=(0.0,), std=(1 / 255,)).round()
    images = np.asarray(images)
    symmetric = (images == images[:, :, ::-1]).all((1, 2, 3))
    flipped = (result == images[:, :, ::-1]).all((1, 2, 3))
    kept = (result == images).all((1, 2, 3))
    assert (flipped | kept).all()
    assert scipy.stats.binomtest((flipped & ~symmetric).sum(), (~symmetric).sum(), 0.3).pvalue > 1e-3
    always = augmented(key, images, settings(flip=1.0), mean=(0.0,), std=(1 / 255,)).round()
    np.testing.assert_array_equal(always, images[:, :, ::-1])


def test_an_image_in_another_place_gets_other_changes(key):
    image = random_images(key, 1, 24, 20, 3)
    results = augmented(key, jnp.tile(image, (32, 1, 1, 1)), settings(**ALL), devices=8)
    assert len(np.unique(results.reshape(32, -1), axis=0)) == 32


def test_rand_augment_is_applied_to_pixels_with_the_mean_colour(key):
    config = settings(rand_augment_ops=1, rand_augment_prob=1.0)
    images = random_images(key, 64, 20, 20, 3) // 8
    result = augmented(key, images, config)
    pixels = np.round((result * np.array(STD)[None, None, None] + np.array(MEAN)[None, None, None]) * 255)
    np.testing.assert_allclose(
        result, augment.normalise(jnp.asarray(pixels, jnp.uint8), MEAN, STD), atol=1e-6)  # whole numbers
    filled = (pixels == np.array([124, 116, 104])[None, None, None]).all(-1)
    assert 10 < filled.any((1, 2)).sum() < 32  # about 5 of 15


def test_colour_jitter(key):
    """Two greys and a colour, whose mean, contrast and saturation the three factors are read from."""
    count, jitter = 2000, 0.3
    images = np.full((count, 2, 2, 3), 100, np.uint8)
    grey = np.asarray(augmented(key, images, settings(color_jitter=jitter), mean=(0.0,) * 3, std=(1 / 255,) * 3))
    brightness = grey[:, 0, 0, 0] / 100  # contrast and saturation do nothing to one grey
    assert scipy.stats.kstest(brightness + 0.005, scipy.stats.uniform(0.7, 0.6).cdf).pvalue > 1e-3
    images[:, :, 0], images[:, :, 1] = 40, 160
    tones = np.asarray(augmented(key, images, settings(color_jitter=jitter), mean=(0.0,) * 3, std=(1 / 255,) * 3))
    contrast = (tones[:, 0, 1, 0] - tones[:, 0, 0, 0]) / 120 / brightness
    assert scipy.stats.kstest(contrast, scipy.stats.uniform(0.7, 0.6).cdf).statistic < 0.05
    assert abs(np.corrcoef(contrast, brightness)[0, 1]) < 0.08
    images[:] = np.array([100, 140, 60])
    colours = np.asarray(augmented(key, images, settings(color_jitter=jitter), mean=(0.0,) * 3, std=(1 / 255,) * 3))
    saturation = (colours[:, 0, 0, 1] - colours[:, 0, 0, 2]) / 80 / brightness / contrast
    assert scipy.stats.kstest(saturation, scipy.stats.uniform(0.7, 0.6).cdf).statistic < 0.05
    assert abs(np.corrcoef(saturation, contrast)[0, 1]) < 0.1


def test_colour_jitter_has_any_order(key):
    keys = jax.random.split(key, 3000)
    ops, factors = jax.jit(jax.vmap(lambda key: augment.draw_color_jitter(key, 1.2)))(keys)
    orders, counts = np.unique(ops, axis=0, return_counts=True)
    assert len(orders) == 6
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    assert scipy.stats.kstest(np.ravel(factors), scipy.stats.uniform(0, 2.2).cdf).pvalue > 1e-3
    image = np.tile(np.array([[[250, 10, 30], [90, 200, 120]]], np.uint8), (3000, 1, 1, 1))
    result = np.asarray(augment.random_color_jitter(keys, jnp.asarray(image), 1.2))
    for i in range(20):
        pixels = image[i].astype(np.float32)
        for op, factor in zip(ops[i], factors[i], strict=True):
            grey = (pixels @ np.array([0.299, 0.587, 0.114])).round()[..., None]
            without = {"Brightness": 0, "Contrast": np.floor(grey.mean() + 0.5), "Color": grey}[OPS[op]]
            pixels = np.floor(np.clip(without + float(factor) * (pixels - without), 0, 255))
        np.testing.assert_allclose(result[i], pixels, atol=3)  # by 1 each time, and by factors of up to 2.2


def erased_boxes(key, count, height, width, **changes):
    """Of ones, with the mode const: which images have a box, and its rows, columns and places."""
    config = settings(**{"erase_prob": 1.0, "erase_mode": "const", **changes})
    images = jnp.full((count, height, width, 1), 255, jnp.uint8)
    erased = augmented(key, images, config, mean=(0.0,), std=(1.0,))[..., 0] == 0
    heights, widths = erased.any(2).sum(1), erased.any(1).sum(1)
    np.testing.assert_array_equal(heights * widths, erased.sum((1, 2)))  # one box
    return heights, widths, erased.any(2).argmax(1), erased.any(1).argmax(1)


def test_erasing(key):
    heights, widths, top, left = erased_boxes(key, 2000, 60, 40, erase_area=(0.1, 0.2), erase_aspect=(0.5, 2.0))
    assert (heights > 0).all()
    areas, aspects = heights * widths / 2400, heights / widths
    assert areas.min() > 0.09
    assert areas.max() < 0.21
    assert scipy.stats.kstest(areas, scipy.stats.uniform(0.1, 0.1).cdf).statistic < 0.05
    assert scipy.stats.kstest(np.log(aspects), scipy.stats.uniform(np.log(0.5), np.log(4)).cdf).statistic < 0.05
    for start, length, side in ((top, heights, 60), (left, widths, 40)):
        assert scipy.stats.kstest((start + 0.5) / (side - length + 1), scipy.stats.uniform().cdf).statistic < 0.05
        assert (start == 0).any()
        assert (start + length == side).any()
    heights = erased_boxes(key, 4000, 16, 16, erase_prob=0.25, erase_area=(0.1, 0.2))[0]
    assert scipy.stats.binomtest((heights > 0).sum(), 4000, 0.25).pvalue > 1e-3


def test_a_box_that_does_not_fit_is_drawn_again(key):
    heights, *_ = erased_boxes(key, 2000, 12, 60, erase_area=(0.3, 0.33), erase_aspect=(0.3, 3.3))
    assert heights.max() == 11  # of 12 rows; an aspect of 1 would need 15
    assert ((heights > 0).mean()) > 0.9
    heights, *_ = erased_boxes(key, 50, 12, 60, erase_area=(0.5, 0.5), erase_aspect=(3.0, 3.3))
    assert (heights == 0).all()


def test_erased_pixels_are_noise_of_their_own(key):
    images = random_images(key, 60, 24, 24, 3)
    plain = augmented(key, images, settings())
    result = augmented(key, images, settings(erase_prob=0.5, erase_area=(0.2, 0.3)))
    changed = (result != plain).any(-1)
    some = changed.any((1, 2))
    assert 15 < some.sum() < 45
    noise = result[changed]
    assert len(noise) > 2000
    assert scipy.stats.kstest(noise.ravel(), scipy.stats.norm.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.05  # each channel its own
    assert len(np.unique(noise)) > 0.99 * noise.size  # and each image, too
    np.testing.assert_array_equal(result[~changed], plain[~changed])


def test_what_cannot_be_done_is_refused(key):
    images = random_images(key, 2, 8, 8, 1)
    for changes in ({"rand_augment_ops": 2}, {"color_jitter": 0.4}):
        with pytest.raises(ValueError, match=r"images have 1 channels.*need 3: set config.augment.rand_augment_ops"):
            augmented(key, images, settings(**changes), mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="erase_mode='noise': expected 'pixel' or 'const'"):
        augmented(key, images, settings(erase_prob=0.1, erase_mode="noise"), mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match=r"augment.mix_group=8: expected a divisor of the batch of 12 images"):
        augment.mix(key, jnp.zeros((12, 4, 4, 1)), jnp.zeros((12, 2)), jnp.ones(12), settings(mixup=0.8))


def test_one_channel(key):
    images = random_images(key, 16, 20, 20, 1)
    config = settings(flip=0.5, zoom=0.1, shift=0.1, erase_prob=0.5, mixup=0.8, cutmix=1.0)
    result = augmented(key, images, config, mean=(0.5,), std=(0.5,))
    assert result.shape == (16, 20, 20, 1)
    images, _, _ = mixed(key, result, np.eye(16), np.ones(16), config)
    assert np.isfinite(images).all()
    assert (np.abs(images - result) > 0.01).any((1, 2, 3)).sum() >= 8


def test_no_mixing_gives_back_what_was_given(key):
    given = jnp.ones((5, 4, 4, 1)), jnp.eye(5), jnp.ones(5)
    assert augment.mix(key, *given, settings()) == given
    images = np.arange(16, dtype=np.float32)[:, None, None, None] * np.ones((16, 4, 4, 1), np.float32)
    result, targets, weights = mixed(
        key, images, np.eye(16), np.arange(16) % 2.0, settings(mixup=0.8, cutmix=1.0, mix_prob=0.0))
    np.testing.assert_array_equal(result, images)
    np.testing.assert_array_equal(targets, np.eye(16))
    np.testing.assert_array_equal(weights, np.arange(16) % 2)


def groups_of_four(key, count, **changes):
    """Images of their own number and one-hot targets, mixed; and each group's λ."""
    batch = 4 * count
    images = np.tile(np.arange(4, dtype=np.float32)[:, None, None, None], (count, 12, 10, 1))
    targets = np.tile(np.eye(4, dtype=np.float32), (count, 1))
    images, targets, weights = mixed(key, images, targets, np.ones(batch), settings(mix_group=4, **changes))
    images, targets = images.reshape(count, 4, 12, 10), targets.reshape(count, 4, 4)
    kept = targets[:, 0, 0]
    expected = kept[:, None, None] * np.eye(4) + (1 - kept[:, None, None]) * np.eye(4)[::-1]
    np.testing.assert_allclose(targets, expected, atol=1e-6)  # one λ, and the partner is the group's reverse
    return images, kept, weights


def test_mixup(key):
    images, kept, _ = groups_of_four(key, 2000, mixup=0.8)
    assert scipy.stats.kstest(kept, scipy.stats.beta(0.8, 0.8).cdf).pvalue > 1e-3
    assert len(np.unique(kept)) > 1990  # of a few thousand quantiles, and between them
    numbers = np.arange(4)[None]
    expected = numbers * kept[:, None] + (3 - numbers) * (1 - kept[:, None])
    np.testing.assert_allclose(images, np.broadcast_to(expected[..., None, None], images.shape), atol=1e-5)
    assert np.abs(np.corrcoef(kept[:-1], kept[1:])[0, 1]) < 0.08


def test_cutmix_pastes_what_the_targets_say(key):
    images, kept, _ = groups_of_four(key, 4000, cutmix=1.0)
    numbers = np.arange(4, dtype=np.float32)[None, :, None, None]
    pasted = images == 3 - numbers
    assert ((images == numbers) | pasted).all()
    np.testing.assert_array_equal(pasted, np.broadcast_to(pasted[:, :1], pasted.shape))  # the group's one box
    pasted = pasted[:, 0]
    np.testing.assert_allclose(1 - kept, pasted.mean((1, 2)), atol=1e-6)
    heights, widths = pasted.any(2).sum(1), pasted.any(1).sum(1)
    np.testing.assert_array_equal(heights * widths, pasted.sum((1, 2)))
    # Boxes that touch no border: as much of each side, but for rounding down.
    free = ~(pasted[:, 0].any(1) | pasted[:, -1].any(1) | pasted[:, :, 0].any(1) | pasted[:, :, -1].any(1))
    assert free.sum() > 500
    assert ((heights[free] + 1) / 12 > widths[free] / 10).all()
    assert ((widths[free] + 1) / 10 > heights[free] / 12).all()
    # Centres are everywhere: each row and column is pasted, those in the middle more often.
    rows, columns = pasted.any(2).mean(0), pasted.any(1).mean(0)
    for share in (rows, columns):
        np.testing.assert_allclose(share, share[::-1], atol=0.08)  # a box of even sides is half a pixel off
        assert 0.25 < share.min() < share.max() < 0.7
    # λ before it is corrected is uniform (alpha is 1): a box of the given sides, wherever it is.
    whole = 1 - scipy.stats.beta(1, 1).rvs(100_000, random_state=0)
    rng = np.random.default_rng(0)
    lengths = [np.floor(side * np.sqrt(whole)).astype(int) for side in (12, 10)]
    starts = [rng.integers(0, side, len(whole)) - length // 2 for side, length in zip((12, 10), lengths, strict=True)]
    sides = [np.clip(s + n, 0, side) - np.clip(s, 0, side)
             for s, n, side in zip(starts, lengths, (12, 10), strict=True)]
    assert scipy.stats.ks_2samp(((1 - kept) * 120).round(), sides[0] * sides[1]).pvalue > 1e-3


def test_switch_and_probability_of_mixing(key):
    images, kept, _ = groups_of_four(key, 3000, mixup=0.8, cutmix=1.0, mix_prob=0.7, cutmix_switch=0.2)
    whole = np.isin(images, [0, 1, 2, 3]).all((1, 2, 3))
    mixup = ~whole
    assert scipy.stats.binomtest(mixup.sum(), 3000, 0.7 * 0.8).pvalue > 1e-3
    cut = whole & (kept < 1)
    empty = 0.03  # about so many boxes of CutMix have no area
    assert abs(cut.mean() - 0.7 * 0.2 * (1 - empty)) < 0.03
    assert (kept[~cut & whole] == 1).all()
    assert scipy.stats.kstest(kept[mixup], scipy.stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_a_mixed_image_counts_if_its_partner_does(key):
    count = 500
    numbers = np.tile(np.arange(4), count)
    given = np.ones(4 * count)
    given[numbers == 1] = 0  # its partner is 2
    images = np.zeros((4 * count, 6, 6, 1), np.float32)
    targets = np.tile(np.eye(4, dtype=np.float32), (count, 1))
    _, targets, weights = mixed(key, images, targets, given, settings(mixup=0.8, cutmix=1.0, mix_prob=0.5, mix_group=4))
    kept = targets.reshape(count, 4, 4)[:, 0, 0]
    assert 100 < (kept < 1).sum() < 400
    expected = np.where((kept < 1)[:, None], np.array([1, 0, 0, 1])[None], np.array([1, 0, 1, 1])[None])
    np.testing.assert_array_equal(weights.reshape(count, 4), expected)


def test_groups_do_not_mix_with_each_other(key):
    images = np.repeat(np.array([0.0, 10.0], np.float32), 8)[:, None, None, None] * np.ones((16, 4, 4, 1), np.float32)
    targets = np.repeat(np.eye(2, dtype=np.float32), 8, axis=0)
    result, mixed_targets, _ = mixed(key, images, targets, np.ones(16), settings(mixup=0.8, cutmix=1.0))
    np.testing.assert_allclose(result, images, atol=1e-5)
    np.testing.assert_allclose(mixed_targets, targets, atol=1e-6)


def test_knobs_that_are_off_cost_nothing(key):
    images = random_images(key, 4, 8, 8, 3)
    mesh = make_mesh(jax.devices()[:1])
    program = jax.make_jaxpr(lambda key, x: augment.augment(key, x, settings(), MEAN, STD, mesh))(key, images)
    assert "random" not in str(program).replace("random_fold_in", "")
    assert "while" not in str(program)


def test_mixed_images_are_erased_last(key):
    """As timm does: noise is not mixed with anything, and an image has one box, not its partner's too."""
    config = settings(mixup=0.8, mix_group=2, erase_prob=1.0, erase_mode="const", erase_area=(0.2, 0.3))
    images = jnp.concatenate([jnp.full((32, 20, 20, 1), 50, jnp.uint8), jnp.full((32, 20, 20, 1), 200, jnp.uint8)])
    images = images.reshape(2, 32, 20, 20, 1).swapaxes(0, 1).reshape(64, 20, 20, 1)  # 50, 200, 50, 200, ...
    mesh = make_mesh(jax.devices()[:1])
    args = (jnp.eye(64), jnp.ones(64), config, (0.0,), (1 / 255,), mesh)
    result, targets, _ = jax.jit(lambda key, images: augment.train_images(key, images, *args))(key, images)
    for i, (image, target) in enumerate(zip(np.asarray(result)[..., 0], np.asarray(targets), strict=True)):
        kept, colours = target[i], (50, 200) if i % 2 == 0 else (200, 50)
        mixed = kept * colours[0] + (1 - kept) * colours[1]
        values = np.unique(image)
        assert values[0] == 0
        np.testing.assert_allclose(values[1:], mixed, atol=0.01)
        box = image == 0
        assert 0.15 < box.mean() < 0.35
        assert box.any(0).sum() * box.any(1).sum() == box.sum()
