"""Augmentation, mixing and normalisation on the devices, inside the jitted step.

Axes: b batch, h and w height and width, c channels, k classes.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt8
from ml_collections import ConfigDict

from fastervit_jax.data import randaugment

ERASE_ATTEMPTS = 10  # boxes that are drawn until one fits in the image
ERASE_PIXELS = 2**20  # images with so many pixels together are erased at a time


def check(config: ConfigDict, channels: int) -> None:
    """Raises ValueError for knobs of `augment` that cannot be, or cannot be with images of so many channels."""
    for name in ("flip", "rand_augment_prob", "erase_prob"):
        if not 0 <= config[name] <= 1:
            raise ValueError(f"config.augment.{name}={config[name]}: expected a probability, 0 to 1")
    for name, highest in (("zoom", 0.9), ("shift", 1), ("color_jitter", 1), ("rand_augment_ops", 20),
                          ("rand_augment_magnitude", 10), ("rand_augment_std", 10)):
        if not 0 <= config[name] <= highest:
            raise ValueError(f"config.augment.{name}={config[name]}: expected 0 to {highest}")
    if channels != 3 and (config.color_jitter > 0 or config.rand_augment_ops > 0):
        raise ValueError(
            f"images have {channels} channels, but RandAugment and colour jitter need 3: set "
            f"config.augment.rand_augment_ops (now {config.rand_augment_ops}) and config.augment.color_jitter (now "
            f"{config.color_jitter}) to 0")
    if config.erase_mode not in ("pixel", "const"):
        raise ValueError(f"config.augment.erase_mode={config.erase_mode!r}: expected 'pixel' or 'const'")
    for name, highest in (("erase_area", 1), ("erase_aspect", 100)):
        low, high = config[name]
        if not 0 < low <= high <= highest:
            raise ValueError(f"config.augment.{name}={config[name]}: expected 0 < low <= high <= {highest}")


def check_mix(config: ConfigDict, batch: int) -> None:
    """Raises ValueError for knobs of `mix` that cannot be, or cannot be with batches of so many images."""
    for name in ("mix_prob", "cutmix_switch"):
        if not 0 <= config[name] <= 1:
            raise ValueError(f"config.augment.{name}={config[name]}: expected a probability, 0 to 1")
    for name in ("mixup", "cutmix"):
        if not 0 <= config[name] <= 100:
            raise ValueError(f"config.augment.{name}={config[name]}: expected the alpha of a Beta distribution, more "
                             "than 0, or 0 for none")
    if config.mix_group < 1 or batch % config.mix_group:
        raise ValueError(f"config.augment.mix_group={config.mix_group}: expected a divisor of the batch of {batch} "
                         "images")
    if config.mix_group == 1 and config.mixup + config.cutmix > 0:
        raise ValueError("config.augment.mix_group=1: an image alone cannot be mixed; expected 2 or more, or 0 for "
                         "config.augment.mixup and config.augment.cutmix")


def train_images(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w c"],
    targets: Float[Array, "b k"],
    weights: Float[Array, "b"],
    config: ConfigDict,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh: Mesh,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"], Float[Array, "b"]]:
    """What a training step sees: `augment`, then `mix`, then `erase`, in timm's order. A mixed image is erased once."""
    augment_key, mix_key, erase_key = jax.random.split(key, 3)
    images = augment(augment_key, images, config, mean, std, mesh)
    images, targets, weights = mix(mix_key, images, targets, weights, config)
    return erase(erase_key, images, config, mesh), targets, weights


def augment(
    key: Key[Array, ""],
    images: UInt8[Array, "b h w c"],
    config: ConfigDict,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh: Mesh,
) -> Float[Array, "b h w c"]:
    """Flip, zoom and shift, change colours, RandAugment and normalise, each as the config says.

    Each device works on its part of the batch and on nothing else. An image's randomness comes from `key` and its
    place in the whole batch, so that the result is the same on any number of devices.

    Args:
        key: one for each step.
        images: 0..255, split over all axes of the mesh.
        config: `flip`, `zoom`, `shift`, `color_jitter` and `rand_augment_*`, as in configs/common.py; what is 0 there
            is not done, and costs nothing.
        mean, std: of each channel, for pixels 0..1.
        mesh: from `fastervit_jax.train.sharding.make_mesh`.

    Returns:
        Float32, normalised.

    Raises:
        ValueError: for a config that cannot be, see `check`.
    """
    check(config, images.shape[-1])
    return _on_each_device(lambda keys, images: _augment(keys, images, config, mean, std), key, images, mesh)


