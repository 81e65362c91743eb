"""The train step and the configs: every knob reaches the program or the run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import common, digits
from fastervit_jax.data import sources
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import VARIANTS, ModelConfig
from fastervit_jax.train import evaluate, sharding
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.state import create_state
from fastervit_jax.train.step import make_train_step
from tests.train import runs

MESH = sharding.make_mesh(jax.devices()[:1])


def program(config) -> str:
    """The initialisation's and the train step's programs, as text."""
    model = FasterViT(ModelConfig(**config.model))
    optimizer, schedule = make_optimizer(config, steps_per_epoch=10)
    state = jax.eval_shape(lambda: create_state(model, optimizer, config, MESH))
    size = config.data.image_size
    batch = {"image": jax.ShapeDtypeStruct((config.batch_size, size, size, config.model.in_chans), "uint8"),
             "label": jax.ShapeDtypeStruct((config.batch_size,), "int32")}
    text = make_train_step(model, optimizer, schedule, config, MESH).lower(state, batch).as_text()
    return f"{jax.tree.map(lambda x: x.shape, state)} {text}"


KNOBS = {
    "seed": 1, "batch_size": 16, "epochs": 3, "learning_rate": 3e-3, "warmup_learning_rate": 1e-5,
    "final_learning_rate": 1e-4, "warmup_epochs": 2, "weight_decay": 0.1, "clip_norm": 1.0, "label_smoothing": 0.2,
    "data.image_size": 96, "data.mean": (0.4,), "data.std": (0.4,), "augment.zoom": 0.2, "augment.shift": 0.2,
    "model.dim": 16, "model.in_dim": 16, "model.depths": (1, 1, 2, 1), "model.num_heads": (2, 4, 4, 16),
    "model.window_size": (2, 2, 4, 2), "model.ct_size": 2, "model.mlp_ratio": 2.0,
    "model.hat": (False, False, False, False), "model.do_propagation": True, "model.layer_scale": 1e-5,
    "model.layer_scale_conv": 1e-5, "model.layer_norm_last": True, "model.qkv_bias": False, "model.in_chans": 3,
    "model.num_classes": 11, "model.drop_path_rate": 0.3, "model.drop_rate": 0.1, "model.attn_drop_rate": 0.1,
    "model.dtype": "bfloat16",
}  # fmt: skip
# These say what the loop does, not what the step computes; tests/train/test_loop.py and the names show them.
ELSEWHERE = {"name", "data.source", "log_every_steps", "eval_every_epochs", "checkpoint_every_epochs",
             "keep_checkpoints", "init_from", "init_from_ema"}  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    return program(runs.config())


def test_every_knob_is_listed():
    assert set(flatten_dict(runs.config().to_dict(), sep=".")) == set(KNOBS) | ELSEWHERE


@pytest.mark.parametrize("knob", KNOBS)
def test_knob_changes_the_program(knob, plain):
    config = runs.config(**{knob: KNOBS[knob]})
    if knob == "model.in_chans":
        config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    assert program(config) != plain


def test_the_same_config_gives_the_same_program(plain):
    assert program(runs.config()) == plain


def test_configs_are_locked_and_complete():
    config = digits.get_config()
    with pytest.raises(AttributeError, match="ct_sise"):
        config.model.ct_sise = 2
    with pytest.raises(TypeError):
        config.model.ct_size = "two"
    assert set(config.model) == {field.name for field in dataclasses.fields(ModelConfig)}


@pytest.mark.parametrize("name", VARIANTS)
def test_model_section_is_the_variant(name):
    assert ModelConfig(**common.model(name)) == VARIANTS[name].config


def test_digits_use_carrier_tokens(key):
    config = digits.get_config()
    model = ModelConfig(**config.model)
    side = config.data.image_size // 16
    assert model.hat[2]
    assert side // model.window_size[2] >= 2  # windows a side


def test_every_step_has_its_own_randomness(key):
    # No drop path, no learning: what differs between two steps is the augmentation.
    config = runs.config(**{"model.drop_path_rate": 0.0, "augment.shift": 0.3})
    model = FasterViT(ModelConfig(**config.model))
    optimizer, schedule = make_optimizer(config, steps_per_epoch=10)
    train_step = make_train_step(model, optimizer, schedule, config, MESH)
    image = sources.digits("train", 64)[0]
    batch = {name: jnp.asarray(np.stack([x] * 64)) for name, x in image.items()}
    losses = []
    for step in (0, 1, 1):
        state = create_state(model, optimizer, config, MESH)
        losses.append(float(train_step(state.replace(step=jnp.int32(step)), batch)[1]["loss"]))
    assert losses[1] == losses[2]
    assert abs(losses[0] / losses[1] - 1) > 1e-5


def test_evaluation_leaves_the_padding_out(key):
    config = runs.config()
    model = FasterViT(ModelConfig(**config.model))
    optimizer, _ = make_optimizer(config, steps_per_epoch=10)
    variables = create_state(model, optimizer, config, MESH).variables
    eval_step = evaluate.make_eval_step(model, config, MESH)
    images = np.asarray(jax.random.randint(key, (4, 64, 64, 1), 0, 256)).astype(np.uint8)
    labels = np.arange(4, dtype=np.int32)
    logits = np.asarray(jax.jit(model.apply)(variables, (images.astype(np.float32) / 255 - 0.3) / 0.35), np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(4), labels]

    weights = np.float32([1, 1, 1, 0])
    batches = [{"image": jnp.asarray(images[i]), "label": jnp.asarray(labels[i]), "weight": jnp.asarray(weights[i])}
               for i in (slice(0, 2), slice(2, 4))]
    result = evaluate.evaluate(eval_step, variables, batches)
    assert result["images"] == 3
    np.testing.assert_allclose(result["loss"], losses[:3].mean(), rtol=1e-5)
    np.testing.assert_allclose(result["acc1"], 100 * (logits.argmax(1) == labels)[:3].mean(), rtol=1e-6)
