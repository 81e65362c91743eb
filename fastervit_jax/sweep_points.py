"""What a sweep file asks for: its points, checked, and the runs that they make."""

import dataclasses
import difflib
import json
import pathlib
import re
import runpy
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from fastervit_jax import sweep_result
from fastervit_jax.model.variants import list_models
from fastervit_jax.train import loop
from fastervit_jax.train.check import check

LABEL = "label"
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
        raise SweepError(listed(f"{path} has invalid points; nothing was started:", problems))

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
        raise SweepError(listed(f'{path} has points that need a "label" of their own:', problems))
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


def listed(title: str, lines: Sequence[str]) -> str:
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
