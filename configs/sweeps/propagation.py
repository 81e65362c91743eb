"""Carrier tokens added to their windows at the end of the stage, or not, with 1 and 4 of them: 4 points, 8 runs.

    python -m fastervit_jax.sweep configs/sweeps/propagation.py --workdir=runs/propagation
"""

from ml_collections import ConfigDict

from configs.sweeps import common

SEEDS = (0, 1)


def get_config() -> ConfigDict:
    return common.small_digits()


def get_points() -> list[dict]:
    return common.product({"model.do_propagation": (False, True), "model.ct_size": (1, 2)})
