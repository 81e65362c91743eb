"""Batch norm with its activation: against the plain formula, differentiated by JAX in float64's stead by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastervit_jax.ops.batch_norm import ACTIVATIONS, activate, batch_norm

EPSILON = 1e-2


def inputs(key, dtype="float32"):
    """Three groups, of different means, and a pivot that is not the mean."""
    keys = jax.random.split(key, 5)
    x = jax.random.normal(keys[0], (3, 2, 4, 5, 6)) + jnp.arange(3.0).reshape(3, 1, 1, 1, 1)
    scale, bias, pivot = (jax.random.normal(k, (6,)) for k in keys[1:4])
    return x.astype(dtype), scale, bias, pivot, jax.random.normal(keys[4], x.shape).astype(dtype)


def plain(x, scale, bias, activation):
    x = x.astype(jnp.float32)
    mean, var = (f((1, 2, 3), keepdims=True) for f in (x.mean, x.var))
    normal = (x - mean) / jnp.sqrt(var + EPSILON) * scale.reshape(1, 1, 1, 1, -1) + bias.reshape(1, 1, 1, 1, -1)
    functions = {"none": lambda x: x, "relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}
    return functions[activation](normal), mean.reshape(3, 6), var.reshape(3, 6)


@functools.partial(jax.jit, static_argnames="activation")
def results(x, scale, bias, pivot, direction, activation):
    """Of ours and of the plain formula: output, mean, variance, and the gradients of (output · direction).sum()."""

    def ours(x, scale, bias):
        return batch_norm(x, scale, bias, pivot, EPSILON, activation, x.dtype)

    found = []
    for function in (ours, functools.partial(plain, activation=activation)):
        def loss(*args, function=function):
            out, mean, var = function(*args)
            return (out.astype(jnp.float32) * direction.astype(jnp.float32)).sum(), (out, mean, var)

        gradients, outputs = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        found.append((*outputs, *gradients))
    return found


def relative(ours, theirs):
    return float(np.linalg.norm(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
                 / np.linalg.norm(np.asarray(theirs, np.float64)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 1e-2)])
def test_values_and_gradients(key, activation, dtype, tolerance):
    ours, theirs = results(*inputs(key, dtype), activation)
    assert ours[0].dtype == ours[3].dtype == jnp.dtype(dtype)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < tolerance


def test_the_input_is_all_that_is_kept(key):
    x, scale, bias, pivot, _ = inputs(key, "bfloat16")
    _, gradient = jax.vjp(lambda x: batch_norm(x, scale, bias, pivot, EPSILON, "gelu", x.dtype), x)
    kept = [leaf for leaf in jax.tree.leaves(gradient) if getattr(leaf, "size", 0) == x.size]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], x)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation='tanh': expected one of none, relu, gelu"):
        activate(jnp.ones(2), "tanh", jnp.float32)
