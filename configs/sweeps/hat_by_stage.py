"""Carrier tokens in no stage, in one, in both: 4 points, 8 runs.

    python -m fastervit_jax.sweep configs/sweeps/hat_by_stage.py --workdir=runs/hat_by_stage

Stage 3's windows have 2×2 tokens here, so that its map of 4×4 has several.
"""

from ml_collections import ConfigDict

from configs.sweeps import common

SEEDS = (0, 1)


def get_config() -> ConfigDict:
    config = common.small_digits()
    config.model.window_size = (4, 4, 4, 2)
    return config


def get_points() -> list[dict]:
    return [
        {"label": "no carrier tokens", "model.hat": (False, False, False, False)},
        {"label": "in stage 2", "model.hat": (False, False, True, False)},
        {"label": "in stage 3", "model.hat": (False, False, False, True)},
        {"label": "in stages 2 and 3", "model.hat": (False, False, True, True)},
    ]
