"""Files of the official package and ours, of the published models."""

import json

import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.weights import names, pretrained
from fastervit_jax.weights.buffers import make_buffers
from fastervit_jax.weights.torch_file import StoredArray
from tests.golden import cases
from tests.weights.official_files import check_loaded, there_and_back

pytestmark = pytest.mark.oracle
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
