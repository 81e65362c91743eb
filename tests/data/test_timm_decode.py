"""Decoding against timm's, run as a black box by timm_decode_oracle.py in the Python that FASTERVIT_ORACLE names."""

import os
import pathlib
import subprocess

import numpy as np
import pytest
import scipy.stats

from fastervit_jax.data import decode
from tests.data import images

pytestmark = pytest.mark.oracle
SCRIPT = pathlib.Path(__file__).with_name("timm_decode_oracle.py")
CROPS = {224: 0.875, 288: 1.0, 97: 0.93}  # as in the script
SHAPES = {375: 500, 80: 400}


def files() -> dict[str, bytes]:
    """20 photographs, and the odd kinds that PIL converts as we do: not 16 bits, which it clips."""
    odd = {kind: data for kind, (data, _) in images.odd().items() if kind != "16-bit png"}
    return {**{f"photo {i:02}": data for i, data in enumerate(images.jpegs(20))}, **odd}


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    python = os.environ.get("FASTERVIT_ORACLE")
    if not python:
        pytest.fail("set FASTERVIT_ORACLE to a Python that has timm; tests/golden/make.py says how")
    folder = tmp_path_factory.mktemp("images")
    for name, data in files().items():
        (folder / name).write_bytes(data)
    out = tmp_path_factory.mktemp("timm") / "timm.npz"
    subprocess.run([python, SCRIPT, folder, out], check=True)
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("mode", decode.EVAL_MODES)
@pytest.mark.parametrize("size", CROPS)
def test_evaluation_has_the_same_pixels(timm, size, mode):
    crop = decode.EvalCrop(size, 3, CROPS[size], mode)
    theirs = timm[f"eval/{size}/{mode}"]
    named = sorted(files().items())
    assert len(theirs) == len(named) >= 20
    for (name, data), expected in zip(named, theirs, strict=True):
        np.testing.assert_array_equal(crop(data), expected, err_msg=name)


@pytest.mark.parametrize("height", SHAPES)
def test_crops_have_the_same_distribution(timm, height):
    width, rng = SHAPES[height], np.random.default_rng(0)
    theirs = timm[f"boxes/{height}"]
    ours = np.array([decode.random_box(height, width, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(len(theirs))])
    assert len(ours) == 20_000
    for measure in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0] + b[:, 2] / 2,
                    lambda b: b[:, 1] + b[:, 3] / 2):  # area, ratio, centre
        assert scipy.stats.ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3
