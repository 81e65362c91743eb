"""How fast a recipe feeds and trains: `data`, `input` and `train` of `python -m fastervit_jax.benchmark`."""

import argparse
import ast
import collections
import contextlib
import importlib.util
import itertools
import json
import math
import os
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_sample_images

from configs import imagenet
from fastervit_jax.data import augment, loader, sources
from fastervit_jax.train import losses, processes, schedule, sharding
from fastervit_jax.train.checkpoint import Checkpoints
from fastervit_jax.train.loop import AHEAD
from fastervit_jax.train.metrics import MetricWriter
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.packing import Packing
from fastervit_jax.train.speed import Meter
from fastervit_jax.train.state import create_state, make_model
from fastervit_jax.train.step import make_train_step

SIZE = (500, 375)
CLASSES = 10


def write_jpegs(root: pathlib.Path, count: int) -> None:
    """`count` photographs as root/train/CLASS/N.jpg, a third of them upright."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(count):
        width, height = SIZE if i % 3 else SIZE[::-1]
        left, top = rng.integers(640 - width), rng.integers(max(1, 427 - height))
        cut = Image.fromarray(photographs[i % 2]).crop((left, top, left + width, top + min(height, 427)))
        pixels = np.asarray(cut.resize((width, height)), np.int64) + rng.integers(-6, 7, (height, width, 3))
        path = root / "train" / str(i % CLASSES) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=94)


def tell(**figures: Any) -> None:
    """A line of JSON."""
    print(json.dumps({name: round(x, 4) if isinstance(x, float) else x for name, x in figures.items()}), flush=True)


def plain_loop(source: Any, config: ConfigDict) -> Iterator[Any]:
    """One image after the other, in this process."""
    order, read = loader.train_order(source, config)
    for start in itertools.count(step=config.batch_size):
        for place in range(start, start + config.batch_size):
            read.pixels(source[order[place]]["image"], place)
        yield


def host_feed(source: Any, config: ConfigDict, workers: int) -> loader.HostBatches:
    """The feed as in training, but without devices."""
    order, read = loader.train_order(source, config)
    return loader.HostBatches(loader.batches(order, read, config.batch_size), workers, config.data.timeout)


def tf_batches(source: Any, config: ConfigDict, threads: int, antialias: bool) -> Iterator[Any]:
    """The same work in tf.data: the same crops, decoded in part, resized (bilinear) and put into batches."""
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")
    files = [os.fsdecode(source.record_name(i)) for i in range(len(source))]
    size, (low, high), ratio = config.data.image_size, config.data.crop_scale, config.data.crop_ratio

    def read(file):
        data = tf.io.read_file(file)
        box, length, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data), tf.zeros((1, 0, 4)), area_range=(low, high), aspect_ratio_range=ratio,
            max_attempts=10, use_image_if_no_bounding_boxes=True, min_object_covered=0.0)
        crop = tf.image.decode_and_crop_jpeg(data, tf.concat([box[:2], length[:2]], 0), channels=3)
        return tf.cast(tf.image.resize(crop, (size, size), antialias=antialias), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(read, num_parallel_calls=threads).batch(config.batch_size).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    yield from dataset.with_options(options).as_numpy_iterator()


def benchmark_data(source: Any, config: ConfigDict, workers: list[int], seconds: float, repeat: int) -> None:
    """Images a second on the host: median, lowest and highest of rounds in which all ways take their turn."""
    ways: dict[str, Callable[[], Iterator[Any]]] = {"plain loop": lambda: plain_loop(source, config)}
    for count in workers:
        ways[f"feed, {count} workers"] = lambda count=count: host_feed(source, config, count)
        if importlib.util.find_spec("tensorflow"):
            ways[f"tf.data, {count} threads"] = lambda count=count: tf_batches(source, config, count, False)
            ways[f"tf.data, {count} threads, antialiased"] = lambda count=count: tf_batches(source, config, count, True)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeat):
        for name, make in ways.items():
            with contextlib.closing(make()) as batches:
                next(batches)
                start = time.perf_counter()
                while time.perf_counter() < start + seconds / 2:  # all workers start, what they decoded ahead is used
                    next(batches)
                start, done = time.perf_counter(), 0
                while time.perf_counter() < start + seconds:
                    next(batches)
                    done += config.batch_size
                rates[name].append(done / (time.perf_counter() - start))
            tell(benchmark="data", way=name, round=round_, images_per_second=rates[name][-1])
    kilobytes = statistics.mean(len(source[i]["image"]) for i in range(len(source))) / 1e3
    for name, found in rates.items():
        tell(benchmark="data", way=name, median=statistics.median(found), lowest=min(found),
             highest=max(found), cores=len(os.sched_getaffinity(0)), mean_kilobytes=kilobytes)


def benchmark_input(source: Any, config: ConfigDict, steps: int) -> None:
    """The train step with a batch that is there already, and fed; and augmentation alone."""
    mesh = sharding.make_mesh()
    model = make_model(config)
    optimizer, rates = make_optimizer(config), schedule.make_schedule(config, steps_per_epoch=1000)
    state = create_state(model, optimizer, config, mesh)
    packing = Packing(state)
    train_step = make_train_step(model, optimizer, rates, config, mesh, 310_000, packing)
    state = packing.pack(state)

    @jax.jit
    def augmented(key, batch):
        targets = losses.smooth_one_hot(batch["label"], model.config.num_classes, config.label_smoothing)
        return augment.train_images(
            key, batch["image"], targets, batch["weight"], config.augment, config.data.mean, config.data.std, mesh)

    feed = loader.train_batches(source, config, first_step=0, last_step=10**6, sharding=sharding.over_batch(mesh))
    with contextlib.closing(feed):
        start = time.perf_counter()
        batch, _ = next(feed)
        tell(benchmark="input", first_batch_seconds=time.perf_counter() - start)
        start = time.perf_counter()
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)
        tell(benchmark="input", compile_seconds=time.perf_counter() - start)
        key = jax.random.key(0)
        jax.block_until_ready(augmented(key, batch))

        for round_ in range(3):
            start = time.perf_counter()
            for _ in range(steps):
                state, metrics = train_step(state, batch)
            jax.block_until_ready(metrics)
            resident = (time.perf_counter() - start) / steps

            start = time.perf_counter()
            for _ in range(steps):
                result = augmented(key, batch)
            jax.block_until_ready(result)
            augmentation = (time.perf_counter() - start) / steps

            waited, before = 0.0, None
            for i in range(2 * steps):  # the first half uses up what was decoded meanwhile
                if i == steps:
                    jax.block_until_ready(metrics)
                    start, waited = time.perf_counter(), 0.0
                asked = time.perf_counter()
                batch, _ = next(feed)
                waited += time.perf_counter() - asked
                state, metrics = train_step(state, batch)
                if before is not None:
                    jax.block_until_ready(before)  # at most two steps ahead
                before = metrics
            jax.block_until_ready(metrics)
            fed = (time.perf_counter() - start) / steps
            tell(benchmark="input", round=round_, device=jax.devices()[0].device_kind, batch=config.batch_size,
                 workers=config.data.workers, cores=len(os.sched_getaffinity(0)), step_ms=1e3 * resident,
                 fed_step_ms=1e3 * fed, images_per_second=config.batch_size / fed,
                 waiting=max(0.0, 1 - resident / fed), host_in_next_ms=1e3 * waited / steps,
                 augmentation_ms=1e3 * augmentation, augmentation_share=augmentation / resident)


def logging_costs(
    state: Any, timed: Callable, config: ConfigDict, mesh: Any, folder: pathlib.Path, repeat: int
) -> tuple[Any, list[float]]:
    """The state after it, and the part of a step that training's figures and logging take: with them and without, in
    turns, over twice config.log_every_steps steps; its median, lowest and highest."""
    every = config.log_every_steps
    if every <= AHEAD:
        raise ValueError(f"config.log_every_steps={every}: expected more than {AHEAD}, to tell lines apart")
    with MetricWriter(folder, 0) as writer, Meter(
            1.0, config.batch_size, mesh.devices.flat, 0, 10**6) as meter:
        in_flight, figures = collections.deque(), []

        def log(step: int, found: Any) -> None:
            with meter.waiting():
                pass
            meter.stepped(found)
            in_flight.append(found)
            if len(in_flight) > AHEAD:
                figures.append(jax.device_get(in_flight.popleft()))
            if step > every and step % every == AHEAD:
                writer.write(step, "train", {name: float(sum(x[name] for x in figures)) for name in figures[0]})
                figures.clear()
                writer.write_speed(step, meter.figures(step - AHEAD))

        costs = []
        for _ in range(repeat):
            state, without, *_ = timed(state, 2 * every + AHEAD)
            in_flight.clear()
            figures.clear()
            meter.start(0)
            state, with_logs, *_ = timed(state, 2 * every + AHEAD, log=log)
            costs.append(with_logs / without - 1)
    return state, [statistics.median(costs), min(costs), max(costs)]


def save_costs(
    state: Any, timed: Callable, packing: Packing, folder: pathlib.Path, repeat: int
) -> tuple[Any, list[float], float]:
    """The state after it; by how many steps a save delays the steps beside it, with one and without in turns: median,
    lowest and highest; and the median of the milliseconds for which the call holds the host."""
    costs, held = [], []
    for _ in range(repeat):
        state, without, *_ = timed(state)
        with Checkpoints(folder, keep=1, keep_best=False, say=print, packing=packing) as checkpoints:
            checkpoints.save(state, 0, wait=True)  # compiles what takes the digests
            state, with_save, steps, seconds = timed(state, checkpoints=checkpoints)
        shutil.rmtree(folder / "checkpoints")
        costs.append(steps * (with_save / without - 1))
        held.append(1e3 * seconds)
    return state, [statistics.median(costs), min(costs), max(costs)], statistics.median(held)


def benchmark_train(
    config: ConfigDict, counts: list[int], steps: int, repeat: int, save: bool, logs: bool = False
) -> None:
    """The recipe's step on so many devices each, config.batch_size images a device; efficiency against the first.

    On the devices of several processes, each calls it, and the first one tells.
    """
    first = None
    for count in counts:
        with config.unlocked():
            own = ConfigDict(config)
            own.batch_size = count * config.batch_size
        mesh = sharding.make_mesh(jax.devices()[:count], data=own.mesh.data, fsdp=own.mesh.fsdp)
        model, optimizer = make_model(own), make_optimizer(own)
        rates = schedule.make_schedule(own, steps_per_epoch=1000)
        state = create_state(model, optimizer, own, mesh)
        packing = Packing(state)
        train_step = make_train_step(model, optimizer, rates, own, mesh, 310_000, packing)
        state = packing.pack(state)
        rng, size = np.random.default_rng(0), own.data.image_size
        batch = jax.device_put({
            "image": rng.integers(0, 256, (own.batch_size, size, size, own.model.in_chans), np.uint8),
            "label": rng.integers(0, own.model.num_classes, own.batch_size).astype(np.int32),
            "weight": np.ones(own.batch_size, np.float32),
        }, sharding.over_batch(mesh))
        start = time.perf_counter()
        compiled = train_step.lower(state, batch).compile()
        compile_seconds = time.perf_counter() - start

        def timed(state, steps=steps, checkpoints=None, log=lambda step, metrics: None, compiled=compiled, batch=batch):
            """The state after it; seconds a step; how many there were: with a save, after the first of them, at least
            until it is done; seconds for which the save held the host."""
            state, metrics = jax.block_until_ready(compiled(state, batch))
            start, held, before, done = time.perf_counter(), 0.0, collections.deque([metrics], AHEAD), 0
            while done < steps or (checkpoints and checkpoints.saving):
                spent, (state, metrics) = state, compiled(state, batch)
                if checkpoints:
                    checkpoints.free(spent)
                if done == 0 and checkpoints:
                    asked = time.perf_counter()
                    checkpoints.save(state, checkpoints.latest + 1)
                    held = time.perf_counter() - asked
                jax.block_until_ready(before[0])  # as in training, the host is a step or two ahead
                before.append(metrics)
                done += 1
                log(done, metrics)
            jax.block_until_ready(metrics)
            return state, (time.perf_counter() - start) / done, done, held

        seconds = []
        for _ in range(repeat):
            state, step, *_ = timed(state)
            seconds.append(step)
        step = statistics.median(seconds)
        rate = own.batch_size / step
        first = first or rate / count
        more = {}
        with tempfile.TemporaryDirectory(prefix="fastervit_jax_benchmark_") as folder:
            if logs:
                state, costs = logging_costs(state, timed, own, mesh, pathlib.Path(folder), repeat)
                names = "logging_costs", "lowest_logging_costs", "highest_logging_costs"
                more |= dict(zip(names, costs, strict=True))
            if save:
                state, costs, held = save_costs(state, timed, packing, pathlib.Path(folder), repeat)
                names = "save_costs_steps", "lowest_save_costs_steps", "highest_save_costs_steps"
                more |= {"save_holds_host_ms": held, **dict(zip(names, costs, strict=True))}
        memory = [device.memory_stats() or {} for device in mesh.local_devices]
        if jax.process_index():
            continue
        tell(benchmark="train", variant=own.name.removeprefix("imagenet_"), device=mesh.devices.flat[0].device_kind,
             processes=jax.process_count(), devices=count, fsdp=mesh.shape["fsdp"], batch=own.batch_size,
             accumulate=own.accumulate, compile_seconds=compile_seconds, step_ms=1e3 * step,
             lowest_ms=1e3 * min(seconds), highest_ms=1e3 * max(seconds), images_per_second=rate,
             efficiency=rate / count / first,
             peak_gib=max(x.get("peak_bytes_in_use", 0) for x in memory) / 2**30 or None,
             temporary_gib=compiled.memory_analysis().temp_size_in_bytes / 2**30, **more)


def main(what: str, arguments: list[str]) -> None:
    """The command: `what` is data, input or train."""
    parser = argparse.ArgumentParser(prog=f"python -m fastervit_jax.benchmark {what}", description=__doc__)
    parser.add_argument("--variant", default="faster_vit_0_224", help="of configs/imagenet.py's recipe")
    parser.add_argument("--batch", type=int, help="images a batch; default 64 for data, 512 for input; for train 128, "
                        "and a device")
    parser.add_argument("--workers", type=int, nargs="+", help="processes; default 1 2 for data, 16 for input")
    parser.add_argument("--images", type=int, default=512, help="JPEGs to make")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of data")
    parser.add_argument("--repeat", type=int, default=3, help="rounds of data")
    parser.add_argument("--steps", type=int, default=180, help="of each measurement of input; the more workers, the "
                        "more batches are decoded ahead, which must be few beside these")
    parser.add_argument("--devices", type=int, nargs="+", help="of each measurement of train; default 1, and of "
                        "several processes all")
    for name, kind, text in (("coordinator", str, "HOST:PORT of process 0, where train is to run in several"),
                             ("processes", int, "how many"), ("process", int, "which of them this is, from 0")):
        parser.add_argument(f"--{name}", type=kind, help=text)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True, help="a checkpoint in train, "
                        "to see what it holds up; --no-save where the state is too large for the disk")
    parser.add_argument("--log", action="store_true", help="also what figures and logging cost in train")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes of the recipe's config")
    args = parser.parse_args(arguments)
    is_data = what == "data"
    several = args.coordinator, args.processes, args.process
    if several != (None,) * 3 and (None in several or what != "train" or args.save):
        parser.error("--coordinator, --processes and --process: expected all three, for train, with --no-save")
    workers = args.workers or ([1, 2] if is_data else [16])

    config = imagenet.get_config(args.variant)
    config.update_from_flattened_dict({key: ast.literal_eval(value) for key, value in (x.split("=") for x in args.set)})
    if what == "train":
        config.batch_size = args.batch or 128
        with processes.started(coordinator=args.coordinator, processes=args.processes, process=args.process,
                               settings=str(config)):
            counts = args.devices or [jax.device_count() if args.processes else 1]
            benchmark_train(config, counts, args.steps, args.repeat, args.save, args.log)
        return
    with tempfile.TemporaryDirectory(prefix="fastervit_jax_benchmark_") as folder, config.unlocked():
        config.data.source, config.data.dir, config.data.workers = "folder", folder, workers[-1]
        config.model.num_classes = CLASSES
        config.batch_size = args.batch or (64 if is_data else 512)
        config.augment.mix_group = math.gcd(config.batch_size, config.augment.mix_group)
        config.bn_group_size = math.gcd(config.batch_size, config.bn_group_size)
        write_jpegs(pathlib.Path(folder), args.images)
        source = sources.make_source(config, "train")
        if is_data:
            benchmark_data(source, config, workers, args.seconds, args.repeat)
        else:
            benchmark_input(source, config, args.steps)
