"""Decoding: every kind of file, the crop that was drawn and no other, and pixels next to PIL's."""

import io

import numpy as np
import pytest
from PIL import Image

from configs import imagenet
from fastervit_jax.data import decode
from tests.data import images

SIZE = 32
TRAIN = decode.TrainCrop(SIZE, 3, (0.08, 1.0), (3 / 4, 4 / 3), "random")
EVAL = decode.EvalCrop(SIZE, 3, 0.875, "center")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])
@pytest.mark.parametrize("kind", images.odd())
def test_every_kind_of_file(kind, transform, rng):
    data, colour = images.odd()[kind]
    pixels = transform(data, rng)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (SIZE, SIZE, 3)
    np.testing.assert_allclose(pixels.astype(int), np.broadcast_to(colour, pixels.shape), atol=3)


@pytest.mark.parametrize("kind", ["jpeg", "grey jpeg", "cmyk jpeg", "palette png", "16-bit png", "large jpeg"])
def test_one_channel(kind, rng):
    data, colour = images.odd()[kind]
    grey = round(np.dot(colour, (0.299, 0.587, 0.114)))
    for transform in (decode.TrainCrop(SIZE, 1, (0.5, 1.0), (1.0, 1.0), "bilinear"),
                      decode.EvalCrop(SIZE, 1, 1.0, "squash")):
        pixels = transform(data, rng)
        assert pixels.shape == (SIZE, SIZE, 1)
        np.testing.assert_allclose(pixels.astype(int), grey, atol=3)


@pytest.mark.parametrize("transform", [TRAIN, EVAL], ids=["train", "eval"])
@pytest.mark.parametrize("kind", images.damaged())
def test_damaged_files(kind, transform, rng):
    data, message = images.damaged()[kind]
    with pytest.raises((ValueError, OSError), match=message):
        transform(data, rng)


@pytest.mark.parametrize("transform", [decode.TrainCrop(SIZE, 3, (1.0, 1.0), (1.5, 1.5), "bilinear"),
                                       decode.EvalCrop(SIZE, 3, 1.0, "squash")], ids=["train", "eval"])
def test_exif_does_not_turn_the_image(transform, rng):
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph = images.photographs()[0].crop((0, 0, 300, 200))
    turned, straight = images.encoded(photograph, exif=exif), images.encoded(photograph)
    np.testing.assert_array_equal(transform(turned, rng), transform(straight, rng))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [224, 64])  # 64: most are decoded at 1/2 or 1/4
def test_crops_are_those_that_were_drawn(size, interpolation):
    """Next to PIL's own resize of the same box. A box that is off by two pixels differs by more.

    A box of an image that is decoded at 1/n of its size begins and ends at multiples of n.
    """
    crop = decode.TrainCrop(size, 3, (0.08, 1.0), (3 / 4, 4 / 3), interpolation)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    differences, shifted = [], []
    for i, photograph in enumerate(images.photographs() * 10):
        data = images.encoded(photograph, quality=95)
        ours = crop(data, np.random.default_rng(i)).astype(int)
        top, left, height, width = decode.random_box(427, 640, crop.scale, crop.ratio, np.random.default_rng(i))
        n = max(n for n in (1, 2, 4, 8) if n == 1 or min(height, width) >= n * size)
        height, width = -(-(top + height) // n) * n - top // n * n, -(-(left + width) // n) * n - left // n * n
        top, left = top // n * n, left // n * n
        whole = Image.open(io.BytesIO(data)).convert("RGB")
        for move, found in ((0, differences), (2, shifted)):
            box = (left + move, top, left + move + width, top + height)
            theirs = whole.crop(box).resize((size, size), method)
            found.append(np.abs(ours - np.asarray(theirs)).mean())
    print(f"{size} {interpolation}: differs by {np.mean(differences):.2f}, moved by 2 by {np.mean(shifted):.2f}")
    assert np.mean(differences) < (1.5 if size == 224 else 2)
    assert max(differences) < 5
    assert np.mean(shifted) > 3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(40, 40), (224, 224), (300, 260), (430, 400), (430, 200), (900, 700)])
