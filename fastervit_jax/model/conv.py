"""Convolutional layers: batch norm, stem, residual conv stage, downsampler.

Axes: b batch, h and w height and width of a map, c channels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fastervit_jax.model.attention import LayerNorm, drop_paths, layer_scale, scaled
from fastervit_jax.ops.batch_norm import activate, batch_norm
from fastervit_jax.ops.conv import conv3x3
from fastervit_jax.ops.kernels import ALIGNED, chosen


class Conv3x3(nn.Module):
    """3×3 convolution that pads one pixel on every side, with PyTorch's initialisation, uniform ±1/sqrt(fan_in).

    `train`: a batch norm on batch statistics follows, which takes the bias out again. Its gradient is
    then zero, and is not computed: what comes out is rounding noise, which Adam turns into steps.

    `channels`: how many the input has; the others are zeros that fill it up, and as many follow the output's.
    """

    features: int
    dtype: Any
    stride: int = 1
    use_bias: bool = True
    groups: int = 1
    kernels: str = "auto"
    channels: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"], train: bool = False) -> Float[Array, "b high wide o"]:
        seen = (self.channels or x.shape[-1]) // self.groups
        more = x.shape[-1] - seen * self.groups
        limit = (9 * seen) ** -0.5

        def uniform(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -limit, limit)

        kernel = self.param("kernel", uniform, (3, 3, seen, self.features))
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, more)))
        x = conv3x3(x.astype(self.dtype), kernel.astype(self.dtype), stride=self.stride, groups=self.groups,
                    kernels=self.kernels)
        if not self.use_bias:
            return x
        bias = self.param("bias", uniform, (self.features,))
        bias = jax.lax.stop_gradient(bias) if train else bias
        return x + jnp.pad(bias, (0, more)).astype(self.dtype)[None, None, None]


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, with PyTorch's running statistics, and an activation: none, relu or gelu.

    In training the batch's statistics normalise and running = 0.9 running + 0.1 batch, where the
    running variance takes the unbiased estimate (flax.linen.BatchNorm takes the biased one). On a
    sharded batch they are the statistics of the global batch; with `group_size`, those of each so many images that
    follow each other, and the running ones take the groups' mean. All of it is float32; the result has
    `dtype`, in training by way of x's.
    `channels`: as Conv3x3's. In training `factor` multiplies the result of each image (drop path).
    """

    epsilon: float
    dtype: Any
    group_size: int = 0
    activation: str = "none"
    channels: int | None = None
    kernels: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, factor: Float[Array, "b"] | None = None
    ) -> Float[Array, "b h w c"]:
        batch, height, wide, filled = x.shape
        width = self.channels or filled

        def fill(vector: Float[Array, "c"]) -> Float[Array, "filled"]:
            return jnp.pad(vector, (0, filled - width))

        scale = self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (width,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (width,), jnp.float32)
        if not train:
            x = x.astype(jnp.float32) - fill(running_mean.value)[None, None, None]
            gain = fill(scale * jax.lax.rsqrt(running_var.value + self.epsilon))
            return activate(x * gain[None, None, None] + fill(bias)[None, None, None], self.activation, self.dtype)

        groups = 1
        if self.group_size:
            if batch % self.group_size:
                raise ValueError(f"bn_group_size={self.group_size}: expected a divisor of the batch of {batch} images, "
                                 "or 0 for the whole batch")
            groups = batch // self.group_size
        x = x.reshape(groups, batch // groups, height, wide, filled)
        count = x.size // filled // groups
        if count < 2:
            raise ValueError(f"batch norm got one value a channel, shape {x.shape[1:]}: training needs at least "
                             "two; use a larger batch or larger images")
        y, mean, var = batch_norm(
            x, fill(scale), fill(bias), fill(running_mean.value),
            None if factor is None else factor.reshape(groups, batch // groups), self.epsilon, self.activation,
            self.kernels)
        mean, var = mean[:, :width], var[:, :width]
        if not self.is_initializing():
            running_mean.value = 0.9 * running_mean.value + 0.1 * mean.mean(0)
            running_var.value = 0.9 * running_var.value + 0.1 * var.mean(0) * (count / (count - 1))
        return y.reshape(batch, height, wide, filled).astype(self.dtype)


class Stem(nn.Module):
    """Two strided convolutions, each with batch norm and ReLU: stride 4."""

    in_dim: int
    dim: int
    dtype: Any
    bn_group_size: int = 0
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w i"], train: bool) -> Float[Array, "b (h+3)//4 (w+3)//4 c"]:
        x = Conv3x3(self.in_dim, self.dtype, stride=2, use_bias=False, kernels=self.kernels, name="conv1")(x)
        x = BatchNorm(1e-4, self.dtype, self.bn_group_size, "relu", kernels=self.kernels, name="norm1")(x, train)
        x = Conv3x3(self.dim, self.dtype, stride=2, use_bias=False, kernels=self.kernels, name="conv2")(x)
        return BatchNorm(1e-4, self.dtype, self.bn_group_size, "relu", kernels=self.kernels, name="norm2")(x, train)


class ConvBlock(nn.Module):
    """x + gamma · BN(conv(GELU(BN(conv(x))))), of `width` channels; more of x are zeros and stay so.

    `kept`: drop path's factor of each image, by which what is added to x is multiplied.
    """

    width: int
    layer_scale: float | None
    dtype: Any
    bn_group_size: int = 0
    kernels: str = "auto"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool, kept: Float[Array, "b"] | None = None
    ) -> Float[Array, "b h w c"]:
        y = Conv3x3(self.width, self.dtype, kernels=self.kernels, channels=self.width, name="conv1")(x, train)
        y = BatchNorm(1e-5, self.dtype, self.bn_group_size, "gelu", self.width, self.kernels, name="norm1")(y, train)
        y = Conv3x3(self.width, self.dtype, kernels=self.kernels, channels=self.width, name="conv2")(y, train)
        y = BatchNorm(1e-5, self.dtype, self.bn_group_size, "none", self.width, self.kernels, name="norm2")(
            y, train, kept)
        gamma = layer_scale(self, "gamma", self.layer_scale, self.width)
        return x + scaled(y, gamma if gamma is None else jnp.pad(gamma, (0, x.shape[-1] - self.width)))


class ConvStage(nn.Module):
    """Residual conv blocks, one for each drop-path rate. `remat`: they are computed again in the backward pass.

    For the GPU, channels are filled up to a multiple of `ops.kernels.ALIGNED` meanwhile: libraries do that for each
    convolution anew.
    """

    width: int
    layer_scale: float | None
    drop_path_rates: tuple[float, ...]
    dtype: Any
    bn_group_size: int = 0
    remat: bool = False
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w c"]:
        more = -self.width % ALIGNED if chosen(self.kernels, self.dtype, "") else 0
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more)))
        block = nn.remat(ConvBlock, static_argnums=(2,)) if self.remat else ConvBlock
        key = self.make_rng("dropout") if train and any(self.drop_path_rates) else None
        for i, kept in enumerate(drop_paths(key, self.drop_path_rates, x.shape[:1])):
            x = block(self.width, self.layer_scale, self.dtype, self.bn_group_size, self.kernels,
                      name=f"blocks_{i}")(x, train, kept)
        return x[..., : self.width]


class Downsample(nn.Module):
    """Layer norm over channels, then a strided convolution to twice the channels: halves height and width."""

    width: int
    dtype: Any
    kernels: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b (h+1)//2 (w+1)//2 2*c"]:
        x = LayerNorm(1e-6, self.dtype, self.kernels, name="norm")(x)
        return Conv3x3(2 * self.width, self.dtype, stride=2, use_bias=False, kernels=self.kernels, name="conv")(x)
