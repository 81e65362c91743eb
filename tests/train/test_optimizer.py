"""Schedule, optimiser, losses: against NumPy in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from configs import common
from fastervit_jax.model.variants import get_variant
from fastervit_jax.train import evaluate, losses, schedule
from fastervit_jax.train.optimizer import global_norm, layer_ids, make_optimizer
from fastervit_jax.weights import pretrained

DEPTHS = (1, 1, 2, 1)  # of the model `testing`
RATE = 0.05


def config(**changes) -> ConfigDict:
    config = common.base()
    config.batch_size, config.epochs, config.warmup_epochs = 64, 5, 1
    config.learning_rate, config.warmup_learning_rate, config.final_learning_rate = 0.1, 0.01, 0.001
    config.weight_decay, config.clip_norm = 0.5, 3.0
    config.model = common.model("testing")
    config.update_from_flattened_dict(changes)
    return config


def test_warmup_and_cosine():
    rate = schedule.warmup_cosine(peak=1.0, first=0.2, last=0.1, warmup_steps=4, total_steps=10)
    rates = [float(rate(jnp.int32(step))) for step in range(13)]
    cosine = [0.1 + 0.45 * (1 + np.cos(np.pi * step / 10)) for step in range(4, 10)]
    np.testing.assert_allclose(rates, [0.2, 0.4, 0.6, 0.8, *cosine, 0.1, 0.1, 0.1], rtol=3e-7)
    assert rates[10:] == [np.float32(0.1)] * 3
    assert [float(jax.jit(rate)(jnp.int32(step))) for step in (2, 5, 10)] == [rates[2], rates[5], rates[10]]


def test_schedule_without_warmup():
    rate = schedule.warmup_cosine(peak=1.0, first=0.2, last=0.0, warmup_steps=0, total_steps=10)
    np.testing.assert_allclose([rate(0), rate(5)], [1.0, 0.5], rtol=1e-6)


def test_the_end_of_a_long_schedule_is_exact():
    total = 310 * 1251
    rate = schedule.warmup_cosine(peak=5e-3, first=1e-6, last=5e-6, warmup_steps=0, total_steps=total)
    for left in (1, 100, 1251, 12510):
        expected = 5e-6 + (5e-3 - 5e-6) * math.sin(math.pi / 2 * left / total) ** 2
        np.testing.assert_allclose(rate(total - left), expected, rtol=2e-7)


def test_the_schedule_of_a_config():
    """Two steps an epoch, five epochs and three more at the final rate, and a batch of half the size."""
    scaled = config(learning_rate_batch=128, cooldown_epochs=3)
    assert schedule.total_epochs(scaled) == 8
    for given, scale in ((scaled, 0.5), (config(), 1.0)):
        rate = schedule.make_schedule(given, steps_per_epoch=2)
        cosine = [0.001 + 0.0495 * (1 + np.cos(np.pi * step / 10)) for step in range(2, 10)]
        expected = scale * np.array([0.01, 0.055, *cosine, *[0.001] * 6])
        np.testing.assert_allclose([float(rate(step)) for step in range(16)], expected, rtol=1e-6)


@pytest.mark.parametrize(("batch", "for_batch", "expected"), [
    (1024, 4096, "learning rate 0.005 for a batch of 4,096; 0.00125 for this one of 1,024"),
    (4096, 4096, "learning rate 0.005 for a batch of 4,096"),
    (1024, 0, "learning rate 0.005, not scaled with the batch of 1,024"),
])  # fmt: skip
def test_what_is_said_of_the_learning_rate(batch, for_batch, expected):
    assert schedule.describe(config(learning_rate=5e-3, batch_size=batch, learning_rate_batch=for_batch)) == expected


PARAMS = {"head": {"kernel": [[1.0, -2.0]], "bias": [3.0]}, "stem": {"zero": [[0.0, 0.0]]}}
# Their norms are 2.24, 5 and 50, so clipped to 3 never, then twice, and to LAMB's 1 always.
GRADS = [
    {"head": {"kernel": [[0.0, 2.0]], "bias": [-1.0]}, "stem": {"zero": [[0.0, 0.0]]}},
    {"head": {"kernel": [[3.0, 0.0]], "bias": [4.0]}, "stem": {"zero": [[0.0, 0.0]]}},
    {"head": {"kernel": [[-30.0, 0.0]], "bias": [-40.0]}, "stem": {"zero": [[0.0, 1e-3]]}},
]


def array(tree):
    return jax.tree.map(jnp.asarray, tree, is_leaf=lambda x: isinstance(x, list))


def steps(given: ConfigDict) -> list[dict]:
    """The parameters after each of the steps with GRADS, at the learning rate RATE."""
    optimizer = make_optimizer(given)
    params, after = array(PARAMS), []
    state = optimizer.init(params)
    for grads in GRADS:
        updates, state = jax.jit(optimizer.update)(array(grads), state, params)
        params = jax.tree.map(lambda p, u: p - RATE * u, params, updates)
        after.append(flatten_dict(params, sep="/"))
    return after


def expected_steps(given: ConfigDict, factors: dict[str, float] | None = None) -> list[dict]:
    params = {name: np.array(p, np.float64) for name, p in flatten_dict(PARAMS, sep="/").items()}
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    after = []
    for step, grads in enumerate(GRADS, start=1):
        grads = {name: np.array(g, np.float64) for name, g in flatten_dict(grads, sep="/").items()}
        for limit in (given.clip_norm, *([1.0] if given.optimizer == "lamb" else [])):
            norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
            grads = {name: g * min(1, limit / norm) for name, g in grads.items()}
        for name, g in grads.items():
            m[name] = given.beta1 * m[name] + (1 - given.beta1) * g
            v[name] = given.beta2 * v[name] + (1 - given.beta2) * g**2
            direction = m[name] / (1 - given.beta1**step) / (np.sqrt(v[name] / (1 - given.beta2**step)) + given.eps)
            if params[name].ndim > 1 and given.weight_decay:
                direction = direction + given.weight_decay * params[name]
                lengths = np.linalg.norm(params[name]), np.linalg.norm(direction)
                if given.optimizer == "lamb" and min(lengths) > 0:
                    direction = direction * lengths[0] / lengths[1]
            params[name] = params[name] - RATE * (factors or dict.fromkeys(params, 1.0))[name] * direction
        after.append(dict(params))
    return after


def check_steps(ours, expected):
    for i in range(len(GRADS)):
        for name, p in expected[i].items():
            np.testing.assert_allclose(ours[i][name], p, rtol=1e-6, atol=1e-9, err_msg=f"{name}, step {i}")


@pytest.mark.parametrize("changes", [
    {}, {"clip_norm": math.inf}, {"weight_decay": 0.0}, {"beta1": 0.8, "beta2": 0.99, "eps": 0.1}, {"beta1": 0.0},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_steps(optimizer, changes):
    given = config(optimizer=optimizer, **changes)
    check_steps(steps(given), expected_steps(given))


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_layer_decay_scales_the_whole_step(optimizer):
    given = config(optimizer=optimizer, layer_decay=0.5)
    check_steps(steps(given), expected_steps(given, {"head/kernel": 1.0, "head/bias": 1.0, "stem/zero": 0.5**6}))


@pytest.mark.parametrize("step", [1, 2, 100, 3000])
def test_adam_is_exact_from_the_first_step_to_the_last(step):
    """With gradients 1, 2, 1, 2 ..: optax's own is 7e-6 off."""
    optimizer = make_optimizer(config(clip_norm=math.inf))
    state, _ = jax.lax.scan(
        lambda state, g: (optimizer.update({"bias": g[None]}, state, {"bias": jnp.zeros(1)})[1], None),
        optimizer.init({"bias": jnp.zeros(1)}), 1.0 + jnp.arange(step - 1) % 2)
    update, _ = optimizer.update({"bias": jnp.array([3.0])}, state, {"bias": jnp.zeros(1)})
    m = v = 0.0
    for g in [1 + i % 2 for i in range(step - 1)] + [3]:
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    expected = m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(update["bias"], [expected], rtol=1e-6)


