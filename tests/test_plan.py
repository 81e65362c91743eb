"""The plan of a run: its figures are those of the arrays, and what it cannot plan it says."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict

from configs import digits
from fastervit_jax import plan
from fastervit_jax.train import sharding
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.state import create_state, make_model

SMALL = {"model.depths": (1, 1, 1, 1), "model.dim": 16, "model.in_dim": 8, "model.hat": (False,) * 4,
         "data.image_size": 32, "batch_size": 64, "ema_decay": 0.9, "augment.zoom": 0.0, "augment.shift": 0.0}
GIB = 2**30


def small(**changes) -> ConfigDict:
    config = digits.get_config()
    config.update_from_flattened_dict({**SMALL, **changes})
    return config


@pytest.fixture(scope="module")
def planned():
    """What the command prints for 8 fake devices, fsdp=8, in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # of the compiled code, to save time
    changes = [f"--config.{key}={value}" for key, value in {**SMALL, "mesh.fsdp": 8}.items()]
    run = subprocess.run(
        [sys.executable, "-m", "fastervit_jax.plan", "--devices=8", "--chip=h200", "--json", *changes],
        env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def bytes_of_one(config: ConfigDict, fsdp: int) -> tuple[int, int]:
    """Of state and batch on the first of 8 devices, from the arrays themselves."""
    mesh = sharding.make_mesh(jax.devices()[:8], fsdp=fsdp)
    model, optimizer = make_model(config), make_optimizer(config)
    shapes = jax.eval_shape(lambda: create_state(model, optimizer, config, mesh))
    state = jax.tree.map(lambda x, lying: jax.device_put(np.zeros(x.shape, x.dtype), lying),
                         shapes, sharding.shardings(shapes, mesh))
    size = config.data.image_size
    batch = jax.device_put(
        {"image": np.zeros((config.batch_size, size, size, 1), np.uint8),
         "label": np.zeros(config.batch_size, np.int32), "weight": np.zeros(config.batch_size, np.float32)},
        sharding.over_batch(mesh))
    return tuple(sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)) for tree in (state, batch))


def test_arguments_are_the_arrays(planned):
    state, batch = bytes_of_one(small(), fsdp=8)
    assert (planned["state_bytes"], planned["batch_bytes"]) == (state, batch)
    assert planned["argument_bytes"] == state + batch
    assert planned["aliased_bytes"] == state  # donated
    assert planned["mesh"] == {"data": 1, "fsdp": 8}
    assert (planned["devices"], planned["batch_a_device"]) == (8, 8)
    assert planned["total_bytes"] == sum(
        planned[f"{name}_bytes"] for name in ("argument", "temporary", "output", "code")) - planned["aliased_bytes"]
    assert planned["fits"]


def test_fsdp_splits_the_state(planned):
    config = small()
    mesh = sharding.make_mesh(jax.devices()[:8])
    state, _ = plan.abstract_inputs(make_model(config), make_optimizer(config), config, mesh)
    whole = plan.bytes_a_device(state)
    assert whole == bytes_of_one(config, fsdp=1)[0]
    assert 1 / 8 < planned["state_bytes"] / whole < 1 / 8 + 0.05  # vectors are on every device


def test_what_is_exchanged(planned):
    """Gradients are summed over the devices, but for what only position terms need; split parameters are gathered."""
    parameter_bytes = 4 * planned["parameters"]
    assert set(planned["collectives"]) == {"all-gather", "all-reduce"}
    assert 0.5 * parameter_bytes < planned["collectives"]["all-reduce"]["bytes"] < 1.5 * parameter_bytes
    assert 0.9 * parameter_bytes < planned["collectives"]["all-gather"]["bytes"] < 2 * parameter_bytes


