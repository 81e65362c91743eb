"""Random-access sources of labelled images: `source[i]` is {"image": uint8 (h, w, c), "label": int32}."""

import dataclasses
from typing import Any

import numpy as np
import scipy.ndimage
import sklearn.datasets
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images that fit in memory, n of them, with labels from 0 to num_classes - 1."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"]
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


def digits(split: str, image_size: int) -> ArraySource:
    """The 1,797 handwritten digits that come with scikit-learn, 8×8 grey scans, enlarged to image_size.

    Of each class every fifth scan, in the order of the file, is for validation: 1,442 train, 355 validate.
    """
    data = sklearn.datasets.load_digits()
    validation = np.zeros(len(data.target), bool)
    for digit in range(10):
        validation[np.flatnonzero(data.target == digit)[4::5]] = True
    chosen = validation if split == "validation" else ~validation
    zoom = image_size / 8
    images = scipy.ndimage.zoom(data.images[chosen] * (255 / 16), (1, zoom, zoom), order=1, mode="nearest",
                                grid_mode=True)
    return ArraySource(np.rint(images).astype(np.uint8)[..., None], data.target[chosen].astype(np.int32), 10)


SOURCES = {"digits": digits}


def make_source(config: ConfigDict, split: str) -> ArraySource:
    """The split, one of SPLITS, of the source that config.data names, one of SOURCES.

    Raises ValueError for another name or split, or if the model's channels and classes are not the source's.
    """
    name = config.data.source
    if name not in SOURCES:
        raise ValueError(f"unknown data source {name!r} (config.data.source): expected one of {sorted(SOURCES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {SPLITS}")
    source = SOURCES[name](split, config.data.image_size)
    for knob, given, expected in (("in_chans", config.model.in_chans, source.images.shape[-1]),
                                  ("num_classes", config.model.num_classes, source.num_classes)):
        if given != expected:
            raise ValueError(f"config.model.{knob}={given}: {name} has {expected}; give "
                             f"--config.model.{knob}={expected}")
    return source
