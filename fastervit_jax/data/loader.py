"""Batches from a source to the devices, through Grain.

The global step is the only state: batch `step` holds the same images, cropped alike, wherever and however often the run
is started, on any number of processes and of workers.
"""

import collections
import contextlib
import ctypes
import dataclasses
import errno
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pathlib
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from multiprocessing import shared_memory
from typing import Any

import cv2
import grain
import jax
import numpy as np
from absl import flags, logging
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from fastervit_jax.data import decode
from fastervit_jax.data.cues import Cues
from fastervit_jax.data.sources import ArraySource, Source, image_sides

DRAWN = (ArraySource, Cues)
"""Sources whose images are pixels of the right size already."""
IN_FLIGHT = 2
"""Batches that are on their way to the devices before they are used."""
FEEDS = 2
"""That are open at a time: training's waits while there is an evaluation."""
CLOSING = 10.0
"""Seconds that workers have to end when a feed is closed; then they are killed."""
MORE_SHARED_MEMORY = ("Make /dev/shm larger (docker run --shm-size), or lower config.data.workers or config.batch_size")
LISTED = 20
"""Unreadable images that the error names which ends a run."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Sent to all processes of a run, and left to the main one."""

Fed = tuple[dict[str, jax.Array], list[str]]
"""A batch, and what to say of each of its images that could not be read."""


class FeedError(RuntimeError):
    """The feed cannot go on: a worker died or hangs, or too many images cannot be read."""


@dataclasses.dataclass(frozen=True)
class Read:
    """Makes batches from (place, record) pairs: a record that cannot be read, or is beyond the last one, has weight 0.

    A record's random crop comes from `seed` and its place in the order of the whole run.
    """

    source: Source
    transform: decode.TrainCrop | decode.EvalCrop | None
    seed: int

    def __call__(self, pairs: Int[np.ndarray, "b 2"]) -> dict[str, np.ndarray]:
        labels = (len(pairs), self.source.num_classes) if self.source.multi_label else (len(pairs),)
        batch = {
            "image": np.zeros((len(pairs), *self.shape), np.uint8),
            "label": np.zeros(labels, bool if self.source.multi_label else np.int32),
            "weight": np.zeros(len(pairs), np.float32),
            "index": np.full(len(pairs), -1, np.int64),
        }
        for i, (place, index) in enumerate(pairs):
            if index >= len(self.source):
                continue
            batch["index"][i] = index
            try:
                record = self.source[int(index)]
                batch["label"][i] = record["label"]
                batch["image"][i] = self.pixels(record["image"], int(place))
                batch["weight"][i] = 1
            # Readers and decoders raise what they like on damaged bytes, and Grain ends early on any error. Nothing is
            # lost: the main process sees weight 0, says why, and ends the run if there are many.
            except Exception:
                batch["weight"][i] = 0
        return batch

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image."""
        if self.transform is None:
            return self.source[0]["image"].shape
        return self.transform.size, self.transform.size, self.transform.channels

    def pixels(self, image: bytes | np.ndarray, place: int) -> UInt8[np.ndarray, "h w c"]:
        """An encoded image's, or those that are there already."""
        if self.transform is None:
            return image
        return self.transform(image, np.random.Generator(np.random.Philox(key=[self.seed, place])))

    def reason(self, index: int) -> str:
        """Why a record cannot be read."""
        name = self.source.record_name(index)
        try:
            self.pixels(self.source[index]["image"], 0)
        except Exception as error:
            text = str(error)
            return text if text.startswith(name) else f"{name}: {type(error).__name__}: {text}"
        return f"{name}: read at a second try"


def _pair(place: int, index: int) -> Int[np.ndarray, "2"]:
    return np.array([place, index], np.int64)


def batches(records: grain.MapDataset, read: Read, size: int) -> grain.MapDataset:
    """Of so many images each, in the order of `records`; a part that is left at the end is dropped."""
    return records.map_with_index(_pair).batch(size, drop_remainder=True).map(read)


