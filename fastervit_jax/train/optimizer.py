"""The optimiser of a recipe, from optax's parts: what a step does to the parameters, but for the learning rate."""

import collections
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

LAMB_CLIP_NORM = 1.0
"""The global norm that LAMB itself clips gradients to, after config.clip_norm: timm's default, so the recipe's."""

OPTIMIZERS = ("adamw", "lamb")


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW or LAMB without the learning rate: a step is `params - learning_rate * updates`.

    Gradients are clipped to the global norm config.clip_norm (inf: not at all); then come Adam's direction
    (beta1, beta2, eps), plus weight_decay times the parameter for matrices and kernels but not for biases, norms and
    other vectors; LAMB's trust ratio; and `layer_decay` by `layer_ids`.

    LAMB (arXiv:1904.00962) is timm's with its defaults: before Adam, it clips gradients to a global norm of 1
    of its own; and ‖parameter‖ / ‖direction with decay‖ (1 where either is 0) scales each array that decays. Arrays
    without decay, so all of them with weight_decay=0, take Adam's step.

    Raises:
        ValueError: for a config.optimizer that there is not; and `init` and `update`, with layer_decay other than 1,
            as `layer_ids`.
    """
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(f"config.optimizer={config.optimizer!r}: expected one of {', '.join(OPTIMIZERS)}")
    lamb = config.optimizer == "lamb"
    parts = [clip_by_global_norm(config.clip_norm)]
    if lamb:
        parts.append(clip_by_global_norm(LAMB_CLIP_NORM))
    parts.append(scale_by_adam(config.beta1, config.beta2, config.eps))
    if config.weight_decay:
        parts.append(optax.add_decayed_weights(config.weight_decay, decays))
        if lamb:
            parts.append(optax.masked(optax.scale_by_trust_ratio(), decays))
    if config.layer_decay != 1:
        parts.append(scale_by_layer(config.layer_decay, config.model.depths))
    return optax.chain(*parts)


def decays(params: Any) -> Any:
    """Whether each array has weight decay: those of two or more axes."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def clip_by_global_norm(norm: float) -> optax.GradientTransformation:
    """Gradients scaled down to this norm over all arrays together, where theirs is more; inf: never."""
    def update(grads, state, params=None):
        factor = jnp.minimum(1.0, norm / jnp.maximum(global_norm(grads), norm))
        return jax.tree.map(lambda g: g * factor, grads), state

    return optax.identity() if math.isinf(norm) else optax.GradientTransformation(
        lambda params: optax.EmptyState(), update)


def global_norm(tree: Any) -> Float[Array, ""]:
    """The norm of all arrays together: optax.tree.norm in a tenth of the kernels, as arrays of a shape share one."""
    by_shape = collections.defaultdict(list)
    for x in jax.tree.leaves(tree):
        by_shape[x.shape].append(x)
    return jnp.sqrt(sum(jnp.square(jnp.stack(arrays)).sum() for arrays in by_shape.values()))


def scale_by_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Adam's direction, m̂ / (√v̂ + eps), in float32 as exact as in float64 but for the last digits.

    optax.scale_by_adam computes 1 - beta2 and 1 - beta2^step from a beta2 rounded to float32, and so is 7e-6 off.
    """

    def average(mean, value, beta):
        return jax.tree.map(lambda mean, value: mean + (1 - beta) * (value - mean), mean, value)

    def corrected(mean, beta, count):
        so_far = -jnp.expm1(count * (math.log(beta) if beta else -math.inf))  # 1 - beta^count
        return jax.tree.map(lambda mean: mean / so_far, mean)

    def init(params):
        mean, square = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.int32(0), mean, square)

    def update(grads, state, params=None):
        count = optax.safe_increment(state.count)
        mean = average(state.mu, grads, beta1)
        square = average(state.nu, jax.tree.map(jnp.square, grads), beta2)
        updates = jax.tree.map(
            lambda mean, square: mean / (jnp.sqrt(square) + eps),
            corrected(mean, beta1, count), corrected(square, beta2, count))
        return updates, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformation(init, update)


def scale_by_layer(layer_decay: float, depths: Sequence[int]) -> optax.GradientTransformation:
    """Updates times layer_decay to the number of blocks that are between the parameter and the head, by `layer_ids`."""

    def update(updates, state, params=None):
        last = sum(depths) + 1
        return jax.tree.map(
            lambda update, layer: update * layer_decay ** (last - layer), updates, layer_ids(updates, depths)), state

    def init(params):
        layer_ids(params, depths)
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


def layer_ids(params: Any, depths: Sequence[int]) -> Any:
    """How many blocks come before each parameter's own, the stem being one: from 0 to sum(depths) + 1, the head's.

    A carrier initialiser goes with its stage's first block, and a downsampler with that of the stage it leads to.

    Raises ValueError for a parameter that is in none of these.
    """
    before = [sum(depths[:stage]) for stage in range(len(depths))]

    def layer_id(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if path.startswith("stem/"):
            return 0
        if path.startswith(("norm/", "head/")):
            return sum(depths) + 1
        if match := re.match(r"stages_(\d+)/(?:blocks_(\d+)|carrier_init)/", path):
            stage, block = int(match[1]), int(match[2] or 0)
            if stage < len(depths) and block < depths[stage]:
                return before[stage] + block + 1
        if (match := re.match(r"downsamples_(\d+)/", path)) and int(match[1]) < len(depths) - 1:
            return before[int(match[1]) + 1] + 1
        raise ValueError(f"parameter {path}: layer decay knows the stem, blocks of stages of depths {tuple(depths)}, "
                         "carrier initialisers, downsamplers, norm and head; give it a layer in "
                         "fastervit_jax/train/optimizer.py, or set config.layer_decay=1")

    return jax.tree_util.tree_map_with_path(layer_id, params)
