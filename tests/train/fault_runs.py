"""Runs of train.py for `faults` to happen to, and what is left of them."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tests import QUICKLY
from tests.train.test_processes import free_port

ROOT = pathlib.Path(__file__).parents[2]
STEPS_PER_EPOCH, STEPS = 5, 30
# The averages, which are what is evaluated, get better each epoch, so that no evaluation can be left out unseen.
CHANGES = {
    "batch_size": 32, "epochs": 6, "warmup_epochs": 0, "learning_rate": 0.004, "ema_decay": 0.5, "log_every_steps": 2,
    "eval_every_epochs": 1, "data.image_size": 32, "data.train_split": "train[:12%]", "model.dim": 8,
    "model.in_dim": 8, "model.depths": (1, 1, 1, 1), "model.hat": (False,) * 4,
}  # fmt: skip
FLAGS = [f"--config.{key}={value}" for key, value in CHANGES.items()]
STOPPED = 75
HEARTBEAT = 10
PATIENCE = 900
"""Seconds, on a busy machine, after which a run is taken to hang."""
UNFINISHED = ".orbax-checkpoint-tmp"


class Unexpected(Exception):
    """Something that is not to happen."""


class Run:
    """A run, in one process or several: its workdir, and what is at work on it."""

    def __init__(self, workdir: pathlib.Path, logs: pathlib.Path, cache: str, *flags: str, processes: int = 1,
                 program: Sequence[str] = ("train.py",)):
        self.workdir, self.processes, self.flags, self.program = workdir, processes, flags, program
        self.logs = logs
        self.logs.mkdir(parents=True)
        self.starts, self.running, self.done = 0, [], []
        self.environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": QUICKLY}  # each process has one device

    def start(self) -> None:
        self.starts += 1
        self.started = time.time()
        self.running, port, group = [], free_port(), 0
        for i in range(self.processes):
            place = [f"--coordinator=127.0.0.1:{port}", f"--processes={self.processes}", f"--process={i}",
                     f"--heartbeat={HEARTBEAT}"]
            command = [sys.executable, *self.program, f"--workdir={self.workdir}", *FLAGS,
                       *(place if self.processes > 1 else []), *self.flags]
            with self.log_path(i).open("wb") as log:
                self.running.append(subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=log, stderr=log,
                                                     process_group=group))
            group = group or self.running[0].pid

    def log_path(self, process: int) -> pathlib.Path:
        return self.logs / f"{self.starts}.{process}"

    def log(self, process: int = 0) -> str:
        """What a process has said since the last start."""
        return self.log_path(process).read_text(errors="replace")

    def until(self, what: Callable[[], bool]) -> bool:
        """Waits for it; whether it came before the end of all processes."""
        deadline = time.monotonic() + PATIENCE
        while not what():
            if all(process.poll() is not None for process in self.running):
                return what()
            if time.monotonic() > deadline:
                raise Unexpected(f"nothing for {PATIENCE} s")
            time.sleep(0.005)
        return True

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit codes of all processes."""
        deadline = time.monotonic() + seconds
        for process in self.running:
            try:
                process.wait(max(deadline - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                raise Unexpected(f"still there after {seconds:.0f} s") from None
        return [process.returncode for process in self.running]

    def kill(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()

    def signal(self, number: int, process: int | None) -> None:
        """To one process, or to all."""
        if process is None:
            os.killpg(self.running[0].pid, number)
        else:
            self.running[process].send_signal(number)

    def begun(self) -> bool:
        return bool(re.search(r"starting in |going on after step ", self.log()))

    def saving(self) -> bool:
        """Not what a killed start left, which stays until the next save."""
        for path in self.unfinished():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime > self.started:
                    return True
        return False

    def unfinished(self) -> list[pathlib.Path]:
        """What saves that are going on, or were killed, have written so far."""
        return list((self.workdir / "checkpoints").glob(f"*{UNFINISHED}*"))

    def step(self) -> int:
        """The last one in metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)

    def saved(self) -> list[int]:
        return sorted(int(path.name) for path in (self.workdir / "checkpoints").glob("*") if path.name.isdecimal())

    def meta(self, step: int) -> dict:
        return json.loads((self.workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())

    def end(self) -> dict:
        """What is to be the same in two runs."""
        step = self.saved()[-1]
        meta = self.meta(step)
        files = {name: (self.workdir / name).read_bytes() for name in ("metrics.jsonl", "best.safetensors")}
        return {"step": step, "best": meta["best"], **meta["digests"], **files, "unfinished": len(self.unfinished())}


def differences(end: dict, expected: dict) -> str:
    names = [name for name in {**expected, **end} if end.get(name) != expected.get(name)]
    return f"{len(names)} of {len(expected)} differ: {', '.join(names[:4])}" if names else ""
