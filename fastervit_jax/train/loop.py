"""The training loop. One function, read from top to bottom; the same on one device and on many."""

import contextlib
import math
import pathlib
import sys
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from fastervit_jax.data import augment, loader, sources
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.train import checkpoint, evaluate, sharding
from fastervit_jax.train.metrics import MetricWriter, claim_workdir
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.state import create_state, load_weights
from fastervit_jax.train.step import make_train_step


def check(config: ConfigDict) -> None:
    """Raises ValueError for settings that cannot be, or that would have no effect."""
    at_least = {"seed": 0, "warmup_epochs": 0, "epochs": 1, "log_every_steps": 1,
                "eval_every_epochs": 1, "checkpoint_every_epochs": 1, "keep_checkpoints": 1}
    for name, least in at_least.items():
        if config[name] < least:
            raise ValueError(f"config.{name}={config[name]}: expected at least {least}")
    for name in ("learning_rate", "warmup_learning_rate", "final_learning_rate", "weight_decay"):
        if not 0 <= config[name] < math.inf:
            raise ValueError(f"config.{name}={config[name]}: expected 0 or more")
    if not config.clip_norm > 0:
        raise ValueError(f"config.clip_norm={config.clip_norm}: expected more than 0; inf clips nothing")
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(f"config.label_smoothing={config.label_smoothing}: expected 0 or more, less than 1")
    if config.warmup_epochs > config.epochs:
        raise ValueError(f"config.warmup_epochs={config.warmup_epochs}: expected at most config.epochs={config.epochs}")
    loader.check(config)
    augment.check(config.augment, config.model.in_chans)
    augment.check_mix(config.augment, config.batch_size)
    if config.init_from_ema and not config.init_from:
        raise ValueError("config.init_from_ema=True without config.init_from: expected a file of weights to start from")
    model, size = ModelConfig(**config.model), config.data.image_size
    for stage in (2, 3):
        if model.hat[stage] and model.windows(stage, size, size) == (1, 1):
            raise ValueError(
                f"config.model.hat={model.hat}: with images of {size} pixels stage {stage} has a single window of "
                f"{model.window_size[stage]} tokens a side, so no carrier tokens; expected a smaller "
                f"config.model.window_size[{stage}], a larger config.data.image_size, or False for the stage")


def train(config: ConfigDict, workdir: pathlib.Path, devices: list[jax.Device] | None = None) -> dict[str, Any]:
    """Train as `config` says, on all devices or the given ones, and return the last evaluation's result.

    A run that is in `workdir` already goes on from its last checkpoint; a finished one is evaluated again.
    Raises ValueError if the run there has another config.
    """
    check(config)
    mesh = sharding.make_mesh(devices)
    train_source = sources.make_source(config, config.data.train_split)
    eval_source = sources.make_source(config, config.data.eval_split)
    if train_source.multi_label:
        raise ValueError(f"{train_source.name} has several labels an image, which are for evaluation; expected "
                         "config.data.source with one")
    steps_per_epoch = len(train_source) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"config.batch_size={config.batch_size}: larger than the {len(train_source)} training images")
    total_steps = config.epochs * steps_per_epoch

    model = FasterViT(ModelConfig(**config.model))
    optimizer, schedule = make_optimizer(config, steps_per_epoch)
    state = create_state(model, optimizer, config, mesh)
    train_step = make_train_step(model, optimizer, schedule, config, mesh)
    eval_step = evaluate.make_eval_step(model, config, mesh)

    log_every = config.log_every_steps
    eval_every = config.eval_every_epochs * steps_per_epoch
    save_every = config.checkpoint_every_epochs * steps_per_epoch
    say = tqdm.write if jax.process_index() == 0 else lambda text: None  # once, not for every process
    with contextlib.ExitStack() as stack:
        manager = stack.enter_context(checkpoint.make_manager(workdir, every=save_every, keep=config.keep_checkpoints))
        first_step = manager.latest_step() or 0
        batches = stack.enter_context(contextlib.closing(loader.train_batches(
            train_source, config, first_step=first_step, last_step=total_steps, sharding=sharding.over_batch(mesh))))
        if first_step == 0 and config.init_from:
            variables, report = load_weights(config.init_from, config.init_from_ema, config, mesh)
            state = state.replace(**variables)
            say(str(report))
        claim_workdir(workdir, config, started=first_step > 0)
        if first_step > 0:
            state = checkpoint.restore(manager, state)
        writer = stack.enter_context(MetricWriter(workdir, first_step))
        say(f"{config.name}: {sum(x.size for x in jax.tree.leaves(state.params)):,} parameters, "
            f"{len(train_source):,} images to train on, {len(eval_source):,} to validate on, {total_steps:,} steps "
            f"of {config.batch_size} on {mesh.size} {mesh.devices.flat[0].platform} device(s); "
            f"{f'going on after step {first_step:,}' if first_step else 'starting'} in {workdir}")
        bar = stack.enter_context(tqdm(
            total=total_steps * config.batch_size, initial=first_step * config.batch_size, desc="train",
            unit=" images", unit_scale=True, mininterval=0.5 if sys.stderr.isatty() else 30.0,
            disable=jax.process_index() != 0))

        def evaluated(step: int) -> dict[str, Any]:
            result = evaluate.evaluate(eval_step, state.variables, eval_source, config, mesh)
            say(f"step {step:6,} epoch {step // steps_per_epoch:3}{evaluate.report(result)} loss {result['loss']:.4f}")
            return result

        result = evaluated(first_step) if first_step == total_steps else None
        waiting, bad_records = [], []
        for step in range(first_step + 1, total_steps + 1):
            batch, unreadable = next(batches)
            state, metrics = train_step(state, batch)
            bad_records += unreadable
            waiting.append(metrics)
            if step == first_step + 1:
                jax.block_until_ready(metrics)
                bar.unpause()  # the compilation does not count in images/s and time left
            last = step == total_steps
            if step % log_every == 0 or step % save_every == 0 or last:
                fetched = jax.device_get(waiting)
                waiting = []
                figures = {name: float(sum(m[name] for m in fetched) / len(fetched)) for name in fetched[0]}
                figures["bad_images"] *= len(fetched)  # in all of them; the others are means
                figures |= {"bad_records": bad_records} if bad_records else {}
                bar.set_postfix(loss=f"{figures['loss']:.4f}", accuracy=f"{100 * figures['accuracy']:.2f}%",
                                refresh=False)
                bar.update(len(fetched) * config.batch_size)
                writer.write(step, "train", figures)
                bad_records = []
            if step % eval_every == 0 or last:
                result = evaluated(step)
                writer.write(step, "eval", result)
            # After all its figures are written: a run that goes on from a checkpoint leaves no gap and no double.
            checkpoint.save(manager, state, step, force=last)
    say(evaluate.report(result))
    return result