def test_collectives_of_a_program():
    """One that is in two fusions counts once; a reduce-scatter as the whole array, however it is written."""
    assert plan.collectives("""
%fused_computation.1 (p: bf16[2]) -> bf16[16] {
  %p = bf16[2]{0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[16]{0:T(8,128)(2,1)} all-gather(%p), channel_id=5, dimensions={0}
}
%async_collective_fusion.2 (q: bf16[2]) -> bf16[16] {
  %q = bf16[2]{0} parameter(0)
  ROOT %all-gather.2 = bf16[16]{0:T(8,128)(2,1)S(1)} all-gather(%q), channel_id=5, dimensions={0}
}
%all-reduce-scatter.3 (r: f32[64]) -> f32[8] {
  %r = f32[64]{0} parameter(0)
  %all-reduce.4 = f32[64]{0} all-reduce(%r), channel_id=6, to_apply=%add
}
ENTRY %main (a: f32[4,2]) -> f32[] {
  %a = f32[4,2]{1,0} parameter(0)
  %all-reduce.5 = f32[4,2]{1,0:T(4,128)} all-reduce(%a), channel_id=7
  %b = bf16[8]{0} convert(%a)
  ROOT %r = (bf16[8]{0:T(128)S(1)}, /*index=1*/f32[]{:T(128)}) all-reduce(%b, %c), channel_id=7
  %all-gather-start.1 = (f32[4,2]{1,0}, f32[32,2]{1,0}) all-gather-start(%a), dimensions={0}
  %all-gather-done.1 = f32[32,2]{1,0} all-gather-done(%all-gather-start.1)
  %reduce-scatter.1 = f32[1,2]{1,0} reduce-scatter(%a), dimensions={0}
  %all-reduce-start.1 = f32[4,2]{1,0} all-reduce-start(%a)
  %fusion = pred[4] fusion(%all-reduce.5), kind=kLoop, calls=%fused_computation.1
}
""") == {"all-gather": {"count": 2, "bytes": 2 * 16 + 4 * 64}, "reduce-scatter": {"count": 2, "bytes": 4 * 64 + 4 * 8},
         "all-reduce": {"count": 3, "bytes": 4 * 8 + 2 * 8 + 4 + 4 * 8}}


def test_the_roofline(planned):
    figures = {"platform": "tpu", "batch": 512, "model_flops": 0.0}
    chip = plan.TPUS["v5e"]
    work = plan.work_figures({"flops": 197e12, "bytes accessed": 0.5 * 819e9}, figures, chip)
    assert work == {"flops": 197e12, "accessed_bytes": 0.5 * 819e9, "computation_seconds": 1.0, "memory_seconds": 0.5,
                    "roofline_seconds": 1.0, "roofline_images_per_second": 512}
    reading = plan.work_figures({"flops": 197e12, "bytes accessed": 2 * 819e9}, figures, chip)
    assert (reading["roofline_seconds"], reading["roofline_images_per_second"]) == (2.0, 256)
    more = plan.work_figures({"flops": 0.0, "bytes accessed": 0.0}, {**figures, "model_flops": 394e12}, chip)
    assert more["roofline_seconds"] == 2.0
    # XLA:CPU's bytes are not a GPU's, its products are: at least the model's own.
    assert planned["memory_seconds"] is None
    assert planned["roofline_seconds"] == max(planned["flops"], planned["model_flops"]) / 989e12
    assert 0.5 < planned["model_flops"] / planned["flops"] < 1


def test_memory_that_does_not_suffice(planned):
    figures = {**planned, "limit_bytes": 0, "fits": False, "mesh": {"data": 8, "fsdp": 1}}
    text = plan.report(figures)
    assert f"does not fit: {figures['total_bytes'] / GIB:.2f} GiB more than the 0.00" in text
    remedies = ["--config.remat=", "--config.accumulate=2 computes 4 images", "--config.mesh.fsdp=2"]
    assert [line.startswith(remedy) for line, remedy in zip(plan.advice(figures), remedies, strict=True)] == [True] * 3
    assert all(line in text for line in plan.advice(figures))
    assert plan.advice({**figures, "state_bytes": figures["total_bytes"]})[0].startswith("--config.mesh.fsdp=2")
    assert plan.advice({**figures, "mesh": {"data": 1, "fsdp": 8}, "remat": (True,) * 4, "accumulate": 8}) == [
        "more chips, or chips with more memory"]


def test_what_the_tpu_compiler_says():
    assert plan.needed_bytes("Ran out of memory in memory space hbm. Used 22.50G of 15.75G hbm. Exceeded hbm capacity "
                             "by 6.75G.") == 22.5 * GIB
    assert plan.needed_bytes("Ran out of memory on HBM, the total memory required for HLO temporaries (400.00M) "
                             "exceeds available HBM (15.75G).") == 400 * 2**20
    assert plan.needed_bytes("RESOURCE_EXHAUSTED: no more") is None


