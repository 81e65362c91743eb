"""The recipes: complete and locked with every argument, the published numbers, and small when asked."""

import dataclasses
import importlib
import sys

import jax
import numpy as np
import pytest
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from configs import common, digits, finetune, imagenet, imagenet21k
from fastervit_jax.model.variants import VARIANTS, ModelConfig, get_variant, list_models
from fastervit_jax.train import loop
from fastervit_jax.train.check import check
from tests.train import runs

RECIPES = {"imagenet": imagenet, "imagenet21k": imagenet21k, "finetune": finetune}
PUBLISHED = list_models("faster_vit_*")
ARGUMENTS = [("digits", ""), ("digits", "smoke"), ("cues", ""), ("cues", "smoke")] + [
    (recipe, name + small) for recipe in RECIPES for name in ("", *PUBLISHED) for small in ("", ",smoke")
    if name or not small]  # fmt: skip
# What every recipe says itself, beside the keys that configs/common.py declares.
OWN = {"name", "batch_size", "epochs", "learning_rate", "warmup_learning_rate", "final_learning_rate", "warmup_epochs",
       "weight_decay"}  # fmt: skip

# Variant: optimiser, weight decay, MESA, its start, warm-up epochs, drop path; from the official config files.
OFFICIAL = {
    "faster_vit_0_224": ("adamw", 0.05, 0.1, 0.25, 20, 0.2),
    "faster_vit_1_224": ("adamw", 0.05, 0.5, 0.25, 20, 0.2),
    "faster_vit_2_224": ("adamw", 0.05, 1.0, 0.25, 20, 0.2),
    "faster_vit_3_224": ("adamw", 0.075, 1.0, 0.3, 35, 0.3),
    "faster_vit_4_224": ("lamb", 0.12, 5.0, 0.25, 20, 0.3),
    "faster_vit_5_224": ("lamb", 0.12, 5.0, 0.25, 20, 0.3),
    "faster_vit_6_224": ("lamb", 0.15, 5.0, 0.25, 20, 0.5),
    "faster_vit_4_21k_224": ("lamb", 0.12, 5.0, 0.25, 20, 0.42),
    "faster_vit_4_21k_384": ("lamb", 0.12, 5.0, 0.25, 20, 0.42),
    "faster_vit_4_21k_512": ("lamb", 0.12, 5.0, 0.25, 20, 0.42),
    "faster_vit_4_21k_768": ("lamb", 0.12, 5.0, 0.25, 20, 0.42),
    "testing": ("adamw", 0.05, 0.1, 0.25, 20, 0.2),
}
# The same for all of them.
IMAGENET = {
    "seed": 31, "init_from": "", "batch_size": 4096, "learning_rate_batch": 4096, "epochs": 300, "cooldown_epochs": 10,
    "learning_rate": 5e-3, "warmup_learning_rate": 1e-6, "final_learning_rate": 5e-6, "beta1": 0.9, "beta2": 0.999,
    "eps": 1e-8, "clip_norm": 5.0, "layer_decay": 1.0, "loss": "cross_entropy", "label_smoothing": 0.1,
    "ema_decay": 0.9998, "bn_group_size": 128, "accumulate": 1, "data.source": "imagenet2012",
    "data.mean": (0.485, 0.456, 0.406), "data.std": (0.229, 0.224, 0.225), "data.crop_scale": (0.08, 1.0),
    "data.crop_ratio": (3 / 4, 4 / 3), "data.interpolation": "random", "augment.flip": 0.5, "augment.zoom": 0.0,
    "augment.shift": 0.0, "augment.color_jitter": 0.0, "augment.rand_augment_ops": 2, "augment.rand_augment_prob": 0.5,
    "augment.rand_augment_magnitude": 9.0, "augment.rand_augment_std": 0.5, "augment.erase_prob": 0.25,
    "augment.erase_mode": "pixel", "augment.erase_area": (0.02, 1 / 3), "augment.erase_aspect": (0.3, 3.3),
    "augment.mixup": 0.8, "augment.cutmix": 1.0, "augment.mix_prob": 1.0, "augment.cutmix_switch": 0.5,
    "augment.mix_group": 128, "model.num_classes": 1000,
}  # fmt: skip


def flat(config) -> dict:
    return flatten_dict(config.to_dict(), sep=".")


def load(recipe, argument):
    """As the command line does."""
    return importlib.import_module(f"configs.{recipe}").get_config(*[argument] if argument else [])


