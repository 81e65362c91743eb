"""One run of a sweep, in a process of its own: trains, measures, and writes what came out of it.

    python -m fastervit_jax.sweep_run WORKDIR NAME

`sweep` starts it; by hand it does one run of WORKDIR/sweep.json again. It goes on where it stopped.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from fastervit_jax import compilation_cache
from fastervit_jax.data import sources
from fastervit_jax.train import loop, speed
from fastervit_jax.train.state import init_variables, make_model
from fastervit_jax.weights.torch_file import replacing

REPEATS = 11
"""Forward passes of which the median counts."""


def from_json(config: dict[str, Any]) -> ConfigDict:
    """The config of a run as it was before it became JSON, which knows no tuples."""
    def restored(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: restored(value) for key, value in x.items()}
        return tuple(map(restored, x)) if isinstance(x, list) else x

    return ConfigDict(restored(config)).lock()


def sizes(config: ConfigDict) -> dict[str, int | float]:
    """Parameters, and GFLOPs of one image's forward pass (two for each product; see `speed.model_flops`)."""
    model = make_model(config)
    shapes = jax.eval_shape(lambda: init_variables(model, config))
    flops = speed.model_flops(model, shapes, sources.image_sides(config), config.batch_size)
    return {"parameters": sum(x.size for x in jax.tree.leaves(shapes["params"])), "gflops": flops / 1e9}


def inference_speed(config: ConfigDict, repeats: int = REPEATS) -> float:
    """Images a second of the jitted forward pass on one device, with as many images as it trains on at a time."""
    model, rng = make_model(config), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_variables(model, config))
    variables = jax.device_put(jax.tree.map(lambda x: rng.uniform(0.01, 0.05, x.shape).astype(x.dtype), shapes))
    images = max(1, config.batch_size // config.accumulate // jax.device_count())
    shape = (images, *sources.image_sides(config), config.model.in_chans)
    batch = jax.device_put(rng.normal(size=shape).astype(np.float32))
    forward = jax.jit(model.apply)
    jax.block_until_ready(forward(variables, batch))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(forward(variables, batch))
        seconds.append(time.perf_counter() - start)
    return images / statistics.median(seconds)


def memory() -> tuple[float, str]:
    """The most that was ever in use, GiB: on one of the devices, or of the process where they do not tell it."""
    used = [stats["peak_bytes_in_use"] for device in jax.local_devices()
            if "peak_bytes_in_use" in (stats := device.memory_stats() or {})]
    if used:
        return max(used) / 2**30, "device"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30, "process"


def run(config: ConfigDict, folder: pathlib.Path) -> dict[str, Any]:
    """Train in `folder` and measure. Top-1 and loss are those of the last evaluation, of averaged weights if there are.

    memory_gib is None where the run had been trained before this process started. Raises what `loop.train` raises.
    """
    lines = _speeds(folder)
    evaluated = loop.train(config, folder)
    speeds = _speeds(folder)
    peak, memory_of = memory()
    return {
        "acc1": evaluated["acc1"], "acc5": evaluated["acc5"], "loss": evaluated["loss"],
        "averaged_weights": bool(config.ema_decay), **sizes(config),
        "train_images_per_second": statistics.median(speeds) if speeds else None,
        "inference_images_per_second": inference_speed(config),
        "memory_gib": peak if len(speeds) > len(lines) or not lines else None, "memory_of": memory_of,
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(), "jax": jax.__version__,
    }


def _speeds(folder: pathlib.Path) -> list[float]:
    path = folder / "speed.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    name = "speed/images_per_second"
    return [figures[name] for line in whole if name in (figures := json.loads(line))]


def die_with(parent: int) -> None:
    """End this process at once when its parent has ended, so that nothing goes on unseen in the run's folder."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os.write(2, b"\nThe sweep has ended, and with it this run.\n")
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fastervit_jax.sweep_run", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("name", help="of the run, in WORKDIR/sweep.json")
    parser.add_argument("--parent", type=int, help="process with which to end")
    given = parser.parse_args(arguments)
    if given.parent:
        die_with(given.parent)
    logging.set_verbosity(logging.WARNING)  # orbax tells of every step of every save
    runs = {entry["name"]: entry for entry in json.loads((given.workdir / "sweep.json").read_text())["runs"]}
    if given.name not in runs:
        sys.exit(f"{given.workdir}/sweep.json has no run {given.name!r}; it has {', '.join(runs)}")
    entry, folder = runs[given.name], given.workdir / "runs" / given.name
    result = {key: entry[key] for key in ("name", "overrides", "seed")} | run(from_json(entry["config"]), folder)
    with replacing(folder / "result.json") as new, new.open("w") as file:
        file.write(json.dumps(result, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())  # a machine that fails must not leave an empty one, which looks done


if __name__ == "__main__":
    compilation_cache.enable()
    main()
