"""The training loop. One function, read from top to bottom; the same on one device and on many."""

import collections
import contextlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from fastervit_jax import compilation_cache
from fastervit_jax.data import loader, sources
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.train import evaluate, metrics, processes, schedule, sharding, speed
from fastervit_jax.train.check import check, profiled_steps
from fastervit_jax.train.checkpoint import Checkpoints
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.packing import Packing
from fastervit_jax.train.state import TrainState, abstract_state, create_state, load_weights, make_model
from fastervit_jax.train.step import make_train_step
from fastervit_jax.weights import pretrained

AHEAD = 2
"""Steps that are dispatched before their figures are there; their batches are in the devices' memory."""


class TrainingError(RuntimeError):
    """Training cannot go on: `count` updates in a row, up to that of step `last`, were not finite."""

    def __init__(self, count: int, last: int):
        super().__init__(
            f"the updates of steps {last - count + 1:,} to {last:,} were skipped, since loss or gradient was not "
            f"finite (config.max_bad_steps={count}). The state, which they did not change, is saved as step {last:,}. "
            "Started again, the run goes on with the next step; if that fails too, start another with a lower "
            "config.learning_rate or config.clip_norm")


def open_sources(config: ConfigDict) -> tuple[sources.Source, sources.Source, int]:
    """What to train on and to evaluate on, and the steps of an epoch. Raises ValueError if there cannot be any."""
    train_source = sources.make_source(config, config.data.train_split)
    eval_source = sources.make_source(config, config.data.eval_split)
    if train_source.multi_label:
        raise ValueError(f"{train_source.name} has several labels an image, which are for evaluation; expected "
                         "config.data.source with one")
    steps_per_epoch = len(train_source) // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"config.batch_size={config.batch_size}: larger than the {len(train_source)} training images")
    return train_source, eval_source, steps_per_epoch


