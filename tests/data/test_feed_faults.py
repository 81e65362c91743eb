"""Workers that die, stop or outlive their use: each ends the run with a message, and nothing is left behind."""

import contextlib
import multiprocessing
import os
import pathlib
import queue
import re
import secrets
import signal
import subprocess
import sys
import threading
import time

import pytest

from fastervit_jax.data import loader
from tests.data import feed as feeds
from tests.data.feed import Files, Process, assert_same, children, config, evaluation, files, shared, take, train, until

SOURCE = files(13)
PARTS = ("input-0", "input-1")
"""The names of two workers."""


@pytest.fixture
def opened():
    """A function that hands a feed on and remembers to close it."""
    with contextlib.ExitStack() as stack:
        yield lambda feed: stack.enter_context(contextlib.closing(feed))


def started(feeds_before: list[Process]) -> dict[str, Process]:
    """By name the workers of this process that are there since, all of which have begun to work."""
    found = [process for process in feeds.workers(os.getpid()) if process not in feeds_before]
    names = {process.name: process for process in found}
    return names if all(name.startswith("input-") for name in names) else {}


def drain(feed: loader.Feed, seconds: float = 30.0) -> None:
    """Use batches up until the feed raises."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        next(feed)


def test_a_killed_worker_is_named_and_no_other_feed_is_blamed(opened):
    training = opened(train(SOURCE, config(workers=2)))
    next(training)
    of_training = started([])
    assert sorted(of_training) == list(PARTS)
    assert all(x.flags.owndata for x in next(training._batches).values())  # it is no worker's memory any more
    evaluating = opened(evaluation(files(100), config(workers=1)))
    next(evaluating)
    of_evaluation = started(list(of_training.values()))
    assert sorted(of_evaluation) == ["input-0"]

    victim = of_evaluation["input-0"]
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(loader.FeedError, match=rf"^input-0 \(pid {victim.pid}\) ended with exit code -9: killed, or out"
                       " of memory, of which fewer config.data.workers need less$"):
        drain(evaluating, 10)
    for _ in range(20):
        next(training)
    assert all(process.alive for process in of_training.values())

    evaluating = opened(evaluation(files(100), config(workers=1)))
    first = next(evaluating)
    of_evaluation = started(list(of_training.values()))
    victim = of_training["input-1"]
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(loader.FeedError, match=rf"^input-1 \(pid {victim.pid}\) ended with exit code -9: killed"):
        drain(training, 10)
    assert not any(process.alive for process in of_training.values())
    assert of_evaluation["input-0"].alive
    assert_same(take(_Rest(first, evaluating)), take(evaluation(files(100), config())))
    assert not feeds.workers(os.getpid())


class _Rest:
    """A feed whose first batch has been taken."""

    def __init__(self, first, feed):
        self._first, self._feed = [first], feed

    def __iter__(self):
        return self

    def __next__(self):
        return self._first.pop() if self._first else next(self._feed)

    def close(self):
        self._feed.close()


def test_a_stopped_worker_is_named_and_ended(opened, monkeypatch):
    """Also if the feed is closed before anyone has noticed."""
    closing = opened(train(SOURCE, config(workers=1)))
    next(closing)
    (of_closing,) = started([]).values()
    stopping = opened(train(SOURCE, config(workers=2, timeout=8.0)))
    next(stopping)
    found = started([of_closing])
    victim = found["input-1"]

    stopping._batches._timeout = 1.0  # it need not be long enough for a start any more
    monkeypatch.setattr(loader, "CLOSING", 60.0)
    os.kill(victim.pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(loader.FeedError, match=r"^no batch for 1 s \(config.data.timeout\); ") as error:
        drain(stopping)
    assert time.monotonic() - start < 20
    states = dict(re.findall(r"(input-\d \(pid \d+\)) ([a-z ]+)[;.]", str(error.value)))
    assert states == {f"input-0 (pid {found['input-0'].pid})": "runs", f"input-1 (pid {victim.pid})": "is stopped"}
    assert str(error.value).endswith("Look at the storage of the images, and at what stops a worker")
    assert not any(process.alive for process in found.values())

    monkeypatch.setattr(loader, "CLOSING", 1.0)
    os.kill(of_closing.pid, signal.SIGSTOP)
    with contextlib.suppress(queue.Empty):
        while True:
            closing._batches._ready.get(timeout=1.5)  # until its thread waits for the worker
    start = time.monotonic()
    closing.close()
    assert time.monotonic() - start < 10
    assert not of_closing.alive


class Stuck(Files):
    """Its storage does not answer until it is told to."""

    answer = threading.Event()

    def __getitem__(self, index):
        self.answer.wait(60)
        return super().__getitem__(index)


def test_a_read_that_hangs_in_a_thread(monkeypatch):
    monkeypatch.setattr(loader, "CLOSING", 0.2)
    feed = train(Stuck(SOURCE.files), config(workers=0))
    feed._batches._timeout = 0.5
    try:
        start = time.monotonic()
        with pytest.raises(loader.FeedError, match=r"no batch for 0.5 s .*; there are no workers\. Look at"):
            next(feed)
        assert time.monotonic() - start < 10
    finally:
        Stuck.answer.set()
        feed._batches._thread.join()


def test_an_error_of_a_worker_ends_the_run():
    """One that is not an image's."""
    class Broken(Files):
        def __len__(self):
            if multiprocessing.parent_process() is not None:
                raise ZeroDivisionError("a bug")
            return super().__len__()

    with pytest.raises(loader.FeedError, match="the feed broke: ZeroDivisionError: a bug"):
        take(train(Broken(SOURCE.files), config(workers=1)))
    assert not feeds.workers(os.getpid())


