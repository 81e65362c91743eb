"""Prepare a dataset for training: TensorFlow Datasets' own builder, writing ArrayRecord files.

    python -m fastervit_jax.data.prepare imagenet2012 --manual_dir=ARCHIVES --data_dir=DATA
    python -m fastervit_jax.data.prepare imagenet_v2 --data_dir=DATA

ImageNet's archives cannot be downloaded without an account at https://image-net.org/download-images: put
ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into ARCHIVES, as they are. They are checked before the build, which
takes hours. Other datasets are downloaded by TensorFlow Datasets. TensorFlow is needed here only, not to train.
"""

import argparse
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator

from fastervit_jax.data import records

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
ARCHIVES = {"imagenet2012": (TRAIN, VALIDATION), "imagenet2012_real": (VALIDATION,)}
"""The files in manual_dir that a dataset is made from; the others are downloaded."""

CLASSES, VALIDATION_IMAGES = 1000, 50_000
BLOCK = 512  # of a tar file
NEEDED_SPACE = 1.02
"""Size of the records by that of the archives: images are kept as they are; names, labels and indices come to it."""


def prepare(name: str, manual_dir: str, data_dir: str) -> None:
    """Prepare the dataset `name`; see `python -m fastervit_jax.data.prepare --help`.

    Raises ValueError or OSError that says what is missing: archives, packages, disk space. A dataset that is there
    already is left as it is. TFDS writes into a folder whose name starts with "incomplete", and renames it at the end.
    """
    root = records.data_root(data_dir)
    name = _with_config(name)
    if records.is_there(name, data_dir):
        opened = records.open_builder(name, data_dir)
        print(f"{opened.data_dir} is there already: nothing to do.")
        _report(name, opened.data_dir, data_dir)
        return
    _tell_leftovers(name, root)
    archives = [pathlib.Path(manual_dir).expanduser().absolute() / file for file in ARCHIVES.get(_base(name), ())]
    if archives and not manual_dir:
        raise ValueError(f"{name} is made from {' and '.join(path.name for path in archives)}: give the folder that "
                         "holds them as --manual_dir=FOLDER")
    check_archives(archives)
    check_packages()
    check_space(root, sum(path.stat().st_size for path in archives))

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")  # nothing here is computed on a GPU
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=root, file_format="array_record")
    hours = ". All of ImageNet takes hours" if archives else ""
    print(f"Preparing {name} in {builder.data_dir}{hours}.", flush=True)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(
            manual_dir=os.path.abspath(os.path.expanduser(manual_dir)) if manual_dir else None,
            try_download_gcs=False))
    _report(name, builder.data_dir, data_dir)


def check_archives(paths: list[pathlib.Path]) -> None:
    """Walk the headers of ImageNet's archives, and seek over what is between them.

    Raises ValueError that tells for each archive what is wrong: not there, empty, no tar file, cut off, or with members
    that the builder would stop at or give a wrong label. Prints a sentence where it holds only a part of ImageNet.
    """
    problems, notes = [], []
    for path in paths:
        try:
            notes.append(_check_train(path) if path.name == TRAIN else _check_validation(path))
        except ValueError as error:
            problems.append(f"{path} {error}")
    if problems:
        raise ValueError("\n".join(["the archives cannot be used:", *problems,
                                    "expected: the files as they come from https://image-net.org/download-images, "
                                    "not unpacked"]))
    for note in filter(None, notes):
        print(note, flush=True)


