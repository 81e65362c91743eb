"""FasterViT on ImageNet-1K, from random numbers, with the official data pipeline.

    python train.py --config=configs/imagenet.py:faster_vit_0_224 --workdir=runs/imagenet_0 [--config.data.dir=DIR]

The argument is any registered name. DIR holds what `python -m fastervit_jax.data.prepare imagenet2012` made. The batch
of 4,096 is over all devices. Images, augmentation, mixing, loss, AdamW, warm-up and cosine are the official recipe's.
Not in it yet: averaged weights (EMA) and MESA, LAMB for variants 4 to 6, ten last epochs at the final learning rate. No
run of this length has been done here, so no accuracy is promised.
"""

from ml_collections import ConfigDict

from configs import common
from fastervit_jax.model.variants import get_variant

WEIGHT_DECAY = {"3": 0.075, "4": 0.12, "5": 0.12, "6": 0.15}  # of the official config files; 0 to 2: 0.05


def get_config(name: str = "faster_vit_0_224") -> ConfigDict:
    variant = get_variant(name)
    config = common.base()
    config.name = f"imagenet_{name}"

    config.data = common.data(
        "imagenet2012", variant.resolution, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        eval_crop=variant.crop_pct, eval_mode=variant.crop_mode)
    config.data.workers = 16
    config.augment = common.augment(
        flip=0.5, rand_augment_ops=2, erase_prob=0.25, mixup=0.8, cutmix=1.0,
        mix_group=128,  # the batch of one GPU in the official runs
    )
    config.model = common.model(name, dtype="bfloat16")

    number = name.removeprefix("faster_vit_")[:1]
    config.batch_size = 4096
    config.epochs = 300
    config.learning_rate = 5e-3
    config.warmup_learning_rate = 1e-6
    config.final_learning_rate = 5e-6
    config.warmup_epochs = 35 if number == "3" else 20
    config.weight_decay = WEIGHT_DECAY.get(number, 0.05)
    return config.lock()
