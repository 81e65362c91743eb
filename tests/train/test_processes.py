"""Real processes over loopback: they start, stop at one step, and none hangs when another is gone or stuck."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import jax
import numpy as np
import pytest

from fastervit_jax.train import loop, processes
from tests import QUICKLY
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def launch():
    """Starts Python with code or a script, one CPU device for each process, and ends those that are left."""
    started = []

    # One process of several would find its programs there, and wait in vain for those that compile.
    own = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}

    def start(code: str, *args: object, **environment: object) -> subprocess.Popen:
        what = [code] if code.endswith(".py") else ["-c", textwrap.dedent(code)]
        started.append(subprocess.Popen(
            [sys.executable, *what, *map(str, args)], cwd=ROOT, text=True,
            env={**own, "XLA_FLAGS": QUICKLY, **{name: str(value) for name, value in environment.items()}},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen, line: str) -> None:
    """Waits until a process has said that line."""
    for text in process.stdout:
        if text.strip() == line:
            return
    raise AssertionError(f"ended without {line!r}: {process.communicate()[1]}")


BODY = """
    import os, pathlib, sys, time
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from fastervit_jax.train import processes

    def total():
        return int(multihost_utils.process_allgather(np.int32(1 + jax.process_index())).sum())
"""
STOPPING = BODY + """
    port, process, saved = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
    with processes.started(coordinator=f"127.0.0.1:{port}", processes=2, process=process), processes.Stop() as stop:
        assert total() == 3
        print("works", flush=True)
        step, deadline = 1, time.monotonic() + 30
        while not stop.requested():
            assert time.monotonic() < deadline
            time.sleep([0.03, 0.002][process])  # one is ahead of the other
            step += 1
        print("stopped after", step, flush=True)
        if process == 0:
            time.sleep(2)  # saves for longer than the other
            saved.touch()
        raise processes.Stopped
"""


def listening(port: int) -> set[str]:
    """The last four bytes, in reverse, of the addresses on which something listens."""
    lines = [line.split() for name in ("tcp", "tcp6")
             for line in pathlib.Path("/proc/net", name).read_text().splitlines()]
    ends = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {address[-8:] for address, end in ends if int(end, 16) == port}


def test_a_signal_to_one_stops_both_after_the_same_step(launch, tmp_path):
    port = free_port()
    pair = [launch(STOPPING, port, process, tmp_path / "saved") for process in range(2)]
    for process in pair:
        said(process, "works")
    if sys.platform == "linux":
        assert listening(port) == {"0100007F"}  # 127.0.0.1 alone
    pair[1].send_signal(signal.SIGTERM)
    stopped = [process.stdout.readline() for process in pair]
    assert stopped[0].startswith("stopped after ")
    assert stopped[0] == stopped[1]
    pair[1].send_signal(signal.SIGTERM)  # once more, in the save
    assert pair[1].wait(timeout=300) == processes.EXIT_CODE
    assert (tmp_path / "saved").exists()  # so it has waited
    assert pair[0].wait(timeout=300) == processes.EXIT_CODE


# Started as Slurm would, as far as variables go.
WAITING = BODY + """
    with processes.started(distributed=True, heartbeat=3):
        assert total() == 3
        print("works", flush=True)
        if sys.argv[1:] == ["raises"]:
            raise ValueError("too hot")
        time.sleep(100)
