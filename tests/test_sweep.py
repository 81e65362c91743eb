"""Which runs a sweep has, what it refuses, which of them a job does, and what becomes of them when it is killed."""

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import jax
import pytest

from fastervit_jax import sweep, sweep_points, sweep_run
from tests import QUICKLY

SHIPPED = {"carrier_or_plain": 10, "depth_and_width": 18, "hat_by_stage": 8, "learning_rate_and_decay": 18,
           "long_range": 6, "propagation": 8, "window_and_carrier": 18}  # fmt: skip
TINY = """
    from tests.train import runs

    SEEDS = {seeds}

    def get_config():
        return runs.config(**{{"data.image_size": 64, "model.ct_size": 1}})

    def get_points():
        return {points}
"""


def write(tmp_path, points, seeds=(0,), name="tiny.py"):
    path = tmp_path / name
    path.write_text(textwrap.dedent(TINY).format(points=points, seeds=seeds))
    return str(path)


def test_all_sweeps_here_are_known():
    files = {path.stem for path in pathlib.Path("configs/sweeps").glob("*.py")}
    assert files - {"__init__", "common"} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sweep_loads_and_lists(name, tmp_path):
    path = f"configs/sweeps/{name}.py"
    runs = sweep.load(path)
    assert len(runs) == len({run.name for run in runs}) == SHIPPED[name]
    assert all(re.fullmatch(r"[\w.=+-]+_seed=[012]", run.name) for run in runs)
    assert f"python -m fastervit_jax.sweep {path} --workdir=" in pathlib.Path(path).read_text()
    assert {run.config.seed for run in runs} == ({0, 1, 2} if name == "long_range" else {0, 1})
    for run in runs:
        assert sweep_run.from_json(run.entry()["config"]) == run.config
    workdir = tmp_path / "not_there"
    head, line, *_ = sweep.dry_run(runs[:1], workdir).splitlines()
    assert head.split()[:3] == ["run", "parameters", "GFLOPs"]
    assert line.split()[0] == runs[0].name
    assert not workdir.exists()


def test_runs_of_the_window_and_carrier_sweep():
    runs = sweep.load("configs/sweeps/window_and_carrier.py", ["--config.epochs=3"])
    assert [run.name for run in runs][:5] == [
        "window_size=3_ct_size=1_seed=0", "window_size=3_ct_size=1_seed=1", "window_size=3_ct_size=2_seed=0",
        "window_size=3_ct_size=2_seed=1", "window_size=3_ct_size=3_seed=0"]
    assert (runs[-1].point, runs[-1].seed, runs[-1].shown) == (8, 1, {"window_size[2]": 5, "ct_size": 3})
    config = runs[-1].config
    assert (config.model.window_size, config.model.ct_size, config.seed, config.epochs) == ((4, 4, 5, 4), 3, 1, 3)
    assert [runs[i].config.model.ct_size for i in (0, 1, 2)] == [1, 1, 2]


def test_names_and_columns(tmp_path):
    """Labels, floats, tuples that differ in several entries, values of the base, a key that the result has, too."""
    runs = sweep.load(write(tmp_path, """[
        {"label": "small & slow", "learning_rate": 1e-5}, {"model.hat": (False, False, False, False)}, {},
        {"loss": "binary_cross_entropy", "model.depths": (2, 1, 1, 2)}]"""))
    assert [run.name for run in runs] == [
        "small-slow_seed=0",
        "learning_rate=0.002_hat=False_config.loss=cross_entropy_depths=1-1-1-1_seed=0",
        "learning_rate=0.002_hat=True_config.loss=cross_entropy_depths=1-1-1-1_seed=0",
        "learning_rate=0.002_hat=True_config.loss=binary_cross_entropy_depths=2-1-1-2_seed=0"]
    assert runs[3].shown == {"learning_rate": 2e-3, "hat[2]": True, "config.loss": "binary_cross_entropy",
                             "depths": (2, 1, 1, 2)}
    assert runs[3].overrides == {"loss": "binary_cross_entropy", "model.depths": (2, 1, 1, 2)}


