"""What the kernels share: when they are chosen, how they run, and how they run on several devices.

They are written with Pallas for its Triton backend, but for `mlp_hopper`'s. Tiles are padded to powers of two, which
Triton needs; what is beyond an array is masked.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

KERNELS = ("auto", "xla", "pallas")
"""How operations are computed: by platform, dtype and shape; by XLA; by our kernels (interpreted where there is no
GPU)."""
MOST = 2**31 - 1
"""Elements of an array on one device: in kernels an element's place is a number of 32 bits."""
ALIGNED = 8
"""GPUs multiply 16-bit matrices whose sides are multiples of this; libraries fill up others first, at a cost."""


def on_gpu() -> bool:
    """Whether programs are compiled for NVIDIA GPUs that have what the kernels need: Ampere and later."""
    if jax.default_backend() != "gpu":
        return False
    return float(getattr(jax.devices()[0], "compute_capability", None) or 0) >= 8


def on_hopper() -> bool:
    """Whether programs are compiled for NVIDIA GPUs of the Hopper generation."""
    return on_gpu() and float(jax.devices()[0].compute_capability) == 9.0


def compiler_options(platform: str | None = None) -> dict[str, Any]:
    """What to compile the model with, for jax.jit(..., compiler_options=...), on a platform (JAX's default one): {} but
    on GPUs.

    There, matrix products are left to cuBLAS with what it can add to them (biases, residuals): XLA's autotuner compares
    its own products with cuBLAS's, and where these are faster takes them without. And gradients are summed over devices
    where they lie: XLA would copy them into one array before, and out of it after, 280 kernels for FasterViT-0.
    """
    platform = platform or jax.default_backend()
    if platform not in ("gpu", "cuda"):
        return {}
    return {"xla_gpu_enable_triton_gemm": False, "xla_disable_hlo_passes": "all-reduce-contiguous"}


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


def flat(x: Float[Array, "*b c"]) -> Float[Array, "r c"]:
    """With one axis in place of all but the last, of empty arrays, too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def check_sizes(name: str, shapes: Sequence[tuple[int, ...]], devices: int) -> None:
    """Raises ValueError for an array of which a device gets more elements than a kernel can count."""
    for shape in shapes:
        if math.prod(shape) > MOST * devices:
            raise ValueError(f"the kernel {name} got an array of shape {shape}; expected at most {MOST} elements a "
                             "device. Use fewer images at a time, or kernels='xla'")


def call(
    kernel: Callable, name: str, inputs: Sequence[Array], outputs: Sequence[tuple], *, grid: tuple, warps: int,
    stages: int = 2, **static: Any
) -> Sequence[Array]:
    """Run kernel(*input references, *output references, **static) for each point of the grid.

    References are whole arrays; `outputs` are shapes and dtypes. Raises ValueError for an array that is too large
    even if it lies on all devices: what is partitioned is traced as a whole before. (A program for one of several
    devices looks the same, and is not told apart.)
    """
    check_sizes(name, [*(x.shape for x in inputs), *(shape for shape, _ in outputs)], jax.device_count())
    if 0 in grid:
        return [jnp.zeros(*output) for output in outputs]
    return pl.pallas_call(
        functools.partial(kernel, **static), grid=grid,
        out_shape=[jax.ShapeDtypeStruct(*output) for output in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=jax.default_backend() != "gpu", name=name,
    )(*inputs)


class Rows:
    """The rows of an array (r, c), or of one part of an array (parts, r, c), a tile at a time; float32 in a program.

    Of rows that are split, a program takes `width` channels: those of a `block`, counted from 0.
    """

    TILE = 4096
    """Values that a program holds at a time if `values` says nothing else, of several rows where they are short."""

    def __init__(self, shape: tuple[int, ...], part: Any = None, values: int = TILE, width: int | None = None,
                 block: Any = 0):
        *_, self.count, self.channels = shape
        self.columns = padded(min(self.channels, width or self.channels))
        self.rows = max(1, values // self.columns)
        self.tiles = pl.cdiv(self.count, self.rows)
        first = block * self.columns
        self.column = first + jnp.arange(self.columns) < self.channels
        self.across = pl.ds(first, self.columns)
        self.part = () if part is None else (part,)

    def place(self, ref: Any, tile: Any) -> tuple:
        first = tile * self.rows
        there = (first + jnp.arange(self.rows) < self.count)[:, None] & self.column[None, :]
        return ref.at[(*self.part, pl.ds(first, self.rows), self.across)], there

    def load(self, ref: Any, tile: Any) -> Array:
        where, there = self.place(ref, tile)
        return plgpu.load(where, mask=there, other=0.0).astype(jnp.float32)

    def store(self, ref: Any, tile: Any, value: Array) -> None:
        where, there = self.place(ref, tile)
        plgpu.store(where, value.astype(ref.dtype), mask=there)

    def vector(self, ref: Any, *row: int) -> Array:
        """Of an array (c,) or (parts, c), or with one more axis before c, of which `row` says what to take."""
        place = ref.at[(*self.part, *map(jnp.int32, row), self.across)]
        return plgpu.load(place, mask=self.column, other=0.0)[None, :]

    def add_up(self, tile: Callable[[Any], tuple[Array, ...]], ref: Any, program: Any, programs: int) -> None:
        """Adds up what `tile` gives for each of a program's tiles, over their rows, into ref[part, program]."""
        tiles = pl.cdiv(self.tiles, programs)
        add = lambda i, sums: tuple(map(jnp.add, sums, tile(program * tiles + i)))  # noqa: E731
        zeros = jnp.zeros((self.rows, self.columns), jnp.float32)
        for i, sums in enumerate(jax.lax.fori_loop(0, tiles, add, (zeros,) * ref.shape[-2])):
            place = ref.at[(*self.part, program, jnp.int32(i), self.across)]
            plgpu.store(place, sums.sum(axis=0), mask=self.column)