def test_layers_of_the_whole_model():
    """Depths 1, 1, 2, 1: blocks are layers 1 to 5, the stem 0, norm and head 6."""
    params = pretrained.abstract_variables(get_variant("testing").config)["params"]
    modules = {}
    for path, layer in flatten_dict(layer_ids(params, DEPTHS), sep="/").items():
        parts = path.split("/")
        modules.setdefault("/".join(parts[:2] if "stages_" in path else parts[:1]), set()).add(layer)
    assert modules == {
        "stem": {0}, "stages_0/blocks_0": {1}, "downsamples_0": {2}, "stages_1/blocks_0": {2}, "downsamples_1": {3},
        "stages_2/carrier_init": {3}, "stages_2/blocks_0": {3}, "stages_2/blocks_1": {4}, "downsamples_2": {5},
        "stages_3/carrier_init": {5}, "stages_3/blocks_0": {5}, "norm": {6}, "head": {6},
    }  # fmt: skip


@pytest.mark.parametrize("path", [("stages_2", "blocks_2"), ("stages_4", "blocks_0"), ("stages_2", "new"),
                                  ("downsamples_3", "conv"), ("new", "dense")])
def test_layer_decay_of_an_unknown_parameter(path):
    params = {"head": {"kernel": jnp.ones((1, 1))}, path[0]: {path[1]: {"kernel": jnp.ones((1, 1))}}}
    with pytest.raises(ValueError, match=f"parameter {path[0]}/{path[1]}/kernel: layer decay knows"):
        make_optimizer(config(layer_decay=0.9)).init(params)
    make_optimizer(config()).init(params)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"config\.optimizer='sgd': expected one of adamw, lamb"):
        make_optimizer(config(optimizer="sgd"))
    with pytest.raises(ValueError, match=r"config\.loss='hinge': expected one of cross_entropy, binary_cross_entropy"):
        losses.get_loss("hinge")
    assert [losses.get_loss(name) for name in losses.LOSSES] == [losses.cross_entropy, losses.binary_cross_entropy]


