"""Checkpoints of processes of their own: a full disk, sudden death, several that decide as one."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from tests import QUICKLY
from tests.train import faults
from tests.train.damage import folders, same
from tests.train.test_processes import free_port

ROOT = pathlib.Path(__file__).parents[2]

FULL = """
    import json, os, pathlib, signal, sys
    from fastervit_jax.train import checkpoint, sharding
    from tests.train.damage import make_state, same

    states = {step: make_state(step, sharding.make_mesh()) for step in (1, 2, 3, 4)}
    small, killed = map(pathlib.Path, sys.argv[1:])
    told = []
    with checkpoint.Checkpoints(small, keep=4, keep_best=True, say=told.append) as checkpoints:
        checkpoints.save(states[1], 1, wait=True)
        room = 150_000
        with open(small / "ballast", "wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(4096))
            except OSError:
                ballast.truncate(ballast.tell() - room)
        checkpoints.save(states[2], 2)
        checkpoints._wait()
        free = os.statvfs(small).f_bavail * os.statvfs(small).f_frsize
        (small / "ballast").unlink()
        checkpoints.save(states[3], 3)
        checkpoints.save(states[4], 4)
    with checkpoint.Checkpoints(small, keep=4, keep_best=True, say=told.append) as checkpoints:
        restored = same(checkpoints.restore(states[1])[0], states[4])
    print(json.dumps([told, sorted(os.listdir(small / "checkpoints")), restored, free > room - 10_000]))
"""
KILLED = """
    sys.stdout.flush()
    with checkpoint.Checkpoints(killed, keep=4, keep_best=True, say=print) as checkpoints:
        checkpoints.save(states[1], 1, wait=True)
        checkpoint._finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints.save(states[2], 2)
"""


def test_full_disk_and_sudden_death(opened, states, tmp_path):
    code = textwrap.dedent(FULL) + textwrap.dedent(KILLED)
    with faults.small_disk(tmp_path / "small", "2m") as (small, error):
        if error:  # only root can mount one; as root the test runs
            pytest.skip(f"a small disk cannot be mounted: {error}")
        done = subprocess.run([sys.executable, "-c", code, small, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (told, *rest), = map(json.loads, done.stdout.splitlines())
    assert rest == [["1", "3", "4"], True, True]
    assert len(told) == 1
    assert told[0].startswith("the save of step 2 failed (")
    assert told[0].endswith("; nothing of it is kept. The newest checkpoint is that of step 1")
    assert "No space left on device" in told[0]

    unfinished = folders(tmp_path)
    assert unfinished[0] == "1"
    assert [name.partition(".")[0] for name in unfinished] == ["1", "2"]
    with opened() as checkpoints:
        assert same(checkpoints.restore(states[2])[0], states[1])
        checkpoints.save(states[2], 2)
    assert folders(tmp_path) == ["1", "2"]


SEVERAL = """
    import json, pathlib, shutil, sys
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from fastervit_jax.train import checkpoint, processes, sharding
    from tests.train.damage import make_state

    port, process, workdir = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
    told, write, read = [], checkpoint._write, checkpoint._read

    def failing(*_):
        raise OSError("only here")

    def same(x, y):
        return all(np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
                   for x, y in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
                   for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True))

    with processes.started(coordinator=f"127.0.0.1:{port}", processes=2, process=process):
        mesh = sharding.make_mesh(data=2, fsdp=2)
        mesh = jax.sharding.Mesh(mesh.devices.T, mesh.axis_names, axis_types=mesh.axis_types)  # both have halves
        states = {step: make_state(step, mesh) for step in range(1, 6)}
        with checkpoint.Checkpoints(workdir, keep=9, keep_best=True, say=told.append) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(states[step], step, acc1=0.1 * step)
            checkpoints._wait()
            checkpoint._write = failing if process else write
            checkpoints.save(states[4], 4)
            checkpoints._wait()
            checkpoint._write = write
            checkpoints.save(states[5], 5)
        found = []
        if process == 0:
            file = max((workdir / "checkpoints" / "5").rglob("ocdbt.process_1/d/*"), key=lambda x: x.stat().st_size)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 16
            file.write_bytes(content)
        multihost_utils.sync_global_devices("damaged")
        for fails in (False, True):
            if fails and process:
                checkpoint._read = lambda *args: failing() if args[0].name == "3" else read(*args)
            with checkpoint.Checkpoints(workdir, keep=9, keep_best=True, say=told.append) as checkpoints:
                state, meta = checkpoints.restore(states[1])
                found.append([meta["step"], same(state, states[meta["step"]]), checkpoints.latest])
    print(json.dumps([found, told]))
"""


def test_several_processes_decide_as_one(tmp_path):
    port = free_port()
    environment = {**os.environ, "XLA_FLAGS": f"{QUICKLY} --xla_force_host_platform_device_count=2"}
    running = [subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SEVERAL), str(port), str(process), tmp_path], cwd=ROOT, text=True,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for process in (0, 1)]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(error for _, error in outputs)
    (found, told), other = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    assert other == [found, told]
    assert found == [[3, True, 3], [2, True, 2]]
    assert folders(tmp_path) == ["1", "2", "damaged_3", "damaged_5"]
    assert len(told) == 3
    assert "the save of step 4 failed (process 1: OSError: only here)" in told[0]
    assert "the checkpoint of step 5 is damaged (process " in told[1]
    assert "the checkpoint of step 3 is damaged (process 1: OSError: only here)" in told[2]
