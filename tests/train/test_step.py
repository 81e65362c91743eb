"""The train step: every knob reaches the program or the run."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import digits
from fastervit_jax.data import sources
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.train import evaluate, sharding
from fastervit_jax.train.state import abstract_state, make_model
from tests.train import runs

MESH = sharding.make_mesh(jax.devices()[:1])


def program(config, unlike: str = "") -> str:
    """The shapes of the state, and the train step's program, as text; the shapes alone, where `unlike` has others."""
    _, state, train_step = runs.parts(config, MESH, abstract_state)
    shapes = str(jax.tree.map(lambda x: x.shape, state))
    if unlike and not unlike.startswith(shapes):
        return shapes
    size = config.data.image_size
    batch = {"image": jax.ShapeDtypeStruct((config.batch_size, size, size, config.model.in_chans), "uint8"),
             "label": jax.ShapeDtypeStruct((config.batch_size,), "int32"),
             "weight": jax.ShapeDtypeStruct((config.batch_size,), "float32")}
    return f"{shapes} {train_step.lower(state, batch).as_text()}"


KNOBS = {
    "seed": 1, "batch_size": 16, "epochs": 3, "learning_rate": 3e-3, "warmup_learning_rate": 1e-5,
    "final_learning_rate": 1e-4, "warmup_epochs": 2, "weight_decay": 0.1, "clip_norm": 1.0, "label_smoothing": 0.2,
    "data.image_size": 96, "data.mean": (0.4,), "data.std": (0.4,), "augment.zoom": 0.2, "augment.shift": 0.2,
    "augment.flip": 0.5, "augment.erase_prob": 0.1, "augment.mixup": 0.1, "augment.cutmix": 0.1,
    "model.dim": 16, "model.in_dim": 16, "model.depths": (1, 1, 2, 1), "model.num_heads": (2, 4, 4, 16),
    "model.window_size": (2, 2, 4, 2), "model.ct_size": 2, "model.mlp_ratio": 2.0,
    "model.hat": (False, False, False, False), "model.do_propagation": True, "model.layer_scale": 1e-5,
    "model.layer_scale_conv": 1e-5, "model.layer_norm_last": True, "model.qkv_bias": False, "model.in_chans": 3,
    "model.num_classes": 11, "model.drop_path_rate": 0.3, "model.drop_rate": 0.1, "model.attn_drop_rate": 0.1,
    "model.dtype": "bfloat16", "optimizer": "lamb", "beta1": 0.8, "beta2": 0.99, "eps": 1e-6,
    "learning_rate_batch": 32, "layer_decay": 0.9, "loss": "binary_cross_entropy", "ema_decay": 0.9, "accumulate": 2,
    "remat": (False, False, True, False), "bn_group_size": 8, "max_bad_steps": 5,
}  # fmt: skip
# These change what ImageNet's recipe does; digits' has what they belong to switched off.
IMAGENET_KNOBS = {
    "augment.color_jitter": 0.4, "augment.rand_augment_ops": 1, "augment.rand_augment_prob": 0.6,
    "augment.rand_augment_magnitude": 8.0, "augment.rand_augment_std": 0.4, "augment.erase_mode": "const",
    "augment.erase_area": (0.1, 0.2), "augment.erase_aspect": (0.5, 2.0), "augment.mix_prob": 0.5,
    "augment.cutmix_switch": 0.3, "augment.mix_group": 2, "mesa": 0.3, "mesa_start_ratio": 0.5, "cooldown_epochs": 2,
}  # fmt: skip
# These say what the loop and the feed do, not what the step computes; test_loop.py, tests/data and the names show them.
ELSEWHERE = {
    "name", "data.source", "data.dir", "data.train_split", "data.eval_split", "data.workers", "data.timeout",
    "data.max_bad_fraction", "data.crop_scale", "data.crop_ratio", "data.interpolation", "data.eval_crop",
    "data.eval_mode", "log_every_steps", "eval_every_epochs", "checkpoint_every_epochs", "keep_checkpoints",
    "init_from", "init_from_ema", "keep_best", "stuck_after", "profile", "wandb", "mesh.data", "mesh.fsdp",
    "kernels",
}  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    return program(runs.config())


@pytest.fixture(scope="module")
def plain_imagenet():
    return program(runs.imagenet_config())


