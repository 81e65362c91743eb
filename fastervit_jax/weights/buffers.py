"""The buffers of the official state dict, which hold what can be computed."""

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from fastervit_jax.model.position import AbsolutePosition, RelativePositionBias, relative_coordinates
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.weights.torch_file import StoredArray, WeightsError


def make_buffers(
    config: ModelConfig, side: int, kernels: Mapping[str, StoredArray]
) -> Iterator[tuple[str, StoredArray]]:
    """Official name and values of each buffer of the official model for square images of `side` pixels.

    `kernels` holds the arrays of the model by official name, in PyTorch's layout.
    Raises WeightsError if a stage with carrier tokens has a single window at that size: the official
    model has no place for its carrier parameters then.
    """
    for name in kernels:
        if name.endswith(".running_var"):
            yield name.replace(".running_var", ".num_batches_tracked"), _array((), np.int64, lambda: np.int64(0))
    for stage in (2, 3):
        window, width, heads = config.window_size[stage], config.widths[stage], config.num_heads[stage]
        rows, _ = config.windows(stage, side, side)
        if config.hat[stage] and rows == 1:
            raise WeightsError(
                f"images of {side} pixels are one window of {window} tokens a side in stage {stage}, and there the "
                f"official model has no carrier tokens, though this one has (hat={config.hat}); expected larger "
                "images: give another resolution")
        for number in range(config.depths[stage]):
            block = f"levels.{stage}.blocks.{number}"
            leading = config.ct_size**2 if config.hat[stage] else 0
            yield _absolute(f"{block}.pos_embed", window, width, kernels)
            yield from _relative(f"{block}.attn.pos_emb_funct", window, heads, leading, kernels)
            if config.hat[stage]:
                yield _absolute(f"{block}.hat_pos_embed", rows * config.ct_size, width, kernels)
                yield from _relative(f"{block}.hat_attn.pos_emb_funct", rows * config.ct_size, heads, 0, kernels)


def _array(shape: tuple[int, ...], dtype: type, read: Callable[[], np.ndarray]) -> StoredArray:
    return StoredArray(shape, np.dtype(dtype), read)


def _parameters(prefix: str, kernels: Mapping[str, StoredArray]) -> dict:
    hidden, bias, out = (kernels[f"{prefix}.cpb_mlp.{leaf}"].read() for leaf in ("0.weight", "0.bias", "2.weight"))
    return {"params": {"mlp": {"hidden": {"kernel": hidden.T, "bias": bias}, "out": {"kernel": out.T}}}}


def _absolute(prefix: str, side: int, width: int, kernels: Mapping[str, StoredArray]) -> tuple[str, StoredArray]:
    def read() -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            return np.asarray(AbsolutePosition(width).apply(_parameters(prefix, kernels), side, side))[None]

    return f"{prefix}.relative_bias", _array((1, side**2, width), np.float32, read)


def _relative(
    prefix: str, side: int, heads: int, leading: int, kernels: Mapping[str, StoredArray]
) -> Iterator[tuple[str, StoredArray]]:
    offsets, tokens = 2 * side - 1, side**2

    def bias() -> np.ndarray:
        with jax.default_matmul_precision("highest"):
            parameters = _parameters(prefix, kernels)
            return np.asarray(RelativePositionBias(heads).apply(parameters, side, side, leading))[None]

    def table() -> np.ndarray:
        return relative_coordinates(side, side)[0].reshape(1, offsets, offsets, 2)

    def index() -> np.ndarray:
        return relative_coordinates(side, side)[1].astype(np.int64)

    yield f"{prefix}.relative_coords_table", _array((1, offsets, offsets, 2), np.float32, table)
    yield f"{prefix}.relative_position_index", _array((tokens, tokens), np.int64, index)
    yield f"{prefix}.relative_bias", _array((1, heads, tokens + leading, tokens + leading), np.float32, bias)
