"""Losses and scores of a batch.

Axes: b batch, k classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

MESA_TEMPERATURE, MESA_SCALE = 3.0, 50.0

Labels = Int[Array, "b"] | Bool[Array, "b k"]
"""One class an image, or all that are right."""


def smooth_one_hot(labels: Int[Array, "b"], num_classes: int, smoothing: float) -> Float[Array, "b k"]:
    """1 - smoothing on the label, and `smoothing` spread evenly over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def cross_entropy(logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, "b"]:
    """Soft-target cross entropy of each example, in nats."""
    return optax.softmax_cross_entropy(logits, targets)


def binary_cross_entropy(logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, "b"]:
    """Each class on its own, right with the probability `targets`: their cross entropies, in nats, averaged."""
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=1)


LOSSES = {"cross_entropy": cross_entropy, "binary_cross_entropy": binary_cross_entropy}
"""What config.loss can be: functions of logits (b, k) and targets (b, k) that give (b,)."""


def get_loss(name: str) -> Callable[[Float[Array, "b k"], Float[Array, "b k"]], Float[Array, "b"]]:
    """The loss of this name in LOSSES. Raises ValueError if there is none."""
    if name not in LOSSES:
        raise ValueError(f"config.loss={name!r}: expected one of {', '.join(LOSSES)}")
    return LOSSES[name]


def mesa(logits: Float[Array, "b k"], teacher_logits: Float[Array, "b k"]) -> Float[Array, "b"]:
    """Distance to the averaged model's prediction for the same images: 50 KL(teacher ‖ student), both at temperature 3.

    Sharpness-aware training for free (arXiv:2205.14083), with the official recipe's numbers. No gradient goes into the
    teacher.
    """
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / MESA_TEMPERATURE)
    student = jax.nn.log_softmax(logits / MESA_TEMPERATURE)
    return MESA_SCALE * optax.losses.kl_divergence_with_log_targets(student, teacher)


def in_top(logits: Float[Array, "b k"], labels: Labels, top: int) -> Bool[Array, "b"]:
    """Whether fewer than `top` classes score higher than the label, or than one of several labels.

    A tie, or a NaN, counts against the label.
    """
    if labels.ndim == 2:
        score = jnp.where(labels, logits, -jnp.inf).max(axis=1, keepdims=True)
    else:
        score = jnp.take_along_axis(logits, labels[:, None], axis=1)
    not_lower = (~(logits < score)).sum(axis=1)  # the label itself is one of them
    return not_lower <= top