def test_every_knob_is_listed():
    for config in (runs.config(), runs.imagenet_config()):
        assert set(flatten_dict(config.to_dict(), sep=".")) == set(KNOBS) | set(IMAGENET_KNOBS) | ELSEWHERE


@pytest.mark.parametrize("knob", KNOBS)
def test_knob_changes_the_program(knob, plain):
    config = runs.config(**{knob: KNOBS[knob]})
    if knob in ("augment.mixup", "augment.cutmix"):
        config.augment.mix_group = 2
    if knob == "model.in_chans":
        config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    assert program(config, plain) != plain


@pytest.mark.parametrize("knob", IMAGENET_KNOBS)
def test_knob_changes_the_program_for_imagenet(knob, plain_imagenet):
    assert program(runs.imagenet_config(**{knob: IMAGENET_KNOBS[knob]}), plain_imagenet) != plain_imagenet


def test_the_same_config_gives_the_same_program(plain):
    assert program(runs.config()) == plain


def test_kernels_reach_every_part_of_the_model():
    seen = set()

    def record(next_function, args, kwargs, context):
        if hasattr(context.module, "kernels"):
            seen.add((type(context.module).__name__, context.module.kernels))
        return next_function(*args, **kwargs)

    model = make_model(runs.config(kernels="xla"))
    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 1)))
    names = {"Attention", "BatchNorm", "CarrierInit", "Conv3x3", "ConvBlock", "ConvStage", "Downsample", "FasterViT",
             "HATBlock", "HATStage", "LayerNorm", "MLP", "Stem"}
    assert seen == {(name, "xla") for name in names}


def test_digits_use_carrier_tokens(key):
    config = digits.get_config()
    model = ModelConfig(**config.model)
    side = config.data.image_size // 16
    assert model.hat[2]
    assert side // model.window_size[2] >= 2  # windows a side


# Tests that compile a step share these two, as far as they can.
PLAIN = {"model.drop_path_rate": 0.0, "augment.zoom": 0.0, "augment.shift": 0.0, "clip_norm": 1e9}
AVERAGED = {"model.drop_path_rate": 0.0, "augment.shift": 0.3, "ema_decay": 0.75, "max_bad_steps": 2}


@functools.cache
def _made(**changes):
    return runs.parts(runs.config(**changes), MESH)


def made(**changes):
    """The initial state, and the train step, which a test may give both that and its batches away to."""
    (_, state, train_step), over_batch = _made(**changes), sharding.over_batch(MESH)
    return (jax.tree.map(jnp.copy, state),
            lambda state, batch: train_step(state, jax.tree.map(jnp.copy, jax.device_put(batch, over_batch))))


def test_every_step_has_its_own_randomness(key):
    # No drop path, no learning: what differs between two steps is the augmentation.
    image = sources.digits("train", 64)[0]
    batch = {name: jnp.asarray(np.stack([x] * 64)) for name, x in image.items()} | {"weight": jnp.ones(64)}
    losses = []
    for step in (0, 1, 1):
        state, train_step = made(**AVERAGED)
        losses.append(float(train_step(state.replace(step=jnp.int32(step)), batch)[1]["loss"]))
    assert losses[1] == losses[2]
    assert abs(losses[0] / losses[1] - 1) > 1e-5


def test_images_of_no_weight_do_not_count(key):
    """Neither their labels nor, with mixing, their pixels in others' loss: the gradient is that of the others alone."""
    images = np.asarray(jax.random.randint(key, (64, 64, 64, 1), 0, 256)).astype(np.uint8)
    batch = {"image": images, "label": np.arange(64, dtype=np.int32) % 10, "weight": np.ones(64, np.float32)}
    batch["weight"][[3, 7]] = 0

    def metrics(**changes):
        state, train_step = made(**PLAIN)
        return jax.device_get(train_step(state, {**batch, **changes})[1])

    first = metrics()
    other_labels = batch["label"].copy()
    other_labels[[3, 7]] = 9
    second = metrics(label=other_labels)
    assert first == second
    assert first["bad_images"] == 2
    third = metrics(weight=np.ones(64, np.float32))
    assert third["bad_images"] == 0
    assert abs(third["loss"] / first["loss"] - 1) > 1e-6


