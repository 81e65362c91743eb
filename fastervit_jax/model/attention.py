"""Token layers: multi-head attention with a position bias, MLP, layer norm, layer scale, drop path.

Axes: b groups of tokens that attend to each other, t tokens, c channels, h heads, d width of a head.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastervit_jax.model.position import RelativePositionBias
from fastervit_jax.ops.attention import attention, attention_weights, split_heads
from fastervit_jax.ops.mlp import Weights, linear, mlp
from fastervit_jax.ops.norm import layer_norm


def dense(features: int, *, dtype: Any, name: str | None = None, use_bias: bool = True) -> nn.Dense:
    """Linear layer with the official initialisation: normal of deviation 0.02, zero bias."""
    return nn.Dense(features, use_bias=use_bias, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name)


class LayerNorm(nn.Module):
    """Layer norm over channels, computed in float32; the result has `dtype`."""

    epsilon: float
    dtype: Any
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return layer_norm(x.astype(self.dtype), scale, bias, self.epsilon, kernels=self.kernels)


def drop_paths(
    key: Array | None, rates: Sequence[float], shape: tuple[Any, ...]
) -> list[Float[Array, "..."] | None]:
    """What drop path multiplies the residual branches of a stage's blocks by: for each rate, an array of `shape`.

    Its values are, each for itself, 0 with that rate, and 1 / (1 - rate) else; None where the rate is 0, or `key` None.
    `shape` may be symbolic, as exports have it. They are drawn at once: a draw for each branch would be as many kernels
    on a GPU, which take longer than what they compute.
    """
    if key is None:
        return [None] * len(rates)
    drawn = jax.random.uniform(key, (len(rates), *shape))
    return [jnp.where(x < rate, 0.0, 1 / (1 - rate)) if rate else None for x, rate in zip(drawn, rates, strict=True)]


def drop_path(x: Array, kept: Array | None) -> Array:
    """x, where None is given, or times `kept`, which has x's first axes: those of images, or of images and windows."""
    if kept is None:
        return x
    return (x.astype(jnp.float32) * kept.reshape(kept.shape + (1,) * (x.ndim - kept.ndim))).astype(x.dtype)


def layer_scale(module: nn.Module, name: str, initial: float | None, width: int) -> Float[Array, "c"] | None:
    """`module`'s parameter `name`, a learned factor a channel; None without layer scale (`initial` None)."""
    return None if initial is None else module.param(name, nn.initializers.constant(initial), (width,), jnp.float32)


def scaled(x: Float[Array, "... c"], gamma: Float[Array, "c"] | None) -> Float[Array, "... c"]:
    """x times gamma, in x's dtype; x itself where gamma is None."""
    return x if gamma is None else x * gamma.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


class Attention(nn.Module):
    """Multi-head self-attention of tokens on a rows × cols grid, with `leading` tokens before them.

    The result is multiplied by gamma, where there is a layer scale. `bias` is what this module's position network gives
    for the grid, where that has been computed already.

    `kernels`: how it is computed, one of `ops.kernels.KERNELS`.

    Where the collection `attention` is mutable, `weights` in it is float32 (b, h, t, t): for each token (third axis)
    what it takes from each token, before dropout. Otherwise nothing is computed for it.
    """

    width: int
    heads: int
    qkv_bias: bool
    drop_rate: float
    attn_drop_rate: float
    dtype: Any
    kernels: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t c"], rows: int, cols: int, leading: int, train: bool,
        gamma: Float[Array, "c"] | None = None, bias: Float[Array, "h t t"] | None = None,
    ) -> Float[Array, "b t c"]:
        qkv = dense(3 * self.width, use_bias=self.qkv_bias, dtype=self.dtype, name="qkv")(x)
        if bias is None:
            bias = RelativePositionBias(self.heads, name="position_bias")(rows, cols, leading)
        if self.is_mutable_collection("attention") and not self.is_initializing():
            q, k, _ = split_heads(qkv, self.heads)
            self.sow("attention", "weights", attention_weights(q, k, bias), init_fn=lambda: None,
                     reduce_fn=lambda _, weights: weights)
        drop = nn.Dropout(self.attn_drop_rate, deterministic=False) if train and self.attn_drop_rate else None
        out = attention(qkv, bias, drop=drop, kernels=self.kernels)
        folded = in_weights(gamma, self.dtype)
        out = linear(out, Linear(self.width, name="out")(self.width, folded))
        out = nn.Dropout(self.drop_rate, deterministic=not train)(out)
        return out if folded is gamma else scaled(out, gamma)


def in_weights(gamma: Float[Array, "c"] | None, dtype: Any) -> Float[Array, "c"] | None:
    """gamma, where weights can take it: in float16, weights times 1e-5 are next to nothing."""
    return None if jnp.dtype(dtype) == jnp.float16 else gamma


class Linear(nn.Module):
    """The kernel and bias of a linear layer as `dense` makes them, for functions that compute more than it at once.

    `gamma`, a layer scale of its outputs, is multiplied into them: where the outputs themselves were scaled, they would
    be kept for gamma's gradient. See `in_weights`.
    """

    features: int

    @nn.compact
    def __call__(self, inputs: int, gamma: Float[Array, "o"] | None = None) -> Weights:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (inputs, self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return (kernel, bias) if gamma is None else (kernel * gamma[None], bias * gamma)


class MLP(nn.Module):
    """linear → GELU (exact) → linear, applied to each token; then times gamma, where there is a layer scale."""

    width: int
    hidden: int
    drop_rate: float
    dtype: Any
    kernels: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "... c"], train: bool, gamma: Float[Array, "c"] | None = None
    ) -> Float[Array, "... c"]:
        hidden = Linear(self.hidden, name="hidden")(x.shape[-1])
        folded = in_weights(gamma, self.dtype)
        out = Linear(self.width, name="out")(self.hidden, folded)
        drop = nn.Dropout(self.drop_rate, deterministic=False) if train and self.drop_rate else None
        y = mlp(x.astype(self.dtype), hidden, out, drop=drop, kernels=self.kernels)
        return y if folded is gamma else scaled(y, gamma)
