"""A function of arrays on one device, computed on eight."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def on_eight_devices(function: Callable, arrays: tuple, split: tuple[bool, ...]) -> tuple:
    """function(*arrays), jitted, with the first axes of those that are `split` over a mesh of 2 × 4 devices.

    Checks that the first result lies as the first argument does, and that no array was gathered.
    """
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    lying = [NamedSharding(mesh, PartitionSpec(("data", "fsdp") if each else None)) for each in split]
    arrays = [jax.device_put(x, place) for x, place in zip(arrays, lying, strict=True)]
    jitted = jax.jit(function)
    assert "all-gather" not in jitted.lower(*arrays).compile().as_text()
    found = jitted(*arrays)
    assert found[0].sharding.is_equivalent_to(lying[0], found[0].ndim)
    return found
