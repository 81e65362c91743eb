"""Damages the newest of two checkpoints, again and again, and restores.

    python -m tests.train.damage --cases=100

Prints a line of JSON for each case: what was done to which file, and what came of it. 'same': the newest state was
restored, bit for bit, the damage being in bytes that nobody reads; 'older': the older one was, and it was told; all
else, an exception among them, is a failure, and the script ends with 1. A restore of more than two minutes ends it with
the stacks of its threads. Orbax's reads that fail complain on standard error.
"""

import argparse
import faulthandler
import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fastervit_jax.train import sharding
from fastervit_jax.train.checkpoint import Checkpoints
from fastervit_jax.train.state import TrainState

DAMAGES = "flip a bit", "cut off", "delete", "zero"


def make_state(seed: int, mesh: jax.sharding.Mesh) -> TrainState:
    """43 arrays: matrices that fsdp splits, vectors, scalars, float32, bfloat16, int32, bool."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    params = {f"layer_{i}": {"kernel": normal(32, 64), "bias": normal(64)} for i in range(3)}
    params |= {"half": normal(64, 33, dtype=jnp.bfloat16), "scale": normal(), "mask": normal(5, 3) > 0}
    statistics = {"norm": {"mean": normal(64), "var": normal(64)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    opt_state = jax.tree.map(lambda x: x if x.ndim == 0 else normal(*x.shape, dtype=x.dtype), optimizer.init(params))
    average = jax.tree.map(lambda x: ~x if x.dtype == bool else x + 1, {"params": params, "batch_stats": statistics})
    state = TrainState(step=jnp.int32(seed), params=params, batch_stats=statistics, opt_state=opt_state, ema=average,
                       bad_steps=jnp.int32(7 * seed))
    return jax.device_put(state, sharding.shardings(state, mesh))


def folders(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def same(x: TrainState, y: TrainState) -> bool:
    """Bit for bit."""
    return jax.tree.structure(x) == jax.tree.structure(y) and all(
        a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True))


def damage(path: pathlib.Path, how: str, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    if how == "delete":
        path.unlink()
        return
    if how == "flip a bit":
        content[place] ^= 1 << int(rng.integers(8))
    elif how == "cut off":
        del content[place:]
    elif how == "zero":
        length = int(rng.integers(1, 4097))
        content[place:place + length] = bytes(len(content[place:place + length]))
    path.write_bytes(content)


def outcome(workdir: pathlib.Path, states: dict[int, TrainState]) -> tuple[str, list[str]]:
    """What a restore gives, and what was told."""
    told = []
    newest = max(states)
    try:
        with Checkpoints(workdir, keep=3, keep_best=True, say=told.append) as checkpoints:
            found = checkpoints.restore(states[newest])
    except Exception as error:
        return f"{type(error).__name__}: {error}", told
    if found is None:
        return "nothing", told
    step = int(found[1]["step"])
    if not same(found[0], states[step]):
        return f"a wrong state as step {step}", told
    if step == newest:
        return "same" if not told else "same, but something was told", told
    return "older" if len(told) == 1 and f"step {newest} is damaged" in told[0] else "older, but not told", told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    mesh = sharding.make_mesh(fsdp=2 if len(jax.devices()) % 2 == 0 else 1)
    states = {step: make_state(step, mesh) for step in (1, 2)}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        whole, damaged = pathlib.Path(folder, "whole"), pathlib.Path(folder, "damaged")
        with Checkpoints(whole, keep=3, keep_best=True, say=print) as checkpoints:
            for step, state in states.items():
                checkpoints.save(state, step, acc1=0.5)
        for case in range(arguments.seed, arguments.seed + arguments.cases):
            faulthandler.dump_traceback_later(120, exit=True)
            rng = np.random.default_rng(case)
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(whole, damaged)
            newest = damaged / "checkpoints" / str(max(states))
            how = DAMAGES[case % len(DAMAGES)]
            paths = sorted(path for path in newest.rglob("*") if path.is_file())
            sizes = np.asarray([path.stat().st_size for path in paths])
            # A bit anywhere is as likely; but each kind of file is cut off or lost.
            path = rng.choice(paths, p=sizes / sizes.sum() if how in ("flip a bit", "zero") else None)
            file = str(path.relative_to(newest))
            before = path.read_bytes()
            damage(path, how, rng)
            unchanged = path.exists() and path.read_bytes() == before  # zeros where zeros were
            result, told = outcome(damaged, states)
            results.append(result in (("same",) if unchanged else ("same", "older")))
            print(json.dumps({"case": case, "file": file, "damage": how, "result": result, "told": told}), flush=True)
    print(json.dumps({"cases": len(results), "failures": results.count(False)}))
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
