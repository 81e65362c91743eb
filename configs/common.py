"""What all recipes share."""

import dataclasses
import difflib
from collections.abc import Sequence

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_dict

from fastervit_jax.model.variants import ModelConfig, Variant, get_variant

# What smoke(config) sets: digits in colour, and a net that a CPU trains in seconds. Images of 64 pixels make stage 2 a
# 4×4 map of 2×2 windows, so that a variant with carrier tokens keeps them.
SMOKE = {
    "data.source": "digits", "data.dir": "", "data.train_split": "train", "data.eval_split": "validation",
    "data.image_size": 64, "data.workers": 0, "model.num_classes": 10, "model.dim": 16, "model.in_dim": 8,
    "model.depths": (1, 1, 1, 1), "model.window_size": (2, 2, 2, 2), "model.ct_size": 1, "batch_size": 64,
}  # fmt: skip
# What it lowers to this where it is more; what is off stays off. Averages follow a run of some 60 steps, and scaling to
# the smaller batch leaves a learning rate that still does something.
SMOKE_AT_MOST = {
    "epochs": 2, "warmup_epochs": 1, "cooldown_epochs": 1, "learning_rate_batch": 256, "ema_decay": 0.9,
    "bn_group_size": 16, "augment.mix_group": 16, "log_every_steps": 11,
}  # fmt: skip


def arguments(text: str, names: Sequence[str], default: str) -> tuple[str, bool]:
    """What follows the colon in --config=FILE:TEXT: one of `names`, by default `default`, and whether to run small.

    TEXT is NAME, smoke, NAME,smoke or nothing. Raises ValueError, with the nearest names, for anything else.
    """
    words = [word.strip() for word in text.split(",")] if text else []
    expected = "expected NAME, smoke, or NAME,smoke" if names else "expected smoke, or nothing"
    unknown = []
    for word in words:
        if word not in (*names, "smoke"):
            near = difflib.get_close_matches(word, [*names, "smoke"], n=3)
            unknown.append(f"{word!r} (did you mean {' or '.join(near)}?)" if near else f"{word!r}")
    if unknown:
        known = f"; NAME is one of {', '.join(names)}" if names else ""
        raise ValueError(f"unknown argument of the config: {', '.join(unknown)}; {expected}{known}")
    chosen = [word for word in words if word != "smoke"]
    if len(chosen) > 1 or words.count("smoke") > 1:
        raise ValueError(f"too many arguments of the config in {text!r}: {expected}")
    return chosen[0] if chosen else default, "smoke" in words


def smoke(config: ConfigDict) -> None:
    """Make any recipe run small: its own optimiser, loss, schedule and augmentation, a minute on a CPU, no download.

    The changes are those of SMOKE and SMOKE_AT_MOST, and a name of its own.
    """
    given = flatten_dict(config.to_dict(), sep=".")
    lowered = {key: min(given[key], most) for key, most in SMOKE_AT_MOST.items()}
    config.update_from_flattened_dict({**SMOKE, **lowered, "name": f"{config.name}_smoke"})


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


def photographs(source: str, variant: Variant) -> ConfigDict:
    """The data section for colour images, cut and normalised as those of ImageNet that the variant was trained on."""
    return data(source, variant.resolution, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
                eval_crop=variant.crop_pct, eval_mode=variant.crop_mode)


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
    """What does not depend on the task: everything else that a recipe can say, at its plainest."""
    config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # a file or folder of weights, or a registered name, to start from; "": random numbers
    config.init_from_ema = False  # its averaged weights

    config.optimizer = "adamw"  # or lamb
    config.beta1 = 0.9
    config.beta2 = 0.999
    config.eps = 1e-8
    config.clip_norm = 5.0
    config.learning_rate_batch = 0  # the batch that learning rates are for, scaled linearly to another; 0: as they are
    config.cooldown_epochs = 0  # after config.epochs, at the final learning rate
    config.layer_decay = 1.0  # factor of the learning rate from one block to the one before
    config.loss = "cross_entropy"  # or binary_cross_entropy
    config.label_smoothing = 0.1
    config.ema_decay = 0.0  # of averaged parameters and batch statistics; 0: none
    config.mesa = 0.0  # weight of the loss against the averaged model's prediction
    config.mesa_start_ratio = 0.25  # of the run

    config.accumulate = 1  # parts of a batch, computed one after the other
    config.remat = (False, False, False, False)  # stages that are computed again in the backward pass, to save memory
    config.bn_group_size = 0  # images that share batch statistics; 0: the batch, or its part
    config.kernels = "auto"  # our own kernels where they are the faster, which is on GPUs; or xla, for none of them
    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along the axis over which only the batch is split; -1: all that are left
    config.mesh.fsdp = 1  # and over which parameters, optimiser state and averages are split, too

    config.log_every_steps = 50
    config.eval_every_epochs = 1
    config.checkpoint_every_epochs = 1
    config.keep_checkpoints = 3  # the newest ones
    config.keep_best = True  # and the one of the best evaluation, with its weights in best.safetensors
    config.max_bad_steps = 10  # updates in a row skipped for a loss or gradient that is not finite; more end the run
    config.stuck_after = 1800.0  # seconds without a step, or in a save, that end the run with all stacks
    config.profile = ""  # FIRST:LAST, steps to write a JAX profile of
    config.wandb = ""  # a project of Weights & Biases to tell the figures to, too
    return config
