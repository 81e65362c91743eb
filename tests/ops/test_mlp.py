"""The MLP, by XLA and by the kernels in interpret mode, against float64 NumPy."""

import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.11 on
from scipy.special import erf

from fastervit_jax.ops import kernels, mlp_hopper
from fastervit_jax.ops import mlp as module
from fastervit_jax.ops.mlp import mlp
from tests.ops.sharded import on_eight_devices

SHAPES = [(150, 40, 100, 24), (3, 7, 16, 8), (20, 784, 196, 64), (70, 32, 256, 32)]
"""Rows, inputs, hidden channels, outputs: more and less than tiles of 64 or 128 × 128, by 32 or 64."""


def inputs(key, shape, dtype="float32"):
    rows, width, hidden, out = shape
    keys = jax.random.split(key, 6)
    shapes = (rows, width), (width, hidden), (hidden,), (hidden, out), (out,), (rows, out)
    factors = 1, width**-0.5, 1, hidden**-0.5, 1, 1
    return [(factor * jax.random.normal(*each)).astype(dtype)
            for factor, *each in zip(factors, keys, shapes, strict=True)]


def exact(x, first, first_bias, second, second_bias, direction):
    """The result, and the gradients of (result · direction).sum() for all but the direction."""
    x, first, first_bias, second, second_bias, direction = (
        np.asarray(a, np.float64) for a in (x, first, first_bias, second, second_bias, direction))
    hidden = x @ first + first_bias
    normal = 0.5 * (1 + erf(hidden / math.sqrt(2)))
    slope = normal + hidden * np.exp(-hidden * hidden / 2) / math.sqrt(2 * math.pi)
    d_hidden = (direction @ second.T) * slope
    return (hidden * normal @ second + second_bias, d_hidden @ first.T, x.T @ d_hidden, d_hidden.sum(0),
            (hidden * normal).T @ direction, direction.sum(0))


@functools.partial(jax.jit, static_argnames=("kernels", "drop"))
def ours(x, first, first_bias, second, second_bias, direction, kernels, drop=None):
    def function(x, first, first_bias, second, second_bias):
        return mlp(x[None], (first, first_bias), (second, second_bias), drop=drop, kernels=kernels)[0]

    inference = function(x, first, first_bias, second, second_bias)
    out, gradients = jax.vjp(function, x, first, first_bias, second, second_bias)
    return inference, out, *gradients(direction)


def check(found, expected, tolerance):
    for x, y in zip(found, (expected[0], *expected), strict=True):
        assert np.linalg.norm(np.asarray(x, np.float64) - y) <= tolerance * np.linalg.norm(y)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(key, shape, kernels):
    arrays = inputs(key, shape)
    check(ours(*arrays, kernels=kernels), exact(*arrays), 1e-6)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_bfloat16(key, kernels):
    arrays = inputs(key, SHAPES[0], "bfloat16")
    found = ours(*arrays, kernels=kernels)
    assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
    check(found, exact(*arrays), 1e-2)


@pytest.mark.parametrize(("shape", "processors", "room"), [
    ((384, 192, 128), 1, mlp_hopper.Room(2, 1, 32)), ((384, 64, 256), 4, mlp_hopper.Room(2, 2, 64))], ids=str)
def test_kernels_for_hopper(key, shape, processors, room):
    """Three tiles for two warpgroups, three parts of 64 inputs each; and two columns, each for a program of two tiles
    and one of one. Elsewhere than on such GPUs they are interpreted: copies come at once, and products do not last.
    """
    interpreted = {} if kernels.on_hopper() else {"interpret": InterpretGPUParams(detect_races=True)}
    arrays = inputs(key, (*shape, 8), "bfloat16")[:3]
    x, first, bias = (np.asarray(a, np.float64) for a in arrays)
    hidden = x @ first + bias
    expected = 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))
    options = {"room": room, "processors": processors, **interpreted}
    found = mlp_hopper.forward(*arrays, **options), *mlp_hopper.forward_with_hidden(*arrays, **options)
    for ours, theirs in zip(found, (expected, hidden, expected), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) <= 4e-3 * np.linalg.norm(theirs)
    assert not (interpreted and interpret_pallas_call.get_races().races_found)


