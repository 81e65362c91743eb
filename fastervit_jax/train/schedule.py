"""Learning rate as a function of the step."""

import math

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def warmup_cosine(
    *, peak: float, first: float, last: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear from `first` to `peak` over the warm-up, then cosine to `last`, which is kept from `total_steps` on.

    The cosine's clock runs from step 0, not from the end of the warm-up, as in the official recipe. The schedule
    takes a whole number of steps, below 2^24, and is right to a few units in the last place of float32.
    """

    def schedule(step):
        warmup = first + (peak - first) * step / max(warmup_steps, 1)
        # (1 + cos(pi x)) / 2 = sin(pi (1 - x) / 2)^2, whose small values at the end are no difference of large ones.
        left = (total_steps - step) / max(total_steps, 1)
        cosine = last + (peak - last) * jnp.sin(math.pi / 2 * left) ** 2
        return jnp.where(step < warmup_steps, warmup, jnp.where(step < total_steps, cosine, last))

    return schedule


def total_epochs(config: ConfigDict) -> int:
    """Epochs of the whole run: the schedule's, and those after it at the final learning rate."""
    return config.epochs + config.cooldown_epochs


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate of each step, counted from 0, all of it scaled as `rate_scale` says."""
    scale = rate_scale(config)
    return warmup_cosine(
        peak=scale * config.learning_rate, first=scale * config.warmup_learning_rate,
        last=scale * config.final_learning_rate, warmup_steps=config.warmup_epochs * steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
    )


def rate_scale(config: ConfigDict) -> float:
    """What the config's learning rates are multiplied by: batch_size / learning_rate_batch, or 1 if that is 0."""
    return config.batch_size / config.learning_rate_batch if config.learning_rate_batch else 1.0


def describe(config: ConfigDict) -> str:
    """The peak and the batch that it is for: as the config has it, and as this run does, where they differ."""
    batch = f"{config.batch_size:,}"
    if not config.learning_rate_batch:
        return f"learning rate {config.learning_rate:g}, not scaled with the batch of {batch}"
    given = f"learning rate {config.learning_rate:g} for a batch of {config.learning_rate_batch:,}"
    if config.batch_size == config.learning_rate_batch:
        return given
    return f"{given}; {rate_scale(config) * config.learning_rate:g} for this one of {batch}"
