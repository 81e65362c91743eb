"""A file that PyTorch itself wrote, with a tensor of each kind, is read as what it is."""

import argparse
import collections

import ml_dtypes
import numpy as np
import pytest

from fastervit_jax.weights.torch_file import StoredArray, read_torch_file
from tests import official


@pytest.fixture(scope="module")
def saved():
    return read_torch_file(official.GOLDEN / "torch_save.pth")[0]


def assert_array(stored, expected):
    assert isinstance(stored, StoredArray)
    array = stored.read()
    assert (stored.shape, stored.dtype) == (array.shape, array.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(array, expected)


def test_dtypes(saved):
    assert len(saved["dtypes"]) == 16
    for name, stored in saved["dtypes"].items():
        dtype = getattr(ml_dtypes, name) if name.startswith(("bfloat", "float8")) else name
        assert_array(stored, np.arange(6).reshape(2, 3).astype(dtype))
    assert_array(saved["bool"], np.arange(6) > 2)


def test_layouts(saved):
    count = np.arange(24, dtype=np.float32)
    assert_array(saved["transposed"], count.reshape(2, 3, 4).transpose(2, 0, 1))
    assert_array(saved["expanded"], np.tile(count[:3], (4, 1)))
    assert_array(saved["part"], count[5:11])
    assert_array(saved["scalar"], np.float32(7))
    assert_array(saved["empty"], np.zeros((0, 3), np.float32))
    assert_array(saved["parameter"], count[:4])
    assert np.shares_memory(saved["transposed"].read(), saved["part"].read())


def test_containers(saved):
    assert isinstance(saved["state_dict"], collections.OrderedDict)
    assert list(saved["state_dict"]) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert_array(saved["state_dict"]["num_batches_tracked"], np.int64(0))
    assert saved["optimizer"]["param_groups"][0]["lr"] == 0.5
    assert saved["args"] == argparse.Namespace(
        model="faster_vit_0_224", lr=0.005, mean=(0.5, 0.25), amp=True, resume=None)
    assert saved["plain"].a == 1
    assert saved["size"] == (2, 3)
    assert saved["metric"] == 82.1
