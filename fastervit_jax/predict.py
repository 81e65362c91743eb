"""Classify images: the most probable classes of each.

    python -m fastervit_jax.predict cat.jpg dog.png --checkpoint=fastervit_0_224_1k.pth.tar
    python -m fastervit_jax.predict photographs --checkpoint=runs/flowers --csv=flowers.csv

IMAGE is a file, or a folder, of which all images are taken, those in folders within it too. FILE_OR_FOLDER is all that
`from_pretrained` reads: a file of weights, a workdir of train.py (its averaged weights, where it has them), a
registered name. Images are cut and normalised as in evaluation: as the run's config.json says, in the workdir or beside
the file; without one, as the nearest registered variant's.

Images that cannot be read are named, and the others done; the exit code is then 1.
"""

import argparse
import csv
import dataclasses
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from fastervit_jax.data import augment, folders
from fastervit_jax.data.decode import EVAL_MODES, EvalCrop
from fastervit_jax.data.sources import make_source
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import get_variant
from fastervit_jax.weights import pretrained, sources
from fastervit_jax.weights.torch_file import WeightsError, replacing

LOG = logging.getLogger("fastervit_jax")
IMAGENET_NAMES = pathlib.Path(__file__).parent / "data" / "class_names" / "imagenet.txt"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of pixels from 0 to 1, red, green and blue."""


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with all that leads from image files to named classes."""

    model: FasterViT
    variables: dict[str, Any]
    crop: EvalCrop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the first one first, with their probabilities; or why there are none."""

    image: pathlib.Path
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


# What a checkpoint tells


def load(
    checkpoint: str, *, resolution: int | None = None, crop: float | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, classes: str | os.PathLike | None = None,
) -> Classifier:
    """The classifier that a checkpoint makes, see `python -m fastervit_jax.predict --help`.

    resolution: side of the images, in pixels. crop: the part of the resized image that is seen. mean, std: of pixels
    from 0 to 1, one number a channel. classes: a file with a class name a line. None: as the checkpoint tells.

    Raises FileNotFoundError if there is no such file, WeightsError if it is no FasterViT's, ValueError for values that
    do not fit it.
    """
    run = run_config(checkpoint)
    opened = sources.open_source(checkpoint, ema=pathlib.Path(checkpoint).is_dir() and run.get("ema_decay", 0) > 0)
    found, config = pretrained.infer(opened, {})
    if not config.num_classes:
        raise WeightsError(f"{checkpoint}: its model has no head (num_classes=0), so it names no classes")
    variables, _ = pretrained.load_variables(opened, config)
    data, variant = run.get("data", {}), get_variant(found.nearest)
    whole = data.get("source") == "digits"  # they are whole pictures, which evaluation does not cut
    side = resolution or data.get("image_size") or variant.resolution
    part = crop or (1.0 if whole else data.get("eval_crop") or variant.crop_pct)
    mode = "squash" if whole else data.get("eval_mode") or variant.crop_mode
    channels = config.in_chans
    colours = channels == 3
    mean = mean or data.get("mean") or (IMAGENET_MEAN if colours else None)
    std = std or data.get("std") or (IMAGENET_STD if colours else None)
    if channels not in (1, 3):
        raise ValueError(f"{checkpoint}: its model takes images of {channels} channels, files have 1 (grey) or 3 (RGB)")
    for name, values in (("mean", mean), ("std", std)):
        if values is None or len(values) != channels or not all(map(math.isfinite, values)):
            raise ValueError(f"--{name}={values}: expected {channels} number(s), one a channel; the checkpoint has no "
                             "config.json beside it that tells them")
    if side < 32 or not 0 < part <= 1 or mode not in EVAL_MODES or min(std) <= 0:
        raise ValueError(f"images of {side} pixels, crop {part}, mode {mode}, std {std}: expected at least 32 pixels, "
                         "a crop of more than 0 and at most 1, a positive std")
    names = class_names(config.num_classes, run, classes)
    cut = EvalCrop(side, channels, part, mode)
    return Classifier(FasterViT(config), variables, cut, tuple(mean), tuple(std), names)


def run_config(checkpoint: str) -> dict[str, Any]:
    """The config of the run that a checkpoint is of: config.json in the folder, or beside a file that it made."""
    path = pathlib.Path(checkpoint)
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    if not path.exists() or not config.is_file():
        return {}
    try:
        run = json.loads(config.read_text())
    except ValueError as error:
        raise WeightsError(f"{config} is damaged: {error}") from error
    made = path.is_dir() or path.name == "best.safetensors"
    return run if made and isinstance(run, dict) and isinstance(run.get("data"), dict) else {}


def class_names(num_classes: int, run: dict[str, Any], file: str | os.PathLike | None = None) -> tuple[str, ...]:
    """A name for each class: from `file`, or of the dataset of the run with this config; else numbers.

    Raises ValueError if the file has another number of lines, OSError if it cannot be read.
    """
    if file is not None:
        names = pathlib.Path(file).read_text().splitlines()
        if len(names) != num_classes:
            raise ValueError(f"--classes={file}: {len(names)} lines, but the model has {num_classes} classes")
        return tuple(names)
    data = run.get("data", {})
    source = data.get("source")
    names: tuple[str, ...] = ()
    if source == "digits":
        names = tuple("0123456789")
    elif (source is None and num_classes == 1000) or (source or "").startswith("imagenet"):
        names = tuple(line.partition(" ")[2] for line in IMAGENET_NAMES.read_text().splitlines())
    elif source is not None:
        try:
            names = make_source(ConfigDict(run), data["train_split"]).class_names
        except (ValueError, OSError) as error:
            LOG.warning("classes are numbers, since the run's dataset cannot be read (--classes names them): %s", error)
    if names and len(names) != num_classes:
        LOG.warning("classes are numbers: %s has %d classes, the model %d", source, len(names), num_classes)
    return names if len(names) == num_classes else tuple(map(str, range(num_classes)))


# Images


def find_images(arguments: Sequence[str | os.PathLike]) -> list[pathlib.Path]:
    """The files that are named, and the images in folders that are, sorted.

    Raises FileNotFoundError for what is not there, ValueError for a folder without images.
    """
    images = []
    for path in map(pathlib.Path, arguments):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().endswith(folders.ENDINGS)
                            and not p.name.startswith("."))
            if not inside:
                raise ValueError(f"no image in {path}; files that end in {' '.join(folders.ENDINGS)} count")
            images += inside
        elif path.exists():
            images.append(path)
        else:
            raise FileNotFoundError(f"no file or folder {os.fspath(path)!r}; expected images, or a folder of images")
    return images


def predict(classifier: Classifier, images: Sequence[pathlib.Path], *, top: int = 5, batch: int = 32
            ) -> Iterator[Prediction]:
    """The `top` most probable classes of each image, in order; the model compiles once, for `batch` images."""
    c = classifier
    top = min(top, c.model.config.num_classes)
    size = min(batch, len(images))

    @jax.jit
    def classify(variables: dict[str, Any], pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = c.model.apply(variables, augment.normalise(pixels, c.mean, c.std))
        probabilities, classes = jax.lax.top_k(jax.nn.softmax(logits), top)
        return probabilities, classes

    def read(path: pathlib.Path) -> np.ndarray | str:
        try:
            return c.crop(path.read_bytes())
        except Exception as error:  # decoders raise what they like on damaged bytes; it is told, with the image
            return f"{type(error).__name__}: {error}"

    variables = jax.device_put(c.variables)
    waiting: Callable[[], list[Prediction]] = list
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, len(images), size):
            paths = images[start : start + size]
            results = list(threads.map(read, paths))
            pixels = np.zeros((size, c.crop.size, c.crop.size, c.crop.channels), np.uint8)
            for row, result in zip(pixels, results, strict=False):
                if not isinstance(result, str):
                    row[:] = result
            on_its_way = classify(variables, pixels)
            yield from waiting()  # the batch before, while this one is computed

            def waiting(paths=paths, results=results, on_its_way=on_its_way) -> list[Prediction]:
                probabilities, classes = jax.device_get(on_its_way)
                return [Prediction(path, error=result) if isinstance(result, str) else
                        Prediction(path, tuple(map(int, classes[i])), tuple(map(float, probabilities[i])))
                        for i, (path, result) in enumerate(zip(paths, results, strict=True))]

        yield from waiting()


# Results


def text(prediction: Prediction, names: Sequence[str]) -> str:
    """A line for the image, and one for each class."""
    lines = [f"{100 * p:7.2f} %  {names[k]}" for k, p in
             zip(prediction.classes, prediction.probabilities, strict=True)]
    return "\n".join([str(prediction.image), *lines])


def write_csv(path: pathlib.Path, predictions: Sequence[Prediction], names: Sequence[str]) -> None:
    """A line for each class of each image: image, rank from 1, class, name, probability."""
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "rank", "class", "name", "probability"))
        for p in predictions:
            for rank, (k, probability) in enumerate(zip(p.classes, p.probabilities, strict=True), 1):
                writer.writerow((p.image, rank, k, names[k], f"{probability:.6g}"))


def write_json(path: pathlib.Path, predictions: Sequence[Prediction], names: Sequence[str]) -> None:
    """A list with an object for each image: image and top, or image and error."""
    entries = [
        {"image": str(p.image), "error": p.error} if p.error is not None else
        {"image": str(p.image), "top": [{"class": k, "name": names[k], "probability": probability}
                                        for k, probability in zip(p.classes, p.probabilities, strict=True)]}
        for p in predictions]
    with replacing(path) as partial:
        partial.write_text(json.dumps(entries, indent=2) + "\n")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastervit_jax.predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("--checkpoint", required=True, metavar="FILE_OR_FOLDER")
    parser.add_argument("--top", type=_count, default=5, help="classes an image; default: 5")
    parser.add_argument("--batch", type=_count, default=32, help="images at a time; default: 32")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="write a table there, and print nothing")
    output.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write JSON there, and print nothing")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line; default: those of the "
                        "run's dataset, ImageNet's for 1,000 classes without a run, or numbers")
    told = parser.add_argument_group("what a file without a run does not tell")
    told.add_argument("--resolution", type=_count, metavar="PIXELS", help="side of the images")
    told.add_argument("--crop", type=float, metavar="PART", help="of the resized image's side that is seen")
    told.add_argument("--mean", type=_numbers, metavar="R,G,B", help="of pixels from 0 to 1")
    told.add_argument("--std", type=_numbers, metavar="R,G,B", help="of pixels from 0 to 1")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    file = args.csv or args.json
    try:
        if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
            raise ValueError(f"{file}: expected the name of a file in a folder that exists")
        images = find_images(args.images)
        classifier = load(args.checkpoint, resolution=args.resolution, crop=args.crop, mean=args.mean, std=args.std,
                          classes=args.classes)
        done, bad = [], 0
        for prediction in predict(classifier, images, top=args.top, batch=args.batch):
            if prediction.error is not None:
                bad += 1
                print(f"cannot read {prediction.image}: {prediction.error}", file=sys.stderr)
            elif file is None:
                print(text(prediction, classifier.class_names), flush=True)
            if file is not None:
                done.append(prediction)
        if file is not None:
            (write_csv if args.csv else write_json)(file, done, classifier.class_names)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if bad:
        sys.exit(f"{bad} of {len(images)} images could not be read")


if __name__ == "__main__":
    main()
