"""GELU against SciPy's normal distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fastervit_jax.ops.gelu import gelu, slope, value

POINTS = jnp.concatenate([jnp.linspace(-12, 12, 100_001), jnp.array([-1e4, 1e4, 0.0])])


def exact(x):
    """GELU and its slope, float64."""
    x = np.asarray(x, np.float64)
    return x * stats.norm.cdf(x), stats.norm.cdf(x) + x * stats.norm.pdf(x)


# Half a step between neighbours, relative to a number, and what the approximation adds.
@pytest.mark.parametrize(("dtype", "relative", "absolute"), [
    ("float32", 1e-6, 1e-6), ("bfloat16", 2.0**-8, 5e-5), ("float16", 2.0**-11, 5e-5)])
def test_values_and_slopes(dtype, relative, absolute):
    x = POINTS.astype(dtype)
    out, gradient = gelu(x), jax.jit(jax.vmap(jax.grad(lambda x: gelu(x))))(x)
    assert out.dtype == gradient.dtype == jnp.dtype(dtype)
    for found, expected in zip((out, gradient), exact(x), strict=True):
        np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=relative, atol=absolute)


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
