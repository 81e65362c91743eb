"""Checkpoints of a run: WORKDIR/checkpoints/STEP/{variables,ema,optimizer,meta}, each of them an item of orbax.

`meta` has a digest of each array, the sizes of the files, evaluations, and what the loop adds. A step is written under
another name, and renamed when it is whole.

Orbax's handlers write and read the items. Its CheckpointManager is not used: for each array it holds up the thread that
calls it, it forgets a save that failed until the next, and where one of several processes fails, the others wait for it
until a timeout.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax._src import distributed  # no public function talks to other processes from a thread

from fastervit_jax.train import digest
from fastervit_jax.train.beside import compiled_copy, fits, has_room, in_small_turns
from fastervit_jax.train.digest import Digests
from fastervit_jax.train.packing import Packing
from fastervit_jax.train.state import TrainState

VERSION = 1
UNFINISHED = ".orbax-checkpoint-tmp"
TIMEOUT = 3600.0
"""Seconds that a process waits for the others, some of which may have more to write."""
SPENT = 256
"""At most so many spent states, one a step, are kept until a save is over."""
GROUPS = itertools.count()


class CheckpointError(Exception):
    """No checkpoint can be used, or the last one could not be saved."""


# Processes


def _short(error: Exception) -> str:
    """On one line; of tensorstore's, which begin with what could not be done, end with why, and have much beside."""
    text = " ".join(str(error).partition("[tensorstore_spec=")[0].split())
    return f"{type(error).__name__}: {text if len(text) < 500 else f'{text[:150]} ... {text[-300:]}'}"


class _Group:
    """The processes of a run. All of them call its methods in the same order."""

    def __init__(self):
        self._key, self._calls = f"fastervit_jax/checkpoint/{next(GROUPS)}", itertools.count()
        self.first = jax.process_index() == 0

    def tell(self, text: str) -> list[str]:
        """The texts of all processes, which wait for each other. Callable from one thread at a time."""
        count, own, call = jax.process_count(), jax.process_index(), next(self._calls)
        if count == 1:
            return [text]
        client = distributed.global_state.client
        client.key_value_set(f"{self._key}/{call}/{own}", json.dumps(text))
        texts = [json.loads(client.blocking_key_value_get(f"{self._key}/{call}/{i}", int(1000 * TIMEOUT)))
                 for i in range(count)]
        if call:
            client.key_value_delete(f"{self._key}/{call - 1}/{own}")  # all have read it
        return texts

    def do(self, work: Callable[[], Any], *, only_first: bool = False) -> tuple[Any, str]:
        """What the work returned to this process, if it did any, and the errors of all of them, or an empty text."""
        done, error = None, ""
        if self.first or not only_first:
            try:
                done = work()
            except Exception as exception:  # of files that cannot be read or written, orbax raises many kinds
                error = _short(exception)
        errors = self.tell(error)
        return done, "; ".join(f"process {i}: {text}" if len(errors) > 1 else text
                               for i, text in enumerate(errors) if text)


# Files


