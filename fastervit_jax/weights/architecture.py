"""The architecture that official weights belong to: from names and shapes, then the file's word, then a variant."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from fastervit_jax.model.variants import ANY_RES, VARIANTS, ModelConfig
from fastervit_jax.weights.torch_file import WeightsError

Shapes = Mapping[str, tuple[int, ...]]

# A model is traced block by block: mere names could keep that going for hours.
MOST_BLOCKS, LEAST_ARRAYS = 500, 10


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model's config and where each part of it comes from."""

    config: ModelConfig
    nearest: str
    """The registered variant that says what the arrays do not."""
    inferred: dict[str, Any]
    """Fields that names and shapes tell."""
    assumed: dict[str, Any]
    """Fields that change the function, which nothing in the file tells."""
    side: int | None
    """Pixels a side of the square images that the file's carrier-token buffers are for, where it has them."""


def infer(shapes: Shapes, *, nearest: str | None = None, stated: Mapping[str, Any] | None = None) -> Architecture:
    """The architecture of weights with these names (official, without prefixes) and shapes.

    Args:
      nearest: the registered variant to take from what shapes do not tell; by default the most similar one.
      stated: fields of `ModelConfig` that the file itself gives, as those that we write do.

    Raises WeightsError if they are no FasterViT's, or contradict each other or what is stated.
    """
    inferred = _from_shapes(shapes)
    if stated:
        try:
            stated = dataclasses.asdict(ModelConfig(**stated))
        except (ValueError, TypeError) as error:
            raise WeightsError(f"the architecture that the file states is no FasterViT's: {error}") from error
    nearest = ANY_RES.get(nearest, nearest)
    if nearest not in VARIANTS:
        nearest = _most_similar(inferred)
    variant = VARIANTS[nearest].config

    fields = {**dataclasses.asdict(variant), **(stated or {})}
    told = {name: value for name, value in inferred.items() if value is not None}
    for name in ("layer_scale", "layer_scale_conv"):  # there or not; an initial value changes nothing that is loaded
        known = ((stated or {}).get(name), getattr(variant, name), 1e-5)
        told[name] = next(value for value in known if value is not None) if inferred[name] else None
    widths = [4 * told["dim"], 8 * told["dim"]]
    if stated and [int(width * stated["mlp_ratio"]) for width in widths] == [
            int(width * told["mlp_ratio"]) for width in widths]:
        told["mlp_ratio"] = stated["mlp_ratio"]  # several ratios give these widths
    told["num_heads"] = _all_stages(inferred["num_heads"], fields["num_heads"])
    window = inferred["window_size"]
    last_two = tuple(w or given for w, given in zip(window, fields["window_size"][2:], strict=True))
    told["window_size"] = _all_stages(last_two, fields["window_size"])
    different = [f"  {name}: stated {stated[name]!r}, by the arrays {told[name]!r}"
                 for name in (stated or {}) if name in told and stated[name] != told[name]]
    if different:
        raise WeightsError("\n".join(["the architecture that the file states is not that of its arrays:", *different]))
    try:
        config = ModelConfig(**{**fields, **told})
    except (ValueError, TypeError) as error:
        raise WeightsError(f"the arrays are of no FasterViT: {error}") from error

    assumed = {}
    if not stated:
        carriers = any(config.hat)
        unknown = {"do_propagation": carriers, "ct_size": carriers and "ct_size" not in told,
                   "window_size": None in window}
        assumed = {name: getattr(config, name) for name, holds in unknown.items() if holds}
    told = {name: getattr(config, name) for name in told if name not in assumed}
    return Architecture(config, nearest, told, assumed, _side(shapes, config))


def _all_stages(last_two: tuple[int, int], fallback: tuple[int, ...]) -> tuple[int, ...]:
    """Entries for stages 2 and 3 with those for 0 and 1, which have no effect, as they are in the fallback."""
    return (*fallback[:2], *last_two)


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        some = ", ".join(sorted(shapes)[:5])
        raise WeightsError(f"no FasterViT: it lacks {name!r}. It has {len(shapes)} arrays{': ' + some if some else ''}"
                           f"{', ...' if len(shapes) > 5 else ''}")
    if len(shape) != axes or 0 in shape:
        raise WeightsError(f"{name} has shape {shape}, expected {axes} axes")
    return shape


