"""One training step, jitted over a mesh."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from ml_collections import ConfigDict

from fastervit_jax.data import augment
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.train import losses
from fastervit_jax.train.sharding import over_batch, replicated
from fastervit_jax.train.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]


def make_train_step(
    model: FasterViT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted (state, batch) → (state, metrics); the given state's memory is reused.

    The batch is split over the mesh; its loss, gradients and batch statistics are those of the whole
    batch, whatever the number of devices. Images of weight 0, and those that are mixed with one, do not count in the
    loss (in the batch statistics they do). Metrics are scalars on the devices; accuracy is that on augmented images,
    for their own label.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        augment_key, dropout_key = jax.random.split(key)
        targets = losses.smooth_one_hot(batch["label"], model.config.num_classes, config.label_smoothing)
        images, targets, weights = augment.train_images(
            augment_key, batch["image"], targets, batch["weight"], config.augment, config.data.mean, config.data.std,
            mesh)
        counted = jnp.maximum(weights.sum(), 1)  # all but a few images that could not be read

        def loss_fn(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": state.batch_stats}, images, train=True,
                rngs={"dropout": dropout_key}, mutable=["batch_stats"],
            )
            loss = (weights * losses.cross_entropy(logits, targets)).sum() / counted
            return loss, (logits, updated["batch_stats"])

        (loss, (logits, batch_stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": (weights * losses.in_top(logits, batch["label"], 1)).sum() / counted,
            "learning_rate": schedule(state.step),
            "gradient_norm": optax.tree.norm(grads),
            "bad_images": (1 - batch["weight"]).sum(),
        }
        return TrainState(state.step + jnp.int32(1), params, batch_stats, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(replicated(mesh), over_batch(mesh)),
        out_shardings=replicated(mesh),
        donate_argnums=0,
    )
