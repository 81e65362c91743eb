"""Datasets of TensorFlow Datasets in ArrayRecord files, read without TensorFlow.

A dataset lies in DIR/NAME[/CONFIG]/VERSION, as its builder leaves it: dataset_info.json, features.json and the shards.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import resource
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fastervit_jax.data import imagenet, splits

CHECKING_THREADS = 8
OTHER_FILES = 256
"""Open files that a process needs beside one a shard."""


@dataclasses.dataclass(frozen=True)
class Features:
    """The names of a dataset's image, label and file name, and what its labels mean."""

    image: str
    label: str
    file_name: str | None
    multi_label: bool
    class_names: tuple[str, ...]
    classes: tuple[int, ...] | None


@dataclasses.dataclass(frozen=True)
class RecordSource:
    """A split of a dataset; `open_split` makes one. It holds names only and opens files when it is read."""

    name: str
    directory: str
    split: str
    length: int
    features: Features

    @property
    def num_classes(self) -> int:
        return len(self.features.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.features.class_names

    @property
    def classes(self) -> tuple[int, ...] | None:
        return self.features.classes

    @property
    def multi_label(self) -> bool:
        return self.features.multi_label

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> dict[str, Any]:
        """{"image": the file's bytes, "label": int32, or bool (num_classes,) of several labels}.

        Raises IndexError, and ValueError that names the record and its file if it is damaged or has no label.
        """
        index = range(self.length)[index]
        try:
            record = self._records[index]
        except Exception as error:  # RuntimeError by ArrayRecord, DecodeError by protobuf
            raise ValueError(f"{self.record_name(index)}: cannot be read ({error})") from error
        label = np.asarray(record[self.features.label], np.int64)  # an empty list has no type of its own
        if label.size and not 0 <= label.min() <= label.max() < self.num_classes:
            raise ValueError(f"{self.record_name(index)}: its label is {label}; expected 0 to {self.num_classes - 1}")
        if self.features.multi_label:
            several = np.zeros(self.num_classes, bool)
            several[label] = True
            label = several
        else:
            label = np.int32(label)
        return {"image": record[self.features.image], "label": label}

    def record_name(self, index: Any) -> str:
        """Where the record lies, and the name of the file that it was made from, if that can be read."""
        index = range(self.length)[index]
        path, position = self._place(index)
        where = f"{self.name}, record {index}, {path} record {position}"
        try:
            file_name = self._records[index][self.features.file_name] if self.features.file_name else b""
        except Exception:  # the record is damaged; this is for a message about that
            file_name = b""
        return f"{where} ({os.fsdecode(file_name)})" if file_name else where

    def _place(self, index: int) -> tuple[str, int]:
        for shard in _instructions(open_directory(self.directory), self.split):
            if index < shard.take:
                return str(shard.filename), shard.skip + index
            index -= shard.take
        raise IndexError(index)

    @functools.cached_property
    def _records(self) -> Any:
        import tensorflow_datasets as tfds

        builder = open_directory(self.directory)
        allow_open_files(len(_instructions(builder, self.split)))
        return builder.as_data_source(self.split, decoders={self.features.image: tfds.decode.SkipDecoding()})

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def open_split(name: str, split: str, data_dir: str) -> RecordSource:
    """The split of the dataset `name`, which is NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION.

    data_dir: the folder of all datasets; "" is TFDS's default. Every shard that the split has is opened, and its first
    and last record are read. Raises ValueError if the dataset or the split is not there, is in another format, is not
    one of images with classes, or has damaged shards.
    """
    builder = open_builder(name, data_dir)
    full_name = builder.info.full_name
    lengths = {key: list(info.shard_lengths) for key, info in builder.info.splits.items()}
    found = splits.intervals(split, lengths, full_name)
    features = find_features(builder)
    check_shards(_instructions(builder, split))
    length = sum(stop - start for _, start, stop in found)
    source = RecordSource(f"{full_name} {split}", os.fspath(builder.data_dir), split, length, features)
    source[0]  # raises where labels are not known, as in ImageNet's test split
    return source


def split_names(name: str, data_dir: str) -> list[str]:
    """The splits of a dataset that hold images."""
    return [split for split, info in open_builder(name, data_dir).info.splits.items() if info.num_examples]


def check_all(directory: str) -> dict[str, int]:
    """Check every shard of the dataset in `directory`; its splits and their lengths."""
    builder = open_directory(directory)
    for split in builder.info.splits:
        check_shards(_instructions(builder, split))
    return {split: info.num_examples for split, info in builder.info.splits.items()}


def data_root(data_dir: str) -> pathlib.Path:
    """The folder of all datasets: `data_dir`, or TFDS's default if that is ""."""
    return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser().absolute()


def is_there(name: str, data_dir: str) -> bool:
    """Whether the dataset has been prepared, in whatever format."""
    try:
        _find_directory(name, data_dir)
    except ValueError:
        return False
    return True


def open_builder(name: str, data_dir: str) -> Any:
    """TFDS's builder for reading the prepared dataset `name`. Raises ValueError, see `open_split`."""
    return open_directory(os.fspath(_find_directory(name, data_dir)))


def open_directory(directory: str) -> Any:
    """TFDS's builder for reading the ArrayRecord files in `directory`."""
    import tensorflow_datasets as tfds

    info = json.loads(pathlib.Path(directory, "dataset_info.json").read_text())
    formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
    if "array_record" not in formats:
        raise ValueError(
            f"{directory} holds {' and '.join(formats)} files, which have no random access; expected array_record. "
            "This converts them (it takes as much space again):\n    pip install tensorflow apache_beam mlcroissant\n"
            f"    tfds convert_format --dataset_version_dir={directory} --out_file_format=array_record")
    builder = tfds.builder_from_directory(directory)
    # Of a dataset that was converted in place, array_record is the second format.
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def _find_directory(name: str, data_dir: str) -> pathlib.Path:
    match = re.fullmatch(r"(\w+)(?:/([^:/]+))?(?::(\d+\.\d+\.\d+))?", name)
    if not match:
        raise ValueError(f"dataset {name!r}: expected NAME, NAME/CONFIG, NAME:VERSION or NAME/CONFIG:VERSION, as in "
                         "imagenet_v2/matched-frequency:3.0.0")
    base, config, version = match.groups()
    top = data_root(data_dir) / base
    if config is None and not _versions(top):
        config = _default_config(top)
    folder = top / config if config else top
    versions = _versions(folder)
    if version is None and versions:
        return folder / max(versions, key=lambda text: [int(part) for part in text.split(".")])
    if version in versions:
        return folder / version
    if versions:
        raise ValueError(f"no version {version} of {name!r} in {folder}; there are {', '.join(sorted(versions))}")
    configs = [path.name for path in _folders(top) if _versions(path)]
    if configs:
        raise ValueError(f"dataset {name!r} in {top}: expected one of {', '.join(f'{base}/{x}' for x in configs)}")
    archives = " --manual_dir=FOLDER_WITH_ITS_ARCHIVES" if base.startswith("imagenet2012") else ""
    default = "" if data_dir else " (TFDS's default, as config.data.dir is empty)"
    raise ValueError(f"no dataset {name!r} in {data_root(data_dir)}{default}: expected digits, folder, or a prepared "
                     f"dataset, which would be in {folder}/{version or 'VERSION'}. Give the folder that has it as "
                     "--config.data.dir=FOLDER, or prepare it:\n    python -m fastervit_jax.data.prepare "
                     f"{name}{archives} --data_dir={data_root(data_dir)}")


def _folders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _versions(folder: pathlib.Path) -> list[str]:
    return [path.name for path in _folders(folder) if re.fullmatch(r"\d+\.\d+\.\d+", path.name)
            and all((path / file).is_file() for file in ("dataset_info.json", "features.json"))]


def _default_config(top: pathlib.Path) -> str | None:
    """The only configuration there, or else the one that TFDS noted as default when it prepared them."""
    configs = [path.name for path in _folders(top) if _versions(path)]
    if len(configs) == 1:
        return configs[0]
    noted = top / ".config" / "metadata.json"
    default = json.loads(noted.read_text()).get("default_config_name") if noted.is_file() else None
    return default if default in configs else None


def find_features(builder: Any) -> Features:
    """The image and label of a dataset: its supervised keys, or else the only features that can be meant.

    Raises ValueError if there is no image, or a label that is neither a ClassLabel nor a sequence of them.
    """
    import tensorflow_datasets as tfds

    name, features = builder.info.full_name, builder.info.features
    keys = builder.info.supervised_keys
    if keys and isinstance(keys[0], str) and isinstance(keys[1], str):
        image, label = keys[0], keys[1]
    else:
        image = _only(name, features, "image", lambda feature: isinstance(feature, tfds.features.Image))
        label = _only(name, features, "label", lambda feature: isinstance(feature, tfds.features.ClassLabel))
    if not isinstance(features[image], tfds.features.Image) or features[image].np_dtype != np.uint8:
        raise ValueError(f"{name}: feature {image!r} is {features[image]}; expected an Image of uint8")
    meaning = features[label]
    multi_label = isinstance(meaning, tfds.features.Sequence)
    if multi_label:
        meaning = meaning.feature
    if not isinstance(meaning, tfds.features.ClassLabel):
        raise ValueError(f"{name}: label feature {label!r} is {features[label]}; expected a ClassLabel, or a sequence "
                         "of them")
    if not meaning.num_classes:
        raise ValueError(f"{name}: label feature {label!r} does not say how many classes it has")
    has_name = "file_name" in features and isinstance(features["file_name"], tfds.features.Text)
    return Features(image, label, "file_name" if has_name else None, multi_label, tuple(meaning.names),
                    imagenet.CLASSES_OF.get(builder.name))


def _only(name: str, features: Any, what: str, is_one: Callable[[Any], bool]) -> str:
    found = [key for key, feature in features.items() if is_one(feature)]
    if len(found) != 1:
        raise ValueError(f"{name} has no supervised keys and {len(found)} features that could be the {what} "
                         f"({', '.join(found) or 'none'}); its features are {', '.join(features)}; expected one")
    return found[0]


def _instructions(builder: Any, split: str) -> list[Any]:
    return builder.info.splits[split].file_instructions


def check_shards(instructions: Iterable[Any]) -> None:
    """Open every file, count its records and read the first and the last.

    Raises one ValueError that tells of each bad file what is wrong. A record that is damaged within a file raises when
    it is read.
    """
    expected = {str(shard.filename): shard.examples_in_shard for shard in instructions}
    allow_open_files(len(expected))
    with concurrent.futures.ThreadPoolExecutor(CHECKING_THREADS) as threads:
        problems = [problem for problem in threads.map(_shard_problem, expected, expected.values()) if problem]
    if problems:
        raise ValueError("\n".join([f"{len(problems)} of {len(expected)} shards cannot be used:", *problems,
                                    "copy them again, or delete the dataset's folder and prepare it again"]))


def _shard_problem(path: str, expected: int) -> str | None:
    from array_record.python import array_record_module

    if not os.path.isfile(path):
        return f"{path} is not there"
    if not os.path.getsize(path):
        return f"{path} is empty"
    reader = array_record_module.ArrayRecordReader(path, options="readahead_buffer_size:0",
                                                   file_reader_buffer_size=32768)
    try:
        count = reader.num_records()
        if not reader.ok():
            reader.read([0])  # which says why
        if count != expected:
            return f"{path} has {count} records; dataset_info.json says {expected}"
        for position in {0, count - 1}:
            reader.read([position])
    except RuntimeError as error:
        return f"{path} is damaged or cut off ({error})"
    finally:
        with contextlib.suppress(RuntimeError):  # which a damaged one raises again
            reader.close()
    return None


def allow_open_files(shards: int) -> None:
    """Let this process, and those it starts, open that many shards. Raises OSError if the system does not allow it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = shards + OTHER_FILES
    if hard != resource.RLIM_INFINITY and hard < need:
        raise OSError(f"{shards} shards need about {need} open files, and the system allows {hard} a process (the hard "
                      f"limit, `ulimit -Hn`): raise that, or prepare the dataset with fewer shards")
    wanted = max(soft, need) if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