@pytest.mark.parametrize(("recipe", "argument"), ARGUMENTS)
def test_every_config_is_complete_and_can_run(recipe, argument):
    config = load(recipe, argument)
    assert set(config) == OWN | set(common.base()) | {"data", "augment", "model"}
    assert set(config.mesh) == {"data", "fsdp"}
    assert set(config.data) == set(common.data("digits", 64, (0.5,), (0.5,)))
    assert set(config.augment) == set(common.augment())
    assert set(config.model) == {field.name for field in dataclasses.fields(ModelConfig)}
    for section in (config, config.mesh, config.data, config.augment, config.model):
        with pytest.raises(AttributeError, match="ct_sise"):
            section.ct_sise = 2
    with pytest.raises(TypeError):
        config.model.ct_size = "two"
    check(config)
    if recipe in RECIPES:
        name = argument.split(",")[0] or {"imagenet": "faster_vit_0_224", "finetune": "faster_vit_4_21k_384",
                                          "imagenet21k": "faster_vit_4_21k_224"}[recipe]
        assert config.name == f"{recipe}_{name}{'_smoke' if 'smoke' in argument else ''}"


@pytest.mark.parametrize("name", VARIANTS)
def test_model_section_is_the_variant(name):
    assert ModelConfig(**common.model(name)) == VARIANTS[name].config


@pytest.mark.parametrize("name", VARIANTS)
def test_imagenet_config_of_each_variant(name):
    config, variant = imagenet.get_config(name), VARIANTS[name]
    assert ModelConfig(**config.model) == dataclasses.replace(variant.config, dtype="bfloat16")
    assert (config.data.image_size, config.data.eval_crop, config.data.eval_mode) == (
        variant.resolution, variant.crop_pct, variant.crop_mode)
    assert (config.optimizer, config.weight_decay, config.mesa, config.mesa_start_ratio, config.warmup_epochs,
            config.model.drop_path_rate) == OFFICIAL[name]
    found = flat(config)
    expected = {**IMAGENET, "model.num_classes": variant.config.num_classes}
    assert {key: found[key] for key in expected} == expected


def test_other_names_of_a_variant_mean_its_recipe():
    changed = {"name": "imagenet_faster_vit_3_any_res"}
    assert flat(imagenet.get_config("faster_vit_3_any_res")) == flat(imagenet.get_config("faster_vit_3_224")) | changed


def test_pretraining_with_21k_classes_is_imagenets_recipe_but_for_a_few_numbers():
    changed = {"name": "imagenet21k_faster_vit_4_21k_224", "data.source": "folder", "model.num_classes": 21841,
               "epochs": 90, "warmup_epochs": 5, "cooldown_epochs": 0, "mesa": 0.0}
    assert flat(imagenet21k.get_config()) == flat(imagenet.get_config("faster_vit_4_21k_224")) | changed