def test_all_invalid_points_are_listed_and_nothing_is_written(tmp_path):
    path, workdir = write(tmp_path, """[
        {"model.ct_size": 1}, {"model.ct_sise": 2, "epochs": 1.5}, {"model.window_size": (4, 4, 4, 4)},
        {"model.ct_size": 3}, {"model.num_heads": (2, 4, 7, 16)}, {"model.ct_size": 1, "batch_size": 64},
        {"seed": 3}, {"model": {}}, {"label": ""}, {"model.window_size": (2, 2)}, {"batch_size": 2048},
        {"model.num_classes": 7}, {"data.eval_split": "test"}, {"init_from": "faster_vit_0_224"},
        {"init_from": "runs/not_there"}, {"data.source": "folder", "data.dir": "not_there"}]"""), tmp_path / "workdir"
    with pytest.raises(SystemExit) as stopped:
        sweep.main([path, f"--workdir={workdir}"])
    expected = [
        r"tiny.py has invalid points; nothing was started:",
        r"point 1, .*: unknown key 'model.ct_sise', did you mean model.ct_size",
        r"point 1, .*: epochs=1.5: expected int, as 2 is",
        r"point 2, .*: config.model.hat=.* a single window of 4 tokens a side",
        r"point 3, .*: ct_size=3: more carrier tokens a side than stage 2's window of 2",
        r"point 4, .*: num_heads=.*7 heads do not divide",
        r"point 6, .*: seed: expected in SEEDS",
        r"point 7, .*: unknown key 'model'",
        r"point 8, .*: label='': expected a text",
        r"point 9, .*: window_size=\(2, 2\): expected a list or tuple of 4 values",
        r"point 10, .*: config.batch_size=2048: larger than the 1442 training images",
        r"point 11, .*: config.model.num_classes=7: digits has 10",
        r"point 12, .*'test'.*train, validation",
        r"point 14, .*: config.init_from='runs/not_there': no such file, folder or registered model",
        r"point 15, .*: .*/not_there",
        r"points 0 and 5 are the same",
    ]
    lines = stopped.value.code.splitlines()
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line), (pattern, line)
    assert not workdir.exists()


BODY = """SEEDS = (0,)
from tests.train import runs
def get_config(): return runs.config()
def get_points(): return [{}]
"""


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (BODY + "1 = 2", [], "tiny.py, line 5: SyntaxError: cannot assign"),
        (BODY + "import nothing_such", [], "tiny.py, line 5: ModuleNotFoundError: No module named"),
        (BODY + "def get_points(): return lost", [], "tiny.py, line 5: NameError: name 'lost'"),
        (BODY + "def get_points(): yield {}; 1 / 0", [], "tiny.py, line 5: ZeroDivisionError"),
        (BODY + "def get_config(): return [][1]", [], "tiny.py, line 5: IndexError"),
        (BODY + "def get_config(): ...", [], r"get_config\(\) returned None; expected a ConfigDict"),
        ("None", [], "get_points.. returned None; expected a list of dicts"),
        ("SEEDS = (0,)\ndef get_config(): ...", [], r"has no get_points\(\): expected get_config"),
        (None, ["--config.model.ct_sise=2"], "unknown config key .*ct_sise"),
        (None, ["--config.model.ct_size=two"], "model.ct_size.*two"),
        (None, ["--config.learning_rate=0.1"], r"--config.learning_rate=0.1: the sweep sets it itself"),
        (None, ["--config.seed=3"], r"--config.seed=3: the sweep sets it itself"),
        ("[]", [], "get_points.. returned .*; expected a list of dicts"),
        ("[{'label': 'a b', 'epochs': 3}, {'label': 'a/b', 'epochs': 4}]", [],
         "need a \"label\" of their own:\n  point 0.*'a-b_seed=0' is another's"),
        ("[{'label': 151 * 'x'}]", [], "too long"),
    ],
)  # fmt: skip
def test_refused_files_and_changes(text, changes, message, tmp_path):
    is_file = text and "SEEDS" in text
    path = write(tmp_path, text if text and not is_file else "[{'learning_rate': 0.5}]")
    if is_file:
        pathlib.Path(path).write_text(text)
    with pytest.raises(sweep.SweepError, match=message):
        sweep.load(path, changes)


