"""Strict numerics for every test: 8 CPU devices, exact float32 products, no silent broadcasting of ranks."""

import os

# Before JAX starts. Where JAX runs on an accelerator the flag changes nothing.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def key():
    return jax.random.key(0)