def _from_shapes(shapes: Shapes) -> dict[str, Any]:
    """Fields of `ModelConfig`; None for what is not told. `num_heads` and `window_size` for stages 2 and 3 only."""
    in_dim, in_chans, _, _ = _shape(shapes, "patch_embed.conv_down.0.weight", 4)
    dim = _shape(shapes, "patch_embed.conv_down.3.weight", 4)[0]
    blocks: dict[int, set[int]] = {stage: set() for stage in range(4)}
    for name in shapes:
        match = re.match(r"levels\.([0-3])\.blocks\.(\d{1,4})\.", name)
        if match:
            blocks[int(match[1])].add(int(match[2]))
    for stage, numbers in blocks.items():
        if len(numbers) > MOST_BLOCKS:
            raise WeightsError(f"stage {stage} has {len(numbers):,} blocks, expected at most {MOST_BLOCKS}")
        missing = sorted(set(range(max(numbers, default=0) + 1)) - numbers)
        if missing:
            raise WeightsError(f"stage {stage} has blocks {sorted(numbers)}: block {missing[0]} is missing")

    if sum(map(len, blocks.values())) * LEAST_ARRAYS > len(shapes):
        raise WeightsError(f"stages have {[len(numbers) for numbers in blocks.values()]} blocks, but there are only "
                           f"{len(shapes):,} arrays: a block has at least {LEAST_ARRAYS}")
    block = "levels.{}.blocks.0.{}".format
    heads = tuple(_shape(shapes, block(stage, "attn.pos_emb_funct.cpb_mlp.2.weight"), 2)[0] for stage in (2, 3))
    mlp_ratio = _ratio([_shape(shapes, block(stage, "mlp.fc1.weight"), 2) for stage in (2, 3)])
    hat = (False, False, *(block(stage, "hat_attn.qkv.weight") in shapes for stage in (2, 3)))
    windows = tuple(_window(shapes, stage) for stage in (2, 3))
    counts = {_carriers(shapes, stage, window) for stage, window in zip((2, 3), windows, strict=True) if hat[stage]}
    if len(counts - {None}) > 1:
        raise WeightsError(f"stages 2 and 3 have windows with {sorted(counts - {None})} carrier tokens a side, "
                           "expected one number")
    told = {
        "in_chans": in_chans, "in_dim": in_dim, "dim": dim, "depths": tuple(len(blocks[stage]) for stage in range(4)),
        "num_heads": heads, "window_size": windows, "ct_size": next(iter(counts - {None}), None),
        "mlp_ratio": mlp_ratio, "hat": hat, "layer_scale": block(2, "gamma3") in shapes,
        "layer_scale_conv": block(0, "gamma") in shapes, "layer_norm_last": "norm.running_mean" not in shapes,
        "qkv_bias": block(2, "attn.qkv.bias") in shapes,
        "num_classes": _shape(shapes, "head.weight", 2)[0] if "head.weight" in shapes else 0,
    }  # fmt: skip
    return told


def _ratio(shapes: list[tuple[int, ...]]) -> float:
    """The smallest MLP ratio of which int(width · ratio) is the hidden width, for each (hidden, width)."""
    ratio = max(hidden / width for hidden, width in shapes)
    ratio = ratio if all(int(width * ratio) >= hidden for hidden, width in shapes) else math.nextafter(ratio, math.inf)
    if any(int(width * ratio) != hidden for hidden, width in shapes):
        raise WeightsError(f"the MLPs have (hidden width, width) {shapes} in stages 2 and 3, expected one ratio")
    return ratio


def _window(shapes: Shapes, stage: int) -> int | None:
    """Side of the windows, from the buffers of one block, or None without them."""
    bias = f"levels.{stage}.blocks.0.attn.pos_emb_funct"
    table = shapes.get(f"{bias}.relative_coords_table")
    if table is not None and len(table) == 4 and table[1] % 2:
        return (table[1] + 1) // 2
    for tokens in (shapes.get(f"{bias}.relative_position_index", ())[:1],
                   shapes.get(f"levels.{stage}.blocks.0.pos_embed.relative_bias", ())[1:2]):
        if tokens and math.isqrt(tokens[0]) ** 2 == tokens[0] > 0:
            return math.isqrt(tokens[0])
    return None


def _carriers(shapes: Shapes, stage: int, window: int | None) -> int | None:
    """Carrier tokens a window side: the buffer of the windows' bias has rows for both kinds of token."""
    bias = shapes.get(f"levels.{stage}.blocks.0.attn.pos_emb_funct.relative_bias")
    if bias is None or len(bias) != 4 or window is None:
        return None
    carriers = bias[2] - window**2
    if carriers <= 0 or math.isqrt(carriers) ** 2 != carriers:
        raise WeightsError(f"stage {stage}: the position bias is for {bias[2]} tokens a window, of which {window}² are "
                           "the window's; expected the others to be the square of the carrier tokens a side")
    return math.isqrt(carriers)


def _side(shapes: Shapes, config: ModelConfig) -> int | None:
    """The largest multiple of 32 pixels with as many windows as the buffers for carrier tokens, where there are any."""
    grids = {}
    for stage in (2, 3):
        table = shapes.get(f"levels.{stage}.blocks.0.hat_attn.pos_emb_funct.relative_coords_table")
        if config.hat[stage] and table is not None and len(table) == 4:
            windows, rest = divmod((table[1] + 1) // 2, config.ct_size)
            if rest or windows < 2:
                return None
            grids[stage] = windows
    if not grids:
        return None
    largest = min(windows * config.window_size[stage] * 4 * 2**stage for stage, windows in grids.items())
    smaller = range(largest // 32 * 32, 0, -32)
    return next((side for side in smaller
                 if all(config.windows(stage, side, side)[0] == windows for stage, windows in grids.items())), None)


def _most_similar(inferred: Mapping[str, Any]) -> str:
    def distance(name: str) -> tuple:
        config = VARIANTS[name].config
        return (
            (config.layer_scale is not None) != inferred["layer_scale"],
            config.hat != inferred["hat"],
            abs(math.log(config.dim / inferred["dim"])),
            sum(abs(a - b) for a, b in zip(config.depths, inferred["depths"], strict=True)),
            sum(w is not None and w != v for w, v in zip(inferred["window_size"], config.window_size[2:], strict=True)),
            config.in_dim != inferred["in_dim"],
        )

    return min((name for name in VARIANTS if name.startswith("faster_vit_")), key=distance)