"""


@pytest.mark.parametrize("end", ["raises", "is killed"])
def test_a_process_that_is_gone_ends_the_other(end, launch):
    port = free_port()
    slurm = {"SLURM_JOB_ID": 1, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": 2, "SLURM_STEP_NUM_TASKS": 2,
             "JAX_COORDINATOR_PORT": port, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    pair = [launch(WAITING, *(["raises"] if rank and end == "raises" else []), **slurm, SLURM_PROCID=rank,
                   SLURM_LOCALID=rank) for rank in range(2)]
    for process in pair:
        said(process, "works")
    before = time.monotonic()
    if end == "is killed":
        pair[1].kill()
    _, error = pair[1].communicate(timeout=300)
    if end == "raises":
        assert pair[1].returncode == 1
        assert "ValueError: too hot\nprocess 1 ends, and with it the run\n" in error
    assert pair[0].wait(timeout=300) == -signal.SIGABRT
    assert time.monotonic() - before < 40


def test_other_settings_are_refused(launch):
    code = """
        import sys
        from fastervit_jax.train import processes
        coordinator, process, settings = sys.argv[1:]
        with processes.started(coordinator=coordinator, processes=2, process=int(process), settings=settings):
            print("works")
    """
    coordinator = f"127.0.0.1:{free_port()}"
    pair = [launch(code, coordinator, process, settings) for process, settings in enumerate(["seed=0", "seed=1"])]
    outputs = [process.communicate(timeout=300) for process in pair]
    assert "ValueError: processes [1] have other settings, or another version of JAX, than" in outputs[0][1]
    assert pair[0].returncode == 1
    assert pair[1].returncode in (1, -signal.SIGABRT)  # if process 0 was gone before it had ended itself
    assert "works" not in outputs[0][0] + outputs[1][0]


@pytest.mark.parametrize(
    ("given", "environment", "message"),
    [
        ({"processes": 2}, {}, "--processes=2 without --coordinator and --process: expected all of"),
        ({"coordinator": "a:1", "process": 0}, {}, "--coordinator=a:1 --process=0 without --processes: expected all"),
        ({"distributed": True, "process": 0}, {}, "--distributed and --process=0: expected --distributed alone"),
        ({"coordinator": "a", "processes": 2, "process": 0}, {}, "--coordinator=a: expected HOST:PORT"),
        ({"coordinator": "a:0", "processes": 2, "process": 0}, {}, "--coordinator=a:0: expected HOST:PORT"),
        ({"coordinator": ":80", "processes": 2, "process": 0}, {}, "--coordinator=:80: expected HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, {}, "--process=2 of --processes=2: expected 0 to"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, {}, "--process=0 of --processes=0: expected 0 to"),
        ({"heartbeat": 0}, {}, "--heartbeat=0: expected seconds, at least 1"),
        ({}, {"SLURM_STEP_NUM_TASKS": "8"}, r"SLURM_STEP_NUM_TASKS=8 says .* one of 8 .* Expected --distributed, or"),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, r"OMPI_COMM_WORLD_SIZE=2 says .* one of 2 "),
        ({}, {"TPU_WORKER_HOSTNAMES": "t0,t1,t2"}, r"TPU_WORKER_HOSTNAMES=t0,t1,t2 says .* one of 3 "),
    ],
)
def test_contradictions(given, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"(?i){message}"), processes.started(**given):
        pass


def test_no_cluster(launch):
    """In a process of its own: JAX asks for the cluster only before it has used a device."""
    _, error = launch("""
        from fastervit_jax.train import processes
        with processes.started(distributed=True):
            print("started")
    """).communicate(timeout=300)
    assert re.search(r"ValueError: --distributed: JAX finds no cluster .* Expected to be started by srun", error)


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    with pytest.raises(SystemExit) as stopped, processes.started():
        raise processes.Stopped
    assert stopped.value.code == 75
    with pytest.raises(KeyError), processes.started():
        raise KeyError


def resolves_to(*address):
    kind = socket.AF_INET6 if len(address) == 4 else socket.AF_INET
    return lambda *args, **kwargs: [(kind, socket.SOCK_STREAM, 6, "", address)]


def test_the_coordinator_listens_on_its_address_alone(monkeypatch):
    assert processes.bind_address("127.0.0.1:80") == "127.0.0.1:80"
    assert processes.bind_address("localhost:80") in ("127.0.0.1:80", "[::1]:80")
    assert processes.bind_address("192.0.2.1:80") is None  # not ours
    assert processes.bind_address("no.such.host.invalid:80") is None
    monkeypatch.setattr(socket, "getaddrinfo", resolves_to("127.0.1.1", 0))
    assert processes.bind_address("node0:80") is None  # what others cannot reach
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing
        own = probe.getsockname()[0]
        monkeypatch.setattr(socket, "getaddrinfo", resolves_to(own, 0))
        assert processes.bind_address("node0:80") == f"{own}:80"
    if socket.has_dualstack_ipv6():
        monkeypatch.setattr(socket, "getaddrinfo", resolves_to("::1", 0, 0, 0))
        assert processes.bind_address("[::1]:80") == "[::1]:80"


def test_signals_to_the_only_process():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with processes.Stop() as stop:
        assert not stop.requested()
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        assert stop.requested()
        with pytest.raises(processes.Stopped):
            stop.check()
    with processes.Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


STUCK = """
    import ctypes, sys, time
    from fastervit_jax.train import processes

    def waits_for_ever():
        if sys.argv[1] == "alone":
            ctypes.PyDLL(None).sleep(100)  # lets no other thread run
        time.sleep(100)

    with processes.Watchdog(3.0) as watchdog:
        for _ in range(8):
            time.sleep(0.5)
            watchdog.alive()
        print("stuck", flush=True)
        waits_for_ever()
