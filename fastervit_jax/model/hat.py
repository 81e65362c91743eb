"""Hierarchical attention (HAT): windows that exchange information through carrier tokens (paper, section 3.2).

A map is cut into a grid of windows, row by row, each with its own few carrier tokens. Carrier
tokens attend to each other over the whole image; then each window attends to its tokens and its
carrier tokens together.

Axes: b batch, h and w height and width of a map, c channels, n windows (row-major in the grid),
t tokens of a window (row-major), k carrier tokens of a window (row-major), s = k + t.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from fastervit_jax.model.attention import MLP, Attention, LayerNorm, drop_path, drop_paths, layer_scale, scaled
from fastervit_jax.model.conv import Conv3x3
from fastervit_jax.model.position import AbsolutePosition, RelativePositionBias, of_all_blocks
from fastervit_jax.ops.gelu import is_16_bit
from fastervit_jax.ops.kernels import chosen

PositionTerms = dict[str, Array]


def partition(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b n t c"]:
    """Cut a map into side × side windows. For carrier tokens: raster order → window order."""
    return rearrange(x, "b (i p) (j q) c -> b (i j) (p q) c", p=side, q=side)


def unpartition(x: Float[Array, "b n t c"], side: int, rows: int, cols: int) -> Float[Array, "b h w c"]:
    """Put a rows × cols grid of windows together again: the inverse of `partition`."""
    return rearrange(x, "b (i j) (p q) c -> b (i p) (j q) c", i=rows, j=cols, p=side, q=side)


def average_pool(x: Float[Array, "b h w c"], window: int, carriers: int) -> Float[Array, "b high wide c"]:
    """Average pool to carriers × carriers values for each window × window pixels.

    A side of n pixels gives out = n · carriers / window values, with stride n // out and
    kernel n - (out - 1) · stride: the pooled patches overlap and are not aligned to the windows.
    """
    sides = []
    for pixels in x.shape[1:3]:
        out = pixels // window * carriers
        stride = pixels // out
        sides.append((pixels - (out - 1) * stride, stride))
    kernel, strides = zip(*sides, strict=True)
    if is_16_bit(x.dtype):
        return _average_pool(x, kernel, strides)
    return nn.avg_pool(x, kernel, strides=strides)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _average_pool(x, kernel, strides):
    return nn.avg_pool(x.astype(jnp.float32), kernel, strides=strides).astype(x.dtype)


def _average_pool_backward(kernel, strides, shape, d_out):
    """XLA goes through a whole patch for each pixel; here one axis comes after the other."""
    d_x = d_out.astype(jnp.float32) / (kernel[0] * kernel[1])
    for axis, side, stride in zip((1, 2), kernel, strides, strict=True):
        more = shape[axis] - (d_x.shape[axis] - 1) * stride - 1
        d_x = sum(jax.lax.pad(d_x, np.float32(0), [
            (i, more - i, stride - 1) if a == axis else (0, 0, 0) for a in range(4)]) for i in range(side))
    return (d_x.astype(d_out.dtype),)


_average_pool.defvjp(
    lambda x, kernel, strides: (_average_pool(x, kernel, strides), x.shape), _average_pool_backward)


def upsample_nearest(carriers: Float[Array, "b n k c"], ct_size: int, window: int) -> Float[Array, "b n t c"]:
    """Repeat each window's ct_size × ct_size carrier tokens over its window × window tokens."""
    near = np.arange(window) * ct_size // window
    return carriers[:, :, (near[:, None] * ct_size + near[None, :]).reshape(-1)]


def with_carriers(
    z: Float[Array, "b n s c"], carriers: Float[Array, "b n k c"], kernels: str
) -> Float[Array, "b n s c"]:
    """The windows' tokens with these carrier tokens, which come first, in place of those that are there."""
    if chosen(kernels, z.dtype, ""):
        return jax.lax.dynamic_update_slice(z, carriers, (0, 0, 0, 0))  # concatenation takes XLA for GPUs twice as long
    return jnp.concatenate([carriers, z[:, :, carriers.shape[2] :]], axis=2)


