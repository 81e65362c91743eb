"""Breaks real training runs in many ways, starts them again with the same command, and compares how they end.

    python -m tests.train.faults                      all of it, as long as it takes
    python -m tests.train.faults --only kill --kills=10 --seed=3

Each run is compared with one that nothing happened to, on as many processes: the digest of every array of the last
checkpoint, what is known of the best one, metrics.jsonl and best.safetensors byte for byte. Prints a line for each run
and a table of faults; ends with 1 if anything was not as expected. Needs Linux.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator

import numpy as np

from tests.train.damage import DAMAGES, damage
from tests.train.fault_runs import ROOT, STEPS, STOPPED, Run, Unexpected, differences

# Faults: each is done to a run that has just been started, and returns what was done once all processes have ended;
# None if the run had ended by itself before.


def _ended(run: Run) -> None:
    """By itself. On a busy machine JAX's own time limits, of Gloo say, end one of two processes: then once more."""
    for _ in range(4):
        codes = run.wait()
        late = [i for i in range(run.processes) if re.search(r"DEADLINE_EXCEEDED|heartbeat timeout", run.log(i))]
        if not any(codes) or run.processes == 1 or not late:
            break
        print(f"process {late[0]} came too late for another: started again ({run.log_path(late[0])})", flush=True)
        run.start()
    if any(codes := run.wait()):
        raise Unexpected(f"exit codes {codes} of a run that nothing happened to")


def kill(when: str, delay: float, process: int | None = 0) -> Callable[[Run], str | None]:
    """SIGKILL, `delay` seconds after the start, after the first step can begin ("training"), or in a save."""

    def fault(run: Run) -> str | None:
        ready = {"start": lambda: True, "training": run.begun, "save": run.saving}[when]
        came = run.until(ready)
        time.sleep(delay)
        if not came or run.running[process or 0].poll() is not None:
            return _ended(run)
        run.signal(signal.SIGKILL, process)
        codes = run.wait()  # the others end by themselves
        if run.running[process or 0].returncode == 0:
            return _ended(run)
        if 0 in codes and run.saved()[-1:] != [STEPS]:
            raise Unexpected(f"exit codes {codes} after the kill of process {process}")
        return f"kill -9 {'in a save' if run.saving() else 'in the start' if not run.begun() else 'else'}"

    return fault


def terminate(phase: str, at: int = 0, process: int | None = None) -> Callable[[Run], str | None]:
    """SIGTERM to one process or all: in compile, training (after step `at`), evaluation or save."""

    def ready(run: Run) -> bool:
        if phase == "compile":
            return run.begun()
        if phase == "training":
            return run.begun() and run.step() >= at
        if phase == "evaluation":  # the first of two is over, the weights'; that of the averages has begun
            return run.log().count(" * Acc@1") > run.log().count("(averaged weights)")
        return run.saving()

    def fault(run: Run) -> str | None:
        if not run.until(lambda: ready(run)):
            return _ended(run)
        before = run.step()
        run.signal(signal.SIGTERM, process)
        codes = run.wait()
        if set(codes) <= {0, -signal.SIGTERM} and run.saved()[-1:] == [STEPS]:
            return None  # too late, all was done
        if codes != [STOPPED] * run.processes:
            raise Unexpected(f"exit codes {codes} after SIGTERM in {phase}, expected {STOPPED}")
        step = said(run, r"saved after step ([\d,]+) in")
        if step < before or run.saved()[-1] != step:
            raise Unexpected(f"SIGTERM in {phase} after step {before}: saved after {step}, there are {run.saved()}")
        where = f"SIGTERM in {phase}"
        if phase == "evaluation" and not run.meta(step)["extra"]["to_evaluate"]:
            where = "SIGTERM after evaluation"
        return where

    return fault


def said(run: Run, pattern: str) -> int:
    """The step in what process 0 said."""
    found = re.search(pattern, run.log())
    if not found:
        raise Unexpected(f"did not say {pattern!r}")
    return int(found[1].replace(",", ""))


def freeze(seconds: float, at: int, process: int = 0) -> Callable[[Run], str | None]:
    """SIGSTOP for longer than config.stuck_after. The others end, and it ends when it may go on."""

    def fault(run: Run) -> str | None:
        if not run.until(lambda: run.begun() and run.step() >= at):
            return _ended(run)
        run.signal(signal.SIGSTOP, process)
        others = [i for i in range(run.processes) if i != process]
        try:
            start = time.monotonic()
            while time.monotonic() < start + 3 * seconds and (
                    any(run.running[i].poll() is None for i in others) or time.monotonic() < start + 1.2 * seconds):
                time.sleep(0.1)
            for i in others:
                text = run.log(i)
                if run.running[i].poll() in (None, 0):
                    raise Unexpected(f"process {i} goes on {3 * seconds:.0f} s after process {process} was stopped")
                if "File " not in text or not re.search(r"Nothing went on for|Timeout \(", text):
                    raise Unexpected(f"process {i} ended without stacks when process {process} was stopped")
        finally:
            run.signal(signal.SIGCONT, process)
        codes = run.wait()
        if others and codes[process] == 0:
            raise Unexpected(f"exit codes {codes}: process {process} ended well without the others")
        if not any(codes):
            return "SIGSTOP, then it went on" if run.processes == 1 else None
        return "SIGSTOP" if run.processes == 1 else "SIGSTOP to one of two"

    return fault


