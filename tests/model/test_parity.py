"""The same function as the official PyTorch model: logits and every stage, to 1e-5 relative in float32."""

import os
import pathlib
import subprocess

import flax.linen as nn
import jax
import numpy as np
import pytest

from fastervit_jax.weights import names
from tests import official
from tests.golden import cases


def check(case: cases.Case, golden: pathlib.Path):
    theirs = np.load(golden)
    model, variables = official.model_and_variables(case)
    assert set(names.pytorch_names(variables)) == set(theirs["names"])

    images = cases.images(case.batch, case.resolution, case.resolution, model.config.in_chans)
    both = nn.apply(lambda model, images: (model(images), model.features(images)), model)
    logits, maps = jax.jit(both)(variables, images)
    errors = {f"stage{i}": official.relative_error(x, theirs[f"stage{i}"]) for i, x in enumerate(maps)}
    errors["logits"] = official.relative_error(logits, theirs["logits"])
    print(golden.stem, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", cases.COMMITTED)
def test_committed_case(name):
    check(cases.CASES[name], official.GOLDEN / f"{name}.npz")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with every case, made by the official package now."""
    python = os.environ.get("FASTERVIT_ORACLE")
    if not python:
        pytest.fail("set FASTERVIT_ORACLE to a Python that has the official package; tests/golden/make.py says how")
    out = tmp_path_factory.mktemp("golden")
    subprocess.run([python, official.GOLDEN / "make.py", "--out", out], check=True)
    return out


@pytest.mark.oracle
@pytest.mark.parametrize("name", cases.CASES)
def test_live_case(name, made):
    check(cases.CASES[name], made / f"{name}.npz")


@pytest.mark.oracle
@pytest.mark.parametrize("name", cases.COMMITTED)
def test_committed_files_are_what_the_official_package_gives(name, made):
    committed, now = np.load(official.GOLDEN / f"{name}.npz"), np.load(made / f"{name}.npz")
    assert set(committed) == set(now)
    for key in set(committed) - {"names"}:
        assert official.relative_error(committed[key], now[key]) < 1e-7
