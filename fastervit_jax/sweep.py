"""Run a sweep: every point of a list of overrides with every seed, one run after the other, or a slice of them.

    python -m fastervit_jax.sweep configs/sweeps/window_and_carrier.py --workdir=runs/window_and_carrier
    python -m fastervit_jax.sweep configs/sweeps/window_and_carrier.py --workdir=DIR --dry-run --config.epochs=20
    python -m fastervit_jax.sweep configs/sweeps/window_and_carrier.py --workdir=DIR --index=3 --of=16
    python -m fastervit_jax.sweep --workdir=DIR --result

The same command goes on where it stopped. docs/ablate.md says how to write a sweep, and what is in the workdir. The
exit code is 0 if all runs of the slice are done, 1 if some failed or nothing could start, 75 if it is to be started
again.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.extend.core import Var
from ml_collections import ConfigDict

from fastervit_jax import sweep_result
from fastervit_jax.data import sources
from fastervit_jax.sweep_points import Run, SweepError, listed, load
from fastervit_jax.sweep_run import sizes
from fastervit_jax.train import metrics, processes, sharding
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.state import abstract_state, make_model

PROGRAM = (sys.executable, "-m", "fastervit_jax.sweep_run")


# Which of them are this job's


def which_slice(index: int | None, of: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(index, of): this job has the runs index, index + of, index + 2 of, ... of the sweep's.

    As given, else from the environment of a Slurm array or of an indexed job of Kubernetes, else (0, 1). Slurm's ids
    are counted from the array's first, in its steps. Raises SweepError where these do not make a slice.
    """
    if index is not None and of is None:
        raise SweepError(f"--index={index} without --of: expected --of=JOBS, the number of slices")
    if index is not None:
        found, where = (index, of), f"--index={index} --of={of}"
    elif "SLURM_ARRAY_TASK_ID" in environment:
        if of is not None:
            raise SweepError(f"--of={of} in a Slurm array, which says it itself: expected neither --index nor --of, or "
                             "both")
        names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT")]
        where = ", ".join(f"{name}={environment.get(name)}" for name in names)
        try:
            task, low, high, step, count = (int(environment[name]) for name in names)
        except (KeyError, ValueError) as error:
            raise SweepError(f"{where}: expected five whole numbers of Slurm; give --index and --of instead") from error
        if step < 1 or (high - low) // step + 1 != count or (task - low) % step:
            raise SweepError(f"{where}: not all ids of a range; expected an array as 0-15 or 1-31:2, of which tasks "
                             "that failed are started again by starting all; or give --index and --of")
        found = (task - low) // step, count
    elif "JOB_COMPLETION_INDEX" in environment:
        where = f"JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']}"
        if of is None:
            raise SweepError(f"{where} without --of: expected --of=COMPLETIONS, which Kubernetes does not tell")
        found, where = (int(environment["JOB_COMPLETION_INDEX"]), of), f"{where} --of={of}"
    elif of is not None:
        raise SweepError(f"--of={of} without --index: expected --index=I, from 0 to {of - 1}")
    else:
        return 0, 1
    if not 0 <= found[0] < found[1]:
        raise SweepError(f"{where}: expected an index from 0 to one less than the number of slices")
    return found


# What they would take


def estimate(config: ConfigDict) -> dict[str, int | float]:
    """Parameters, GFLOPs, and GiB of training on each device; compiles nothing.

    `state_gib`: parameters, batch statistics, optimiser, averages, gradients. `backward_gib`: what the forward pass
    leaves for the backward pass, as JAX does it without a compiler, which keeps less where it fuses operations. The
    devices are those that config.mesh asks for, one along an axis of -1; JAX must have as many, of any kind.
    """
    model, optimizer = make_model(config), make_optimizer(config)
    data, fsdp = _mesh(config)
    mesh = sharding.make_mesh(jax.devices()[: data * fsdp], data=data, fsdp=fsdp)
    state = abstract_state(model, optimizer, config, mesh)
    images = max(1, config.batch_size // (data * fsdp) // config.accumulate)
    shape = (images, *sources.image_sides(config), model.config.in_chans)
    batch = jax.ShapeDtypeStruct(shape, jnp.float32)

    def kept(params: Any, batch_stats: Any, batch: Any) -> list[Any]:
        def forward(params: Any) -> Any:
            return model.apply({"params": params, "batch_stats": batch_stats}, batch, train=True,
                               rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"])

        return jax.tree.leaves(jax.vjp(forward, params, has_aux=True)[1])

    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state.params, state.batch_stats))
    traced = jax.make_jaxpr(kept)(*plain, batch).jaxpr
    of_state = set(traced.invars[:-1])
    # Each value once, as results may be the same one, and without those of the state.
    values = {x for x in traced.outvars if isinstance(x, Var) and x not in of_state}
    in_state, gradients = (sum(_bytes_a_device(x) for x in jax.tree.leaves(tree)) for tree in (state, state.params))
    figures = {"state_gib": (in_state + gradients) / 2**30,
               "backward_gib": sum(x.aval.size * x.aval.dtype.itemsize for x in values) / 2**30}
    return sizes(config) | figures | {"training_gib": sum(figures.values()), "devices": data * fsdp}


