"""Layers one by one: batch norm, drop path, dropout, initial values."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError
from flax.traverse_util import flatten_dict

import fastervit_jax as fv
from fastervit_jax.model.attention import MLP, LayerNorm, drop_path, drop_paths
from fastervit_jax.model.conv import BatchNorm, ConvBlock, ConvStage
from fastervit_jax.model.hat import HATBlock, HATStage
from tests import official
from tests.golden import cases


@pytest.mark.parametrize(
    ("shape", "mean", "deviation", "running"),
    [
        ((2, 1, 2, 2), (0.0, 1.0), 2.0, (0.0, 0.0)),  # few values: the unbiased variance is 4/3 of the biased one
        ((4, 3, 5, 2), (100.0, -300.0), 0.1, (99.0, -301.0)),  # far from zero: E[x²] - E[x]² would lose its digits
    ],
)
def test_batch_norm_in_training(shape, mean, deviation, running, key):
    x = jax.random.normal(key, shape) * deviation + jnp.asarray(mean)[None, None, None]
    norm = BatchNorm(1e-5, "float32")
    params = {"scale": jnp.asarray([2.0, 3.0]), "bias": jnp.asarray([0.5, -0.5])}
    stats = {"mean": jnp.asarray(running), "var": jnp.asarray([0.02, 0.04])}
    y, updated = norm.apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])

    exact, count = np.asarray(x, np.float64), np.prod(shape[:3])
    batch_mean, batch_var = exact.mean((0, 1, 2)), exact.var((0, 1, 2))
    expected = (exact - batch_mean) / np.sqrt(batch_var + 1e-5) * [2, 3] + [0.5, -0.5]
    np.testing.assert_allclose(y, expected, atol=1e-3)
    updated = updated["batch_stats"]
    np.testing.assert_allclose(updated["mean"], 0.9 * np.array(running) + 0.1 * batch_mean, rtol=1e-6)
    unbiased = batch_var * count / (count - 1)
    np.testing.assert_allclose(updated["var"], 0.9 * np.array([0.02, 0.04]) + 0.1 * unbiased, rtol=1e-4)


def test_batch_norm_in_evaluation():
    norm = BatchNorm(0.25, "float32")
    variables = {"params": {"scale": jnp.asarray([2.0]), "bias": jnp.asarray([1.0])},
                 "batch_stats": {"mean": jnp.asarray([3.0]), "var": jnp.asarray([3.75])}}
    x = jnp.asarray([3.0, 5.0]).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(norm.apply(variables, x, False).ravel(), [1.0, 3.0])


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("given", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_batch_norm_of_another_dtype(key, given, dtype, train):
    x = jax.random.normal(key, (4, 3, 3, 5)).astype(given)
    norm, exact = (BatchNorm(1e-5, dtype, activation="gelu") for dtype in (dtype, "float32"))
    variables = norm.init(key, x, False)
    y, expected = (each.apply(variables, values, train, mutable=["batch_stats"])[0]
                   for each, values in ((norm, x), (exact, x.astype("float32"))))
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype("float32"), expected, rtol=2.0**-8, atol=2e-5)


def test_batch_norm_needs_two_values(key):
    norm = BatchNorm(1e-5, "float32")
    x = jnp.ones((1, 1, 1, 4))
    variables = norm.init(key, x, False)
    with pytest.raises(ValueError, match=r"one value a channel, shape \(1, 1, 1, 4\): training needs at least two"):
        norm.apply(variables, x, True, mutable=["batch_stats"])


def test_drop_path_drops_whole_images_or_windows(key):
    x = jax.random.normal(key, (3, 2, 5))
    for kept in (jnp.asarray([0.0, 1.0, 4.0]), jnp.asarray([[0.0, 1.0], [2.0, 0.5], [0.0, 3.0]])):
        wide = np.asarray(kept).reshape(3, -1, 1)
        np.testing.assert_array_equal(drop_path(x, kept), x * wide)
        low = drop_path(x.astype(jnp.bfloat16), kept / 3)  # rounded once
        np.testing.assert_array_equal(low, (x.astype(jnp.bfloat16).astype("float32") * (wide / 3)).astype(jnp.bfloat16))
    assert drop_path(x, None) is x


def test_drop_paths_are_drawn_one_by_one(key):
    rates = (0.0, 0.25, 0.25, 0.75)
    nothing, *kept = drop_paths(key, rates, (2, 400, 5))
    assert nothing is None
    for values, rate in zip(kept, rates[1:], strict=True):
        assert set(np.unique(values)) == {0.0, np.float32(1 / (1 - rate))}
        np.testing.assert_allclose((values == 0).mean(1), rate, atol=0.1)
    one, another = ((values == 0).ravel() for values in kept[:2])
    assert abs(np.corrcoef(one, another)[0, 1]) < 0.06
    assert drop_paths(None, rates, (2, 400, 5)) == [None] * 4
    assert drop_paths(key, (0.0, 0.0), (3,)) == [None] * 2


def test_drop_path_in_a_block(key):
    # Images of 2 × 2 windows, every token alike. Carrier branches drop for images, the others for windows.
    block = HATBlock(width=4, heads=2, window=2, ct_size=1, mlp_ratio=1.0, qkv_bias=True, layer_scale=None,
                     propagate=False, drop_rate=0.0, attn_drop_rate=0.0, dtype="float32")
    tokens = jnp.ones((8, 4, 1 + 4, 4))
    variables = jax.jit(block.init, static_argnums=(2, 3, 4, 5))(key, tokens, 1, 2, 2, False)
    apply = jax.jit(block.apply, static_argnums=(2, 3, 4, 5))
    kept = jax.random.uniform(key, (2, 8, 1 + 4))

    def only(branch):
        """The block without what the other branches add; this one adds 1."""
        params = {**variables["params"]}
        for name in ("position", "carrier_position"):
            params[name] = jax.tree.map(jnp.zeros_like, params[name])
        for name in ("attention", "mlp", "carrier_attention", "carrier_mlp"):
            kernel = jnp.zeros_like(params[name]["out"]["kernel"])
            params[name] = {**params[name], "out": {"kernel": kernel, "bias": jnp.full(4, float(name == branch))}}
        return {"params": params}

    for branch, windows, images in (
        ("attention", kept[0, :, 1:], 0), ("mlp", kept[1, :, 1:], 0), ("carrier_attention", 0, kept[0, :, :1]),
        ("carrier_mlp", 0, kept[1, :, :1]),
    ):
        added = np.asarray(apply(only(branch), tokens, 1, 2, 2, True, None, kept) - 1)
        windows, images = np.broadcast_to(windows, (8, 4)), np.broadcast_to(images, (8, 4))
        np.testing.assert_allclose(added[:, :, 1:], np.broadcast_to(windows[..., None, None], (8, 4, 4, 4)), atol=1e-6)
        np.testing.assert_allclose(added[:, :, 0, 0], windows + images, atol=1e-6)
    # Without carrier tokens, all factors are the windows'.
    added = apply(only("mlp"), tokens[:, :, 1:], 0, 2, 2, True, None, kept[..., 1:]) - 1
    np.testing.assert_allclose(added[:, :, 0, 0], kept[1, :, 1:], atol=1e-6)


def test_drop_path_in_a_conv_block(key):
    """What is added of each image is `kept` times what it is without."""
    x = jax.random.normal(key, (16, 6, 6, 4))
    kept = 4.0 * jax.random.bernoulli(key, 0.25, (16,))
    block = ConvBlock(4, None, "float32", bn_group_size=4)
    variables = block.init(key, x, False)

    def branch(kept):
        return np.asarray(block.apply(variables, x, True, kept, mutable=["batch_stats"])[0] - x)

    assert 0 < (kept > 0).sum() < 16
    np.testing.assert_allclose(branch(kept), branch(None) * kept[:, None, None, None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "windows", "carriers"])
def test_each_block_of_a_stage_gets_its_own_factors(key, kind):
    rates = 0.0, 0.25, 0.5
    if kind == "conv":
        stage = ConvStage(4, None, rates, "float32")
        expected = (40,)
    else:
        stage = HATStage(
            width=4, heads=2, window=2, ct_size=1, mlp_ratio=1.0, qkv_bias=True, layer_scale=None,
            hat=kind == "carriers", do_propagation=False, drop_path_rates=rates, drop_rate=0.0, attn_drop_rate=0.0,
            dtype="float32")
        expected = 2, 40, 6 + (kind == "carriers")
    x = jax.random.normal(key, (40, 4, 6, 4))
    variables = jax.jit(stage.init, static_argnums=2)(key, x, False)

    def output(stage, key):
        return stage.apply(variables, x, True, rngs={"dropout": key}, mutable=["batch_stats"])[0]

    @jax.jit
    def with_factors(key):
        seen = []

        def record(next_function, args, kwargs, context):
            if isinstance(context.module, ConvBlock | HATBlock) and context.method_name == "__call__":
                seen.append(args[-1])
            return next_function(*args, **kwargs)

        with nn.intercept_methods(record):
            return output(stage, key), seen

    out, (nothing, *kept) = with_factors(key)
    assert nothing is None
    for values, rate in zip(kept, rates[1:], strict=True):
        assert values.shape == expected
        assert set(np.unique(values)) == {0.0, np.float32(1 / (1 - rate))}
    assert ((kept[0] == 0) != (kept[1] == 0)).any()
    _, (_, *another) = with_factors(jax.random.key(5))
    assert all((one != other).any() for one, other in zip(kept, another, strict=True))
    again = jax.jit(functools.partial(output, stage.clone(remat=True)))(key)
    np.testing.assert_allclose(again, out, atol=1e-5)


def test_layer_scale_in_float16(key):
    """Weights times 1e-5 would be next to nothing: the layers' results are scaled."""
    mlp = MLP(16, 64, 0.0, "float16")
    x, gamma = jax.random.normal(key, (8, 16)), jnp.full(16, 1e-5)
    variables = mlp.init(key, x, False)
    exact = MLP(16, 64, 0.0, "float32").apply(variables, x, False)
    found = mlp.apply(variables, x, False, gamma)
    assert found.dtype == jnp.float16
    np.testing.assert_array_equal(found, mlp.apply(variables, x, False) * gamma.astype(jnp.float16)[None])
    np.testing.assert_allclose(found, 1e-5 * exact, atol=1e-7)


