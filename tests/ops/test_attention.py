"""Window attention against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastervit_jax.ops.attention import window_attention


def inputs(key, dtype="float32"):
    q, k, v, bias = (jax.random.normal(key, shape) for key, shape in
                     zip(jax.random.split(key, 4), [(3, 5, 2, 4)] * 3 + [(2, 5, 5)], strict=True))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype), 3 * bias


def exact(q, k, v, bias, drop=1.0):
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    out = np.zeros_like(v)
    for b in range(3):
        for h in range(2):
            scores = q[b, :, h] @ k[b, :, h].T / 2 + bias[h]
            weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
            out[b, :, h] = drop * weights @ v[b, :, h]
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_values(key, dtype, tolerance):
    q, k, v, bias = inputs(key, dtype)
    out = window_attention(q, k, v, bias)
    assert out.dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(out.astype(jnp.float32), exact(q, k, v, bias), atol=tolerance, rtol=tolerance)


def test_drop_is_applied_to_the_weights(key):
    q, k, v, bias = inputs(key)
    out = window_attention(q, k, v, bias, lambda weights: 0.5 * weights)
    np.testing.assert_allclose(out, exact(q, k, v, bias, drop=0.5), atol=1e-6)
