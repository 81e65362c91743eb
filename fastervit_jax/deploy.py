"""A trained model made ready for inference: the same function of images in fewer and cheaper steps.

`deploy` folds into the weights of convolutions and linear layers all that is linear around them: batch norms, the scale
and bias of token layer norms, layer scales, the scale of attention, the last norm. Position terms become tables.
Carrier tokens stay in their windows' order, with the tables of carrier attention permuted to match.

Axes: b batch, h and w height and width of a map, c and d channels, n windows (row-major), t tokens of a window,
k carrier tokens of a window, s = k + t, m carrier tokens of an image (window by window), a heads.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Shaped

from fastervit_jax.model.fastervit import SMALLEST_SIDE, FasterViT
from fastervit_jax.model.hat import average_pool, upsample_nearest
from fastervit_jax.model.position import AbsolutePosition, RelativePositionBias
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.ops.attention import attention
from fastervit_jax.ops.conv import conv3x3
from fastervit_jax.ops.gelu import gelu
from fastervit_jax.ops.kernels import ALIGNED
from fastervit_jax.ops.mlp import linear as product
from fastervit_jax.ops.mlp import mlp
from fastervit_jax.ops.norm import layer_norm
from fastervit_jax.weights.pretrained import check_variables

Tree = Mapping[str, Any]
"""Nested dicts of arrays."""
NEVER = -1e30
"""The bias of a token that is not to be seen."""


# The network


def conv(
    p: Tree, x: Float[Array, "b h w c"], stride: int = 1, groups: int = 1, kernels: str = "xla"
) -> Float[Array, "b high wide d"]:
    """3×3 convolution that pads one pixel on every side."""
    kernel = p["kernel"]  # as cuDNN takes them: out, height, width, in
    x = conv3x3(x.astype(kernel.dtype), kernel, stride=stride, groups=groups, layout="OHWI", kernels=kernels)
    return x + p["bias"][None, None, None] if "bias" in p else x


def linear(p: Tree, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
    """x times the kernel, plus the bias, in their dtype."""
    return product(x.astype(p["kernel"].dtype), (p["kernel"], p["bias"]))


def normalise(x: Float[Array, "*b c"], epsilon: float, kernels: str) -> Float[Array, "*b c"]:
    """Layer norm over channels without scale and bias."""
    return layer_norm(x, jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1]), epsilon, kernels=kernels)


def affine(p: Tree, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """A scale and a bias for each channel."""
    scale, bias = (p[name].reshape((1,) * (x.ndim - 1) + (-1,)) for name in ("scale", "bias"))
    return x * scale + bias


def attend(p: Tree, x: Float[Array, "b t c"], bias: Float[Array, "a t t"], kernels: str) -> Float[Array, "b t c"]:
    """x + attention(norm(x)); q's weights have the scale in them."""
    qkv = linear(p["qkv"], normalise(x, 1e-5, kernels))
    return x + linear(p["out"], attention(qkv, bias, scale=1.0, kernels=kernels))


def mlp_block(p: Tree, x: Float[Array, "b t c"], kernels: str) -> Float[Array, "b t c"]:
    """x + MLP(norm(x))."""
    hidden, out = ((p[name]["kernel"], p[name]["bias"]) for name in ("hidden", "out"))
    return x + mlp(normalise(x, 1e-5, kernels), hidden, out, kernels=kernels)


def conv_block(p: Tree, x: Float[Array, "b h w c"], kernels: str) -> Float[Array, "b h w c"]:
    """x + conv(GELU(conv(x)))."""
    return x + conv(p["conv2"], gelu(conv(p["conv1"], x), kernels=kernels))


def carrier_tables(networks: Tree, rows: int, cols: int, ct_size: int) -> dict[str, Array]:
    """Position terms of the carrier tokens of rows × cols windows, in window order: (m, c) and (heads, m, m), float32.

    `networks` are the parameters of the networks that compute them.
    """
    high, wide = rows * ct_size, cols * ct_size
    order = rearrange(np.arange(high * wide), "(i p j q) -> (i j p q)", i=rows, p=ct_size, q=ct_size)
    return {"position": _position(networks["position"], high, wide)[order],
            "bias": _bias(networks["bias"], high, wide, 0)[:, order[:, None], order[None, :]]}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _position(network: Tree, rows: int, cols: int) -> Float[Array, "n c"]:
    width = network["mlp"]["out"]["kernel"].shape[-1]
    return AbsolutePosition(width).apply({"params": network}, rows, cols)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _bias(network: Tree, rows: int, cols: int, leading: int) -> Float[Array, "a n n"]:
    heads = network["mlp"]["out"]["kernel"].shape[-1]
    return RelativePositionBias(heads).apply({"params": network}, rows, cols, leading)


