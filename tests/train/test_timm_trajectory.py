"""Thirty training steps of the official model and of ours, from the same weights, on the same batches.

timm_trajectory_oracle.py, in the Python that FASTERVIT_ORACLE names, runs the official model with timm's optimiser,
schedule and average; here the real train step runs ours. Without randomness: no augmentation, mixing or drop path.
"""

import dataclasses
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import common
from fastervit_jax.train import schedule, sharding
from fastervit_jax.train.optimizer import decays, make_optimizer
from fastervit_jax.train.state import TrainState, abstract_state
from fastervit_jax.train.step import make_train_step
from fastervit_jax.weights import names
from tests import official
from tests.golden import cases

pytestmark = pytest.mark.oracle
SCRIPT = pathlib.Path(__file__).with_name("timm_trajectory_oracle.py")
# Both kinds of block with all their parts: carriers in two stages, layer scales, propagation, batch norm at the end.
CASE = cases.Case(
    "faster_vit_0_any_res",
    {**cases.TINY, "window_size": [4, 4, 4, 2], "hat": [False, False, True, True], "layer_scale": 1e-5,
     "layer_scale_conv": 1e-5, "do_propagation": True, "drop_path_rate": 0.0}, 128, batch=8)
RECIPE = {
    "learning_rate": 5e-3, "warmup_learning_rate": 1e-6, "final_learning_rate": 5e-6, "warmup_epochs": 8, "epochs": 26,
    "cooldown_epochs": 4, "weight_decay": 0.05, "clip_norm": 2.0, "label_smoothing": 0.1, "ema_decay": 0.9,
}  # fmt: skip
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEPS = 30  # one is an epoch


def make_config() -> ConfigDict:
    config = common.base()
    config.update(RECIPE)
    config.batch_size = CASE.batch
    config.data = common.data("none", CASE.resolution, MEAN, STD)
    config.augment = common.augment()
    config.model = common.model(CASE.arch, **CASE.kwargs)
    return config


def batches() -> dict[str, np.ndarray]:
    """A coarse pattern for each class under noise, so that there is something to learn."""
    random = np.random.default_rng(0)
    patterns = random.integers(0, 256, (CASE.kwargs["num_classes"], 8, 8, 3)).repeat(16, axis=1).repeat(16, axis=2)
    labels = random.integers(0, len(patterns), (STEPS, CASE.batch))
    noise = random.integers(0, 256, (STEPS, CASE.batch, CASE.resolution, CASE.resolution, 3))
    return {"images": ((patterns[labels] + 2 * noise) // 3).astype(np.uint8), "labels": labels}


def batch_of(arrays: dict[str, np.ndarray], step: int) -> dict[str, jax.Array]:
    return jax.device_put({"image": arrays["images"][step], "label": arrays["labels"][step].astype(np.int32),
                           "weight": np.ones(CASE.batch, np.float32)})


def by_official_name(variables: dict) -> dict[str, np.ndarray]:
    flat = {collection: flatten_dict(tree, sep="/") for collection, tree in variables.items()}
    return {name: names.to_pytorch_layout(path, np.asarray(flat[collection][path]))
            for name, (collection, path) in names.pytorch_names(variables).items()}


@pytest.fixture(scope="module")
def ours():
    """Metrics of each step, the weights after it, and the averages after the last."""
    config, arrays = make_config(), batches()
    model, variables = official.model_and_variables(CASE)
    mesh = sharding.make_mesh(jax.devices()[:1])
    optimizer = make_optimizer(config)
    params = variables["params"]
    state = TrainState(
        step=jnp.int32(0), **variables, opt_state=optimizer.init(params), ema=jax.tree.map(jnp.copy, variables),
        bad_steps=jnp.int32(0))
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, config, mesh)))
    train_step = make_train_step(
        model, optimizer, schedule.make_schedule(config, steps_per_epoch=1), config, mesh, STEPS)
    train_step = train_step.lower(state, batch_of(arrays, 0)).compile({"xla_backend_optimization_level": 0})
    metrics, after = [], []
    for step in range(STEPS):
        state, scores = train_step(state, batch_of(arrays, step))
        metrics.append(jax.device_get(scores))
        after.append(by_official_name(jax.device_get(state.variables)))
    return metrics, after, by_official_name(jax.device_get(state.ema))


