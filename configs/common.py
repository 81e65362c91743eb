"""What all recipes share."""

import dataclasses

from ml_collections import ConfigDict, config_dict

from fastervit_jax.model.variants import ModelConfig, get_variant


def model(name: str, **changes) -> ConfigDict:
    """Every field of the registered model's `ModelConfig`, so that each can be changed on the command line."""
    config = ConfigDict(dataclasses.asdict(dataclasses.replace(get_variant(name).config, **changes)))
    for field in dataclasses.fields(ModelConfig):
        if config[field.name] is None:
            config[field.name] = config_dict.placeholder(float)
    return config


def data(
    source: str, image_size: int, mean: tuple[float, ...], std: tuple[float, ...], eval_crop: float = 1.0,
    eval_mode: str = "center",
) -> ConfigDict:
    """Where images come from, and how they are fed."""
    config = ConfigDict()
    config.source = source  # digits, folder, or the name of a TFDS dataset in ArrayRecord files
    config.dir = ""  # of the folder, or of TFDS's datasets; "": TFDS's own default
    config.train_split = "train"
    config.eval_split = "validation"
    config.image_size = image_size
    config.mean = mean
    config.std = std
    config.workers = 0  # processes that decode; 0: threads of this one
    config.timeout = 300.0  # seconds without a batch that end the run
    config.max_bad_fraction = 0.001  # more images than this part that cannot be read end the run
    # How image files become pixels; digits are pixels already.
    config.crop_scale = (0.08, 1.0)  # of the area
    config.crop_ratio = (3 / 4, 4 / 3)  # width by height
    config.interpolation = "random"  # bilinear, bicubic, or one of the two at random
    config.eval_crop = eval_crop  # the part of the short side, in mode center, or of both, in squash, that is seen
    config.eval_mode = eval_mode
    return config


def augment(**changes) -> ConfigDict:
    """Every augmentation there is, all of them off but for the changes; see fastervit_jax/data/augment.py."""
    config = ConfigDict()
    config.flip = 0.0  # probability
    config.zoom = 0.0
    config.shift = 0.0
    config.color_jitter = 0.0  # before RandAugment, with which timm leaves it out
    config.rand_augment_ops = 0
    config.rand_augment_prob = 0.5
    config.rand_augment_magnitude = 9.0
    config.rand_augment_std = 0.5
    config.erase_prob = 0.0
    config.erase_mode = "pixel"  # or const
    config.erase_area = (0.02, 1 / 3)
    config.erase_aspect = (0.3, 3.3)
    config.mixup = 0.0  # alpha
    config.cutmix = 0.0  # alpha
    config.mix_prob = 1.0
    config.cutmix_switch = 0.5
    config.mix_group = 1  # images that share a lambda, and are mixed with themselves in reversed order
    config.update(changes)
    return config


def base() -> ConfigDict:
    """The knobs that do not depend on the task."""
    config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # a file or folder of weights, or a registered name, to start from; "": random numbers
    config.init_from_ema = False  # its averaged weights
    config.log_every_steps = 50
    config.eval_every_epochs = 1
    config.checkpoint_every_epochs = 1
    config.keep_checkpoints = 3
    return config
