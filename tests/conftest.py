"""Strict numerics for every test: 8 CPU devices, exact float32 products, no silent broadcasting of ranks."""

import os
import tempfile

from tests import QUICKLY

# Before JAX starts. JAX_PLATFORMS=cuda runs the tests of the model on a GPU; those of training need 8 devices.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ["XLA_FLAGS"] += f" {QUICKLY}"
# Several tests start the same run: one of them compiles. Each run of the tests has a new folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="fastervit_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def key():
    return jax.random.key(0)