@pytest.fixture(scope="module")
def theirs(ours, tmp_path_factory):
    python = os.environ.get("FASTERVIT_ORACLE")
    if not python:
        pytest.fail("set FASTERVIT_ORACLE to a Python that has the official package; tests/golden/make.py says how")
    folder = tmp_path_factory.mktemp("trajectory")
    _, after, _ = ours
    np.savez(
        folder / "in.npz", case=json.dumps(dataclasses.asdict(CASE)),
        recipe=json.dumps({**RECIPE, "mean": MEAN, "std": STD}), **batches(),
        **{f"after/{name}": np.stack([weights[name] for weights in after]) for name in after[0]})
    subprocess.run([python, SCRIPT, folder / "in.npz", folder / "out.npz"], check=True)
    with np.load(folder / "out.npz") as arrays:
        return dict(arrays)


def without_effect(weights: dict[str, np.ndarray]) -> set[str]:
    """Biases that a batch norm takes out again, of its convolution or of the last block, and its mean, which follows.

    Their true gradient is 0; Adam makes whole steps of what rounding leaves of it, so the two sides part. The losses
    see them all.
    """
    found = {"norm.running_mean", max(name for name in weights if name.endswith(".mlp.fc2.bias"))}
    for name in weights:
        block, _, number = name.removesuffix(".bias").rpartition(".conv")
        if name.endswith(".bias") and f"{block}.norm{number}.running_mean" in weights:
            found |= {name, f"{block}.norm{number}.running_mean"}
    return found


def compare(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], prefix: str) -> tuple[float, str]:
    """The largest relative error of an array, and its name."""
    errors = {}
    for name in set(ours) - without_effect(ours):
        pair = ours[name], theirs[f"{prefix}/{name}"]
        if name.endswith("qkv.bias"):  # the keys' part adds the same to all scores of a query: without effect, too
            pair = tuple(np.delete(x.reshape(3, -1), 1, axis=0) for x in pair)
        errors[name] = official.relative_error(*pair)
    return max((error, name) for name, error in errors.items())


def test_what_is_not_compared(ours):
    blocks = [f"levels.{level}.blocks.0" for level in (0, 1)]
    assert without_effect(ours[2]) == {"norm.running_mean", "levels.3.blocks.0.mlp.fc2.bias", *(
        f"{block}.{array}" for block in blocks
        for array in ("conv1.bias", "conv2.bias", "norm1.running_mean", "norm2.running_mean"))}


def test_losses_at_each_step(ours, theirs):
    metrics, _, _ = ours
    ours, norms, rates = (np.array([m[name] for m in metrics], np.float64)
                          for name in ("loss", "gradient_norm", "learning_rate"))
    worst = {"losses": np.abs(ours / theirs["losses"] - 1), "norms": np.abs(norms / theirs["norms"] - 1),
             "rates": np.abs(rates / theirs["rates"] - 1)}
    print({name: f"{x.max():.1e} at step {x.argmax()}" for name, x in worst.items()},
          f"loss {theirs['losses'][0]:.3f} to {theirs['losses'][-1]:.3f}")
    assert worst["losses"].max() < 1e-3
    assert worst["norms"].max() < 1e-2
    assert worst["rates"].max() < 1e-6
    assert theirs["norms"].max() > RECIPE["clip_norm"] > theirs["norms"].min()
    assert theirs["losses"][-1] < 0.9 * theirs["losses"][0]


def test_weights_after_the_last_step(ours, theirs):
    _, after, _ = ours
    error, name = compare(after[-1], theirs, "weights")
    start = official.official_weights(jax.tree.map(jnp.asarray, official.model_and_variables(CASE)[1]))
    moved = compare(start, theirs, "weights")[0]
    print(f"weights {error:.1e} ({name}); those that they started with {moved:.1e}")
    assert error < 3e-3 < moved


def test_averages_after_the_last_step(ours, theirs):
    """The official state dict has carrier initialisers under two names, so that timm averages them twice a step."""
    once, after = ({name: x for name, x in arrays.items() if ".global_tokenizer." not in name}
                   for arrays in (ours[2], ours[1][-1]))
    error, name = compare(once, theirs, "ema")
    print(f"averages {error:.1e} ({name}); weights and their averages {compare(after, theirs, 'ema')[0]:.1e}")
    assert error < 3e-3 < compare(after, theirs, "ema")[0]


def test_averages_are_timms_of_the_same_weights(ours, theirs):
    errors = {name: official.relative_error(x, theirs[f"average/{name}"]) for name, x in ours[2].items()}
    print(f"averages of the same weights {max(errors.values()):.1e}")
    assert max(errors.values()) < 1e-6


def test_the_same_weights_decay(theirs):
    _, variables = official.model_and_variables(CASE)
    decayed = flatten_dict(decays(variables["params"]), sep="/")
    paths = {name: path for name, (collection, path) in names.pytorch_names(variables).items()
             if collection == "params"}
    assert {name for name, path in paths.items() if decayed[path]} == set(theirs["decayed"])
