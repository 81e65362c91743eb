"""Blocks of stage 2 × channels of stage 0, which all other widths follow: 9 points, 18 runs.

    python -m fastervit_jax.sweep configs/sweeps/depth_and_width.py --workdir=runs/depth_and_width
"""

from ml_collections import ConfigDict

from configs.sweeps import common

SEEDS = (0, 1)


def get_config() -> ConfigDict:
    return common.small_digits()


def get_points() -> list[dict]:
    return common.product({"model.depths": [(1, 1, blocks, 1) for blocks in (1, 2, 4)], "model.dim": (8, 16, 24)})
