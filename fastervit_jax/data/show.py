"""Pictures of what a config makes of its training images.

    python -m fastervit_jax.data.show --config=configs/imagenet.py --config.data.dir=DIR --out=pictures

OUT/train.png: the first batch as the train step sees it, each image with its label, or with both and their parts where
two are mixed. OUT/rand_augment/OP.png: each operation at rising magnitudes, down and up where it goes both ways.
"""

import contextlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict, config_flags
from PIL import Image, ImageDraw

from fastervit_jax.data import augment, loader, randaugment, sources
from fastervit_jax.train import losses, sharding

MAGNITUDES = (0.0, 2.5, 5.0, 7.5, 10.0)
TEXT = 14  # pixels for a line of text
_CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe; --config.a.b=value changes it.")
_OUT = flags.DEFINE_string("out", "pictures", "Folder for the pictures.")
_IMAGES = flags.DEFINE_integer("images", 16, "Training images to show.", lower_bound=1)


def grid(images: UInt8[np.ndarray, "n h w c"], texts: list[str], columns: int) -> Image.Image:
    """The images in rows, each with a text below it."""
    _, height, width, _ = images.shape
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + TEXT + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (pixels, text) in enumerate(zip(images, texts, strict=True)):
        left, top = i % columns * (width + 4), i // columns * (height + TEXT + 4)
        sheet.paste(Image.fromarray(np.broadcast_to(pixels, (height, width, 3)).copy()), (left, top))
        while text and draw.textlength(text) > width:
            text = text[:-1]
        draw.text((left, top + height), text, fill="black")
    return sheet


def to_pixels(
    images: Float[np.ndarray, "n h w c"], mean: tuple[float, ...], std: tuple[float, ...]
) -> UInt8[np.ndarray, "n h w c"]:
    """Normalised images back to 0..255."""
    return np.rint((np.asarray(images) * std + mean) * 255).clip(0, 255).astype(np.uint8)


def show_train(config: ConfigDict, source: sources.Source, out: pathlib.Path) -> UInt8[np.ndarray, "n h w c"]:
    """Writes OUT/train.png; gives the images as they came from the host."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    feed = loader.train_batches(source, config, first_step=0, last_step=1, sharding=sharding.over_batch(mesh))
    with contextlib.closing(feed):
        batch, _ = next(feed)
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))  # as in the step
    targets = losses.smooth_one_hot(batch["label"], source.num_classes, 0.0)
    images, targets, _ = jax.jit(lambda *args: augment.train_images(
        *args, config.augment, config.data.mean, config.data.std, mesh))(key, batch["image"], targets, batch["weight"])
    texts = []
    for target in np.asarray(targets):
        found = [int(label) for label in np.argsort(-target)[:2] if target[label] > 0]
        names = [source.class_names[label].partition(",")[0] for label in found]
        texts.append(names[0] if len(names) == 1 else " + ".join(
            f"{name} {target[label]:.2f}" for name, label in zip(names, found, strict=True)))
    grid(to_pixels(images, config.data.mean, config.data.std), texts, columns=8).save(out / "train.png")
    return np.asarray(batch["image"])


def show_operations(images: UInt8[np.ndarray, "n h w c"], mean: tuple[float, ...], out: pathlib.Path) -> None:
    """Writes OUT/rand_augment/OP.png: a row an image and direction, a column a magnitude."""
    (out / "rand_augment").mkdir(exist_ok=True)
    fill = jnp.asarray(augment.fill_colour(mean))
    apply = jax.jit(randaugment.apply)
    for number, name in enumerate(randaugment.OPS):
        cases = [(image, magnitude, sign) for image in images for sign in (-1, 1) for magnitude in MAGNITUDES]
        batch, magnitudes, signs = (np.stack(x) for x in zip(*cases, strict=True))
        changed = apply(jnp.asarray(batch), jnp.full(len(batch), number), jnp.float32(magnitudes), jnp.float32(signs),
                        fill)
        texts = [f"{name} {'-' if sign < 0 else '+'}{magnitude:g}" for _, magnitude, sign in cases]
        grid(np.asarray(changed), texts, len(MAGNITUDES)).save(out / "rand_augment" / f"{name}.png")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: settings are given as --config.a.b=value")
    config, out = _CONFIG.value, pathlib.Path(_OUT.value)
    with config.unlocked():
        config.batch_size = _IMAGES.value
        config.augment.mix_group = _IMAGES.value
    loader.check(config)
    source = sources.make_source(config, config.data.train_split)
    out.mkdir(parents=True, exist_ok=True)
    images = show_train(config, source, out)
    print(out / "train.png")
    if images.shape[-1] == 3:
        show_operations(images[:2], config.data.mean, out)
        print(out / "rand_augment")
    else:
        print(f"no pictures of RandAugment: it needs images of 3 channels, these have {images.shape[-1]}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    flags.FLAGS.verbosity = logging.WARNING
    app.run(main)
