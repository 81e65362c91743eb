"""The table of variants: exact parameter counts, names, and what it says to bad input."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import fastervit_jax as fv
from fastervit_jax.model.variants import ANY_RES, VARIANTS

PARAMETERS = {
    "faster_vit_0_224": 31_404_840,
    "faster_vit_1_224": 53_366_696,
    "faster_vit_2_224": 75_923_816,
    "faster_vit_3_224": 159_547_944,
    "faster_vit_4_224": 365_555_712,
    "faster_vit_5_224": 957_520_552,
    "faster_vit_6_224": 1_360_328_872,
    "faster_vit_4_21k_224": 271_944_224,
    "faster_vit_4_21k_384": 271_944_224,
    "faster_vit_4_21k_512": 271_944_224,
    "faster_vit_4_21k_768": 271_944_224,
    "testing": 366_362,
}


def parameters(model: fv.FasterViT, height: int, width: int) -> dict:
    images = jax.ShapeDtypeStruct((1, height, width, model.config.in_chans), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count(name):
    assert name in PARAMETERS, f"{name} has no parameter count here: add it"
    resolution = VARIANTS[name].resolution
    shapes = parameters(fv.create_model(name), resolution, resolution)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes["params"])) == PARAMETERS[name]
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("size", [(32, 32), (64, 192), (224, 224)])
def test_parameters_do_not_depend_on_the_image(size):
    model = fv.create_model("testing", window_size=(7, 7, 7, 7))
    assert parameters(model, *size) == parameters(model, 448, 448)


def test_any_res_names_are_the_same_models():
    assert len(ANY_RES) == 11
    assert fv.create_model("faster_vit_3_any_res") == fv.create_model("faster_vit_3_224")
    assert fv.create_model("faster_vit_4_21k_384_any_res") == fv.create_model("faster_vit_4_21k_384")


def test_list_models():
    names = fv.list_models("faster_vit_*")
    assert names == sorted(names)
    assert len(names) == 22
    assert fv.list_models("faster_vit_4_21k_???") == [f"faster_vit_4_21k_{r}" for r in (224, 384, 512, 768)]
    assert fv.list_models("no_such_*") == []


def test_every_field_can_be_changed():
    model = fv.create_model("faster_vit_0_224", num_classes=10, ct_size=1, window_size=[7, 7, 14, 7], mlp_ratio=2)
    assert model.config.ct_size == 1
    assert model.config.window_size == (7, 7, 14, 7)
    shapes = parameters(model, 224, 224)["params"]
    assert shapes["head"]["kernel"].shape == (512, 10)
    assert shapes["stages_3"]["blocks_0"]["mlp"]["hidden"]["kernel"].shape == (512, 1024)


def test_unknown_model_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'fastervit_0_224': did you mean faster_vit_0_224"):
        fv.create_model("fastervit_0_224")


def test_how_variants_are_evaluated():
    # Resolution, share of the side that is kept, and crop mode, as published.
    assert {name: (v.resolution, v.crop_pct, v.crop_mode) for name, v in VARIANTS.items() if name != "testing"} == {
        "faster_vit_0_224": (224, 0.875, "center"),
        **{f"faster_vit_{n}_224": (224, 1.0, "center") for n in range(1, 7)},
        "faster_vit_4_21k_224": (224, 0.95, "squash"),
        "faster_vit_4_21k_384": (384, 1.0, "squash"),
        "faster_vit_4_21k_512": (512, 1.0, "squash"),
        "faster_vit_4_21k_768": (768, 0.93, "squash"),
    }


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")])
def test_dtype_by_name_or_type(dtype):
    assert fv.create_model("testing", dtype=dtype).config.dtype == "bfloat16"


def test_windows_of_an_image():
    config = fv.create_model("testing", window_size=(7, 7, 3, 2)).config
    assert config.windows(2, 96, 161) == (2, 4)  # maps of 6 × 11
    assert config.windows(3, 96, 161) == (2, 3)  # and of 3 × 6


def test_importing_brings_neither_torch_nor_tensorflow():
    code = "import sys, fastervit_jax; print(*{'torch', 'tensorflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


def test_unknown_keyword_names_the_known():
    with pytest.raises(TypeError, match=r"unknown keywords: carrier_count, windows; known are dim, .*window_size, ct_"):
        fv.create_model("faster_vit_0_224", windows=7, carrier_count=1)
    with pytest.raises(TypeError, match=r"unknown keywords: resolution; .*; every model takes images of any size"):
        fv.create_model("faster_vit_0_224", resolution=384)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ct_size": 8}, r"ct_size=8: .* stage 2's window of 7 tokens .*expected ct_size ≤ 7"),
        ({"window_size": (7, 7, 7, 2), "hat": (False, False, True, True), "ct_size": 3}, r"ct_size=3: .*stage 3"),
        ({"num_heads": (2, 4, 7, 16)}, r"7 heads do not divide stage 2's width of 256"),
        ({"depths": (1, 2, 3)}, r"depths=\(1, 2, 3\): expected a list or tuple of 4 values"),
        ({"window_size": 7}, r"window_size=7: expected a list or tuple of 4"),
        ({"num_heads": (2, 4, 8)}, r"num_heads=.*expected a list or tuple of 4"),
        ({"hat": (False, False)}, r"hat=.*expected a list or tuple of 4"),
        ({"hat": (True, False, True, False)}, r"stages 0 and 1 are convolutional"),
        ({"hat": (0, 0, 1, 0)}, r"hat=.*True or False"),
        ({"depths": (1, 1, 0, 1)}, r"depths=\(1, 1, 0, 1\): expected whole numbers of at least 1"),
        ({"dim": 64.0}, r"dim=64.0: expected a whole number"),
        ({"dim": "64"}, r"dim='64': expected a whole number"),
        ({"in_chans": 0}, r"in_chans=0"),
        ({"num_classes": -1}, r"num_classes=-1: .*0 for no head"),
        ({"mlp_ratio": 0}, r"mlp_ratio=0: expected a number of at least 1 / 256"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0: expected a rate in \[0, 1\)"),
        ({"layer_scale": "1e-5"}, r"layer_scale='1e-5': expected a number, or None"),
        ({"mlp_ratio": float("inf")}, r"mlp_ratio=inf"),
        ({"layer_scale": float("nan")}, r"layer_scale=nan: expected a number, or None"),
        ({"do_propagation": "False"}, r"do_propagation='False': expected True or False"),
        ({"layer_norm_last": 1}, r"layer_norm_last=1: expected True or False"),
        ({"qkv_bias": None}, r"qkv_bias=None: expected True or False"),
        ({"dtype": "int8"}, r"dtype='int8': expected 'float32', 'bfloat16' or 'float16'"),
        ({"dtype": None}, r"dtype=None: expected"),
        ({"dtype": "float64"}, r"dtype='float64': expected"),
    ],
)  # fmt: skip
def test_bad_values(changes, message):
    with pytest.raises(ValueError, match=message):
        fv.create_model("faster_vit_0_224", **changes)


@pytest.mark.parametrize(
    ("shape", "dtype", "error", "message"),
    [
        ((64, 64, 3), "float32", ValueError, r"rank 3: expected float \(batch, height, width, 3\); .*images\[None\]"),
        ((1, 1, 64, 64, 3), "float32", ValueError, r"rank 5"),
        ((2, 64, 64, 4), "float32", ValueError, r"4 channels: .*or create the model with in_chans=4"),
        ((2, 3, 64, 64), "float32", ValueError, r"channels last: images.transpose\(0, 2, 3, 1\)"),
        ((2, 64, 31, 3), "float32", ValueError, r"shape \(2, 64, 31, 3\): .*at least 32 pixels; resize or pad"),
        ((2, 64, 64, 3), "uint8", TypeError, r"dtype uint8: expected float"),
        ((2, 64, 64, 3), "int32", TypeError, r"dtype int32: expected float"),
    ],
)
def test_bad_images(shape, dtype, error, message, key):
    model = fv.create_model("testing")
    images = jax.ShapeDtypeStruct(shape, dtype)
    with pytest.raises(error, match=message):
        jax.eval_shape(model.init, key, images)