@pytest.mark.parametrize("seeds", ["()", "(0, 0)", "(-1,)", "(0.5,)", "2", "None", "'01'"])
def test_refused_seeds(seeds, tmp_path):
    with pytest.raises(sweep.SweepError, match=r"SEEDS=.*each once"):
        sweep.load(write(tmp_path, [{}], seeds))


def test_points_may_be_a_generator_and_data_is_opened_once(tmp_path, monkeypatch):
    opened, open_sources = [], sweep_points.loop.open_sources
    monkeypatch.setattr(sweep_points.loop, "open_sources", lambda config: opened.append(config) or open_sources(config))
    runs = sweep.load(write(tmp_path, "({'epochs': x} for x in (2, 3, 4))", "range(2)"))
    assert [(run.config.epochs, run.seed) for run in runs] == [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)]
    assert len(opened) == 1


@pytest.mark.parametrize("other", ["--index=0", "--of=2", "--config.epochs=3", "--dry-run", "tiny.py"])
def test_result_alone(other, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--result", f"--workdir={tmp_path}", other])
    left_out = {"tiny.py": "the sweep file"}.get(other, other.partition("=0")[0].partition("=2")[0])
    assert f"--result draws all that is in the workdir: leave out {left_out}; expected" in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SystemExit, match=r"no such sweep file; there are configs.sweeps.carrier_or_plain.py, "):
        sweep.main(["configs/sweeps/window_carrier.py", f"--workdir={tmp_path / 'a'}"])
    with pytest.raises(SystemExit, match="no such folder; expected the --workdir of a sweep"):
        sweep.main(["--result", f"--workdir={tmp_path / 'a'}"])
    assert not (tmp_path / "a").exists()


def slurm(task, low, high, step, count):
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    return {f"SLURM_ARRAY_TASK_{name}": str(x) for name, x in zip(names, (task, low, high, step, count), strict=True)}


