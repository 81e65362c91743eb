"""Augmentation and normalisation on the devices, inside the jitted step.

Axes: b batch, h and w height and width, c channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8


def normalise(
    images: Float[Array, "b h w c"] | UInt8[Array, "b h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "b h w c"]:
    """Pixels 0..255 to (pixel / 255 - mean) / std, float32, for each channel."""
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


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
