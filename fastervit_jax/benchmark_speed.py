"""Time inference, or training steps, of this model and of others on one device, and compare them.

    python -m fastervit_jax.benchmark speed --variant faster_vit_0_224 faster_vit_2_224 --batch 128 --peer
    python -m fastervit_jax.benchmark speed --mode train --batch 128 --peer --modes eager default
    python -m fastervit_jax.benchmark speed --resolution 576x960 --batch 8 1 --timm convnext_tiny

Each contestant has a process of its own. All of a model, batch and resolution are timed in turns, again and again, on
images that are on the device already, when nothing compiles. One that fails is told, and does not stop the others. A
line of JSON a contestant, then a table; docs/benchmarks.md says what the figures mean.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from fastervit_jax.model.variants import ANY_RES, get_variant

OURS = {"inference": ("plain/xla", "plain/auto", "deployed/xla", "deployed/auto"), "train": ("plain/xla", "plain/auto")}
"""What is timed of this model if --ours does not say it: the model or its deployed form, and `kernels` of FasterViT."""
MODES = ("eager", "default", "reduce-overhead", "max-autotune")
MEMORY = re.compile("RESOURCE_EXHAUSTED|out of ?memory", re.IGNORECASE)
"""In the errors of JAX and PyTorch where a device's memory does not suffice."""

Record = dict[str, Any]


class WorkerError(Exception):
    """A worker failed; the message is one line."""


class Worker:
    """A process that prepares one contestant and times it when it is asked to; see `benchmark_peer.serve`."""

    def __init__(self, spec: Record, peer_python: str):
        self.spec, self._peer_python, self._process = spec, peer_python, None
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, close() does

    @property
    def name(self) -> str:
        return " ".join(str(self.spec[name]) for name in ("family", "model", "way"))

    def start(self) -> None:
        """Returns when it has compiled. Raises WorkerError."""
        spec = json.dumps(self.spec)
        if self.spec["family"] == "ours":
            command = [sys.executable, "-m", "fastervit_jax.benchmark_ours", spec]
        else:
            command = [self._peer_python, "-P", str(pathlib.Path(__file__).parent / "benchmark_peer.py"), spec]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
                env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
        except OSError as error:
            raise WorkerError(f"{command[0]}: {error.strerror}; expected a Python program") from error
        self._read()

    def ask(self, do: str, **order: Any) -> Record:
        """The answer to an order. Raises WorkerError."""
        with contextlib.suppress(BrokenPipeError):  # what it died of is read
            self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> Record:
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with code {self._process.wait()}"}
        if "error" not in answer:
            return answer
        self._errors.seek(0)
        lines = self._errors.read().splitlines()
        note("\n".join([f"{self.name} failed; the end of what it wrote:", *lines[-20:]]))
        if not line and lines:
            answer["error"] += f": {lines[-1]}"
        raise WorkerError(answer["error"][:400])

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
        self._errors.close()


def note(text: str) -> None:
    """To the people who wait; figures go to stdout."""
    print(text, file=sys.stderr, flush=True)


def race(specs: Sequence[Record], jobs: int, repeat: int, seconds: float, peer_python: str) -> list[Record]:
    """Times the contestants in turns and gives a record of each, in their order.

    Those for which memory did not suffice beside the others are run again after them: together, or, if that were the
    same again, one after the other.
    """
    records = _heat(specs, jobs, repeat, seconds, peer_python)
    short = [i for i, record in enumerate(records) if MEMORY.search(record.get("error", ""))]
    if len(specs) > 1:
        for again in [short] if len(short) < len(specs) else [[i] for i in short]:
            found = race([specs[i] for i in again], jobs, repeat, seconds, peer_python) if again else []
            for i, record in zip(again, found, strict=True):
                records[i] = record
    return records


