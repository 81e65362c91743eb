"""Miniatures of ImageNet: archives laid out as the real ones, and datasets that TensorFlow Datasets prepared.

Every image is a cut from one of scikit-learn's two photographs, chosen by its file's name: a test that knows the name
knows the pixels. tests/golden/imagenet was written, in an environment with requirements.txt, with

    pip install tensorflow importlib_resources
    python -m tests.data.mini tests/golden/imagenet

imagenet2012 by TFDS's own builder, through fastervit_jax.data.prepare; the others with their builders' names, versions
and features, but without the downloads. The descriptions in dataset_info.json are left out.
"""

import argparse
import functools
import importlib.resources
import io
import json
import pathlib
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "imagenet"
SYNSETS = {"n01751748": 65, "n09193705": 970, "n02105855": 230, "n04263257": 809}
"""The classes of the train archives and their labels: those of the first four validation images, in that order."""

VALIDATION_LABELS = (65, 970, 230, 809, 516, 57, 334, 415)
"""TFDS's labels of the first eight validation images."""

GREY = ("n01751748_3.JPEG", "ILSVRC2012_val_00000002.JPEG")
SMALL = (56, 104)
"""Sides in the committed datasets, in pixels."""

ENTRIES: dict[str, list[dict[str, Any]]] = {
    "imagenet_v2": [{"file_name": f"{label}/{i}.jpeg", "label": label}
                    for label in (0, 65, 809, 999) for i in range(1 + (label == 65))],
    "imagenet_a": [{"file_name": f"0.{label}_bug.jpg", "label": label} for label in (6, 310, 988, 988 - 1)],
    "imagenet_r": [{"file_name": f"{synset}/art_{i}.jpg", "label": synset}
                   for i, synset in enumerate(("n01443537", "n01484850", "n12267677", "n12267677"))],
    "imagenet2012_real": [{"file_name": f"ILSVRC2012_val_{i + 1:08}.JPEG", "original_label": label, "real_label": real}
                          for i, (label, real) in enumerate(zip(
                              VALIDATION_LABELS, ([65], [970, 976, 979], [], [809, 925], [0, 999]), strict=False))],
    "imagenet_sketch": [{"file_name": f"{synset}/sketch_{i}.JPEG", "label": synset}
                        for i, synset in enumerate(("n01440764", "n01751748", "n04263257", "n15075141"))],
}
"""What the committed datasets other than imagenet2012 hold, in the words of their builders."""

SPLIT_OF = {"imagenet2012_real": "validation"}
"""The others have test only."""


NOT_KEPT = ("citation", "description", "releaseNotes")


@functools.cache
def _photographs() -> tuple[np.ndarray, ...]:
    folder = importlib.resources.files("sklearn.datasets.images")
    return tuple(cv2.imdecode(np.frombuffer((folder / f"{name}.jpg").read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)
                 for name in ("china", "flower"))


def picture(file_name: str, sides: tuple[int, int] = (100, 250)) -> np.ndarray:
    """The image of that name, uint8 (height, width, 3); sides lie between the two. GREY ones are (height, width, 1)."""
    random = np.random.RandomState(zlib.crc32(file_name.encode()))
    photograph = _photographs()[random.randint(2)]
    height, width = random.randint(sides[0], sides[1] + 1, 2)
    top = random.randint(photograph.shape[0] - height)
    left = random.randint(photograph.shape[1] - width)
    cut = photograph[top : top + height, left : left + width]
    return cv2.cvtColor(cut, cv2.COLOR_RGB2GRAY)[..., None] if file_name in GREY else cut


def jpeg(file_name: str, sides: tuple[int, int] = (100, 250)) -> bytes:
    """The bytes of a JPEG file of `picture`."""
    image = picture(file_name, sides)
    image = image[..., 0] if image.shape[-1] == 1 else image[..., ::-1]
    return cv2.imencode(".jpg", np.ascontiguousarray(image), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


def train_names(per_class: int = 6) -> list[str]:
    return [f"{synset}_{i}.JPEG" for synset in SYNSETS for i in range(1, per_class + 1)]


def validation_names(count: int = len(VALIDATION_LABELS)) -> list[str]:
    return [f"ILSVRC2012_val_{i:08}.JPEG" for i in range(1, count + 1)]


def tar(files: dict[str, bytes]) -> bytes:
    """A tar file of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_archives(folder: pathlib.Path, per_class: int = 6, sides: tuple[int, int] = (100, 250)) -> None:
    """ILSVRC2012_img_train.tar, a tar file a class, and ILSVRC2012_img_val.tar, whose members are not in order."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = {}
    for synset in SYNSETS:
        names = [name for name in train_names(per_class) if name.startswith(synset)]
        classes[f"{synset}.tar"] = tar({name: jpeg(name, sides) for name in names})
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(classes))
    validation = {name: jpeg(name, sides) for name in validation_names()}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(dict(reversed(validation.items()))))


def shards(version: pathlib.Path, split: str) -> list[pathlib.Path]:
    return sorted(version.glob(f"*-{split}.array_record-*"))


def edit_info(version: pathlib.Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change a prepared dataset's dataset_info.json."""
    path = version / "dataset_info.json"
    info = json.loads(path.read_text())
    edit(info)
    path.write_text(json.dumps(info, indent=2, sort_keys=True))


def reshard(version: pathlib.Path, split: str, count: int) -> list[pathlib.Path]:
    """Spread the records of a prepared dataset's split over `count` files of unequal lengths; the files."""
    from array_record.python import array_record_module

    records = []
    for path in shards(version, split):
        reader = array_record_module.ArrayRecordReader(str(path))
        records += reader.read_all()
        reader.close()
        stem = path.name.split("-000")[0]
        path.unlink()
    ends = [round(len(records) * ((i + 1) / count) ** 1.2) for i in range(count)]
    for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        writer = array_record_module.ArrayRecordWriter(str(version / f"{stem}-{i:05}-of-{count:05}"), "group_size:1")
        for record in records[start:end]:
            writer.write(record)
        writer.close()
    lengths = [str(end - start) for start, end in zip([0, *ends], ends, strict=False)]

    def edit(info: dict[str, Any]) -> None:
        next(entry for entry in info["splits"] if entry["name"] == split)["shardLengths"] = lengths

    edit_info(version, edit)
    return shards(version, split)


def _prepare(name: str, out: pathlib.Path) -> None:
    """Let TFDS write ENTRIES[name], with the features of its builder."""
    import tensorflow_datasets as tfds

    examples = [(str(i), {"image": jpeg_file(entry["file_name"]), **entry}) for i, entry in enumerate(ENTRIES[name])]
    builder = tfds.builder(name, data_dir=out, file_format="array_record")
    builder._split_generators = lambda dl_manager: {SPLIT_OF.get(name, "test"): examples}
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))


def jpeg_file(file_name: str) -> io.BytesIO:
    return io.BytesIO(jpeg(file_name, SMALL))


def main() -> None:
    from fastervit_jax.data import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out.absolute()
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as archives:
        write_archives(pathlib.Path(archives), sides=SMALL)
        prepare.prepare("imagenet2012", archives, str(out))
    for name in ENTRIES:
        _prepare(name, out)
    shutil.rmtree(out / "downloads", ignore_errors=True)
    for path in out.rglob("dataset_info.json"):
        edit_info(path.parent, lambda info: [info.pop(key, None) for key in NOT_KEPT])


if __name__ == "__main__":
    main()