def hat_block(
    p: Tree, z: Float[Array, "n s c"], tokens: int, k: int, tables: Tree | None, kernels: str
) -> Float[Array, "n s c"]:
    """One block on the windows of all images, n of them, with their k carrier tokens first (k may be 0).

    A window has so many tokens, carriers included; what follows in `z` fills it up, and no token sees it.

    `tables` are those of the images' carrier tokens.
    """
    position, bias = p["position"], p["bias"]
    first, more = len(position) - tokens, z.shape[1] - tokens  # no carriers, though there are parameters for them
    position = jnp.pad(position[first:], ((0, more), (0, 0)))
    bias = jnp.pad(bias[:, first:, first:], ((0, 0), (0, more), (0, more)), constant_values=NEVER)
    x = z + position[None]
    if k:
        m = tables["position"].shape[0]
        carriers = z[:, :k].reshape(-1, m, z.shape[-1]) + tables["position"][None].astype(z.dtype)
        carriers = attend(p["carrier_attention"], carriers, tables["bias"], kernels)
        carriers = mlp_block(p["carrier_mlp"], carriers, kernels)
        x = jax.lax.dynamic_update_slice(x, carriers.reshape(-1, k, z.shape[-1]), (0, 0, 0))  # in place
    return mlp_block(p["mlp"], attend(p["attention"], x, bias, kernels), kernels)