def over_batch(function: Callable, axes: str, static: int = 0, split: tuple[str, ...] = ("b",)) -> Callable:
    """`function`, which is for one device, for arrays that lie on several: each computes its part of the batch.

    `axes` names those of the arguments and results, as in "b t c, c, c d -> b t d, c". The batch is "b", or whatever
    axes are `split`: they lie as those of the first argument do. All else is whole on each device, and what results do
    not have of the axes that are split is added up. `static` arguments that are no arrays follow the arrays.
    """
    module = function.__module__.rpartition(".")[2]
    arguments, results = ([array.split() for array in side.split(", ")] for side in axes.split(" -> "))

    def partition(*args: Any) -> tuple:
        fixed, (mesh, shapes, _) = args[:static], args[static:]
        devices = {name: on for name, on in zip(arguments[0], shapes[0].sharding.spec, strict=False) if name in split}

        def lying(arrays: list[list[str]]) -> tuple[NamedSharding, ...]:
            return tuple(NamedSharding(mesh, PartitionSpec(*map(devices.get, array))) for array in arrays)

        def lower(*arrays: Array) -> Any:
            check_sizes(f"{module}.{function.__name__}", [x.shape for x in arrays], 1)
            found = function(*arrays, *fixed)
            whole = []
            for x, array in zip(found if len(results) > 1 else (found,), results, strict=True):
                for name, on in devices.items():
                    x = x if on is None or name in array else jax.lax.psum(x, on)
                whole.append(x)
            return tuple(whole) if len(results) > 1 else whole[0]

        out = lying(results)
        return mesh, lower, out if len(out) > 1 else out[0], lying(arguments)

    # In the order they come in, which Shardy asks for.
    others = tuple(dict.fromkeys(name for array in arguments + results for name in array if name not in split))
    partitioned = custom_partitioning(function, static_argnums=tuple(range(len(arguments), len(arguments) + static)))
    partitioned.def_partition(partition, sharding_rule=axes, need_replication_factors=others)
    return partitioned
