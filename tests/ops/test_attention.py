"""Window attention, by XLA and by the kernel in interpret mode, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastervit_jax.ops.attention import attention
from tests.ops.sharded import on_eight_devices

# Windows, tokens, heads, width of a head.
SHAPES = {
    "variant 0, stage 2": (3, 53, 2, 32), "stage 3": (2, 49, 2, 32), "carriers": (5, 16, 2, 32),
    "variant 4's odd width": (2, 53, 2, 49), "one token": (3, 1, 2, 8), "ct 1": (2, 50, 1, 40), "ct 3": (2, 58, 1, 48),
    "ct 4": (2, 65, 1, 64), "window 8": (2, 64, 1, 80), "window 11": (1, 121, 1, 16), "two tokens": (130, 2, 1, 4),
}  # fmt: skip


def inputs(key, shape, dtype="float32"):
    """qkv, bias, and a direction for the gradient."""
    count, tokens, heads, width = shape
    keys = jax.random.split(key, 3)
    qkv = jax.random.normal(keys[0], (count, tokens, 3 * heads * width)).astype(dtype)
    bias = 3 * jax.random.normal(keys[1], (heads, tokens, tokens))
    return qkv, bias, jax.random.normal(keys[2], (count, tokens, heads * width)).astype(dtype)


def exact(qkv, bias, direction, scale=None, drop=1.0):
    """The result, and the gradients of (result · direction).sum() for qkv and bias."""
    qkv, bias, direction = (np.asarray(x, np.float64) for x in (qkv, bias, direction))
    heads = len(bias)
    width = qkv.shape[-1] // (3 * heads)
    scale = width**-0.5 if scale is None else scale
    out, d_qkv, d_bias = np.zeros_like(direction), np.zeros_like(qkv), np.zeros_like(bias)
    for b in range(len(qkv)):
        for h in range(heads):
            parts = [slice((part * heads + h) * width, (part * heads + h + 1) * width) for part in range(3)]
            q, k, v = (qkv[b][:, part] for part in parts)
            scores = scale * q @ k.T + bias[h]
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            d_out = direction[b][:, parts[0]]
            out[b][:, parts[0]] = drop * weights @ v
            d_scores = weights * (d_out @ v.T - (d_out @ v.T * weights).sum(-1, keepdims=True))
            for part, gradient in zip(parts, (scale * d_scores @ k, scale * d_scores.T @ q, weights.T @ d_out),
                                      strict=True):
                d_qkv[b][:, part] = gradient
            d_bias[h] += d_scores
    return out, d_qkv, d_bias


@functools.partial(jax.jit, static_argnames=("scale", "kernels"))
def ours(qkv, bias, direction, scale=None, kernels="auto"):
    out, gradients = jax.vjp(lambda qkv, bias: attention(qkv, bias, scale=scale, kernels=kernels), qkv, bias)
    return out, *gradients(direction)


def check(found, expected, tolerance):
    for x, y in zip(found, expected, strict=True):
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= tolerance * np.linalg.norm(y)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(key, shape, kernels):
    arrays = inputs(key, shape)
    check(ours(*arrays, kernels=kernels), exact(*arrays), 1e-6)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_bfloat16(key, kernels):
    qkv, bias, direction = inputs(key, (3, 10, 2, 16), "bfloat16")
    found = ours(qkv, bias, direction, kernels=kernels)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    check(found, exact(qkv, bias, direction), 5e-3)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_scale(key, kernels):
    arrays = inputs(key, (2, 5, 2, 4))
    check(ours(*arrays, scale=1.0, kernels=kernels), exact(*arrays, scale=1.0), 1e-6)


def test_drop_is_applied_to_the_weights(key):
    qkv, bias, direction = inputs(key, (2, 5, 2, 4))
    out = attention(qkv, bias, drop=lambda weights: 0.5 * weights)
    check([out], exact(qkv, bias, direction, drop=0.5)[:1], 1e-6)


def test_kernel_on_eight_devices(key):
    # 2,064 programs at one window each, so two windows a program in all, and one window a program on each device.
    arrays = inputs(key, (16, 6, 2, 8))
    found = on_eight_devices(functools.partial(ours, kernels="pallas"), arrays, split=(True, False, True))
    check(found, exact(*arrays), 1e-6)


@pytest.mark.parametrize(("shape", "reason"), [
    ((1, 129, 1, 16), "windows of 129 tokens, more than 128"), ((1, 4, 1, 129), "heads of width 129, more than 128")])
def test_shapes_without_a_kernel(key, shape, reason):
    qkv, bias, _ = inputs(key, shape)
    assert attention(qkv, bias).shape == (*qkv.shape[:2], qkv.shape[2] // 3)
    with pytest.raises(ValueError, match=f"there is none for {reason}; use 'auto' or 'xla'"):
        attention(qkv, bias, kernels="pallas")


def test_unknown_kernels(key):
    qkv, bias, _ = inputs(key, (1, 2, 1, 2))
    with pytest.raises(ValueError, match="kernels='triton': expected one of auto, xla, pallas"):
        attention(qkv, bias, kernels="triton")
    with pytest.raises(ValueError, match="there is none for dropout of attention weights"):
        attention(qkv, bias, drop=lambda weights: weights, kernels="pallas")