def ballast(folder: pathlib.Path) -> None:
    """Fills the disk."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))


def fill(folder: pathlib.Path, at: int, *, room_again: bool) -> Callable[[Run], str | None]:
    """A full disk from a checkpoint on: saves fail; there is room again after the first, or after the run's end."""

    def fault(run: Run) -> str | None:
        run.until(lambda: run.begun() and any(step >= at for step in run.saved()))
        ballast(folder)
        try:
            if not run.until(lambda: re.search(r"the save of step \d+ failed \(", run.log()) is not None):
                raise Unexpected("a full disk, and no save failed")
            if "No space left" not in run.log():
                raise Unexpected("a save failed without the reason")
            if not room_again and run.wait() != [1]:
                raise Unexpected("no room for the last save, and yet the exit code is not 1")
        finally:
            (folder / "ballast").unlink()
        if room_again:
            _ended(run)
            return "full disk, then room"
        if "could not be saved, in two tries" not in run.log():
            raise Unexpected("no room for the last save, and it did not say so")
        return "full disk to the end"

    return fault


def spoil(run: Run, how: str, rng: np.random.Generator) -> str:
    """Damages a file of the newest checkpoint of a run that has ended."""
    newest = run.workdir / "checkpoints" / str(run.saved()[-1])
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    path = files[rng.integers(len(files))]
    damage(path, how, rng)
    return f"{path.relative_to(newest.parent)}: {how}"


def then_spoil(fault: Callable[[Run], str | None], how: str, rng: np.random.Generator) -> Callable[[Run], str | None]:
    """A fault, and damage to the newest checkpoint after it."""
    return lambda run: (what := fault(run)) and f"{what}, then a damaged file ({spoil(run, how, rng)})"


# Cases

PROGRAM = """
    import sys
    import jax.numpy as jnp
    from fastervit_jax.train import command, loop
    from tests.train import runs

    how, steps = sys.argv.pop(1), {int(step) for step in sys.argv.pop(1).split(",")}

    def call(step, state, batch):
        if int(state.step) + 1 not in steps:
            return step(state, batch)
        if how == "nan":
            return step(state, batch | {"weight": jnp.nan * batch["weight"]})
        return state.replace(step=state.step + 1), {
            "bad_images": jnp.float32(jnp.nan), "bad_steps": jnp.float32(1), "bad_steps_in_row": jnp.float32(0)}

    loop.make_train_step = runs.around_steps(call)
    command.run(loop.train)
"""
NOT_FINITE = "3,12,13,14,22"


def program(how: str) -> list[str]:
    """train.py, where some batches are not finite ("nan"), or left out."""
    return ["-c", textwrap.dedent(PROGRAM), how, NOT_FINITE]


@dataclasses.dataclass
class Result:
    faults: list[str]
    restarts: int
    wrong: str
    seconds: float


