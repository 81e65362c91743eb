"""Random-access sources of labelled images: `source[i]` is {"image": uint8 (h, w, c), "label": int32}."""

import dataclasses
from typing import Any

import numpy as np
import scipy.ndimage
import sklearn.datasets
from jaxtyping import Int, UInt8

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images that fit in memory, n of them."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int[np.ndarray, "n"]

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
    return ArraySource(np.rint(images).astype(np.uint8)[..., None], data.target[chosen].astype(np.int32))


SOURCES = {"digits": digits}


def make_source(name: str, split: str, image_size: int) -> ArraySource:
    """The source `name`, one of SOURCES, one of the SPLITS. Raises ValueError for another name or split."""
    if name not in SOURCES:
        raise ValueError(f"unknown data source {name!r} (config.data.source): expected one of {sorted(SOURCES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {SPLITS}")
    return SOURCES[name](split, image_size)
