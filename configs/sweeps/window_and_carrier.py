"""Windows of stage 2 × carrier tokens a window side: 9 points, 18 runs.

    python -m fastervit_jax.sweep configs/sweeps/window_and_carrier.py --workdir=runs/window_and_carrier

The map of 8×8 tokens is cut into 3×3 windows of 3 tokens a side (padded to 9×9), 2×2 of 4, or 2×2 of 5 (padded to
10×10); a window has 1, 4 or 9 carrier tokens.
"""

from ml_collections import ConfigDict

from configs.sweeps import common

SEEDS = (0, 1)


def get_config() -> ConfigDict:
    return common.small_digits()


def get_points() -> list[dict]:
    return common.product({
        "model.window_size": [(4, 4, window, 4) for window in (3, 4, 5)],
        "model.ct_size": (1, 2, 3),
    })