def test_drop_path_rates_grow_linearly():
    bound = fv.create_model("testing", depths=(1, 1, 3, 1), drop_path_rate=0.5).bind({})
    rates = [rate for stage in bound.stages for rate in stage.drop_path_rates]
    np.testing.assert_allclose(rates, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_each_rate_has_an_effect_in_training():
    # In evaluation none has: it is given no key there, and dropout without one raises.
    changes = {"depths": (1, 1, 1, 1), "hat": (False, False, True, False), "drop_path_rate": 0.0}
    _, variables = official.model_and_variables(cases.Case("testing", changes, 0))
    images = cases.images(2, 64, 64, 3)

    def logits(**rates):
        model = fv.create_model("testing", **{**changes, **rates})
        train = jax.jit(lambda variables, images, key: model.apply(
            variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])[0])
        return train(variables, images, jax.random.key(0))

    quiet = logits()
    for field in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        assert official.relative_error(logits(**{field: 0.5}), quiet) > 1e-2, field


def test_initial_values(key):
    model = fv.create_model("faster_vit_0_224", dim=32, depths=(1, 1, 1, 1), layer_scale=1e-5, num_classes=100)
    variables = jax.jit(model.init)(key, jnp.ones((1, 64, 64, 3)))
    for path, value in flatten_dict(variables["params"], sep="/").items():
        leaf, value = path.rpartition("/")[2], np.asarray(value)
        convolution = "conv" in path.split("/")[-2]
        if convolution:
            kernel = np.asarray(flatten_dict(variables["params"], sep="/")[path.rpartition("/")[0] + "/kernel"])
            limit = np.prod(kernel.shape[:3]) ** -0.5
            assert np.abs(value).max() <= limit * (1 + 1e-6), path
            assert np.isclose(value.std(), limit / 3**0.5, rtol=0.25), path
        elif leaf == "kernel":
            # A plain normal: the official bounds of ±2 lie 100 deviations out.
            assert np.isclose(value.std(), 0.02, rtol=0.1), path
            assert value.size < 10_000 or np.abs(value).max() > 0.06, path
        else:
            expected = {"scale": 1.0, "bias": 0.0, "gamma": 1e-5}[leaf.rstrip("1234")]
            np.testing.assert_allclose(value, expected, err_msg=path)
    for path, value in flatten_dict(variables["batch_stats"], sep="/").items():
        np.testing.assert_array_equal(value, 1.0 if path.endswith("var") else 0.0)


