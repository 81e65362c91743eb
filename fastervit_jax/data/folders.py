"""Folders of image files, one folder a class: DIR/train/CLASS/a.jpg, DIR/val/CLASS/b.jpg."""

import dataclasses
import os
import pathlib
import re
from typing import Any

import numpy as np
from jaxtyping import Int

from fastervit_jax.data import splits

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
"""Of the files that count as images, in small or capital letters."""

OTHER_NAMES = {"validation": "val"}
"""Folders' names for splits; a split's own name will do, too."""


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Image files; `open_split` makes one."""

    name: str
    root: str
    files: np.ndarray
    """Paths below root, as bytes: a million of them take some 40 MB."""
    labels: Int[np.ndarray, "n"]
    class_names: tuple[str, ...]
    classes: tuple[int, ...] | None = None
    multi_label: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """{"image": the file's bytes, "label": int32}. Raises IndexError, and OSError for a file that is gone."""
        return {"image": pathlib.Path(self.record_name(index)).read_bytes(), "label": self.labels[index]}

    def record_name(self, index: Any) -> str:
        """The path of the file."""
        return os.path.join(self.root, os.fsdecode(self.files[index]))


def open_split(split: str, root: str) -> FolderSource:
    """The split of the images in `root`. Classes are the folders of train, in the order of their sorted names.

    A class's files may lie in folders within its own, but links to folders are not followed; names that start with a
    dot do not count, other files neither. The split of the folder val is `validation`, or `val`.
    Raises ValueError if the split, its classes or its images are not there, or if a class is not one of train's.
    """
    for name, folder in OTHER_NAMES.items():
        split = re.sub(rf"\b{folder}\b", name, split)
    folders = split_folders(root)
    if "train" not in folders:
        raise ValueError(f"{root} has no folder train, whose folders are the classes; it has {_listing(folders)}")
    classes = _subfolders(folders["train"])
    if not classes:
        raise ValueError(f"{folders['train']} has no folders; expected one a class")
    # Listing a million files takes seconds: only those of splits that the string can mean.
    files = {name: _files(folder, classes) if name in split or split == "all" else {}
             for name, folder in folders.items()}
    lengths = {name: [sum(map(len, found.values()))] for name, found in files.items()}
    intervals = splits.intervals(split, lengths, root)
    paths, labels = [], []
    for name, start, stop in intervals:
        groups = files[name].values()
        counts = [len(group) for group in groups]
        paths.append(np.concatenate([np.array(group) for group in groups])[start:stop])
        labels.append(np.repeat([classes.index(label) for label in files[name]], counts)[start:stop])
    return FolderSource(f"{root} {split}", root, np.concatenate(paths), np.concatenate(labels).astype(np.int32),
                        tuple(classes))


def split_folders(root: str) -> dict[str, pathlib.Path]:
    """The folder of each split. Raises ValueError if there is none, or two for one split."""
    if not pathlib.Path(root).is_dir():
        raise ValueError(f"no folder {root!r} (config.data.dir); expected one that holds train/CLASS/IMAGE and "
                         "val/CLASS/IMAGE")
    folders = {name: pathlib.Path(root, name) for name in _subfolders(root)}
    for split, other in OTHER_NAMES.items():
        if split in folders and other in folders:
            raise ValueError(f"{root} has both {other} and {split}; expected one of the two")
        if other in folders:
            folders[split] = folders.pop(other)
    if not folders:
        raise ValueError(f"{root} has no folders; expected train/CLASS/IMAGE and val/CLASS/IMAGE")
    return folders


def _listing(folders: dict[str, pathlib.Path]) -> str:
    return ", ".join(sorted(path.name for path in folders.values()))


def _subfolders(folder: str | pathlib.Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: pathlib.Path, classes: list[str]) -> dict[str, list[bytes]]:
    """For each class folder in `folder`, its images: sorted paths from the root."""
    present = _subfolders(folder)
    unknown = sorted(set(present) - set(classes))
    if unknown:
        raise ValueError(f"{folder} has {len(unknown)} classes that train has not: {', '.join(unknown[:5])}"
                         f"{' ...' if len(unknown) > 5 else ''}")
    found, empty = {}, []
    for name in present:
        images, others = [], 0
        for path, directories, files in os.walk(folder / name):
            directories[:] = [directory for directory in directories if not directory.startswith(".")]
            below = os.path.relpath(path, folder.parent)
            for file in files:
                if file.lower().endswith(ENDINGS) and not file.startswith("."):
                    images.append(os.fsencode(os.path.join(below, file)))
                else:
                    others += 1
        found[name] = sorted(images)
        if not images:
            empty.append(f"{folder / name} ({others} other files)")
    if empty:
        raise ValueError(f"no image in {', '.join(empty[:5])}{' ...' if len(empty) > 5 else ''}; files that end in "
                         f"{' '.join(ENDINGS)} count")
    if not present:
        raise ValueError(f"no image in {folder}; expected a folder a class in it")
    return found