def train(
    config: ConfigDict, workdir: pathlib.Path, devices: list[jax.Device] | None = None, *, keep_compiled: bool = False
) -> dict[str, Any]:
    """Train as `config` says, on all devices or the given ones, and return the last evaluation's result.

    A run that is in `workdir` already goes on from its last whole checkpoint; a finished one is evaluated again.
    `keep_compiled`: take the train step that a former start of the same program kept in the compilation cache, if there
    is one. Not for a program that changes modules, which does not change their files: it would get another's step.
    The result is that of the averaged weights, if there are. Raises ValueError if the run there has another config,
    TrainingError after config.max_bad_steps updates in a row that are not finite, processes.Stopped (which ends a
    program with processes.EXIT_CODE) once the state is saved where a signal asked the run to stop.
    """
    check(config)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.Stop())
        mesh = sharding.make_mesh(devices, data=config.mesh.data, fsdp=config.mesh.fsdp)
        sharding.check_batch(config.batch_size, config.accumulate, mesh)
        train_source, eval_source, steps_per_epoch = open_sources(config)
        total_steps = schedule.total_epochs(config) * steps_per_epoch
        eval_every = config.eval_every_epochs * steps_per_epoch
        save_every = config.checkpoint_every_epochs * steps_per_epoch
        profile_first, profile_last = profiled_steps(config)
        say = tqdm.write if jax.process_index() == 0 else lambda text: None  # once, not for every process

        model = make_model(config)
        optimizer, rates = make_optimizer(config), schedule.make_schedule(config, steps_per_epoch)
        abstract = abstract_state(model, optimizer, config, mesh)
        packing = Packing(abstract)
        train_step = make_train_step(model, optimizer, rates, config, mesh, total_steps, packing)
        eval_step = evaluate.make_eval_step(model, config, mesh)

        checkpoints = stack.enter_context(Checkpoints(
            workdir, keep=config.keep_checkpoints, keep_best=config.keep_best, say=say, packing=packing))
        if checkpoints.latest is not None:
            metrics.check_config(workdir, config)  # first: another model's checkpoint would look damaged

        def count_flops() -> float | None:
            if not speed.peak(mesh.devices.flat[0].device_kind):
                return None
            return speed.model_flops(model, abstract.variables, sources.image_sides(config), config.batch_size)

        # The step is compiled while the state is read or made; not where weights may turn out not to fit: a process
        # ends only when its compilation does.
        compiled, fresh = None, checkpoints.latest is None
        if jax.process_count() == 1 and (not config.init_from if fresh else checkpoints.latest < total_steps):
            parts = {"config": config.to_json(), "steps": [total_steps, steps_per_epoch], "mesh": dict(mesh.shape)}
            arguments = packing.abstract, loader.abstract_batch(config, sharding.over_batch(mesh))
            compiled = compilation_cache.compile_ahead(
                stack, train_step, arguments, count_flops, list(mesh.devices.flat), say,
                parts if keep_compiled else None)
        restored = checkpoints.restore(abstract)
        if restored is not None:
            state, left = restored[0], restored[1]["extra"]  # figures since the last line, an evaluation half done
            state = state.replace(
                bad_steps=jax.jit(lambda: jnp.int32(0), out_shardings=state.bad_steps.sharding)())
        else:
            state, left = create_state(model, optimizer, config, mesh, abstract), {}
        first_step = int(state.step)
        batches = stack.enter_context(contextlib.closing(loader.train_batches(
            train_source, config, first_step=first_step, last_step=total_steps, sharding=sharding.over_batch(mesh))))
        if restored is None and config.init_from:
            variables, report = load_weights(config.init_from, config.init_from_ema, config, mesh)
            state = state.starting_from(variables)
            del variables
            say(str(report))
        metrics.claim_workdir(workdir, config, started=restored is not None)
        writer = stack.enter_context(metrics.MetricWriter(
            workdir, first_step, to_evaluate=left.get("to_evaluate", False), config=config))
        say(f"{config.name}: {sum(x.size for x in jax.tree.leaves(state.params)):,} parameters, "
            f"{len(train_source):,} images to train on, {len(eval_source):,} to validate on, {total_steps:,} steps "
            f"of {config.batch_size} on {mesh.size} {mesh.devices.flat[0].platform} device(s); "
            f"{f'going on after step {first_step:,}' if restored else 'starting'} in {workdir}\n"
            f"{schedule.describe(config)}\n{sharding.describe(state, mesh)}")
        watchdog = stack.enter_context(processes.Watchdog(config.stuck_after))
        train_step, flops = compiled() if compiled else (train_step, count_flops())
        meter = stack.enter_context(
            speed.Meter(flops, config.batch_size, mesh.devices.flat, first_step, total_steps))
        bar = stack.enter_context(tqdm(
            total=total_steps * config.batch_size, initial=first_step * config.batch_size, desc="train",
            unit=" images", unit_scale=True, mininterval=0.5 if sys.stderr.isatty() else 30.0,
            disable=jax.process_index() != 0))

        def going_on() -> None:
            watchdog.alive()
            stop.check()

        def catch_up(last: int) -> None:
            """Take in the figures of the steps up to `last`, and write the lines that are due."""
            nonlocal bad_in_row
            ready = [step for step in in_flight if step[0] <= last]
            del in_flight[:len(ready)]
            figures.extend(_fetch(ready))
            if ready:
                bad_in_row = figures[-1][0]["bad_steps_in_row"]
            if bad_in_row >= config.max_bad_steps:
                raise TrainingError(config.max_bad_steps, int(packing.unpack(packed).step))
            while due and due[0] <= last:
                log(due.popleft())

        def extra() -> Callable[[], dict[str, Any]]:
            """What a checkpoint keeps besides the state, of now; to call it waits for the steps in flight."""
            there, ahead, again = list(figures), list(in_flight), to_evaluate

            def complete() -> dict[str, Any]:
                steps = there + _fetch(ahead)
                return {"figures": [step for step, _ in steps], "bad_records": _unreadable(steps),
                        "to_evaluate": again}

            return complete

        def log(step: int) -> None:
            nonlocal logged
            done, figures[:] = figures[:step - logged], figures[step - logged:]
            summary = {"epoch": step / steps_per_epoch, **_summary([step for step, _ in done])}
            speeds, bad_records = meter.figures(step), _unreadable(done)
            writer.write(step, "train", summary | ({"bad_records": bad_records} if bad_records else {}))
            writer.write_speed(step, speeds)
            if summary["bad_steps"]:
                say(f"step {step:6,}: {summary['bad_steps']:.0f} of the last {len(done)} updates skipped, "
                    "loss or gradient was not finite")
            bar.set_postfix_str(_postfix(summary, speeds), refresh=False)
            logged = step

        def evaluated(state: TrainState, step: int, *, write: bool) -> dict[str, Any]:
            for name, variables in (("eval", state.variables), ("eval_ema", state.ema)):
                if variables is None:
                    continue
                with meter.apart():
                    result = evaluate.evaluate(eval_step, variables, eval_source, config, mesh, going_on)
                say(f"step {step:6,} epoch {step // steps_per_epoch:3}{evaluate.report(result)} "
                    f"loss {result['loss']:.4f}{' (averaged weights)' if name == 'eval_ema' else ''}")
                if write:
                    results[name] = result
            for name in list(results):  # when all are there: an evaluation that is stopped is done again
                writer.write(step, name, results.pop(name))
            return result

        # Of each step since the last line: figures, and images that could not be read (restored, all at the first).
        figures = [(step, [] if i else left["bad_records"]) for i, step in enumerate(left.get("figures", []))]
        to_evaluate = left.get("to_evaluate", False)
        profiling = False
        stack.callback(lambda: jax.profiler.stop_trace() if profiling else None)
        if 0 < profile_first <= first_step or profile_first > total_steps:
            say(f"config.profile={config.profile}: no profile, for steps {first_step + 1:,} to {total_steps:,} "
                "are left")
        in_flight, due, results, logged = [], collections.deque(), {}, first_step - len(figures)
        bad_in_row = 0
        packed = packing.pack(state)
        try:
            if to_evaluate:
                result = evaluated(state, first_step, write=True)
                to_evaluate = False
                if config.keep_best and checkpoints.is_best(result["acc1"]):
                    _export(model, state, workdir, config, say)
                checkpoints.evaluated(first_step, result["acc1"], extra()())
            elif first_step == total_steps:
                result = evaluated(state, first_step, write=False)
            del state, restored  # their memory is the first step's
            for step in range(first_step + 1, total_steps + 1):
                going_on()
                with meter.waiting():
                    batch, unreadable = next(batches)
                if step == profile_first:
                    jax.profiler.start_trace(workdir / "profile")
                    profiling = True
                spent, (packed, new) = packed, train_step(packed, batch)
                checkpoints.free(spent)
                del spent
                meter.stepped(new)
                in_flight.append((step, new, unreadable))
                if step == first_step + 1:
                    meter.start(step)  # the compilation does not count in images/s and time left
                    bar.unpause()
                last, acc1 = step == total_steps, None
                if profiling and (step == profile_last or last):
                    jax.block_until_ready(new)
                    jax.profiler.stop_trace()
                    profiling = False
                bar.update(config.batch_size)
                if step % config.log_every_steps == 0 or last:
                    due.append(step)
                catch_up(step - AHEAD)  # at each step: to fetch a whole line's figures would hold the host up
                if step % eval_every == 0 or last:
                    catch_up(step)
                    to_evaluate = True
                    result = evaluated(packing.unpack(packed), step, write=True)
                    to_evaluate, acc1 = False, result["acc1"]
                best = config.keep_best and checkpoints.is_best(acc1)
                if step % save_every == 0 or last or best:
                    # A checkpoint has all figures since the last line: a run that goes on leaves no gap and no double.
                    # The last ones are fetched by the thread that saves, while the devices go on; but a line that is
                    # due comes first, and so do figures that may end the run.
                    if due or bad_in_row + AHEAD >= config.max_bad_steps:
                        catch_up(step)
                    if best:
                        with meter.apart():
                            _export(model, packing.unpack(packed), workdir, config, say)
                    with contextlib.nullcontext() if checkpoints.beside else meter.apart():
                        checkpoints.save(packed, step, acc1=acc1, wait=last, extra=extra())
                    watchdog.alive()
        except (processes.Stopped, TrainingError) as error:
            step = int(packing.unpack(packed).step)
            figures, in_flight = (figures + _fetch(in_flight))[:step - logged], []
            for line in due:
                if line <= step:
                    log(line)
            if isinstance(error, TrainingError):  # raised before what is due after this step
                to_evaluate = step % eval_every == 0 or step == total_steps
            watchdog.alive()
            checkpoints.save(packed, step, wait=True, extra=extra())
            say(f"saved after step {step:,} in {workdir}; the same command goes on from there")
            raise
    say(evaluate.report(result))
    return result


