"""Peak learning rate × weight decay: 9 points, 18 runs.

    python -m fastervit_jax.sweep configs/sweeps/learning_rate_and_decay.py --workdir=runs/learning_rate_and_decay
"""

from ml_collections import ConfigDict

from configs.sweeps import common

SEEDS = (0, 1)


def get_config() -> ConfigDict:
    return common.small_digits()


def get_points() -> list[dict]:
    return common.product({"learning_rate": (5e-4, 2e-3, 8e-3), "weight_decay": (0.005, 0.05, 0.5)})
