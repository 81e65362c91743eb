"""FasterViT: stem, two convolutional stages, two stages of hierarchical attention, head.

Hatamizadeh et al., FasterViT: Fast Vision Transformers with Hierarchical Attention, ICLR 2024
(arXiv 2306.06189).

Axes: b batch, h and w height and width of an image, c channels.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from fastervit_jax.model.attention import LayerNorm, dense
from fastervit_jax.model.conv import BatchNorm, ConvStage, Downsample, Stem
from fastervit_jax.model.hat import HATStage
from fastervit_jax.model.variants import ModelConfig, check_keywords, get_variant

SMALLEST_SIDE = 32
"""Pixels: the stride of the last stage."""


class FasterViT(nn.Module):
    """FasterViT as a flax.linen module; `create_model` makes one from a registered name.

    Images are float (b, h, w, in_chans), normalised, of any height and width of at least 32 pixels,
    which may change from call to call: `variables` (collections `params` and `batch_stats`) fit all.

    With `train=True`, batch norms use the batch's statistics (apply with `mutable=["batch_stats"]`
    to keep the running ones), and drop path and dropout draw from the rng `dropout`.

    `init` makes all parameters whatever the image; the output of `init_with_output` differs from `apply`'s
    where a stage has `hat` set and a single window.

    `logits, captured = model.apply(variables, images, mutable=["attention"])` gives the weights of every attention
    too, float32: captured["attention"]["stages_2"]["blocks_0"]["attention"]["weights"] is (b · windows, heads, tokens,
    tokens), where a window's carrier tokens come first. Where there are carrier tokens, "carrier_attention" beside
    the second "attention" is (b, heads, carriers, carriers), in raster order over the image.

    Three fields change how the function is computed, not which one it is. `remat`: for each stage, whether its
    blocks are computed again in the backward pass, to save memory. `bn_group_size`: the images, following each other,
    that batch norms take their statistics over; 0 for the whole batch, which on a sharded batch is that of all devices.
    `kernels`: "auto" for our own kernels where they are the faster, which is on GPUs, "xla" for none of them.

    Raises ValueError for images of the wrong rank, channel count or size, TypeError for images that
    are not floating point.
    """

    config: ModelConfig
    remat: tuple[bool, bool, bool, bool] = (False, False, False, False)
    bn_group_size: int = 0
    kernels: str = "auto"

    def setup(self):
        c = self.config
        rates = np.linspace(0.0, c.drop_path_rate, sum(c.depths)).tolist()
        rates = [tuple(rates[sum(c.depths[:i]) : sum(c.depths[: i + 1])]) for i in range(4)]
        self.stem = Stem(c.in_dim, c.dim, c.dtype, self.bn_group_size, self.kernels)
        self.stages = [
            *(
                ConvStage(c.widths[i], c.layer_scale_conv, rates[i], c.dtype, self.bn_group_size, self.remat[i],
                          self.kernels)
                for i in (0, 1)
            ),
            *(
                HATStage(
                    width=c.widths[i], heads=c.num_heads[i], window=c.window_size[i], ct_size=c.ct_size,
                    mlp_ratio=c.mlp_ratio, qkv_bias=c.qkv_bias, layer_scale=c.layer_scale, hat=c.hat[i],
                    do_propagation=c.do_propagation, drop_path_rates=rates[i], drop_rate=c.drop_rate,
                    attn_drop_rate=c.attn_drop_rate, dtype=c.dtype, remat=self.remat[i], kernels=self.kernels,
                )
                for i in (2, 3)
            ),
        ]
        self.downsamples = [Downsample(c.widths[i], c.dtype, self.kernels) for i in (0, 1, 2)]
        if c.layer_norm_last:
            self.norm = LayerNorm(1e-6, jnp.float32)
        else:
            self.norm = BatchNorm(1e-5, jnp.float32, self.bn_group_size, kernels=self.kernels)
        if c.num_classes:
            self.head = dense(c.num_classes, dtype=jnp.float32)

    @property
    def feature_widths(self) -> tuple[int, int, int, int]:
        """Channels of the maps that `features` returns."""
        return self.config.widths

    @property
    def feature_strides(self) -> tuple[int, int, int, int]:
        """Pixels of the image for each cell of the maps that `features` returns; sides are rounded up."""
        return (4, 8, 16, 32)

    def features(self, images: Shaped[Any, "..."], train: bool = False) -> tuple[Float[Array, "_ _ _ _"], ...]:
        """The maps of the four stages, (b, ⌈h / stride⌉, ⌈w / stride⌉, width), before the downsamplers.

        For detection and segmentation: `model.apply(variables, images, method="features")`.
        """
        images = jnp.asarray(images)
        self._check_images(images)
        x = self.stem(images.astype(self.config.dtype), train)
        maps = []
        for i, stage in enumerate(self.stages):
            if i > 0:
                x = self.downsamples[i - 1](x)
            x = stage(x, train)
            maps.append(x)
        return tuple(maps)

    def __call__(self, images: Shaped[Any, "..."], train: bool = False) -> Float[Array, "_ _"]:
        """Logits (b, num_classes) in float32; with num_classes=0 the pooled features (b, 8 dim)."""
        return self.from_stage(self.features(images, train)[-1], 3, train)

    def from_stage(self, x: Float[Array, "_ _ _ _"], stage: int, train: bool = False) -> Float[Array, "_ _"]:
        """What the model returns, from the map that `features` gave for a stage, 0 to 3: the rest of the network."""
        for i in range(stage + 1, 4):
            x = self.stages[i](self.downsamples[i - 1](x), train)
        x = self.norm(x) if self.config.layer_norm_last else self.norm(x, train)
        x = x.mean((1, 2))
        return self.head(x) if self.config.num_classes else x

    def _check_images(self, images: Array) -> None:
        channels = self.config.in_chans
        expected = f"expected float (batch, height, width, {channels})"
        if images.ndim != 4:
            hint = "; add a batch axis: images[None]" if images.ndim == 3 else ""
            raise ValueError(f"images have shape {images.shape}, rank {images.ndim}: {expected}{hint}")
        if images.shape[3] != channels:
            if images.shape[1] == channels:
                hint = "channels last: images.transpose(0, 2, 3, 1)"
            else:
                hint = f"or create the model with in_chans={images.shape[3]}"
            raise ValueError(f"images have shape {images.shape}, {images.shape[3]} channels: {expected}, {hint}")
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(f"images have dtype {images.dtype}: {expected}; scale pixels to floats and normalise them")
        if min(images.shape[1:3]) < SMALLEST_SIDE:
            raise ValueError(f"images have shape {images.shape}: {expected}, each side at least {SMALLEST_SIDE} "
                             "pixels; resize or pad them")


def create_model(name: str, **changes: Any) -> FasterViT:
    """The registered model `name`, with any field of `ModelConfig` changed.

        model = create_model("faster_vit_0_224", num_classes=10, ct_size=1)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))

    Raises ValueError for an unknown name (with the nearest ones) or values that fit no model,
    TypeError for a keyword that is no field of `ModelConfig`.
    """
    check_keywords("create_model", changes)
    return FasterViT(dataclasses.replace(get_variant(name).config, **changes))
