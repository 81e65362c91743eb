"""Attention within windows.

Axes: b windows (of all images), t and s tokens of a window, h heads, d width of a head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attention_weights(
    q: Float[Array, "b t h d"], k: Float[Array, "b t h d"], bias: Float[Array, "h t t"]
) -> Float[Array, "b h t t"]:
    """softmax(q kᵀ / sqrt(d) + bias), for each window and head, in float32 whatever the inputs are."""
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(scores * q.shape[-1] ** -0.5 + bias[None].astype(jnp.float32), axis=-1)


def window_attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t h d"],
    v: Float[Array, "b t h d"],
    bias: Float[Array, "h t t"],
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "b t h d"]:
    """softmax(q kᵀ / sqrt(d) + bias) v, for each window and head.

    Scores and softmax are float32 whatever the inputs are; the result has the dtype of `v`.
    `drop` is applied to the attention weights (dropout in training).
    """
    weights = attention_weights(q, k, bias)
    return jnp.einsum("bhts,bshd->bthd", drop(weights).astype(v.dtype), v)
