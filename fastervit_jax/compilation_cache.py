"""JAX's persistent compilation cache, on for our commands: a second start loads what the first one compiled.

The folder is $JAX_COMPILATION_CACHE_DIR, else $XDG_CACHE_HOME/fastervit_jax/xla, else ~/.cache/fastervit_jax/xla. An
empty JAX_COMPILATION_CACHE_DIR turns the cache off. XLA:GPU's choices of kernels are kept in the same folder.
"""

import contextlib
import os
import pathlib
import sys
import tempfile

import jax

MIN_SECONDS = 0.1
"""Programs that compile faster are not kept: a training run has dozens of them, each a file. JAX's own limit, 1 s,
leaves out some that a start waits for."""
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
    for path in folder.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another process trims, too
            stat = path.stat()
            found.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
    total = 0
    for _, size, path in sorted(found, reverse=True):
        total += size
        if total > MAX_BYTES:
            path.unlink(missing_ok=True)
