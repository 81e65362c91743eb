"""RandAugment on uint8 batches on the devices: fifteen operations, of which each image draws a few.

Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space", 2020
(arXiv:1909.13719), with the operations, strengths and roundings that timm gives `rand-m9-mstd0.5-inc1` on
Pillow's images, so that a pixel has the value it has there. All geometric operations are bilinear here, where
timm can draw bicubic for some.

Most operations are one elementwise pass over the whole batch, in which each image has parameters that change
nothing but for the operation it drew. The costly ones (equalising, geometry) visit the images that drew them.

Axes: b batch, n some images of it, h and w height and width, 3 channels in red, green, blue order.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Num, UInt8

OPS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)
GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
ENHANCING = ("Color", "Contrast", "Brightness", "Sharpness")

# Images with so many pixels together are equalised, or warped, at a time: it bounds the memory of the one-hot codes.
EQUALIZE_PIXELS = 2**18
WARP_PIXELS = 2**20


def rand_augment(
    keys: Key[Array, "b"],
    images: UInt8[Array, "b h w 3"],
    ops: int,
    prob: float,
    magnitude: float,
    std: float,
    fill: tuple[int, ...],
) -> UInt8[Array, "b h w 3"]:
    """Apply `ops` operations to each image, one after the other, each drawn by `draw` from the image's own key.

    `fill` is the colour, 0..255, of what geometric operations bring in from outside.
    """
    for layer in range(ops):
        drawn = draw(jax.vmap(jax.random.fold_in, (0, None))(keys, layer), prob, magnitude, std)
        images = apply(images, *drawn, jnp.asarray(fill))
    return images


def draw(
    keys: Key[Array, "b"], prob: float, magnitude: float, std: float
) -> tuple[Int[Array, "b"], Float[Array, "b"], Float[Array, "b"]]:
    """For each key: an operation, its magnitude and its sign, as `apply` takes them.

    Each of OPS is as probable as the others; with probability 1 - prob it is replaced by len(OPS), no operation.
    The magnitude is magnitude + N(0, std), clipped to 0..10; the sign is 1 or -1, equally probable.
    """

    def draw_one(key):
        op_key, use_key, magnitude_key, sign_key = jax.random.split(key, 4)
        op = jax.random.randint(op_key, (), 0, len(OPS))
        op = jnp.where(jax.random.uniform(use_key) < prob, op, len(OPS))
        drawn = jnp.clip(magnitude + std * jax.random.normal(magnitude_key), 0, 10)
        return op, drawn, jnp.where(jax.random.bernoulli(sign_key), 1.0, -1.0)

    return jax.vmap(draw_one)(keys)


def apply(
    images: UInt8[Array, "b h w 3"],
    op: Int[Array, "b"],
    magnitude: Float[Array, "b"],
    sign: Float[Array, "b"],
    fill: Num[Array, "3"],
) -> UInt8[Array, "b h w 3"]:
    """Apply to each image the operation OPS[op] with a strength from `level`; op == len(OPS) leaves it as it is.

    Args:
        images: 0..255.
        op: the place in OPS.
        magnitude: 0 to 10.
        sign: 1 or -1: to which side the operations of GEOMETRIC and ENHANCING go.
        fill: the colour, 0..255, of what geometric operations bring in from outside.
    """
    _, height, width, _ = images.shape
    factor = level("Color", magnitude, sign)  # the same for all of ENHANCING
    enhanced, toned = enhance(images, op, factor), _change_tones(images, op, magnitude)
    out = jnp.where(_over_pixels(_is(op, *ENHANCING)), enhanced, toned)
    out = rewrite_some(out, _is(op, "Equalize"), lambda places, some: _equalize(some), EQUALIZE_PIXELS)
    matrices = _affine(op, magnitude, sign, height, width)
    return rewrite_some(
        out, _is(op, *GEOMETRIC), lambda places, some: _warp(some, matrices[places], fill), WARP_PIXELS)


def level(name: str, magnitude: Float[Array, "*b"], sign: Float[Array, "*b"]) -> Num[Array, "*b"]:
    """How strong an operation is at a magnitude 0..10, in its own unit, which grows with the magnitude.

    Rotate: degrees, counter-clockwise. Posterize: bits that stay. Solarize: the least value that is inverted.
    SolarizeAdd: what is added to values under 128. Color, Contrast, Brightness, Sharpness: the weight of the
    image, at least 0.1; the rest, which may be negative, is for the image without the property.
    ShearX, ShearY: pixels a pixel. TranslateX, TranslateY: parts of the side.

    Raises:
        ValueError: for another name; AutoContrast, Equalize and Invert have one strength.
    """
    if name == "Rotate":
        return sign * 3.0 * magnitude
    if name == "Posterize":
        return 4 - jnp.floor(magnitude * 0.4).astype(jnp.int32)
    if name == "Solarize":
        return 256 - jnp.floor(magnitude * 25.6).astype(jnp.int32)
    if name == "SolarizeAdd":
        return jnp.floor(magnitude * 11.0).astype(jnp.int32)
    if name in ENHANCING:
        return jnp.maximum(1 + sign * 0.09 * magnitude, 0.1)
    if name in ("ShearX", "ShearY"):
        return sign * 0.03 * magnitude
    if name in ("TranslateX", "TranslateY"):
        return sign * 0.045 * magnitude
    raise ValueError(f"no levels for {name!r}: expected one of OPS but for AutoContrast, Equalize and Invert")


def enhance(
    images: UInt8[Array, "b h w 3"], op: Int[Array, "b"], factor: Float[Array, "b"]
) -> UInt8[Array, "b h w 3"]:
    """Blend each image with a version of it without colour, contrast, brightness or sharpness, as OPS[op] says.

    The result is without + factor · (image - without), cut off to an integer and clipped to 0..255. That version
    is the image's grey, its mean grey, black, or a mean over 3 × 3 pixels where the centre counts five times (a
    border of one pixel stays sharp). Another op leaves an image as it is.
    """
    _, height, width, _ = images.shape
    pixels = images.astype(jnp.int32)
    grey = _grey(pixels)
    count = height * width
    mean_grey = (grey.sum((1, 2), keepdims=True) + count // 2) // count

    padded = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = 4 * pixels + sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3))
    inside = (_within(height, 1, height - 1)[:, None] & _within(width, 1, width - 1)[None, :])[None, :, :, None]
    smooth = jnp.where(inside, jax.lax.div(2 * total + 13, 26), pixels)

    without = jnp.where(_over_pixels(_is(op, "Color")), grey, 0)
    without = jnp.where(_over_pixels(_is(op, "Contrast")), mean_grey, without)
    without = jnp.where(_over_pixels(_is(op, "Sharpness")), smooth, without).astype(jnp.float32)
    factor = _over_pixels(jnp.where(_is(op, *ENHANCING), factor, 1))
    return jnp.clip(without + factor * (pixels - without), 0, 255).astype(jnp.uint8)


def rewrite_some(
    images: Num[Array, "b h w c"],
    needed: Bool[Array, "b"],
    change: Callable[[Int[Array, "n"], Num[Array, "n h w c"]], Num[Array, "n h w c"]],
    pixels: int,
) -> Num[Array, "b h w c"]:
    """Change those images for which `needed` says so, at a cost that grows with how many they are.

    `change` gets the places in the batch of a few images, about `pixels` pixels together, and these images, in a loop
    that ends once all the needed ones are done. What it makes of others, which fill up the last few, is dropped.
    """
    batch, height, width, _ = images.shape
    chunk = max(1, min(batch, pixels // (height * width)))
    positions = jnp.arange(math.ceil(batch / chunk) * chunk)
    count = needed.sum()
    places = jnp.pad(jnp.argsort(~needed, stable=True), (0, len(positions) - batch))
    places = jnp.where(positions < count, places, batch + positions)  # past the end: dropped, and none there twice

    def rewrite_chunk(state):
        start, images = state
        some = jax.lax.dynamic_slice_in_dim(places, start, chunk)
        inside = jnp.minimum(some, batch - 1)
        new = change(inside, images[inside])
        return start + chunk, images.at[some].set(new, mode="drop", unique_indices=True)

    return jax.lax.while_loop(lambda state: state[0] < count, rewrite_chunk, (jnp.int32(0), images))[1]


def _is(op: Int[Array, "b"], *names: str) -> Bool[Array, "b"]:
    return functools.reduce(jnp.logical_or, [op == OPS.index(name) for name in names])


def _over_pixels(values: Num[Array, "b"] | Bool[Array, "b"]) -> Num[Array, "b 1 1 1"] | Bool[Array, "b 1 1 1"]:
    return values[:, None, None, None]


def _within(length: int, first: int, end: int) -> Bool[Array, "length"]:
    places = jnp.arange(length)
    return (first <= places) & (places < end)


def _grey(pixels: Int[Array, "b h w 3"]) -> Int[Array, "b h w 1"]:
    """0.299 red + 0.587 green + 0.114 blue (ITU-R BT.601), rounded, in integers."""
    red, green, blue = (pixels[..., i : i + 1] for i in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16


def _change_tones(
    images: UInt8[Array, "b h w 3"], op: Int[Array, "b"], magnitude: Float[Array, "b"]
) -> UInt8[Array, "b h w 3"]:
    """Operations that look at one value at a time: Invert, Posterize, Solarize, SolarizeAdd and AutoContrast."""
    up = jnp.ones_like(magnitude)
    bits = jnp.where(_is(op, "Posterize"), level("Posterize", magnitude, up), 8)
    threshold = jnp.where(_is(op, "Solarize"), level("Solarize", magnitude, up), 256)
    threshold = jnp.where(_is(op, "Invert"), 0, threshold)
    added = jnp.where(_is(op, "SolarizeAdd"), level("SolarizeAdd", magnitude, up), 0)

    pixels = images.astype(jnp.int32)
    tones = pixels & _over_pixels((255 << (8 - bits)) & 255)
    tones = jnp.where(tones < _over_pixels(threshold), tones, 255 - tones)
    tones = jnp.where(tones < 128, jnp.minimum(tones + _over_pixels(added), 255), tones)
    return jnp.where(_over_pixels(_is(op, "AutoContrast")), _auto_contrast(pixels), tones).astype(jnp.uint8)


def _auto_contrast(pixels: Int[Array, "b h w 3"]) -> Int[Array, "b h w 3"]:
    """Stretch each channel to 0..255: 255 (pixel - low) / (high - low), cut off to an integer.

    Pillow does it in float64, where a whole number can come out a little too small; _cut_short knows where.
    """
    channels = [pixels[..., i] for i in range(3)]  # one after the other: a reduction to 3 lanes is slow on GPUs
    low = jnp.stack([x.min((1, 2)) for x in channels], axis=1)[:, None, None]
    high = jnp.stack([x.max((1, 2)) for x in channels], axis=1)[:, None, None]
    span = high - low
    cut_short = jnp.asarray(_cut_short())[low, high]

    scaled = 255 * (pixels - low)
    # Half a step away from whole numbers, a quotient of any rounding is cut off to the right integer.
    stretched = jnp.floor((scaled + 0.5) * (1 / jnp.maximum(span, 1).astype(jnp.float32))).astype(jnp.int32)
    short = (scaled == stretched * span) & ((cut_short >> jax.lax.div(stretched, 15)) & 1 == 1)
    return jnp.where(span == 0, pixels, stretched - short)


@functools.cache
def _cut_short() -> np.ndarray:
    """For each low and high, where float64 turns a whole 255 (pixel - low) / (high - low) into one less.

    (256, 256) int32: bit k says so of the whole result in 15 k .. 15 k + 14. Those of one span that come out too
    small are never nearer to each other than that.
    """
    table = np.zeros((256, 256), np.int32)
    for span in range(1, 256):
        divisor = math.gcd(255, span)
        offsets = np.arange(divisor + 1) * (span // divisor)  # of the pixels whose results are whole
        results = np.arange(divisor + 1) * (255 // divisor)
        low = np.arange(256 - span)[:, None]
        scale = 255 / span
        short = ((low + offsets[None]) * scale + -low * scale).astype(np.int32) < results[None]
        table[low[:, 0], low[:, 0] + span] = (short << (results[None] // 15)).sum(axis=1)
    return table


def _equalize(images: UInt8[Array, "n h w 3"]) -> UInt8[Array, "n h w 3"]:
    """Spread each channel's values so that their histogram is as flat as whole values allow.

    With `step` = pixels but those of the highest value present, over 255, a value becomes (pixels below it +
    step / 2) / step, all in integers; where step is 0, the channel stays.
    """
    counts = _histogram(images)
    below = jnp.cumsum(counts, axis=-1) - counts
    highest = jnp.max(jnp.where(counts > 0, jnp.arange(256)[None, None], 0), axis=-1, keepdims=True)
    step = jnp.take_along_axis(below, highest, axis=-1) // 255
    table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
    table = jnp.where(step == 0, jnp.arange(256)[None, None], table).astype(jnp.uint8)
    look_up = jax.vmap(jax.vmap(lambda row, values: row[values], (0, -1), -1))
    return look_up(table, images.astype(jnp.int32))


def _histogram(images: UInt8[Array, "n h w 3"]) -> Int[Array, "n 3 256"]:
    """How often each value occurs in each channel: a product of one-hot codes of the high and the low four bits.

    Exact: the products of one row of pixels are whole numbers up to its width, added in float32, then in int32.
    """
    sixteen = jnp.arange(16, dtype=jnp.uint8)[None, None, None, None]
    high = (images[..., None] >> 4 == sixteen).astype(jnp.bfloat16)
    low = (images[..., None] & 15 == sixteen).astype(jnp.bfloat16)
    counts = jnp.einsum("nhwci,nhwcj->nhcij", high, low, preferred_element_type=jnp.float32)
    return counts.astype(jnp.int32).sum(axis=1).reshape(-1, 3, 256)


def _affine(
    op: Int[Array, "b"], magnitude: Float[Array, "b"], sign: Float[Array, "b"], height: int, width: int
) -> Float[Array, "b 2 3"]:
    """For each image, the matrix that takes (x, y, 1) in the result, in pixels, to x and y in the image.

    Rotate turns about the middle; ShearX and ShearY leave the upper left corner where it is.
    """
    levels = {name: jnp.where(_is(op, name), level(name, magnitude, sign), 0) for name in GEOMETRIC}
    angle = jnp.deg2rad(levels["Rotate"])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x_from_y, y_from_x = levels["ShearX"] - sin, levels["ShearY"] + sin
    x_shift = levels["TranslateX"] * width + jnp.where(_is(op, "Rotate"), (width - cos * width + sin * height) / 2, 0)
    y_shift = levels["TranslateY"] * height + jnp.where(_is(op, "Rotate"), (height - sin * width - cos * height) / 2, 0)
    rows = [jnp.stack([cos, x_from_y, x_shift], axis=-1), jnp.stack([y_from_x, cos, y_shift], axis=-1)]
    return jnp.stack(rows, axis=1)


def _warp(
    images: UInt8[Array, "n h w 3"], matrices: Float[Array, "n 2 3"], fill: Num[Array, "3"]
) -> UInt8[Array, "n h w 3"]:
    """Each image at the places where `matrices` take the centres of pixels: bilinear, cut off to an integer.

    Places outside of the image get `fill`; at its border the outermost pixel counts for what is beyond.
    """
    _, height, width, _ = images.shape
    x, y = (jnp.arange(width) + 0.5)[None, None], (jnp.arange(height) + 0.5)[None, :, None]
    m = matrices[..., None, None]
    x, y = (m[:, i, 0] * x + m[:, i, 1] * y + m[:, i, 2] for i in range(2))
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    left, top = jnp.floor(x - 0.5), jnp.floor(y - 0.5)
    right_part, lower_part = (x - 0.5 - left)[..., None], (y - 0.5 - top)[..., None]

    def neighbours(down, right):
        rows = jnp.clip(top.astype(jnp.int32) + down, 0, height - 1)
        columns = jnp.clip(left.astype(jnp.int32) + right, 0, width - 1)
        get = jax.vmap(lambda image, y, x: image.at[y, x].get(mode="promise_in_bounds"))
        return get(images, rows, columns).astype(jnp.float32)

    upper = neighbours(0, 0) * (1 - right_part) + neighbours(0, 1) * right_part
    lower = neighbours(1, 0) * (1 - right_part) + neighbours(1, 1) * right_part
    values = upper * (1 - lower_part) + lower * lower_part
    values = jnp.floor(values + 1e-3)  # float32 may be a little under a whole number
    return jnp.where(outside[..., None], fill[None, None, None].astype(jnp.float32), values).astype(jnp.uint8)