def test_resize_is_antialiased(shape, interpolation, rng):
    """Noise has no correlation from pixel to pixel: what a filter leaves of its variance tells the filter's width."""
    noise = rng.integers(64, 192, (*shape, 3)).astype(np.uint8)
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    ours = decode.resize(noise, 224, interpolation).astype(float)
    theirs = np.asarray(Image.fromarray(noise).resize((224, 224), method)).astype(float)
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.3)
    assert ours.std() == pytest.approx(theirs.std(), rel=0.35 if max(shape) < 900 else 0.55)  # areas are narrower


def test_interpolation_is_used(rng):
    photograph = np.asarray(images.photographs()[1])[:150, :150]
    assert np.abs(decode.resize(photograph, 224, "bilinear").astype(int)
                  - decode.resize(photograph, 224, "bicubic")).mean() > 0.1
    data = images.jpegs(1)[0]
    fixed = [decode.TrainCrop(SIZE, 3, (1.0, 1.0), (1.0, 1.0), name) for name in ("bilinear", "bicubic")]
    either = decode.TrainCrop(SIZE, 3, (1.0, 1.0), (1.0, 1.0), "random")
    results = {crop(data, np.random.default_rng(0)).tobytes() for crop in fixed}
    drawn = [either(data, np.random.default_rng(seed)).tobytes() for seed in range(40)]
    assert len(results) == 2
    assert results == set(drawn)


def test_boxes(rng):
    boxes = np.array([decode.random_box(200, 300, (0.2, 0.5), (0.5, 2.0), rng) for _ in range(2000)])
    top, left, height, width = boxes.T
    area, ratio = height * width / 60_000, width / height
    assert 0.195 < area.min() < 0.21
    assert 0.49 < area.max() < 0.505
    assert 0.49 < ratio.min() < 0.52
    assert 1.93 < ratio.max() < 2.02
    assert (top >= 0).all()
    assert (top + height <= 200).all()
    assert (top + height == 200).any()
    assert (left >= 0).all()
    assert (left + width <= 300).all()
    assert top.min() == left.min() == 0


@pytest.mark.parametrize(("shape", "box"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10)),
                                            ((1, 1), (0, 0, 1, 1))])
def test_box_where_none_fits(shape, box, rng):
    assert decode.random_box(*shape, (1.0, 1.0), (3 / 4, 4 / 3), rng) == box


def test_eval_crop_by_hand():
    """Columns of an image of 300×100 that is squeezed to 96 a side; 'center' sees the middle square."""
    columns = np.broadcast_to(np.arange(300, dtype=np.float32)[None, :, None] * (255 / 299), (100, 300, 3))
    data = images.encoded(Image.fromarray(np.rint(columns).astype(np.uint8)), "PNG")
    squash = decode.EvalCrop(96, 3, 1.0, "squash")(data)[48, :, 0].astype(float)
    np.testing.assert_allclose(squash, (np.arange(96) + 0.5) * 300 / 96 * (255 / 299) - 0.4, atol=1.5)
    center = decode.EvalCrop(96, 3, 1.0, "center")(data)[48, :, 0].astype(float)
    np.testing.assert_allclose(center, (100 + (np.arange(96) + 0.5) * 100 / 96) * (255 / 299) - 0.4, atol=1.5)
    half = decode.EvalCrop(48, 3, 0.5, "center")(data)[24, :, 0].astype(float)
    np.testing.assert_allclose(half, (125 + (np.arange(48) + 0.5) * 50 / 48) * (255 / 299) - 0.4, atol=1.5)


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("crop_scale", (0.0, 1.0), r"config.data.crop_scale=\(0.0, 1.0\): expected 0 < low <= high <= 1"),
        ("crop_scale", (0.5, 1.5), "expected 0 < low <= high <= 1"),
        ("crop_ratio", (2.0, 1.0), r"config.data.crop_ratio=\(2.0, 1.0\): expected 0 < low <= high"),
        ("interpolation", "nearest", r"interpolation='nearest': expected one of \('bilinear', 'bicubic', 'random'\)"),
        ("eval_crop", 1.5, "config.data.eval_crop=1.5: expected more than 0 and at most 1"),
        ("eval_mode", "middle", r"config.data.eval_mode='middle': expected one of \('center', 'squash'\)"),
    ],
)
def test_what_cannot_be(knob, value, message):
    config = imagenet.get_config()
    config.data[knob] = value
    with pytest.raises(ValueError, match=message):
        (decode.eval_crop if knob.startswith("eval") else decode.train_crop)(config)