class Run:
    """The program in feed.py, in a group of processes of its own."""

    def __init__(self, how: str, error, variables: dict[str, str]):
        self.tag = "t" + secrets.token_hex(3)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.data.feed", how], start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=error, env=os.environ | {feeds.TAG: self.tag, "XLA_FLAGS": ""} | variables)
        self.pid = self.process.pid

    def workers(self, condition=lambda process: True) -> list[Process]:
        """Both, as soon as they are what they are to be."""
        return until(lambda: (found := feeds.workers(self.pid)) if len(found := feeds.workers(self.pid)) == 2
                     and all(map(condition, found)) else None)

    def memory(self) -> list[pathlib.Path]:
        """What it shares but semaphores: batches."""
        return [path for path in shared(self.tag) if path.name.startswith(self.tag)]

    def nothing_is_left(self, processes: list[Process]) -> None:
        until(lambda: not any(process.alive for process in processes))
        until(lambda: not shared(self.tag))


@pytest.fixture
def run(tmp_path):
    """A function that starts one; it and all that it started are killed in the end."""
    with contextlib.ExitStack() as stack:
        def start(how: str, **variables: str) -> Run:
            error = stack.enter_context((tmp_path / "stderr").open("w"))
            run = stack.enter_context(contextlib.closing(_Killed(Run(how, error, variables)))).run
            patience = threading.Timer(60, run.process.kill)  # who waits for its output waits no longer
            patience.start()
            stack.callback(patience.cancel)
            run.errors = (tmp_path / "stderr").read_text
            return run

        yield start


class _Killed:
    def __init__(self, run: Run):
        self.run = run

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.run.pid, signal.SIGKILL)
        self.run.process.wait()
        for path in shared(self.run.tag):  # what was to free it has been killed with the others
            path.unlink()
        self.run.process.stdout.close()


@pytest.mark.parametrize("moment", ["started", "named", "allocating", "working"])
def test_kill_9_of_the_trainer_leaves_nothing(run, moment):
    """However far the workers are; at last one of them is stopped, too."""
    trainer = run("run", **({feeds.SLOW: "1"} if moment == "allocating" else {}))
    workers = trainer.workers(lambda process: moment == "started" or process.name.startswith("input-"))
    if moment == "allocating":
        until(lambda: trainer.memory())
    if moment == "working":
        assert trainer.process.stdout.readline() == "batch\n"
        until(lambda: trainer.memory())
        os.kill(workers[0].pid, signal.SIGSTOP)
    processes = children(trainer.pid)
    assert len(processes) == 3  # and the one that Python has look after shared memory
    assert set(workers) < set(processes)
    assert shared(trainer.tag)
    trainer.process.kill()
    trainer.nothing_is_left(processes)


def test_signals_to_the_group_are_left_to_the_trainer(run):
    """SIGTERM when workers have just been started, SIGINT when they work: no batch is lost, and all close in peace."""
    trainer = run("signals")
    workers = trainer.workers()
    os.killpg(trainer.pid, signal.SIGTERM)
    assert trainer.process.stdout.readline() == "batch\n"
    processes = children(trainer.pid)
    os.killpg(trainer.pid, signal.SIGINT)
    output = trainer.process.stdout.read()
    assert trainer.process.wait(20) == 0
    assert output.splitlines()[-1] == "closed"
    assert trainer.errors() == ""
    assert set(workers) < set(processes)
    trainer.nothing_is_left(processes)


def test_a_worker_that_is_killed_before_it_has_been_told_what_to_do(run):
    """Python waits for ever to tell it, as the source is larger than a pipe; the run ends all the same."""
    trainer = run("impatient")
    (victim, *_) = until(lambda: feeds.workers(trainer.pid))
    os.kill(victim.pid, signal.SIGKILL)
    processes = children(trainer.pid)
    assert trainer.process.wait(30) == 1
    assert "FeedError: " in trainer.errors()
    trainer.nothing_is_left(processes)


def test_a_feed_that_is_not_closed(run):
    """The interpreter ends soon; Python may warn that it had to free shared memory."""
    trainer = run("leave")
    workers = trainer.workers(lambda process: process.name.startswith("input-"))
    processes = children(trainer.pid)
    assert trainer.process.stdout.readline() == "left\n"
    start = time.monotonic()
    assert trainer.process.wait(20) == 0
    assert time.monotonic() - start < 10
    assert "Traceback" not in trainer.errors()
    assert set(workers) < set(processes)
    trainer.nothing_is_left(processes)
