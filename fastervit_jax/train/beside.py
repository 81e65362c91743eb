"""What lets a save go on beside training: a copy of the state on the devices, and short turns of Python's threads."""

import contextlib
import functools
import gc
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

TURN = 1e-5
"""Seconds after which a thread of Python has to give way to another during a save (otherwise 0.005). The thread that
trains waits so long a few times a step; where that adds up to half a step, the devices run out of work."""


@contextlib.contextmanager
def in_small_turns() -> Iterator[None]:
    """Threads of Python take turns of TURN seconds, not 0.005, and none stops all others to collect garbage.

    For orbax's work on each array, a second or two of it, beside a thread that has steps to dispatch.
    """
    turns, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(TURN)
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(turns)
        if collects:
            gc.enable()


def fits(tree: Any, target: Any) -> bool:
    """Whether the arrays of a tree lie on the devices as those of the other, of the same structure."""
    return all(x.sharding == y.sharding or x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in
               zip(jax.tree.leaves(tree), jax.tree.leaves(target), strict=True))


@functools.lru_cache(maxsize=4)
def compiled_copy(leaves: tuple[jax.ShapeDtypeStruct, ...]) -> jax.stages.Compiled:
    """The program that copies a list of arrays to where they are."""
    where = [x.sharding for x in leaves]
    return jax.jit(lambda arrays: [jnp.copy(x) for x in arrays], out_shardings=where).lower(list(leaves)).compile()


def has_room(state: Any) -> bool:
    """Whether the devices can hold another one, going by the most that they have held. What unpacking it takes, the
    small arrays once more, is left out."""
    sizes = {}
    for x in jax.tree.leaves(state):
        for shard in x.addressable_shards:
            sizes[shard.device] = sizes.get(shard.device, 0) + shard.data.nbytes
    for device, size in sizes.items():
        memory = device.memory_stats() or {}
        if memory.get("peak_bytes_in_use", 0) + size > memory.get("bytes_limit", math.inf):
            return False
    return True
