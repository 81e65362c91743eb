"""Several processes as one run: how they start, how they stop together, and what ends one that hangs."""

import contextlib
import faulthandler
import hashlib
import ipaddress
import itertools
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""Of a run that was asked to stop, has saved its state, and is to be started again: EX_TEMPFAIL of sysexits.h."""
HEARTBEAT = 100
"""Seconds without a sign of life after which a process is taken for dead, and the others end."""
TASKS = {
    "SLURM_STEP_NUM_TASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda value: len(value.split(",")),
}
"""Variables with which schedulers say how many processes they have started, and how that is read from them."""
_POLLS = itertools.count(1)  # one count for the process, as JAX has one agreement on the poll to stop at


class Stopped(SystemExit):
    """Ends a run that was asked to stop, with EXIT_CODE, after its state was saved."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


@contextlib.contextmanager
def started(
    *, coordinator: str | None = None, processes: int | None = None, process: int | None = None,
    distributed: bool = False, heartbeat: int = HEARTBEAT, settings: str = "",
) -> Iterator[None]:
    """Run the body as one of several processes, to be entered before JAX uses a device.

    Nothing given: as the only process. `coordinator` ("HOST:PORT", on which process 0 will listen), `processes` (how
    many) and `process` (which, from 0): as that one. `distributed`: as the cluster's environment says, through JAX,
    which knows Slurm, Open MPI, Cloud TPU and Kubernetes. `settings` is what all have to be given alike.

    Where there are several, a body that raises ends the process at once with code 1, so that the others do not wait
    for it: they end within `heartbeat` seconds. One that ends well, or with Stopped, waits for the others' end.

    Raises ValueError for arguments that contradict each other, what the environment says, or other processes'.
    """
    explicit = {"coordinator": coordinator, "processes": processes, "process": process}
    _check(explicit, distributed, heartbeat)
    if distributed:
        try:
            jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
        except ValueError as error:
            raise ValueError(
                f"--distributed: JAX finds no cluster in the environment ({error}). Expected to be started by srun, by "
                "mpirun, on a Cloud TPU pod, or in a Job of Kubernetes with the package kubernetes; elsewhere give "
                "--coordinator=HOST:PORT --processes=N --process=I instead") from error
    elif coordinator is not None:
        # JAX aborts, and does not say for what, if the others do not come.
        print(f"process {process} of {processes}: joining the others at {coordinator}", file=sys.stderr, flush=True)
        jax.distributed.initialize(
            coordinator, processes, process, cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=heartbeat,
            coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or bind_address(coordinator))
    try:
        if jax.distributed.is_initialized() and jax.process_count() > 1:
            _meet(settings)
        yield
    except BaseException as error:
        ends_well = isinstance(error, SystemExit) and error.code in (None, 0, EXIT_CODE)
        if ends_well or not jax.distributed.is_initialized():
            raise
        # Python's own way out would wait five minutes for processes that wait for this one.
        traceback.print_exc()
        print(f"process {jax.process_index()} ends, and with it the run", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _check(explicit: dict[str, Any], distributed: bool, heartbeat: int) -> None:
    given = [f"--{name}={value}" for name, value in explicit.items() if value is not None]
    missing = [f"--{name}" for name, value in explicit.items() if value is None]
    if distributed and given:
        raise ValueError(f"--distributed and {' '.join(given)}: expected --distributed alone, to take them from the "
                         "cluster's environment, or --coordinator, --processes and --process without it")
    if given and missing:
        raise ValueError(f"{' '.join(given)} without {' and '.join(missing)}: expected all of --coordinator=HOST:PORT "
                         "--processes=N --process=I, or none of them")
    if given:
        host, _, port = explicit["coordinator"].rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"--coordinator={explicit['coordinator']}: expected HOST:PORT, with a free port of the "
                             "machine of process 0, say 10.0.0.1:1234")
        if not 0 <= explicit["process"] < explicit["processes"]:
            raise ValueError(f"--process={explicit['process']} of --processes={explicit['processes']}: expected 0 to "
                             "--processes less 1")
    if heartbeat < 1:
        raise ValueError(f"--heartbeat={heartbeat}: expected seconds, at least 1")
    if not given and not distributed:
        for name, read in TASKS.items():
            if name in os.environ and read(os.environ[name]) > 1:
                raise ValueError(
                    f"{name}={os.environ[name]} says that this is one of {read(os.environ[name])} processes, but they "
                    "were not asked to work together, and would all write into one workdir. Expected --distributed, or "
                    "--coordinator=HOST:PORT --processes=N --process=I; for processes that have nothing to do with "
                    f"each other unset {name}")


