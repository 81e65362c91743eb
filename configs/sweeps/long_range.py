"""Where carrier tokens matter: a synthetic long-range task with them and with plain windows: 2 points, 6 runs.

    python -m fastervit_jax.sweep configs/sweeps/long_range.py --workdir=runs/long_range
"""

from ml_collections import ConfigDict

from configs import cues

SEEDS = (0, 1, 2)


def get_config() -> ConfigDict:
    return cues.get_config()


def get_points() -> list[dict]:
    return [{"model.hat": hat} for hat in ((False, False, True, False), (False, False, False, False))]
