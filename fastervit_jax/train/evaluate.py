"""Evaluation: every image once, on all devices."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from ml_collections import ConfigDict

from fastervit_jax.data import augment, loader
from fastervit_jax.data.sources import Source
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.ops.kernels import compiler_options
from fastervit_jax.train import losses
from fastervit_jax.train.sharding import over_batch, replicated
from fastervit_jax.train.step import Batch, Metrics


def make_eval_step(model: FasterViT, config: ConfigDict, mesh: jax.sharding.Mesh) -> Callable[..., Metrics]:
    """A jitted (variables, batch, classes) → sums over the batch's images of weight 1, scalars on the devices.

    Only the classes that are True in `classes`, bool (num_classes,), can be predicted. Where an image has several
    labels each of them is right; one without labels does not count.
    """

    def eval_step(variables: dict[str, Any], batch: Batch, classes: Bool[Array, "k"]) -> Metrics:
        variables = jax.lax.with_sharding_constraint(variables, replicated(mesh))  # gathered where they are split
        logits = model.apply(variables, augment.normalise(batch["image"], config.data.mean, config.data.std))
        logits = jnp.where(classes[None], logits, jnp.finfo(logits.dtype).min)
        labels, counts = batch["label"], batch["weight"] > 0
        if labels.ndim == 2:
            counts &= labels.any(axis=1)
            targets = labels / jnp.maximum(labels.sum(axis=1, keepdims=True), 1)
        else:
            targets = losses.smooth_one_hot(labels, model.config.num_classes, 0.0)
        scores = {
            "loss": losses.cross_entropy(logits, targets),
            "top1": losses.in_top(logits, labels, 1),
            "top5": losses.in_top(logits, labels, 5),
            "images": jnp.ones_like(batch["weight"]),
        }
        # where, not a product: what fills the batch up must not count even if it is NaN.
        return {name: jnp.where(counts, x, 0).sum() for name, x in scores.items()}

    in_shardings = (None, over_batch(mesh), replicated(mesh))  # variables as they lie
    return jax.jit(eval_step, in_shardings=in_shardings, out_shardings=replicated(mesh),
                   compiler_options=compiler_options(mesh.devices.flat[0].platform))


def evaluate(
    eval_step: Callable[..., Metrics], variables: dict[str, Any], source: Source, config: ConfigDict,
    mesh: jax.sharding.Mesh, going_on: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Mean loss (nats), top-1 and top-5 accuracy (%), and the number of images that counted.

    Where images could not be read, also "bad_records", what this process says of each. `going_on` is called before
    each batch, and may raise.
    """
    classes = np.zeros(source.num_classes, bool)
    classes[slice(None) if source.classes is None else list(source.classes)] = True
    classes = jax.device_put(classes, replicated(mesh))
    sums, bad = [], []
    with contextlib.closing(loader.eval_batches(source, config, sharding=over_batch(mesh))) as batches:
        for batch, unreadable in batches:
            going_on()
            jax.block_until_ready(sums[-2:-1])  # two batches at most are in the devices' memory
            sums.append(eval_step(variables, batch, classes))
            bad += unreadable
    totals = {name: float(sum(s[name] for s in jax.device_get(sums))) for name in sums[0]}
    images = totals["images"]
    if not images:
        raise ValueError(f"{source.name}: none of the {len(source)} images could be read and has a label")
    return {
        "acc1": 100 * totals["top1"] / images,
        "acc5": 100 * totals["top5"] / images,
        "loss": totals["loss"] / images,
        "images": int(images),
        **({"bad_records": bad} if bad else {}),
    }


def report(result: dict[str, float]) -> str:
    """' * Acc@1 82.100 (17.900) Acc@5 95.900 (4.100)': accuracies, and errors in brackets."""
    return " * " + " ".join(f"{name} {x:.3f} ({100 - x:.3f})"
                            for name, x in (("Acc@1", result["acc1"]), ("Acc@5", result["acc5"])))
