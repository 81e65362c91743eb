"""Batch norm with its activation: against the plain formula, differentiated by JAX in float64's stead by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastervit_jax.ops.batch_norm import ACTIVATIONS, activate, batch_norm
from tests.ops.sharded import on_eight_devices

EPSILON = 1e-2


def inputs(key, dtype="float32"):
    """Three groups, of different means, and a pivot that is not the mean."""
    keys = jax.random.split(key, 5)
    x = jax.random.normal(keys[0], (3, 2, 4, 5, 6)) + jnp.arange(3.0).reshape(3, 1, 1, 1, 1)
    scale, bias, pivot = (jax.random.normal(k, (6,)) for k in keys[1:4])
    return x.astype(dtype), scale, bias, pivot, jax.random.normal(keys[4], x.shape).astype(dtype)


FACTOR = jnp.array([[0.0, 2.0], [1.0, 0.5], [3.0, 0.0]])  # of each image


def plain(x, scale, bias, activation, factor):
    x = x.astype(jnp.float32)
    mean, var = (f((1, 2, 3), keepdims=True) for f in (x.mean, x.var))
    normal = (x - mean) / jnp.sqrt(var + EPSILON) * scale.reshape(1, 1, 1, 1, -1) + bias.reshape(1, 1, 1, 1, -1)
    functions = {"none": lambda x: x, "relu": jax.nn.relu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}
    out = functions[activation](normal)
    out = out if factor is None else out * factor.reshape(3, 2, 1, 1, 1)
    return out, mean.reshape(3, 6), var.reshape(3, 6)


@functools.partial(jax.jit, static_argnames=("activation", "kernels"))
def results(x, scale, bias, pivot, direction, activation, factor=None, kernels="xla"):
    """Of ours and of the plain formula: output, mean, variance, and the gradients of (output · direction).sum()."""

    def ours(x, scale, bias):
        return batch_norm(x, scale, bias, pivot, factor, EPSILON, activation, kernels)

    found = []
    for function in (ours, functools.partial(plain, activation=activation, factor=factor)):
        def loss(*args, function=function):
            out, mean, var = function(*args)
            return (out.astype(jnp.float32) * direction.astype(jnp.float32)).sum(), (out, mean, var)

        gradients, outputs = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        found.append((*outputs, *gradients))
    return found


def relative(ours, theirs):
    return float(np.linalg.norm(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64))
                 / np.linalg.norm(np.asarray(theirs, np.float64)))


def check(ours, theirs, dtype, tolerance):
    assert ours[0].dtype == ours[3].dtype == jnp.dtype(dtype)
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < tolerance


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 1e-2)])
def test_values_and_gradients(key, activation, dtype, tolerance):
    ours, theirs = results(*inputs(key, dtype), activation)
    check(ours, theirs, dtype, tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_factor_of_each_image(key, activation):
    check(*results(*inputs(key), activation, FACTOR), "float32", 3e-6)
    check(*results(*inputs(key, "bfloat16"), activation, FACTOR), "bfloat16", 1e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-6), ("bfloat16", 1e-2)])
def test_kernel(key, dtype, tolerance):
    check(*results(*inputs(key, dtype), "gelu", kernels="pallas"), dtype, tolerance)


@pytest.mark.parametrize("groups", [1, 8])
def test_kernel_on_eight_devices(key, groups):
    """Groups that lie over the devices, each on one or all on one."""
    x = jax.random.normal(key, (16, 2, 3, 6)) + jnp.arange(6.0).reshape(1, 1, 1, 6)
    vectors = jax.random.normal(key, (3, 6))

    def gradients(x, vectors, kernels):
        def loss(x, scale, bias):
            x = x.reshape(groups, -1, *x.shape[1:])
            out = batch_norm(x, scale, bias, vectors[2], None, EPSILON, "gelu", kernels)[0]
            return (out * jnp.sin(7 * x)).sum()
        return jax.grad(loss, (0, 1, 2))(x, *vectors[:2])

    found = on_eight_devices(functools.partial(gradients, kernels="pallas"), (x, vectors), split=(True, False))
    assert max(map(relative, found, gradients(x, vectors, "xla"))) < 3e-6


def test_the_input_is_all_that_is_kept(key):
    x, scale, bias, pivot, _ = inputs(key, "bfloat16")
    _, gradient = jax.vjp(lambda x: batch_norm(x, scale, bias, pivot, None, EPSILON, "gelu", "auto"), x)
    kept = [leaf for leaf in jax.tree.leaves(gradient) if getattr(leaf, "size", 0) == x.size]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], x)


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation='tanh': expected one of none, relu, gelu"):
        activate(jnp.ones(2), "tanh", jnp.float32)
