"""The strided convolution of images by space to depth, gradients without stride, and channels filled up, against the
plain forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastervit_jax.model.conv import ConvStage
from fastervit_jax.ops.conv import conv3x3


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (9, 5), (1, 2)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_space_to_depth(key, size, channels):
    x = jax.random.normal(key, (2, *size, channels))
    kernel = jax.random.normal(jax.random.fold_in(key, 1), (3, 3, channels, 5))

    @functools.partial(jax.jit, static_argnames=("kernels", "layout"))
    def ours(x, kernel, kernels, layout="HWIO"):
        out, gradients = jax.vjp(lambda *args: conv3x3(*args, stride=2, layout=layout, kernels=kernels), x, kernel)
        return out, *gradients(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    expected = ours(x, kernel, "xla")
    assert expected[0].shape == (2, (size[0] + 1) // 2, (size[1] + 1) // 2, 5)
    for found, wanted in zip(ours(x, kernel, "pallas"), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    np.testing.assert_allclose(ours(x, kernel.transpose(3, 0, 1, 2), "pallas", "OHWI")[0], expected[0], atol=1e-4)


def test_space_to_depth_is_used():
    x, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    convolved = str(jax.make_jaxpr(lambda *args: conv3x3(*args, stride=2, kernels="pallas"))(x, kernel))
    assert "5,5,16" in convolved  # of a border of zeros and 4 × 4 squares, with 12 channels and 4 to fill up
    for stride, channels in ((1, 3), (2, 5)):
        x, kernel = jnp.ones((1, 8, 8, channels)), jnp.ones((3, 3, channels, 5))
        as_it_is = jax.make_jaxpr(lambda *args, stride=stride: conv3x3(*args, stride=stride, kernels="pallas"))
        assert len(as_it_is(x, kernel).eqns) == 1


@pytest.mark.parametrize("size", [(8, 8), (7, 3), (1, 1)], ids=str)
def test_gradient_without_stride(key, size):
    """As a convolution like the first, it has the values that JAX gives."""
    x = jax.random.normal(key, (2, *size, 6))
    kernel = jax.random.normal(jax.random.fold_in(key, 1), (3, 3, 6, 5))
    d_out = jax.random.normal(jax.random.fold_in(key, 2), (2, *size, 5))

    def ours(kernels):
        out, gradients = jax.vjp(functools.partial(conv3x3, kernels=kernels), x, kernel)
        return out, *gradients(d_out)

    for found, expected in zip(ours("pallas"), ours("xla"), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    turned = str(jax.make_jaxpr(lambda: ours("pallas"))())
    assert "optimization_barrier" in turned
    assert "optimization_barrier" not in str(jax.make_jaxpr(lambda: ours("xla"))())


@pytest.mark.parametrize("train", [False, True])
def test_channels_filled_up(key, train):
    """Same output, statistics and gradients of the same parameters, with 12 channels and with 16."""
    x = jax.random.normal(key, (4, 6, 6, 12))
    stages = {kernels: ConvStage(12, 0.5, (0.0, 0.0), jnp.float32, kernels=kernels) for kernels in ("xla", "pallas")}
    variables = stages["pallas"].init(key, x, False)
    leaves, structure = jax.tree.flatten(variables)
    leaves = [1 + 0.3 * jax.random.normal(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves)]
    variables = jax.tree.unflatten(structure, leaves)

    def ours(stage, variables, x):
        def loss(params, x):
            out, updated = stage.apply({**variables, "params": params}, x, train, mutable=["batch_stats"])
            return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum(), (out, updated)

        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    plain, filled = (jax.jit(functools.partial(ours, stages[kernels]))(variables, x) for kernels in ("xla", "pallas"))
    jax.tree.map(lambda found, expected: np.testing.assert_allclose(
        found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()), filled, plain)
    inside = str(jax.make_jaxpr(functools.partial(stages["pallas"].apply, train=False))(variables, x))
    assert "4,6,6,16" in inside