"""


def test_a_stuck_process_ends_with_stacks(launch):
    messages = {"beside others": "Nothing went on for 3 s (config.stuck_after)", "alone": "Timeout (0:00:03"}
    for process, message in [(launch(STUCK, how), message) for how, message in messages.items()]:
        out, error = process.communicate(timeout=300)
        assert out == "stuck\n"
        assert process.returncode == 1
        assert message in error
        assert " in waits_for_ever\n" in error.split(message)[1]


def test_a_watchdog_that_is_over_does_nothing():
    with processes.Watchdog(5.0):
        threads = {thread.name for thread in threading.enumerate()}
    assert "watchdog" in threads
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ValueError, match=r"config.stuck_after=0.0: expected seconds, more than 0"):
        processes.Watchdog(0.0)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.large)])
def test_training_is_stopped_and_goes_on_with_any_number_of_processes(count, launch, tmp_path):
    def together() -> list[subprocess.Popen]:
        port = free_port()
        return [launch("train.py", f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={process}",
                       f"--workdir={tmp_path / 'run'}", *runs.FLAGS, XLA_FLAGS=QUICKLY) for process in range(count)]

    def ended(running: list[subprocess.Popen], code: int) -> list[str]:
        outputs = [process.communicate(timeout=600) for process in running]
        for process, (_, error) in zip(running, outputs, strict=True):
            assert process.returncode == code, error
        return [out for out, _ in outputs]

    running = together()
    while not (tmp_path / "run/metrics.jsonl").exists() or not runs.lines(tmp_path / "run"):
        assert running[0].poll() is None, running[0].communicate()[1]
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    first, *others = ended(running, processes.EXIT_CODE)
    assert "saved after step " in first
    assert not any("saved" in out for out in others)  # one speaks for all
    shutil.copytree(tmp_path / "run", tmp_path / "alone")

    assert "going on after step " in ended(together(), 0)[0]
    loop.train(runs.config(), tmp_path / "alone", jax.devices()[:1])
    loop.train(runs.config(), tmp_path / "whole", jax.devices()[:1])
    whole = runs.lines(tmp_path / "whole")
    for workdir in (tmp_path / "run", tmp_path / "alone"):
        written = runs.lines(workdir)
        assert [line.keys() for line in written] == [line.keys() for line in whole]
        for line, expected in zip(written, whole, strict=True):
            assert line["step"] == expected["step"]
            for name in {"train/loss", "eval/loss"} & line.keys():
                np.testing.assert_allclose(line[name], expected[name], rtol=1e-4, err_msg=f"{name} at {line['step']}")