@pytest.mark.parametrize(
    ("index", "of", "environment", "expected"),
    [
        (None, None, {}, (0, 1)),
        (3, 16, {}, (3, 16)),
        (3, 16, slurm(1, 1, 4, 1, 4), (3, 16)),
        (None, None, slurm(0, 0, 15, 1, 16), (0, 16)),
        (None, None, slurm(8, 5, 8, 1, 4), (3, 4)),
        (None, None, slurm(7, 1, 8, 2, 4), (3, 4)),  # 1-8:2 is 1, 3, 5, 7
        (None, 4, {"JOB_COMPLETION_INDEX": "2"}, (2, 4)),
        (3, None, {}, "--index=3 without --of"),
        (None, 3, {}, "--of=3 without --index"),
        (3, 3, {}, "expected an index from 0"),
        (-1, 3, {}, "expected an index from 0"),
        (None, 16, slurm(0, 0, 15, 1, 16), "--of=16 in a Slurm array"),
        (None, None, slurm(7, 1, 7, 1, 3), "not all ids of a range"),  # 1,3,7
        (None, None, {"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_MIN=None.*give --index and --of"),
        (None, None, {"JOB_COMPLETION_INDEX": "2"}, "without --of: expected --of=COMPLETIONS"),
        (None, 2, {"JOB_COMPLETION_INDEX": "2"}, "JOB_COMPLETION_INDEX=2 --of=2: expected an index from 0"),
    ],
)  # fmt: skip
def test_slices(index, of, environment, expected):
    if isinstance(expected, str):
        with pytest.raises(sweep.SweepError, match=expected):
            sweep.which_slice(index, of, environment)
    else:
        assert sweep.which_slice(index, of, environment) == expected


def test_estimate_of_memory(tmp_path):
    """The state as counted by hand; what is kept for the backward pass follows the images that are computed at once."""
    base = sweep.load(write(tmp_path, [{}]))[0].config

    def estimated(**changes):
        config = base.copy_and_resolve_references()
        config.update_from_flattened_dict({key.replace("__", "."): x for key, x in changes.items()})
        return sweep.estimate(config)

    plain, doubled = estimated(), estimated(batch_size=128)
    averaged, split = estimated(ema_decay=0.9), estimated(mesh__fsdp=2)
    shapes = jax.eval_shape(lambda: sweep_run.init_variables(sweep_run.make_model(base), base))
    statistics = sum(x.size for x in jax.tree.leaves(shapes["batch_stats"]))
    scalars = 3  # step, skipped updates, AdamW's count
    assert plain["parameters"] == sum(x.size for x in jax.tree.leaves(shapes["params"]))
    # Parameters, gradients, two moments.
    assert plain["state_gib"] * 2**30 == 4 * (4 * plain["parameters"] + statistics + scalars)
    assert (averaged["state_gib"] - plain["state_gib"]) * 2**30 == 4 * (plain["parameters"] + statistics)
    assert doubled["state_gib"] == plain["state_gib"]
    # A little of it, as the position terms and the networks that they come from, is there once for all images.
    backward = [estimate["backward_gib"] * 2**30 for estimate in (plain, doubled, estimated(batch_size=192))]
    assert backward[2] - backward[1] == backward[1] - backward[0]
    assert 1.96 < backward[1] / backward[0] <= 2
    assert estimated(accumulate=2, batch_size=128)["backward_gib"] == plain["backward_gib"]
    assert 0.5 < split["state_gib"] / plain["state_gib"] < 0.8
    assert split["devices"] == 2
    assert estimated(mesh__fsdp=2, batch_size=128)["backward_gib"] == plain["backward_gib"]
    assert plain["training_gib"] == plain["state_gib"] + plain["backward_gib"]
    # At least the maps that the first convolutions leave: 64 images, 32×32 and 16×16 pixels, 8 channels, float32.
    assert plain["backward_gib"] * 2**30 > 64 * (32**2 + 16**2) * 8 * 4
    assert estimated(remat=(True, True, True, True))["backward_gib"] < 0.7 * plain["backward_gib"]


# Runs that only pretend


STUB = """
    import json, pathlib, signal, sys, time

    workdir, name = pathlib.Path(sys.argv[1]), sys.argv[2]
    folder = workdir / "runs" / name
    print("hello from", name)
    with (folder / "starts").open("a") as file:
        file.write("x")
    if "waits" in name:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (folder / "ready").touch()
        time.sleep(60)
    if "wrong" in name:
        sys.exit(3)
    if "killed" in name:
        signal.raise_signal(signal.SIGKILL)
    if "again" in name:
        sys.exit(75)
    if "forgets" not in name:
        result = dict(acc1=90.0, acc5=99.0, loss=0.5, seed=0, parameters=1, gflops=1.0, train_images_per_second=1.0,
                      inference_images_per_second=2.0, memory_gib=None, memory_of="process", device="cpu", devices=1,
                      jax="0")
        (folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """A function that runs a sweep with points of these labels, and returns its exit code and workdir."""
    stub = tmp_path / "stub.py"
    stub.write_text(textwrap.dedent(STUB))
    monkeypatch.setattr(sweep, "PROGRAM", (sys.executable, "-S", str(stub)))

    def run(*labels, flags=()):
        points = [{"label": label, "epochs": 3 + i} for i, label in enumerate(labels)]
        with pytest.raises(SystemExit) as stopped:
            sweep.main([write(tmp_path, points), f"--workdir={tmp_path / 'workdir'}", *flags])
        return stopped.value.code, tmp_path / "workdir"

    return run


def starts(workdir):
    return {path.parent.name.partition("_")[0]: len(path.read_text()) for path in workdir.glob("runs/*/starts")}


def test_a_failed_run_does_not_stop_the_rest(pretend, capsys):
    labels = "one", "wrong", "killed", "forgets", "two"
    code, workdir = pretend(*labels)
    said = capsys.readouterr().out
    assert code == 1
    assert "[1/5] one_seed=0: top-1 90.000 %, loss 0.5000, " in said
    log = workdir / "runs" / "wrong_seed=0" / "log.txt"
    assert f"\n  wrong_seed=0: exit code 3, {log}\n" in said
    assert "hello from wrong_seed=0\n" in log.read_text()
    assert "\n  killed_seed=0: killed by SIGKILL, out of memory perhaps, " in said
    assert "\n  forgets_seed=0: exit code 0, " in said
    assert "\n  one_seed=0" not in said
    assert (workdir / "result.csv").read_text().count("90.0") == 2
    assert pretend(*labels)[0] == 1
    assert starts(workdir) == {"one": 1, "wrong": 2, "killed": 2, "forgets": 2, "two": 1}
    # Points may be added, and a slice of the runs may be done.
    assert pretend(*labels, "three", "four", flags=["--index=5", "--of=7"])[0] == 0
    assert starts(workdir) == {"one": 1, "wrong": 2, "killed": 2, "forgets": 2, "two": 1, "three": 1}


def test_a_run_that_is_to_be_started_again_ends_the_sweep_alike(pretend, capsys):
    code, workdir = pretend("wrong", "again", "two")
    assert code == 75
    assert starts(workdir) == {"wrong": 1, "again": 1}
    head = "These runs failed. Those that ended are tried again by the same command:"
    assert f"{head}\n  wrong_seed=0: exit code 3" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"acc1": 90.0}'])
def test_a_damaged_result_does_not_stop_the_rest(damage, pretend, capsys):
    _, workdir = pretend("one", "two")
    (workdir / "runs" / "one_seed=0" / "result.json").write_text(damage)
    (workdir / "runs" / "two_seed=0" / "result.json").unlink()
    code, _ = pretend("one", "two")
    assert starts(workdir) == {"one": 1, "two": 2}
    assert re.search(r"The result could not be written: .*one_seed=0/result.json (is no JSON|has no )", code)  # so 1
    said = capsys.readouterr().out
    assert re.search(r"\[1/2\] one_seed=0: failed: .*put the right one back", said)
    assert re.search(r"These runs failed.*\n  one_seed=0: .*result.json", said)


def test_a_run_that_another_process_ends_meanwhile_is_not_repeated(pretend, monkeypatch, capsys):
    _, workdir = pretend("one")
    done = workdir / "runs" / "one_seed=0" / "result.json"
    content, locked = done.read_text(), sweep.locked
    done.unlink()

    def late(folder):
        done.write_text(content)
        return locked(folder)

    monkeypatch.setattr(sweep, "locked", late)
    assert pretend("one")[0] == 0
    assert starts(workdir) == {"one": 1}
    assert "[1/1] one_seed=0: done before, top-1 90.000 %" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on(number, pretend, tmp_path, capsys):
    def interrupt():
        ready, until = tmp_path / "workdir" / "runs" / "waits_seed=0" / "ready", time.monotonic() + 30
        while not ready.exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.getsignal(number)
    code, workdir = pretend("waits", "two")
    thread.join()
    assert code == 75
    assert starts(workdir) == {"waits": 1}
    assert "waits_seed=0: stopped after " in capsys.readouterr().out
    assert signal.getsignal(number) is before


def test_no_run_twice_at_a_time(pretend, tmp_path, capsys):
    _, workdir = pretend("wrong", "two")
    (workdir / "runs" / "two_seed=0" / "result.json").unlink()
    with sweep.locked(workdir / "runs" / "two_seed=0") as lock:
        assert lock is not None
        code, _ = pretend("wrong", "two")
    assert code == 1
    assert starts(workdir) == {"wrong": 2, "two": 1}
    assert "[2/2] two_seed=0: another process is at it" in capsys.readouterr().out
    assert pretend("wrong", "two")[0] == 1
    assert starts(workdir) == {"wrong": 3, "two": 2}


def test_a_workdir_of_something_else(tmp_path, pretend):
    _, workdir = pretend("one", "two")

    def refused(*labels, flags=()):
        return pretend(*labels, flags=flags)[0]

    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert re.search(r"holds another sweep:\n  run two_seed=0 is there, but not in this sweep\n", refused("one"))
    assert re.search("run one_seed=0: epochs: there 3, given 4\n  run two_seed=0: epochs: there 4, given 3\n",
                     refused("two", "one"))
    assert re.search("run one_seed=0: batch_size: there 64, given 32\n",
                     refused("one", "two", flags=["--config.batch_size=32"]))
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert refused("one", "two", flags=["--config.log_every_steps=7"]) == 0  # changes no result
    (workdir / "sweep.json").write_text("{")
    assert "sweep.json is no JSON" in refused("one", "two")
    (workdir / "sweep.json").unlink()
    assert "has runs but no sweep.json, so it holds something else" in refused("one", "two")
    (tmp_path / "file").touch()
    assert "Not a directory" in refused("one", flags=[f"--workdir={tmp_path / 'file'}"])


# Runs that train


def environment(cache):
    """One CPU device, and compilation in haste."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": QUICKLY}