@pytest.mark.parametrize("name", PUBLISHED)
def test_fine_tuning_is_gentle(name):
    config, variant = finetune.get_config(name), get_variant(name)
    assert ModelConfig(**config.model) == dataclasses.replace(variant.config, dtype="bfloat16")
    assert (config.data.image_size, config.data.eval_crop, config.data.eval_mode) == (
        variant.resolution, variant.crop_pct, variant.crop_mode)
    found, expected = flat(config), {
        "init_from": "", "init_from_ema": False, "optimizer": "adamw", "batch_size": 512, "learning_rate_batch": 512,
        "epochs": 30, "cooldown_epochs": 0, "warmup_epochs": 0, "learning_rate": 5e-5, "final_learning_rate": 1e-6,
        "weight_decay": 1e-8, "layer_decay": 0.9, "ema_decay": 0.9998, "mesa": 0.0, "bn_group_size": 0,
        "augment.mixup": 0.0, "augment.cutmix": 0.0, "augment.mix_group": 1, "augment.rand_augment_ops": 2,
        "augment.erase_prob": 0.25, "augment.flip": 0.5, "data.source": "imagenet2012",
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_smoke_keeps_the_recipe(recipe, name):
    """Optimiser, loss, MESA, augmentation and the model's kind are untouched; what was off stays off."""
    whole, small = (flat(RECIPES[recipe].get_config(name + suffix)) for suffix in ("", ",smoke"))
    changed = {key for key in whole if whole[key] != small[key]}
    lowered = {"epochs", "warmup_epochs", "cooldown_epochs", "learning_rate_batch", "ema_decay", "bn_group_size",
               "augment.mix_group", "log_every_steps"}  # fmt: skip
    assert changed <= lowered | {
        "name", "batch_size", "data.source", "data.image_size", "data.workers", "model.num_classes", "model.dim",
        "model.in_dim", "model.depths", "model.window_size", "model.ct_size"}  # fmt: skip
    for key in lowered:
        assert small[key] <= whole[key]
        assert (small[key] == 0) == (whole[key] == 0)
    config = ModelConfig(**RECIPES[recipe].get_config(f"{name},smoke").model)
    assert config.hat == get_variant(name).config.hat
    assert config.windows(2, 64, 64) == (2, 2)
    assert config.depths == (1, 1, 1, 1)
    # Averages that are looked at must have forgotten the first weights.
    steps = 1442 // small["batch_size"] * (small["epochs"] + small["cooldown_epochs"])
    assert small["ema_decay"] ** steps < 0.01


@pytest.mark.parametrize(
    ("recipe", "argument", "message"),
    [
        (imagenet, "faster_vit_9,smok",
         r"unknown argument of the config: 'faster_vit_9' \(did you mean faster_vit_6_224 or faster_vit_5_224 or "
         r"faster_vit_4_224\?\), 'smok' \(did you mean smoke\?\); expected NAME, smoke, or NAME,smoke; NAME is one of "
         r"faster_vit_0_224, "),
        (finetune, "21k", r"'21k'; expected NAME"),
        (imagenet21k, "faster_vit_4_21k_244", r"'faster_vit_4_21k_244' \(did you mean faster_vit_4_21k_224 or "),
        (imagenet, "faster_vit_0_224,", r"''; expected NAME"),
        (imagenet, "faster_vit_0_224,faster_vit_1_224", r"too many arguments of the config in 'faster_vit_0_224,f"),
        (imagenet, "smoke,smoke", "too many arguments"),
        (digits, "faster_vit_0_224", r"'faster_vit_0_224'; expected smoke, or nothing$"),
        (finetune, "testing", r"'testing'; expected NAME"),
    ],
)  # fmt: skip
def test_unknown_arguments(recipe, argument, message):
    with pytest.raises(ValueError, match=message):
        recipe.get_config(argument)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of config_flags itself
def test_arguments_and_changes_on_the_command_line(monkeypatch):
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    monkeypatch.setattr("sys.argv", ["train.py", "--config=configs/imagenet.py:smoke, faster_vit_3_224",
                                     "--config.mesa=2.0", "--config.mesh.fsdp=2"])
    values(sys.argv)
    config = holder.value
    assert (config.name, config.mesa, config.mesh.fsdp) == ("imagenet_faster_vit_3_224_smoke", 2.0, 2)
    assert config.model.layer_scale == VARIANTS["faster_vit_3_224"].config.layer_scale


def test_smoke_trains_as_the_recipe_says(tmp_path):
    """Variant 4's: LAMB, averages, MESA from a quarter on, warm-up, cosine, cool-down; in six steps."""
    config = imagenet.get_config("faster_vit_4_224,smoke")
    config.update_from_flattened_dict({
        "data.train_split": "train[:128]", "data.eval_split": "validation[:64]",
        "eval_every_epochs": 3, "checkpoint_every_epochs": 3, "log_every_steps": 1})
    result = loop.train(config, tmp_path, jax.devices()[:1])
    written = runs.lines(tmp_path)
    steps = [line for line in written if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert all(line["train/bad_steps"] == 0 for line in steps)
    # From a sixteenth of the recipe's rates, two steps of warm-up, two of a cosine whose clock runs from step 0 to 4.
    first, peak, last = (rate / 4 for rate in (1e-6, 5e-3, 5e-6))
    cosine = [last + (peak - last) * (1 + np.cos(np.pi * step / 4)) / 2 for step in (2, 3)]
    np.testing.assert_allclose([line["train/learning_rate"] for line in steps],
                               [first, (first + peak) / 2, *cosine, last, last], rtol=1e-5)
    assert steps[0]["train/mesa"] == 0
    assert all(line["train/mesa"] > 0 for line in steps[1:])
    assert abs(steps[0]["train/loss"] - np.log(10)) < 0.2
    assert [key for line in written for key in line if key.endswith("/acc1")] == ["eval/acc1", "eval_ema/acc1"]
    assert result["images"] == 64
    assert (tmp_path / "best.safetensors").exists()