def check_packages() -> None:
    """Raise ValueError if what TFDS's builders need is not installed."""
    lacking = [name for name in ("tensorflow", "importlib_resources") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ValueError(f"preparing needs {' and '.join(lacking)} (training does not): pip install tensorflow "
                         "importlib_resources")


def check_space(root: pathlib.Path, archives: int) -> None:
    """Raise OSError if the disk that has `root` has no room for records made from archives of so many bytes."""
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    free, need = shutil.disk_usage(there).free, int(archives * NEEDED_SPACE)
    if free < need:
        raise OSError(f"{root}: {free / 1e9:,.1f} GB are free, {need / 1e9:,.1f} GB are needed, about the size of the "
                      "archives; give another folder as --data_dir")


def _check_train(path: pathlib.Path) -> str | None:
    synsets = set(class_synsets())
    found = set()
    for name, start, size, archive in _members(path):
        if not re.fullmatch(r"n\d{8}\.tar", name):
            raise ValueError(f"has a member {name!r}; expected n########.tar, one a class")
        if name[:-4] not in synsets:
            raise ValueError(f"has {name}, which is none of the 1000 classes")
        archive.seek(start)
        try:
            first = _header(archive.read(min(size, BLOCK)))
        except tarfile.HeaderError as error:
            raise ValueError(f"has {name}, which is no tar file itself ({error})") from error
        if not first.name.startswith(f"{name[:-4]}_"):
            raise ValueError(f"has {name}, whose first member is {first.name!r}; expected {name[:-4]}_*.JPEG")
        found.add(name)
    if not found:
        raise ValueError("holds nothing")
    if len(found) < CLASSES:
        return f"{path} holds {len(found)} of ImageNet's {CLASSES} classes: the dataset will be that part of it."
    return None


def _check_validation(path: pathlib.Path) -> str | None:
    names = sorted(name for name, *_ in _members(path))
    # TFDS gives the labels to the images in the order of their names, whichever images there are.
    for i, name in enumerate(names, start=1):
        expected = f"ILSVRC2012_val_{i:08}.JPEG"
        if name != expected:
            raise ValueError(f"has {name!r} where {expected} is expected: labels go by position, and would be wrong "
                             "from there on")
    if not names:
        raise ValueError("holds nothing")
    if len(names) < VALIDATION_IMAGES:
        return (f"{path} holds the first {len(names):,} of {VALIDATION_IMAGES:,} validation images: the dataset will "
                "be that part.")
    return None


def _members(path: pathlib.Path) -> Iterator[tuple[str, int, int, object]]:
    """(name, where its data start, their size, the open archive) of each member. ValueError: not a whole tar file."""
    if not path.is_file():
        raise ValueError("is not there" if not path.exists() else "is not a file")
    whole = path.stat().st_size
    if not whole:
        raise ValueError("is empty")
    with path.open("rb") as archive:
        position, name = 0, ""
        while True:
            archive.seek(position)
            try:
                header = _header(archive.read(BLOCK))
            except tarfile.HeaderError as error:
                # The end is marked by blocks of zeros, so that a cut between two members is seen, too.
                if isinstance(error, tarfile.EOFHeaderError):
                    return
                if position and position >= whole - BLOCK:
                    raise ValueError(f"is cut off after {whole:,} bytes, behind {name}: download it again") from error
                after = f" behind {name}, at byte {position:,}" if position else ""
                raise ValueError(f"is no tar file, or a damaged one{after} ({error})") from error
            name, start = header.name, position + BLOCK
            if start + header.size > whole:
                raise ValueError(f"is cut off after {whole:,} bytes, in {name}, which ends at byte "
                                 f"{start + header.size:,}: download it again")
            if header.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
                yield name, start, header.size, archive
            position = start + -(-header.size // BLOCK) * BLOCK


def _header(block: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


def class_synsets() -> list[str]:
    """The names of the 1000 classes, in the order of their labels, as TFDS has them."""
    import tensorflow_datasets as tfds

    return tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()


def _base(name: str) -> str:
    return re.split("[/:]", name)[0]


def _with_config(name: str) -> str:
    """The name with TFDS's default configuration, if the dataset has configurations and none is named."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_cls(_base(name))
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(f"TensorFlow Datasets {tfds.__version__} has no dataset {_base(name)!r}; "
                         "tfds.list_builders() names those that it has") from error
    if "/" in name or not builder.BUILDER_CONFIGS:
        return name
    return f"{_base(name)}/{builder.default_builder_config.name}{name[len(_base(name)):]}"


def _tell_leftovers(name: str, root: pathlib.Path) -> None:
    for folder in sorted((root / _base(name)).glob("**/incomplete.*")):
        if folder.is_dir():
            print(f"{folder} was left by a build that did not end: delete it, unless that build still runs.")


def _report(name: str, directory: str, data_dir: str) -> None:
    for split, length in records.check_all(directory).items():
        print(f"{split}: {length:,} images")
    command = "python train.py --config=configs/imagenet.py:faster_vit_0_224 --workdir=runs/imagenet"
    if name != "imagenet2012":
        print("To evaluate or train on it, give eval.py or train.py:")
        command = f"--config.data.source={name}"
    else:
        print("To train on it:")
    print(f"    {command}" + (f" --config.data.dir={records.data_root(data_dir)}" if data_dir else ""))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastervit_jax.data.prepare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="imagenet2012, or another of TensorFlow Datasets' names: "
                        "imagenet_v2, imagenet_v2/matched-frequency, imagenet_a, imagenet_r, imagenet2012_real")
    parser.add_argument("--manual_dir", default="", metavar="FOLDER",
                        help=f"holds {TRAIN} and {VALIDATION} (imagenet2012_real: the second)")
    parser.add_argument("--data_dir", default="", metavar="FOLDER",
                        help="where the dataset goes; by default $TFDS_DATA_DIR, or ~/tensorflow_datasets")
    args = parser.parse_args()
    try:
        prepare(args.name, args.manual_dir, args.data_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
