"""Batches from a source to the devices, through Grain.

The global step is the only state: batch `step` holds the same images wherever and however often
the run is started, on any number of processes.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import grain
import jax
import numpy as np

IN_FLIGHT = 2
"""Batches that are on their way to the devices before they are used."""


def train_batches(
    source: Any, *, batch_size: int, seed: int, first_step: int, sharding: jax.sharding.NamedSharding
) -> Iterator[dict[str, jax.Array]]:
    """Endless batches {"image": uint8 (b, h, w, c), "label": int32 (b,)} from step `first_step` on.

    Every epoch is a shuffle of its own; batches run on over the ends of epochs, so no image is left out.
    """
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    return _to_devices(dataset, batch_size, first_step, sharding)


def eval_batches(
    source: Any, *, batch_size: int, sharding: jax.sharding.NamedSharding
) -> Iterator[dict[str, jax.Array]]:
    """Every image once, in order; adds "weight", float32 (b,): 1, and 0 for what fills the last batch up."""
    count = len(source)

    def record(index: int) -> dict[str, np.ndarray]:
        weight = np.float32(index < count)
        return {**source[min(index, count - 1)], "weight": weight}

    padded = -(-count // batch_size) * batch_size
    return _to_devices(grain.MapDataset.range(padded).map(record), batch_size, 0, sharding)


def _to_devices(
    dataset: grain.MapDataset, batch_size: int, first_step: int, sharding: jax.sharding.NamedSharding
) -> Iterator[dict[str, jax.Array]]:
    processes, process = jax.process_count(), jax.process_index()
    if batch_size % sharding.mesh.size:
        raise ValueError(f"batch size {batch_size} does not divide over {sharding.mesh.size} devices; expected a "
                         f"multiple of {sharding.mesh.size}")
    # Shuffle and repeat come before batching, batching before each process takes its share: any other
    # order makes the content of a batch depend on the number of processes.
    dataset = dataset.batch(batch_size // processes, drop_remainder=True)[first_step * processes + process :: processes]
    return _ahead(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)), sharding)


def _ahead(batches: Iterable[dict[str, np.ndarray]], sharding: jax.sharding.NamedSharding) -> Iterator[Any]:
    """Each process's share of the batches as global arrays, with some in flight."""
    queue = collections.deque()
    for batch in batches:
        queue.append(jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch))
        if len(queue) > IN_FLIGHT:
            yield queue.popleft()
    yield from queue
