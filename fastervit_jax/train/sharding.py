"""How arrays lie on the devices of a mesh with the axes `data` and `fsdp`.

The batch is split over both axes. What a run carries from step to step is split over `fsdp` by the rule table, and the
same on all of `data`.
"""

import collections
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp")
SMALLEST = 1024
"""Values of an array that is split: for fewer, asking others for them takes longer than keeping them saves."""
RULES = {
    "split": f"kernels and matrices of {SMALLEST:,} values or more: their longest axis that fsdp divides",
    "whole": "everything else: on each device",
}


def make_mesh(devices: list[jax.Device] | None = None, *, data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh over all devices (of all processes) or the given ones; -1 for one of the axes: all that are left.

    Raises ValueError if the two do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp], len(devices)
    if min(sizes) < -1 or 0 in sizes or sizes == [-1, -1]:
        raise ValueError(f"config.mesh.data={data}, config.mesh.fsdp={fsdp}: expected two numbers of devices of at "
                         "least 1, one of which may be -1 for all that are left")
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // -math.prod(sizes)
    if math.prod(sizes) != count:
        raise ValueError(f"config.mesh.data={data}, config.mesh.fsdp={fsdp}: there are {count} devices; expected two "
                         f"numbers whose product is {count}, or -1 for one of them")
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * 2)


def check_batch(images: int, accumulate: int, mesh: Mesh) -> None:
    """Raises ValueError unless each device gets as many images of each of the batch's parts."""
    if images % (mesh.size * accumulate):
        raise ValueError(f"config.batch_size={images}: expected a multiple of {mesh.size * accumulate}, for "
                         f"{mesh.size} devices and config.accumulate={accumulate}")


def over_batch(mesh: Mesh) -> NamedSharding:
    """First axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def _rule(shape: tuple[int, ...], fsdp: int) -> tuple[str, PartitionSpec]:
    fitting = [axis for axis, length in enumerate(shape) if length % fsdp == 0]
    if fsdp == 1 or len(shape) < 2 or math.prod(shape) < SMALLEST or not fitting:
        return "whole", PartitionSpec()
    longest = max(fitting, key=lambda axis: (shape[axis], axis))
    return "split", PartitionSpec(*[None] * longest, "fsdp")


def shardings(tree: Any, mesh: Mesh) -> Any:
    """For each array, or its shape, in a tree: how it lies by the rule table."""
    return jax.tree.map(lambda x: NamedSharding(mesh, _rule(x.shape, mesh.shape["fsdp"])[1]), tree)


def describe(tree: Any, mesh: Mesh) -> str:
    """A table: for each rule, the arrays that it applies to, their values, and their bytes on each device."""
    fsdp = mesh.shape["fsdp"]
    totals = collections.defaultdict(lambda: np.zeros(3, np.int64))
    for x in jax.tree.leaves(tree):
        size = math.prod(x.shape)
        rule = _rule(x.shape, fsdp)[0]
        totals[rule] += (1, size, size * x.dtype.itemsize // (fsdp if rule == "split" else 1))
    lines = [f"mesh: data={mesh.shape['data']}, fsdp={fsdp}"]
    for rule, text in RULES.items():
        arrays, values, size = totals[rule]
        lines.append(f"  {text}: {arrays:,} arrays, {values:,} values, {size / 2**20:,.1f} MiB a device")
    return "\n".join(lines)
