"""A synthetic task that needs long-range information: the mark at one end of a strip says how to read the other's.

The left mark is one of four, and its number is the label, unless the right one is the cue `swapped`: then it is the
number of the left one's partner (0 and 1, 2 and 3 are partners). Who sees one end at a time is right where there is no
such cue, MAJORITY of the strips; who adds up scores of the two ends can do a little better (`additive_bound`).
"""

import dataclasses
import itertools
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from fastervit_jax.data import splits

SIZES = {"train": 16_384, "validation": 2_048}
CLASSES = 4
MAJORITY = 0.7
"""Of the strips are read as they are."""
HEIGHT = 32
"""Pixels of a strip; its width is config.data.image_size."""
CELLS, CELL = 4, 4
"""Of a mark's side; pixels of a cell's."""
END = 24
"""Pixels at each end of a strip in which its mark lies, at any multiple of CELL."""


def patterns() -> Bool[np.ndarray, "6 4 4"]:
    """The four marks, then the cues `as it is` and `swapped`: as many white cells as black ones, any two patterns
    different in half of the cells or more."""
    rng, found = np.random.Generator(np.random.PCG64(0)), []
    while len(found) < CLASSES + 2:
        new = rng.permutation(CELLS**2) < CELLS**2 // 2
        if all((new != old).sum() >= CELLS**2 // 2 for old in found):
            found.append(new)
    return np.stack(found).reshape(-1, CELLS, CELLS)


def additive_bound() -> float:
    """The best accuracy of a rule that adds up a score of each end for each label, and takes the highest.

    Of two partners with either cue, by trying all signs: three of the four cases can be right, not all.
    """
    weights = {(mark, cue): 0.5 * (1 - MAJORITY if cue else MAJORITY) for mark in (0, 1) for cue in (0, 1)}
    best = 0.0
    for of_mark in itertools.product((-1.5, -0.5, 0.5, 1.5), repeat=2):
        for of_cue in itertools.product((-1, 0, 1), repeat=2):
            right = [(of_mark[mark] + of_cue[cue] > 0) == (mark != cue) for mark, cue in weights]
            best = max(best, sum(np.array(right) * list(weights.values())))
    return float(best)


@dataclasses.dataclass(frozen=True)
class Cues:
    """Strips that are drawn when they are asked for.

    marks: the patterns at the left and the right end. corners: (top, left) of each, in pixels.
    """

    marks: Int[np.ndarray, "n 2"]
    corners: Int[np.ndarray, "n 2 2"]
    width: int
    channels: int
    name: str
    num_classes: int = CLASSES
    class_names: tuple[str, ...] = tuple("0123")
    classes: tuple[int, ...] | None = None
    multi_label: bool = False

    def __len__(self) -> int:
        return len(self.marks)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        mark, cue = self.marks[index]
        return {"image": self.image(index), "label": np.int32(mark ^ (cue == CLASSES + 1))}

    def image(self, index: Any) -> UInt8[np.ndarray, "h w c"]:
        """Grey, with its marks in black and white."""
        image = np.full((HEIGHT, self.width, self.channels), 128, np.uint8)
        side = CELLS * CELL
        for (top, left), pattern in zip(self.corners[index], patterns()[self.marks[index]], strict=True):
            mark = np.kron(pattern, np.full((CELL, CELL), 255, np.uint8))
            image[top : top + side, left : left + side] = mark[..., None]
        return image

    def record_name(self, index: Any) -> str:
        return f"{self.name}, image {index}"


def open_split(split: str, image_size: int, channels: int = 1) -> Cues:
    """16,384 strips to train on, 2,048 to validate on, always the same ones, `image_size` pixels wide.

    Raises ValueError for another split (see splits.py), or a width that does not hold two ends.
    """
    if image_size < 2 * END:
        raise ValueError(f"config.data.image_size={image_size}: the strips of cues are at least {2 * END} pixels wide")
    found = splits.intervals(split, {name: [size] for name, size in SIZES.items()}, "cues")
    drawn = {name: _draw(seed, SIZES[name], image_size) for seed, name in enumerate(SIZES)}
    marks, corners = (np.concatenate([drawn[name][i][start:stop] for name, start, stop in found]) for i in (0, 1))
    return Cues(marks, corners, image_size, channels, f"cues {split}")


def _draw(seed: int, count: int, width: int) -> tuple[Int[np.ndarray, "n 2"], Int[np.ndarray, "n 2 2"]]:
    rng = np.random.Generator(np.random.PCG64([1, seed]))
    swapped = rng.permutation(count) >= round(MAJORITY * count)
    marks = np.stack([rng.integers(CLASSES, size=count), CLASSES + swapped], axis=1)
    tops = CELL * rng.integers(HEIGHT // CELL - CELLS + 1, size=(count, 2))
    lefts = CELL * rng.integers(END // CELL - CELLS + 1, size=(count, 2)) + np.array([[0, width - END]])
    return marks, np.stack([tops, lefts], axis=-1)
