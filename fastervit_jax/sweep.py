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
import dataclasses
import difflib
import fcntl
import json
import math
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax.traverse_util import flatten_dict
from jax.extend.core import Var
from ml_collections import ConfigDict, config_flags

from fastervit_jax import sweep_result
from fastervit_jax.data import sources
from fastervit_jax.model.variants import list_models
from fastervit_jax.sweep_run import sizes
from fastervit_jax.train import loop, metrics, processes, sharding
from fastervit_jax.train.check import check
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.state import abstract_state, make_model

LABEL = "label"
PROGRAM = (sys.executable, "-m", "fastervit_jax.sweep_run")
LONGEST_NAME = 150
"""Characters of a run's name, which is that of its folder."""


class SweepError(ValueError):
    """The sweep cannot be run as it is; the message says all that is wrong."""


@dataclasses.dataclass(frozen=True)
class Run:
    """`point` counts from 0. `shown` is what the result has of the swept keys, see `_shown`."""

    name: str
    point: int
    label: str | None
    shown: dict[str, Any]
    overrides: dict[str, Any]
    seed: int
    config: ConfigDict

    def entry(self) -> dict[str, Any]:
        """As sweep.json has it."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.loads(json.dumps(named | {"config": json.loads(self.config.to_json())}))


# What is to be run


def load(path: str, changes: Sequence[str] = ()) -> list[Run]:
    """All runs of a sweep file, point by point, with the seeds of a point in a row. Starts and writes nothing.

    `changes` are flags of the form --config.KEY=VALUE, for every run. The data is opened, as training does. Raises
    FileNotFoundError if there is no such file, SweepError that lists everything that is wrong with the file, its base
    config or its points.
    """
    if not pathlib.Path(path).is_file():
        near = [str(x) for x in sorted(pathlib.Path("configs/sweeps").glob("[a-z]*.py")) if x.stem != "common"]
        raise FileNotFoundError(f"{path}: no such sweep file" + (f"; there are {', '.join(near)}" if near else ""))
    module = _called(path, lambda: runpy.run_path(path))
    missing = [f"{name}{'' if name == 'SEEDS' else '()'}" for name in ("get_config", "get_points", "SEEDS")
               if name not in module]
    if missing:
        raise SweepError(f"{path} has no {' and no '.join(missing)}: expected get_config(), which returns the base "
                         "config, get_points(), which returns a list of overrides, and SEEDS = (0, 1), say")
    points = _called(path, lambda: _whole(module["get_points"]()))
    if not (points and isinstance(points, list)) or not all(isinstance(point, Mapping) for point in points):
        raise SweepError(f"{path}: get_points() returned {points!r}; expected a list of dicts as "
                         '{"model.ct_size": 2}, at least one')
    seeds = _whole(module["SEEDS"])
    if not (isinstance(seeds, list) and seeds and all(type(x) is int and x >= 0 for x in seeds)
            and len(set(seeds)) == len(seeds)):
        raise SweepError(f"{path}: SEEDS={module['SEEDS']}: expected whole numbers of at least 0, each once, as (0, 1)")
    base = _called(path, module["get_config"])
    if not isinstance(base, ConfigDict):
        raise SweepError(f"{path}: get_config() returned {base!r}; expected a ConfigDict, as those of configs/ do")
    base = _changed(base, changes)
    swept = {"seed", *(key for point in points for key in point)}
    if lost := [change for change in changes if change.partition("=")[0].removeprefix("--config.") in swept]:
        raise SweepError(f"{' '.join(lost)}: the sweep sets it itself; change it in {path}")

    configs, problems, opened = [], [], {}
    for number, point in enumerate(points):
        config, wrong = _config(base, point)
        configs.append(config)
        if config is not None:
            wrong = _wrong_inputs(config, opened)
        problems += [f"point {number}, {dict(point)}: {text}" for text in wrong]
    first: dict[str, int] = {}
    for number, config in enumerate(configs):
        if config is not None and (other := first.setdefault(config.to_json(), number)) != number:
            problems.append(f"points {other} and {number} are the same: {dict(points[number])}")
    if problems:
        raise SweepError(_listed(f"{path} has invalid points; nothing was started:", problems))

    runs = []
    shown = _shown(base, points)
    for number, (point, config) in enumerate(zip(points, configs, strict=True)):
        values = {key: value for key, value in point.items() if key != LABEL}
        for seed in seeds:
            seeded = config.copy_and_resolve_references()
            seeded.seed = seed
            runs.append(Run(_name(point.get(LABEL), shown[number], seed), number, point.get(LABEL), shown[number],
                            values, seed, seeded.lock()))
    counts = Counter(run.name.casefold() for run in runs)
    problems = [f"point {run.point}, {run.overrides}: the name {run.name!r} is another's, too" for run in runs
                if counts[run.name.casefold()] > 1]
    problems += [f"point {run.point}, {run.overrides}: the name {run.name!r} is too long, expected {LONGEST_NAME} "
                 "characters at most" for run in runs if len(run.name) > LONGEST_NAME]
    if problems:
        raise SweepError(_listed(f'{path} has points that need a "label" of their own:', problems))
    return runs


def _called(path: str, function: Callable[[], Any]) -> Any:
    """What a function of the sweep file returns. Raises SweepError, with the line, for whatever it raises."""
    try:
        return function()
    except Exception as error:  # the file is the user's, and so is what it calls
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines.append(error.lineno)
        where = f"{path}, line {lines[-1]}" if lines else path
        raise SweepError(f"{where}: {type(error).__name__}: {error}") from error


def _whole(values: Any) -> Any:
    """The list of what a generator, say, gives; what is no series of values stays as it is."""
    return list(values) if isinstance(values, Iterable) else values


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n  ".join([title, *lines])


def _changed(base: ConfigDict, changes: Sequence[str]) -> ConfigDict:
    values, argv = flags.FlagValues(), ["sweep", *changes]
    try:
        config_flags.DEFINE_config_dict("config", base, flag_values=values, sys_argv=argv)
        values(argv)
    except AttributeError as error:  # from ml_collections, for a key that the config does not have
        raise SweepError(f"unknown config key {error}") from error
    except flags.IllegalFlagValueError as error:
        raise SweepError(str(error)) from error
    return values.config


def _config(base: ConfigDict, point: Mapping[str, Any]) -> tuple[ConfigDict | None, list[str]]:
    """The config of a point, or None and what is wrong with it."""
    known = flatten_dict(base.to_dict(), sep=".")
    config, problems = base.copy_and_resolve_references().lock(), []
    if not isinstance(point.get(LABEL, ""), str) or not point.get(LABEL, "a").strip():
        problems.append(f"label={point[LABEL]!r}: expected a text")
    for key, value in point.items():
        if key == LABEL:
            continue
        if key == "seed":
            problems.append("seed: expected in SEEDS, not in a point")
        elif key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            problems.append(f"unknown key {key!r}" + (f", did you mean {' or '.join(near)}?" if near else ""))
        else:
            try:
                config.update_from_flattened_dict({key: value})
            except (TypeError, ValueError):
                problems.append(f"{key}={value!r}: expected {type(known[key]).__name__}, as {known[key]!r} is")
    if not problems:
        try:
            check(config)
        except ValueError as error:
            problems.append(str(error))
    return (None if problems else config), problems


def _wrong_inputs(config: ConfigDict, opened: dict[str, list[str]]) -> list[str]:
    """What is wrong with the files that a config names. `opened` keeps what has been said of its data."""
    model = config.model
    data = json.dumps([config.data.to_json(), model.num_classes, model.in_chans, config.batch_size])
    if data not in opened:
        opened[data] = []
        try:
            loop.open_sources(config)
        except (ValueError, OSError) as error:
            opened[data].append(str(error))
    problems = list(opened[data])
    if config.init_from and config.init_from not in list_models() and not pathlib.Path(config.init_from).exists():
        problems.append(f"config.init_from={config.init_from!r}: no such file, folder or registered model")
    return problems


def _shown(base: ConfigDict, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each point the values of all swept keys, those of the base where it has none, under short names.

    Of tuples that differ in one entry only, it is that entry: {"window_size[2]": 3}.
    """
    known = flatten_dict(base.to_dict(), sep=".")
    keys = [key for key in dict.fromkeys(key for point in points for key in point) if key != LABEL]
    ends = Counter(key.rpartition(".")[2] for key in keys)
    columns = {}
    for key in keys:
        end = key.rpartition(".")[2]
        name = end if ends[end] == 1 and end not in sweep_result.COLUMNS else f"config.{key}"
        values = [point.get(key, known[key]) for point in points]
        if all(isinstance(value, list | tuple) for value in values):
            entries = list(zip(*values, strict=False))
            differ = [i for i, entry in enumerate(entries) if len(set(entry)) > 1]
            if len({len(value) for value in values}) == 1 and len(differ) == 1:
                name, values = f"{name}[{differ[0]}]", list(entries[differ[0]])
        columns[name] = values
    return [{name: values[i] for name, values in columns.items()} for i in range(len(points))]


def _name(label: str | None, shown: dict[str, Any], seed: int) -> str:
    """A folder's: window_size=3_ct_size=1_seed=0, or the label's words and the seed."""
    words = [label] if label else [f"{key.partition('[')[0]}={sweep_result.text(value)}"
                                   for key, value in shown.items()]
    return "_".join(re.sub(r"[^\w.=+-]+", "-", word, flags=re.ASCII).strip("-.")
                    for word in [*(words or ["base"]), f"seed={seed}"])


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
        raise SweepError(_listed(f"{workdir} holds another sweep:", problems) + "\nGive the same sweep file, with the "
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
        print(_listed("Another process is at these runs:", elsewhere))
    if failed:
        print(_listed("These runs failed; the same command tries them again, from their last checkpoints:", failed))
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