def _steps(root: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in root.iterdir() if path.name.isdecimal()) if root.is_dir() else []


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Of devices that have the same values, one writes them. How arrays were split over devices is not kept."""
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, enable_write_sharding_file=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)  # it would save 7%


def _items(state: TrainState) -> dict[str, Any]:
    optimizer = {"step": state.step, "bad_steps": state.bad_steps, "opt_state": state.opt_state}
    return {"variables": state.variables, **({} if state.ema is None else {"ema": state.ema}), "optimizer": optimizer}


def _state(items: dict[str, Any]) -> TrainState:
    return TrainState(**items["variables"], **items["optimizer"], ema=items.get("ema"))


def _write(folder: pathlib.Path, items: dict[str, Any]) -> None:
    """This process's part of the items, which are taken out of the dict as soon as they are in the host's memory."""
    handler, futures, errors = _handler(), [], []
    try:
        for name in list(items):
            save = ocp.args.PyTreeSave(items.pop(name))
            futures += asyncio.run(handler.async_save(epath.Path(folder / name), args=save))
            del save
    finally:
        for future in futures:  # all of them, so that nothing is written later
            try:
                future.result()
            except Exception as error:
                errors.append(error)
    if errors:
        raise errors[0]


def _sizes(folder: pathlib.Path) -> dict[str, int]:
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.stat().st_size for name, path in files.items() if not name.startswith("meta/")}


def _checksum(meta: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(meta, sort_keys=True).encode()):08x}"


def _sync(path: pathlib.Path) -> None:
    """Until a file, or what a folder lists, would outlast a power cut."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _finish(folder: pathlib.Path, target: pathlib.Path, item_names: list[str], meta: dict[str, Any]) -> None:
    """After all processes have written their parts: what belongs to all, and the name."""
    handler = _handler()
    for name in item_names:
        handler.finalize(epath.Path(folder / name))
    meta = {"version": VERSION, **meta, "files": _sizes(folder)}
    (folder / "meta").mkdir()
    save = ocp.args.JsonSave({**meta, "checksum": _checksum(meta)})
    ocp.JsonCheckpointHandler().save(epath.Path(folder / "meta"), args=save)
    for path in (*folder.rglob("*"), folder):
        _sync(path)
    folder.rename(target)
    _sync(target.parent)


def _read_meta(folder: pathlib.Path) -> dict[str, Any]:
    """Raises an error if the step is not whole, as far as can be seen without reading arrays."""
    meta = ocp.JsonCheckpointHandler().restore(epath.Path(folder / "meta"))
    checksum = meta.pop("checksum")
    if checksum != _checksum(meta):
        raise ValueError(f"meta has the checksum {_checksum(meta)}, expected {checksum}")
    if meta["version"] != VERSION:
        raise ValueError(f"its format is of version {meta['version']}, expected {VERSION}")
    if meta["step"] != int(folder.name):
        raise ValueError(f"it holds step {meta['step']}")
    sizes = _sizes(folder)
    for file, size in meta["files"].items():
        if sizes.get(file) != size:
            found = f"has {sizes[file]:,} bytes" if file in sizes else "is missing"
            raise ValueError(f"{file} {found}, expected {size:,} bytes")
    return meta


def _change_meta(folder: pathlib.Path, changes: dict[str, Any]) -> None:
    """A kill leaves the old one or the new one."""
    meta = {**_read_meta(folder), **changes}
    path = folder / "meta" / "metadata"
    new = path.with_suffix(".new")
    with new.open("w") as file:
        json.dump({**meta, "checksum": _checksum(meta)}, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _read(folder: pathlib.Path, items: dict[str, Any]) -> dict[str, Any]:
    """The items, with the shapes, dtypes and shardings of the given ones."""
    handler = _handler()
    return {name: handler.restore(epath.Path(folder / name), args=ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))) for name, tree in items.items()}


def _compare(found: list[dict[str, str]], expected: dict[str, str]) -> None:
    differing = [name for name in found[0] if any(texts[name] != expected[name] for texts in found)]
    if differing:
        raise ValueError(f"{len(differing)} of {len(found[0])} arrays do not have the digest that was saved: "
                         f"{', '.join(differing[:3])}{', ...' if differing[3:] else ''}")