def processes_of(workdir):
    """Process ids of runs of the sweep."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if b"fastervit_jax.sweep_run" in words and str(workdir).encode() in words:
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.1)


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_killed_sweep_loses_and_repeats_no_finished_run(tmp_path):
    """Its run dies with it. Then the rest is done, and the result has both seeds."""
    path, workdir = write(tmp_path, [{"epochs": 2}], seeds=(0, 1)), tmp_path / "workdir"
    command = [sys.executable, "-m", "fastervit_jax.sweep", path, f"--workdir={workdir}",
               "--config.data.train_split=train[:128]", "--config.data.eval_split=validation[:64]",
               "--config.model.hat=(False,False,False,False)"]  # fmt: skip
    options = {"env": environment(tmp_path / "cache"), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT,
               "text": True}
    first, second = (workdir / "runs" / f"epochs=2_seed={seed}" for seed in (0, 1))
    with subprocess.Popen(command, **options) as killed:
        wait_for(lambda: (second / "config.json").exists() or killed.poll() is not None)
        assert killed.poll() is None, killed.stdout.read()
        assert processes_of(workdir)
        killed.kill()
    wait_for(lambda: not processes_of(workdir), 30)
    assert not (second / "result.json").exists()
    before = {file: file.stat().st_mtime_ns for file in first.rglob("*")}

    done = subprocess.run(command, **options, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "[1/2] epochs=2_seed=0: done before, top-1 " in done.stdout
    assert "[2/2] epochs=2_seed=1: goes on\n[2/2] epochs=2_seed=1: top-1 " in done.stdout
    assert before == {file: file.stat().st_mtime_ns for file in first.rglob("*")}
    assert (second / "log.txt").read_text().count("--- 20") == 2

    results = [json.loads((folder / "result.json").read_text()) for folder in (first, second)]
    for result, folder in zip(results, (first, second), strict=True):
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert collections.Counter(line["step"] for line in steps)[4] == 2  # training, evaluation
        assert (result["acc1"], result["loss"]) == (steps[-1]["eval/acc1"], steps[-1]["eval/loss"])
        speeds = [json.loads(line) for line in (folder / "speed.jsonl").read_text().splitlines()]
        assert result["train_images_per_second"] == speeds[-1]["speed/images_per_second"]  # the only one
        assert result["inference_images_per_second"] > 0
        assert 0.1 < result["memory_gib"] < 10
        assert (result["memory_of"], result["devices"], result["overrides"]) == ("process", 1, {"epochs": 2})
    assert [result["seed"] for result in results] == [0, 1]
    assert results[0]["loss"] != results[1]["loss"]
    mean = sum(result["acc1"] for result in results) / 2
    row = (workdir / "result.md").read_text().split("| epochs |")[1].splitlines()[2]
    assert row.startswith(f"| 2 | 0 1 | {mean:.2f} ± {abs(results[0]['acc1'] - mean) * 2**0.5:.2f} |")
    assert {path.name for path in workdir.iterdir()} == {
        "runs", "sweep.json", "result.csv", "result.md", "accuracy_and_speed.png", "curves.png"}
