"""Geometry on literal arrays, and whole rectangular images against the NumPy reference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.model import hat, position
from tests import official
from tests.golden import cases

# A map of 4 × 6 tokens, numbered in raster order: 2 × 3 windows of 2 × 2 tokens.
MAP = np.arange(24, dtype=np.float32).reshape(1, 4, 6, 1)
WINDOWS = [
    [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11],
    [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23],
]  # fmt: skip


def test_partition():
    windows = hat.partition(jnp.asarray(MAP), 2)
    assert windows.shape == (1, 6, 4, 1)
    np.testing.assert_array_equal(windows[0, :, :, 0], WINDOWS)


def test_unpartition():
    windows = jnp.asarray(WINDOWS, jnp.float32)[None, :, :, None]
    np.testing.assert_array_equal(hat.unpartition(windows, 2, rows=2, cols=3), MAP)


def test_unpartition_of_a_column_of_windows():
    windows = jnp.arange(8.0).reshape(1, 2, 4, 1)
    expected = [[0, 1], [2, 3], [4, 5], [6, 7]]
    np.testing.assert_array_equal(hat.unpartition(windows, 2, rows=2, cols=1)[0, :, :, 0], expected)


class Recorder(nn.Module):
    """Stands for attention among carrier tokens: returns what it was given as a variable."""

    @nn.compact
    def __call__(self, x, *args):
        self.sow("seen", "tokens", x)
        return jnp.zeros_like(x)


def test_carriers_attend_in_raster_order(key, monkeypatch):
    monkeypatch.setattr(hat.HATBlock, "attention", lambda self, name: Recorder(name=name))
    monkeypatch.setattr(hat.HATBlock, "norm", lambda self, name: lambda x: x)
    monkeypatch.setattr(hat, "AbsolutePosition", lambda width, name: lambda rows, cols: jnp.zeros((rows * cols, width)))
    block = hat.HATBlock(width=1, heads=1, window=3, ct_size=2, mlp_ratio=1.0, qkv_bias=True, layer_scale=None,
                         propagate=False, drop_rate=0.0, attn_drop_rate=0.0, dtype="float32")
    x = jnp.full((1, 6, 9, 1), 100.0) + jnp.arange(6.0)[None, :, None, None]
    carriers = jnp.asarray(WINDOWS, jnp.float32)[None, :, :, None]
    tokens = jnp.concatenate([carriers, x], axis=2)
    variables = block.init(key, tokens, 4, 2, 3, False)
    variables = {"params": jax.tree.map(jnp.zeros_like, variables["params"])}  # the MLPs add nothing
    out, seen = block.apply(variables, tokens, 4, 2, 3, False, mutable=["seen"])

    (over_image,) = seen["seen"]["carrier_attention"]["tokens"]
    np.testing.assert_array_equal(over_image[0, :, 0], np.arange(24))
    (in_windows,) = seen["seen"]["attention"]["tokens"]
    np.testing.assert_array_equal(in_windows[:, :4, 0], WINDOWS)
    np.testing.assert_array_equal(in_windows[:, 4:, 0], 100 + np.arange(6)[:, None].repeat(9, 1))
    np.testing.assert_array_equal(out, tokens)


def test_average_pool_overlaps():
    # 14 rows are 2 windows of 7, each with 2 carriers: 4 values, stride 3, kernel 5.
    # 7 columns are 1 window: 2 values, stride 3, kernel 4.
    x = jnp.arange(14.0)[None, :, None, None] + 100 * jnp.arange(7.0)[None, None, :, None]
    rows = np.array([2.0, 5.0, 8.0, 11.0])  # the middles of rows 0-4, 3-7, 6-10, 9-13
    cols = np.array([150.0, 450.0])  # of columns 0-3, 3-6
    np.testing.assert_allclose(hat.average_pool(x, 7, 2)[0, :, :, 0], rows[:, None] + cols[None, :], rtol=1e-6)


@pytest.mark.parametrize(("height", "width", "window", "carriers"), [(14, 21, 7, 2), (20, 35, 5, 3), (9, 9, 9, 1)])
def test_gradient_of_average_pool_in_16_bits(key, height, width, window, carriers):
    """It is computed in another way than JAX does, which is taken for float32."""
    x = jax.random.normal(key, (2, height, width, 3)).astype(jnp.bfloat16)

    def of(x):
        out, gradient = jax.vjp(lambda x: hat.average_pool(x, window, carriers), x)
        direction = jax.random.normal(key, out.shape).astype(jnp.bfloat16)
        return out, *gradient(direction.astype(x.dtype))

    for found, exact in zip(of(x), of(x.astype(jnp.float32)), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2.0**-8, atol=1e-6)


def test_upsample_nearest():
    carriers = jnp.asarray([10.0, 11.0, 12.0, 13.0]).reshape(1, 1, 4, 1)
    expected = [10, 10, 11, 10, 10, 11, 12, 12, 13]
    np.testing.assert_array_equal(hat.upsample_nearest(carriers, 2, 3)[0, 0, :, 0], expected)


def test_absolute_coordinates():
    np.testing.assert_allclose(position.absolute_coordinates(1, 2), [[0, -1], [0, 0]])
    np.testing.assert_allclose(position.absolute_coordinates(3, 1), [[-1, 0], [0, 0], [1, 0]])
    np.testing.assert_allclose(position.absolute_coordinates(4, 5)[:6],
                               [[-1, -1], [-1, -0.5], [-1, 0], [-1, 0.5], [-1, 1], [-0.5, -1]])


def test_relative_coordinates():
    table, index = position.relative_coordinates(2, 3)
    far, near = np.log2(9) / 3, np.log2(5) / 3
    cols = [-far, -near, 0, near, far]
    np.testing.assert_allclose(table, [(row, col) for row in (-far, 0, far) for col in cols], rtol=1e-6)
    # Tokens 0 (0, 0) and 5 (1, 2): the offset of 0 from 5 is (-1, -2), that of 5 from 0 is (1, 2).
    np.testing.assert_array_equal(index[0], [7, 6, 5, 2, 1, 0])
    np.testing.assert_array_equal(index[5], [14, 13, 12, 9, 8, 7])
    table, index = position.relative_coordinates(1, 1)
    np.testing.assert_array_equal(table, [[0, 0]])
    np.testing.assert_array_equal(index, [[0]])


@pytest.mark.parametrize(
    ("height", "width", "changes"),
    [
        # Carrier grids: stage 2 and stage 3, in windows.
        pytest.param(96, 160, {"window_size": (2, 2, 2, 2)}, id="3x5 and 2x3, both padded"),
        pytest.param(160, 96, {"window_size": (2, 2, 3, 3), "ct_size": 2}, id="4x2 padded and 2x1, tall"),
        pytest.param(64, 256, {"window_size": (2, 2, 4, 2)}, id="1x4: a grid side of one token"),
        pytest.param(33, 95, {"window_size": (2, 2, 2, 1)}, id="2x3 and 2x3, odd sides, windows of one token"),
        pytest.param(128, 192, {"window_size": (2, 2, 4, 4), "ct_size": 3, "layer_norm_last": True,
                                "layer_scale": None, "layer_scale_conv": None}, id="2x3 and 1x2, unscaled"),
    ],
)
def test_rectangle_is_what_the_definition_gives(height, width, changes):
    model, variables = official.model_and_variables(cases.Case("testing", changes, 0))
    images = cases.images(2, height, width, 3)
    logits, maps = official.reference_outputs(model, variables, images)
    both = nn.apply(lambda model, images: (model(images), model.features(images)), model)
    ours, our_maps = jax.jit(both)(variables, images)
    errors = [official.relative_error(a, b) for a, b in zip((ours, *our_maps), (logits, *maps), strict=True)]
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize("name", cases.COMMITTED)
def test_reference_agrees_with_the_official_model(name):
    case, theirs = cases.CASES[name], np.load(official.GOLDEN / f"{name}.npz")
    images = cases.images(case.batch, case.resolution, case.resolution, 3)
    logits, maps = official.reference_outputs(*official.model_and_variables(case), images)
    assert official.relative_error(logits, theirs["logits"]) < 1e-6
    for i, x in enumerate(maps):
        assert official.relative_error(x, theirs[f"stage{i}"]) < 1e-6


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_carriers_come_before_their_windows_tokens(key, kernels):
    z, carriers = jax.random.normal(key, (2, 3, 11, 5)), jnp.ones((2, 3, 4, 5))
    expected = np.concatenate([carriers, z[:, :, 4:]], axis=2)
    np.testing.assert_array_equal(hat.with_carriers(z, carriers, kernels), expected)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_no_images(key, kernels):
    model = fv.create_model("testing").clone(kernels=kernels)
    variables = model.init(key, jnp.zeros((1, 64, 64, 3)))
    for each in ((model, variables), fv.deploy(model, variables)):
        assert each[0].apply(each[1], jnp.zeros((0, 64, 64, 3))).shape == (0, 10)
