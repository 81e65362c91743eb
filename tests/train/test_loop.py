"""The real loop on real digits: it learns, compiles once, resumes exactly, and is the same on 8 devices."""

import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.train import loop, processes
from tests.train import runs

ROOT = pathlib.Path(__file__).parents[2]
# Ten steps an epoch, and one batch to evaluate.
SHORT = {"data.train_split": "train[:640]", "data.eval_split": "validation[:64]"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Workdir and result of an uninterrupted run on all devices."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, loop.train(runs.config(), workdir)


def test_it_learns_and_says_so(whole):
    workdir, result = whole
    written = runs.lines(workdir)
    losses = [line["train/loss"] for line in written if "train/loss" in line]
    assert len(losses) == 11  # of 44 steps every 4th
    assert losses[0] > 2.2
    assert losses[-1] < 2.1
    evaluations = [line for line in written if "eval/acc1" in line]
    assert [line["step"] for line in evaluations] == [22, 44]
    assert evaluations[-1] == {"step": 44, **{f"eval/{name}": value for name, value in result.items()}}
    assert result["acc1"] > 50
    assert result["images"] == 355
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    assert events.count(b"train/loss") == 11
    assert events.count(b"eval/acc1") == 2
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"]["dim"] == 4
    assert saved["clip_norm"] == 5.0
    speeds = [json.loads(line) for line in (workdir / "speed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in speeds] == list(range(4, 45, 4))
    assert all(line["speed/images_per_second"] > 0 for line in speeds)
    # The best evaluation was the last.
    (_, best), (_, last) = fv.from_pretrained(workdir / "best.safetensors"), fv.from_pretrained(workdir)
    jax.tree.map(np.testing.assert_array_equal, best, last)


def test_eight_devices_give_the_same_curve(tmp_path):
    assert jax.device_count() == 8
    # Rounding differences, here 1e-7, grow with steps and learning rate.
    config = runs.config(**{"learning_rate": 5e-4, "data.train_split": "train[:640]"})
    result = loop.train(config, tmp_path / "one", jax.devices()[:1])
    expected = loop.train(config, tmp_path / "eight")
    one, eight = runs.lines(tmp_path / "one"), runs.lines(tmp_path / "eight")
    assert [line["step"] for line in one] == [line["step"] for line in eight]
    for a, b in zip(one, eight, strict=True):
        for name in {"train/loss", "eval/loss"} & set(a):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=f"{name} at step {a['step']}")
    assert result["acc1"] == pytest.approx(expected["acc1"], abs=0.3)  # one image


@pytest.mark.parametrize("stop", [3, 33])  # before the first checkpoint, and between two
def test_stopped_anywhere_it_ends_the_same(stop, whole, tmp_path, monkeypatch):
    with runs.stopping(monkeypatch, after=stop):
        loop.train(runs.config(), tmp_path)
    assert loop.train(runs.config(), tmp_path) == whole[1]
    assert runs.lines(tmp_path) == runs.lines(whole[0])
    if stop == 33:  # and once more: nothing is left to do
        assert loop.train(runs.config(), tmp_path) == whole[1]
        assert runs.lines(tmp_path) == runs.lines(whole[0])


@pytest.fixture
def guarded(monkeypatch):
    """Lets nothing cross between host and devices in a step; the steps that were called."""
    called = []

    def call(step, state, batch):
        called.append(step)
        with jax.transfer_guard("disallow"):
            return step(state, batch)

    monkeypatch.setattr(loop, "make_train_step", runs.around_steps(call))
    return called


@pytest.mark.parametrize("polls", [13, 25])  # after step 12, in mid-interval and mid-epoch; in the evaluation at 22
def test_asked_to_stop_it_saves_and_goes_on(polls, whole, tmp_path, monkeypatch, capfd, guarded):
    config = runs.config(profile="11:15" if polls == 13 else "")
    with monkeypatch.context() as patch:
        asked = itertools.count(1)
        patch.setattr(processes.Stop, "requested", lambda self: next(asked) > polls)
        with pytest.raises(processes.Stopped) as stopped:
            loop.train(config, tmp_path)
    assert stopped.value.code == 75
    step = min(polls, 22)
    assert f"saved after step {step:,} in {tmp_path}" in capfd.readouterr().out
    assert loop.train(config, tmp_path) == whole[1]
    out = capfd.readouterr().out
    assert f"going on after step {step} in" in out
    assert ("no profile, for steps 14 to 44 are left" in out) == (polls == 13)
    assert len(guarded) == 44
    assert len(set(map(id, guarded))) == 2  # one in each start
    assert runs.lines(tmp_path) == runs.lines(whole[0])


def test_a_save_does_not_wait_for_the_steps_under_way(tmp_path, monkeypatch):
    """The thread that saves fetches their figures; where a line is due, it comes first. None is lost or doubled."""
    config, device = runs.config(eval_every_epochs=2, **SHORT), jax.devices()[:1]
    loop.train(config, tmp_path / "whole", device)
    fetch, fetched = loop._fetch, []

    def recorded(in_flight):
        fetched.append((threading.current_thread().name, [step for step, *_ in in_flight]))
        return fetch(in_flight)

    monkeypatch.setattr(loop, "_fetch", recorded)
    with runs.stopping(monkeypatch, after=10):  # at once after the save of the first epoch
        loop.train(config, tmp_path / "stopped", device)
    assert fetched[-1] == ("checkpoints_0", [9, 10])
    assert fetched[-2] == ("MainThread", [8])
    loop.train(config, tmp_path / "stopped", device)
    assert runs.lines(tmp_path / "stopped") == runs.lines(tmp_path / "whole")

    fetched.clear()
    config.log_every_steps = 2
    with runs.stopping(monkeypatch, after=10):
        loop.train(config, tmp_path / "line", device)
    assert fetched[-2:] == [("MainThread", [9, 10]), ("checkpoints_0", [])]


def test_updates_that_are_not_finite_end_the_run_before_a_save(tmp_path, monkeypatch):
    """Of the step under way at the save, which changes nothing any more."""

    def call(step, state, batch):
        factor = jnp.nan if int(state.step) + 1 in (7, 8, 9) else 1.0
        return step(state, batch | {"weight": factor * batch["weight"]})

    monkeypatch.setattr(loop, "make_train_step", runs.around_steps(call))
    with pytest.raises(loop.TrainingError, match=r"steps 7 to 9 were skipped.*as step 9"):
        loop.train(runs.config(eval_every_epochs=2, max_bad_steps=3, **SHORT), tmp_path, jax.devices()[:1])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["9"]


def test_settings_of_a_with_block_hold_for_the_step(tmp_path, monkeypatch):
    """They are of one thread; compiled in another, the step would be without them."""
    texts = []
    make_train_step = loop.make_train_step

    def make(*args):
        step = make_train_step(*args)
        lower = step.lower

        def call(state, batch):
            texts.append(lower(state, batch).as_text())
            raise runs.Stopped

        call.lower = lower
        return call

    monkeypatch.setattr(loop, "make_train_step", make)
    with jax.default_matmul_precision("bfloat16"), pytest.raises(runs.Stopped):
        loop.train(runs.config(), tmp_path, jax.devices()[:1])
    assert "precision = [DEFAULT, DEFAULT]" in texts[0]
    assert texts[0].count("HIGHEST") < 10  # what says so itself


def test_one_compilation_and_no_implicit_transfer(tmp_path, guarded, capfd, caplog):
    config = runs.config(epochs=5, eval_every_epochs=3, checkpoint_every_epochs=2, keep_checkpoints=2, keep_best=False,
                         profile="3:4", **SHORT)
    with runs.logged_compilations():
        loop.train(config, tmp_path, jax.devices()[:1])
    assert len(guarded) == 50
    assert len(set(map(id, guarded))) == 1
    assert isinstance(guarded[0], jax.stages.Compiled)
    assert runs.compilations(caplog, "packed_step") == 1

    # Beside: every third epoch is evaluated, every second saved, the last both; the newest two saves are kept.
    assert [line["step"] for line in runs.lines(tmp_path) if "eval/acc1" in line] == [30, 50]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"40", "50"}
    assert not (tmp_path / "best.safetensors").exists()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    out, error = capfd.readouterr()
    assert f"starting in {tmp_path}" in out
    assert "epoch   3 * Acc@1" in out
    assert "images/s, loss " in error
    assert "100%" in error


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2048}, r"config.batch_size=2048: larger than the 1442 training images"),
        ({"batch_size": 12}, r"config.batch_size=12: expected a multiple of 8, for 8 devices and config.accumulate=1"),
        ({"eval_every_epochs": 0}, r"config.eval_every_epochs=0: expected at least 1"),
        ({"data.source": "mnist", "data.dir": str(ROOT)}, r"(?s)'mnist'.*data.prepare mnist"),
        ({"data.train_split": "test"}, r"split 'test' of digits"),
        ({"data.workers": -1}, r"config.data.workers=-1: expected at least 0"),
        ({"data.timeout": float("nan")}, r"config.data.timeout=nan: expected seconds, more than 0"),
        ({"data.max_bad_fraction": -0.1}, r"config.data.max_bad_fraction=-0.1: expected 0 to 1"),
        ({"data.image_size": 0}, r"config.data.image_size=0: expected at least 32"),
        ({"data.std": (0.0,)}, r"config.data.std=\(0.0,\): expected 1 numbers, one a channel of"),
        ({"data.mean": (0.1, 0.2)}, r"config.data.mean=\(0.1, 0.2\): expected 1 numbers"),
        ({"data.eval_mode": "middle"}, r"eval_mode='middle': expected one of"),
        ({"batch_size": 0}, r"config.batch_size=0: expected at least 1"),
        ({"learning_rate": -1.0}, r"config.learning_rate=-1.0: expected 0 or more"),
        ({"clip_norm": 0.0}, r"config.clip_norm=0.0: expected more than 0"),
        ({"label_smoothing": 1.0}, r"config.label_smoothing=1.0: expected 0 or more, less than 1"),
        ({"warmup_epochs": 3}, r"config.warmup_epochs=3: expected at most config.epochs=2"),
        ({"augment.flip": 1.5}, r"config.augment.flip=1.5: expected a probability"),
        ({"augment.rand_augment_ops": 2}, r"images have 1 channels, but RandAugment and colour jitter need 3"),
        ({"augment.rand_augment_ops": -1}, r"config.augment.rand_augment_ops=-1: expected 0 to 20"),
        ({"augment.erase_area": (0.5, 0.1)}, r"config.augment.erase_area=\(0.5, 0.1\): expected 0 < low <= high <= 1"),
        ({"augment.cutmix": -1.0}, r"config.augment.cutmix=-1.0: expected the alpha of a Beta distribution"),
        ({"augment.cutmix": 1.0}, r"config.augment.mix_group=1: an image alone cannot be mixed"),
        ({"augment.mixup": 0.8, "augment.mix_group": 7}, r"mix_group=7: expected a divisor of the batch of 64 images"),
        ({"augment.erase_mode": "white"}, r"erase_mode='white': expected 'pixel' or 'const'"),
        ({"model.ct_size": 3}, r"ct_size=3: .*expected ct_size ≤ 2"),
        ({"model.window_size": (4, 4, 4, 2)}, r"images of 64 pixels stage 2 has a single window of 4 tokens a side"),
        ({"seed": -1}, r"config.seed=-1: expected at least 0"),
        ({"keep_checkpoints": 0}, r"config.keep_checkpoints=0: expected at least 1"),
        ({"optimizer": "sgd"}, r"config.optimizer='sgd': expected one of adamw, lamb"),
        ({"loss": "hinge"}, r"config.loss='hinge': expected one of cross_entropy, binary_cross_entropy"),
        ({"ema_decay": 1.0}, r"config.ema_decay=1.0: expected 0 or more, less than 1"),
        ({"mesa": 1.0}, r"config.mesa=1.0 with config.ema_decay=0: MESA learns from the averaged weights"),
        ({"layer_decay": 0.0}, r"config.layer_decay=0.0: expected more than 0, at most 1"),
        ({"remat": (True, False)}, r"config.remat=\(True, False\): expected 4 values"),
        ({"accumulate": 3}, r"config.accumulate=3: expected a divisor of config.batch_size=64"),
        ({"accumulate": 4, "bn_group_size": 32}, r"bn_group_size=32: expected a divisor of the 16 images"),
        ({"mesh.data": 2, "mesh.fsdp": 2}, r"config.mesh.data=2, config.mesh.fsdp=2: there are 8 devices"),
        ({"max_bad_steps": 0}, r"config.max_bad_steps=0: expected at least 1"),
        ({"stuck_after": 0.0}, r"config.stuck_after=0.0: expected more than 0"),
        ({"profile": "5"}, r"config.profile='5': expected FIRST:LAST, two steps, as in 100:105"),
        ({"profile": "7:5"}, r"config.profile='7:5': expected FIRST:LAST"),
        ({"init_from_ema": True}, r"config.init_from_ema=True without config.init_from"),
        ({"init_from": "no_such.pth"}, r"no file, folder or registered model 'no_such.pth'"),
        ({"init_from": str(ROOT / "tests/golden/torch_save.pth")}, r"torch_save.pth .*no FasterViT"),
    ],
)
def test_bad_config_leaves_the_workdir_free(changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.train(runs.config(**changes), tmp_path)
    assert not (tmp_path / "config.json").exists()


def command(script, workdir, *flags):
    environment = {**os.environ, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    return subprocess.Popen([sys.executable, script, f"--workdir={workdir}", *runs.FLAGS, *flags], cwd=ROOT,
                            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output(process):
    out, error = process.communicate()
    assert process.returncode == 0, error
    return out


def test_commands_survive_kill_9(whole, tmp_path):
    workdir = tmp_path / "run"
    killed = command("train.py", workdir)
    deadline = time.monotonic() + 300
    while not (workdir / "checkpoints" / "22").exists():
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()

    out = output(command("train.py", workdir))
    assert "going on after step 22" in out
    assert runs.lines(workdir) == runs.lines(whole[0])
    report = out.splitlines()[-1]
    evaluated = output(command("eval.py", workdir)).splitlines()
    assert evaluated[-2] == report
    result = json.loads(evaluated[-1])
    for script in ("train.py", "eval.py"):  # another model is refused there
        process = command(script, workdir, "--config.model.mlp_ratio=3.0")
        assert "model.mlp_ratio: there 4.0, given 3.0" in process.communicate()[1]
        assert process.returncode != 0
    assert result == {"name": "digits", "dataset": "digits", "split": "validation", "step": 44, **whole[1]}


def test_start_from_weights(whole, tmp_path):
    """With a learning rate of 0 the parameters stay the file's; a run that goes on does not need the file."""
    model, variables = fv.from_pretrained(whole[0])
    file = tmp_path / "weights.safetensors"
    fv.save_pretrained(model, variables, file, resolution=64)
    still = {"learning_rate": 0.0, "warmup_learning_rate": 0.0, "final_learning_rate": 0.0, "epochs": 1}
    config = runs.config(init_from=str(file), **still, warmup_epochs=0)
    result = loop.train(config, tmp_path / "run")
    _, kept = fv.from_pretrained(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, kept["params"], variables["params"])
    evaluated = output(command("eval.py", tmp_path / "none", f"--checkpoint={file}")).splitlines()
    assert json.loads(evaluated[-1]) == {
        "name": "digits", "dataset": "digits", "split": "validation", "checkpoint": str(file), **whole[1]}
    process = command("eval.py", tmp_path / "none", f"--checkpoint={file}", "--config.model.window_size=(4,4,4,4)",
                      "--config.model.do_propagation=True", "--config.model.mlp_ratio=3.0")
    message = ("is not for config.model: mlp_ratio 4.0 in the file, 3.0 expected; do_propagation False in the file, "
               "True expected; window_size (2, 2, 2, 2) in the file, (4, 4, 4, 4) expected")
    assert message in process.communicate()[1]
    assert process.returncode != 0
    file.unlink()
    assert loop.train(config, tmp_path / "run") == result


def test_command_line_errors(tmp_path):
    process = command("train.py", tmp_path, "--config.model.ctsize=2")
    _, error = process.communicate()
    assert process.returncode != 0
    assert 'AttributeError: unknown config key' in error
    assert 'Did you mean "ct_size"' in error


def few(**changes):
    """14 steps, a line after each fourth."""
    return runs.config(epochs=1, **SHORT | {"data.train_split": "train[:896]"}, **changes)


def test_unreadable_images_are_in_their_line_once(tmp_path, monkeypatch):
    """Lines are written two steps late; stopped between the two, and going on, the run writes the same."""
    unreadable = {4: ["d"], 6: ["a"], 7: ["b"], 9: ["c"], 14: ["z"]}
    train_batches = loop.loader.train_batches

    def naming(*args, first_step, **kwargs):
        batches = train_batches(*args, first_step=first_step, **kwargs)
        with contextlib.closing(batches):
            for step, (batch, _) in enumerate(batches, first_step + 1):
                yield batch, unreadable.get(step, [])

    monkeypatch.setattr(loop.loader, "train_batches", naming)
    device = jax.devices()[:1]
    loop.train(few(), tmp_path / "whole", device)
    lines = runs.lines(tmp_path / "whole")
    named = {line["step"]: line["train/bad_records"] for line in lines if "train/bad_records" in line}
    assert named == {4: ["d"], 8: ["a", "b"], 12: ["c"], 14: ["z"]}

    check, checks = processes.Stop.check, itertools.count(1)

    def stopping(self):
        if next(checks) == 10:  # after step 9, before the line of step 8 would have been written
            raise processes.Stopped
        check(self)

    with monkeypatch.context() as patch:
        patch.setattr(processes.Stop, "check", stopping)
        with pytest.raises(processes.Stopped):
            loop.train(few(), tmp_path / "stopped", device)
    assert [line["step"] for line in runs.lines(tmp_path / "stopped")] == [4, 8]
    loop.train(few(), tmp_path / "stopped", device)
    assert runs.lines(tmp_path / "stopped") == lines


@pytest.mark.parametrize(("first", "lines"), [(6, [(4, 0), (8, 3)]), (5, [(4, 0)])])  # ending with a line, or not
def test_updates_that_are_not_finite_end_the_run_where_they_should(first, lines, tmp_path, monkeypatch):
    """Three steps are skipped, the state saved; going on, the lines are those of a run that bore with them."""
    bad = set(range(first, first + 5))

    def call(step, state, batch):
        factor = jnp.nan if int(state.step) + 1 in bad else 1.0
        return step(state, batch | {"weight": factor * batch["weight"]})

    monkeypatch.setattr(loop, "make_train_step", runs.around_steps(call))
    device = jax.devices()[:1]
    with pytest.raises(loop.TrainingError, match=f"steps {first} to {first + 2} were skipped.*as step {first + 2}"):
        loop.train(few(max_bad_steps=3), tmp_path / "ended", device)
    assert [(line["step"], line["train/bad_steps"]) for line in runs.lines(tmp_path / "ended")] == lines
    bad -= {first + 3, first + 4}
    loop.train(few(max_bad_steps=3), tmp_path / "ended", device)
    loop.train(few(max_bad_steps=4), tmp_path / "whole", device)
    assert runs.lines(tmp_path / "ended") == runs.lines(tmp_path / "whole")
