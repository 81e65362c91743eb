"""The deployed model against the model: every variant at tiny width, and what the variants do not have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import fastervit_jax as fv
from fastervit_jax.model.variants import VARIANTS
from tests import official
from tests.golden import cases
from tests.model.test_contract import tiny

TINY = {**cases.TINY, "window_size": (4, 4, 4, 2)}
BOTH = {"hat": (False, False, True, True)}
CASES = {
    # name: changes of faster_vit_0_224, height and width of the images, image_size given to `deploy`
    "one_carrier": (
        {**BOTH, "ct_size": 1, "do_propagation": True, "in_chans": 1, "qkv_bias": False, "mlp_ratio": 2},
        (128, 128), 128),
    "three_carriers": ({"ct_size": 3, "layer_scale": 1.0, "num_classes": 0}, (128, 128), 128),
    "four_carriers": (
        {"ct_size": 4, "layer_scale": 1.0, "do_propagation": True, "layer_scale_conv": 1.0}, (128, 128), 128),
    "carriers_in_stage_3": (
        {"hat": (False, False, False, True), "do_propagation": True, "layer_norm_last": True}, (128, 128), 128),
    "no_carriers": ({"hat": (False,) * 4, "layer_scale": 1.0, "do_propagation": True}, (96, 96), 96),
    "channels_to_fill_up": ({"dim": 12, "in_dim": 10, "layer_scale_conv": 0.5}, (96, 96), 96),
    "wide": (BOTH, (64, 192), (64, 192)),
    "tall_and_padded": ({**BOTH, "layer_scale": 1.0, "do_propagation": True}, (210, 90), (210, 90)),
    "another_size": ({**BOTH, "layer_scale": 1.0}, (128, 192), (192, 128)),
    "stored_for_one_window": (BOTH, (128, 160), 64),
    "applied_to_one_window": ({**BOTH, "do_propagation": True}, (64, 64), 128),
    "layer_norm_no_head": ({"layer_norm_last": True, "num_classes": 0}, (64, 64), 64),
}


@functools.cache
def case(name: str, **changes):
    """The model, its variables, images, and the image_size of a case."""
    kwargs, size, image_size = CASES[name]
    model, variables = official.model_and_variables(cases.Case("faster_vit_0_224", {**TINY, **kwargs, **changes}, 0))
    return model, variables, cases.images(2, *size, model.config.in_chans), image_size


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, variables: dict, images: np.ndarray) -> tuple[jax.Array, ...]:
    """Logits and the four stages' maps, of a model as it is or deployed."""
    return model.apply(variables, images), *model.apply(variables, images, method="features")