def test_every_chip_has_a_peak():
    for chips in (plan.TPUS, plan.GPUS):
        assert all(chip.flops > 1e14 for chip in chips.values())


@pytest.mark.parametrize("topology", ["v5e-256", "v4-512", "v5e:4x4x4", "v4:8x8", "v5e:32x32", "v3:4x4", "v5e:4x", ""])
def test_topologies_that_do_not_exist(topology):
    with pytest.raises(plan.PlanError, match=rf"--topology={topology}: expected GENERATION:SHAPE.*v4:4x8x8"):
        plan.tpu_devices(topology)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else types)
    with pytest.raises(plan.PlanError, match=rf'needs libtpu.*pip install "jax\[tpu\]=={jax.__version__}"'):
        plan.tpu_devices("v5e:4x4")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_slice_has_one_device_a_chip():
    for topology, kind in {"v4:4x8x8": "TPU v4", "v5e:16x16": "TPU v5 lite", "v6e:1x1": "TPU v6 lite"}.items():
        devices, _ = plan.tpu_devices(topology)
        assert len(devices) == math.prod(map(int, topology.split(":")[1].split("x")))
        assert {device.device_kind for device in devices} == {kind}
    with pytest.raises(plan.PlanError, match="libtpu does not know this shape"):
        plan.tpu_devices("v5e:3x3")


def test_the_model_is_computed_as_the_config_says(monkeypatch):
    def step(model, optimizer, schedule, config, mesh, total_steps):
        assert (model.remat, model.bn_group_size) == ((True, False, True, False), 16)
        assert (mesh.shape, total_steps) == ({"data": 4, "fsdp": 2}, 3 * plan.STEPS_PER_EPOCH)
        raise NotImplementedError

    monkeypatch.setattr(plan, "make_train_step", step)
    config = small(remat=(True, False, True, False), bn_group_size=16, epochs=2, cooldown_epochs=1, warmup_epochs=1,
                   **{"mesh.fsdp": 2})
    with pytest.raises(NotImplementedError):
        plan.plan(config, jax.devices()[:8], None)


def test_batch_and_mesh_must_fit_the_devices():
    with pytest.raises(plan.PlanError, match=r"config.batch_size=64: expected a multiple of 48"):
        plan.plan(small(accumulate=16), jax.devices()[:3], None)
    with pytest.raises(plan.PlanError, match=r"config.mesh.data=-1, config.mesh.fsdp=3: there are 8 devices"):
        plan.plan(small(**{"mesh.fsdp": 3}), jax.devices()[:8], None)


def test_what_a_run_would_refuse_is_not_planned():
    with pytest.raises(plan.PlanError, match=r"config.accumulate=3: expected a divisor of config.batch_size=64"):
        plan.plan(small(accumulate=3), jax.devices()[:1], None)


def test_jax_has_started_with_fewer_devices():
    with pytest.raises(plan.PlanError, match="JAX has started with 8 CPU devices"):
        plan.gpu_devices(9, None)


def test_the_report(planned):
    text = plan.report(planned)
    assert f"state {planned['state_bytes'] / GIB:.2f}, batch {planned['batch_bytes'] / GIB:.2f}" in text
    assert f"{planned['total_bytes'] / GIB:9.2f}" in text
    for words in ("XLA:CPU's program on fake devices", "a bound, not a measurement", "mesh: data=1, fsdp=8", "fits: "):
        assert words in text
    assert "not known for cpu: --chip names a GPU" in plan.report({**planned, "device_kind": "cpu", "fits": None})


@pytest.mark.parametrize(("arguments", "message"), [
    ([], r"expected one of --topology=v5e:16x16 \(TPUs\) and --devices=8 \(GPUs\)"),
    (["--topology=v5e:16x16", "--devices=8"], "expected one of"),
    (["--topology=v5e:16x16", "--chip=h100"], "--chip is for --devices"),
    (["--topology=v5e"], "--topology=v5e: expected GENERATION:SHAPE"),
])  # fmt: skip
def test_what_the_command_refuses(arguments, message):
    with flagsaver.flagsaver():
        flags.FLAGS(["plan", *arguments])
        with pytest.raises(SystemExit, match=message):
            plan.run(small(), pathlib.Path())