def _fetch(in_flight: list[tuple[int, dict[str, jax.Array], list[str]]]) -> list[tuple[dict[str, float], list[str]]]:
    """Figures and unreadable images of each step."""
    fetched = jax.device_get([step for _, step, _ in in_flight])
    return [({name: float(x) for name, x in step.items()}, unreadable)
            for step, (_, _, unreadable) in zip(fetched, in_flight, strict=True)]


def _unreadable(figures: list[tuple[dict[str, float], list[str]]]) -> list[str]:
    return [name for _, names in figures for name in names]


def _summary(figures: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps whose update was made; of bad images and skipped updates, how many."""
    made = [step for step in figures if not step["bad_steps"]]
    summary = {name: sum(step[name] for step in made) / len(made) for name in (made[0] if made else ())}
    summary |= {name: sum(step[name] for step in figures) for name in ("bad_images", "bad_steps")}
    summary.pop("bad_steps_in_row", None)
    return summary


def _postfix(summary: dict[str, float], speeds: dict[str, float]) -> str:
    """'loss 2.1034, accuracy 31.25%, …, mfu 20.1%, input wait 0.3%, memory 19.0 GiB', as far as these are known."""
    parts = [f"loss {summary['loss']:.4f}", f"accuracy {100 * summary['accuracy']:.2f}%"] if "loss" in summary else []
    parts += [f"{name.replace('_', ' ')} {summary[name]:.3g}"
              for name in ("learning_rate", "gradient_norm", "parameter_norm") if name in summary]
    parts += [f"{name.replace('_', ' ')} {100 * speeds[name]:.1f}%" for name in ("mfu", "input_wait") if name in speeds]
    parts += [f"memory {speeds['memory_gib']:.1f} GiB"] if "memory_gib" in speeds else []
    return ", ".join(parts)


def _export(
    model: FasterViT, state: TrainState, workdir: pathlib.Path, config: ConfigDict, say: Callable[[str], None]
) -> None:
    """Write WORKDIR/best.safetensors: the averaged weights, if there are, else the weights."""
    variables = state.ema or state.variables
    if jax.process_count() > 1:
        variables = multihost_utils.process_allgather(variables, tiled=True)
    if jax.process_index() == 0:
        try:
            pretrained.save_pretrained(
                model, variables, workdir / "best.safetensors", resolution=config.data.image_size)
        except OSError as error:
            say(f"best.safetensors could not be written ({error}); the best weights so far are in the checkpoints only")