def hat_stage(
    p: Tree, x: Float[Array, "b h w c"], stage: int, config: ModelConfig, stored: tuple[int, int], kernels: str
) -> Float[Array, "b h w c"]:
    """Stage 2 or 3; `stored` is the grid of windows that the tables in `p` are for."""
    height, width = x.shape[1:3]
    window, ct_size = config.window_size[stage], config.ct_size
    rows, cols = -(-height // window), -(-width // window)
    x = jnp.pad(x, ((0, 0), (0, rows * window - height), (0, cols * window - width), (0, 0)))

    z = rearrange(x, "b (i p) (j q) c -> (b i j) (p q) c", p=window, q=window)
    k = ct_size**2 if config.hat[stage] and rows * cols > 1 else 0
    if k:
        carriers = average_pool(conv(p["carrier_init"], x, groups=x.shape[-1]), window, ct_size)
        carriers = rearrange(carriers, "b (i p) (j q) c -> (b i j) (p q) c", p=ct_size, q=ct_size)
        z = jnp.concatenate([carriers, z], axis=1)
    tokens = z.shape[1]
    if len(z) * tokens % ALIGNED:  # of few windows: XLA would pad their rows before each product, and cut them after it
        z = jnp.pad(z, ((0, 0), (0, -tokens % ALIGNED), (0, 0)))
    for i in range(config.depths[stage]):
        block = p[f"blocks_{i}"]
        tables = block.get("carrier_tables")
        if k and (rows, cols) != stored:
            tables = carrier_tables(block["carrier_networks"], rows, cols, ct_size)
        z = hat_block(block, z, tokens, k, tables, kernels)
    x = z[:, k:tokens]
    if k and config.do_propagation:
        carriers = upsample_nearest(z[None, :, :k], ct_size, window)[0]
        x = x + (carriers * p["gamma1"][None, None] if "gamma1" in p else carriers)
    x = rearrange(x, "(b i j) (p q) c -> b (i p) (j q) c", i=rows, j=cols, p=window, q=window)
    return x[:, :height, :width]


@dataclasses.dataclass(frozen=True)
class DeployedFasterViT:
    """What `deploy` makes of a FasterViT, to be applied to the variables that `deploy` returns with it.

    Images are those that the model takes, of any size; those of `image_size` find all their position terms stored.
    """

    config: ModelConfig
    image_size: tuple[int, int]
    """Height and width in pixels."""
    kernels: str = "auto"
    """As FasterViT's."""

    def apply(self, variables: Tree, images: Shaped[Any, "..."], method: str | None = None) -> Any:
        """Logits (b, num_classes) in float32 (without a head the pooled features), or, with method="features", the four
        stages' maps as FasterViT.features returns them.

        Raises what FasterViT does for images that do not fit, ValueError for variables or a method that it has not.
        """
        if set(variables) != {"deployed"}:
            raise ValueError(f"variables have the collections {sorted(variables)}, expected ['deployed']: give those "
                             "that deploy returned with this model")
        if method not in (None, "features"):
            raise ValueError(f"method={method!r}: expected None for the logits, or 'features'")
        maps = self._features(variables["deployed"], images)
        return maps if method else self._head(variables["deployed"]["head"], maps[-1])

    def _features(self, p: Tree, images: Shaped[Any, "..."]) -> tuple[Float[Array, "_ _ _ _"], ...]:
        images = jnp.asarray(images)
        FasterViT(self.config)._check_images(images)
        x = jax.nn.relu(conv(p["stem"]["conv1"], images, stride=2, kernels=self.kernels))
        x = jax.nn.relu(conv(p["stem"]["conv2"], x, stride=2))
        maps = []
        for i in range(4):
            if i > 0:
                down = p[f"downsamples_{i - 1}"]
                norm = down["norm"]
                x = layer_norm(maps[-1], norm["scale"], norm["bias"], 1e-6, kernels=self.kernels)
                x = conv(down["conv"], x, stride=2)
            if i < 2:
                for block in range(self.config.depths[i]):
                    x = conv_block(p[f"stages_{i}"][f"blocks_{block}"], x, self.kernels)
            else:
                stored = self.config.windows(i, *self.image_size)
                x = hat_stage(p[f"stages_{i}"], x, i, self.config, stored, self.kernels)
            maps.append(x[..., : self.config.widths[i]])
        return tuple(maps)

    def _head(self, p: Tree, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        x = x.astype(jnp.float32)
        x = normalise(x, 1e-6, "xla") if self.config.layer_norm_last else x
        x = x.mean((1, 2))
        return linear(p, x) if self.config.num_classes else affine(p, x)


# Folding: NumPy in float64, rounded once


def deploy(
    model: FasterViT, variables: Tree, image_size: int | tuple[int, int] | None = None, dtype: Any = None
) -> tuple[DeployedFasterViT, dict[str, Any]]:
    """The same function in eval mode, fused for inference: a model and its variables.

        fast_model, fast_variables = deploy(model, variables, dtype="bfloat16")
        logits = jax.jit(fast_model.apply)(fast_variables, images)

    Args:
      image_size: height and width in pixels, or the side of square images, 224 by default. Position terms of carrier
        tokens are stored for it; for other sizes the program computes them, from parameters that are kept.
      dtype: of the computation and of the weights stored for it; the model config's by default. Position tables, the
        head and the downsamplers' norms stay float32.

    Raises ValueError for variables that are not the model's, image sizes below 32 pixels and unknown dtypes.
    """
    config = model.config if dtype is None else dataclasses.replace(model.config, dtype=dtype)
    size = 224 if image_size is None else image_size
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"image_size={image_size!r}: expected a height and a width of at least {SMALLEST_SIDE} pixels")
    if set(variables) != {"params", "batch_stats"}:
        raise ValueError(f"variables have the collections {sorted(variables)}, expected ['batch_stats', 'params']: "
                         "give those of model.init or from_pretrained")
    check_variables(config, variables)
    params, stats, dtype = variables["params"], variables["batch_stats"], config.dtype

    p = {"stem": _convs_norms(params["stem"], stats["stem"], 1e-4, dtype, of_images=True)}
    for i in range(4):
        stage = f"stages_{i}"
        if i > 0:
            down = params[f"downsamples_{i - 1}"]
            p[f"downsamples_{i - 1}"] = {
                "norm": _cast(down["norm"], "float32"), "conv": _cast(_conv(down["conv"]), dtype)}
        p[stage] = {}
        for block in [f"blocks_{j}" for j in range(config.depths[i])]:
            if i < 2:
                p[stage][block] = _convs_norms(params[stage][block], stats[stage][block], 1e-5, dtype)
            else:
                p[stage][block] = _hat_block(params[stage][block], i, config, config.windows(i, height, width))
        if config.hat[i]:
            p[stage]["carrier_init"] = _cast(_conv(params[stage]["carrier_init"]["conv"]), dtype)
            if config.do_propagation and config.layer_scale is not None:
                p[stage]["gamma1"] = _cast(params[stage][block]["gamma1"], dtype)
    p["head"] = _head(params, stats, config)
    return DeployedFasterViT(config, (height, width), model.kernels), {"deployed": p}


def _wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def _cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32), dtype), tree)


def _conv(p: Tree) -> Tree:
    return {**p, "kernel": rearrange(np.asarray(p["kernel"]), "h w i o -> o h w i")}


def _factor(gamma: np.ndarray | None) -> np.ndarray | float:
    return 1.0 if gamma is None else gamma


