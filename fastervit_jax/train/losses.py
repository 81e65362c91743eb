"""Losses and scores of a batch.

Axes: b batch, k classes.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

Labels = Int[Array, "b"] | Bool[Array, "b k"]
"""One class an image, or all that are right."""


def smooth_one_hot(labels: Int[Array, "b"], num_classes: int, smoothing: float) -> Float[Array, "b k"]:
    """1 - smoothing on the label, and `smoothing` spread evenly over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), smoothing)


def cross_entropy(logits: Float[Array, "b k"], targets: Float[Array, "b k"]) -> Float[Array, "b"]:
    """Soft-target cross entropy of each example, in nats."""
    return optax.softmax_cross_entropy(logits, targets)


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