def _heat(specs: Sequence[Record], jobs: int, repeat: int, seconds: float, peer_python: str) -> list[Record]:
    """All of these at the same time in the device's memory: compiled, then timed in turns."""
    workers = [Worker(spec, peer_python) for spec in specs]
    everyone = range(len(workers))
    errors: dict[int, str] = {}
    told: dict[int, Record] = {}

    def attempt(i: int, do: str, **order: Any) -> Any:
        """The worker's answer; None if it has failed, now or before."""
        if i in errors:
            return None
        try:
            return workers[i].start() if do == "start" else workers[i].ask(do, **order)
        except WorkerError as error:
            errors[i] = str(error)
            workers[i].close()  # its memory is for the others
            return None

    def start(i: int) -> None:
        attempt(i, "start")
        told[i] = attempt(i, "tell") or {}
        if told[i]:
            note(f"{workers[i].name}: ready, compiled in {told[i]['compile_seconds']:.1f} s")

    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.close)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(start, everyone))
        calls = [(attempt(i, "calibrate", seconds=seconds) or {}).get("calls") for i in everyone]
        took: list[list[float]] = [[] for _ in everyone]
        single: list[list[float]] = [[] for _ in everyone]
        for _ in range(repeat):
            for i in everyone:
                if answer := attempt(i, "time", calls=calls[i]):
                    took[i].append(answer["seconds"] / calls[i])
                if specs[i]["batch"] == 1 and (answer := attempt(i, "latency", calls=calls[i])):
                    single[i] += answer["seconds"]
        for i in everyone:
            told[i] |= attempt(i, "tell") or {}

    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    records = []
    for i in everyone:
        timed = {"error": errors[i]} if i in errors else timings(specs[i]["batch"], took[i], single[i])
        records.append({"benchmark": "speed", **specs[i], **told[i], "date": date, "rounds": len(took[i]),
                        "beside": len(specs) - 1, "calls": calls[i], **timed})
    return records


def timings(batch: int, took: Sequence[float], single: Sequence[float]) -> Record:
    """Figures from seconds a call of each round, and of single calls if there are any."""
    middle = statistics.median(took)
    figures = {"images_per_second": batch / middle, "lowest": batch / max(took), "highest": batch / min(took),
               "ms": 1e3 * middle}
    if single:
        figures["latency_ms"] = 1e3 * statistics.median(single)
        figures["latency_p95_ms"] = 1e3 * sorted(single)[math.ceil(0.95 * len(single)) - 1]
    return figures


def compare(records: Sequence[Record]) -> None:
    """Adds to records of one model, batch and resolution what follows from those of the others.

    `ratio`: speed over that of the official package's fastest mode. `utilisation`: the time that the model's products
    need at the device's peak over the time that a call takes; the official package's is the same function.
    """
    official = [x["images_per_second"] for x in records if x["family"] == "official" and "ms" in x]
    needed = [x["computation_ms"] for x in records if x.get("computation_ms")]
    for x in records:
        if "ms" in x:
            x["ratio"] = x["images_per_second"] / max(official) if official else None
            x["utilisation"] = needed[0] / x["ms"] if needed else None


def table(records: Sequence[Record]) -> str:
    """The records as text, a heading for each model, batch and resolution."""
    groups: dict[str, list[Record]] = {}
    for x in records:
        groups.setdefault(f"{x['mode']}, {x['model']}, batch {x['batch']}, {x['height']}×{x['width']}, "
                          f"{x['precision']}", []).append(x)
    lines = []
    for heading, group in groups.items():
        devices = {x["device"] for x in group if "device" in x}
        lines += ["", ", ".join([heading, *sorted(devices)])]
        rows = [["", "images/s", "lowest–highest", "ms", "latency", "p95", "× official", "compile s", "peak GiB",
                 "of peak", "bound ms"]]
        rows += [_row(x) for x in group if "ms" in x]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        shown = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
        if shown:
            lines += ["  ".join(f"{row[i]:{'>' if i else '<'}{widths[i]}}" for i in shown) for row in rows]
        lines += [f"{x['family']} {x['way']} failed: {x['error']}" for x in group if "error" in x]
    return "\n".join(lines[1:])


def _row(x: Record) -> list[str]:
    show = lambda name, form, factor=1: f"{factor * x[name]:{form}}" if x.get(name) is not None else ""  # noqa: E731
    bounds = {name: x[f"{name}_ms"] for name in ("computation", "memory") if x.get(f"{name}_ms")}
    largest = max(bounds, key=bounds.get, default=None)
    return [
        f"{x['family']} {x['way']}{' (autocast)' if x.get('autocast') and x['mode'] == 'inference' else ''}",
        show("images_per_second", ",.1f"), f"{x['lowest']:,.1f}–{x['highest']:,.1f}", show("ms", ".3f"),
        show("latency_ms", ".3f"), show("latency_p95_ms", ".3f"), show("ratio", ".2f"), show("compile_seconds", ".1f"),
        show("peak_gib", ".2f"), show("utilisation", ".1%"),
        f"{bounds[largest]:.3f} {largest}" if largest else "",
    ]


