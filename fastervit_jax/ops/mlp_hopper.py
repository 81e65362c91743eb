"""The MLP's first product with GELU, for NVIDIA's Hopper GPUs.

Written with Pallas for its Mosaic GPU backend, which has what these GPUs multiply fastest with: products that read both
factors from shared memory (wgmma), and copies that run beside them (TMA). A program keeps the weights of 128 columns in
shared memory. One of its three warpgroups fetches rows; the two others take turns: one multiplies while the other
computes GELU and writes.

Axes: r rows (tokens of all images), i inputs, h hidden channels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mgpu
from jaxtyping import Array, Float

from fastervit_jax.ops import gelu
from fastervit_jax.ops.kernels import check_sizes

ROWS, COLUMNS, DEPTH = 128, 128, 64
"""What a warpgroup computes at a time, and how much of the product's depth is fetched at a time."""
SHARED = 227 * 1024 - 2048
"""Bytes of shared memory for arrays. A few are for barriers and biases."""
MULTIPLIERS = 2
"""Warpgroups that multiply."""
MOST_WIDTH = 384
"""With more inputs, cuBLAS and a pass of GELU after it are as fast, or another kernel is (docs/performance.md)."""


class Room(NamedTuple):
    """How shared memory is used beside the weights, for each warpgroup that multiplies."""

    slots: int
    """Parts of rows, 128 × 64, that are there or on their way."""
    stages: int
    """Parts of results that are written or on their way."""
    piece: int
    """Columns of such a part."""

    def bytes(self, outputs: int) -> int:
        return 2 * MULTIPLIERS * ROWS * (self.slots * DEPTH + outputs * self.stages * self.piece)


ROOMS = Room(3, 2, 64), Room(4, 1, 32), Room(3, 1, 64), Room(3, 1, 32)
"""The first that there is room for is taken."""


def _room(inputs: int, outputs: int) -> Room | None:
    return next((room for room in ROOMS if 2 * inputs * COLUMNS + room.bytes(outputs) <= SHARED), None)


def fits(rows: int, inputs: int, hidden: int, outputs: int) -> bool:
    """Whether the kernel takes products of (rows, inputs) and (inputs, hidden), and writes so many results."""
    whole = rows % ROWS == 0 and inputs % DEPTH == 0 and hidden % COLUMNS == 0
    return whole and min(rows, inputs, hidden) > 0 and inputs <= MOST_WIDTH and _room(inputs, outputs) is not None


def forward(
    x: Float[Array, "r i"], kernel: Float[Array, "i h"], bias: Float[Array, "h"], **options: Any
) -> Float[Array, "r h"]:
    """GELU(x · kernel + bias)."""
    return _call("linear_gelu", 1, x, kernel, bias, **options)[0]


def forward_with_hidden(
    x: Float[Array, "r i"], kernel: Float[Array, "i h"], bias: Float[Array, "h"], **options: Any
) -> tuple[Float[Array, "r h"], Float[Array, "r h"]]:
    """What GELU gets, x · kernel + bias, and what it gives."""
    return tuple(_call("linear_and_gelu", 2, x, kernel, bias, **options))


