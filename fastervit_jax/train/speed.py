"""How fast a run is: images a second, use of the devices' peak, waiting for input, memory, time left.

Every figure comes from clocks on the host and from shapes; nothing is copied from a device.
"""

import collections
import contextlib
import dataclasses
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from fastervit_jax.model.fastervit import FasterViT

PEAK = {
    # NVIDIA's data sheets, BF16 Tensor Core; where they give it with sparsity, half. H100 and H200: the SXM ones.
    "A100": 312e12, "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H200 NVL": 835e12,
    "GH200": 989e12, "B200": 2250e12, "GB200": 2500e12, "L4": 121e12, "L40S": 362e12,
    # Google's pages on Cloud TPU, peak compute a chip. A device of v2 and v3 is one of a chip's two cores.
    "TPU v2": 22.5e12, "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12,
    "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
}  # fmt: skip
"""Dense bfloat16 products, FLOP/s a device, by words of `jax.Device.device_kind`."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip has: `memory` as sold; `bandwidth`, bytes/s, by its maker's data sheet.

    `usable`: GiB that programs can have. For TPUs it is the limit that libtpu 0.0.42.1 compiles against; of a GPU's,
    JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """

    name: str
    memory: str
    usable: float
    bandwidth: float
    axes: int = 0  # of a TPU slice's shape
    largest: int = 0  # TPU slice, in chips

    @property
    def flops(self) -> float:
        """Dense bfloat16 FLOP/s at its peak."""
        return PEAK[self.name.removeprefix("NVIDIA ")]


TPUS = {
    "v4": Chip("TPU v4", "32 GB", 30.75, 1.2e12, 3, 4096),
    "v5e": Chip("TPU v5e", "16 GB", 15.75, 0.819e12, 2, 256),
    "v5p": Chip("TPU v5p", "95 GB", 95.74, 2.765e12, 3, 6144),
    "v6e": Chip("TPU v6e", "32 GB", 31.25, 1.638e12, 2, 256),
}
GPUS = {
    "a100-40": Chip("NVIDIA A100", "40 GB", 39.0, 1.555e12),
    "a100-80": Chip("NVIDIA A100", "80 GB", 79.0, 2.039e12),
    "h100": Chip("NVIDIA H100", "80 GB", 79.0, 3.35e12),
    "h200": Chip("NVIDIA H200", "141 GB", 140.0, 4.8e12),
}