LOGITS = np.array([[1.0, 2.0, 3.0, 0.0], [0.0, 0.0, 0.0, 100.0]])


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def test_smooth_one_hot_and_cross_entropy():
    targets = losses.smooth_one_hot(jnp.asarray([2, 0]), 4, 0.2)
    np.testing.assert_allclose(targets, [[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]], rtol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(jnp.asarray(LOGITS, jnp.float32), targets),
                               -(np.asarray(targets) * log_softmax(LOGITS)).sum(1), rtol=1e-6)


def test_binary_cross_entropy():
    targets = np.array([[0.0, 0.25, 1.0, 0.5], [0.0, 1.0, 0.5, 0.0]])
    right = 1 / (1 + np.exp(-LOGITS))
    wrong = 1 / (1 + np.exp(LOGITS))
    expected = -(targets * np.log(right) + (1 - targets) * np.log(wrong)).mean(1)
    ours = losses.binary_cross_entropy(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(targets, jnp.float32))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_mesa_and_its_gradients():
    student, teacher = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LOGITS[:, ::-1], jnp.float32)
    of_student, of_teacher = (log_softmax(np.asarray(x, np.float64) / 3) for x in (student, teacher))
    np.testing.assert_allclose(
        losses.mesa(student, teacher), 50 * (np.exp(of_teacher) * (of_teacher - of_student)).sum(1), rtol=1e-6)
    to_student, to_teacher = jax.grad(lambda s, t: losses.mesa(s, t).sum(), (0, 1))(student, teacher)
    np.testing.assert_allclose(to_student, 50 / 3 * (np.exp(of_student) - np.exp(of_teacher)), rtol=1e-5, atol=1e-6)
    assert not to_teacher.any()
    np.testing.assert_allclose(losses.mesa(student, student), [0, 0], atol=1e-6)


@pytest.mark.parametrize(("top", "expected"), [(1, [True, False, False, False]), (2, [True, True, False, False]),
                                               (3, [True, True, True, False]), (4, [True, True, True, True])])
def test_in_top(top, expected):
    logits = jnp.asarray([[3.0, 2, 1, 0], [2, 3, 1, 0], [1, 1, 1, 0], [jnp.nan, 0, 0, 0]])
    assert losses.in_top(logits, jnp.zeros(4, jnp.int32), top).tolist() == expected


def test_report():
    assert evaluate.report({"acc1": 82.1, "acc5": 95.9}) == " * Acc@1 82.100 (17.900) Acc@5 95.900 (4.100)"


def test_global_norm_is_that_of_all_arrays(key):
    keys = jax.random.split(key, 5)
    shapes = [(3, 4), (3, 4), (5,), (), (4, 3)]
    tree = {str(i): jax.random.normal(k, shape) for i, (k, shape) in enumerate(zip(keys, shapes, strict=True))}
    expected = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in tree.values()))
    assert float(jax.jit(global_norm)(tree)) == pytest.approx(expected, rel=1e-6)
    reductions = str(jax.make_jaxpr(global_norm)(tree)).count("reduce_sum")
    assert reductions == 4  # one a shape
