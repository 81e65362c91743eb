"""GELU against SciPy's normal distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fastervit_jax.ops import gelu as module
from fastervit_jax.ops import kernels
from fastervit_jax.ops.gelu import BLOCK, backward, forward, gelu, slope, value
from tests.ops.sharded import on_eight_devices

POINTS = jnp.concatenate([jnp.linspace(-12, 12, 100_001), jnp.array([-1e4, 1e4, 0.0])])


def exact(x):
    """GELU and its slope, float64."""
    x = np.asarray(x, np.float64)
    return x * stats.norm.cdf(x), stats.norm.cdf(x) + x * stats.norm.pdf(x)


# Half a step between neighbours, relative to a number, and what the approximation adds.
@pytest.mark.parametrize("kernels", ["xla", "pallas"])
@pytest.mark.parametrize(("dtype", "relative", "absolute"), [
    ("float32", 1e-6, 1e-6), ("bfloat16", 2.0**-8, 2e-5), ("float16", 2.0**-11, 2e-5)])
def test_values_and_slopes(dtype, relative, absolute, kernels):
    x = POINTS.astype(dtype)[:, None]  # not a multiple of what a program of the kernel takes
    out, backward = jax.vjp(functools.partial(gelu, kernels=kernels), x)
    out, gradient = out[:, 0], backward(jnp.ones_like(x))[0][:, 0]
    assert out.dtype == gradient.dtype == jnp.dtype(dtype)
    for found, expected in zip((out, gradient), exact(x[:, 0]), strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=relative, atol=absolute)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
@pytest.mark.parametrize(("dtype", "large"), [("bfloat16", 3e38), ("float16", 6e4)])
def test_numbers_that_are_not_finite(dtype, large, kernels):
    x = jnp.array([jnp.inf, -jnp.inf, jnp.nan, large, -large], dtype)[:, None]
    out, backward = jax.vjp(functools.partial(gelu, kernels=kernels), x)
    gradient, = backward(jnp.ones_like(x))
    np.testing.assert_array_equal(out.astype(jnp.float32)[:, 0], [jnp.inf, 0, jnp.nan, x.astype(jnp.float32)[3, 0], 0])
    np.testing.assert_array_equal(gradient.astype(jnp.float32)[:, 0], [1, 0, jnp.nan, 1, 0])


def test_kernels_on_eight_devices(key):
    x, direction = jax.random.normal(key, (2, 16, 7, 5))

    def results(x, direction, kernels):
        out, gradient = jax.vjp(functools.partial(gelu, kernels=kernels), x)
        return out, *gradient(direction)

    found = on_eight_devices(functools.partial(results, kernels="pallas"), (x, direction), split=(True, True))
    for ours, theirs in zip(found, results(x, direction, "xla"), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)])
def test_no_values(shape, kernels):
    out, backward = jax.vjp(functools.partial(gelu, kernels=kernels), jnp.ones(shape))
    assert out.shape == backward(out)[0].shape == shape


@pytest.mark.parametrize(("size", "masked"), [(2 * BLOCK, False), (2 * BLOCK - 1, True)])
def test_kernels_do_not_touch_what_is_beyond_the_array(size, masked):
    # Where kernels are interpreted, nothing is there: what a GPU would read and write is seen in the program only.
    x = jnp.ones((size, 1))
    assert str(jax.make_jaxpr(forward)(x)).count("mask=") == (2 if masked else 0)
    assert str(jax.make_jaxpr(backward)(x, x)).count("mask=") == 4  # two arrays come, two go


@pytest.mark.parametrize("shape", [(70, 300), (1000, 72), (40, 513)])
def test_the_gradient_s_sums(key, monkeypatch, shape):
    """Of a bias before GELU: more and less channels than a program takes, several tiles a program."""
    monkeypatch.setattr(module, "SUM_PROGRAMS", 6)
    x, d_out = (each.astype(jnp.bfloat16) for each in jax.random.normal(key, (2, *shape)))
    d_x, sums = backward(x, d_out)
    expected = np.asarray(d_out, np.float64) * exact(x)[1]
    np.testing.assert_allclose(np.asarray(d_x, np.float64), expected, rtol=2.0**-8, atol=2e-5 * 5)
    np.testing.assert_allclose(sums, expected.sum(0), rtol=1e-4, atol=2e-3)
    assert sums.dtype == jnp.float32


def test_more_values_than_a_kernel_can_count():
    x = jax.ShapeDtypeStruct((2**21 * jax.device_count(), 2**10), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"the kernel gelu got an array of shape .*; expected at most 2147483647 elem"):
        jax.eval_shape(functools.partial(gelu, kernels="pallas"), x)


def test_each_of_eight_devices_has_more_values_than_a_kernel_can_count(monkeypatch):
    monkeypatch.setattr(kernels, "MOST", 1000)
    x = jnp.ones((8, 200))
    on_eight_devices(lambda x: (gelu(x, kernels="pallas"),), (x,), split=(True,))
    with pytest.raises(jax.errors.JaxRuntimeError, match=(
            r"kernel gelu\.forward got an array of shape \(8, 200\); expected at most 1000 elements a device")):
        on_eight_devices(lambda x: (gelu(x, kernels="pallas"),), (x,), split=(False,))


def test_without_erf_as_in_kernels():
    for function, expected in zip((value, slope), exact(POINTS), strict=True):
        np.testing.assert_allclose(function(POINTS, "float32", in_kernel=True), expected, rtol=1e-6, atol=1e-6)


def test_the_gradient_keeps_the_input_only():
    # What the forward pass leaves for the backward pass is memory.
    x = jnp.ones((4, 8), jnp.bfloat16)
    _, gradient = jax.vjp(gelu, x)
    kept = [leaf for leaf in jax.tree.leaves(gradient) if getattr(leaf, "shape", ()) == x.shape]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], x)