def errors(ours: tuple[jax.Array, ...], theirs: tuple[np.ndarray, ...]) -> list[float]:
    found = [official.relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    print(" ".join(f"{error:.1e}" for error in found))
    return found


def reference(model: fv.FasterViT, variables: dict, images: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same in float64, by the NumPy reference."""
    logits, maps = official.reference_outputs(model, variables, images)
    return logits, *maps


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    model, variables, images = tiny(name, drop_path_rate=0.0)
    images = images[:1]
    ours = outputs(*fv.deploy(model, variables, images.shape[1:3]), images)
    assert max(errors(ours, reference(model, variables, images))) < 2e-6


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    model, variables, images, image_size = case(name)
    ours = outputs(*fv.deploy(model, variables, image_size), images)
    assert max(errors(ours, reference(model, variables, images))) < 2e-6


def test_which_cases_have_carriers():
    for name, stages in {"four_carriers": [2], "carriers_in_stage_3": [3], "wide": [2, 3], "tall_and_padded": [2, 3],
                         "stored_for_one_window": [2, 3], "applied_to_one_window": [], "no_carriers": []}.items():
        model, _, images, _ = case(name)
        grids = {stage: model.config.windows(stage, *images.shape[1:3]) for stage in (2, 3)}
        assert [stage for stage in (2, 3) if model.config.hat[stage] and grids[stage] != (1, 1)] == stages, name


def test_as_the_model_itself():
    model, variables, images, image_size = case("tall_and_padded")
    ours, theirs = outputs(*fv.deploy(model, variables, image_size), images), outputs(model, variables, images)
    assert [x.dtype for x in ours] == [x.dtype for x in theirs]
    assert max(errors(ours, theirs)) < 2e-6


def test_bfloat16():
    model, variables, images, image_size = case("tall_and_padded")
    fast_model, fast_variables = fv.deploy(model, variables, image_size, dtype="bfloat16")
    ours = outputs(fast_model, fast_variables, images)
    assert ours[0].dtype == jnp.float32
    assert {x.dtype for x in ours[1:]} == {jnp.dtype("bfloat16")}
    assert 1e-3 < max(errors(ours, reference(model, variables, images))) < 2e-2
    # The config's dtype is the default.
    default_model, default_variables = fv.deploy(case("tall_and_padded", dtype="bfloat16")[0], variables, image_size)
    assert default_model == fast_model
    jax.tree.map(np.testing.assert_array_equal, default_variables, fast_variables)


def test_what_is_left_is_products_and_tables():
    model, variables, _, image_size = case("tall_and_padded", layer_scale_conv=1.0)
    _, fast_variables = fv.deploy(model, variables, image_size, dtype="bfloat16")
    float32 = ("head", "carrier_networks", "carrier_tables", "norm")
    for path, array in flatten_dict(fast_variables["deployed"]).items():
        assert isinstance(array, jax.Array)
        table = path[-1] == "bias" and path[-2].startswith("blocks_")  # a window's position bias
        expected = jnp.float32 if table or set(path) & set(float32) else jnp.bfloat16
        assert array.dtype == expected, path
    paths = flatten_dict(fast_variables["deployed"], sep="/")
    assert {path for path in paths if "norm" in path} == {
        f"downsamples_{i}/norm/{leaf}" for i in range(3) for leaf in ("scale", "bias")}
    assert {path for path in paths if "gamma" in path} == {"stages_2/gamma1", "stages_3/gamma1"}
    assert not {path for path in paths if path.endswith(("/mean", "/var"))}
    rows, cols = model.config.windows(2, *image_size)
    assert paths["stages_2/blocks_0/carrier_tables/bias"].shape == (8, 4 * rows * cols, 4 * rows * cols)


def test_position_terms_are_computed_for_other_sizes_only():
    model, variables, images, _ = case("another_size")
    for image_size, computed in (((192, 128), True), ((128, 192), False), (None, True)):
        fast_model, fast_variables = fv.deploy(model, variables, image_size)
        assert ("logistic" in str(jax.make_jaxpr(fast_model.apply)(fast_variables, images))) is computed


def test_jit_with_method():
    model, variables, images, _ = case("no_carriers")
    fast_model, fast_variables = fv.deploy(model, variables)
    apply = jax.jit(fast_model.apply, static_argnames="method")
    logits, *maps = reference(model, variables, images)
    assert official.relative_error(apply(fast_variables, images.astype(np.float64)), logits) < 2e-6
    assert max(errors(apply(fast_variables, images, method="features"), maps)) < 2e-6


def test_refuses_what_does_not_fit():
    model, variables, images = tiny("testing")
    with pytest.raises(ValueError, match=r"collections \['params'\], expected \['batch_stats', 'params'\]"):
        fv.deploy(model, {"params": variables["params"]})
    with pytest.raises(ValueError, match=r"this model's:\n  params/head/bias: \(10,\), expected \(3,\)\n"):
        fv.deploy(fv.create_model("testing", **{**cases.TINY, "depths": (1, 1, 1, 1), "num_classes": 3}), variables)
    with pytest.raises(ValueError, match="image_size=31: expected a height and a width of at least 32"):
        fv.deploy(model, variables, 31)
    with pytest.raises(ValueError, match="dtype='int8': expected 'float32', 'bfloat16' or 'float16'"):
        fv.deploy(model, variables, dtype="int8")
    fast_model, fast_variables = fv.deploy(model, variables)
    with pytest.raises(ValueError, match=r"collections \['batch_stats', 'params'\], expected \['deployed'\]"):
        fast_model.apply(variables, images)
    with pytest.raises(ValueError, match="method='from_stage': expected None for the logits, or 'features'"):
        fast_model.apply(fast_variables, images, method="from_stage")
    with pytest.raises(ValueError, match="add a batch axis"):
        fast_model.apply(fast_variables, images[0])
    with pytest.raises(TypeError, match="images have dtype uint8"):
        fast_model.apply(fast_variables, images.astype(np.uint8))
