"""A digest of each array of a tree: two 32-bit sums over its values and their places, computed on the devices.

They are sums of integers, so they are the same on any number of devices, however the arrays are split over them. A
change of one value always changes the first; any other change, of bits that stand for the same number too, is missed
once in 2^64.
"""

import collections
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from fastervit_jax.train.packing import Packing

SEEDS = 0x9E3779B9, 0x85EBCA6B
WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
AT_ONCE = 2**28
"""Values on a device that one program digests: it may take 4 bytes of memory for each."""


def names(tree: Any) -> list[str]:
    """Of its arrays, in order: 'params/head/bias'."""
    return [jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of its arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _mix(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit numbers in which each bit of the result depends on all (MurmurHash3's last step)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> jnp.uint32(shift))) * jnp.uint32(factor)
    return x ^ (x >> jnp.uint32(16))


def _bits(x: jax.Array) -> jax.Array:
    """Of each value, as they are: XLA may compute with bfloat16 as float32, which loses what NaNs hold."""
    return x.astype(jnp.uint8) if x.dtype == jnp.bool_ else lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize])


def _digest(arrays: list[jax.Array], counts: tuple[int, ...]) -> jax.Array:
    """(all arrays, 2) of uint32; of more than one, `counts` are along the first axis. Those of one shape are put
    together, which leaves much less to compile."""
    alike = collections.defaultdict(list)
    for i, (x, count) in enumerate(zip(arrays, counts, strict=True)):
        alike[x.shape[count > 1:], x.dtype].append(i)
    sums, places = [], []
    for (shape, _), group in alike.items():
        words = [_bits(arrays[i]).reshape(counts[i], *shape) for i in group]
        words = lax.optimization_barrier(jnp.concatenate(words)).astype(jnp.uint32)
        place = jnp.zeros((1, *shape), jnp.uint32)
        for axis, length in enumerate(shape, 1):
            place = place * jnp.uint32(length) + lax.broadcasted_iota(jnp.uint32, place.shape, axis)
        first = _mix(words ^ _mix(place + jnp.uint32(SEEDS[0])))
        both = first, _mix(first + jnp.uint32(SEEDS[1]))
        zero = jnp.uint32(0)
        sums.append(jnp.stack(lax.reduce(both, (zero, zero), lambda x, y: (x[0] + y[0], x[1] + y[1]),
                                         range(1, words.ndim)), axis=1))
        places += [i for i in group for _ in range(counts[i])]
    return jnp.concatenate(sums)[np.argsort(places, kind="stable")]


@functools.lru_cache(maxsize=16)
def _compiled(leaves: tuple[jax.ShapeDtypeStruct, ...], counts: tuple[int, ...]) -> jax.stages.Compiled:
    meshes = [x.sharding.mesh for x in leaves if isinstance(x.sharding, NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None
    digest = functools.partial(_digest, counts=counts)
    return jax.jit(digest, out_shardings=everywhere).lower(list(leaves)).compile()


class Digests:
    """The function from a tree of arrays to their digests, compiled.

    It takes trees with the structure, shapes, dtypes and shardings of `tree`, which may be abstract, or these as
    `packing` packs them. Raises TypeError for a dtype of more than 4 bytes.
    """

    def __init__(self, tree: Any, packing: Packing | None = None):
        named = names(tree)
        groups = packing.groups if packing else [[i] for i in range(len(named))]
        self.names = [named[i] for group in groups for i in group]
        leaves = jax.tree.leaves(packing.abstract if packing else abstract(tree))
        parts, values = [], 0
        for group, x in zip(groups, leaves, strict=True):
            if x.dtype.itemsize not in WORDS or not jnp.issubdtype(x.dtype, np.generic):
                raise TypeError(
                    f"{named[group[0]]} has dtype {x.dtype}: expected numbers or bools of at most 4 bytes")
            size = math.prod(x.sharding.shard_shape(x.shape))
            if not parts or values + size > AT_ONCE:
                parts.append([])
                values = 0
            parts[-1].append((x, len(group)))
            values += size
        self._programs = [(len(part), _compiled(*zip(*part, strict=True))) for part in parts]

    def start(self, tree: Any) -> list[jax.Array]:
        """Starts the computation, and returns what `read` takes; the arrays may be donated then."""
        leaves, sums = jax.tree.leaves(tree), []
        for count, program in self._programs:
            sums.append(program(leaves[:count]))
            leaves = leaves[count:]
        return sums

    def of(self, tree: Any) -> list[dict[str, str]]:
        return self.read(self.start(tree))

    def read(self, sums: list[jax.Array]) -> list[dict[str, str]]:
        """For each of this process's devices, 16 hexadecimal digits for each array, by name; waits for them."""
        shards = [[np.asarray(shard.data) for shard in x.addressable_shards] for x in sums]
        return [{name: f"{first:08x}{second:08x}" for name, (first, second)
                 in zip(self.names, np.concatenate(numbers), strict=True)} for numbers in zip(*shards, strict=True)]
