"""Optimisers, schedule and losses against timm's and PyTorch's own in float64, which timm_recipe_oracle.py runs.

It needs the Python that FASTERVIT_ORACLE names. Ours compute in float32, and agree to 1e-6.
"""

import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import common
from fastervit_jax.data import augment
from fastervit_jax.train import losses, schedule
from fastervit_jax.train.optimizer import clip_by_global_norm, make_optimizer

pytestmark = pytest.mark.oracle
SCRIPT = pathlib.Path(__file__).with_name("timm_recipe_oracle.py")
SHAPES = {  # by PyTorch's names; neither optimiser sees layouts
    "conv.weight": (4, 3, 3, 3), "conv.bias": (4,), "norm.weight": (4,), "norm.bias": (4,), "linear.weight": (5, 4),
    "linear.bias": (5,), "zero.weight": (2, 2), "gamma": (5,),
}  # fmt: skip
STEPS = 30
BATCH, CLASSES, GROUP, SMOOTHING = 12, 1000, 4, 0.1
OPTIMIZERS = {
    "adamw": ("adamw", 0.05), "lamb": ("lamb", 0.12), "lamb_without_decay": ("lamb", 0.0),
}  # fmt: skip
MIX = ConfigDict({"mixup": 0.8, "cutmix": 1.0, "mix_prob": 1.0, "cutmix_switch": 0.5, "mix_group": GROUP})


