"""Carrier tokens against plain windows, and against one window that has the whole map: 5 points, 10 runs.

    python -m fastervit_jax.sweep configs/sweeps/carrier_or_plain.py --workdir=runs/carrier_or_plain

Plain windows are not shifted, as Swin's are: what is far apart meets in the convolutions and the last stage only.
"""

from ml_collections import ConfigDict

from configs.sweeps import common

SEEDS = (0, 1)
CARRIERS, PLAIN = (False, False, True, False), (False, False, False, False)


def get_config() -> ConfigDict:
    return common.small_digits()


def get_points() -> list[dict]:
    windows = [(4, 4, window, 4) for window in (2, 4)]
    return [*common.product({"model.window_size": windows, "model.hat": (PLAIN, CARRIERS)}),
            {"model.window_size": (4, 4, 8, 4), "model.hat": PLAIN}]
