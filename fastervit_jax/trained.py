"""A trained model as a tool takes it: its weights, how its images are cut and normalised, the names of its classes."""

import argparse
import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from fastervit_jax.data.decode import EVAL_MODES, EvalCrop
from fastervit_jax.data.sources import make_source
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import get_variant
from fastervit_jax.weights import pretrained, sources
from fastervit_jax.weights.torch_file import WeightsError

LOG = logging.getLogger("fastervit_jax")
IMAGENET_NAMES = pathlib.Path(__file__).parent / "data" / "class_names" / "imagenet.txt"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of pixels from 0 to 1, red, green and blue."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """`name` is the checkpoint's. Images are `crop`ped, then normalised with `mean` and `std` of pixels from 0 to 1."""

    name: str
    model: FasterViT
    variables: dict[str, Any]
    crop: EvalCrop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def describe(self) -> str:
        """A line: how images come to the model."""
        mean, std = (", ".join(f"{x:g}" for x in values) for values in (self.mean, self.std))
        return (f"{self.name}: {self.crop.size} × {self.crop.size} pixels, {self.crop.crop:g} of the image "
                f"({self.crop.mode}), mean {mean}, deviation {std}")


def load(
    checkpoint: str, *, resolution: int | None = None, crop: float | None = None, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, classes: str | os.PathLike | None = None,
) -> Trained:
    """The model of a checkpoint: all that `from_pretrained` reads, and of a run that averages its averaged weights.

    resolution: side of the images, in pixels. crop: the part of the resized image that is seen. mean, std: of pixels
    from 0 to 1, one number a channel. classes: a file with a class name a line. None: as the checkpoint tells: a run's
    config.json, in the workdir or beside its best.safetensors; otherwise as the nearest registered variant has it.

    Raises FileNotFoundError if there is no such file, WeightsError if it is no FasterViT's, ValueError for values that
    do not fit it.
    """
    run = run_config(checkpoint)
    if run.get("data", {}).get("source") == "cues":
        raise ValueError(f"{checkpoint}: trained on the strips of configs/cues.py, as which image files cannot be cut; "
                         "use fastervit_jax.rollout, or model.apply, in Python")
    opened = sources.open_source(checkpoint, ema=has_averages(checkpoint, run))
    found, config = pretrained.infer(opened, {})
    if not config.num_classes:
        raise WeightsError(f"{checkpoint}: its model has no head (num_classes=0), and so no classes")
    variables, _ = pretrained.load_variables(opened, config)
    data, variant = run.get("data", {}), get_variant(found.nearest)
    whole = data.get("source") == "digits"  # they are whole pictures, which evaluation does not cut
    told = (resolution, data.get("image_size"), found.side, opened.side, variant.resolution)
    side = next(side for side in told if side is not None)
    part = crop if crop is not None else 1.0 if whole else data.get("eval_crop", variant.crop_pct)
    mode = "squash" if whole else data.get("eval_mode") or variant.crop_mode
    channels = config.in_chans
    colours = channels == 3
    mean = mean if mean is not None else data.get("mean", IMAGENET_MEAN if colours else None)
    std = std if std is not None else data.get("std", IMAGENET_STD if colours else None)
    if channels not in (1, 3):
        raise ValueError(f"{checkpoint}: its model takes images of {channels} channels, files have 1 (grey) or 3 (RGB)")
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            raise ValueError(f"{checkpoint} has no config.json beside it that tells how grey images are normalised: "
                             f"give --{name}, one number from 0 to 1")
        if len(values) != channels or not all(map(math.isfinite, values)):
            raise ValueError(f"--{name}={values}: expected {channels} finite number(s), one a channel")
    if side < 32 or not 0 < part <= 1 or mode not in EVAL_MODES or min(std) <= 0:
        raise ValueError(f"images of {side} pixels, crop {part}, mode {mode}, std {std}: expected at least 32 pixels, "
                         "a crop of more than 0 and at most 1, a positive std")
    names = class_names(config.num_classes, run, classes)
    cut = EvalCrop(side, channels, part, mode)
    return Trained(checkpoint, FasterViT(config), variables, cut, tuple(mean), tuple(std), names)


def has_averages(checkpoint: str, run: dict[str, Any]) -> bool:
    """Whether it is the workdir of a run that averages its weights."""
    return pathlib.Path(checkpoint).is_dir() and run.get("ema_decay", 0) > 0


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
        except (ValueError, OSError, ImportError, LookupError, AttributeError) as error:  # an older config, a lack
            LOG.warning("classes are numbers, since the run's dataset cannot be read (--classes names them): %s", error)
    if names and len(names) != num_classes:
        LOG.warning("classes are numbers: %s has %d classes, the model %d", source, len(names), num_classes)
    return names if len(names) == num_classes else tuple(map(str, range(num_classes)))


def read_image(path: pathlib.Path, crop: EvalCrop) -> UInt8[np.ndarray, "size size c"]:
    """The pixels that evaluation would see. Raises OSError if there is no file, ValueError if it is no whole image."""
    data = path.read_bytes()
    try:
        return crop(data)
    except Exception as error:  # decoders raise what they like on damaged bytes
        raise ValueError(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, and what a file without a run does not tell; `given` are `load`'s keywords for them."""
    parser.add_argument("--checkpoint", required=True, metavar="FILE_OR_FOLDER",
                        help="weights: a workdir of train.py, a file, a registered name")
    told = parser.add_argument_group("what a file without a run does not tell")
    told.add_argument("--resolution", type=int, metavar="PIXELS", help="side of the images")
    told.add_argument("--crop", type=float, metavar="PART", help="of the resized image's side that is seen")
    told.add_argument("--mean", type=_numbers, metavar="R,G,B", help="of pixels from 0 to 1")
    told.add_argument("--std", type=_numbers, metavar="R,G,B", help="of pixels from 0 to 1")


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Of what `add_arguments` added, the keywords of `load`."""
    return {"resolution": args.resolution, "crop": args.crop, "mean": args.mean, "std": args.std}


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))
