"""Evaluation: every image once, on all devices."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fastervit_jax.data import augment
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.train import losses
from fastervit_jax.train.sharding import over_batch, replicated
from fastervit_jax.train.step import Batch, Metrics


def make_eval_step(model: FasterViT, config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable[..., Metrics]:
    """A jitted (variables, batch) → sums over the batch's images of weight 1, scalars on the devices."""

    def eval_step(variables: dict[str, Any], batch: Batch) -> Metrics:
        logits = model.apply(variables, augment.normalise(batch["image"], config.data.mean, config.data.std))
        targets = losses.smooth_one_hot(batch["label"], model.config.num_classes, 0.0)
        scores = {
            "loss": losses.cross_entropy(logits, targets),
            "top1": losses.in_top(logits, batch["label"], 1),
            "top5": losses.in_top(logits, batch["label"], 5),
            "images": jnp.ones_like(batch["weight"]),
        }
        # where, not a product: what fills the batch up must not count even if it is NaN.
        return {name: jnp.where(batch["weight"] > 0, x, 0).sum() for name, x in scores.items()}

    return jax.jit(eval_step, in_shardings=(replicated(mesh), over_batch(mesh)), out_shardings=replicated(mesh))


def evaluate(
    eval_step: Callable[..., Metrics], variables: dict[str, Any], batches: Iterable[Batch]
) -> dict[str, float]:
    """Mean loss (nats), top-1 and top-5 accuracy (%), and the number of images."""
    sums = [eval_step(variables, batch) for batch in batches]
    totals = {name: float(sum(s[name] for s in jax.device_get(sums))) for name in sums[0]}
    images = totals["images"]
    return {
        "acc1": 100 * totals["top1"] / images,
        "acc5": 100 * totals["top5"] / images,
        "loss": totals["loss"] / images,
        "images": int(images),
    }


def report(result: dict[str, float]) -> str:
    """' * Acc@1 82.100 (17.900) Acc@5 95.900 (4.100)': accuracies, and errors in brackets."""
    return " * " + " ".join(f"{name} {x:.3f} ({100 - x:.3f})"
                            for name, x in (("Acc@1", result["acc1"]), ("Acc@5", result["acc5"])))
