"""The optimiser of a recipe, from optax."""

import jax
import optax
from ml_collections import ConfigDict

from fastervit_jax.train.schedule import warmup_cosine


def make_optimizer(config: ConfigDict, steps_per_epoch: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW after clipping to a global norm, and its learning-rate schedule.

    Weight decay applies to matrices and kernels, not to biases, norms and other vectors.
    """
    schedule = warmup_cosine(
        peak=config.learning_rate, first=config.warmup_learning_rate, last=config.final_learning_rate,
        warmup_steps=config.warmup_epochs * steps_per_epoch, total_steps=config.epochs * steps_per_epoch,
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=config.weight_decay,
                    mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    )
    return optimizer, schedule
