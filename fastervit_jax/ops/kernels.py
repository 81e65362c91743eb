"""What the kernels share: when they are chosen, how they run, and how they run on several devices.

They are written with Pallas for its Triton backend. Tiles are padded to powers of two, which Triton needs; what is
beyond an array is masked.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

KERNELS = ("auto", "xla", "pallas")
"""How operations are computed: by platform, dtype and shape; by XLA; by our kernels (interpreted where there is no
GPU)."""


ALIGNED = 8
"""GPUs multiply 16-bit matrices whose sides are multiples of this; libraries fill up others first, at a cost."""


def on_gpu() -> bool:
    """Whether programs are compiled for NVIDIA GPUs that have what the kernels need: Ampere and later."""
    if jax.default_backend() != "gpu":
        return False
    return float(getattr(jax.devices()[0], "compute_capability", None) or 0) >= 8


def compiler_options(platform: str | None = None) -> dict[str, Any]:
    """What to compile the model with, for jax.jit(..., compiler_options=...), on a platform (JAX's default one): {} but
    on GPUs.

    There, matrix products are left to cuBLAS with what it can add to them (biases, residuals): XLA's autotuner compares
    its own products with cuBLAS's, and where these are faster takes them without.
    """
    platform = platform or jax.default_backend()
    return {"xla_gpu_enable_triton_gemm": False} if platform in ("gpu", "cuda") else {}


def chosen(kernels: str, dtype: Any, unfit: str) -> bool:
    """Whether an operation is computed by its kernel: with "auto" on GPUs, for 16-bit numbers, wherever it fits.

    `unfit`: why the kernel cannot do it, or "". Raises ValueError for "pallas" where it cannot, and unknown `kernels`.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r}: expected one of {', '.join(KERNELS)}")
    if kernels == "pallas" and unfit:
        raise ValueError(f"kernels='pallas': there is none for {unfit}; use 'auto' or 'xla'")
    return kernels == "pallas" or (kernels == "auto" and not unfit and jnp.dtype(dtype).itemsize == 2 and on_gpu())


def padded(n: int) -> int:
    """The power of two that holds n, and at least 16, the smallest side of a product."""
    return max(16, pl.next_power_of_2(n))


def call(
    kernel: Callable, name: str, inputs: Sequence[Array], outputs: Sequence[tuple], *, grid: tuple, warps: int,
    stages: int = 2, **static: Any
) -> Sequence[Array]:
    """Run kernel(*input references, *output references, **static) for each point of the grid.

    References are whole arrays; `outputs` are shapes and dtypes.
    """
    return pl.pallas_call(
        functools.partial(kernel, **static), grid=grid,
        out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=jax.default_backend() != "gpu", name=name,
    )(*inputs)


def over_batch(function: Callable, axes: str, static: int = 0) -> Callable:
    """`function`, which is for one device, for arrays that lie on several: each computes its part of the batch.

    `axes` names those of the arguments and results, as in "b t c, c -> b t c, c". The batch is "b", and stands first:
    it is split as the first argument's is. All else is whole on each device, and results without a batch are added up.
    `static` arguments that are no arrays follow the arrays.
    """
    arguments, results = ([array.split() for array in side.split(", ")] for side in axes.split(" -> "))

    def partition(*args: Any) -> tuple:
        fixed, (mesh, shapes, _) = args[:static], args[static:]
        devices = shapes[0].sharding.spec[0]

        def lying(arrays: list[list[str]]) -> tuple[NamedSharding, ...]:
            return tuple(
                NamedSharding(mesh, PartitionSpec(devices if array[0] == "b" else None)) for array in arrays)

        def lower(*arrays: Array) -> Any:
            found = function(*arrays, *fixed)
            if len(results) == 1:
                return found
            return tuple(x if array[0] == "b" or devices is None else jax.lax.psum(x, devices)
                         for x, array in zip(found, results, strict=True))

        out = lying(results)
        return mesh, lower, out if len(out) > 1 else out[0], lying(arguments)

    # In the order they come in, which Shardy asks for.
    others = tuple(dict.fromkeys(name for array in arguments + results for name in array if name != "b"))
    partitioned = custom_partitioning(function, static_argnums=tuple(range(len(arguments), len(arguments) + static)))
    partitioned.def_partition(partition, sharding_rule=axes, need_replication_factors=others)
    return partitioned
