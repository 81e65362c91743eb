"""One training step, jitted over a mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array
from ml_collections import ConfigDict

from fastervit_jax.data import augment
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.ops.kernels import compiler_options
from fastervit_jax.train import losses
from fastervit_jax.train.optimizer import global_norm
from fastervit_jax.train.packing import Packed, Packing
from fastervit_jax.train.sharding import over_batch, replicated, shardings
from fastervit_jax.train.state import TrainState, abstract_state

Batch = dict[str, Array]
Metrics = dict[str, Array]


def make_train_step(
    model: FasterViT,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    total_steps: int,
    packing: Packing | None = None,
) -> Callable[[Any, Batch], tuple[Any, Metrics]]:
    """A jitted (state, batch) → (state, metrics); the given state's memory is reused.

    With `packing`, states are as it packs them.

    The batch is split over the mesh; its loss, gradients and batch statistics are those of the whole
    batch, whatever the number of devices. With config.accumulate = n it is computed in n parts, of which part i has
    images i, i + n, …; batch statistics are then those of a part. Images of weight 0, and those that are mixed with
    one, do not count in the loss (in the batch statistics they do).

    Where the loss or the gradient is not finite, only `step` and `bad_steps` of the state change; after
    config.max_bad_steps of these in a row nothing changes any more.

    Metrics are scalars on the devices. Accuracy is that on augmented images, for their own label; bad_steps is 1 for an
    update that was skipped, bad_steps_in_row the state's count.
    """
    loss_of = losses.get_loss(config.loss)
    mesa_start = int(config.mesa_start_ratio * total_steps)

    def part_loss(params: Any, batch_stats: Any, state: TrainState, part: tuple, key: Array) -> tuple[Array, tuple]:
        """Loss, and (scores, batch statistics), of images, targets, weights and labels: sums, weights sum to 1."""
        images, targets, weights, labels = part
        params = jax.lax.with_sharding_constraint(params, replicated(mesh))  # gathered where they are split
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats}, images, train=True, rngs={"dropout": key},
            mutable=["batch_stats"])
        loss = (weights * loss_of(logits, targets)).sum()
        scores = {"accuracy": (weights * losses.in_top(logits, labels, 1)).sum()}
        if config.mesa:
            ema = jax.lax.with_sharding_constraint(state.ema, replicated(mesh))
            started = state.step >= mesa_start
            teacher = jax.lax.cond(started, lambda: model.apply(ema, images), lambda: jnp.zeros_like(logits))
            mesa = jnp.where(started, config.mesa * (weights * losses.mesa(logits, teacher)).sum(), 0.0)
            loss += mesa
            scores["mesa"] = mesa
        return loss, (scores | {"loss": loss}, updated["batch_stats"])

    def gradients(state: TrainState, whole: tuple, key: Array) -> tuple[Any, dict[str, Array], Any]:
        """Of the batch's mean loss; and scores, and batch statistics."""
        grad_fn = jax.grad(part_loss, has_aux=True)
        if config.accumulate == 1:
            grads, (scores, batch_stats) = grad_fn(state.params, state.batch_stats, state, whole, key)
            return grads, scores, batch_stats

        def split(x: Array) -> Array:
            parts = x.reshape(len(x) // config.accumulate, config.accumulate, *x.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(
                parts, NamedSharding(mesh, PartitionSpec(None, *over_batch(mesh).spec)))

        def add(carry: tuple, numbered: tuple) -> tuple[tuple, None]:
            grads, scores, batch_stats = carry
            i, part = numbered
            more, (others, batch_stats) = grad_fn(
                state.params, batch_stats, state, part, jax.random.fold_in(key, i))
            more = jax.lax.with_sharding_constraint(more, shardings(more, mesh))
            return (*jax.tree.map(jnp.add, (grads, scores), (more, others)), batch_stats), None

        names = ("loss", "accuracy", *(["mesa"] if config.mesa else []))
        zeros = jax.tree.map(jnp.zeros_like, state.params), {name: jnp.zeros(()) for name in names}
        parts = jnp.arange(config.accumulate), jax.tree.map(split, whole)
        return jax.lax.scan(add, (*zeros, state.batch_stats), parts)[0]

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        augment_key, dropout_key = jax.random.split(key)
        targets = losses.smooth_one_hot(batch["label"], model.config.num_classes, config.label_smoothing)
        images, targets, weights = augment.train_images(
            augment_key, batch["image"], targets, batch["weight"], config.augment, config.data.mean, config.data.std,
            mesh)
        weights = weights / jnp.maximum(weights.sum(), 1)  # all count but a few images that could not be read
        grads, scores, batch_stats = gradients(state, (images, targets, weights, batch["label"]), dropout_key)
        grads = jax.lax.with_sharding_constraint(grads, shardings(grads, mesh))

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        learning_rate = schedule(state.step)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, state.params, updates)
        ema = state.ema
        if ema is not None:
            new = {"params": params, "batch_stats": batch_stats}
            # Not d old + (1 - d) x: rounded to float32, d and 1 - d do not sum to 1.
            ema = jax.tree.map(lambda old, x: old + (1 - config.ema_decay) * (x - old), ema, new)

        going_on = state.bad_steps < config.max_bad_steps
        gradient_norm = global_norm(grads)
        good = jnp.isfinite(scores["loss"]) & jnp.isfinite(gradient_norm)
        new = TrainState(state.step + 1, params, batch_stats, opt_state, ema, jnp.zeros_like(state.bad_steps))
        skipped = state.replace(
            step=state.step + going_on.astype(jnp.int32), bad_steps=state.bad_steps + going_on.astype(jnp.int32))
        state = jax.tree.map(lambda a, b: jnp.where(good & going_on, a, b), new, skipped)
        metrics = {
            **scores,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "parameter_norm": global_norm(state.params),
            "bad_images": (1 - batch["weight"]).sum(),
            "bad_steps": (~good & going_on).astype(jnp.float32),
            "bad_steps_in_row": state.bad_steps.astype(jnp.float32),
        }
        return state, metrics

    lying = packing.shardings if packing else jax.tree.map(
        lambda x: x.sharding, abstract_state(model, optimizer, config, mesh))

    def packed_step(packed: Packed | TrainState, batch: Batch) -> tuple[Packed | TrainState, Metrics]:
        state, metrics = train_step(packing.split(packed), batch)
        return packing.stack(state), metrics

    return jax.jit(
        packed_step if packing else train_step,
        in_shardings=(lying, over_batch(mesh)),
        out_shardings=(lying, replicated(mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
