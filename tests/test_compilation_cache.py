"""A second start loads what the first one compiled; where that cannot be, the run goes on."""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import pytest

from fastervit_jax import compilation_cache
from tests import QUICKLY
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def untold(monkeypatch):
    """As if nobody had told JAX of a cache; its settings are put back."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def folder():
    return jax.config.jax_compilation_cache_dir


def test_the_folder(untold, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    compilation_cache.enable()
    assert folder() == str(tmp_path / "xdg/fastervit_jax/xla")
    assert pathlib.Path(folder()).is_dir()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == compilation_cache.MIN_SECONDS
    assert jax.config.jax_persistent_cache_enable_xla_caches == "xla_gpu_per_fusion_autotune_cache_dir"

    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    compilation_cache.enable()
    assert folder() == str(tmp_path / ".cache/fastervit_jax/xla")


def test_what_jax_was_told_stays(untold, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    compilation_cache.enable()
    assert (folder(), jax.config.jax_persistent_cache_min_compile_time_secs) == (str(tmp_path / "mine"), 3)
    jax.config.update("jax_compilation_cache_dir", "")  # as JAX reads an empty variable
    compilation_cache.enable()
    assert folder() is None
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    compilation_cache.enable()
    assert folder() is None
    assert not (tmp_path / "xdg").exists()


def test_a_folder_that_cannot_be_written(untold, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    compilation_cache.enable()
    assert folder() is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "/dev/null/fastervit_jax/xla cannot be written" in said
    assert "JAX_COMPILATION_CACHE_DIR" in said

    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name")
    compilation_cache.enable()
    assert folder() is None
    assert "Could not determine home directory" in capsys.readouterr().err


def test_our_folder_has_a_limit(untold, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 30)
    place = tmp_path / "fastervit_jax/xla"
    place.mkdir(parents=True)
    for i, name in enumerate(("b", "d", "a", "c")):
        (place / f"{name}-cache").write_bytes(bytes(12))
        os.utime(place / f"{name}-cache", (1e9 + i, 1e9))
    (place / "xla_gpu_per_fusion_autotune_cache_dir").mkdir()
    compilation_cache.enable()
    assert sorted(x.name for x in place.iterdir()) == ["a-cache", "c-cache", "xla_gpu_per_fusion_autotune_cache_dir"]


def start(environment, *command):
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    process = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, text=True, capture_output=True,
        env={**own, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY, **environment})
    assert process.returncode == 0, process.stderr[-4000:]
    return process


def test_a_second_start_compiles_nothing(tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                   "JAX_EXPLAIN_CACHE_MISSES": "1"}  # of both kinds of caches; those on disk say PERSISTENT
    command = ["train.py", *runs.FLAGS, "--config.epochs=1", "--config.warmup_epochs=0", "--config.batch_size=8",
               "--config.data.train_split=train[:16]", "--config.data.eval_split=validation[:8]",
               "--config.augment.zoom=0", "--config.augment.shift=0", "--config.model.hat=(False,False,False,False)"]
    missed = []
    for name in ("first", "second"):
        said = start(environment, *command, f"--workdir={tmp_path / name}").stderr
        missed.append(said.count("PERSISTENT COMPILATION CACHE MISS"))
    assert missed[0] > 10
    assert missed[1] == 0
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("first", "second"))
    assert first == second


def test_importing_us_changes_no_settings(tmp_path):
    start({"XDG_CACHE_HOME": str(tmp_path)}, "-c", textwrap.dedent("""
        import jax
        before = dict(jax.config.values)
        import fastervit_jax, fastervit_jax.predict, fastervit_jax.sweep_run, fastervit_jax.train.command
        assert jax.config.values == before
    """))
    assert not list(tmp_path.iterdir())
