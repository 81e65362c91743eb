"""Train a FasterViT.

    python train.py --config=configs/digits.py --workdir=runs/digits [--config.model.ct_size=2 ...]

Without flags it trains configs/digits.py into runs/digits. The same workdir goes on where it stopped.
"""

import functools

from absl import flags

from fastervit_jax.train import command, loop

flags.adopt_module_key_flags(command)

if __name__ == "__main__":
    command.run(functools.partial(loop.train, keep_compiled=True))