class CarrierInit(nn.Module):
    """First carrier tokens of a stage: depthwise convolution of the map, then average pooling."""

    width: int
    window: int
    ct_size: int
    dtype: Any
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b n k c"]:
        x = Conv3x3(self.width, self.dtype, groups=self.width, kernels=self.kernels, name="conv")(x)
        return partition(average_pool(x, self.window, self.ct_size), self.ct_size)


class HATBlock(nn.Module):
    """One block: carrier tokens attend over the image, then each window attends with its carrier tokens.

    The tokens of a window are its `leading` carrier tokens, of which there may be none, and then those of the map.

    `propagate`: after the block, add each window's carrier tokens to its tokens, upsampled.
    Drop path drops a branch for each image (carrier tokens) or each window of each image
    (windows), as the official code does: `kept` has the factors of the attention branch and of the MLP's, of each
    image the carrier tokens' first, if there are any, and then the windows'. `terms` has what the block's position
    networks give, where that has been computed already: by name, as `HATStage.position_terms` says.
    """

    width: int
    heads: int
    window: int
    ct_size: int
    mlp_ratio: float
    qkv_bias: bool
    layer_scale: float | None
    propagate: bool
    drop_rate: float
    attn_drop_rate: float
    dtype: Any
    kernels: str = "auto"

    def attention(self, name: str) -> Attention:
        return Attention(self.width, self.heads, self.qkv_bias, self.drop_rate, self.attn_drop_rate, self.dtype,
                         self.kernels, name=name)

    def mlp(self, name: str) -> MLP:
        hidden = int(self.width * self.mlp_ratio)
        return MLP(self.width, hidden, self.drop_rate, self.dtype, self.kernels, name=name)

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(1e-5, self.dtype, self.kernels, name=name)

    def gamma(self, name: str) -> Array | None:
        return layer_scale(self, name, self.layer_scale, self.width)

    def position(self, name: str, terms: PositionTerms, rows: int, cols: int) -> Float[Array, "t c"]:
        return terms[name] if name in terms else AbsolutePosition(self.width, name=name)(rows, cols)

    @nn.compact
    def __call__(
        self, z: Float[Array, "b n s c"], leading: int, rows: int, cols: int, train: bool,
        terms: PositionTerms | None = None, kept: Float[Array, "2 b _"] | None = None,
    ) -> Float[Array, "b n s c"]:
        terms = terms or {}
        kept_attention, kept_mlp = (None, None) if kept is None else kept[..., bool(leading) :]
        carriers = z[:, :, :leading]
        position = self.position("position", terms, self.window, self.window).astype(self.dtype)
        z = z + jnp.pad(position, ((leading, 0), (0, 0)))[None, None]
        if leading:
            gamma1 = self.gamma("gamma1")
            carriers = self.attend_over_image(
                carriers, rows, cols, gamma1, train, terms, (None, None) if kept is None else kept[..., 0])
            z = with_carriers(z, carriers, self.kernels)

        y = rearrange(self.norm("norm1")(z), "b n t c -> (b n) t c")
        y = self.attention("attention")(
            y, self.window, self.window, leading, train, self.gamma("gamma3"), terms.get("attention"))
        y = y.reshape(z.shape)
        z = z + drop_path(y, kept_attention)
        y = self.mlp("mlp")(self.norm("norm2")(z), train, self.gamma("gamma4"))
        z = z + drop_path(y, kept_mlp)
        if leading and self.propagate:
            carriers, x = z[:, :, :leading], z[:, :, leading:]
            x = x + scaled(upsample_nearest(carriers, self.ct_size, self.window), gamma1)
            z = jnp.concatenate([carriers, x], axis=2)
        return z

    def attend_over_image(
        self, carriers: Float[Array, "b n k c"], rows: int, cols: int, gamma1: Array | None, train: bool,
        terms: PositionTerms, kept: Any,
    ) -> Float[Array, "b n k c"]:
        """Full attention and MLP among all carrier tokens of an image, in raster order."""
        kept_attention, kept_mlp = kept
        high, wide = rows * self.ct_size, cols * self.ct_size
        c = unpartition(carriers, self.ct_size, rows, cols).reshape(-1, high * wide, self.width)
        position = self.position("carrier_position", terms, high, wide)
        c = c + position.astype(self.dtype)[None]
        y = self.attention("carrier_attention")(
            self.norm("carrier_norm1")(c), high, wide, 0, train, gamma1, terms.get("carrier_attention"))
        c = c + drop_path(y, kept_attention)
        y = self.mlp("carrier_mlp")(self.norm("carrier_norm2")(c), train, self.gamma("gamma2"))
        c = c + drop_path(y, kept_mlp)
        return partition(c.reshape(-1, high, wide, self.width), self.ct_size)


