"""The training loop. One function, read from top to bottom; the same on one device and on many."""

import pathlib
import sys
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from fastervit_jax.data import loader, sources
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.train import checkpoint, evaluate, sharding
from fastervit_jax.train.metrics import MetricWriter, claim_workdir
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.state import create_state
from fastervit_jax.train.step import make_train_step


def train(config: ConfigDict, workdir: pathlib.Path, devices: list[jax.Device] | None = None) -> dict[str, Any]:
    """Train as `config` says, on all devices or the given ones, and return the last evaluation's result.

    A run that is in `workdir` already goes on from its last checkpoint; a finished one is evaluated again.
    Raises ValueError if the run there has another config.
    """
    claim_workdir(workdir, config)
    mesh = sharding.make_mesh(devices)
    over_batch = sharding.over_batch(mesh)
    train_source = sources.make_source(config.data.source, "train", config.data.image_size)
    eval_source = sources.make_source(config.data.source, "validation", config.data.image_size)
    steps_per_epoch = len(train_source) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"config.batch_size={config.batch_size}: larger than the {len(train_source)} training images")
    total_steps = config.epochs * steps_per_epoch

    model = FasterViT(ModelConfig(**config.model))
    optimizer, schedule = make_optimizer(config, steps_per_epoch)
    state = create_state(model, optimizer, config, mesh)
    train_step = make_train_step(model, optimizer, schedule, config, mesh)
    eval_step = evaluate.make_eval_step(model, config, mesh)

    manager = checkpoint.make_manager(
        workdir, every=config.checkpoint_every_epochs * steps_per_epoch, keep=config.keep_checkpoints)
    state = checkpoint.restore(manager, state)
    first_step = int(state.step)
    writer = MetricWriter(workdir, first_step) if jax.process_index() == 0 else None
    print(f"{config.name}: {sum(x.size for x in jax.tree.leaves(state.params)):,} parameters, "
          f"{len(train_source):,} images to train on, {len(eval_source):,} to validate on, {total_steps:,} steps "
          f"of {config.batch_size} on {mesh.size} {mesh.devices.flat[0].platform} device(s); "
          f"{'starting' if first_step == 0 else f'going on after step {first_step:,}'} in {workdir}", flush=True)

    def evaluated(step: int) -> dict[str, Any]:
        batches = loader.eval_batches(eval_source, batch_size=config.batch_size, sharding=over_batch)
        result = evaluate.evaluate(eval_step, state.variables, batches)
        tqdm.write(f"step {step:6,} epoch {step // steps_per_epoch:3}{evaluate.report(result)} loss {result['loss']:.4f}")
        if writer and step > first_step:
            writer.write(step, "eval", result)
        return result

    batches = loader.train_batches(
        train_source, batch_size=config.batch_size, seed=config.seed, first_step=first_step, sharding=over_batch)
    result = evaluated(first_step) if first_step == total_steps else None
    waiting = []
    bar = tqdm(total=total_steps * config.batch_size, initial=first_step * config.batch_size, desc="train", unit=" images",
               unit_scale=True, mininterval=0.5 if sys.stderr.isatty() else 30.0, disable=writer is None)
    with bar:
        for step in range(first_step + 1, total_steps + 1):
            state, metrics = train_step(state, next(batches))
            waiting.append(metrics)
            if step % config.log_every_steps == 0 or step == total_steps:
                fetched = jax.device_get(waiting)
                waiting = []
                means = {name: float(sum(m[name] for m in fetched) / len(fetched)) for name in fetched[0]}
                bar.update(len(fetched) * config.batch_size)
                bar.set_postfix(loss=f"{means['loss']:.4f}", accuracy=f"{100 * means['accuracy']:.2f}%")
                if writer:
                    writer.write(step, "train", means)
            if step % (config.eval_every_epochs * steps_per_epoch) == 0 or step == total_steps:
                result = evaluated(step)
            # After the evaluation: a checkpoint stands for a step whose figures are all written.
            checkpoint.save(manager, state, {"step": step}, force=step == total_steps)
    manager.close()
    if writer:
        writer.close()
    print(evaluate.report(result), flush=True)
    return result