def _start_worker(index: int, count: int) -> None:
    """In a new worker process: decode in one thread, and die with the main process."""
    cv2.setNumThreads(1)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        # PR_SET_PDEATHSIG: a stopped worker goes on, to see the end. No SIGKILL: what counts as the parent is the
        # thread that started us, and Grain ends it before it asks us to stop and takes back our shared memory.
        libc.prctl(1, signal.SIGCONT)
        libc.prctl(15, f"input-{index}".encode())  # PR_SET_NAME
    threading.Thread(target=_end_with_parent, daemon=True, name="end with parent").start()


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    sys.setswitchinterval(1)  # seconds: no other thread goes on between the look at them and the end
    time.sleep(1e-3)  # those that wait for their turn know of it afterwards
    while _makes_shared_memory():
        time.sleep(1e-3)
    os._exit(1)


def _makes_shared_memory() -> bool:
    """Whether a thread is where memory may exist that is not yet known to the process that frees it after our end."""
    making = shared_memory.SharedMemory.__init__.__code__
    return any(frame.f_code is making for top in sys._current_frames().values()
               for frame, _ in traceback.walk_stack(top))


def _proc(pid: int, file: str) -> str:
    """What the system tells of a process; "" if it tells nothing."""
    path = pathlib.Path("/proc", str(pid), file)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return path.read_text().strip()
    return ""


def _state(pid: int) -> str:
    fields = _proc(pid, "stat").rpartition(")")[2].split()
    return {"T": "is stopped", "D": "waits for a disk"}.get(fields[0] if fields else "", "runs")


class HostBatches(Iterator[dict[str, np.ndarray]]):
    """The dataset's batches in order, made by `workers` processes; 0: by threads of this one. To be closed.

    A worker that died, and none that gives a batch within `timeout` seconds, raise FeedError. Workers die with this
    process, however it ends.
    """

    def __init__(self, dataset: grain.MapDataset, workers: int, timeout: float):
        batches = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1 if workers else 2, prefetch_buffer_size=2))
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain hands its flags to its workers, and not every caller has absl's
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
            batches = batches.mp_prefetch(options, worker_init_fn=_start_worker)
        others = {process.pid for process in multiprocessing.active_children()}
        multiprocessing.resource_tracker.ensure_running()  # the thread that starts it takes no signal mask of ours
        self._timeout = timeout
        self._iterator = iter(batches)
        self._ready: queue.Queue = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._pull, daemon=True, name="feed")
        self._thread.start()
        # Grain does not tell its processes. They are the new ones, if feeds are started one after the other.
        self._workers: list[Any] = []
        self._names: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(self._workers) < workers and self._thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
                others |= {process.pid for process in self._workers}
                self._workers += [p for p in multiprocessing.active_children() if p.pid not in others]
        except BaseException:  # a signal: nobody has this feed yet who could close it
            self._kill()
            self.close()
            raise

    def _pull(self) -> None:
        # The workers inherit this from their first moment: threads of this one start them.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for batch in self._iterator:
                # Copied out of the memory that is shared with the worker, which is then free.
                self._ready.put(({name: np.array(x) for name, x in batch.items()}, None))
                if self._closed.is_set():
                    return
            self._ready.put((None, StopIteration()))
        except Exception as error:  # to be raised where the batch was to be used
            self._ready.put((None, error))

    def __next__(self) -> dict[str, np.ndarray]:
        if self._closed.is_set():
            raise StopIteration
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                batch, error = self._ready.get(timeout=0.2)
            except queue.Empty:
                batch, error = None, None
            for process in self._workers:
                if process.pid not in self._names and (name := _proc(process.pid, "comm")).startswith("input-"):
                    self._names[process.pid] = name
            dead = [process for process in self._workers if process.exitcode not in (None, 0)]
            if any(process.exitcode < 0 for process in dead):
                self._fail(f"{self._describe(dead)}: killed, or out of memory, of which fewer config.data.workers need "
                           "less")
            if dead:
                self._fail(f"{self._describe(dead)}: its own message is above. A script that trains must do so below "
                           "if __name__ == '__main__', for workers import it")
            if isinstance(error, StopIteration):
                self._kill()  # they have nothing left; asked to end, each would take half a second
                self.close()
                raise error
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                self._fail(f"the memory shared with workers is full: {error}. {MORE_SHARED_MEMORY}", error)
            if error is not None:
                self._fail(f"the feed broke: {type(error).__name__}: {error}", error)
            if batch is not None:
                return batch
            if time.monotonic() >= deadline:
                self._fail(f"no batch for {self._timeout:g} s (config.data.timeout); {self._describe(self._workers)}. "
                           "Look at the storage of the images, and at what stops a worker")

    def _fail(self, message: str, cause: Exception | None = None) -> None:
        self._kill()  # one that is stopped would not end when it is asked to
        self.close()
        raise FeedError(message) from cause

    def _describe(self, workers: list[Any]) -> str:
        """'input-1 (pid 123) is stopped', for each."""
        return "; ".join(
            f"{self._names.get(process.pid, 'a new worker')} (pid {process.pid}) "
            + (_state(process.pid) if process.exitcode is None else f"ended with exit code {process.exitcode}")
            for process in workers) or "there are no workers"

    def close(self) -> None:
        """Ends the workers. A thread of this process that hangs, in a read or a start of a worker, is left behind."""
        self._closed.set()
        deadline = time.monotonic() + 2 * CLOSING
        killer = threading.Timer(CLOSING, self._kill)
        killer.daemon = True
        killer.start()
        while self._thread.is_alive() and time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()  # what the thread waits to hand over
            self._thread.join(timeout=0.02)
        if self._iterator is not None and not self._thread.is_alive():
            self._iterator.close()
            self._iterator = None  # with it go the last batches that are shared with workers
        killer.cancel()

    def _kill(self) -> None:
        for process in self._workers:
            process.kill()


