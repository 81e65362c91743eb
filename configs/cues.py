"""A synthetic task that needs long-range information: the mark at one end of a strip tells how to read the other's.

    python train.py --config=configs/cues.py --workdir=runs/carrier_tokens
    python train.py --config=configs/cues.py --config.model.hat="(False,False,False,False)" --workdir=runs/plain_windows

fastervit_jax/data/cues.py has the task. No token of any stage sees both ends without carrier tokens: the second command
trains the same network with plain windows. What comes of it: docs/carrier_tokens.md.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    _, smoke = common.arguments(argument, (), "")
    config = common.base()
    config.name = "cues"

    # Strips of 32×160 pixels make stage 2 a 2×10 map of five windows, each with one carrier token, stage 3 a 1×5 map.
    config.data = common.data("cues", 160, mean=(0.5,), std=(0.25,))
    config.augment = common.augment()
    config.model = common.model(
        "faster_vit_0_224", in_chans=1, num_classes=4, dim=16, in_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 4),
        window_size=(2, 2, 2, 1), ct_size=1, do_propagation=True, drop_path_rate=0.0,
    )

    config.batch_size = 64
    config.epochs = 3
    config.learning_rate = 1e-3
    config.warmup_learning_rate = 1e-6
    config.final_learning_rate = 1e-5
    config.warmup_epochs = 1
    config.weight_decay = 0.05
    config.label_smoothing = 0.0
    config.log_every_steps = 32
    if smoke:
        common.smoke(config)
    return config.lock()
