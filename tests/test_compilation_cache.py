"""A second start loads what the first one compiled; where that cannot be, the run goes on."""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import pytest

from fastervit_jax import compilation_cache
from fastervit_jax.train import loop
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
    for name in ("e.executable", "f.executable.17"):
        (place / name).write_bytes(bytes(12))
        os.utime(place / name, (1e9 - 1, 1e9 - 1))
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


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Executables are kept on CPUs, too; their folder."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(compilation_cache, "PLATFORMS", ("cpu",))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    yield tmp_path / "kept"
    jax.config.update("jax_compilation_cache_dir", before)


def test_an_executable_is_kept(kept):
    """For two devices, with what it donates; as it is loaded, it gives the same numbers."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    lying = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    devices, x = list(mesh.devices.flat), np.arange(8, dtype=np.float32)
    double = jax.jit(lambda tree: {"y": 2 * tree["x"], "sum": tree["x"].sum()}, donate_argnums=0)
    compiled = double.lower({"x": jax.ShapeDtypeStruct((8,), np.float32, sharding=lying)}).compile()
    key, told = compilation_cache.key(devices, of="two"), []
    assert compilation_cache.load(key, devices, told.append) is None
    compilation_cache.keep(key, compiled, 3.5, told.append)
    assert [path.name for path in kept.iterdir()] == [f"{key}.executable"]

    loaded, more = compilation_cache.load(key, devices, told.append)
    given = {"x": jax.device_put(x, lying)}
    result = loaded(given)
    assert more == 3.5
    assert given["x"].is_deleted()
    assert result["y"].sharding.is_equivalent_to(lying, 1)
    np.testing.assert_array_equal(result["y"], 2 * x)
    assert result["sum"] == 28
    with pytest.raises(TypeError, match="float32"):
        loaded({"x": jax.device_put(x.astype(np.int32), lying)})

    path = kept / f"{key}.executable"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    compilation_cache.keep(key, compiled, 3.5, told.append)  # it is there
    assert path.read_bytes() == data
    assert not told
    assert compilation_cache.load(key, devices, told.append) is None
    assert len(told) == 1
    assert f"{path} cannot be used (its {len(data):,} bytes are not those that were written)" in told[0]
    assert not path.exists()

    path.with_name(f"{path.name}.{os.getpid()}").mkdir()
    compilation_cache.keep(key, compiled, 3.5, told.append)
    assert f"{path} cannot be written ([Errno 21] Is a directory" in told[1]
    (path / "full").mkdir(parents=True)  # cannot be read, nor removed
    assert compilation_cache.load(key, devices, told.append) is None
    assert f"{path} cannot be used ([Errno 21] Is a directory" in told[2]
    shutil.rmtree(path)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        compilation_cache.keep(key, compiled, 3.5, told.append)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not path.exists()
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.keep(key, compiled, 3.5, told.append)
    assert compilation_cache.load(key, devices, told.append) is None
    assert len(told) == 3


def test_what_names_an_executable(kept, monkeypatch, tmp_path):
    devices = jax.devices()

    def key(devices=devices, **parts):
        return compilation_cache.key(devices, **{"steps": 1, **parts})

    one = key()
    assert key() == one
    others = [key(steps=2), key(devices[:1]), key(devices[::-1])]
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_gpu_deterministic_ops=true")
        others.append(key())
    with jax.default_matmul_precision("bfloat16"):
        others.append(key())
    assert len(compilation_cache.FILES) == len(list((ROOT / "fastervit_jax").rglob("*.py")))
    changed = tmp_path / "changed.py"
    changed.write_text("1")
    (digest,) = compilation_cache._digests([changed, tmp_path / "nothing.py"])
    changed.write_text("2")
    assert compilation_cache._digests([changed]) not in ([digest], [])
    with monkeypatch.context() as patch:
        patch.setattr(compilation_cache, "FILES", [*compilation_cache.FILES[1:], digest])
        others.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["__main__"], "__file__", str(changed), raising=False)
        others.append(key())
        patch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "nothing.py"))
        assert key() is None
    with monkeypatch.context() as patch:
        patch.setenv("FLAX_FIX_RNG_SEPARATOR", "1")
        others.append(key())
    with monkeypatch.context() as patch:
        patch.setattr(compilation_cache.importlib.metadata, "distributions", lambda: [])
        others.append(key())
    assert len({one, *others}) == 10
    assert key() == one
    monkeypatch.setattr(compilation_cache, "PLATFORMS", ("gpu",))
    assert key() is None


def test_a_second_start_of_a_run_traces_nothing(kept, monkeypatch, tmp_path, capfd):
    """It takes the step that the first one kept, another step's not; what it writes is the same."""
    config = runs.config(**{
        "epochs": 1, "warmup_epochs": 0, "batch_size": 8, "data.train_split": "train[:40]",
        "data.eval_split": "validation[:8]", "augment.zoom": 0.0, "augment.shift": 0.0,
        "model.hat": (False, False, False, False), "seed": 61})
    first = loop.train(config, tmp_path / "first", keep_compiled=True)
    assert len(list(kept.glob("*.executable"))) == 1
    with monkeypatch.context() as patch, runs.stopping(patch, after=2):  # not told to keep: its own step
        loop.train(config, tmp_path / "second")

    def lower(*args):
        raise AssertionError("nothing was to be lowered")

    make_train_step = loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", lambda *args: types.SimpleNamespace(lower=lower))
    assert loop.train(config, tmp_path / "second", keep_compiled=True) == first
    assert runs.lines(tmp_path / "first") == runs.lines(tmp_path / "second")
    config.learning_rate *= 2
    with pytest.raises(AssertionError, match="nothing was to be lowered"):
        loop.train(config, tmp_path / "third", keep_compiled=True)
    monkeypatch.setattr(loop, "make_train_step", make_train_step)

    (path,) = kept.glob("*.executable")
    path.write_bytes(path.read_bytes()[:-1])
    config.learning_rate /= 2
    capfd.readouterr()
    assert loop.train(config, tmp_path / "fourth", keep_compiled=True) == first
    assert f"the executable kept in {path} cannot be used" in capfd.readouterr().out


def test_importing_us_changes_no_settings(tmp_path):
    start({"XDG_CACHE_HOME": str(tmp_path)}, "-c", textwrap.dedent("""
        import jax
        before = dict(jax.config.values)
        import fastervit_jax, fastervit_jax.predict, fastervit_jax.sweep_run, fastervit_jax.train.command
        assert jax.config.values == before
    """))
    assert not list(tmp_path.iterdir())