@pytest.fixture
def evaluated(monkeypatch):
    """What the eval step makes of given logits."""
    monkeypatch.setattr(FasterViT, "apply", lambda model, variables, images: variables["logits"])
    return evaluate_logits


def step_metrics(images, labels, weights, **changes):
    """Of one step from the initial weights, without drop path or augmentation but for the changes."""
    state, train_step = made(**PLAIN, **changes)
    return jax.device_get(train_step(state, {"image": images, "label": labels, "weight": weights})[1])


def test_the_loss_is_the_mean_of_the_images_that_count():
    """Of two images, 32 times each: one of each less does not change the mean."""
    source = sources.digits("train", 64)
    images, labels = (np.stack([source[i][name] for i in (0, 1)] * 32) for name in ("image", "label"))
    weights = np.ones(64, np.float32)
    whole = step_metrics(images, labels, weights)
    weights[[4, 9]] = 0
    part = step_metrics(images, labels, weights)
    for name in ("loss", "accuracy", "gradient_norm"):
        np.testing.assert_allclose(part[name], whole[name], rtol=1e-4, err_msg=name)


def test_a_bad_image_takes_its_partner_with_it():
    source = sources.digits("train", 64)
    images, labels = (np.stack([source[i][name] for i in range(64)]) for name in ("image", "label"))
    weights = np.ones(64, np.float32)
    weights[[0, 22]] = 0
    mixing = {"augment.mixup": 0.8, "augment.mix_group": 4}
    first = step_metrics(images, labels, weights, **mixing)["loss"]
    for changed, counts in (((0, 3, 21, 22), False), ((1,), True)):  # in groups of four, 0 is mixed with 3, 22 with 21
        others = labels.copy()
        others[list(changed)] = (others[list(changed)] + 1) % 10
        second = step_metrics(images, others, weights, **mixing)["loss"]
        assert (abs(second / first - 1) > 1e-5) == counts


def test_averages_follow_each_update():
    state, train_step = made(**AVERAGED)
    before = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, before.ema, before.variables)
    state, _ = train_step(state, runs.batch_of_digits(0, 64, MESH))
    after = jax.device_get(state)
    moved = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before.ema, after.variables)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), after.ema, moved)
    assert np.abs(after.params["head"]["kernel"] - before.params["head"]["kernel"]).max() > 1e-7


def test_an_update_that_is_not_finite_is_skipped_as_a_whole():
    """Statistics, averages and the optimiser's count, too; after max_bad_steps in a row nothing moves any more."""
    state, train_step = made(**AVERAGED)
    good = runs.batch_of_digits(0, 64, MESH)
    bad = {**good, "weight": good["weight"].at[3].set(jnp.nan)}

    def after(state, batch):
        state, metrics = train_step(state, batch)
        return state, jax.device_get((state, metrics))

    state, (first, metrics) = after(state, good)
    assert (metrics["bad_steps"], metrics["bad_steps_in_row"]) == (0, 0)
    state, (second, metrics) = after(state, bad)
    assert (metrics["bad_steps"], metrics["bad_steps_in_row"]) == (1, 1)
    assert (second.step, second.bad_steps) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, second, first.replace(step=second.step, bad_steps=second.bad_steps))
    state, (third, metrics) = after(state, good)
    assert (third.step, third.bad_steps, metrics["bad_steps"]) == (3, 0, 0)
    assert not np.array_equal(third.params["head"]["kernel"], second.params["head"]["kernel"])
    for count in (1, 2):
        state, (last, _) = after(state, bad)
        assert last.bad_steps == count
    state, (held, metrics) = after(state, good)
    assert (metrics["bad_steps"], metrics["bad_steps_in_row"]) == (0, 2)
    jax.tree.map(np.testing.assert_array_equal, held, last)


def test_parts_of_a_batch_make_the_whole():
    """Two parts are two groups for batch norms: images 0, 2, 4, … and 1, 3, 5, …"""
    batch = runs.batch_of_digits(0, 64, MESH)
    order = np.r_[0:64:2, 1:64:2]
    grouped = {name: x[order] for name, x in batch.items()}
    results = []
    for given, changes in ((batch, {"accumulate": 2}), (grouped, {"bn_group_size": 32}),
                           (grouped, {"bn_group_size": 32, "remat": (True, True, True, True)}), (batch, {})):
        state, train_step = made(**PLAIN, **changes)
        state, metrics = jax.device_get(train_step(state, given))
        results.append((state.opt_state, [metrics[name] for name in ("loss", "accuracy", "gradient_norm")]))
    (parts, metrics), (groups, expected), (again, recomputed), (_, whole) = results
    np.testing.assert_allclose(metrics, expected, rtol=1e-5)
    np.testing.assert_allclose(recomputed, expected, rtol=1e-5)
    assert abs(whole[0] / expected[0] - 1) > 1e-5  # the groups do make a difference
    for moments in (parts, again):  # after one step, Adam's averages are the gradients
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), moments, groups)