def check_shared_memory(
    workers: int, batch_bytes: int, feeds: int, folder: pathlib.Path = pathlib.Path("/dev/shm")
) -> None:
    """Raises FeedError if the memory that workers share with this process has too little room, where a system tells.

    Each worker has up to four batches there (made, queued, fetched, copied), and each feed one more.
    """
    if not workers or not folder.exists():
        return
    stat = os.statvfs(folder)
    room, need = stat.f_bavail * stat.f_frsize, feeds * (4 * workers + 1) * batch_bytes
    if room < need:
        raise FeedError(f"{folder} has room for {room / 2**30:.2f} GiB, but {workers} workers with batches of "
                        f"{batch_bytes / 2**20:.1f} MiB take up to {need / 2**30:.2f} GiB of it. {MORE_SHARED_MEMORY}")


class Feed(Iterator[Fed]):
    """This process's share of the batches as its part of global arrays, with some in flight. To be closed.

    `records` is the order of records through the whole run, of which `epoch` are one time through.
    """

    def __init__(self, records: grain.MapDataset, read: Read, config: ConfigDict, steps: slice, epoch: int, feeds: int,
                 sharding: jax.sharding.NamedSharding):
        batch_size, workers = config.batch_size, config.data.workers
        processes, process = jax.process_count(), jax.process_index()
        if batch_size % sharding.mesh.size:
            raise ValueError(f"batch size {batch_size} does not divide over {sharding.mesh.size} devices; expected a "
                             f"multiple of {sharding.mesh.size}")
        check_shared_memory(workers, math.prod(read.shape) * batch_size // processes, feeds)
        # Shuffle and repeat come before batching, batching before each process takes its share: any other
        # order makes the content of a batch depend on the number of processes.
        last = None if steps.stop is None else steps.stop * processes
        share = batches(records, read, batch_size // processes)[steps.start * processes + process : last : processes]
        self._batches = HostBatches(share, workers, config.data.timeout)
        self._read, self._sharding = read, sharding
        self._max_bad_fraction, self._share = config.data.max_bad_fraction, len(read.source) / processes
        self._batch_size, self._epoch, self._position = batch_size, epoch, steps.start * batch_size % epoch
        self._seen, self._bad = 0, 0
        self._reasons: list[str] = []
        self._in_flight: collections.deque[Fed] = collections.deque()

    def __next__(self) -> Fed:
        while len(self._in_flight) <= IN_FLIGHT:
            try:
                batch = next(self._batches)
            except StopIteration:
                break
            reasons = self._check(batch["weight"], batch.pop("index"))
            arrays = {name: jax.make_array_from_process_local_data(self._sharding, x) for name, x in batch.items()}
            self._in_flight.append((arrays, reasons))
        if not self._in_flight:
            raise StopIteration
        return self._in_flight.popleft()

    def _check(self, weights: np.ndarray, indices: np.ndarray) -> list[str]:
        """Says which images could not be read; raises FeedError if they are too many."""
        there = indices >= 0
        reasons = [self._read.reason(int(index)) for index in indices[there & (weights == 0)]]
        for reason in reasons:
            logging.warning("cannot read %s; it counts for nothing", reason)
        self._seen, self._bad = self._seen + int(there.sum()), self._bad + len(reasons)
        self._position += self._batch_size
        epochs = -(-self._position // self._epoch)
        self._reasons = (self._reasons + reasons)[:LISTED]
        if self._bad > self._max_bad_fraction * max(self._seen, self._share * epochs):
            more = ["..."] if self._bad > len(self._reasons) else []
            self.close()
            raise FeedError("\n  ".join([
                f"{self._bad} of {self._seen} images of {self._read.source.name} could not be read, more than "
                f"config.data.max_bad_fraction={self._max_bad_fraction:g} allows:", *self._reasons, *more,
            ]) + "\nMend them, remove them, or allow for more.")
        return reasons

    def close(self) -> None:
        """Ends the workers."""
        self._batches.close()


def check(config: ConfigDict) -> None:
    """Raises ValueError for a data section, or a batch size, that cannot be."""
    data, channels = config.data, config.model.in_chans
    for name, value, least in (("batch_size", config.batch_size, 1), ("data.image_size", data.image_size, 32),
                               ("data.workers", data.workers, 0)):
        if value < least:
            raise ValueError(f"config.{name}={value}: expected at least {least}")
    if not 0 < data.timeout < math.inf:
        raise ValueError(f"config.data.timeout={data.timeout}: expected seconds, more than 0")
    if not 0 <= data.max_bad_fraction <= 1:
        raise ValueError(f"config.data.max_bad_fraction={data.max_bad_fraction}: expected 0 to 1")
    for name, low in (("mean", 0.0), ("std", 1e-3)):
        if len(data[name]) != channels or not all(low <= x <= 1 for x in data[name]):
            raise ValueError(f"config.data.{name}={data[name]}: expected {channels} numbers, one a channel of "
                             f"config.model.in_chans, from {low:g} to 1 (pixels are 0 to 1)")
    decode.train_crop(config)
    decode.eval_crop(config)


def train_order(source: Source, config: ConfigDict) -> tuple[grain.MapDataset, Read]:
    """The order of records in training, without end, and how they are read."""
    transform = None if isinstance(source, DRAWN) else decode.train_crop(config)
    order = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat(None)
    return order, Read(source, transform, config.seed)


def abstract_batch(config: ConfigDict, sharding: jax.sharding.NamedSharding) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of the batches that `train_batches` gives."""
    images = config.batch_size
    image = (*image_sides(config), config.model.in_chans)
    shapes = {"image": ((images, *image), np.uint8), "label": ((images,), np.int32), "weight": ((images,), np.float32)}
    return {name: jax.ShapeDtypeStruct(*x, sharding=sharding) for name, x in shapes.items()}


def train_batches(
    source: Source, config: ConfigDict, *, first_step: int, last_step: int, sharding: jax.sharding.NamedSharding
) -> Feed:
    """The batches of the steps after `first_step` up to `last_step`, each with what to say of its unreadable images.

    A batch is {"image": uint8 (b, h, w, c), "label": int32 (b,), "weight": float32 (b,)}. Weight is 1, or 0 for an
    image that could not be read; its pixels are 0. Every epoch is a shuffle of its own, from config.seed; batches run
    on over the ends of epochs, so no image is left out. config.data.workers processes decode, or threads if 0.

    Raises ValueError for a batch size that does not divide over the devices; FeedError if a worker dies, if no batch
    comes for config.data.timeout seconds, or if more than config.data.max_bad_fraction of the images cannot be read
    (counted over whole epochs, with the one that has begun, however its images are shuffled).
    """
    order, read = train_order(source, config)
    return Feed(order, read, config, slice(first_step, last_step), len(source), FEEDS, sharding)


def eval_batches(source: Source, config: ConfigDict, *, sharding: jax.sharding.NamedSharding) -> Feed:
    """Every image once, in order, as `train_batches` gives them; what fills the last batch up has weight 0 too."""
    read = Read(source, None if isinstance(source, DRAWN) else decode.eval_crop(config), config.seed)
    padded = -(-len(source) // config.batch_size) * config.batch_size
    return Feed(grain.MapDataset.range(padded), read, config, slice(0, None), padded, 1, sharding)