def _meet(settings: str) -> None:
    # Besides, it connects them while they are at the same point: on CPUs the one that is there first gives up after
    # half a minute, and they may take longer than that to compile, one with a cache and the other without.
    digest = np.frombuffer(hashlib.sha256(f"jax {jax.__version__} {settings}".encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    others = [process for process, other in enumerate(digests) if (other != digests[0]).any()]
    if others:
        raise ValueError(f"processes {others} have other settings, or another version of JAX, than process 0; expected "
                         "the same command for all, but for --process")


def bind_address(coordinator: str) -> str | None:
    """Where process 0 is to listen: on the coordinator's address alone, if that is surely one of this machine's.

    None, for all interfaces, where the name does not resolve here, belongs to another machine (a proxy in front of
    this one), or is not "localhost" and yet leads to the loopback interface, as Debian has it for a machine's own name.
    """
    host, _, port = coordinator.rpartition(":")
    try:
        kind, _, _, _, address = socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM)[0]
    except OSError:
        return None
    loopback = ipaddress.ip_address(address[0].partition("%")[0]).is_loopback
    if loopback and host != "localhost" and not _is_address(host.strip("[]")):
        return None
    with socket.socket(kind, socket.SOCK_STREAM) as probe:
        try:
            probe.bind(address)
        except OSError:
            return None
    return f"[{address[0]}]:{port}" if kind == socket.AF_INET6 else f"{address[0]}:{port}"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Stop:
    """Knows whether the run was asked to stop: by SIGTERM to any of its processes, or by Ctrl-C.

    A context manager, entered in the main thread; until then signals do what they always do, but for SIGTERM to one of
    several processes, which JAX keeps for `requested`. After the first Ctrl-C a second one interrupts at once.
    """

    def __init__(self) -> None:
        self._requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Stop":
        if jax.process_count() > 1 and not jax.distributed.is_initialized():
            raise RuntimeError(f"this is one of {jax.process_count()} processes, which do not know of each other's "
                               "signals; expected --distributed")
        self._handle(signal.SIGINT, self._interrupted)
        if not jax.distributed.is_initialized():  # where it is, JAX's own handler is to stay
            self._handle(signal.SIGTERM, self._terminated)
        return self

    def _handle(self, number: signal.Signals, handler: Any) -> None:
        self._before[number] = signal.signal(number, handler)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        os.write(2, b"\nInterrupted: the state will be saved. Once more ends the run at once.\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.raise_signal(signal.SIGTERM)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        self._requested = True

    def requested(self) -> bool:
        """Whether to stop here. All processes are to ask equally often, in the same places, and get the same answer.

        Asking costs less than a microsecond. Once it is True it stays so.
        """
        if not self._requested and jax.distributed.is_initialized():
            self._requested = multihost_utils.reached_preemption_sync_point(next(_POLLS))
        return self._requested

    def check(self) -> None:
        """Raises Stopped if `requested`, which is asked with it."""
        if self.requested():
            raise Stopped

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Watchdog:
    """Ends the process, with the stacks of all threads on stderr and code 1, if `alive` is not called for long.

    A context manager, one at a time. It uses faulthandler's timer, too, for a thread that never lets others run.
    """

    def __init__(self, seconds: float):
        if not 0 < seconds < threading.TIMEOUT_MAX:
            raise ValueError(f"config.stuck_after={seconds}: expected seconds, more than 0")
        self._seconds = seconds
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def __enter__(self) -> "Watchdog":
        self.alive()
        self._thread.start()
        return self

    def alive(self) -> None:
        """Something went on: a step, a batch of an evaluation. Costs next to nothing."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        often = min(self._seconds / 10, 5.0)
        while True:
            faulthandler.dump_traceback_later(self._seconds + often, exit=True, file=2)
            if self._closed.wait(often):
                return faulthandler.cancel_dump_traceback_later()
            if time.monotonic() - self._last >= self._seconds:
                os.write(2, f"\nNothing went on for {self._seconds:g} s (config.stuck_after), so the run is ended. "
                            "What each thread was doing:\n".encode())
                faulthandler.dump_traceback(file=2, all_threads=True)
                os._exit(1)

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()