def _newest_whole(
    root: pathlib.Path, items: dict[str, Any], build: Callable[[dict[str, Any]], Any], group: _Group,
    digests: Callable[[Any], list[dict[str, str]]],
) -> tuple[Any, dict[str, Any], dict[int, str]] | None:
    """What `build` makes of the items of the newest whole step, its meta, and what is wrong with the newer ones.
    `digests` finds those of what it makes, on each of this process's devices.

    None if there are no steps. Raises CheckpointError if none is whole, or one is that has other arrays.
    """
    steps = json.loads(group.tell(json.dumps(_steps(root)))[0])
    expected, wrong = digest.names(build(items)), {}
    for step in reversed(steps):
        folder, restored = root / str(step), None
        meta, error = group.do(lambda: _read_meta(folder))  # noqa: B023, called at once
        if not error:
            lacking = [name for name in expected if name not in meta["digests"]]
            if lacking or ("optimizer" in items and len(expected) < len(meta["digests"])):
                raise CheckpointError(
                    f"{folder} has other arrays: {len(meta['digests'])}, expected {len(expected)}; of these it lacks "
                    f"{', '.join(lacking[:3]) or 'none'}. Give the config that it was saved with")
            read, error = group.do(lambda: _read(folder, items))  # noqa: B023
        if not error:
            restored = build(read)
            del read
            _, error = group.do(lambda: _compare(digests(restored), meta["digests"]))  # noqa: B023
        if not error:
            return restored, meta, wrong
        wrong[step] = error
    if not steps:
        return None
    lines = "".join(f"\n  step {step}: {error}" for step, error in wrong.items())
    raise CheckpointError(f"no checkpoint in {root} can be used; expected one that is whole: put back its files, or "
                          f"remove the folder to start anew.{lines}")


