"""Train a FasterViT.

    python train.py --config=configs/digits.py --workdir=runs/digits [--config.model.ct_size=2 ...]

Without flags it trains configs/digits.py into runs/digits. The same workdir goes on where it stopped.
"""

import pathlib

from absl import app, flags, logging
from ml_collections import config_flags

from fastervit_jax.train import loop

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py", "The recipe; --config.a.b=value changes it.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run. Default: runs/, then the config's name.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: settings are given as --config.a.b=value")
    workdir = pathlib.Path(WORKDIR.value) if WORKDIR.value else pathlib.Path("runs") / CONFIG.value.name
    loop.train(CONFIG.value, workdir)


if __name__ == "__main__":
    flags.FLAGS.verbosity = logging.WARNING  # unless given; orbax tells of every step of every save
    app.run(main)
