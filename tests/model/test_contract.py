"""What every registered variant promises, at tiny width."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import fastervit_jax as fv
from fastervit_jax.model.variants import VARIANTS
from tests import official
from tests.golden import cases

TINY = {"dim": 8, "in_dim": 8, "depths": (1, 1, 1, 1), "num_classes": 10}


@functools.cache
def tiny(name: str, **changes) -> tuple[fv.FasterViT, dict, np.ndarray]:
    """A narrow, shallow model of the variant, its variables (with the golden cases' arrays) and two images."""
    model, variables = official.model_and_variables(cases.Case(name, {**TINY, **changes}, 0))
    size = 128 if name == "testing" else 224  # at least 2 × 2 windows in every stage with carriers
    return model, variables, cases.images(2, size, size, 3)


@functools.cache
def evaluator(name: str, **changes):
    """Jitted (variables, images) → logits and features."""
    model = tiny(name, **changes)[0]
    return jax.jit(nn.apply(lambda model, images: (model(images), model.features(images)), model))


@functools.cache
def logits_and_features(name: str, **changes):
    _, variables, images = tiny(name, **changes)
    return evaluator(name, **changes)(variables, images)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name):
    model, variables, images = tiny(name)
    carriers = [path for path in flatten_dict(variables["params"], sep="/") if "carrier_attention" in path]
    assert bool(carriers) == any(VARIANTS[name].config.hat)

    def loss(params, batch_stats, images):
        # Evaluation mode: in training a bias before a batch norm has no effect and no gradient.
        return (model.apply({"params": params, "batch_stats": batch_stats}, images) ** 2).sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"], variables["batch_stats"], images[:1])
    for path, gradient in flatten_dict(gradients, sep="/").items():
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 0, path


@pytest.mark.parametrize("name", VARIANTS)
def test_eval_is_deterministic_and_train_is_not(name):
    _, variables, images = tiny(name)
    np.testing.assert_array_equal(evaluator(name)(variables, images)[0], logits_and_features(name)[0])
    model = tiny(name, drop_path_rate=0.5)[0]

    @jax.jit
    def train(variables, images, key):
        return model.apply(variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])[0]

    first, again, other = (train(variables, images, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert official.relative_error(other, first) > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
def test_features_have_the_promised_strides_and_widths(name):
    model, _, images = tiny(name)
    _, features = logits_and_features(name)
    assert len(features) == 4
    for x, stride, width in zip(features, model.feature_strides, model.feature_widths, strict=True):
        assert x.shape == (len(images), images.shape[1] // stride, images.shape[2] // stride, width)


@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_is_near_float32(name):
    logits, features = logits_and_features(name)
    model = tiny(name, dtype="bfloat16")[0]
    assert model.config.dtype == "bfloat16"
    half_logits, half_features = logits_and_features(name, dtype="bfloat16")
    assert logits.dtype == half_logits.dtype == jnp.float32
    assert {x.dtype for x in half_features} == {jnp.dtype("bfloat16")}
    errors = [official.relative_error(a, b) for a, b in zip((half_logits, *half_features), (logits, *features),
                                                            strict=True)]
    assert 1e-4 < max(errors) < 3e-2, errors


def test_compiles_once_a_shape():
    model, variables, images = tiny("testing")
    apply = jax.jit(model.apply)
    for size in (128, 96, 128, 96):
        apply(variables, images[:, :size])
        apply(variables, 2 * images[:, :size])
    assert apply._cache_size() == 2


def test_carriers_are_used_only_between_windows():
    # One window in stage 3 at 64 pixels: the carrier parameters exist and have no effect; at 128 they have one.
    model, variables, images = tiny("testing")
    params = flatten_dict(variables["params"], sep="/")
    stage3 = [path for path in params if path.startswith("stages_3") and "carrier" in path]
    assert stage3
    changed = {**variables, "params": jax.tree.map(lambda x: x, variables["params"])}
    changed["params"]["stages_3"]["carrier_init"] = jax.tree.map(
        jnp.zeros_like, variables["params"]["stages_3"]["carrier_init"])
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(variables, images[:, :64, :64]), apply(changed, images[:, :64, :64]))
    assert official.relative_error(apply(variables, images), apply(changed, images)) > 1e-3


def test_no_head_gives_pooled_features():
    model, variables, images = tiny("testing", num_classes=0)
    assert "head" not in variables["params"]
    pooled = jax.jit(model.apply)(variables, images)
    head = tiny("testing")[1]["params"]["head"]
    expected = logits_and_features("testing")[0]
    assert official.relative_error(pooled @ head["kernel"] + head["bias"][None], expected) < 1e-6


@pytest.mark.parametrize("in_chans", [1, 4])
def test_channels(in_chans, key):
    model = fv.create_model("testing", in_chans=in_chans)
    images = jnp.ones((1, 64, 64, in_chans))
    logits, variables = jax.eval_shape(model.init_with_output, key, images)
    assert variables["params"]["stem"]["conv1"]["kernel"].shape == (3, 3, in_chans, 8)
    assert logits.shape == (1, 10)


def test_numpy_and_half_precision_images():
    model, variables, images = tiny("testing")
    apply = jax.jit(model.apply)
    expected = apply(variables, jnp.asarray(images))
    np.testing.assert_array_equal(apply(variables, images.astype(np.float64)), expected)
    assert official.relative_error(apply(variables, images.astype(np.float16)), expected) < 1e-2