def test_large_tiles(key):
    """Of inputs that take them: more than 384 channels and 4,096 rows."""
    x, first, bias, second, out_bias, _ = arrays = inputs(key, (4100, 400, 130, 8))
    found = jax.jit(functools.partial(mlp, kernels="pallas"))(x, (first, bias), (second, out_bias))
    expected = exact(*arrays)[0]
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


def test_kernel_on_eight_devices(key):
    arrays = inputs(key, (16, 40, 24, 40))
    found = on_eight_devices(functools.partial(ours, kernels="pallas"), arrays, split=(True, *[False] * 4, True))
    check(found, exact(*arrays), 1e-6)


def test_dropout_is_applied_twice_and_has_no_kernel(key):
    arrays = inputs(key, SHAPES[1])
    half = functools.partial(jnp.multiply, 0.5)
    x, first, bias, second, out_bias, _ = arrays
    expected = exact(x, first, bias, 0.25 * second, 0.5 * out_bias, arrays[-1])[0]
    np.testing.assert_allclose(ours(*arrays, kernels="xla", drop=half)[0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="there is none for dropout; use 'auto' or 'xla'"):
        ours(*arrays, kernels="pallas", drop=half)


def test_bfloat16_of_more_channels_than_one_kernel_takes(key, monkeypatch):
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(module, "MOST_WIDTH", 16)
    arrays = inputs(key, SHAPES[0], "bfloat16")
    check(ours.__wrapped__(*arrays, kernels="auto"), exact(*arrays), 1e-2)


@pytest.mark.parametrize(("width", "out", "fused"), [(512, 512, True), (513, 16, False), (16, 520, False)])
def test_kernels_where_they_are_the_faster(monkeypatch, width, out, fused):
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    shapes = (4, width), (width, 32), (32,), (32, out), (out,)
    x, first, bias, second, out_bias = (jnp.zeros(shape, jnp.bfloat16) for shape in shapes)
    program = jax.make_jaxpr(lambda x: mlp(x, (first, bias), (second, out_bias)))(x)
    assert ("linear_gelu" in str(program)) == fused


@pytest.mark.parametrize(("rows", "width", "hidden", "dtype", "there"), [
    (256, 64, 128, "bfloat16", True), (128, 384, 128, "float16", True), (256, 64, 128, "float32", False),
    (128, 448, 128, "bfloat16", False), (136, 64, 128, "bfloat16", False), (128, 72, 128, "bfloat16", False),
    (128, 64, 192, "bfloat16", False), (0, 64, 128, "bfloat16", False), (128, 64, 0, "bfloat16", False),
    (512, 64, 128, "bfloat16", None)])
def test_what_hopper_s_kernels_take(monkeypatch, rows, width, hidden, dtype, there):
    """None: there is no such GPU. No shape is there twice, as JAX would not trace it again for another GPU."""
    monkeypatch.setattr(kernels, "on_gpu", lambda: True)
    monkeypatch.setattr(module, "on_hopper", lambda: there is not None)
    x, first = jnp.zeros((rows, width), dtype), (jnp.zeros((width, hidden)), jnp.zeros(hidden))

    def function(x):
        return mlp(x, first, (jnp.zeros((hidden, width)), jnp.zeros(width)), kernels="pallas")

    inference, training = jax.make_jaxpr(function)(x), jax.make_jaxpr(lambda x: jax.vjp(function, x)[0])(x)
    assert ("linear_and_gelu" in str(training)) == bool(there)
    assert ("warpgroup" in str(inference)) == bool(there)


@pytest.mark.parametrize("inputs", [64, 128, 192, 256, 320, 384])
@pytest.mark.parametrize("outputs", [1, 2])
def test_shared_memory_for_hopper_s_kernels(inputs, outputs):
    slots, stages, piece = mlp_hopper._room(inputs, outputs)
    rows, results, weights = slots * 128 * 64, outputs * stages * 128 * piece, inputs * 128
    assert 2 * (2 * rows + 2 * results + weights) <= 227 * 1024 - 2048
    assert slots >= 3  # with two, they take a fourth longer


@pytest.mark.parametrize(("capability", "there"), [("8.0", False), ("9.0", True), ("10.0", False), ("12.0", False)])
def test_hopper_is_told_from_other_gpus(monkeypatch, capability, there):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert kernels.on_hopper() == there