def restore_variables(
    workdir: pathlib.Path, abstract: dict[str, Any], shardings: Any, *, ema: bool, say: Callable[[str], None]
) -> tuple[int, dict[str, Any]]:
    """Step of a run's newest whole checkpoint, and its parameters and batch statistics, or the averaged ones.

    `abstract` has their shapes and dtypes, `shardings` a sharding for each or for all. Nothing is written. Steps that
    are passed over, since they are damaged, are told to `say`. Raises FileNotFoundError if there is no checkpoint,
    CheckpointError if none can be used.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    tree = jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
                        abstract, shardings)
    item = "ema" if ema else "variables"

    def build(items: dict[str, Any]) -> dict[str, Any]:
        return items if ema else items[item]

    root = (pathlib.Path(workdir) / "checkpoints").absolute()
    found = _newest_whole(root, {item: tree}, build, _Group(), lambda restored: Digests(restored).of(restored))
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {root}: expected a workdir in which train.py has saved one")
    restored, meta, wrong = found
    for step, error in wrong.items():
        say(f"the checkpoint of step {step} is damaged ({error}): took the one of step {meta['step']}")
    return meta["step"], restored["ema"] if ema else restored


class Checkpoints(contextlib.AbstractContextManager):
    """The checkpoints in WORKDIR/checkpoints: the newest `keep` of them and, with `keep_best`, the best one.

    What a killed save left behind is removed by the next one. All processes make one and call its methods in the
    same order. `say` is told what is not as expected, perhaps by another thread. With `packing`, `save` is given states
    as it packs them; how they were packed is not kept.
    """

    def __init__(self, workdir: pathlib.Path, *, keep: int, keep_best: bool, say: Callable[[str], None],
                 packing: Packing | None = None):
        self._packing = packing
        self._spent: collections.deque[Any] = collections.deque(maxlen=SPENT)
        self._root = (pathlib.Path(workdir) / "checkpoints").absolute()
        self._keep, self._keep_best, self._say = keep, keep_best, say
        self._best: dict[str, Any] | None = None
        self._group, self._saves = _Group(), itertools.count()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._saving: concurrent.futures.Future | None = None
        self._digests: concurrent.futures.Future | None = None
        self._copy: concurrent.futures.Future | None = None
        self._target: Any = None
        self._copies: bool | None = None
        found, error = self._group.do(self._open, only_first=True)
        if error:
            raise CheckpointError(f"{self._root}: {error}")
        found = json.loads(self._group.tell(json.dumps(found))[0])
        self._saved: dict[int, float | None] = {int(step): acc1 for step, acc1 in found.items()}
        """The accuracy of each step that is there, where it is known."""

    def _open(self) -> dict[int, float | None]:
        self._root.mkdir(parents=True, exist_ok=True)
        saved = {}
        for step in _steps(self._root):
            try:
                saved[step] = _read_meta(self._root / str(step))["acc1"]
            except Exception:  # told where it matters, in restore
                saved[step] = None
        return saved

    def _clean(self) -> None:
        for path in self._root.glob(f"*{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)

    def _compile(self, state: TrainState) -> None:
        """Starts it, in the background."""
        self._target = self._packing.abstract if self._packing else digest.abstract(state)
        self._digests = self._worker.submit(Digests, state, self._packing)
        self._copy = self._worker.submit(compiled_copy, tuple(jax.tree.leaves(self._target)))

    def _digests_of(self, state: TrainState) -> list[dict[str, str]]:
        return self._digests.result().of(self._packing.pack(state) if self._packing else state)

    @property
    def best(self) -> dict[str, Any] | None:
        """{"step": ..., "acc1": ...} of the best evaluation so far, whether or not its step could be saved."""
        return self._best

    @property
    def saving(self) -> bool:
        """Whether a save is under way."""
        return self._saving is not None and not self._saving.done()

    @property
    def beside(self) -> bool:
        """Whether training goes on beside a save, by what the first one found."""
        return bool(self._copies)

    @property
    def latest(self) -> int | None:
        """The newest step that is there, whole or not."""
        return max(self._saved, default=None)

    def is_best(self, acc1: float | None) -> bool:
        """Whether this accuracy, of an evaluation if there was one, is higher than all before."""
        return acc1 is not None and math.isfinite(acc1) and (self._best is None or acc1 > self._best["acc1"])

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest whole state, shaped and sharded as `state`, which may be abstract, and its meta, with what was
        given as `extra`; None if there are no checkpoints.

        Steps that are damaged are told, and set aside as damaged_STEP. Raises CheckpointError if there are checkpoints
        of which none can be used; nothing is set aside then.
        """
        self._wait()
        target = digest.abstract(state)
        self._compile(target)
        found = _newest_whole(self._root, _items(target), _state, self._group, self._digests_of)
        if found is None:
            return None
        restored, meta, wrong = found
        for step, error in wrong.items():
            aside = f"damaged_{step}"
            _, failed = self._group.do(lambda: self._set_aside(step, aside), only_first=True)  # noqa: B023
            if failed:
                raise CheckpointError(f"step {step} is damaged ({error}), but could not be renamed: {failed}")
            del self._saved[step]
            self._say(f"the checkpoint of step {step} is damaged ({error}): it is set aside as "
                      f"{self._root / aside}, and the run goes on after step {meta['step']}")
        self._best = meta["best"]
        return restored, meta

    def _set_aside(self, step: int, name: str) -> None:
        shutil.rmtree(self._root / name, ignore_errors=True)
        (self._root / str(step)).rename(self._root / name)

    def save(
        self, state: Any, step: int, *, acc1: float | None = None, extra: Any = None, wait: bool = False
    ) -> None:
        """Start to save the state, which has done `step` steps; it may be donated afterwards. Told if it fails.

        `acc1` is the accuracy that it was evaluated to have; `extra`, of what JSON can hold, is kept in the meta, or
        what it returns: as a function it is called by the thread that saves, and may wait for figures of the step. A
        step that is there is not saved again. With `wait`, also finish; a save that fails is tried once more then, and
        CheckpointError is raised if that fails, too.
        """
        self._wait()
        if step in self._saved:
            return
        acc1 = None if acc1 is None or not math.isfinite(acc1) else float(acc1)
        if self.is_best(acc1):
            self._best = {"step": step, "acc1": acc1}
        if self._target is None or not fits(state, self._target):
            self._compile(digest.abstract(self._packing.unpack(state) if self._packing else state))
        digests, copy = self._digests.result(), self._copy.result()
        if self._copies is None:
            self._copies = has_room(state)
            if not self._copies:
                self._say("the devices have no room for a copy of the training state: training waits for each save")
        meta = {"step": step, "acc1": acc1, "best": self._best, "extra": extra}
        blocks = wait or not self._copies
        arrays, structure = jax.tree.flatten(state)
        for again in (True, False):
            sums = digests.start(state)
            given = [state if blocks else jax.tree.unflatten(structure, copy(arrays))]
            self._saving = self._worker.submit(self._save, next(self._saves), given, meta, digests, sums)
            error = self._wait() if blocks else ""
            if not error or not wait:
                return
            if again:
                self._say(f"the save of step {step} is tried once more")
        raise CheckpointError(f"step {step} could not be saved, in two tries: {error}")

    def free(self, spent: Any) -> None:
        """For a state that was donated: what is left of it, arrays without memory, is freed when nothing is saved. To
        free an array gives up Python's lock, and the thread that saves would take it, for each of them."""
        self._spent.append(spent)
        if not self.saving:
            for _ in range(min(2, len(self._spent))):
                self._spent.popleft()

    def evaluated(self, step: int, acc1: float, extra: Any) -> None:
        """Notes of a step that is there, saved before its evaluation, what `save` would have. Told if it fails."""
        self._wait()
        acc1 = float(acc1) if math.isfinite(acc1) else None
        if self.is_best(acc1):
            self._best = {"step": step, "acc1": acc1}
        self._saved[step] = acc1
        changes = {"acc1": acc1, "best": self._best, "extra": extra}
        _, error = self._group.do(lambda: _change_meta(self._root / str(step), changes), only_first=True)
        if error:
            self._say(f"the evaluation of step {step} could not be noted in its checkpoint ({error}); a run that goes "
                      "on from there does it again")

    def _wait(self) -> str:
        """For the save under way, if there is one; its error, which has been told, or an empty text."""
        saving, self._saving = self._saving, None
        return saving.result() if saving else ""

    @in_small_turns()
    def _save(self, number: int, given: list[Any], meta: dict[str, Any], digests: Digests, sums: Any) -> str:
        """Writes a step, in the worker's thread, and takes its state out of the list. Returns what went wrong in any
        process."""
        step, unpack = meta["step"], self._packing.unpack if self._packing else lambda state: state
        folder = self._root / f"{step}{UNFINISHED}-{number}"
        items, error = self._group.do(lambda: _items(unpack(given.pop())))
        if not error:
            item_names = list(items)
            _, error = self._group.do(lambda: self._begin(folder, item_names), only_first=True)
        if not error:
            extra = meta["extra"]
            written, error = self._group.do(
                lambda: (digests.read(sums)[0], extra() if callable(extra) else extra, _write(folder, items)))
        if not error:
            meta = {**meta, "digests": written[0], "extra": written[1]}
            _, error = self._group.do(lambda: _finish(folder, self._root / str(step), item_names, meta),
                                      only_first=True)
        if error:
            if self._group.first:
                shutil.rmtree(folder, ignore_errors=True)
            newest = f"that of step {max(self._saved)}" if self._saved else "none"
            self._say(f"the save of step {step} failed ({error}); nothing of it is kept. The newest checkpoint is "
                      f"{newest}")
            return error
        self._saved[step] = meta["acc1"]
        self._remove_old()
        return ""

    def _begin(self, folder: pathlib.Path, item_names: list[str]) -> None:
        self._clean()
        for name in item_names:
            (folder / name).mkdir(parents=True)

    def _remove_old(self) -> None:
        kept = set(sorted(self._saved)[-self._keep:])
        evaluated = {step: acc1 for step, acc1 in self._saved.items() if acc1 is not None}
        if self._keep_best and evaluated:
            kept.add(min(evaluated, key=lambda step: (-evaluated[step], step)))
        for step in sorted(set(self._saved) - kept):
            del self._saved[step]
            if self._group.first:
                old = self._root / f"{step}{UNFINISHED}-old"  # were it only half removed, it is no step
                try:
                    (self._root / str(step)).rename(old)
                    shutil.rmtree(old)
                except OSError as error:
                    self._say(f"the checkpoint of step {step}, which is to be kept no longer, could not be removed: "
                              f"{_short(error)}")

    def __exit__(self, *exception: object) -> None:
        """Waits for the save under way."""
        try:
            self._wait()
        finally:
            self._worker.shutdown(cancel_futures=True)
