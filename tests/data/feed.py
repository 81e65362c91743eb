"""Small feeds for tests, and a program that has one, to be killed: python -m tests.data.feed HOW."""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory, synchronize
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import common
from fastervit_jax.data import loader
from fastervit_jax.train import sharding
from tests.data import images

TAG = "FEED_TEST_TAG"
"""Variable of the environment: what is in the names of shared memory and semaphores, to know ours from others."""
SLOW = "FEED_TEST_SLOW"
"""And how many seconds shared memory is there before its name is known to the process that frees it."""
if TAG in os.environ:
    shared_memory._SHM_NAME_PREFIX = f"/{os.environ[TAG]}"
if SLOW in os.environ:
    def _slowly(*args: Any, _open: Callable = shared_memory._posixshmem.shm_open, **options: Any) -> int:
        memory = _open(*args, **options)
        time.sleep(float(os.environ[SLOW]))
        return memory

    shared_memory._posixshmem.shm_open = _slowly


@dataclasses.dataclass(frozen=True)
class Files:
    """Encoded images, each of its own class: a label tells the record."""

    files: tuple[bytes, ...]
    name: str = "files"
    classes: tuple[int, ...] | None = None
    class_names: tuple[str, ...] = ()
    multi_label: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {"image": self.files[index], "label": np.int32(index)}

    def record_name(self, index: Any) -> str:
        return f"file {index}"


def files(count: int, bad: tuple[int, ...] = ()) -> Files:
    """So many photographs, but for the `bad` ones, which have no bytes."""
    return Files(tuple(b"" if i in bad else data for i, data in enumerate(_photographs(count))))


@functools.cache
def _photographs(count: int) -> list[bytes]:
    return images.jpegs(count)


def config(batch_size: int = 4, seed: int = 0, in_chans: int = 3, **data: Any) -> ConfigDict:
    """What the feed reads of a config, with 10 pixels a side; `data` changes its data section."""
    result = common.base()
    result.data = common.data("folder", 10, mean=(0.5,), std=(0.5,), eval_crop=0.875)
    result.data.update({"timeout": 60.0, "max_bad_fraction": 1.0, **data})
    result.model = ConfigDict({"in_chans": in_chans})
    result.update(batch_size=batch_size, seed=seed)
    return result


def one_device() -> jax.sharding.NamedSharding:
    """Any batch lies on it, the share of one of several processes too."""
    return sharding.over_batch(sharding.make_mesh(jax.devices()[:1]))


def train(source: Any, config: ConfigDict, first_step: int = 0, last_step: int | None = None) -> loader.Feed:
    """Without an end if `last_step` is None."""
    last_step = 10**6 if last_step is None else last_step
    return loader.train_batches(source, config, first_step=first_step, last_step=last_step, sharding=one_device())


def evaluation(source: Any, config: ConfigDict) -> loader.Feed:
    return loader.eval_batches(source, config, sharding=one_device())


def take(feed: loader.Feed, count: int | None = None) -> list[dict[str, Any]]:
    """So many batches, or all, with what is said of unreadable images under "reasons"; closes the feed.

    They are looked at when the last one has come.
    """
    with contextlib.closing(feed):
        fed = list(itertools.islice(feed, count))
    return [{**{name: np.array(x) for name, x in batch.items()}, "reasons": reasons} for batch, reasons in fed]


def of_processes(monkeypatch: Any, count: int, make: Callable[[], loader.Feed]) -> list[dict[str, Any]]:
    """The batches of `count` processes, simulated one after the other, each put together from their shares."""
    shares = []
    for process in range(count):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: count)
            patch.setattr(jax, "process_index", lambda process=process: process)
            shares.append(take(make()))
    return [{name: [reason for part in parts for reason in part[name]] if name == "reasons" else column(parts, name)
             for name in parts[0]} for parts in zip(*shares, strict=True)]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Bit for bit."""
    assert len(found) == len(expected) > 0
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys() == {"image", "label", "weight", "reasons"}
        assert batch["reasons"] == other["reasons"]
        for name in ("image", "label", "weight"):
            assert batch[name].dtype == other[name].dtype
            np.testing.assert_array_equal(batch[name], other[name])


def column(batches: list[dict[str, Any]], name: str) -> np.ndarray:
    """One for each example of all batches."""
    return np.concatenate([batch[name] for batch in batches])


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What the condition gives as soon as it is true. Raises AssertionError if it is not in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
    return value


@dataclasses.dataclass(frozen=True)
class Process:
    """One of the system's, told from a later one of the same number by the time when it was started."""

    pid: int
    parent: int
    started: str

    @property
    def alive(self) -> bool:
        return _process(self.pid) == self

    @property
    def name(self) -> str:
        return _read(self.pid, "comm").strip()

    @property
    def command(self) -> str:
        return _read(self.pid, "cmdline")


def _read(pid: int, file: str) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/{file}").read_text()
    return ""


def _process(pid: int) -> Process | None:
    """None for one that has ended, its parent asked for its exit code or not."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return Process(pid, int(fields[1]), fields[19]) if fields and fields[0] not in "ZX" else None


def children(pid: int) -> list[Process]:
    """Of a process that has threads: all that it started and that live."""
    found = [_process(int(path.name)) for path in pathlib.Path("/proc").iterdir() if path.name.isdigit()]
    return [process for process in found if process and process.parent == pid]


def workers(pid: int) -> list[Process]:
    """The children that Python's multiprocessing started to work, not those that look after its memory."""
    return [process for process in children(pid) if "spawn_main" in process.command]


def shared(tag: str) -> list[pathlib.Path]:
    """Memory and semaphores that processes share."""
    return list(pathlib.Path("/dev/shm").glob(f"*{tag}*"))


def main(how: str) -> None:
    """'run': for ever. 'signals': to the fifth batch after SIGTERM and SIGINT came. 'leave': to the fifth, and ends
    with the feed open. 'impatient': to an error of the feed."""
    synchronize.SemLock._make_name = staticmethod(lambda: f"/{os.environ[TAG]}-{next(synchronize.SemLock._rand)}")
    came = set()
    if how == "signals":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: came.add(number))
    if how == "impatient":
        loader.CLOSING = 1.0
    feed = train(files(13), config(workers=2, timeout=3.0 if how == "impatient" else 60.0))
    if how == "leave":
        _rest(feed, 5)
        print("left")
        sys.stdout.flush()
        globals()["kept"] = feed  # until the interpreter ends
        return
    with contextlib.closing(feed):
        while how != "signals" or len(came) < 2:
            _rest(feed, 1)
            print("batch", flush=True)
        _rest(feed, 5)
    print("closed", flush=True)


def _rest(feed: Iterator[loader.Fed], count: int) -> None:
    for _ in range(count):
        next(feed)


if __name__ == "__main__":
    main(sys.argv[1])