def config(**changes) -> ConfigDict:
    config = common.base()
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def given():
    """Float32 arrays for both sides: the gradients' norms are some below 1, some between 1 and 5, and some above."""
    random = np.random.default_rng(0)
    arrays = {f"params/{name}": random.normal(size=shape) for name, shape in SHAPES.items()}
    arrays["params/zero.weight"][:] = 0
    sizes = np.exp(random.normal(-1, 1.5, STEPS))
    for name, shape in SHAPES.items():
        grads = random.normal(size=(STEPS, *shape)) * 10 ** random.uniform(-3, 0, (1, *shape))
        arrays[f"grads/{name}"] = grads * sizes.reshape(-1, *[1] * len(shape))
    arrays["grads/zero.weight"][:2] = 0
    arrays["rates"] = np.linspace(1e-6, 5e-3, STEPS)
    arrays["logits"] = random.normal(0, 3, (BATCH, CLASSES))
    arrays["teacher"] = arrays["logits"] + random.normal(0, 1, (BATCH, CLASSES))
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()}
    arrays["labels"] = random.integers(0, CLASSES, (BATCH // GROUP, GROUP))
    kept, _, _ = augment.draw_mix(jax.random.key(0), BATCH // GROUP, 32, 32, MIX)
    arrays["kept"] = np.asarray(kept)
    arrays["targets"] = np.asarray(mixed_targets(arrays))
    return arrays


def mixed_targets(arrays):
    """Of both labels of each image, by the λ that are in `arrays`."""
    targets = losses.smooth_one_hot(jnp.asarray(arrays["labels"].reshape(-1)), CLASSES, SMOOTHING)
    images = jnp.zeros((BATCH, 32, 32, 1))
    return augment.mix(jax.random.key(0), images, targets, jnp.ones(BATCH), MIX)[1]


@pytest.fixture(scope="module")
def timm(given, tmp_path_factory):
    python = os.environ.get("FASTERVIT_ORACLE")
    if not python:
        pytest.fail("set FASTERVIT_ORACLE to a Python that has timm; tests/golden/make.py says how")
    folder = tmp_path_factory.mktemp("timm")
    np.savez(folder / "in.npz", **given)
    subprocess.run([python, SCRIPT, folder / "in.npz", folder / "out.npz"], check=True)
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays)


def error(ours, theirs) -> float:
    """The largest difference over the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def named(arrays, prefix):
    return {name: jnp.asarray(arrays[f"{prefix}/{name}"]) for name in SHAPES}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_step_of_the_optimizer(name, given, timm):
    """From timm's parameters before it: the direction, for every array; 30 steps on our own: the parameters."""
    kind, decay = OPTIMIZERS[name]
    optimizer = make_optimizer(config(optimizer=kind, weight_decay=decay, clip_norm=5.0))
    update = jax.jit(optimizer.update)
    theirs = {key: timm[f"{name}/params/{key}"] for key in SHAPES}
    grads = named(given, "grads")
    own = named(given, "params")
    state = own_state = optimizer.init(own)
    worst = 0.0
    for step, rate in enumerate(given["rates"]):
        grad = {key: x[step] for key, x in grads.items()}
        before = {key: jnp.asarray(x[step], jnp.float32) for key, x in theirs.items()}
        updates, state = update(grad, state, before)
        for key, x in theirs.items():
            direction = (x[step] - x[step + 1]) / np.float64(rate)
            if direction.any():
                worst = max(worst, error(updates[key], direction))
            else:
                assert not updates[key].any()
        own_updates, own_state = update(grad, own_state, own)
        own = jax.tree.map(lambda p, u, rate=rate: p - rate * u, own, own_updates)
    end = max(error(own[key], x[-1]) for key, x in theirs.items())
    moved = min(error(given[f"params/{key}"], x[-1]) for key, x in theirs.items())
    print(f"{name}: directions {worst:.1e}, parameters after {STEPS} steps {end:.1e} (they moved by {moved:.1e})")
    assert worst < 1e-6
    assert end < 1e-6
    assert moved > 1e-3


def test_clipping(given, timm):
    norms = timm["clip/norms"]
    assert (norms < 1).sum() > 3
    assert ((norms > 1) & (norms < 5)).sum() > 3
    assert (norms > 5).sum() > 3
    clip, grads, worst = clip_by_global_norm(5.0), named(given, "grads"), 0.0
    for step in range(STEPS):
        clipped, _ = clip.update({key: x[step] for key, x in grads.items()}, clip.init(None))
        worst = max(worst, error(clipped["conv.weight"], timm["clip/conv.weight"][step]))
    print(f"clipped gradients {worst:.1e}")
    assert worst < 1e-6


@pytest.mark.parametrize("warmup", [20, 35])
@pytest.mark.parametrize("batch", [1024, 4096])
def test_every_step_of_the_schedule(batch, warmup, timm):
    """Of 310 epochs of ImageNet's 1,281,167 images."""
    steps = 1_281_167 // batch
    given = config(batch_size=batch, epochs=300, cooldown_epochs=10, warmup_epochs=warmup, learning_rate=5e-3,
                   warmup_learning_rate=1e-6, final_learning_rate=5e-6)
    theirs = timm[f"schedule/{steps}/{warmup}"]
    assert len(theirs) == schedule.total_epochs(given) * steps
    ours = jax.jit(jax.vmap(schedule.make_schedule(given, steps)))(jnp.arange(len(theirs)))
    relative = np.abs(np.asarray(ours, np.float64) / theirs - 1)
    print(f"{len(theirs)} learning rates {relative.max():.1e}")
    assert relative.max() < 1e-6


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy", "mesa"])
def test_losses_and_their_gradients(name, given, timm):
    logits, others = jnp.asarray(given["logits"]), jnp.asarray(given["teacher" if name == "mesa" else "targets"])
    loss = losses.mesa if name == "mesa" else losses.get_loss(name)
    value, gradient = jax.jit(jax.value_and_grad(lambda x: loss(x, others).mean()))(logits)
    errors = error(value, timm[f"losses/{name}"]), error(gradient, timm[f"gradients/{name}"])
    print(f"{name}: {errors[0]:.1e}, its gradient {errors[1]:.1e}")
    assert max(errors) < 1e-6


def test_mixed_targets(given, timm):
    assert error(given["targets"], timm["mixed"]) < 1e-6
    np.testing.assert_allclose(given["targets"], timm["mixed"], rtol=1e-6)
