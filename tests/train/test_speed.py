"""Figures of speed against a clock that the test sets, and FLOPs against sums and the published ones."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.train import speed

GIB = 2**30


class Clock:
    """Seconds as the test sets them; `read` tells that another thread asked for them."""

    def __init__(self):
        self.now, self.read = 0.0, threading.Event()

    def __call__(self):
        now = self.now
        if threading.current_thread() is not threading.main_thread():
            self.read.set()
        return now


class Results:
    """Arrays of a step, which `finish` computes."""

    def __init__(self, clock):
        self.clock, self.finished = clock, threading.Event()

    def block_until_ready(self):
        assert self.finished.wait(60)
        return self

    def finish(self, at):
        self.clock.now = at
        self.clock.read.clear()
        self.finished.set()
        assert self.clock.read.wait(60)


def device(kind="NVIDIA H200", process=0, **memory):
    return SimpleNamespace(device_kind=kind, process_index=process, memory_stats=lambda: memory or None)


def make(devices, *, flops=None, first_step=0, total_steps=100):
    clock = Clock()
    return clock, speed.Meter(flops, 8, devices, first_step, total_steps, clock=clock)


def step(meter, clock, *, asked, given, finished):
    """One step from the wait for its batch to its end; the host does not wait for the end."""
    clock.now = asked
    with meter.waiting():
        clock.now = given
    results = Results(clock)
    meter.stepped([results])
    results.finish(finished)


def test_figures_of_an_interval():
    devices = [device(peak_bytes_in_use=3 * GIB), device(peak_bytes_in_use=5 * GIB),
               device(process=1, peak_bytes_in_use=9 * GIB)]
    clock, meter = make(devices, flops=989e12 / 6, first_step=10, total_steps=110)
    with meter:
        step(meter, clock, asked=0.0, given=1.0, finished=61.0)
        meter.start(11)  # the minute of compilation does not count
        step(meter, clock, asked=62.0, given=62.5, finished=64.0)
        step(meter, clock, asked=64.0, given=64.0, finished=66.0)
        # 2 steps of 8 images in 5 s, half of the peak an image and second, 3 devices; half a second without work.
        assert meter.figures(13) == {
            "images_per_second": 16 / 5, "step_ms": 2500.0, "mfu": pytest.approx(16 / 5 / 2 / 3), "input_wait": 0.1,
            "seconds_left": 97 * 2.5, "memory_gib": 5.0}
        with meter.apart():
            clock.now = 76.0
        step(meter, clock, asked=76.0, given=76.0, finished=77.0)
        # 10 s apart in 3 steps so far.
        assert meter.figures(14) == pytest.approx({
            "images_per_second": 8.0, "step_ms": 1000.0, "mfu": 8 / 2 / 3, "input_wait": 0.0,
            "seconds_left": 96 * (1 + 10 / 3), "memory_gib": 5.0})
        assert meter.figures(14) == {"memory_gib": 5.0}
        step(meter, clock, asked=77.0, given=77.0, finished=79.0)
        assert meter.figures(15)["seconds_left"] == pytest.approx(95 * (2 + 10 / 4))


def test_only_a_wait_that_holds_the_devices_up_counts():
    clock, meter = make([device()])
    with meter:
        first, second, third = (Results(clock) for _ in range(3))
        with meter.waiting():
            pass
        meter.stepped(first)
        with meter.waiting():  # a second, while the first step runs
            clock.now = 1.0
        meter.stepped(second)
        first.finish(at=2.0)
        with meter.waiting():  # from 2 to 6, the second step ends at 5
            second.finish(at=5.0)
            clock.now = 6.0
        meter.stepped(third)
        third.finish(at=8.0)
        assert meter.figures(3) == {
            "images_per_second": 3.0, "step_ms": pytest.approx(8000 / 3), "input_wait": 1 / 8,
            "seconds_left": pytest.approx(97 * 8 / 3)}


def test_apart_and_figures_wait_for_steps_under_way():
    clock, meter = make([device()])

    def dispatch(end):
        results = Results(clock)
        meter.stepped(results)
        timer = threading.Timer(0.05, results.finish, kwargs={"at": end})
        timer.start()
        return timer

    with meter:
        timer = dispatch(end=4.0)
        with meter.apart():
            assert clock.now == 4.0
            clock.now = 5.0
        timer.join()
        timer = dispatch(end=8.0)
        assert meter.figures(2)["step_ms"] == 1e3 * (8 - 1) / 2
        timer.join()


def test_figures_do_not_wait_for_later_steps():
    clock, meter = make([device()])
    with meter:
        step(meter, clock, asked=0.0, given=1.0, finished=3.0)
        later = Results(clock)
        meter.stepped(later)
        assert meter.figures(1) == {
            "images_per_second": 8 / 3, "step_ms": 3000.0, "input_wait": 1 / 3, "seconds_left": 99 * 3.0}
        later.finish(at=5.0)
        assert meter.figures(2) == {
            "images_per_second": 4.0, "step_ms": 2000.0, "input_wait": 0.0, "seconds_left": 98 * 2.0}


def test_started_again_it_counts_from_there():
    clock, meter = make([device()])
    with meter:
        step(meter, clock, asked=0.0, given=10.0, finished=11.0)
        assert meter.figures(1)["input_wait"] == 10 / 11
        meter.start(1)
        step(meter, clock, asked=11.0, given=12.0, finished=15.0)
        assert meter.figures(2)["input_wait"] == 1 / 4


def test_a_failed_step_is_left_to_the_loop():
    class Failed:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    clock, meter = make([device()])
    with meter:
        meter.stepped(Failed())
        step(meter, clock, asked=1.0, given=1.0, finished=2.0)
        assert meter.figures(2)["step_ms"] == 1000.0


def test_real_arrays_on_devices_that_are_not_known():
    with speed.Meter(1e9, 8, jax.devices(), 0, 5) as meter:
        x = jax.jit(lambda: jnp.ones(4))()
        with jax.transfer_guard("disallow"):
            meter.stepped({"x": x})
            assert meter.figures(1).keys() == {"images_per_second", "step_ms", "input_wait", "seconds_left"}
    for thread in threading.enumerate():
        if thread.name == "speed":
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
     ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA GB200", 2500e12), ("NVIDIA L40S", 362e12), ("TPU v4", 275e12),
     ("TPU v5", 459e12), ("TPU v5 lite", 197e12), ("TPU v6 lite", 918e12), ("cpu", None), ("NVIDIA H20", None),
     ("NVIDIA A10G", None), ("TPU v55", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)],
)  # fmt: skip
def test_peak(kind, flops):
    assert speed.peak(kind) == flops


def flops(function, *shapes):
    return speed._flops(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


def test_flops_of_products():
    assert flops(lambda a, b: jax.nn.gelu(a @ b), (3, 4), (4, 5)) == 2 * 3 * 4 * 5
    assert flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (7, 3, 4), (7, 5, 4)) == 7 * 2 * 3 * 4 * 5

    def convolution(x, w):
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                            feature_group_count=3)

    assert flops(convolution, (2, 8, 8, 6), (3, 3, 2, 9)) == 2 * (2 * 4 * 4 * 9) * (3 * 3 * 2)
    nested = jax.jit(jax.checkpoint(lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, length=6)[0]))
    assert flops(nested, (3, 4), (4, 4)) == 6 * 2 * 3 * 4 * 4
    with pytest.raises(NotImplementedError, match="cannot count the FLOPs of while"):
        flops(lambda a: jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: x @ x, a), (3, 3))


def test_model_flops():
    """Of FasterViT-0, the paper says 3.3 GFLOPs, products counted once; of the tiny one, as many as XLA says."""
    def shapes(model, side):
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))

    model = fv.create_model("faster_vit_0_224")
    many = speed.model_flops(model, shapes(model, 224), (224, 224), 1024)
    assert many == pytest.approx(2 * 3.3e9, rel=0.02)
    assert many == 6723943856.0  # without the first layers of position networks, which are not computed as products

    tiny = fv.create_model("faster_vit_0_224", dim=8, in_dim=8, depths=(1, 1, 1, 1), num_classes=10)
    variables = shapes(tiny, 64)
    images = jax.ShapeDtypeStruct((16, 64, 64, 3), np.float32)
    by_xla = jax.jit(tiny.apply).lower(variables, images).cost_analysis()["flops"] / 16
    assert 0.75 * by_xla < speed.model_flops(tiny, variables, (64, 64), 16) < by_xla
