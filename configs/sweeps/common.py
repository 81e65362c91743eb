"""What the sweeps here share: a base that a CPU trains in about a minute, and all combinations of some values."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import digits


def product(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """A point for each combination: {"a": (1, 2), "b": (3, 4)} gives {"a": 1, "b": 3}, {"a": 1, "b": 4}, and so on."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def small_digits() -> ConfigDict:
    """configs/digits.py with a smaller net, larger images and fewer epochs.

    Images of 128 pixels make stage 2 an 8×8 map: 2×2 windows of 4×4 tokens, or 3×3 of 3×3, padded to 9×9.
    Stage 3's map has 4×4 tokens, one window.
    """
    config = digits.get_config()
    config.update_from_flattened_dict({
        "name": "small_digits", "data.image_size": 128, "model.dim": 16, "model.in_dim": 8,
        "model.window_size": (4, 4, 4, 4), "epochs": 5, "warmup_epochs": 1, "learning_rate": 2e-3,
        "eval_every_epochs": 1, "keep_checkpoints": 1,
    })
    return config
