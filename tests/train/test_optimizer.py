"""Schedule, optimiser, losses: against NumPy."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from fastervit_jax.train import evaluate, losses
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.schedule import warmup_cosine

CONFIG = ConfigDict({"learning_rate": 0.1, "warmup_learning_rate": 0.01, "final_learning_rate": 0.001, "epochs": 5,
                     "warmup_epochs": 1, "weight_decay": 0.5, "clip_norm": 1.0})


def test_schedule():
    schedule = warmup_cosine(peak=1.0, first=0.2, last=0.1, warmup_steps=4, total_steps=10)
    rates = [float(schedule(jnp.int32(step))) for step in range(12)]
    np.testing.assert_allclose(rates[:4], [0.2, 0.4, 0.6, 0.8], rtol=1e-6)
    cosine = [0.1 + 0.45 * (1 + np.cos(np.pi * step / 10)) for step in range(4, 11)]
    np.testing.assert_allclose(rates[4:], [*cosine, 0.1], rtol=1e-6)


def test_schedule_without_warmup():
    schedule = warmup_cosine(peak=1.0, first=0.2, last=0.0, warmup_steps=0, total_steps=10)
    np.testing.assert_allclose([schedule(0), schedule(5)], [1.0, 0.5], rtol=1e-6)


def test_adamw_clips_decays_matrices_and_follows_the_schedule():
    optimizer, schedule = make_optimizer(CONFIG, steps_per_epoch=2)
    params = {"kernel": jnp.asarray([[1.0, -2.0]]), "bias": jnp.asarray([3.0])}
    state = optimizer.init(params)
    expected = {name: np.asarray(p, np.float64) for name, p in params.items()}
    m = {name: 0.0 for name in params}
    v = {name: 0.0 for name in params}
    for step in range(4):
        grads = {"kernel": jnp.asarray([[3.0, 0.5 * step]]), "bias": jnp.asarray([-4.0])}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in grads.values()))
        for name in params:
            g = np.asarray(grads[name], np.float64) / norm  # longer than clip_norm at every step
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            direction = m[name] / (1 - 0.9 ** (step + 1)) / (np.sqrt(v[name] / (1 - 0.999 ** (step + 1))) + 1e-8)
            decay = 0.5 * expected[name] if name == "kernel" else 0.0
            expected[name] = expected[name] - float(schedule(step)) * (direction + decay)
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)


def test_short_gradients_are_not_clipped():
    optimizer, _ = make_optimizer(ConfigDict({**CONFIG, "clip_norm": 100.0}), steps_per_epoch=2)
    state = optimizer.init({"bias": jnp.zeros(1)})
    _, state = optimizer.update({"bias": jnp.asarray([50.0])}, state, {"bias": jnp.zeros(1)})
    np.testing.assert_allclose(optax.tree.get(state, "mu")["bias"], [5.0], rtol=1e-6)


def test_smooth_one_hot_and_cross_entropy():
    targets = losses.smooth_one_hot(jnp.asarray([2, 0]), 4, 0.2)
    np.testing.assert_allclose(targets, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6)
    logits = np.array([[1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 100.0]])
    log_softmax = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(losses.cross_entropy(jnp.asarray(logits, jnp.float32), targets),
                               -(np.asarray(targets) * log_softmax).sum(1), rtol=1e-6)


@pytest.mark.parametrize(("top", "expected"), [(1, [True, False, False, False]), (2, [True, True, False, False]),
                                               (3, [True, True, True, False]), (4, [True, True, True, True])])
def test_in_top(top, expected):
    logits = jnp.asarray([[3.0, 2, 1, 0], [2, 3, 1, 0], [1, 1, 1, 0], [jnp.nan, 0, 0, 0]])
    assert losses.in_top(logits, jnp.zeros(4, jnp.int32), top).tolist() == expected


def test_report():
    assert evaluate.report({"acc1": 82.1, "acc5": 95.9}) == " * Acc@1 82.100 (17.900) Acc@5 95.900 (4.100)"