def _convs_norms(p: Tree, stats: Tree, epsilon: float, dtype: str, of_images: bool = False) -> Tree:
    """BN(conv1(x)) and gamma · BN(conv2(x)) as two convolutions, of a stem or a block.

    All channels but those of images are filled up to a multiple of ALIGNED, with zeros that stay zeros.
    """
    first = _conv_norm(p["conv1"], p["norm1"], stats["norm1"], epsilon, None)
    second = _conv_norm(p["conv2"], p["norm2"], stats["norm2"], epsilon, p.get("gamma"))
    return _cast({"conv1": _aligned(first, inputs=not of_images), "conv2": _aligned(second)}, dtype)


def _aligned(conv: Tree, inputs: bool = True) -> Tree:
    outputs, _, _, channels = conv["kernel"].shape
    more, before = -outputs % ALIGNED, -channels % ALIGNED if inputs else 0
    return {"kernel": np.pad(conv["kernel"], ((0, more), (0, 0), (0, 0), (0, before))),
            "bias": np.pad(conv["bias"], (0, more))}


def _conv_norm(conv: Tree, norm: Tree, stats: Tree, epsilon: float, gamma: Any) -> Tree:
    """gamma · BN(conv(x)) as one convolution."""
    conv, norm, stats, gamma = _wide((conv, norm, stats, gamma))
    gain = norm["scale"] / np.sqrt(stats["var"] + epsilon) * _factor(gamma)
    bias = (conv.get("bias", 0.0) - stats["mean"]) * gain + norm["bias"] * _factor(gamma)
    return _conv({"kernel": conv["kernel"] * gain, "bias": bias})


def _linear(p: Tree, before: Tree | None = None, after: np.ndarray | float = 1.0) -> Tree:
    """after · linear(scale · x + bias) as one linear layer, in which `before` has scale and bias."""
    kernel, bias = p["kernel"], p.get("bias", 0.0)
    if before is not None:
        bias = bias + before["bias"] @ kernel
        kernel = before["scale"][:, None] * kernel
    return {"kernel": kernel * after, "bias": np.broadcast_to(bias * after, kernel.shape[1:])}


def _attention(p: Tree, norm: Tree, gamma: np.ndarray | None, heads: int) -> Tree:
    """gamma · Attention(LN(x)) with nothing left but a normalisation, products and a softmax."""
    width = p["out"]["kernel"].shape[0]
    scale = np.repeat([(width // heads) ** -0.5, 1.0, 1.0], width)
    return {"qkv": _linear(p["qkv"], norm, scale), "out": _linear(p["out"], after=_factor(gamma))}


def _mlp(p: Tree, norm: Tree, gamma: np.ndarray | None) -> Tree:
    return {"hidden": _linear(p["hidden"], norm), "out": _linear(p["out"], after=_factor(gamma))}


def _hat_block(p: Tree, stage: int, config: ModelConfig, grid: tuple[int, int]) -> Tree:
    heads, window, hat = config.num_heads[stage], config.window_size[stage], config.hat[stage]
    wide = _wide(p)
    products = {"attention": _attention(wide["attention"], wide["norm1"], wide.get("gamma3"), heads),
                "mlp": _mlp(wide["mlp"], wide["norm2"], wide.get("gamma4"))}
    if hat:
        products["carrier_attention"] = _attention(
            wide["carrier_attention"], wide["carrier_norm1"], wide.get("gamma1"), heads)
        products["carrier_mlp"] = _mlp(wide["carrier_mlp"], wide["carrier_norm2"], wide.get("gamma2"))
    block = _cast(products, config.dtype)
    leading = config.ct_size**2 if hat else 0
    position, bias = _cast((p["position"], p["attention"]["position_bias"]), "float32")
    with jax.default_matmul_precision("highest"):
        position = _position(position, window, window).astype(config.dtype)
        block["position"] = jnp.pad(position, ((leading, 0), (0, 0)))
        block["bias"] = _bias(bias, window, window, leading)
        if hat:
            networks = {"position": p["carrier_position"], "bias": p["carrier_attention"]["position_bias"]}
            block["carrier_networks"] = networks = _cast(networks, "float32")
            if grid != (1, 1):
                block["carrier_tables"] = carrier_tables(networks, *grid, config.ct_size)
    return block


def _head(params: Tree, stats: Tree, config: ModelConfig) -> Tree:
    """The norm before the pooling and the linear layer after it as one linear layer, as both are linear in each map."""
    norm = _wide(params["norm"])
    if not config.layer_norm_last:
        mean, var = (np.asarray(stats["norm"][name], np.float64) for name in ("mean", "var"))
        scale = norm["scale"] / np.sqrt(var + 1e-5)
        norm = {"scale": scale, "bias": norm["bias"] - mean * scale}
    return _cast(_linear(_wide(params["head"]), norm) if config.num_classes else norm, "float32")
