"""Files of the official package and ours, of small models."""

import os
import subprocess

import pytest

from tests import official
from tests.golden import cases
from tests.weights.official_files import check_loaded, there_and_back

pytestmark = pytest.mark.oracle


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