def _mesh(config: ConfigDict) -> tuple[int, int]:
    return max(1, config.mesh.data), max(1, config.mesh.fsdp)


def _bytes_a_device(x: jax.ShapeDtypeStruct) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def dry_run(runs: Sequence[Run], workdir: pathlib.Path) -> str:
    """A line a run."""
    estimates = {}
    for run in runs:
        if run.point not in estimates:
            estimates[run.point] = estimate(run.config)
    names = ("parameters", "gflops", "state_gib", "backward_gib", "training_gib")
    rows = [["run", "parameters", "GFLOPs", "state, GiB", "backward, GiB", "training, GiB", "devices", ""]]
    for run in runs:
        folder, found = workdir / "runs" / run.name, estimates[run.point]
        there = "done" if (folder / "result.json").exists() else "begun" if folder.exists() else ""
        rows.append([run.name, *(f"{found[name]:,.0f}" if name == "parameters" else f"{found[name]:,.3f}"
                                 for name in names), str(found["devices"]), there])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                  zip(row[1:], widths[1:], strict=True))]).rstrip() for row in rows]
    return "\n".join([
        *lines, f"{len(runs)} runs of {len(estimates)} points. Memory is an estimate for each device, from shapes:",
        "the state with gradients, and what the forward pass leaves for the backward pass. A compiled program keeps",
        "less of that, and needs room of its own."])


# The runs


def check_workdir(workdir: pathlib.Path, runs: Sequence[Run]) -> None:
    """Raises SweepError if the workdir holds something else, or a run of another config, OSError if it is no folder."""
    if not workdir.exists():
        return
    there = {path.name for path in workdir.iterdir()}  # raises if it is a file, or unreadable
    if "sweep.json" not in there:
        if found := there & {"config.json", "metrics.jsonl", "checkpoints", "runs"}:
            raise SweepError(f"{workdir} has {', '.join(sorted(found))} but no sweep.json, so it holds something else "
                             "than a sweep; give another --workdir")
        return
    mine, problems = {run.name: run.entry() for run in runs}, []
    for entry in sweep_result.read_sweep(workdir):
        name = entry["name"]
        if name not in mine:
            problems.append(f"run {name} is there, but not in this sweep")
            continue
        theirs, ours = (flatten_dict(x["config"], sep=".") for x in (entry, mine[name]))
        swept = {*entry["overrides"], *mine[name]["overrides"]}
        problems += [f"run {name}: {key}: there {theirs.get(key, 'nothing')!r}, given {ours.get(key, 'nothing')!r}"
                     for key in sorted({*theirs, *ours} - set(metrics.FREE) | swept)
                     if theirs.get(key) != ours.get(key)]
    if problems:
        raise SweepError(listed(f"{workdir} holds another sweep:", problems) + "\nGive the same sweep file, with the "
                         "same --config.KEY=VALUE changes, or another --workdir. Points and seeds may be added.")