@pytest.mark.parametrize(("loss", "expected"), [
    ("cross_entropy", 2.3), ("binary_cross_entropy", 0.7)])
def test_the_loss_that_the_config_names(loss, expected):
    """At first all of ten classes are as likely: log 10 for one distribution over them, log 2 for ten yes or no."""
    state, train_step = made(**PLAIN, **({} if loss == "cross_entropy" else {"loss": loss}))
    assert float(train_step(state, runs.batch_of_digits(0, 64, MESH))[1]["loss"]) == pytest.approx(expected, rel=0.1)


def evaluate_logits(logits, labels, weights, classes):
    model = FasterViT(ModelConfig(dim=8, in_dim=8, depths=(1, 1, 1, 1), num_classes=logits.shape[1]))
    eval_step = evaluate.make_eval_step(model, runs.config(), MESH)
    batch = {"image": jnp.zeros((len(logits), 1, 1, 1), jnp.uint8), "label": jnp.asarray(labels),
             "weight": jnp.asarray(weights, jnp.float32)}
    return jax.device_get(eval_step({"logits": jnp.asarray(logits, jnp.float32)}, batch, jnp.asarray(classes)))


def test_only_the_datasets_classes_are_predicted(evaluated):
    logits = np.array([[5.0, 1, 2, 0], [0, 1, 2, 9]])
    masked = evaluated(logits, np.array([2, 1], np.int32), [1, 1], [False, True, True, False])
    assert (masked["top1"], masked["images"]) == (1, 2)
    np.testing.assert_allclose(masked["loss"], np.log1p(np.exp(-1)) + np.log1p(np.exp(1)), rtol=1e-5)
    everything = evaluated(logits, np.array([2, 1], np.int32), [1, 1], [True] * 4)
    assert everything["top1"] == 0


def test_any_of_several_labels_is_right(evaluated):
    """The second image's best class is one of its labels, the third has none, the fourth does not count."""
    logits = np.array([[6.0, 5, 4, 3, 2, 1, 0], [6, 5, 4, 3, 2, 1, 0], [6, 5, 4, 3, 2, 1, 0], [6, 5, 4, 3, 2, 1, 0]])
    labels = np.zeros((4, 7), bool)
    labels[0, [3, 6]] = labels[1, [0, 6]] = labels[3, 0] = True
    result = evaluated(logits, labels, [1, 1, 1, 0], [True] * 7)
    assert (result["top1"], result["top5"], result["images"]) == (1, 2, 2)
    log_partition = np.log(np.exp(logits[0]).sum())
    np.testing.assert_allclose(result["loss"], 2 * log_partition - (3 + 0) / 2 - (6 + 0) / 2, rtol=1e-5)
    labels[0] = False
    labels[0, [5, 6]] = True
    assert evaluated(logits, labels, [1, 1, 1, 0], [True] * 7)["top5"] == 1


def test_evaluation_leaves_the_padding_out(key):
    config = runs.config(batch_size=2)
    model, state, _ = runs.parts(config, MESH)
    variables = state.variables
    eval_step = evaluate.make_eval_step(model, config, MESH)
    images = np.asarray(jax.random.randint(key, (3, 64, 64, 1), 0, 256)).astype(np.uint8)
    labels = np.arange(3, dtype=np.int32)
    logits = np.asarray(jax.jit(model.apply)(variables, (images.astype(np.float32) / 255 - 0.3) / 0.35), np.float64)
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(3), labels]

    result = evaluate.evaluate(eval_step, variables, sources.ArraySource(images, labels, 10), config, MESH)
    assert result["images"] == 3
    np.testing.assert_allclose(result["loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(result["acc1"], 100 * (logits.argmax(1) == labels).mean(), rtol=1e-6)