def _call(
    name: str, outputs: int, x: Array, kernel: Array, bias: Array, *, room: Room | None = None,
    processors: int | None = None, interpret: Any = False,
) -> list[Array]:
    """What GELU gives; of two outputs, what it gets before that.

    `room`, `processors`: as the device has them, if not given. `interpret`: jax's parameters of interpretation.
    """
    (rows, inputs), hidden = x.shape, kernel.shape[1]
    check_sizes(name, [x.shape, (rows, hidden)], jax.device_count())
    room = room or _room(inputs, outputs)
    columns = hidden // COLUMNS
    tiles = rows // ROWS
    processors = processors or getattr(jax.devices()[0], "core_count", 132)
    groups = max(1, min(processors // columns, pl.cdiv(tiles, MULTIPLIERS)))

    def shared(*shape: int) -> Any:
        swizzled = mgpu.TilingTransform((8, min(64, shape[-1]))), mgpu.SwizzleTransform(min(128, 2 * shape[-1]))
        return mgpu.SMEM(shape, x.dtype, transforms=swizzled)

    scratch = {
        "x": shared(MULTIPLIERS * room.slots, ROWS, DEPTH),
        "kernel": shared(inputs // DEPTH, DEPTH, COLUMNS),
        "bias": mgpu.SMEM((COLUMNS,), bias.dtype),
        "out": shared(MULTIPLIERS * room.stages * outputs, ROWS, room.piece),
        "x_there": mgpu.Barrier(num_barriers=MULTIPLIERS * room.slots),
        "x_used": mgpu.Barrier(num_barriers=MULTIPLIERS * room.slots),
        "weights_there": mgpu.Barrier(num_arrivals=inputs // DEPTH + 1),
    }
    body = functools.partial(_kernel, room=room, columns=columns, tiles=tiles, groups=groups)
    return mgpu.kernel(
        body, out_type=[jax.ShapeDtypeStruct((rows, hidden), x.dtype)] * outputs, scratch_types=scratch,
        grid=(groups * columns,), grid_names=("program",), num_threads=MULTIPLIERS + 1, thread_name="warpgroup",
        interpret=interpret, kernel_name=name, compiler_params=mgpu.CompilerParams(
            approx_math=True, lowering_semantics=mgpu.LoweringSemantics.Warpgroup),
    )(x, kernel, bias)


def _kernel(
    x_ref, kernel_ref, bias_ref, *out_refs, room, columns, tiles, groups, x, kernel, bias, out, x_there, x_used,
    weights_there,
) -> None:
    """The program of a column of 128 channels and every so many tiles of 128 rows.

    Barriers tell warpgroups of each other: `x_there` and `weights_there` that a copy has come, `x_used` that what came
    has been multiplied.
    """
    warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    column, group = lax.rem(program, columns) * COLUMNS, lax.div(program, columns)
    parts, pieces, outputs = kernel.shape[0], COLUMNS // room.piece, len(out_refs)
    count = lax.div(tiles - group + groups - 1, groups)  # of tiles that are the program's

    def tiles_of(multiplier: Any) -> Any:
        return lax.div(count - multiplier + MULTIPLIERS - 1, MULTIPLIERS)

    def rows(tile: Any) -> pl.Slice:
        return pl.ds((group + tile * groups) * ROWS, ROWS)

    def along(part: Any) -> pl.Slice:
        return pl.ds(part * DEPTH, DEPTH)

    def slot(multiplier: Any, part: Any) -> Any:
        """Where a part of rows comes, counted over the warpgroup's tiles."""
        return multiplier * room.slots + lax.rem(part, room.slots)

    @pl.when(warpgroup == MULTIPLIERS)
    def fetch():
        mgpu.set_max_registers(40, action="decrease")
        for part in range(parts):
            mgpu.copy_gmem_to_smem(kernel_ref.at[along(part), pl.ds(column, COLUMNS)], kernel.at[part], weights_there)
        mgpu.copy_gmem_to_smem(bias_ref.at[pl.ds(column, COLUMNS)], bias, weights_there)

        @pl.loop(0, count)
        def of_tile(tile):
            multiplier, before = lax.rem(tile, MULTIPLIERS), lax.div(tile, MULTIPLIERS)

            @pl.loop(0, parts)
            def of_part(part):
                number = before * parts + part
                place = slot(multiplier, number)
                pl.when(number >= room.slots)(lambda: mgpu.barrier_wait(x_used.at[place]))
                mgpu.copy_gmem_to_smem(x_ref.at[rows(tile), along(part)], x.at[place], x_there.at[place])

        # Interpretation asks that a barrier is waited for as often as it is reached.
        for multiplier in range(MULTIPLIERS):
            for i in range(room.slots):
                wait = functools.partial(mgpu.barrier_wait, x_used.at[multiplier * room.slots + i])
                pl.when(tiles_of(multiplier) * parts > i)(wait)

    @pl.when(warpgroup < MULTIPLIERS)
    def multiply():
        mgpu.set_max_registers(232, action="increase")
        mgpu.barrier_wait(weights_there)

        @pl.loop(0, tiles_of(warpgroup))
        def of_tile(before):
            tile = before * MULTIPLIERS + warpgroup

            def product(total):
                @pl.loop(0, parts)
                def of_part(part):
                    number = before * parts + part
                    mgpu.barrier_wait(x_there.at[slot(warpgroup, number)])
                    mgpu.wgmma(total, x.at[slot(warpgroup, number)], kernel.at[part])
                    mgpu.wgmma_wait(1)  # for the product before this one
                    pl.when(part > 0)(lambda: mgpu.barrier_arrive(x_used.at[slot(warpgroup, number - 1)]))

                y = total[...]
                mgpu.barrier_arrive(x_used.at[slot(warpgroup, (before + 1) * parts - 1)])
                return y

            y = pl.run_scoped(product, mgpu.ACC((ROWS, COLUMNS), jnp.float32))
            for piece in range(pieces):
                part = slice(piece * room.piece, (piece + 1) * room.piece)
                stage = warpgroup * room.stages + lax.rem(before * pieces + piece, room.stages)
                stages = [stage + output * MULTIPLIERS * room.stages for output in range(outputs)]
                hidden = y[:, part] + lax.broadcast_in_dim(
                    bias[part].astype(jnp.float32), (ROWS, room.piece), (1,))
                mgpu.wait_smem_to_gmem(room.stages - 1, wait_read_only=True)
                results = [hidden, gelu.value(hidden, out.dtype, in_kernel=True)]
                for value, place in zip(results[-outputs:], stages, strict=True):
                    out[place] = value.astype(out.dtype)
                mgpu.commit_smem()
                for i, place in enumerate(stages):
                    mgpu.copy_smem_to_gmem(
                        out.at[place], out_refs[i].at[rows(tile), pl.ds(column + piece * room.piece, room.piece)],
                        commit_group=i == outputs - 1)

        mgpu.wait_smem_to_gmem(0)
