"""Rollout against products written out cell by cell, and Grad-CAM against derivatives by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax import rollout
from fastervit_jax.model.hat import HATStage
from tests import official
from tests.golden import cases


@functools.cache
def parts(height: int, width: int, **changes):
    model, variables = official.model_and_variables(cases.Case("testing", changes, 0))
    return model, variables, cases.images(2, height, width, 3)


def softmax(rng, *shape):
    weights = np.exp(2 * rng.normal(size=shape)).astype(np.float32)
    return weights / weights.sum(-1, keepdims=True)


def random_attention(rng, grid, blocks=2, batch=2, heads=3):
    """What a stage with this grid would capture."""
    tokens, windows = grid.ct_size**2 + grid.window**2, grid.rows * grid.cols
    attention = {}
    for i in range(blocks):
        block = {"attention": {"weights": softmax(rng, batch * windows, heads, tokens, tokens)}}
        if grid.ct_size:
            carriers = windows * grid.ct_size**2
            block["carrier_attention"] = {"weights": softmax(rng, batch, heads, carriers, carriers)}
        attention[f"blocks_{i}"] = block
    return attention


def average(vectors):
    return sum(vectors) / len(vectors)


def attend(weights, tokens):
    """Each token: half of itself, half of all by its weights, averaged over the heads."""
    new = []
    for i, own in enumerate(tokens):
        taken = sum(np.float64(weights[:, i, j]).mean() * other for j, other in enumerate(tokens))
        new.append(0.5 * own + 0.5 * taken)
    return new


def by_hand(attention, image, height, width, window, ct_size, propagate):
    """The matrix of one image: cells and carriers are dicts by row and column, of vectors over the map's cells."""
    rows, cols = -(-height // window), -(-width // window)
    cells = {}
    for row in range(rows * window):
        for col in range(cols * window):
            cells[row, col] = np.zeros(height * width)
            if row < height and col < width:
                cells[row, col][row * width + col] = 1.0
    carriers, places = {}, []
    if ct_size:
        sides = []
        for side in (rows * window, cols * window):
            out = side // window * ct_size
            sides.append((out, side // out, side - (out - 1) * (side // out)))
        (out_h, stride_h, kernel_h), (out_w, stride_w, kernel_w) = sides
        places = [(row, col) for row in range(out_h) for col in range(out_w)]
        for row, col in places:
            carriers[row, col] = average([
                cells[r, c] for r in range(row * stride_h, row * stride_h + kernel_h)
                for c in range(col * stride_w, col * stride_w + kernel_w)])
    for number, block in enumerate(attention.values()):
        if ct_size:
            weights = block["carrier_attention"]["weights"][image]
            new = attend(weights, [carriers[place] for place in places])
            carriers = dict(zip(places, new, strict=True))
        for i in range(rows):
            for j in range(cols):
                weights = block["attention"]["weights"][(image * rows + i) * cols + j]
                own = [(i * ct_size + a, j * ct_size + b) for a in range(ct_size) for b in range(ct_size)]
                inside = [(i * window + a, j * window + b) for a in range(window) for b in range(window)]
                new = attend(weights, [carriers[place] for place in own] + [cells[place] for place in inside])
                carriers.update(zip(own, new[: len(own)], strict=True))
                cells.update(zip(inside, new[len(own) :], strict=True))
                if ct_size and propagate and number == len(attention) - 1:
                    for row, col in inside:
                        near = (row * ct_size // window, col * ct_size // window)
                        cells[row, col] = 0.5 * cells[row, col] + 0.5 * carriers[near]
    matrix = np.stack([cells[row, col] for row in range(height) for col in range(width)])
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("height", "width", "window", "ct_size", "propagate"),
    [
        pytest.param(4, 6, 2, 1, False, id="2x3 windows"),
        pytest.param(4, 6, 2, 1, True, id="propagated"),
        pytest.param(6, 3, 3, 2, True, id="pooling that overlaps"),
        pytest.param(4, 7, 3, 2, True, id="padded"),
        pytest.param(8, 5, 7, 2, False, id="a carrier over padding alone"),
        pytest.param(3, 4, 2, 0, False, id="windows alone, padded"),
        pytest.param(2, 2, 2, 0, False, id="one window"),
    ],
)
def test_a_stage_is_the_product_of_its_matrices(height, width, window, ct_size, propagate):
    grid = rollout.Grid(height, width, window, ct_size)
    attention = random_attention(np.random.default_rng(0), grid)
    matrix = rollout.stage_matrix(attention, grid, propagate=propagate)
    expected = [by_hand(attention, image, height, width, window, ct_size, propagate) for image in range(2)]
    np.testing.assert_allclose(matrix, expected, atol=1e-7)
    np.testing.assert_allclose(matrix.sum(-1), 1.0, atol=1e-12)
    assert not np.allclose(matrix[0], matrix[1], atol=1e-3)


def test_prefixes_and_heads():
    grid = rollout.Grid(4, 6, 2, 1)
    attention = random_attention(np.random.default_rng(0), grid, blocks=11)  # blocks_10 comes after blocks_9
    first, second, *rest = rollout.stage_matrices(attention, grid, propagate=True)
    part = {name: attention[name] for name in ("blocks_0", "blocks_1")}
    np.testing.assert_allclose(first[1], by_hand({"blocks_0": attention["blocks_0"]}, 1, 4, 6, 2, 1, False), atol=1e-7)
    np.testing.assert_allclose(second[1], by_hand(part, 1, 4, 6, 2, 1, False), atol=1e-7)
    np.testing.assert_allclose(rest[-1][1], by_hand(attention, 1, 4, 6, 2, 1, True), atol=1e-6)

    one_head = jax.tree.map(lambda weights: weights[:, 2:3], part)
    np.testing.assert_allclose(rollout.stage_matrix(part, grid, propagate=True, head=2)[1],
                               by_hand(one_head, 1, 4, 6, 2, 1, True), atol=1e-7)
    with pytest.raises(ValueError, match="head 3: expected one of 0 to 2"):
        rollout.stage_matrix(part, grid, propagate=True, head=3)


def test_orders_of_windows_and_carriers():
    grid = rollout.Grid(3, 6, 2, 2)
    np.testing.assert_array_equal(grid.window_cells(), [
        [0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]])
    np.testing.assert_array_equal(grid.window_carriers(), grid.window_cells())
    np.testing.assert_array_equal(grid.real(), np.arange(18))
    np.testing.assert_array_equal(rollout.Grid(2, 3, 2, 1).real(), [0, 1, 2, 4, 5, 6])
    np.testing.assert_array_equal(rollout.Grid(2, 3, 2, 1).window_carriers(), [[0], [1]])


def test_downsampling():
    # 3 × 4 cells become 2 × 2: rows 0-1 and 1-2, columns 0-1 and 1-3.
    matrix = rollout.downsample_matrix(3, 4).reshape(2, 2, 3, 4)
    np.testing.assert_allclose(matrix[0, 0], [[1 / 4, 1 / 4, 0, 0], [1 / 4, 1 / 4, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(matrix[1, 1], [[0, 0, 0, 0], [0, 1 / 6, 1 / 6, 1 / 6], [0, 1 / 6, 1 / 6, 1 / 6]])


def only_carrier(target):
    """4 × 4 cells in 2 × 2 windows: all carriers look at one, then all tokens of a window at its carrier."""
    carriers = np.zeros((1, 1, 4, 4), np.float32)
    carriers[..., target] = 1
    windows = np.zeros((4, 1, 5, 5), np.float32)
    windows[..., 0] = 1
    return {"blocks_0": {"attention": {"weights": windows}, "carrier_attention": {"weights": carriers}}}


def test_a_query_sees_another_window_through_carriers():
    matrix = rollout.stage_matrix(only_carrier(3), rollout.Grid(4, 4, 2, 1), propagate=False)
    # Half itself, a quarter its own window's average, a quarter that of the window its carrier looks at.
    own, far = 1 / 16, 1 / 16
    np.testing.assert_allclose(matrix[0, 0].reshape(4, 4), [
        [1 / 2 + own, own, 0, 0], [own, own, 0, 0], [0, 0, far, far], [0, 0, far, far]])
    local = {"blocks_0": {"attention": {"weights": np.full((4, 1, 4, 4), 1 / 4, np.float32)}}}
    matrix = rollout.stage_matrix(local, rollout.Grid(4, 4, 2, 0), propagate=False)
    np.testing.assert_allclose(matrix[0, 0].reshape(4, 4)[:2, :2], [[5 / 8, 1 / 8], [1 / 8, 1 / 8]])
    assert matrix[0, 0].reshape(4, 4)[2:].max() == 0


def test_attention_of_a_query():
    grid = rollout.Grid(3, 4, 2, 1)
    rows = np.zeros((1, 12))
    rows[0, 7] = 1  # row 1, column 3: the last token of the second window
    windows = np.zeros((4, 2, 5, 5), np.float32)
    windows[1, 0, 4] = [0.1, 0.2, 0.3, 0.4, 0.0]
    windows[1, 1, 4, 0] = 1
    maps, to_carriers = rollout.window_maps(windows, grid, rows)
    np.testing.assert_allclose(maps[0, 0], [[0, 0, 0.2, 0.3], [0, 0, 0.4, 0], [0, 0, 0, 0]], atol=1e-7)
    assert maps[0, 1].max() == 0
    np.testing.assert_allclose(to_carriers, [[0.1, 1.0]], atol=1e-7)

    carriers = np.zeros((1, 2, 4, 4), np.float32)
    carriers[0, :, 1] = [[0, 0, 1, 0], [0.4, 0.3, 0.2, 0.1]]
    expected = [[[[0, 0], [1, 0]], [[0.4, 0.3], [0.2, 0.1]]]]
    np.testing.assert_allclose(rollout.carrier_maps(carriers, grid, rows), expected, atol=1e-7)
    with pytest.raises(ValueError, match=r"3 × 4 cells in 2 × 2 windows without carrier tokens: .*hat=True"):
        rollout.carrier_maps(carriers, rollout.Grid(3, 4, 2, 0), rows)


@pytest.mark.parametrize("hat", [True, False])
def test_cells_that_matter_are_those_that_are_seen(hat, key):
    """The stage's own derivatives are zero where the rollout is: outside the window, without carrier tokens."""
    stage = HATStage(width=4, heads=2, window=2, ct_size=1, mlp_ratio=1.0, qkv_bias=True, layer_scale=None, hat=hat,
                     do_propagation=True, drop_path_rates=(0.0,), drop_rate=0.0, attn_drop_rate=0.0, dtype="float32")
    x = jax.random.normal(key, (1, 3, 5, 4))
    variables = jax.jit(stage.init, static_argnums=2)(key, x, False)
    params = {"params": jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape),
                                     variables["params"])}

    @jax.jit
    def derivative(params, x):
        return jax.jacrev(lambda x: (stage.apply(params, x, False) ** 3).sum((0, 3)))(x)[:, :, 0]

    matters = np.abs(derivative(params, x)).max(-1).reshape(15, 15) > 0
    _, captured = stage.apply(params, x, False, mutable=["attention"])
    attention = jax.device_get(captured["attention"])
    matrix = rollout.stage_matrix(attention, rollout.Grid(3, 5, 2, int(hat)), propagate=True)
    np.testing.assert_array_equal(matters, matrix[0] > 0)
    assert matters.all() == hat


def test_maps_of_a_model():
    # Stage 2: 6 × 9 cells in 3 × 5 windows; stage 3: 3 × 5 cells in 2 × 3 windows; both padded.
    model, variables, images = parts(96, 144)
    logits, attention = rollout.capture(model, variables, images)
    np.testing.assert_allclose(logits, jax.jit(model.apply)(variables, images), rtol=1e-5, atol=1e-6)
    second = [by_hand(attention[2], i, 6, 9, 2, 1, True) for i in range(2)]
    third = [by_hand(attention[3], i, 3, 5, 2, 1, True) for i in range(2)]
    down = np.zeros((15, 54))
    for row in range(3):
        for col in range(5):
            seen = [(r, c) for r in range(6) for c in range(9) if abs(2 * row - r) <= 1 and abs(2 * col - c) <= 1]
            for r, c in seen:
                down[row * 5 + col, r * 9 + c] = 1 / len(seen)

    seen = rollout.class_map(model, variables, images)
    expected = np.stack([(third[i].mean(0) @ down @ second[i]).reshape(6, 9) for i in range(2)])
    np.testing.assert_allclose(seen, expected, atol=1e-7)
    np.testing.assert_allclose(seen.sum((1, 2)), 1, atol=1e-6)

    x, y = np.array([143, 32]), np.array([95, 16])  # of stage 2 the cells (5, 8) and (1, 2), of 3 (2, 4) and (0, 1)
    seen = rollout.query_map(model, variables, jnp.asarray(images), x, y)
    np.testing.assert_allclose(seen, [second[0][53].reshape(6, 9), second[1][11].reshape(6, 9)], atol=1e-7)
    seen = rollout.query_map(model, variables, images, x, y, stage=3)
    expected = [(third[0][14] @ down @ second[0]).reshape(6, 9), (third[1][1] @ down @ second[1]).reshape(6, 9)]
    np.testing.assert_allclose(seen, expected, atol=1e-7)
    with pytest.raises(ValueError, match="query x=144, y=0: outside the image of 144 × 96 pixels; expected x"):
        rollout.query_map(model, variables, images, np.array([3, 144]), 0)
    with pytest.raises(ValueError, match="stage=1: expected 2 or 3"):
        rollout.query_map(model, variables, images, 0, 0, stage=1)


def test_grids_of_a_model():
    config = fv.create_model("faster_vit_0_224").config
    assert rollout.make_grid(config, 2, 224, 224) == rollout.Grid(14, 14, 7, 2)
    assert rollout.make_grid(config, 2, 112, 100) == rollout.Grid(7, 7, 7, 0)  # a single window has no carrier tokens
    assert rollout.make_grid(config, 2, 113, 96) == rollout.Grid(8, 6, 7, 2)
    assert rollout.make_grid(config, 3, 448, 448) == rollout.Grid(14, 14, 7, 0)


def test_grad_cam_by_hand():
    """The last stage's logits are linear in its map: pooled, scaled by the batch norm, times the head's weights."""
    model, variables, images = parts(96, 144)
    x = np.asarray(jax.jit(functools.partial(model.apply, method="features"))(variables, images)[3], np.float64)
    norm, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
    gain = np.asarray(norm["scale"], np.float64) / np.sqrt(np.asarray(stats["var"], np.float64) + 1e-5)
    kernel = np.asarray(variables["params"]["head"]["kernel"], np.float64)
    for classes, chosen in ((3, [3, 3]), (np.array([2, 5]), [2, 5]), (None, None)):
        if chosen is None:
            chosen = np.asarray(jax.jit(model.apply)(variables, images)).argmax(-1)
        alpha = np.stack([gain * kernel[:, i] / 15 for i in chosen])
        expected = np.maximum(np.einsum("bhwc,bc->bhw", x, alpha), 0)
        assert 0 < (expected > 0).mean() < 1
        np.testing.assert_allclose(rollout.grad_cam(model, variables, images, classes), expected, atol=1e-6, rtol=1e-4)


def test_grad_cam_of_an_earlier_stage():
    """A channel's weight is how much the logit grows when the whole channel does, over the number of cells."""
    model, variables, images = parts(64, 64)
    x = jax.jit(functools.partial(model.apply, method="features"))(variables, images)[2]
    logits = jax.jit(lambda variables, x: model.apply(variables, x, 2, method="from_stage")[:, 4])
    step, alpha = 1e-2, []
    for channel in range(x.shape[-1]):
        shift = np.zeros(x.shape[-1], np.float32)
        shift[channel] = step
        higher, lower = (logits(variables, x + sign * shift[None, None, None]) for sign in (1, -1))
        alpha.append((np.asarray(higher, np.float64) - np.asarray(lower, np.float64)) / (2 * step * 16))
    expected = np.maximum(np.einsum("bhwc,cb->bhw", np.asarray(x, np.float64), alpha), 0)
    assert 0 < (expected > 0).mean() < 1
    assert official.relative_error(rollout.grad_cam(model, variables, images, 4, stage=2), expected) < 5e-3


def test_grad_cam_refuses():
    model, variables, images = parts(64, 64)
    with pytest.raises(ValueError, match="class 10: expected one of 0 to 9"):
        rollout.grad_cam(model, variables, images, 10)
    with pytest.raises(ValueError, match="stage=4: expected 0, 1, 2 or 3"):
        rollout.grad_cam(model, variables, images, stage=4)
    with pytest.raises(ValueError, match="num_classes=0: Grad-CAM needs a model with a head"):
        rollout.grad_cam(fv.create_model("testing", num_classes=0), variables, images)
