"""JAX's persistent compilation cache, on for our commands: a second start loads what the first one compiled.

The folder is $JAX_COMPILATION_CACHE_DIR, else $XDG_CACHE_HOME/fastervit_jax/xla, else ~/.cache/fastervit_jax/xla. An
empty JAX_COMPILATION_CACHE_DIR turns the cache off. XLA:GPU's choices of kernels are kept in the same folder.

JAX finds a program by its text, which is to be traced and lowered first: half of a second start. `keep` and `load` are
for a whole executable, found by what its text would come from.
"""

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import serialize_executable

MIN_SECONDS = 0.1
"""Programs that compile faster are not kept: a training run has dozens of them, each a file. JAX's own limit, 1 s,
leaves out some that a start waits for."""
KEPT = ".executable"
PLATFORMS = ("gpu",)
"""Where executables are kept. XLA:CPU loads one that was serialised after it had been loaded itself, but cannot run it;
on TPUs it was not tried."""
ENVIRONMENT = ("CUBLAS", "CUDA", "CUDNN", "FLAX", "JAX", "LIBTPU", "MOSAIC", "NVIDIA", "PJRT", "TF_", "TPU", "XLA")
"""What the names of variables begin with that may change a program."""
MAX_BYTES = 10 * 10**9
"""Of our own folder. JAX's `jax_compilation_cache_max_size` is not used: where a process was killed between the two
files of an entry, JAX writes no entry any more."""


def enable() -> None:
    """Turn the cache on in this process, for a command to call before it compiles: global settings of JAX are changed.

    What JAX has been told, by its environment variables or otherwise, stays. One of several processes
    (`jax.distributed`) has a cache only where JAX_COMPILATION_CACHE_DIR names one, which all are to share: only the
    first of them writes, and one that has its programs would wait for others that compile. Where our own folder cannot
    be written, that is said on stderr, and there is no cache.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    told = jax.config.jax_compilation_cache_dir
    if told == "":
        jax.config.update("jax_compilation_cache_dir", None)  # else XLA:GPU would take the current folder
    if told is not None or jax.distributed.is_initialized():
        return
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fastervit_jax", "xla")
    try:
        path = pathlib.Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(f"no compilation cache, so each start compiles anew: {folder} cannot be written ({error}); "
              "JAX_COMPILATION_CACHE_DIR names another folder", file=sys.stderr)
        return
    _trim(path)
    jax.config.update("jax_compilation_cache_dir", str(path))


def _trim(folder: pathlib.Path) -> None:
    """Delete the programs that were used least recently, as far as the filesystem tells, beyond MAX_BYTES."""
    found = []
    for path in (*folder.glob("*-cache"), *folder.glob(f"*{KEPT}*")):
        with contextlib.suppress(FileNotFoundError):  # another process trims, too
            stat = path.stat()
            found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)


def _digests(paths: Iterable[pathlib.Path]) -> list[str]:
    return sorted(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths if path.is_file())


FILES = _digests(pathlib.Path(__file__).parent.rglob("*.py"))
"""Of this package as it is imported; the files may change while the program runs."""


def key(devices: Sequence[jax.Device], **parts: Any) -> str | None:
    """Names an executable for these devices, by what this package's programs depend on. None where none are kept.

    That is: `parts`, of what JSON can hold, with which the program is made; the files of this package and of the
    program that runs; the names and versions of the packages that are installed (who changes one's files has to empty
    the cache); JAX's settings in this thread, and the environment; devices and their software.
    """
    one, main = devices[0], getattr(sys.modules["__main__"], "__file__", None)
    program = _digests([pathlib.Path(main)] if main else [])
    if one.platform not in PLATFORMS or not FILES or (main and not program):  # in an archive, say
        return None
    everything = {
        "parts": parts,
        "files": FILES + program,
        "packages": sorted({f"{x.name} {x.version}" for x in importlib.metadata.distributions()}),
        "python": sys.version,
        "settings": {name: str(value) for name, value in jax.config.values.items()},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(ENVIRONMENT)},
        "devices": [[device.id, device.device_kind] for device in devices],
        "software": one.client.platform_version,
    }
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def _kept(key: str) -> epath.Path | None:
    folder = jax.config.jax_compilation_cache_dir
    return epath.Path(folder) / f"{key}{KEPT}" if folder and jax.config.jax_enable_compilation_cache else None


def load(key: str, devices: Sequence[jax.Device], say: Callable[[str], None]) -> tuple[jax.stages.Compiled, Any] | None:
    """What `keep` was given with this key, for these devices; None if there is nothing, or no cache. `say` is told of a
    file that cannot be used; it is removed, if that is possible."""
    path = _kept(key)
    if path is None:
        return None
    try:
        if not path.exists():
            return None
        data = path.read_bytes()
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise ValueError(f"its {len(data):,} bytes are not those that were written")
        payload, in_tree, out_tree, more = pickle.loads(data[32:])
        return serialize_executable.deserialize_and_load(
            payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices), more
    except Exception as error:  # another driver's, a lack of memory, ...: what it is for is only to save time
        say(f"the executable kept in {path} cannot be used ({error}), and is made anew")
        with contextlib.suppress(OSError):  # of a folder that is only read; told again at the next start
            path.unlink(missing_ok=True)
        return None


def keep(key: str, compiled: jax.stages.Compiled, more: Any, say: Callable[[str], None]) -> None:
    """For `load` in another process; `more` can be what pickle takes. Does nothing if it is there, or without a cache.
    `say` is told if it cannot be written."""
    path = _kept(key)
    if path is None:
        return
    try:
        if path.exists():
            return
        data = pickle.dumps((*serialize_executable.serialize(compiled), more))
        new = path.with_name(f"{path.name}.{os.getpid()}")
        new.write_bytes(hashlib.sha256(data).digest() + data)
        new.replace(path)
    except Exception as error:  # in the background, where nobody else would tell
        say(f"the executable is not kept for the next start: {path} cannot be written ({error})")


def compile_ahead(
    stack: contextlib.ExitStack, step: Any, arguments: tuple, more: Callable[[], Any], devices: Sequence[jax.Device],
    say: Callable[[str], None], parts: dict[str, Any] | None,
) -> Callable[[], tuple[Callable, Any]]:
    """Starts to compile a jitted function for (abstract) arguments in a thread, which ends with the stack.

    What is returned waits for it, and gives the compiled function and what `more` returns: both as a former start kept
    them, where there are `parts` of their `key`. Settings of JAX that a `with` block made are of one thread; if there
    are any, the function is given back as it is.
    """
    worker = concurrent.futures.ThreadPoolExecutor(1, "compilation")
    stack.callback(worker.shutdown, wait=False, cancel_futures=True)  # an error is told at once
    if worker.submit(lambda: dict(jax.config.values)).result() != dict(jax.config.values):
        return lambda: (step, more())
    name = key(devices, **parts) if parts else None

    def compiled() -> tuple[Callable, Any]:
        kept = name and load(name, devices, say)
        return kept or (step.lower(*arguments).compile(), more())

    compiling = worker.submit(compiled)

    def result() -> tuple[Callable, Any]:
        found = compiling.result()
        if name:
            worker.submit(keep, name, *found, say)
        return found

    return result
