"""What a config can say: every setting is checked before a run takes its workdir."""

import math
import re

from ml_collections import ConfigDict

from fastervit_jax.data import augment, loader
from fastervit_jax.data.sources import image_sides
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.ops.kernels import KERNELS
from fastervit_jax.train.losses import LOSSES
from fastervit_jax.train.metrics import check_wandb
from fastervit_jax.train.optimizer import OPTIMIZERS

AT_LEAST = {
    "seed": 0, "warmup_epochs": 0, "epochs": 1, "cooldown_epochs": 0, "learning_rate_batch": 0, "accumulate": 1,
    "bn_group_size": 0, "log_every_steps": 1, "eval_every_epochs": 1, "checkpoint_every_epochs": 1,
    "keep_checkpoints": 1, "max_bad_steps": 1,
}  # fmt: skip
NOT_NEGATIVE = ("learning_rate", "warmup_learning_rate", "final_learning_rate", "weight_decay", "mesa")
RANGES = {
    "label_smoothing": (0, 1), "ema_decay": (0, 1), "mesa_start_ratio": (0, 1), "beta1": (0, 1), "beta2": (0, 1),
}  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that cannot be, or that would have no effect."""
    for name, least in AT_LEAST.items():
        if config[name] < least:
            raise ValueError(f"config.{name}={config[name]}: expected at least {least}")
    for name in NOT_NEGATIVE:
        if not 0 <= config[name] < math.inf:
            raise ValueError(f"config.{name}={config[name]}: expected 0 or more")
    for name, (low, high) in RANGES.items():
        if not low <= config[name] < high:
            raise ValueError(f"config.{name}={config[name]}: expected {low} or more, less than {high}")
    if not config.clip_norm > 0:
        raise ValueError(f"config.clip_norm={config.clip_norm}: expected more than 0; inf clips nothing")
    for name in ("eps", "stuck_after"):
        if not 0 < config[name] < math.inf:
            raise ValueError(f"config.{name}={config[name]}: expected more than 0")
    if not 0 < config.layer_decay <= 1:
        raise ValueError(f"config.layer_decay={config.layer_decay}: expected more than 0, at most 1, which is none")
    if config.warmup_epochs > config.epochs:
        raise ValueError(f"config.warmup_epochs={config.warmup_epochs}: expected at most config.epochs={config.epochs}")
    for name, known in (("optimizer", OPTIMIZERS), ("loss", LOSSES), ("kernels", KERNELS)):
        if config[name] not in known:
            raise ValueError(f"config.{name}={config[name]!r}: expected one of {', '.join(known)}")
    if config.mesa and not config.ema_decay:
        raise ValueError(f"config.mesa={config.mesa} with config.ema_decay=0: MESA learns from the averaged weights; "
                         "expected an ema_decay, or 0 for mesa")
    if len(config.remat) != 4 or not all(isinstance(x, bool) for x in config.remat):
        raise ValueError(f"config.remat={config.remat}: expected 4 values, one for each stage, each True or False")
    if config.batch_size % config.accumulate:
        raise ValueError(f"config.accumulate={config.accumulate}: expected a divisor of config.batch_size="
                         f"{config.batch_size}")
    part = config.batch_size // config.accumulate
    if config.bn_group_size and part % config.bn_group_size:
        raise ValueError(f"config.bn_group_size={config.bn_group_size}: expected a divisor of the {part} images that "
                         "are computed together (config.batch_size / config.accumulate), or 0 for all of them")
    profiled_steps(config)
    check_wandb(config.wandb)
    loader.check(config)
    augment.check(config.augment, config.model.in_chans)
    augment.check_mix(config.augment, config.batch_size)
    if config.init_from_ema and not config.init_from:
        raise ValueError("config.init_from_ema=True without config.init_from: expected a file of weights to start from")
    model, size, sides = ModelConfig(**config.model), config.data.image_size, image_sides(config)
    for stage in (2, 3):
        if model.hat[stage] and model.windows(stage, *sides) == (1, 1):
            raise ValueError(
                f"config.model.hat={model.hat}: with images of {size} pixels stage {stage} has a single window of "
                f"{model.window_size[stage]} tokens a side, so no carrier tokens; expected a smaller "
                f"config.model.window_size[{stage}], a larger config.data.image_size, or False for the stage")


def profiled_steps(config: ConfigDict) -> tuple[int, int]:
    """First and last step of the profile; (0, 0) for none. Raises ValueError."""
    if not config.profile:
        return 0, 0
    found = re.fullmatch(r"(\d+):(\d+)", config.profile)
    first, last = (int(x) for x in found.groups()) if found else (0, 0)
    if not 0 < first <= last:
        raise ValueError(f"config.profile={config.profile!r}: expected FIRST:LAST, two steps, as in 100:105")
    return first, last
