"""What a run would take, without the hardware: compiles the real train step ahead of time, and runs nothing.

    python -m fastervit_jax.plan --config=configs/imagenet.py:faster_vit_0_224 --topology=v5e:16x16 [--config.a.b=value]
    python -m fastervit_jax.plan --config=configs/imagenet.py:faster_vit_0_224 --devices=8 --chip=h200

`--topology` is a TPU slice, GENERATION:SHAPE in chips; libtpu compiles for it on any Linux machine, without a TPU.
`--devices=N` takes the first N GPUs; where there are not so many, N fake CPU devices, whose memory is only an estimate.
docs/plan.md says what the printed figures mean. The exit code is 0 whether it fits or not, 1 where nothing was planned.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections import ConfigDict

from fastervit_jax.data import loader, sources
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.train import command, schedule, sharding, speed
from fastervit_jax.train.check import check
from fastervit_jax.train.optimizer import make_optimizer
from fastervit_jax.train.speed import GPUS, TPUS, Chip
from fastervit_jax.train.state import abstract_state, make_model
from fastervit_jax.train.step import make_train_step

STEPS_PER_EPOCH = 1000  # the program is the same for any other number
GIB = 2**30


class PlanError(ValueError):
    """What was asked for cannot be planned; the message says what can."""


COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
               "collective-broadcast")

flags.adopt_module_key_flags(command)
_TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU slice, as v5e:16x16, v4:4x8x8, v5p:4x4x4 or v6e:16x16.")
_DEVICES = flags.DEFINE_integer("devices", None, "So many GPUs, or fake CPU devices.", lower_bound=1)
_CHIP = flags.DEFINE_enum("chip", None, list(GPUS), "The GPU that fake CPU devices stand for.")
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON.")
_HLO = flags.DEFINE_string("hlo", None, "File to write the compiled program to, as text.")


def tpu_devices(topology: str) -> tuple[list[Any], Chip]:
    """Devices of a TPU slice that need not exist, one a chip. Nothing can run on them.

    JAX must not have started, or have started on CPU devices. Raises PlanError for a name that does not exist, and
    without libtpu.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    chip = TPUS.get(match[1]) if match else None
    shape = [int(n) for n in match[2].split("x")] if match else []
    if chip is None or len(shape) != chip.axes or not 1 <= math.prod(shape) <= chip.largest:
        raise PlanError(
            f"--topology={topology}: expected GENERATION:SHAPE in chips, of "
            + ", ".join(f"{name} ({c.axes} axes, up to {c.largest:,} chips)" for name, c in TPUS.items())
            + "; for example v5e:16x16 (sold as v5e-256), v4:4x8x8 (v4-512, which counts TensorCores, two a chip), "
              "v5p:4x4x4 (v5p-128), v6e:16x16 (v6e-256)")
    missing = [name for name in ("libtpu", "requests") if importlib.util.find_spec(name) is None]
    if missing:
        raise PlanError(f"--topology={topology} needs {' and '.join(missing)}, which a TPU is not needed for: "
                        f'{sys.executable} -m pip install "jax[tpu]=={jax.__version__}"')
    # libtpu is not to ask the machine about its TPUs, nor to mind another process that uses it.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost",
                      ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    jax.config.update("jax_platforms", "cpu")
    options: dict[str, Any] = {}
    if chip is TPUS["v4"]:
        options["chip_config_name"] = "megacore"  # both TensorCores of a chip as one device, as Cloud TPUs run
    if math.prod(shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise PlanError(f"--topology={topology}: libtpu does not know this shape: {error}") from error
    return list(devices), chip


def gpu_devices(count: int, chip: str | None) -> tuple[list[Any], Chip | None]:
    """The first GPUs, or as many fake CPU devices if there are fewer; the named chip, or the one that there is.

    Raises PlanError if JAX has started with fewer CPU devices, and where `chip` is not the GPU that there is.
    """
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # JAX has started
        if jax.local_device_count("cpu") < count:
            raise PlanError(f"--devices={count}: JAX has started with {jax.local_device_count('cpu')} CPU devices; "
                            "expected to be called before it starts") from None
    devices = jax.local_devices()
    if devices[0].platform != "gpu" or len(devices) < count:
        return jax.local_devices(backend="cpu")[:count], chip and GPUS[chip]
    kind = devices[0].device_kind
    found = [name for name in GPUS if all(part in kind for part in name.upper().split("-"))]
    if chip and chip not in found:
        raise PlanError(f"--chip={chip}: the GPUs here are {kind}; leave --chip out")
    return devices[:count], GPUS[found[0]] if found else None


def abstract_inputs(
    model: FasterViT, optimizer: Any, config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[Any, dict[str, jax.ShapeDtypeStruct]]:
    """The train step's state and batch as shapes, types and shardings, without values."""
    return abstract_state(model, optimizer, config, mesh), loader.abstract_batch(config, sharding.over_batch(mesh))


def bytes_a_device(tree: Any) -> int:
    """Of the arrays in a tree of shapes with shardings, on each device, without what their layout adds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def collectives(program: str) -> dict[str, dict[str, int]]:
    """What the devices exchange in a compiled program: for each kind of operation how many, and bytes of whole arrays.

    Bytes are those that an all-gather gives, a reduce-scatter takes. A loop's body counts once.
    """
    found: dict[str, dict[str, int]] = {}
    sizes: dict[str, int] = {}
    seen, computation = set(), ""
    for line in program.splitlines():
        if line[:1] in ("%", "E"):
            computation = line.removeprefix("ENTRY ").split(" ", 1)[0]
        match = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*?)\)(.*)", line)
        if match is None:
            continue
        name, shape, kind, operands, rest = match.groups()
        result = sizes[name] = _shape_bytes(shape)
        kind, start = kind.removesuffix("-start"), kind.endswith("-start")
        if kind not in COLLECTIVES:
            continue
        if "fus" in computation:  # on TPUs one that is spread over several fusions is in each of them
            channel = re.search(r"channel_id=(\d+)", rest)
            mark = kind, channel and channel[1], re.sub(r"\{.*?\}", "", shape)
            if mark in seen:
                continue
            seen.add(mark)
        taken = sum(sizes.get(operand, 0) for operand in re.findall(r"[\w.-]+", operands))
        if computation.startswith("%all-reduce-scatter"):  # as TPUs' compiler writes it
            kind = "reduce-scatter"
        entry = found.setdefault(kind, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += max(taken, result - taken if start else result)
    return found


def _shape_bytes(shape: str) -> int:
    """Of an array or a tuple of arrays, as text."""
    widths = {"pred": 1, "bf": 2}
    return sum(
        math.prod(map(int, filter(None, dims.split(",")))) * (widths.get(letters) or int(bits) // 8)
        for letters, bits, dims in re.findall(r"\b(pred|bf|[fsuc])(\d*)\w*\[([\d,]*)\]", shape))


def plan(config: ConfigDict, devices: list[Any], chip: Chip | None) -> tuple[dict[str, Any], str]:
    """Compiles the train step of `config` for `devices`; the figures, and the compiled program as text.

    Bytes and FLOPs are those of one device and step. Where the TPU's compiler finds that memory does not suffice, it
    stops: there is no program ("" then), and of memory only what it says was needed.
    Raises PlanError for a config that a run would refuse, or a batch or mesh that does not fit the devices.
    """
    try:
        check(config)
        mesh = sharding.make_mesh(devices, data=config.mesh.data, fsdp=config.mesh.fsdp)
        sharding.check_batch(config.batch_size, config.accumulate, mesh)
    except ValueError as error:
        raise PlanError(str(error)) from error
    model, optimizer = make_model(config), make_optimizer(config)
    total_steps = schedule.total_epochs(config) * STEPS_PER_EPOCH
    step = make_train_step(
        model, optimizer, schedule.make_schedule(config, STEPS_PER_EPOCH), config, mesh, total_steps)
    state, batch = abstract_inputs(model, optimizer, config, mesh)
    figures = {
        "config": config.name, "devices": len(devices),
        "device_kind": f"{chip.name}, {chip.memory}" if chip else devices[0].device_kind,
        "platform": devices[0].platform, "jax": jax.__version__, "mesh": dict(mesh.shape),
        "batch": config.batch_size, "batch_a_device": config.batch_size // len(devices),
        "accumulate": config.accumulate, "remat": config.remat, "bn_group_size": config.bn_group_size,
        "dtype": config.model.dtype,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        "model_flops": 3 * speed.model_flops(
            model, state.variables, sources.image_sides(config), config.batch_size) * config.batch_size / len(devices),
        "state_bytes": bytes_a_device(state), "batch_bytes": bytes_a_device(batch),
        "rules": sharding.describe(state, mesh).splitlines(),
        "limit_bytes": memory_limit(devices[0], chip),
    }
    if devices[0].platform == "tpu":
        figures["libtpu"] = importlib.metadata.version("libtpu")

    start = time.perf_counter()
    lowered = step.lower(state, batch)
    figures["trace_seconds"] = round(time.perf_counter() - start, 1)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        compiled = None
        figures |= {"fits": False, "refusal": str(error).splitlines()[0], "total_bytes": needed_bytes(str(error))}
    figures["compile_seconds"] = round(time.perf_counter() - start, 1)
    if compiled is None:
        return figures, ""

    program = compiled.as_text()
    figures |= memory_figures(compiled.memory_analysis(), figures["limit_bytes"])
    figures |= work_figures(compiled.cost_analysis(), figures, chip)
    figures["collectives"] = collectives(program)
    return figures, program


def memory_limit(device: Any, chip: Chip | None) -> int | None:
    """Bytes that a program can have on the chip, or on a GPU that is there in this process; None if not known."""
    if device.platform == "gpu":
        return device.memory_stats()["bytes_limit"]
    return round(chip.usable * GIB) if chip else None


def needed_bytes(refusal: str) -> int | None:
    """How much memory a TPU program would have needed, from the compiler's message; None if it does not say."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of|\(([\d.]+)([KMGT])\) exceeds", refusal)
    if match is None:
        return None
    number, unit = (group for group in match.groups() if group)
    return round(float(number) * 1024 ** (1 + "KMGT".index(unit)))


def memory_figures(memory: Any, limit: int | None) -> dict[str, Any]:
    """From XLA's own account of a compiled program."""
    figures = {
        "argument_bytes": memory.argument_size_in_bytes, "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes, "aliased_bytes": memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    total = sum(figures.values()) - 2 * figures["aliased_bytes"]
    return figures | {"total_bytes": total, "fits": None if limit is None else total <= limit}


def work_figures(cost: dict[str, float], figures: dict[str, Any], chip: Chip | None) -> dict[str, Any]:
    """FLOPs and bytes by XLA's count, and the time that the chip's peaks allow for each of them: a roofline.

    XLA counts a loop's body once, however often it runs; the model's own products are never fewer. Its bytes include
    those that a cache or on-chip memory may keep from the chip's memory, so only the time of the products is certain.
    """
    work = {"flops": cost["flops"], "accessed_bytes": cost["bytes accessed"]}
    if chip:
        work["computation_seconds"] = max(work["flops"], figures["model_flops"]) / chip.flops
        work["memory_seconds"] = None
        if figures["platform"] != "cpu":  # whose program reads and writes other bytes than a GPU's
            work["memory_seconds"] = work["accessed_bytes"] / chip.bandwidth
        work["roofline_seconds"] = max(work["computation_seconds"], work["memory_seconds"] or 0.0)
        work["roofline_images_per_second"] = figures["batch"] / work["roofline_seconds"]
    return work


def advice(figures: dict[str, Any]) -> list[str]:
    """What would make it smaller, the most promising first."""
    fsdp, images = figures["mesh"]["fsdp"], figures["batch_a_device"] // figures["accumulate"]
    lines = []
    if not all(figures["remat"]):
        lines.append('--config.remat="(True,True,True,True)" computes activations again instead of keeping them')
    if images > 1:
        lines.append(f"--config.accumulate={2 * figures['accumulate']} computes {images // 2} images a chip at a time")
    more = [n for n in range(fsdp + 1, figures["devices"] + 1) if figures["devices"] % n == 0]
    if more:
        state = figures["state_bytes"]
        first = 0 if state > (figures["total_bytes"] or 0) / 2 else len(lines)
        lines.insert(first, f"--config.mesh.fsdp={more[0]} splits the state, {state / GIB:.2f} GiB a chip now, over "
                            f"{more[0]} chips")
    return lines or ["more chips, or chips with more memory"]


def report(figures: dict[str, Any]) -> str:
    """The figures as text."""
    f = figures
    gib = lambda name: f"{f[name] / GIB:9.2f}"  # noqa: E731
    versions = f"jax {f['jax']}" + (f", libtpu {f['libtpu']}" if "libtpu" in f else "")
    parts = f", in {f['accumulate']} parts" if f["accumulate"] > 1 else ""
    again = [i for i, on in enumerate(f["remat"]) if on]
    lines = [
        f"{f['config']}: {f['parameters']:,} parameters, {f['dtype']}, on {f['devices']} × {f['device_kind']}",
        f"batch {f['batch']:,}, {f['batch_a_device']:,} a chip{parts}; "
        f"{f'stages {again} are computed again' if again else 'nothing is computed again'} in the backward pass",
        f"compiled in {f['compile_seconds']:.0f} s, traced in {f['trace_seconds']:.0f} s ({versions})",
        "state, " + "\n".join(f["rules"]),
        "memory a chip, GiB",
    ]
    if f["platform"] == "cpu":
        lines[-1] += " (of XLA:CPU's program on fake devices: a GPU's program has other buffers)"
    if "refusal" in f:
        lines += [f"  state     {gib('state_bytes')}", f"  batch     {gib('batch_bytes')}",
                  f"  XLA stopped: {f['refusal']}"]
    else:
        lines += [
            f"  arguments {gib('argument_bytes')}  state {f['state_bytes'] / GIB:.2f}, batch "
            f"{f['batch_bytes'] / GIB:.2f}, the rest their layout",
            f"  temporary {gib('temporary_bytes')}",
            f"  output    {gib('output_bytes')}",
            f"  aliased   {gib('aliased_bytes')}  of the output, in the arguments' place",
            f"  program   {gib('code_bytes')}",
            f"  total     {gib('total_bytes')}",
        ]
    lines += verdict(f)
    if "flops" in f:
        of_what = "one part of the batch" if f["accumulate"] > 1 else "the program"
        lines.append(
            f"a chip and step: {f['model_flops'] / 1e12:,.3f} TFLOP, the model's products three times forward; XLA "
            f"counts {f['flops'] / 1e12:,.3f} TFLOP in {of_what}, {f['accessed_bytes'] / 1e9:,.1f} GB read and written")
        if "roofline_seconds" in f:
            memory = "" if f["memory_seconds"] is None else (
                f", {1e3 * f['memory_seconds']:,.1f} ms for bytes (of which some may stay on the chip)")
            lines.append(
                f"at the chip's peaks {1e3 * f['computation_seconds']:,.1f} ms a step for products{memory}: at most "
                f"{f['roofline_images_per_second']:,.0f} images/s. This is a bound, not a measurement")
        exchanged = (f"{x['count']} {kind}, {x['bytes'] / 2**20:,.1f} MiB" for kind, x in f["collectives"].items())
        lines.append("exchanged between chips: " + ("; ".join(exchanged) or "nothing"))
    return "\n".join(lines)


def verdict(figures: dict[str, Any]) -> list[str]:
    """Whether it fits, and if not, what to do."""
    total, limit = figures["total_bytes"], figures["limit_bytes"]
    if figures["fits"] is None:
        return [f"whether it fits is not known for {figures['device_kind']}: --chip names a GPU, of {', '.join(GPUS)}"]
    share = ""
    if figures["platform"] == "gpu":
        share = ", JAX's share of the GPU (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    elif figures["platform"] == "cpu" and total > 0.75 * limit:
        share = ", of which JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION says more"
    if figures["fits"]:
        return [f"fits: {(limit - total) / GIB:.2f} GiB are left of {limit / GIB:.2f}{share}"]
    over = "" if total is None else f": {(total - limit) / GIB:.2f} GiB more than the {limit / GIB:.2f}{share}"
    return [f"does not fit{over}. What helps:", *(f"  {line}" for line in advice(figures))]


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """The command; `workdir` is not used."""
    try:
        if (_TOPOLOGY.value is None) == (_DEVICES.value is None):
            raise PlanError("expected one of --topology=v5e:16x16 (TPUs) and --devices=8 (GPUs)")
        if _TOPOLOGY.value and _CHIP.value:
            raise PlanError("--chip is for --devices; --topology names its chip itself")
        devices, chip = tpu_devices(_TOPOLOGY.value) if _TOPOLOGY.value else gpu_devices(_DEVICES.value, _CHIP.value)
        figures, program = plan(config, devices, chip)
    except PlanError as error:
        sys.exit(str(error))
    if _HLO.value:
        pathlib.Path(_HLO.value).write_text(program)
    print(json.dumps(figures) if _JSON.value else report(figures))


if __name__ == "__main__":
    command.run(run, cache=False)  # it measures compilation, and what is loaded tells less of itself