def erase(
    key: Key[Array, ""], images: Float[Array, "b h w c"], config: ConfigDict, mesh: Mesh
) -> Float[Array, "b h w c"]:
    """`random_erase` as the config's `erase_*` say, on each device for its part of the batch, as in `augment`."""
    if config.erase_prob == 0:
        return images
    return _on_each_device(
        lambda keys, images: random_erase(
            keys, images, config.erase_prob, config.erase_mode, config.erase_area, config.erase_aspect),
        key, images, mesh)


def _on_each_device(
    function: Callable[..., Array], key: Key[Array, ""], images: Shaped[Array, "b h w c"], mesh: Mesh
) -> Shaped[Array, "b h w c"]:
    """function(keys, images) on each device's part of the batch, with a key an image by its place in the batch."""

    def on_one_device(key, images):
        first = jax.lax.axis_index(mesh.axis_names) * len(images)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(images)))
        return function(keys, images)

    over_batch = PartitionSpec(mesh.axis_names)
    return jax.shard_map(on_one_device, mesh=mesh, in_specs=(PartitionSpec(), over_batch), out_specs=over_batch)(
        key, images)


def fill_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
    """The mean colour in 0..255: what geometric operations show beyond an image's edges."""
    return tuple(min(255, round(255 * x)) for x in mean)


def _augment(
    keys: Key[Array, "b"],
    images: UInt8[Array, "b h w c"],
    config: ConfigDict,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "b h w c"]:
    # A part's keys do not depend on which other parts there are.
    flip_keys, zoom_keys, jitter_keys, rand_keys = (
        jax.vmap(jax.random.fold_in, (0, None))(keys, part) for part in range(4))
    changes_colours = config.color_jitter > 0 or config.rand_augment_ops > 0

    if config.flip > 0:
        images = random_flip(flip_keys, images, config.flip)
    if config.zoom > 0 or config.shift > 0:
        zoom_one = lambda key, image: random_zoom_shift(key, image[None], config.zoom, config.shift)[0]  # noqa: E731
        images = jax.vmap(zoom_one)(zoom_keys, images)
        if changes_colours:
            images = jnp.clip(jnp.round(images), 0, 255).astype(jnp.uint8)
    if config.color_jitter > 0:
        images = random_color_jitter(jitter_keys, images, config.color_jitter)
    if config.rand_augment_ops > 0:
        images = randaugment.rand_augment(
            rand_keys, images, config.rand_augment_ops, config.rand_augment_prob, config.rand_augment_magnitude,
            config.rand_augment_std, fill_colour(mean))
    return normalise(images, mean, std)


