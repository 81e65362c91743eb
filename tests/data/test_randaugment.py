"""RandAugment: each operation on values that can be worked out by hand, and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from fastervit_jax.data import randaugment
from fastervit_jax.data.randaugment import OPS

HEIGHT, WIDTH = 40, 20
FILL = (124, 116, 104)
PRESENT = len(OPS)  # the op that leaves an image as it is
jitted_apply = jax.jit(randaugment.apply)


def apply(images, ops, magnitudes, signs):
    """All images as one batch, on NumPy arrays; ops by name."""
    ops = jnp.array([PRESENT if op is None else OPS.index(op) for op in ops], jnp.int32)
    numbers = (jnp.array(x, jnp.float32) for x in (magnitudes, signs))
    return np.asarray(jitted_apply(jnp.asarray(images), ops, *numbers, jnp.array(FILL))).astype(np.int32)


def apply_one(image, op, magnitude=9.0, sign=1.0):
    return apply(image[None].astype(np.uint8), [op], [magnitude], [sign])[0]


def tiled(*values):
    """The values, over and over, along the rows; the same in each channel."""
    return np.repeat(np.resize(np.array(values, np.uint8), (HEIGHT, WIDTH))[..., None], 3, axis=-1)


def ramp(row_step, column_step):
    rows, columns = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    return np.repeat((row_step * rows + column_step * columns)[..., None], 3, axis=-1)


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)


@pytest.mark.parametrize(("op", "magnitude", "sign", "before", "after"), [
    ("Invert", 9, 1, (0, 1, 128, 255), (255, 254, 127, 0)),
    ("Posterize", 0, 1, (15, 16, 31, 255), (0, 16, 16, 240)),
    ("Posterize", 9, 1, (127, 128, 255, 0), (0, 128, 128, 0)),
    ("Posterize", 10, 1, (127, 128, 255, 0), (0, 0, 0, 0)),
    ("Solarize", 0, 1, (0, 128, 254, 255), (0, 128, 254, 255)),
    ("Solarize", 9, 1, (0, 25, 26, 255), (0, 25, 229, 0)),
    ("Solarize", 10, 1, (0, 1, 128, 255), (255, 254, 127, 0)),
    ("SolarizeAdd", 0, 1, (0, 1, 128, 255), (0, 1, 128, 255)),
    ("SolarizeAdd", 9, 1, (0, 127, 128, 255), (99, 226, 128, 255)),
    ("AutoContrast", 9, 1, (50, 100, 101, 150), (0, 127, 130, 255)),
    ("AutoContrast", 9, 1, (0, 10, 20, 25), (0, 102, 204, 254)),  # float64: 25 · (255 / 25) < 255
    ("Brightness", 9, 1, (0, 100, 141, 142), (0, 181, 255, 255)),
    ("Brightness", 10, -1, (0, 100, 109, 255), (0, 10, 10, 25)),
    ("Contrast", 10, 1, (0, 100), (0, 145)),  # about the mean, 50
    ("Contrast", 10, -1, (0, 100), (45, 55)),
    ("Contrast", 10, -1, (0, 101), (45, 56)),  # the mean, 50.5, is rounded up to 51: 45.9 and 56
])
def test_tones(op, magnitude, sign, before, after):
    np.testing.assert_array_equal(apply_one(tiled(*before), op, magnitude, sign), tiled(*after))


def test_auto_contrast_is_that_of_float64_for_every_lowest_and_highest_value():
    low, high = (x + 0 for x in np.triu_indices(256))
    values = np.clip(np.arange(256)[None], low[:, None], high[:, None])
    pixels = np.repeat(values[:, None, :, None], 3, axis=-1).astype(np.int32)
    stretched = np.asarray(jax.jit(randaugment._auto_contrast)(pixels))[:, 0, :, 1]
    scale = 255.0 / np.maximum(high - low, 1)
    expected = (values * scale[:, None] + (-low * scale)[:, None]).astype(np.int32)
    expected = np.where((low == high)[:, None], values, expected)
    np.testing.assert_array_equal(stretched, expected)
    assert (stretched.max(axis=1) == 254).sum() > 4000  # Pillow's roundings are there


def test_auto_contrast_is_for_each_channel():
    image = np.stack([tiled(10, 20)[..., 0], tiled(7)[..., 0], tiled(0, 255)[..., 0]], axis=-1)
    expected = np.stack([tiled(0, 255)[..., 0], tiled(7)[..., 0], tiled(0, 255)[..., 0]], axis=-1)
    np.testing.assert_array_equal(apply_one(image, "AutoContrast"), expected)


def test_equalize():
    # 800 pixels: step is (800 - 290) / 255 = 2, so 20 becomes (255 + 1) / 2 and 30 becomes (510 + 1) / 2.
    values = np.repeat([10, 20, 30], [255, 255, 290])
    expected = np.repeat([0, 128, 255], [255, 255, 290])
    constant = np.full_like(values, 77)
    nearly = np.repeat([3, 200], [200, 600])  # step is 200 / 255 = 0
    image = np.stack([values, constant, nearly], axis=-1).reshape(HEIGHT, WIDTH, 3)
    expected = np.stack([expected, constant, nearly], axis=-1).reshape(HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(apply_one(image, "Equalize"), expected)


def test_histogram(photo):
    images = np.stack([photo, np.full_like(photo, 255), photo // 16 * 16])
    counts = np.asarray(randaugment._histogram(jnp.asarray(images)))
    for image, channels in zip(images, counts, strict=True):
        for i in range(3):
            np.testing.assert_array_equal(channels[i], np.bincount(image[..., i].ravel(), minlength=256))


def test_color():
    image = np.broadcast_to(np.array([100, 200, 50]), (HEIGHT, WIDTH, 3))  # grey: 29.9 + 117.4 + 5.7 = 153
    np.testing.assert_array_equal(apply_one(image, "Color", 10, -1)[3, 4], [147, 157, 142])
    np.testing.assert_array_equal(apply_one(image, "Color", 10, 1)[3, 4], [52, 242, 0])


def test_sharpness():
    image = np.zeros((HEIGHT, WIDTH, 3))
    image[10, 10] = 137  # smooth: 52.7 there and 10.5 around it, rounded up
    image[0, 0] = 137  # the border stays
    soft, sharp = (apply_one(image, "Sharpness", 10, sign) for sign in (-1, 1))
    np.testing.assert_array_equal(soft[9:12, 9:12, 0], [[9, 9, 9], [9, 61, 9], [9, 9, 9]])
    np.testing.assert_array_equal(sharp[9:12, 9:12, 0], [[0, 0, 0], [0, 212, 0], [0, 0, 0]])
    assert soft[0, 0, 0] == sharp[0, 0, 0] == 137
    assert soft[1, 1, 0] == 9
    assert soft[0, 1, 0] == soft[1, 0, 0] == 0


def test_translate_brings_in_the_fill_colour(photo):
    sent = apply_one(photo, "TranslateX", 10, 1)  # 0.45 of 20 pixels
    np.testing.assert_array_equal(sent[:, :11], photo[:, 9:])
    np.testing.assert_array_equal(sent[:, 11:], np.broadcast_to(FILL, (HEIGHT, 9, 3)))
    sent = apply_one(photo, "TranslateX", 10, -1)
    np.testing.assert_array_equal(sent[:, 9:], photo[:, :11])
    np.testing.assert_array_equal(sent[:, :9], np.broadcast_to(FILL, (HEIGHT, 9, 3)))
    sent = apply_one(photo, "TranslateY", 10, 1)  # 0.45 of 40 pixels
    np.testing.assert_array_equal(sent[:22], photo[18:])
    np.testing.assert_array_equal(sent[22:], np.broadcast_to(FILL, (18, WIDTH, 3)))


def test_translate_by_part_of_a_pixel_is_bilinear():
    values = apply_one(ramp(0, 11), "TranslateX", 0.25 / 0.9, 1)  # 0.045 · 20 · 0.25 / 0.9: a quarter of a pixel
    np.testing.assert_array_equal(values[:, :-1], ramp(0, 11)[:, :-1] + 2)  # 2.75 is cut off
    np.testing.assert_array_equal(values[:, -1], ramp(0, 11)[:, -1])  # beyond the border: the outermost pixel


@pytest.mark.parametrize("sign", [1, -1])
def test_shears(sign):
    rows, columns = np.meshgrid(np.arange(HEIGHT), np.arange(WIDTH), indexing="ij")
    x = columns + sign * 0.27 * (rows + 0.5)
    inside = (x > 0) & (x < WIDTH - 1)
    assert 300 < inside.sum() < 700
    values = apply_one(ramp(0, 10), "ShearX", 9, sign)[..., 0]
    np.testing.assert_allclose(values[inside], np.floor(10 * x)[inside], atol=1)
    assert np.abs(values - 10 * x)[inside].mean() < 1
    np.testing.assert_array_equal(apply_one(ramp(0, 10), "ShearX", 9, sign)[(x < -1) | (x > WIDTH)][0], FILL)

    y = rows + sign * 0.27 * (columns + 0.5)
    inside = (y > 0) & (y < HEIGHT - 1)
    values = apply_one(ramp(5, 0), "ShearY", 9, sign)[..., 0]
    np.testing.assert_allclose(values[inside], np.floor(5 * y)[inside], atol=1)


@pytest.mark.parametrize("sign", [1, -1])
def test_rotate_turns_about_the_middle_counter_clockwise(sign):
    image = np.zeros((HEIGHT, WIDTH, 3))
    image[19:21, 16:18] = 200  # its middle is 7 pixels to the right of the image's
    turned = apply_one(image, "Rotate", 10, sign)[..., 0].astype(float)
    turned[turned == FILL[0]] = 0
    rows, columns = np.meshgrid(np.arange(HEIGHT) + 0.5, np.arange(WIDTH) + 0.5, indexing="ij")
    middle = (turned * columns).sum() / turned.sum() - WIDTH / 2, (turned * rows).sum() / turned.sum() - HEIGHT / 2
    np.testing.assert_allclose(middle, (7 * np.cos(np.pi / 6), -sign * 7 * np.sin(np.pi / 6)), atol=0.05)
    np.testing.assert_allclose(turned.sum(), 800, rtol=0.02)
    np.testing.assert_array_equal(apply_one(image, "Rotate", 10, sign)[0, 0], FILL)


def test_each_image_gets_its_own_operation(photo, monkeypatch):
    ops = [*OPS, None, *reversed(OPS), *["Equalize"] * 5, *["Rotate"] * 5]
    numbers = np.random.default_rng(1)
    magnitudes, signs = numbers.uniform(5, 10, len(ops)), numbers.choice([-1, 1], len(ops))
    images = np.stack([np.roll(photo, i, axis=0) // 2 + i % 3 for i in range(len(ops))])
    together = apply(images, ops, magnitudes, signs)
    alone = [apply_one(*args) for args in zip(images, ops, magnitudes, signs, strict=True)]
    np.testing.assert_array_equal(together, np.stack(alone))
    np.testing.assert_array_equal(together[OPS.index("TranslateY") + 1], images[len(OPS)])
    changed = (together != images).any((1, 2, 3))
    assert changed.sum() == len(ops) - 1

    monkeypatch.setattr(randaugment, "EQUALIZE_PIXELS", 3 * HEIGHT * WIDTH)  # seven images, three at a time
    monkeypatch.setattr(randaugment, "WARP_PIXELS", 4 * HEIGHT * WIDTH)
    jitted_apply.clear_cache()
    np.testing.assert_array_equal(apply(images, ops, magnitudes, signs), together)
    jitted_apply.clear_cache()


@pytest.mark.parametrize("needed", [[], [0], [6], [1, 4], [0, 2, 3, 5], [0, 1, 2, 3, 4, 5, 6]])
def test_rewrite_some(needed):
    images = np.arange(7, dtype=np.float32)[:, None, None, None] * np.ones((7, 2, 2, 1), np.float32)
    seen = []

    def change(places, some):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), places)
        return some + 100 + places[:, None, None, None]

    mask = np.isin(np.arange(7), needed)
    result = randaugment.rewrite_some(jnp.asarray(images), jnp.asarray(mask), change, pixels=3 * 4)
    jax.effects_barrier()
    np.testing.assert_array_equal(result, np.where(mask[:, None, None, None], 2 * images + 100, images))
    assert [len(x) for x in seen] == [3] * -(-len(needed) // 3)  # no more work than was needed


def test_draws(key):
    count = 30000
    op, magnitude, sign = (np.asarray(x) for x in jax.jit(lambda keys: randaugment.draw(keys, 0.6, 9.0, 0.5))(
        jax.random.split(key, count)))
    frequencies = np.bincount(op, minlength=len(OPS) + 1)
    expected = np.array([0.6 / 15] * 15 + [0.4]) * count
    assert scipy.stats.chisquare(frequencies, expected).pvalue > 1e-3
    assert scipy.stats.binomtest((sign == 1).sum(), count).pvalue > 1e-3
    assert set(np.unique(sign)) == {-1, 1}
    assert magnitude.max() == 10  # clipped: two standard deviations
    assert scipy.stats.binomtest((magnitude == 10).sum(), count, scipy.stats.norm.sf(2)).pvalue > 1e-3
    below = magnitude[magnitude < 10]
    assert scipy.stats.kstest(below, scipy.stats.truncnorm(-np.inf, 2, loc=9, scale=0.5).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(magnitude, sign)[0, 1]) < 0.03
    low = randaugment.draw(jax.random.split(key, 100), 0.5, 0.1, 0.5)[1]
    assert low.min() == 0
    assert (randaugment.draw(jax.random.split(key, 100), 0.0, 9.0, 0.0)[0] == PRESENT).all()
    fixed = randaugment.draw(jax.random.split(key, 100), 1.0, 9.0, 0.0)
    assert (fixed[0] < PRESENT).all()
    assert (fixed[1] == 9).all()


def test_rand_augment_applies_independent_draws_one_after_the_other(key, photo):
    images = jnp.asarray(np.stack([np.roll(photo, i, axis=0) for i in range(16)]))
    keys = jax.random.split(key, 16)
    assert (randaugment.rand_augment(keys, images, 0, 0.5, 9.0, 0.5, FILL) == images).all()
    jitted = jax.jit(lambda keys, images: randaugment.rand_augment(keys, images, 2, 1.0, 9.0, 0.5, FILL))
    result = jitted(keys, images)
    layers = [randaugment.draw(jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys), 1.0, 9.0, 0.5)
              for i in range(2)]
    assert (layers[0][0] != layers[1][0]).sum() > 8
    expected = images
    for layer in layers:
        expected = jitted_apply(expected, *layer, jnp.array(FILL))
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(jitted(keys[::-1], images[::-1]), result[::-1])  # the key decides, not the place


def test_only_some_operations_have_levels():
    with pytest.raises(ValueError, match="no levels for 'Equalize'"):
        randaugment.level("Equalize", jnp.float32(9), jnp.float32(1))