def peak(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, by the longest entry of `PEAK` in its name; None if it is not known."""
    if re.search(r"\bMIG\b", device_kind):  # a part of a GPU
        return None
    found = [name for name in PEAK if re.search(rf"\b{name}\b", device_kind)]
    return PEAK[max(found, key=len)] if found else None


def model_flops(model: FasterViT, variables: dict[str, Any], sides: tuple[int, int], batch_size: int) -> float:
    """FLOPs of one image's forward pass: two for each product in convolutions and matrix products, nothing else.

    `sides`: height and width of the images.

    Those that a batch needs once, for position terms, are shared by its `batch_size` images. `variables` may be arrays
    or `jax.ShapeDtypeStruct`s. The model is traced, nothing is compiled or computed, and the answer does not depend on
    the backend (XLA's own count before compilation is there on CPUs only).
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    images = jax.ShapeDtypeStruct((batch_size, *sides, model.config.in_chans), jnp.float32)
    return _flops(jax.make_jaxpr(model.clone(kernels="xla").apply)(shapes, images).jaxpr) / batch_size


def _flops(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        results = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += 2 * results * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, axes = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            total += 2 * results * math.prod(kernel[axis] for axis in axes[1:])
        else:
            inner = [value for value in params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]
            if name in ("while", "pallas_call") or "branches" in params:
                raise NotImplementedError(f"cannot count the FLOPs of {name}: expected products, and functions and "
                                          "scans of them")
            times = params["length"] if name == "scan" else 1
            total += times * sum(_flops(value.jaxpr if isinstance(value, ClosedJaxpr) else value) for value in inner)
    return total


class Meter(contextlib.AbstractContextManager):
    """Measures the steps of a run. Steps run on the devices while the host is ahead of them: a thread waits for each.

        with Meter(flops, config.batch_size, mesh.devices.flat, first_step, total_steps) as meter:
            for step in range(first_step + 1, total_steps + 1):
                with meter.waiting():
                    batch = next(batches)
                state, metrics = train_step(state, batch)
                meter.stepped(metrics)
                if step == first_step + 1:
                    meter.start(step)
                if step % log_every == 0:
                    figures = meter.figures(step)

    Args:
        flops: Of one image's forward pass, as `model_flops` says; a step is counted as three times that (what is
            computed again to save memory, and MESA's teacher, do not count). None: no "mfu".
        batch_size: Images of a step, on all devices of all processes.
        devices: All devices of the mesh.
        clock: Gives seconds.
    """

    def __init__(
        self, flops: float | None, batch_size: int, devices: Iterable[Any], first_step: int, total_steps: int,
        *, clock: Callable[[], float] = time.perf_counter,
    ):
        devices = list(devices)
        at_peak = peak(devices[0].device_kind)
        self._images_at_peak = at_peak * len(devices) / (3 * flops) if at_peak and flops else None
        self._batch_size, self._total_steps, self._clock = batch_size, total_steps, clock
        self._local = [device for device in devices if device.process_index == jax.process_index()]
        self._asked = self._given = 0.0
        self._under_way = queue.Queue()
        self._finished = collections.deque()  # of each step since the last figures: when, and time without work so far
        self._all_starved = 0.0
        self._change = threading.Condition()
        threading.Thread(target=self._watch, daemon=True, name="speed").start()
        self.start(first_step)

    def _watch(self) -> None:
        finished = -math.inf
        while (step := self._under_way.get()) is not None:
            asked, given, results = step
            # Before `finished` the devices had work; the host's wait did not hold them up.
            self._all_starved += max(0.0, given - max(asked, finished))
            # A failed step raises where the loop reads its results.
            with contextlib.suppress(Exception):
                jax.block_until_ready(results)
            finished = self._clock()
            with self._change:
                self._finished.append((finished, self._all_starved))
                self._change.notify()
            self._under_way.task_done()

    def start(self, step: int) -> None:
        """Measure from here on, once the steps so far are done: the compilation in the first one does not count."""
        self._under_way.join()
        self._starved = self._all_starved
        self._finished.clear()
        self._started_at = self._step = step
        self._apart = self._all_apart = 0.0
        self._since = self._clock()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a step's batch."""
        self._asked = self._clock()
        yield
        self._given = self._clock()

    def stepped(self, results: Any) -> None:
        """After each step is dispatched, with (some of) its arrays; they must not be donated to the next one."""
        self._under_way.put((self._asked, self._given, results))

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no training: evaluation, exports, saves that stop it. Waits for the steps under way first."""
        self._under_way.join()
        start = self._clock()
        try:
            yield
        finally:
            self._apart += self._clock() - start

    def figures(self, step: int) -> dict[str, float]:
        """Of the steps since the last call, `step` being the last one; waits until they are done, not for later ones.

        images_per_second and step_ms, without what was `apart`; mfu, the part of the devices' bfloat16 peak that the
        model's products make up; input_wait, the part of the time in which the devices were idle because the
        batch was not there; memory_gib, the most that was ever in use on one of this process's devices;
        seconds_left, at this speed and with as much time `apart` a step as so far. Those that are not known are not
        there: all but memory_gib if no step was made.
        """
        steps, figures = step - self._step, {}
        if steps:
            with self._change:
                self._change.wait_for(lambda: len(self._finished) >= steps)
                now, starved = [self._finished.popleft() for _ in range(steps)][-1]
            self._all_apart += self._apart
            seconds = now - self._since - self._apart
            rate = steps * self._batch_size / seconds
            figures |= {"images_per_second": rate, "step_ms": 1e3 * seconds / steps}
            if self._images_at_peak:
                figures["mfu"] = rate / self._images_at_peak
            figures["input_wait"] = (starved - self._starved) / seconds
            apart = self._all_apart / (step - self._started_at)
            figures["seconds_left"] = (self._total_steps - step) * (seconds / steps + apart)
            self._since, self._step, self._starved, self._apart = now, step, starved, 0.0
        if used := [stats["peak_bytes_in_use"] for device in self._local
                    if "peak_bytes_in_use" in (stats := device.memory_stats() or {})]:
            figures["memory_gib"] = max(used) / 2**30
        return figures

    def __exit__(self, *exception: Any) -> None:
        self._under_way.put(None)
