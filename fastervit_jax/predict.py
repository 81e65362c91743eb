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
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from fastervit_jax import compilation_cache, trained
from fastervit_jax.data import augment, folders
from fastervit_jax.weights.torch_file import replacing


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, the first one first, with their probabilities; or why there are none."""

    image: pathlib.Path
    classes: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


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


def predict(classifier: trained.Trained, images: Sequence[pathlib.Path], *, top: int = 5, batch: int = 32
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
            return trained.read_image(path, c.crop)
        except (OSError, ValueError) as error:
            return str(error)

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


def _count(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastervit_jax.predict", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("--top", type=_count, default=5, help="classes an image; default: 5")
    parser.add_argument("--batch", type=_count, default=32, help="images at a time; default: 32")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--csv", type=pathlib.Path, metavar="FILE", help="write a table there, and print nothing")
    output.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write JSON there, and print nothing")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line; default: those of the "
                        "run's dataset, ImageNet's for 1,000 classes without a run, or numbers")
    trained.add_arguments(parser)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    file = args.csv or args.json
    try:
        if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
            raise ValueError(f"{file}: expected the name of a file in a folder that exists")
        images = find_images(args.images)
        classifier = trained.load(args.checkpoint, **trained.given(args), classes=args.classes)
        done, bad = [], 0
        for prediction in predict(classifier, images, top=args.top, batch=args.batch):
            if prediction.error is not None:
                bad += 1
                print(prediction.error, file=sys.stderr)
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
    compilation_cache.enable()
    main()
