"""Layer norm, by XLA and by the kernel in interpret mode, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastervit_jax.ops.norm import layer_norm
from tests.ops.sharded import on_eight_devices

EPSILON = 1e-2  # large, so that it shows
SHAPES = [(3, 7, 64), (2, 5, 196), (1300, 40), (1, 1), (2, 3, 3, 8), (3, 5000)]


def inputs(key, shape, dtype="float32"):
    keys = jax.random.split(key, 4)
    x = (2 + 3 * jax.random.normal(keys[0], shape)).astype(dtype)
    scale, bias = (jax.random.normal(key, shape[-1:]) for key in keys[1:3])
    return x, scale, bias, jax.random.normal(keys[3], shape).astype(dtype)


def exact(x, scale, bias, direction):
    """The result, and the gradients of (result · direction).sum() for x, scale and bias."""
    x, scale, bias, direction = (np.asarray(a, np.float64) for a in (x, scale, bias, direction))
    deviation = np.sqrt(x.var(-1, keepdims=True) + EPSILON)
    normal = (x - x.mean(-1, keepdims=True)) / deviation
    d_normal = direction * scale
    d_x = d_normal - d_normal.mean(-1, keepdims=True) - normal * (d_normal * normal).mean(-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    return normal * scale + bias, d_x / deviation, (direction * normal).sum(rows), direction.sum(rows)


@functools.partial(jax.jit, static_argnames="kernels")
def ours(x, scale, bias, direction, kernels):
    out, gradients = jax.vjp(functools.partial(layer_norm, epsilon=EPSILON, kernels=kernels), x, scale, bias)
    return out, *gradients(direction)


def check(found, expected, tolerance):
    for x, y in zip(found, expected, strict=True):
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= tolerance * np.linalg.norm(y) + 1e-7


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(key, shape, kernels):
    arrays = inputs(key, shape)
    check(ours(*arrays, kernels=kernels), exact(*arrays), 2e-6)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_bfloat16(key, kernels):
    arrays = inputs(key, (70, 48), "bfloat16")
    found = ours(*arrays, kernels=kernels)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    check(found, exact(*arrays), 5e-3)


def test_kernel_on_eight_devices(key):
    arrays = inputs(key, (16, 3, 40))
    found = on_eight_devices(functools.partial(ours, kernels="pallas"), arrays, split=(True, False, False, True))
    check(found, exact(*arrays), 2e-6)


def test_rows_that_no_kernel_holds(key):
    x, scale, bias, _ = inputs(key, (2, 8193))
    with pytest.raises(ValueError, match="there is none for 8193 channels, more than 8192; use 'auto' or 'xla'"):
        layer_norm(x, scale, bias, EPSILON, kernels="pallas")
    assert layer_norm(x, scale, bias, EPSILON).shape == x.shape
