"""Attention within windows: one function, an XLA form that runs anywhere, and a fused kernel for GPUs behind it.

Axes: b windows (of all images), t and s tokens of a window, h heads, d width of a head; c = h · d, e = 3 c.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fastervit_jax.ops import attention_gpu
from fastervit_jax.ops.kernels import chosen


def attention_weights(
    q: Float[Array, "b t h d"], k: Float[Array, "b t h d"], bias: Float[Array, "h t t"], scale: float | None = None
) -> Float[Array, "b h t t"]:
    """softmax(scale · q kᵀ + bias), for each window and head, in float32 whatever the inputs are.

    `scale`: by default 1 / sqrt(d).
    """
    scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return jax.nn.softmax(scores * scale + bias[None].astype(jnp.float32), axis=-1)


def split_heads(qkv: Float[Array, "b t e"], heads: int) -> Float[Array, "3 b t h d"]:
    """Queries, keys and values of all heads, from what one linear layer gives."""
    return rearrange(qkv, "b t (three h d) -> three b t h d", three=3, h=heads)


def attention(
    qkv: Float[Array, "b t e"],
    bias: Float[Array, "h t t"],
    *,
    scale: float | None = None,
    drop: Callable[[Array], Array] | None = None,
    kernels: str = "auto",
) -> Float[Array, "b t c"]:
    """softmax(scale · q kᵀ + bias) v, for each window and head; qkv holds (3, h, d) in its last axis.

    Scores and softmax are float32 whatever the inputs are; the result has the dtype of `qkv`.

    Args:
        scale: By default 1 / sqrt(d).
        drop: Applied to the attention weights (dropout in training); only XLA's form does that.
        kernels: One of `ops.kernels.KERNELS`. Raises ValueError for "pallas" where the kernel does not fit.
    """
    heads, tokens = bias.shape[:2]
    width = qkv.shape[-1] // (3 * heads)
    scale = width**-0.5 if scale is None else scale
    unfit = "dropout of attention weights" if drop else attention_gpu.unfit(tokens, width)
    if chosen(kernels, qkv.dtype, unfit):
        return attention_gpu.attention(qkv, bias.astype(jnp.float32), scale)
    q, k, v = split_heads(qkv, heads)
    weights = attention_weights(q, k, bias, scale)
    weights = drop(weights) if drop else weights
    return rearrange(jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v), "b t h d -> b t (h d)")