class Bench:
    """Runs cases in a folder, and keeps what came of them. JAX_COMPILATION_CACHE_DIR may name a folder that exists."""

    def __init__(self, folder: pathlib.Path, seed: int, references: int = 2):
        self.folder, self.seed, self.rng, self.references = folder, seed, np.random.default_rng(seed), references
        self.results: dict[str, list[Result]] = collections.defaultdict(list)
        self.skipped: dict[str, str] = {}
        self.ends: dict[str, dict] = {}
        self.began = self.lasts = 0.0
        self.count = 0

    def run(self, *flags: str, workdir: pathlib.Path | None = None, **options) -> Run:
        self.count += 1
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(self.folder / "cache")
        return Run(workdir or self.folder / f"run_{self.count}", self.folder / f"run_{self.count}_logs", cache, *flags,
                   **options)

    def reference(self, name: str = "one", **options) -> dict:
        """How a run ends that nothing happens to, more than once. Measures how long a start and the rest take."""
        if name in self.ends:
            return self.ends[name]
        for again in range(self.references if name != "left out" else 1):
            run, start = self.run(**options), time.monotonic()
            with ending(run):
                run.start()
                run.until(run.begun)
                began = time.monotonic()
                _ended(run)
            if not again:
                self.ends[name] = run.end()
            elif wrong := differences(run.end(), self.ends[name]):
                raise Unexpected(f"two runs that nothing happened to: {wrong}")
            self.began, self.lasts = began - start, time.monotonic() - began
            print(f"{name}: nothing happens; it begins after {self.began:.1f} s and lasts {self.lasts:.1f} s",
                  flush=True)
        return self.ends[name]

    def case(self, kind: str, run: Run, faults: list[Callable[[Run], str | None]], reference: str) -> int:
        """Starts the run for each fault, and at last until it ends; returns how many faults took place."""
        done, wrong, start, first = [], "", time.monotonic(), run.starts
        with ending(run):
            try:
                for fault in faults:
                    run.start()
                    what = fault(run)
                    done += [what] * (what is not None)
                    if what is None or not any(run.wait()):
                        break
                if run.starts == first or any(run.wait()):
                    run.start()
                    _ended(run)
                wrong = differences(run.end(), self.ends[reference])
            except Unexpected as error:
                wrong = str(error)
        result = Result(done, max(run.starts - max(first, 1), 0), wrong, time.monotonic() - start)
        self.results[kind].append(result)
        told = collections.Counter(done)
        print(f"{kind}: {', '.join(f'{n} × {what}' for what, n in told.items()) or 'nothing happened'}; "
              f"{run.starts} starts, {result.seconds:.0f} s: {wrong or 'ended the same'}"
              f"{f' ({run.logs})' if wrong else ''}", flush=True)
        if not wrong:
            shutil.rmtree(run.workdir)
            shutil.rmtree(run.logs)
        return len(done)

    def kills(self, number: int, processes: int) -> None:
        """Half of them in saves, a tenth anywhere in the start, the others anywhere from the first step on."""
        reference = topology(processes)
        self.reference(reference, processes=processes)
        left = number
        for _ in range(2 * number):  # some runs end before anything happens to them
            if left <= 0:
                break
            planned = []
            for _ in range(min(left, 8)):
                when = self.rng.choice(["save", "training", "start"], p=[0.5, 0.4, 0.1])
                delay = self.rng.uniform(0, {"save": 0.2, "training": 0.7 * self.lasts, "start": self.began}[when])
                process = None if processes == 1 else int(self.rng.integers(processes))
                planned.append(kill(when, delay, process))
            kind = f"kill -9, {processes} process{'es' * (processes > 1)}"
            left -= self.case(kind, self.run(processes=processes), planned, reference)

    def terms(self, processes: int) -> None:
        self.reference(topology(processes), processes=processes)
        for process in [None, *(range(processes) if processes > 1 else ())]:
            at = sorted(int(step) for step in self.rng.integers(6, STEPS - 8, 2))
            planned = [terminate("compile", process=process), terminate("evaluation", process=process),
                       terminate("training", at[0], process), terminate("save", process=process),
                       terminate("training", at[1], process), terminate("evaluation", process=process)]
            to = "" if processes == 1 else ", both of two" if process is None else f", process {process} of two"
            self.case(f"SIGTERM{to}", self.run(processes=processes), planned, topology(processes))

    def stop_then_kill(self) -> None:
        """What an evaluation that is done again has written must not be there twice."""
        self.reference()
        planned = [terminate("evaluation"), kill("training", 0.5 * self.lasts), terminate("evaluation"),
                   kill("save", 0.0)]
        self.case("SIGTERM, then kill -9", self.run(), planned, "one")

    def damages(self, number: int) -> None:
        """Of the newest checkpoint of a stopped run; the next start goes on from the one before."""
        self.reference()
        stopped = self.run()
        with ending(stopped):
            stopped.start()
            terminate("training", 13)(stopped)
        for i in range(number):
            run = self.run()
            shutil.copytree(stopped.workdir, run.workdir)
            run.starts = 1
            before = run.saved()[-1]
            what = spoil(run, how := DAMAGES[i % len(DAMAGES)], self.rng)

            def fault(run: Run, what: str = what, how: str = how, before: int = before) -> str:
                _ended(run)
                told = f"the checkpoint of step {before} is damaged" in run.log()
                step = said(run, r"going on after step ([\d,]+)")
                if (step < before) != told or (not told and how in ("cut off", "delete")):
                    raise Unexpected(f"{what}: went on after step {step} of {before}, and told {told}")
                return f"{what}: went on after {step} of {before}"

            self.case("a damaged file, train.py", run, [fault], "one")

    def restores(self, number: int) -> None:
        """As tests/train/damage.py does it."""
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "tests.train.damage", f"--cases={number}", f"--seed={self.seed}"], cwd=ROOT,
            capture_output=True, text=True)
        failures = [line for line in done.stdout.splitlines()[:-1]
                    if json.loads(line)["result"] not in ("same", "older")]
        wrong = "" if done.returncode == 0 else "; ".join(failures) or done.stderr[-500:]
        self.results["a damaged file, restored"].append(
            Result(["damage"] * number, number, wrong, time.monotonic() - start))
        print(f"a damaged file, restored: {number} × damage: {wrong or 'all detected or harmless'}", flush=True)

    def disks(self) -> None:
        with small_disk(self.folder / "disk") as (folder, error):
            if error:
                self.skipped["full disk"] = error
                return
            self.reference()
            for room_again in (True, False):
                run = self.run(workdir=folder / f"run_{room_again}")
                self.case("full disk", run, [fill(folder, 10, room_again=room_again)], "one")

    def freezes(self) -> None:
        for processes, victims in ((1, [0]), (2, [0, 1])):
            self.reference(topology(processes), processes=processes)
            seconds = max(10.0, 1.5 * self.lasts)
            for process in victims:
                run = self.run(f"--config.stuck_after={seconds}", "--heartbeat=100", processes=processes)
                self.case(f"SIGSTOP, {processes} process{'es' * (processes > 1)}", run,
                          [freeze(seconds, 12, process)], topology(processes))

    def not_finite(self) -> None:
        self.reference("left out", program=program("left out"))
        self.case("batches that are not finite", self.run(program=program("nan")),
                  [lambda run: _ended(run) or "5 updates skipped"], "left out")

        def fault(run: Run) -> str:
            if run.wait() != [1] or "TrainingError: the updates of steps 12 to 14 were skipped" not in run.log():
                raise Unexpected("three batches in a row are not finite, and no TrainingError")
            if run.saved()[-1] != 14:
                raise Unexpected(f"three batches in a row are not finite: saved {run.saved()}")
            return "ended after 3 in a row"

        self.case("batches that are not finite", self.run("--config.max_bad_steps=3", program=program("nan")),
                  [fault], "left out")

    def table(self) -> bool:
        """Prints it; whether all is well."""
        rows = [("fault", "cases", "restarts", "same state at the end", "seconds")]
        for kind, results in self.results.items():
            same = sum(len(result.faults) for result in results if not result.wrong)
            number = sum(len(result.faults) for result in results) or len(results)
            well = sum(not result.wrong for result in results)
            rows.append((kind, str(number), str(sum(result.restarts for result in results)),
                         f"{same} of {number} ({well} of {len(results)} runs)",
                         f"{sum(result.seconds for result in results):.0f}"))
        rows += [(kind, "0", "", f"not run: {why}", "") for kind, why in self.skipped.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print()
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return not any(result.wrong for results in self.results.values() for result in results)


def topology(processes: int) -> str:
    return {1: "one", 2: "two"}[processes]


@contextlib.contextmanager
def ending(run: Run) -> Iterator[None]:
    """Leaves no process."""
    try:
        yield
    finally:
        run.kill()


@contextlib.contextmanager
def small_disk(folder: pathlib.Path, size: str = "32m") -> Iterator[tuple[pathlib.Path, str]]:
    """A tmpfs, and why there is none."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mount = subprocess.run(command, capture_output=True, text=True)
    try:
        yield folder, mount.stderr.strip()
    finally:
        if mount.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)


KINDS = "kill", "kill2", "term", "term2", "stop-kill", "damage", "restore", "disk", "freeze", "nan"


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="in all; a third of them of one of two processes")
    parser.add_argument("--damages", type=int, default=100, help="to checkpoints that are restored")
    parser.add_argument("--starts", type=int, default=5, help="of train.py with a damaged checkpoint")
    parser.add_argument("--references", type=int, default=2, help="runs that nothing happens to, which are compared")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of moments and places")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--folder", type=pathlib.Path, help="for runs and logs; kept, those of runs that went wrong")
    arguments = parser.parse_args()
    print(f"--seed={arguments.seed}", flush=True)
    folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="fastervit_jax_faults_"))
    bench = Bench(folder, arguments.seed, arguments.references)
    pairs = arguments.kills // 3
    work = {
        "kill": lambda: bench.kills(arguments.kills - pairs, 1), "kill2": lambda: bench.kills(pairs, 2),
        "term": lambda: bench.terms(1), "term2": lambda: bench.terms(2), "stop-kill": bench.stop_then_kill,
        "damage": lambda: bench.damages(arguments.starts), "restore": lambda: bench.restores(arguments.damages),
        "disk": bench.disks, "freeze": bench.freezes, "nan": bench.not_finite}
    for kind in arguments.only:
        work[kind]()
    well = bench.table()
    if well and arguments.folder is None:
        shutil.rmtree(folder)
    sys.exit(not well)


if __name__ == "__main__":
    main()
