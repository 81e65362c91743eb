"""Geometry on literal arrays, and whole rectangular images against the NumPy reference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.model import hat, position
from tests import official, reference
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
                         propagate=False, drop_path_rate=0.0, drop_rate=0.0, attn_drop_rate=0.0, dtype="float32")
    x = jnp.full((1, 6, 9, 1), 100.0) + jnp.arange(6.0)[None, :, None, None]
    carriers = jnp.asarray(WINDOWS, jnp.float32)[None, :, :, None]
    variables = block.init(key, x, carriers, 2, 3, False)
    variables = {"params": jax.tree.map(jnp.zeros_like, variables["params"])}  # the MLPs add nothing
    (new_x, new_carriers), seen = block.apply(variables, x, carriers, 2, 3, False, mutable=["seen"])

    (over_image,) = seen["seen"]["carrier_attention"]["tokens"]
    np.testing.assert_array_equal(over_image[0, :, 0], np.arange(24))
    (in_windows,) = seen["seen"]["attention"]["tokens"]
    np.testing.assert_array_equal(in_windows[:, :4, 0], WINDOWS)
    np.testing.assert_array_equal(in_windows[:, 4:, 0], 100 + np.arange(6)[:, None].repeat(9, 1))
    np.testing.assert_array_equal(new_x, x)
    np.testing.assert_array_equal(new_carriers, carriers)


def test_average_pool_overlaps():
    # 2 windows of 7 rows, 2 carriers each: 4 values from 14 rows, stride 3, kernel 5; 1 window of 4 columns: 2 values.
    x = jnp.arange(14.0)[None, :, None, None] + 100 * jnp.arange(4.0)[None, None, :, None]
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(hat.average_pool(x, 7, 2).shape, (1, 4, 2, 1))  # 4 columns are no window of 7
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 3), (0, 0)))
    pooled = hat.average_pool(x, 7, 2)
    rows = np.array([2.0, 5.0, 8.0, 11.0])  # means of rows 0-4, 3-7, 6-10, 9-13
    # Columns: 2 values from 7, stride 3, kernel 4: columns 0-3 (all of x) and 3-6 (its last, and padding).
    expected = np.stack([rows + 150, (rows + 300) / 4], axis=1)
    np.testing.assert_allclose(pooled[0, :, :, 0], expected, rtol=1e-6)


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


def against_reference(height, width, **changes):
    """Relative errors of logits and stages against the NumPy reference, with the golden cases' weights."""
    model, variables = official.model_and_variables(cases.Case("testing", changes, 0))
    images = cases.images(2, height, width, model.config.in_chans)
    c = model.config
    logits, maps = reference.forward(
        official.official_weights(variables), images, depths=c.depths, num_heads=c.num_heads,
        window_size=c.window_size, ct_size=c.ct_size, hat=c.hat, do_propagation=c.do_propagation,
        layer_norm_last=c.layer_norm_last)
    both = nn.apply(lambda model, images: (model(images), model.features(images)), model)
    ours, our_maps = jax.jit(both)(variables, images)
    return [official.relative_error(a, b) for a, b in zip((ours, *our_maps), (logits, *maps), strict=True)]


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
    errors = against_reference(height, width, **changes)
    assert max(errors) < 1e-5, errors


@pytest.mark.parametrize("name", cases.COMMITTED)
def test_reference_agrees_with_the_official_model(name):
    case = cases.CASES[name]
    theirs = np.load(official.GOLDEN / f"{name}.npz")
    c = fv.create_model(case.arch, **case.kwargs).config
    weights = {n: cases.official_array(n, w.shape) for n, w in official.official_weights(
        official.model_and_variables(case)[1]).items()}
    logits, maps = reference.forward(
        weights, cases.images(case.batch, case.resolution, case.resolution, 3), depths=c.depths,
        num_heads=c.num_heads, window_size=c.window_size, ct_size=c.ct_size, hat=c.hat,
        do_propagation=c.do_propagation, layer_norm_last=c.layer_norm_last)
    assert official.relative_error(logits, theirs["logits"]) < 1e-6
    for i, x in enumerate(maps):
        assert official.relative_error(x, theirs[f"stage{i}"]) < 1e-6
