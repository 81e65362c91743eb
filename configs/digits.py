"""A small FasterViT on scikit-learn's 1,797 handwritten digits: real images, no download, minutes on a CPU.

    python train.py --config=configs/digits.py --workdir=runs/digits
    python train.py --config=configs/digits.py:smoke

About three minutes on 2 CPU cores; expect 99 % top-1 on the 355 validation images (figures in the README).
`smoke` is less of it: a smaller net, two epochs.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(argument: str = "") -> ConfigDict:
    _, smoke = common.arguments(argument, (), "")
    config = common.base()
    config.name = "digits"

    # Images of 64 pixels make stage 2 a 4×4 map: 2×2 windows of 2×2 tokens, each with one carrier token.
    config.data = common.data("digits", 64, mean=(0.3,), std=(0.35,))
    config.augment = common.augment(zoom=0.15, shift=0.1)
    config.model = common.model(
        "faster_vit_0_224", in_chans=1, num_classes=10, dim=32, in_dim=16, depths=(1, 1, 2, 1),
        window_size=(2, 2, 2, 2), ct_size=1, drop_path_rate=0.1,
    )

    config.batch_size = 64
    config.epochs = 30
    config.learning_rate = 5e-4
    config.warmup_learning_rate = 1e-6
    config.final_learning_rate = 1e-5
    config.warmup_epochs = 3
    config.weight_decay = 0.05
    config.log_every_steps = 11
    config.eval_every_epochs = 5
    if smoke:
        common.smoke(config)
    return config.lock()