def normalise(
    images: Float[Array, "b h w c"] | UInt8[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """Pixels 0..255 to (pixel / 255 - mean) / std, float32, for each channel."""
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def random_flip(
    keys: Key[Array, "b"], images: UInt8[Array, "b h w c"], prob: float
) -> UInt8[Array, "b h w c"]:
    """Mirror each image left to right with probability `prob`."""
    flipped = jax.vmap(jax.random.uniform)(keys) < prob
    return jnp.where(flipped[:, None, None, None], images[:, :, ::-1], images)


def random_zoom_shift(
    key: Key[Array, ""], images: UInt8[Array, "b h w c"], zoom: float, shift: float
) -> Float[Array, "b h w c"]:
    """Enlarge or shrink each side of each image by up to a factor 1 ± zoom and move it by up to ± shift of its side.

    Bilinear, about the centre; what comes in from outside is 0.
    """
    batch, height, width, _ = images.shape
    zoom_key, shift_key = jax.random.split(key)
    sides = jnp.array([height, width], jnp.float32)[None]
    scales = 1 + jax.random.uniform(zoom_key, (batch, 2), minval=-zoom, maxval=zoom)
    shifts = jax.random.uniform(shift_key, (batch, 2), minval=-shift, maxval=shift) * sides
    translations = sides * (1 - scales) / 2 + shifts

    def transform(image, scale, translation):
        return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, translation, "linear", antialias=False)

    return jax.vmap(transform)(images.astype(jnp.float32), scales, translations)


def random_color_jitter(
    keys: Key[Array, "b"], images: UInt8[Array, "b h w 3"], jitter: float
) -> UInt8[Array, "b h w 3"]:
    """Change brightness, contrast and saturation, in an order and by factors that `draw_color_jitter` draws.

    What each of the three does is `randaugment.enhance`, with its rounding.
    """
    ops, factors = jax.vmap(lambda key: draw_color_jitter(key, jitter))(keys)
    for i in range(ops.shape[1]):
        images = randaugment.enhance(images, ops[:, i], factors[:, i])
    return images


def draw_color_jitter(key: Key[Array, ""], jitter: float) -> tuple[Int[Array, "3"], Float[Array, "3"]]:
    """Brightness, Contrast and Color in any order, as places in `randaugment.OPS`; factors uniform in 1 ± jitter.

    Factors are at least 0.
    """
    order_key, factor_key = jax.random.split(key)
    ops = jnp.array([randaugment.OPS.index(name) for name in ("Brightness", "Contrast", "Color")])
    factors = jax.random.uniform(factor_key, (3,), minval=max(0.0, 1 - jitter), maxval=1 + jitter)
    return jax.random.permutation(order_key, ops), factors


def random_erase(
    keys: Key[Array, "b"],
    images: Float[Array, "b h w c"],
    prob: float,
    mode: str,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Float[Array, "b h w c"]:
    """Replace one box of each image with noise or 0, with probability `prob` (Zhong et al., arXiv:1708.04896).

    The box is uniform among those of its size. Its part of the image's area is uniform in `area`, its height over
    width log-uniform in `aspect`, and both are drawn again, up to ten times, until the box is smaller than the image.
    The mode `pixel` fills with N(0, 1), another number for each pixel and channel; `const` with 0.
    """
    _, height, width, channels = images.shape
    box_keys, noise_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
    erased, *box = jax.vmap(lambda key: draw_erase_box(key, height, width, prob, area, aspect))(box_keys)
    inside = _box(*box, height, width)

    def erase(places, some):
        noise = 0.0
        if mode == "pixel":
            noise = jax.vmap(lambda key: jax.random.normal(key, (height, width, channels)))(noise_keys[places])
        return jnp.where(inside[places][..., None], noise, some)

    return randaugment.rewrite_some(images, erased, erase, ERASE_PIXELS)


def draw_erase_box(
    key: Key[Array, ""], height: int, width: int, prob: float, area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[Bool[Array, ""], Int[Array, ""], Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
    """Whether to erase, and the box: its top, its left, the row below it and the column to its right, in pixels."""
    use_key, area_key, aspect_key, top_key, left_key = jax.random.split(key, 5)
    areas = jax.random.uniform(area_key, (ERASE_ATTEMPTS,), minval=area[0], maxval=area[1]) * height * width
    logs = jax.random.uniform(aspect_key, (ERASE_ATTEMPTS,), minval=math.log(aspect[0]), maxval=math.log(aspect[1]))
    heights = jnp.round(jnp.sqrt(areas * jnp.exp(logs))).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas / jnp.exp(logs))).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    erased = (jax.random.uniform(use_key) < prob) & fits[first]
    top = jax.random.randint(top_key, (), 0, height - heights[first] + 1)
    left = jax.random.randint(left_key, (), 0, width - widths[first] + 1)
    return erased, top, left, top + heights[first], left + widths[first]


def _box(
    top: Int[Array, "n"], left: Int[Array, "n"], bottom: Int[Array, "n"], right: Int[Array, "n"], height: int,
    width: int,
) -> Bool[Array, "n h w"]:
    """True for the pixels in each box."""
    rows, columns = jnp.arange(height)[None], jnp.arange(width)[None]
    in_rows = (top[:, None] <= rows) & (rows < bottom[:, None])
    in_columns = (left[:, None] <= columns) & (columns < right[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :]


def mix(
    key: Key[Array, ""],
    images: Float[Array, "b h w c"],
    targets: Float[Array, "b k"],
    weights: Float[Array, "b"],
    config: ConfigDict,
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"], Float[Array, "b"]]:
    """Mix each group of images with its own reverse: mixup (arXiv:1710.09412) or CutMix (arXiv:1905.04899).

    Each `mix_group` images that follow each other share one draw: with probability `mix_prob` they are mixed, with
    probability `cutmix_switch` (if both alphas are over 0) by CutMix, with a part λ ~ Beta(alpha, alpha) that an image
    keeps. Mixup keeps λ of each value. CutMix pastes a box of the partner, with sides √(1 - λ) of the image's, its
    centre uniform, cut off at the border; λ is then what is left of the area. Targets are mixed with the same λ.

    Args:
        key: one for each step.
        images: normalised.
        targets: a distribution over the classes for each image.
        weights: 1, or 0 for an image that does not count.
        config: `mixup`, `cutmix` (the alphas), `mix_prob`, `cutmix_switch` and `mix_group`.

    Returns:
        Images, targets and weights. A mixed image counts if its partner does, too. With both alphas 0, what was given.

    Raises:
        ValueError: if the batch is not a multiple of `mix_group`.
    """
    if not (config.mixup > 0 or config.cutmix > 0):
        return images, targets, weights
    batch, height, width, _ = images.shape
    check_mix(config, batch)
    kept_part, cut, (top, left, bottom, right) = draw_mix(key, batch // config.mix_group, height, width, config)

    def mixed(values, kept):
        values = values.reshape(len(kept), config.mix_group, *values.shape[1:])
        kept = kept.reshape(len(kept), 1, *kept.shape[1:], *[1] * (values.ndim - kept.ndim - 1))
        return (values * kept + values[:, ::-1] * (1 - kept)).reshape(batch, *values.shape[2:])

    kept_pixels = 1 - _box(top, left, bottom, right, height, width).astype(jnp.float32)
    kept_pixels = jnp.where(cut[:, None, None], kept_pixels, kept_part[:, None, None])
    pairs = weights.reshape(-1, config.mix_group)
    pairs = jnp.where(kept_part[:, None] < 1, pairs * pairs[:, ::-1], pairs)
    return mixed(images, kept_pixels), mixed(targets, kept_part), pairs.reshape(batch)


def draw_mix(
    key: Key[Array, ""], groups: int, height: int, width: int, config: ConfigDict
) -> tuple[Float[Array, "g"], Bool[Array, "g"], tuple[Int[Array, "g"], ...]]:
    """For each group: λ, corrected to the area that is left; whether it is CutMix; and the box, as in `draw_erase_box`.

    Without mixing, λ is 1 and the box empty.
    """
    use_key, switch_key, mixup_key, cutmix_key, row_key, column_key = jax.random.split(key, 6)
    if config.mixup > 0 and config.cutmix > 0:
        cut = jax.random.uniform(switch_key, (groups,)) < config.cutmix_switch
    else:
        cut = jnp.full((groups,), config.cutmix > 0)
    used = jax.random.uniform(use_key, (groups,)) < config.mix_prob

    cut_part = jnp.ones((groups,))
    if config.cutmix > 0:
        cut_part = jnp.where(used, _beta(cutmix_key, config.cutmix, groups), 1)
    box = []
    for side, centre_key in ((height, row_key), (width, column_key)):
        length = jnp.floor(side * jnp.sqrt(1 - cut_part)).astype(jnp.int32)
        start = jax.random.randint(centre_key, (groups,), 0, side) - length // 2
        box.append((jnp.clip(start, 0, side), jnp.clip(start + length, 0, side)))
    (top, bottom), (left, right) = box
    kept_part = 1 - ((bottom - top) * (right - left)).astype(jnp.float32) / (height * width)
    if config.mixup > 0:
        mixup_part = _beta(mixup_key, config.mixup, groups)
        kept_part = jnp.where(cut, kept_part, jnp.where(used, mixup_part, 1))
    return kept_part, cut, (top, left, bottom, right)


def _beta(key: Key[Array, ""], alpha: float, count: int) -> Float[Array, "count"]:
    """Draws from Beta(alpha, alpha), linear between 4097 of its quantiles.

    Rejection sampling, as in `jax.random.beta`, is a loop whose end all devices would have to agree on.
    """
    quantiles = jnp.asarray(scipy.special.betaincinv(alpha, alpha, np.linspace(0, 1, 4097)), jnp.float32)
    place = jax.random.uniform(key, (count,)) * 4096
    below = place.astype(jnp.int32)
    return quantiles[below] + (place - below) * (quantiles[below + 1] - quantiles[below])