class HATStage(nn.Module):
    """HAT blocks, one for each drop-path rate, on a map of any height and width.

    The map is padded with zeros at the right and bottom to whole windows, and cropped at the end.
    With `hat`, the windows have carrier tokens wherever the map has more than one window. Their
    parameters exist in any case: initialising runs the carrier branch on a single window too, so
    that the parameters do not depend on the size of the image that initialised them.
    `remat`: the blocks are computed again in the backward pass.
    """

    width: int
    heads: int
    window: int
    ct_size: int
    mlp_ratio: float
    qkv_bias: bool
    layer_scale: float | None
    hat: bool
    do_propagation: bool
    drop_path_rates: tuple[float, ...]
    drop_rate: float
    attn_drop_rate: float
    dtype: Any
    remat: bool = False
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        height, width = x.shape[1:3]
        rows, cols = -(-height // self.window), -(-width // self.window)
        x = jnp.pad(x, ((0, 0), (0, rows * self.window - height), (0, cols * self.window - width), (0, 0)))

        z, leading = partition(x, self.window), 0
        if self.hat and (rows * cols > 1 or self.is_initializing()):
            init = CarrierInit(self.width, self.window, self.ct_size, self.dtype, self.kernels, name="carrier_init")
            z, leading = jnp.concatenate([init(x), z], axis=2), self.ct_size**2
        terms = self.position_terms(rows, cols, leading)
        block = nn.remat(HATBlock, static_argnums=(2, 3, 4, 5)) if self.remat else HATBlock
        key = self.make_rng("dropout") if train and any(self.drop_path_rates) else None
        branches = 2, x.shape[0], rows * cols + bool(leading)
        for i, kept in enumerate(drop_paths(key, self.drop_path_rates, branches)):
            last = i == len(self.drop_path_rates) - 1
            z = block(
                width=self.width, heads=self.heads, window=self.window, ct_size=self.ct_size,
                mlp_ratio=self.mlp_ratio, qkv_bias=self.qkv_bias, layer_scale=self.layer_scale,
                propagate=self.do_propagation and last, drop_rate=self.drop_rate, attn_drop_rate=self.attn_drop_rate,
                dtype=self.dtype, kernels=self.kernels, name=f"blocks_{i}",
            )(z, leading, rows, cols, train, terms[i], kept)
        return unpartition(z[:, :, leading:], self.window, rows, cols)[:, :height, :width]

    def position_terms(self, rows: int, cols: int, leading: int) -> list[PositionTerms]:
        """Of each block, computed for all blocks at once, outside of their modules.

        "position" (t, c) and "attention" (heads, k + t, k + t) of windows, "carrier_position" and "carrier_attention"
        of carrier tokens. None of them, so that blocks compute their own, where parameters are not as they should be:
        initialising makes them, and Flax names what is missing or has another shape.
        """
        grids = {"": (self.window, self.window, leading)}
        if leading:
            grids["carrier_"] = (rows * self.ct_size, cols * self.ct_size, 0)
        blocks = [f"blocks_{i}" for i in range(len(self.drop_path_rates))]

        def networks(*path: str) -> list[Mapping[str, Any]]:
            stage = self.variables.get("params", {})
            return [functools.reduce(lambda params, name: params.get(name, {}), path, stage.get(block, {}))
                    for block in blocks]

        terms = {}
        for name, (high, wide, before) in grids.items():
            terms[f"{name}position"] = of_all_blocks(
                AbsolutePosition, self.width, networks(f"{name}position"), high, wide)
            terms[f"{name}attention"] = of_all_blocks(
                RelativePositionBias, self.heads, networks(f"{name}attention", "position_bias"), high, wide, before)
        if any(term is None for term in terms.values()):
            return [{} for _ in blocks]
        return [{name: term[i] for name, term in terms.items()} for i in range(len(blocks))]
