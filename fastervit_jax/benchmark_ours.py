"""A worker of `python -m fastervit_jax.benchmark speed` that times this model.

    python -m fastervit_jax.benchmark_ours '{"model": "faster_vit_0_224", "way": "deployed/auto", ...}'
"""

import dataclasses
import math
import platform
import re
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from fastervit_jax.benchmark_peer import CLIP_NORM, LEARNING_RATE, WEIGHT_DECAY, serve
from fastervit_jax.deploy import deploy
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig, get_variant
from fastervit_jax.ops.kernels import compiler_options
from fastervit_jax.train import speed
from fastervit_jax.weights.pretrained import abstract_variables


def random_variables(config: ModelConfig) -> dict[str, Any]:
    """Of a net whose activations neither vanish nor explode. A model's own init takes longer than all the rest."""
    rng = np.random.default_rng(0)

    def values(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key in ("scale", "var"):
            return jnp.ones(x.shape, x.dtype)
        size = math.prod(x.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.01
        return jnp.asarray(size * rng.standard_normal(x.shape, np.float32))

    return jax.tree.map_with_path(values, abstract_variables(config))


def options(spec: dict[str, Any]) -> dict[str, Any]:
    """Those that belong to our kernels; plain XLA has its own."""
    return {} if spec["way"].endswith("/xla") else compiler_options()


def inference(model: FasterViT, variables: Any, images: jax.Array, spec: dict[str, Any]) -> tuple[Any, Any]:
    """The compiled program, and what makes one call of it; `way` is plain/KERNELS or deployed/KERNELS."""
    if spec["way"].startswith("deployed/"):
        model, variables = deploy(model, variables, image_size=images.shape[1:3], dtype=spec["precision"])
    compiled = jax.jit(model.apply, compiler_options=options(spec)).lower(variables, images).compile()
    return compiled, lambda: compiled(variables, images)


def training(model: FasterViT, variables: Any, images: jax.Array, spec: dict[str, Any]) -> tuple[Any, Any]:
    """The compiled step, and what makes one: AdamW on the cross entropy with labels, gradients clipped to CLIP_NORM.

    There is no augmentation, averaging or MESA, and batch norms are over the whole batch: what all frameworks have.
    """
    # Here, because inference does without its packages.
    from configs import imagenet
    from fastervit_jax.train import sharding
    from fastervit_jax.train.optimizer import make_optimizer
    from fastervit_jax.train.packing import Packing
    config = imagenet.get_config(spec["model"])
    with config.unlocked():
        config.optimizer, config.weight_decay, config.clip_norm = "adamw", WEIGHT_DECAY, CLIP_NORM
    optimizer = make_optimizer(config)
    labels = jax.random.randint(jax.random.key(2), (len(images),), 0, model.config.num_classes)

    def step(state, images, labels):
        params, batch_stats, opt_state, count = state

        def loss_of(params):
            logits, updated = model.apply(
                {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(jax.random.key(3), count)})
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

        (loss, updated), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p - LEARNING_RATE * u, params, updates)
        return (params, updated, opt_state, count + 1), loss

    params = variables["params"]
    state = params, variables["batch_stats"], jax.jit(optimizer.init)(params), jnp.int32(0)
    state = jax.device_put(state, sharding.replicated(sharding.make_mesh(jax.devices()[:1])))
    packing = Packing(state)  # as a run's states are

    def packed_step(packed, images, labels):
        state, loss = step(packing.split(packed), images, labels)
        return packing.stack(state), loss

    packed = [packing.pack(state)]
    del state
    compiled = jax.jit(packed_step, donate_argnums=0, compiler_options=options(spec)).lower(
        packed[0], images, labels).compile()

    def call() -> jax.Array:
        packed[0], loss = compiled(packed[0], images, labels)
        return loss

    return compiled, call


def bandwidth(device_kind: str) -> float | None:
    """Bytes/s of a GPU's memory by its maker's data sheet; None for others, and for cards other than the SXM ones."""
    if re.search(r"\b(MIG|PCIe|NVL|GH200)\b", device_kind):
        return None
    found = [chip for name, chip in speed.GPUS.items() if all(part in device_kind for part in name.upper().split("-"))]
    return found[0].bandwidth if found else None


def bound(flops: float, accessed: float | None, device_kind: str, precision: str) -> dict[str, float | None]:
    """Milliseconds that a call takes at the least on a device: its products at the peak, its bytes at the bandwidth.

    None where the data sheet's number is not known: the peak is one of bfloat16.
    """
    at_peak = speed.peak(device_kind) if precision == "bfloat16" else None
    at_most = bandwidth(device_kind)
    return {
        "computation_ms": 1e3 * flops / at_peak if at_peak else None,
        "memory_ms": 1e3 * accessed / at_most if at_most and accessed else None,
    }


def prepare(spec: dict[str, Any]) -> tuple[Callable[[int], None], Callable[[], dict[str, Any]]]:
    """See `serve`. Parameters are float32 but for deployed models; the computation is in spec's precision."""
    config = dataclasses.replace(get_variant(spec["model"]).config, dtype=spec["precision"])
    model = FasterViT(config, kernels=spec["way"].split("/")[1])
    device = jax.devices()[0]
    shape = spec["batch"], spec["height"], spec["width"], config.in_chans
    images = jax.random.normal(jax.random.key(1), shape, spec["precision"])
    variables = random_variables(config)
    train = spec["mode"] == "train"
    flops = speed.model_flops(FasterViT(config, kernels="xla"), variables, shape[1:3], spec["batch"])

    start = time.perf_counter()
    compiled, call = (training if train else inference)(model, variables, images, spec)
    compile_seconds = time.perf_counter() - start
    del variables  # those of training are given away with the first step

    def run(calls: int) -> None:
        for _ in range(calls):
            result = call()
        run.result = jax.block_until_ready(result)

    run(3)
    if not jnp.isfinite(run.result).all():
        raise FloatingPointError(f"{spec['model']} computed numbers that are not finite; their speed means nothing")

    def figures() -> dict[str, Any]:
        cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
        accessed = cost.get("bytes accessed")
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        return {
            "device": device.device_kind,
            "software": f"jax {jax.__version__}, flax {flax.__version__}, Python {platform.python_version()}",
            "compile_seconds": compile_seconds, "peak_gib": peak and peak / 2**30,
            "temporary_gib": memory.temp_size_in_bytes / 2**30 if memory else None,
            "model_gflop": flops / 1e9, "xla_gflop": cost["flops"] / 1e9 / spec["batch"] if "flops" in cost else None,
            "accessed_gb": accessed and accessed / 1e9,
            **bound((3 if train else 1) * flops * spec["batch"], accessed, device.device_kind, spec["precision"]),
        }

    return run, figures


if __name__ == "__main__":
    serve(prepare)