def resolution(text: str) -> tuple[int, int]:
    """224 → (224, 224), 576x960 → (576, 960)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    sides = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if min(sides) < 32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected SIDE or HEIGHTxWIDTH in pixels, at least 32, as 576x960")
    return sides


def contestants(given: argparse.Namespace) -> list[list[Record]]:
    """Those that are timed together: ours and the official package's for a model, batch and resolution; and timm's."""
    groups = []
    any_res = {name: alias for alias, name in ANY_RES.items()}
    for height, width in given.resolution:
        for batch in given.batch:
            task = {"mode": given.mode, "batch": batch, "height": height, "width": width, "precision": given.precision}
            for name in given.variant:
                group = [{"family": "ours", "model": name, "way": way, **task} for way in given.ours]
                if given.peer:
                    trained = (height, width) == (get_variant(name).resolution,) * 2
                    second = {} if trained else {"any_res": any_res.get(name, name)}
                    group += [{"family": "official", "model": name, "way": way, **task, **second}
                              for way in given.modes]
                groups.append(group)
            groups += [[{"family": "timm", "model": name, "way": way, **task} for way in given.modes]
                       for name in given.timm]
    return groups


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fastervit_jax.benchmark speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=["inference", "train"], default="inference")
    parser.add_argument("--variant", nargs="*", default=["faster_vit_0_224"], help="of this model; none: only timm's")
    parser.add_argument("--batch", type=int, nargs="+", default=[128], help="images a call; for 1 also latency")
    parser.add_argument("--resolution", type=resolution, nargs="+", default=[(224, 224)], metavar="SIDE|HEIGHTxWIDTH")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the computation; "
                        "GPUs may take TF32 for float32, in all frameworks")
    parser.add_argument("--ours", nargs="*", metavar="FORM/KERNELS", help="of this model: plain or deployed, with "
                        "auto, xla or pallas; by default each with xla and auto, for training only plain")
    parser.add_argument("--peer", action="store_true", help="also NVIDIA's PyTorch package, fastervit")
    parser.add_argument("--timm", nargs="*", default=[], metavar="NAME", help="also these models of timm")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="of PyTorch: eager, or "
                        "torch.compile's; default is all")
    parser.add_argument("--peer-python", default=os.environ.get("FASTERVIT_ORACLE", sys.executable), metavar="PYTHON",
                        help="that has PyTorch; default $FASTERVIT_ORACLE, or this one")
    parser.add_argument("--repeat", type=int, default=7, help="rounds")
    parser.add_argument("--seconds", type=float, default=0.3, help="at least, of each measurement")
    parser.add_argument("--jobs", type=int, default=1, help="contestants that compile at the same time")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.jsonl", help="where the lines of JSON are added")
    parser.add_argument("--figure", type=pathlib.Path, metavar="FILE.png", help="as `benchmark figure` draws it")
    given = parser.parse_args(arguments)
    given.ours = list(OURS[given.mode]) if given.ours is None else given.ours
    for way in given.ours:
        if not re.fullmatch("(plain|deployed)/(auto|xla|pallas)", way) or (given.mode, way[0]) == ("train", "d"):
            allowed = "plain" if given.mode == "train" else "plain or deployed"
            parser.error(f"--ours {way}: expected {allowed}, a slash, and auto, xla or pallas")
    for name in given.variant:
        try:
            get_variant(name)
        except ValueError as error:
            parser.error(f"--variant: {error}")
    for name in ("batch", "repeat", "jobs"):
        if min(numbers := getattr(given, name) if name == "batch" else [getattr(given, name)]) < 1:
            parser.error(f"--{name} {min(numbers)}: expected at least 1")
    if given.figure and given.figure.suffix.lower() != ".png":
        parser.error(f"--figure {given.figure}: expected a name that ends in .png")
    if given.mode == "train" and given.figure:
        parser.error("--figure draws inference; leave it out, or --mode train")
    return given


def main(arguments: Sequence[str]) -> None:
    """The command."""
    given = options(arguments)
    records = []
    for group in contestants(given):
        found = race(group, given.jobs, given.repeat, given.seconds, given.peer_python)
        compare(found)
        lines = [json.dumps({name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in record.items()})
                 for record in found]
        print("\n".join(lines), flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.writelines(f"{line}\n" for line in lines)
        records += found
    print(table(records))
    if given.figure:
        from fastervit_jax import benchmark_figure
        benchmark_figure.draw(records, given.figure)
    if not any("ms" in record for record in records):
        sys.exit("nothing could be timed")
