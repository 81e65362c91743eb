"""Random-access sources of labelled images: `source[i]` is {"image": ..., "label": ...}.

An image is the bytes of an encoded file, or uint8 (h, w, c). A label is an int32, or bool (num_classes,) where an image
has several. A source holds names, or small arrays, and travels to other processes; none of them imports TensorFlow.
"""

import dataclasses
import os
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.ndimage
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from fastervit_jax.data import cues, folders, records, splits

SPLITS = ("train", "validation")
"""Of the digits, and of most datasets that are trained on."""


@runtime_checkable
class Source(Protocol):
    """Images with labels.

    name: dataset and split, for messages. num_classes: labels lie below it. classes: the labels that can occur, where
    the dataset has a part of the num_classes; None: all. class_names: one for each label. multi_label: labels are
    bool (num_classes,).
    """

    name: str
    num_classes: int
    multi_label: bool
    classes: tuple[int, ...] | None
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> dict[str, Any]: ...

    def record_name(self, index: Any) -> str:
        """What to call an image in a message: its file, or its dataset, split and number."""


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images that fit in memory, n of them, with labels from 0 to num_classes - 1."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"]
    num_classes: int
    name: str = "arrays"
    class_names: tuple[str, ...] = ()
    classes: tuple[int, ...] | None = None
    multi_label: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray | np.integer]:
        return {"image": self.images[index], "label": self.labels[index]}

    def record_name(self, index: Any) -> str:
        return f"{self.name}, image {index}"


def digits(split: str, image_size: int, channels: int = 1) -> ArraySource:
    """The 1,797 handwritten digits that come with scikit-learn, 8×8 grey scans, enlarged to image_size. The
    channels are all the same.

    Of each class every fifth scan, in the order of the file, is for validation: 1,442 train, 355 validate. Raises
    ValueError for another split, see `splits.intervals`.
    """
    import sklearn.datasets  # here, as it takes a third of the time of all imports

    data = sklearn.datasets.load_digits()
    validation = np.zeros(len(data.target), bool)
    for digit in range(10):
        validation[np.flatnonzero(data.target == digit)[4::5]] = True
    positions = {"train": np.flatnonzero(~validation), "validation": np.flatnonzero(validation)}
    found = splits.intervals(split, {name: [len(x)] for name, x in positions.items()}, "digits")
    chosen = np.concatenate([positions[name][start:stop] for name, start, stop in found])
    zoom = image_size / 8
    images = scipy.ndimage.zoom(data.images[chosen] * (255 / 16), (1, zoom, zoom), order=1, mode="nearest",
                                grid_mode=True)
    images = np.repeat(np.rint(images).astype(np.uint8)[..., None], channels, axis=-1)
    return ArraySource(images, data.target[chosen].astype(np.int32), 10, f"digits {split}", tuple("0123456789"))


def make_source(config: ConfigDict, split: str, name: str | None = None) -> Source:
    """The split of the dataset `name`, by default config.data.source.

    name: "digits"; "cues", a synthetic task (see cues.py); "folder", the image files in config.data.dir (see
    folders.py); otherwise a dataset of TensorFlow Datasets that has been prepared as ArrayRecord in config.data.dir, or
    in TFDS's default folder if that is "" (see records.py): imagenet2012, imagenet_v2/matched-frequency:3.0.0,
    imagenet_a, your own.
    split: "train", "validation[:10%]", "train[1000:2000]+test", see splits.py.

    Raises ValueError, with what was expected, for a dataset or split that is not there or is damaged, or if the model's
    channels and classes are not the source's; OSError if the system allows too few open files.
    """
    name = name or config.data.source
    if config.model.in_chans not in (1, 3):
        raise ValueError(f"config.model.in_chans={config.model.in_chans}: images of {name} have 1 channel (grey) or 3 "
                         "(RGB); give --config.model.in_chans=3")
    if name == "digits":
        source = digits(split, config.data.image_size, config.model.in_chans)
    elif name == "cues":
        source = cues.open_split(split, config.data.image_size, config.model.in_chans)
    elif name == "folder":
        source = folders.open_split(split, _folder(config))
    else:
        source = records.open_split(name, split, config.data.dir)
    if config.model.num_classes != source.num_classes:
        raise ValueError(f"config.model.num_classes={config.model.num_classes}: {name} has {source.num_classes}; give "
                         f"--config.model.num_classes={source.num_classes}")
    return source


def image_sides(config: ConfigDict) -> tuple[int, int]:
    """Height and width of the images that a run trains on."""
    size = config.data.image_size
    return (cues.HEIGHT if config.data.source == "cues" else size), size


def default_eval_split(name: str, config: ConfigDict) -> str:
    """The split of the dataset `name` to evaluate on.

    config.data.eval_split for the dataset that is trained on; else validation, or test, or the only one that there is.
    Raises ValueError if the dataset has none of these, or is not there.
    """
    if name == config.data.source:
        return config.data.eval_split
    if name in ("digits", "cues"):
        there = list(SPLITS)
    elif name == "folder":
        there = list(folders.split_folders(_folder(config)))
    else:
        there = records.split_names(name, config.data.dir)
    for split in ("validation", "test", *(there if len(there) == 1 else ())):
        if split in there:
            return split
    raise ValueError(f"{name} has the splits {', '.join(there)}: say which one is to be evaluated, as {name}@SPLIT")


def _folder(config: ConfigDict) -> str:
    if not config.data.dir:
        raise ValueError("config.data.source='folder' needs the folder of the images: give --config.data.dir=FOLDER")
    return os.path.abspath(os.path.expanduser(config.data.dir))
