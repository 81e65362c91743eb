"""The small arrays of a training state as one for each shape, while they go into and out of the train step.

Every array costs the host some µs a step and device, whatever its size: FasterViT-0's state has 1,500, of which 1,200
are vectors and small matrices of 17 shapes. For a process with several GPUs that can be as long as the step.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

SMALL = {"gpu": 2**16}
"""By platform: values of an array, on all devices together, up to which it is packed. Elsewhere none is."""

Packed = list[Array]


def _stack(groups: list[list[Array]]) -> list[Array]:
    return [jnp.stack(arrays) for arrays in groups]


def _split(stacked: Packed) -> list[list[Array]]:
    return [[x[i] for i in range(len(x))] for x in stacked]


class Packing:
    """How a state is packed. `pack` and `unpack` are for states on devices, `stack` and `split` the same within jit.

    `state` may be abstract, but has shardings. Arrays that are not small are the same ones, packed or not. Where
    nothing is to be packed, a state stays as it is.

    `groups` has, for each array of a packed state, the places of those in it among the state's arrays; `abstract`
    the packed state's shapes, dtypes and shardings.
    """

    def __init__(self, state: Any):
        leaves, self._structure = jax.tree.flatten(state)
        small = SMALL.get(leaves[0].sharding.mesh.devices.flat[0].platform, -1)
        groups = collections.defaultdict(list)
        for i, x in enumerate(leaves):
            groups[(x.shape, x.dtype, x.sharding.spec) if x.size <= small else i].append(i)
        self.groups = list(groups.values())
        self._alone = len(self.groups) == len(leaves)
        one = [leaves[group[0]].sharding for group in self.groups]
        many = [NamedSharding(lying.mesh, PartitionSpec(None, *lying.spec)) for lying in one]
        together = [i for i, group in enumerate(self.groups) if len(group) > 1]
        self._jitted_stack = jax.jit(_stack, out_shardings=[many[i] for i in together])
        self._jitted_split = jax.jit(_split, out_shardings=[[one[i]] * len(self.groups[i]) for i in together])
        packed = []
        for group, alone, stacked in zip(self.groups, one, many, strict=True):
            x, several = leaves[group[0]], len(group) > 1
            packed.append(jax.ShapeDtypeStruct(
                (len(group), *x.shape) if several else x.shape, x.dtype, sharding=stacked if several else alone))
        self.abstract = jax.tree.unflatten(self._structure, packed) if self._alone else packed
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)

    def pack(self, state: Any) -> Packed | Any:
        return self._packed(state, self._jitted_stack)

    def stack(self, state: Any) -> Packed | Any:
        return self._packed(state, _stack)

    def unpack(self, packed: Packed | Any) -> Any:
        return self._unpacked(packed, self._jitted_split)

    def split(self, packed: Packed | Any) -> Any:
        return self._unpacked(packed, _split)

    def _packed(self, state: Any, stack: Callable) -> Packed | Any:
        if self._alone:
            return state
        leaves = jax.tree.leaves(state)
        stacked = iter(stack([[leaves[i] for i in group] for group in self.groups if len(group) > 1]))
        return [next(stacked) if len(group) > 1 else leaves[group[0]] for group in self.groups]

    def _unpacked(self, packed: Packed | Any, split: Callable) -> Any:
        if self._alone:
            return packed
        parts = iter(split([x for x, group in zip(packed, self.groups, strict=True) if len(group) > 1]))
        leaves = {}
        for x, group in zip(packed, self.groups, strict=True):
            leaves |= zip(group, next(parts) if len(group) > 1 else [x], strict=True)
        return jax.tree.unflatten(self._structure, [leaves[i] for i in range(len(leaves))])