def test_epsilons():
    # They differ by less than the parity cases can tell apart where activations are of order one.
    seen = {}

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, BatchNorm | LayerNorm):
            seen["/".join(context.module.path)] = context.module.epsilon
        return next_function(*args, **kwargs)

    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    for last in (False, True):
        model = fv.create_model("testing", layer_norm_last=last)
        with nn.intercept_methods(record):
            jax.eval_shape(model.init, jax.random.key(0), images)
        assert seen.pop("norm") == (1e-6 if last else 1e-5)
    for path, epsilon in seen.items():
        expected = 1e-4 if path.startswith("stem") else 1e-6 if path.startswith("downsamples") else 1e-5
        assert epsilon == expected, path
    assert len(seen) == 2 + 2 * 2 + 3 + 3 * 4  # stem, conv blocks, downsamplers, HAT blocks


def test_batch_norm_of_groups(key):
    """Each two images are normalised by themselves; running statistics take the groups' mean."""
    x = jax.random.normal(key, (6, 4, 4, 3)) * jnp.arange(1.0, 7.0)[:, None, None, None]
    norm, grouped = BatchNorm(1e-5, jnp.float32), BatchNorm(1e-5, jnp.float32, group_size=2)
    variables = norm.init(key, x, train=False)

    def normalised(module, images):
        return module.apply(variables, images, train=True, mutable=["batch_stats"])

    y, updated = normalised(grouped, x)
    apart = [normalised(norm, x[i : i + 2]) for i in (0, 2, 4)]
    np.testing.assert_allclose(y, jnp.concatenate([one for one, _ in apart]), rtol=1e-5, atol=1e-6)
    for name in ("mean", "var"):
        mean = np.mean([stats["batch_stats"][name] for _, stats in apart], axis=0)
        np.testing.assert_allclose(updated["batch_stats"][name], mean, rtol=1e-5, atol=1e-7)
    evaluated = [module.apply(variables, x[:5], train=False) for module in (grouped, norm)]
    np.testing.assert_array_equal(*evaluated)
    with pytest.raises(ValueError, match="bn_group_size=2: expected a divisor of the batch of 5 images"):
        normalised(grouped, x[:5])


