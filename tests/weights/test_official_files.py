"""Files of the official package into our model, and our files into the official model, logits on both sides."""

import dataclasses
import json
import os
import subprocess

import jax
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.weights import names, pretrained
from fastervit_jax.weights.buffers import make_buffers
from fastervit_jax.weights.torch_file import StoredArray
from tests import official
from tests.golden import cases

pytestmark = pytest.mark.oracle
NO_EFFECT = ("num_heads", "window_size")  # of stages 0 and 1


@pytest.fixture(scope="module")
def oracle():
    """Runs make.py with the official package, whose Python FASTERVIT_ORACLE names: one process for all tests."""
    python = os.environ.get("FASTERVIT_ORACLE")
    if not python:
        pytest.fail("set FASTERVIT_ORACLE to a Python that has the official package; tests/golden/make.py says how")
    with subprocess.Popen([python, official.GOLDEN / "make.py", "--serve"], text=True, bufsize=1,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def run(*arguments):
            print(json.dumps([str(argument) for argument in arguments]), file=process.stdin)
            assert "done\n" in process.stdout, "make.py has ended"  # read up to there

        yield run
        process.stdin.close()


def assert_same_architecture(found, expected):
    found, expected = dataclasses.asdict(found), dataclasses.asdict(expected)
    for config in (found, expected):
        config.update({name: config[name][2:] for name in NO_EFFECT})
    assert found == expected


def assert_same(variables, others):
    """Bit for bit."""
    bits = [jax.tree.map(lambda x: np.asarray(x).view(np.uint32), tree) for tree in (variables, others)]
    jax.tree.map(np.testing.assert_array_equal, *bits)


def read(case, path, **told):
    """Our model from a file, and its logits on the case's images."""
    model, variables = fv.from_pretrained(path, **told)
    images = cases.images(case.batch, case.resolution, case.resolution, model.config.in_chans)
    return model, variables, np.asarray(jax.jit(model.apply)(variables, images))


def there_and_back(name, case, folder, suffixes, **told):
    """Official file → ours → files → official model; gives the relative errors of logits."""
    model, variables, logits = read(case, folder / f"{name}.pth.tar", **told)
    errors = {"theirs to ours": official.relative_error(logits, np.load(folder / f"{name}.npz")["logits"])}
    assert_same_architecture(model.config, fv.create_model(case.arch, **case.kwargs).config)
    files = [folder / f"{name}.ours{suffix}" for suffix in suffixes]
    for file in files:
        fv.save_pretrained(model, variables, file, resolution=case.resolution)
        again, same = fv.from_pretrained(file)
        assert again.config == model.config
        assert_same(same, variables)
        del same
    return logits, files, errors


def check_loaded(logits, folder, files, errors):
    for file in files:
        loaded = np.load(folder / f"{file.name}.npz")
        errors[f"ours to theirs, {file.suffix}"] = official.relative_error(logits, loaded["logits"])
        errors[f"buffers, {file.suffix}"] = loaded["computed_errors"].max()
    print(files[0].name, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5, errors


@pytest.fixture(scope="module")
def small(tmp_path_factory, oracle):
    """Every small case there and back: (logits, files, errors) by name, after the official model has read the files."""
    folder = tmp_path_factory.mktemp("small")
    small_cases = {name: case for name, case in cases.CASES.items() if name not in cases.PUBLISHED}
    oracle("--out", folder, "--checkpoint", *small_cases)
    results = {}
    for name, case in small_cases.items():
        # Arrays do not tell it, and these cases are no variants.
        told = {"do_propagation": case.kwargs.get("do_propagation", "_3_" in case.arch or "21k" in case.arch)}
        results[name] = there_and_back(name, case, folder, (".pth", ".safetensors"), **told)
    pairs = [(name, file) for name, (_, files, _) in results.items() for file in files]
    oracle("--out", folder, "--load", *(file for _, file in pairs), "--", *(name for name, _ in pairs))
    return folder, results


@pytest.mark.parametrize("name", [name for name in cases.CASES if name not in cases.PUBLISHED])
def test_small_case(name, small):
    folder, results = small
    logits, files, errors = results[name]
    check_loaded(logits, folder, files, errors)


LARGE = ("faster_vit_4_224", "faster_vit_4_21k_384", "faster_vit_4_21k_512", "faster_vit_4_21k_768")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.large) if name in LARGE else name for name in cases.PUBLISHED])
def test_published_model(name, tmp_path, oracle):
    case = cases.PUBLISHED[name]
    oracle("--out", tmp_path, "--checkpoint", name)
    logits, files, errors = there_and_back(name, case, tmp_path, (".pth", ".safetensors"))
    oracle("--out", tmp_path, "--load", files[1], "--", name)
    check_loaded(logits, tmp_path, files[1:], errors)
    for path in tmp_path.iterdir():
        path.unlink()  # gigabytes


@pytest.mark.parametrize("name", ["faster_vit_5_224", "faster_vit_6_224"])
def test_names_and_shapes_of_the_largest(name, tmp_path, oracle):
    oracle("--out", tmp_path, "--shapes", name)
    theirs = {name: tuple(shape) for name, shape in json.loads((tmp_path / f"{name}.json").read_text()).items()}
    config = fv.create_model(name).config
    ours = {name: shape for name, (_, _, shape) in pretrained.layout(config).items()}
    arrays = {name: StoredArray(shape, np.dtype(np.float32), np.zeros) for name, shape in ours.items()}
    buffers = {name: buffer.shape for name, buffer in make_buffers(config, 224, arrays)}
    ours |= {name.replace(*names.ALIAS[::-1]): shape for name, shape in ours.items() if names.ALIAS[1] in name}
    assert {**ours, **buffers} == theirs


def test_verify(small, tmp_path):
    """convert --verify, in the official package's environment."""
    folder, _ = small
    # make.py first: it lets torchvision be imported beside a CPU build of torch.
    start = "import sys, runpy; import make; runpy.run_module('fastervit_jax.convert', run_name='__main__')"
    environment = {**os.environ, "PYTHONPATH": f"{official.GOLDEN}:{official.GOLDEN.parents[1]}"}

    def convert(name):
        command = [os.environ["FASTERVIT_ORACLE"], "-c", start, folder / f"{name}.pth.tar", tmp_path / name, "--verify"]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    done = convert("two_hat_stages")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("max |Δlogit|") == 2
