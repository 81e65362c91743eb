"""FasterViT on ImageNet-21K, from random numbers, to be fine-tuned with configs/finetune.py.

    python train.py --config=configs/imagenet21k.py:faster_vit_4_21k_224 --config.data.dir=DIR --workdir=runs/21k
    python train.py --config=configs/imagenet21k.py:faster_vit_4_21k_224,smoke

The argument is any registered name, and `smoke` for a minute of the same on a CPU, with digits. faster_vit_4_21k_224 is
variant 4 with one window of 14×14 tokens in stage 2 and no carrier tokens; larger resolutions are for fine-tuning.

DIR has a folder of images a class, DIR/train/CLASS/a.jpg, and in DIR/val/CLASS/b.jpg what you put aside to validate on,
for ImageNet-21K comes without it. --config.data.source=NAME takes a prepared dataset of TFDS instead. The 21,841
classes are the whole ImageNet's; for another selection, give --config.model.num_classes=NUMBER.

From the paper are the data (14 M images of 21,841 classes) and the model. What is not set below is as in
configs/imagenet.py. These numbers are ours, and untried: 90 epochs with 5 of warm-up (those of ConvNeXt), no epochs
after them at the final learning rate, and no MESA, whose second forward pass is dear with so many images. No run of
this length has been done here; 90 epochs of 14.2 M images are 3.2 times the images of configs/imagenet.py.
"""

from ml_collections import ConfigDict

from configs import common, imagenet
from fastervit_jax.model.variants import list_models


def get_config(argument: str = "") -> ConfigDict:
    name, smoke = common.arguments(argument, list_models("faster_vit_*"), "faster_vit_4_21k_224")
    config = imagenet.get_config(name).unlock()
    config.name = f"imagenet21k_{name}"
    config.data.source = "folder"
    config.model.num_classes = 21_841
    config.epochs = 90
    config.warmup_epochs = 5
    config.cooldown_epochs = 0
    config.mesa = 0.0
    if smoke:
        common.smoke(config)
    return config.lock()
