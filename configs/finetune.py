"""Fine-tuning from weights: ImageNet-21K to 1K at 224, 384, 512 or 768 pixels, or any images of yours.

    python train.py --config=configs/finetune.py:faster_vit_4_21k_384 --config.init_from=runs/21k/best.safetensors
    python train.py --config=configs/finetune.py:faster_vit_0_224 --config.init_from=faster_vit_0_224
        --config.data.source=folder --config.data.dir=DIR --config.model.num_classes=NUMBER
    python train.py --config=configs/finetune.py:faster_vit_0_224,smoke

**Give --config.init_from**, without which this trains from random numbers: a file or folder of weights (PyTorch's,
safetensors, a run's workdir), or a registered name, whose published weights are fetched. The argument is the registered
name of the model to make of them, at its resolution and with its windows, which need not be those that the weights
were trained with; where the classes differ, the head is new. `smoke` is a minute of the same on a CPU, with digits.

The numbers are ours, not FasterViT's authors'. They are those that ConvNeXt was fine-tuned with from ImageNet-21K (30
epochs of AdamW without warm-up, batch 512, 5e-5, hardly any weight decay, neither mixup nor cutmix, the other
augmentation as in training), but for the layer decay of 0.9 a block, which leaves the stem below 23 blocks 0.08 of the
rate, and the averages of configs/imagenet.py. None of this has been tried on ImageNet here.

- --config.accumulate=8 computes a batch in 8 parts, for large images; --config.remat="(True,True,True,True)" saves
  more memory.
- Averaged weights, which are evaluated, look back 5,000 steps with --config.ema_decay=0.9998; a run that is not much
  longer must have less: 0.99 for 1,000 steps, say.
- The learning rate is for a batch of 512, and scaled to another; small datasets take more: --config.learning_rate=1e-3.
"""

from ml_collections import ConfigDict

from configs import common
from fastervit_jax.model.variants import get_variant, list_models


def get_config(argument: str = "") -> ConfigDict:
    name, smoke = common.arguments(argument, list_models("faster_vit_*"), "faster_vit_4_21k_384")
    config = common.base()
    config.name = f"finetune_{name}"

    config.data = common.photographs("imagenet2012", get_variant(name))
    config.data.workers = 16
    config.augment = common.augment(flip=0.5, rand_augment_ops=2, erase_prob=0.25)
    config.model = common.model(name, dtype="bfloat16")

    config.batch_size = 512
    config.epochs = 30
    config.learning_rate = 5e-5
    config.learning_rate_batch = 512
    config.warmup_learning_rate = 1e-6
    config.final_learning_rate = 1e-6
    config.warmup_epochs = 0
    config.weight_decay = 1e-8
    config.layer_decay = 0.9
    config.ema_decay = 0.9998
    if smoke:
        common.smoke(config)
    return config.lock()