class Interrupted:
    """SIGTERM and Ctrl-C, while in it, are passed to the run under way as SIGTERM, and remembered."""

    def __init__(self) -> None:
        self.requested, self._child = False, None

    def __enter__(self) -> "Interrupted":
        self._before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self._child is not None:
            self._child.send_signal(signal.SIGTERM)

    def wait(self, child: subprocess.Popen) -> int:
        """Its exit code, negative for a signal."""
        self._child = child
        if self.requested:
            child.send_signal(signal.SIGTERM)
        code = child.wait()
        self._child = None
        return code


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[int | None]:
    """A file that only this process has, and those it is handed to, until the last of them ends; None: another has."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


def run_all(runs: Sequence[Run], workdir: pathlib.Path) -> int:
    """One after the other, each in a process of its own; prints a line for each. Returns the exit code."""
    failed, elsewhere, stopped = [], [], False

    def tell_result(run: Run, head: str, form: str) -> None:
        try:
            print(f"{head} {form.format(_outcome(workdir / 'runs' / run.name))}", flush=True)
        except ValueError as error:
            failed.append(f"{run.name}: {error}")
            print(f"{head} failed: {error}", flush=True)

    with Interrupted() as interrupted:
        for number, run in enumerate(runs, 1):
            if interrupted.requested:
                break
            folder, head = workdir / "runs" / run.name, f"[{number}/{len(runs)}] {run.name}:"
            if (folder / "result.json").exists():
                tell_result(run, head, "done before, {}")
                continue
            folder.mkdir(parents=True, exist_ok=True)
            log, start = folder / "log.txt", time.monotonic()
            with locked(folder) as lock, log.open("ab") as output:
                if lock is None:
                    elsewhere.append(f"{run.name}: {log}")
                    print(f"{head} another process is at it", flush=True)
                    continue
                if (folder / "result.json").exists():  # since the look above, by another process
                    tell_result(run, head, "done before, {}")
                    continue
                print(f"{head} {'goes on' if (folder / 'checkpoints').exists() else 'starts'}", flush=True)
                command = [*PROGRAM, str(workdir), run.name, f"--parent={os.getpid()}"]
                output.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(command)}\n".encode())
                output.flush()
                child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                                         pass_fds=[lock])
                code = interrupted.wait(child)
            seconds = f"{time.monotonic() - start:,.0f} s"
            if code == 0 and (folder / "result.json").exists():
                tell_result(run, head, f"{{}}, {seconds}")
            elif interrupted.requested or code == processes.EXIT_CODE:
                print(f"{head} stopped after {seconds}; the same command goes on", flush=True)
                stopped = True
                break
            else:
                why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                why += ", out of memory perhaps" if code == -signal.SIGKILL else ""
                failed.append(f"{run.name}: {why}, {log}")
                print(f"{head} failed after {seconds}: {why}", flush=True)
    if elsewhere:
        print(listed("Another process is at these runs:", elsewhere))
    if failed:
        print(listed("These runs failed. Those that ended are tried again by the same command:", failed))
    if interrupted.requested or stopped:
        return processes.EXIT_CODE
    return 1 if failed else processes.EXIT_CODE if elsewhere else 0


def _outcome(folder: pathlib.Path) -> str:
    result = sweep_result.read_result(folder)
    return f"top-1 {result['acc1']:.3f} %, loss {result['loss']:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastervit_jax.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--config.KEY=VALUE changes the base config, as for train.py.", allow_abbrev=False)
    parser.add_argument("sweep", nargs="?", metavar="SWEEP", help="the sweep file; left out with --result")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the sweep")
    parser.add_argument("--index", type=int, help="this job's slice, from 0")
    parser.add_argument("--of", type=int, help="number of slices")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they take; write nothing")
    parser.add_argument("--result", action="store_true", help="draw the result of what there is so far; run nothing")
    given, changes = parser.parse_known_args(arguments)
    if wrong := [change for change in changes if not re.match(r"--config\.[^=]+=", change)]:
        parser.error(f"unexpected {' '.join(wrong)}; the config is changed with --config.KEY=VALUE")
    others = {"the sweep file": given.sweep is not None, "--index": given.index is not None,
              "--of": given.of is not None, "--dry-run": given.dry_run, " ".join(changes): bool(changes)}
    if given.result and any(others.values()):
        parser.error(f"--result draws all that is in the workdir: leave out "
                     f"{', '.join(name for name, there in others.items() if there)}; expected --workdir=DIR --result")
    if given.sweep is None and not given.result:
        parser.error("expected a sweep file, as configs/sweeps/window_and_carrier.py")
    try:
        if given.result:
            return print(sweep_result.write(given.workdir))
        runs = load(given.sweep, changes)
        index, of = which_slice(given.index, given.of, os.environ)
        check_workdir(given.workdir, runs)
        if given.dry_run:
            jax.config.update("jax_platforms", "cpu")  # the accelerator is for runs
            if (devices := max(math.prod(_mesh(run.config)) for run in runs)) > 1:
                jax.config.update("jax_num_cpu_devices", devices)
            return print(dry_run(runs[index::of], given.workdir))
        given.workdir.mkdir(parents=True, exist_ok=True)
        with processes.started():  # raises if this is one of several that do not know of each other
            sweep_result.replace(given.workdir / "sweep.json", json.dumps(
                {"sweep": pathlib.Path(given.sweep).stem, "runs": [run.entry() for run in runs]}, indent=1) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    code = run_all(runs[index::of], given.workdir)
    try:
        print(sweep_result.write(given.workdir))
    except (ValueError, OSError) as error:
        sys.exit(f"The result could not be written: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
