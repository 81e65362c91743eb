"""What describes a FasterViT, and the one table of published variants."""

import dataclasses
import difflib
import fnmatch
import math
import numbers
from collections.abc import Mapping
from typing import Any, no_type_check

import jax.numpy as jnp


@no_type_check  # it checks its fields itself, in words for users
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of a FasterViT. Four numbers in a tuple are one for each stage.

    Stages 0 and 1 are convolutional, stages 2 and 3 attend within windows. The entries that
    `num_heads`, `window_size` and `hat` have for stages 0 and 1 keep the official layout and have no effect.
    Image size is no part of it: grids of windows come from each input's own shape.

    Raises ValueError, naming the field, its value and what is expected, for values that fit no model.
    """

    dim: int
    """Channels of stage 0; each later stage has twice as many as the one before."""
    in_dim: int
    """Channels between the stem's two convolutions."""
    depths: tuple[int, ...]
    """Blocks of each stage."""
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    """Attention heads of each stage."""
    window_size: tuple[int, ...] = (7, 7, 7, 7)
    """Side of the windows of each stage, in tokens."""
    ct_size: int = 2
    """A window has ct_size × ct_size carrier tokens."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLPs over their width."""
    hat: tuple[bool, ...] = (False, False, True, False)
    """Which stages have carrier tokens (where their map has more than one window)."""
    do_propagation: bool = False
    """Add the carrier tokens to their windows at the end of each stage that has them."""
    layer_scale: float | None = None
    """Initial value of the factors on the residual branches of HAT blocks; None: no factors."""
    layer_scale_conv: float | None = None
    """The same for convolutional blocks."""
    layer_norm_last: bool = False
    """Layer norm over channels, not batch norm, before the head."""
    qkv_bias: bool = True
    in_chans: int = 3
    """Channels of the images."""
    num_classes: int = 1000
    """Width of the head; 0: no head, the model returns pooled features."""
    drop_path_rate: float = 0.2
    """Drop-path rate of the last block; it grows linearly from 0 over all blocks."""
    drop_rate: float = 0.0
    """Dropout after the linear layers of attention outputs and MLPs."""
    attn_drop_rate: float = 0.0
    """Dropout of attention weights."""
    dtype: Any = "float32"
    """Dtype of the computation. Parameters, norm statistics, softmax and logits are float32 always."""

    def __post_init__(self):
        for name in ("depths", "num_heads", "window_size", "hat"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or len(value) != 4:
                raise ValueError(f"{name}={value!r}: expected a list or tuple of 4 values, one for each stage")
            object.__setattr__(self, name, tuple(value))
        for name in ("dim", "in_dim", "ct_size", "in_chans"):
            self._check(name, getattr(self, name), int, "a whole number of at least 1", lambda v: v >= 1)
        self._check("num_classes", self.num_classes, int, "a whole number, 0 for no head", lambda v: v >= 0)
        for name in ("depths", "num_heads", "window_size"):
            for value in getattr(self, name):
                self._check(name, value, int, "whole numbers of at least 1", lambda v: v >= 1)
        for value in self.hat:
            if not isinstance(value, bool):
                raise ValueError(f"hat={self.hat!r}: expected 4 values, each True or False")
        if self.hat[0] or self.hat[1]:
            raise ValueError(f"hat={self.hat!r}: stages 0 and 1 are convolutional and cannot have carrier tokens; "
                             "expected (False, False, ..., ...)")
        for name in ("qkv_bias", "do_propagation", "layer_norm_last"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: expected True or False")
        self._check("mlp_ratio", self.mlp_ratio, float, f"a number of at least 1 / {self.widths[2]}, stage 2's width",
                    lambda v: v * self.widths[2] >= 1)
        for name in ("drop_path_rate", "drop_rate", "attn_drop_rate"):
            self._check(name, getattr(self, name), float, "a rate in [0, 1)", lambda v: 0 <= v < 1)
        for name in ("layer_scale", "layer_scale_conv"):
            if getattr(self, name) is not None:
                self._check(name, getattr(self, name), float, "a number, or None for no layer scale", lambda v: True)
        for stage in (2, 3):
            width, heads, window = self.widths[stage], self.num_heads[stage], self.window_size[stage]
            if width % heads:
                raise ValueError(f"num_heads={self.num_heads!r}: {heads} heads do not divide stage {stage}'s width of "
                                 f"{width} (= {2**stage} · dim); choose a divisor of {width} or another dim")
            if self.hat[stage] and self.ct_size > window:
                raise ValueError(f"ct_size={self.ct_size}: more carrier tokens a side than stage {stage}'s window of "
                                 f"{window} tokens (window_size={self.window_size!r}); expected ct_size ≤ {window}")
        for dtype in ("float32", "bfloat16", "float16"):
            if self.dtype in (dtype, jnp.dtype(dtype), jnp.dtype(dtype).type, getattr(jnp, dtype)):
                object.__setattr__(self, "dtype", dtype)
                break
        else:
            raise ValueError(f"dtype={self.dtype!r}: expected 'float32', 'bfloat16' or 'float16'")

    def _check(self, name: str, value: Any, kind: type, expected: str, valid: Any) -> None:
        accepted = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, accepted) or not (abs(value) < 2**31 and valid(value)):
            raise ValueError(f"{name}={getattr(self, name)!r}: expected {expected}")
        if kind is float:
            object.__setattr__(self, name, float(value))

    def windows(self, stage: int, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of windows that images of height × width pixels have in stage 2 or 3."""
        stride, window = 4 * 2**stage, self.window_size[stage]
        return math.ceil(math.ceil(height / stride) / window), math.ceil(math.ceil(width / stride) / window)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of the four stages' maps."""
        return tuple(self.dim * 2**stage for stage in range(4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A published model: its architecture and how it is evaluated."""

    config: ModelConfig
    resolution: int
    """Side of the square images it was trained on."""
    crop_pct: float = 1.0
    """Share of the resized image's side that evaluation keeps."""
    crop_mode: str = "center"
    """'center': resize the short side, then crop; 'squash': resize both sides, then crop."""


def _variant_21k(resolution: int, windows: tuple[int, int], crop_pct: float) -> Variant:
    config = ModelConfig(dim=196, in_dim=64, depths=(3, 3, 12, 5), num_heads=(4, 8, 16, 32),
                         window_size=(7, 7, *windows), hat=(False, False, False, False), do_propagation=True,
                         layer_scale=1e-5, drop_path_rate=0.42)
    return Variant(config=config, resolution=resolution, crop_pct=crop_pct, crop_mode="squash")


def _scaled(dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...], drop_path_rate: float) -> Variant:
    config = ModelConfig(dim=dim, in_dim=64, depths=depths, num_heads=num_heads, do_propagation=True,
                         layer_scale=1e-5, drop_path_rate=drop_path_rate)
    return Variant(config=config, resolution=224)


VARIANTS = {
    "faster_vit_0_224": Variant(
        config=ModelConfig(dim=64, in_dim=64, depths=(2, 3, 6, 5)), resolution=224, crop_pct=0.875),
    "faster_vit_1_224": Variant(config=ModelConfig(dim=80, in_dim=32, depths=(1, 3, 8, 5)), resolution=224),
    "faster_vit_2_224": Variant(config=ModelConfig(dim=96, in_dim=64, depths=(3, 3, 8, 5)), resolution=224),
    "faster_vit_3_224": _scaled(128, (3, 3, 12, 5), (2, 4, 8, 16), 0.3),
    "faster_vit_4_224": _scaled(196, (3, 3, 12, 5), (4, 8, 16, 32), 0.3),
    "faster_vit_5_224": _scaled(320, (3, 3, 12, 5), (4, 8, 16, 32), 0.3),
    "faster_vit_6_224": _scaled(320, (3, 3, 16, 8), (4, 8, 16, 32), 0.5),
    "faster_vit_4_21k_224": _variant_21k(224, (14, 7), 0.95),
    "faster_vit_4_21k_384": _variant_21k(384, (24, 12), 1.0),
    "faster_vit_4_21k_512": _variant_21k(512, (32, 16), 1.0),
    "faster_vit_4_21k_768": _variant_21k(768, (48, 24), 0.93),
    # Every part of the architecture at the smallest useful size, for tests.
    "testing": Variant(
        config=ModelConfig(dim=8, in_dim=8, depths=(1, 1, 2, 1), window_size=(2, 2, 2, 2), ct_size=1,
                           hat=(False, False, True, True), do_propagation=True, layer_scale=0.5,
                           layer_scale_conv=0.5, num_classes=10),
        resolution=64),
}


def _any_res(name: str) -> str:
    """faster_vit_0_224 → faster_vit_0_any_res; faster_vit_4_21k_384 → faster_vit_4_21k_384_any_res."""
    return f"{name}_any_res" if "_21k_" in name else f"{name.removesuffix('_224')}_any_res"


# The official package has a second model for other resolutions; here both names mean the same one.
ANY_RES = {_any_res(name): name for name in VARIANTS if name.startswith("faster_vit_")}


def list_models(pattern: str = "*") -> list[str]:
    """Registered names that match a shell-style pattern, sorted."""
    return sorted(fnmatch.filter([*VARIANTS, *ANY_RES], pattern))


def get_variant(name: str) -> Variant:
    """The variant of a registered name. Raises ValueError naming the nearest ones if there is none."""
    if not isinstance(name, str) or ANY_RES.get(name, name) not in VARIANTS:
        near = difflib.get_close_matches(str(name), list_models("faster_vit_*"), n=3, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown model {name!r}: {hint}list_models() names all {len(list_models())}")
    return VARIANTS[ANY_RES.get(name, name)]


def check_keywords(caller: str, changes: Mapping[str, Any]) -> None:
    """Raises TypeError, naming the known ones, for keywords that are no fields of `ModelConfig`."""
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        hint = "; every model takes images of any size, without a resolution" if "resolution" in unknown else ""
        raise TypeError(f"{caller} got unknown keywords: {', '.join(unknown)}; known are {', '.join(known)}{hint}")