@pytest.mark.parametrize("hat", [True, False])
def test_position_terms_of_all_blocks_at_once(key, monkeypatch, hat):
    """They are those that each block's own networks give, and so are the networks' gradients."""
    stage = HATStage(width=8, heads=2, window=3, ct_size=2, mlp_ratio=1.0, qkv_bias=True, layer_scale=None, hat=hat,
                     do_propagation=True, drop_path_rates=(0.0, 0.0, 0.0), drop_rate=0.0, attn_drop_rate=0.0,
                     dtype="float32")
    x = jax.random.normal(key, (2, 5, 9, 8))
    variables = stage.init(key, x, False)
    variables = {"params": jax.tree.map(  # of their own for each block, and large enough to be seen
        lambda p: 0.5 * jax.random.normal(jax.random.key(p.size), p.shape), variables["params"])}
    variables["params"] |= {f"blocks_{i}": jax.tree.map(lambda p, i=i: p * (1 + i), variables["params"][f"blocks_{i}"])
                            for i in range(3)}

    def outputs():
        return stage.apply(variables, x, False), jax.grad(lambda v: (stage.apply(v, x, False) ** 2).sum())(variables)

    terms = []
    real = HATStage.position_terms
    monkeypatch.setattr(HATStage, "position_terms", lambda self, *args: terms.append(real(self, *args)) or terms[-1])
    at_once = outputs()
    assert [sorted(block) for block in terms[0]] == 3 * [
        ["attention", *(["carrier_attention", "carrier_position"] if hat else []), "position"]]
    monkeypatch.setattr(HATStage, "position_terms", lambda *_: [{}, {}, {}])
    for found, expected in zip(jax.tree.leaves(at_once), jax.tree.leaves(outputs()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("block", "path"), [
    ("stages_2/blocks_1", "position"),
    ("stages_2/blocks_1", "position/mlp/out"),
    ("stages_2/blocks_0", "position/mlp/hidden/bias"),
    ("stages_2/blocks_1", "attention/position_bias"),
    ("stages_3/blocks_0", "attention/position_bias/mlp/hidden/bias"),
])
def test_position_parameters_that_are_missing_are_named(key, block, path):
    model, x = fv.create_model("testing"), jnp.zeros((1, 32, 32, 3))
    variables = model.init(key, x)
    *above, name = [*block.split("/"), *path.split("/")]
    del functools.reduce(dict.get, above, variables["params"])[name]
    whole = path if "mlp" in path else f"{path}/mlp/hidden"
    with pytest.raises(ScopeParamNotFoundError, match=rf'in scope "/{block}/{whole.removesuffix("/bias")}"'):
        model.apply(variables, x)


@pytest.mark.parametrize("blocks", [[1], [0, 1]])
def test_position_parameters_of_another_shape_are_named(key, blocks):
    model, x = fv.create_model("testing"), jnp.zeros((1, 32, 32, 3))
    variables = model.init(key, x)
    for i in blocks:
        variables["params"]["stages_2"][f"blocks_{i}"]["attention"]["position_bias"]["mlp"]["out"]["kernel"] = (
            jnp.ones((512, 16)))
    with pytest.raises(ScopeParamShapeError, match=(
            rf'"kernel" in "/stages_2/blocks_{blocks[0]}/attention/position_bias/mlp/out".*\(512, 8\).*\(512, 16\)')):
        model.apply(variables, x)
