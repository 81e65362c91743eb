"""Make a PyTorch checkpoint of FasterViT-6's size from random numbers, and measure converting it.

    python -m tests.weights.big_file make /tmp/big.pth
    python -m tests.weights.big_file convert /tmp/big.pth /tmp/big.safetensors

The second prints wall time and the largest resident memory, mapped pages of files included.
"""

import pathlib
import resource
import subprocess
import sys
import time
import zlib

import numpy as np

import fastervit_jax as fv
from fastervit_jax.weights import pretrained
from fastervit_jax.weights.torch_file import StoredArray


def make(path: str) -> None:
    config = fv.create_model("faster_vit_6_224").config
    arrays = {}
    for name, (_, _, shape) in pretrained.layout(config).items():
        seed = zlib.crc32(name.encode())
        arrays[name] = StoredArray(shape, np.dtype(np.float32),
                                   lambda shape=shape, seed=seed: np.random.default_rng(seed).random(shape, np.float32))
    pretrained.write(path, config, arrays)
    print(f"{path}: {pathlib.Path(path).stat().st_size / 1e9:.2f} GB")


def convert(source: str, destination: str) -> None:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "fastervit_jax.convert", source, destination], check=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    files = [pathlib.Path(source)] if pathlib.Path(source).is_file() else pathlib.Path(source).rglob("*")
    size = sum(path.stat().st_size for path in files)
    print(f"{seconds:.0f} s, at most {peak / 1e9:.2f} GB in memory, {peak / size:.2f} x the source's {size / 1e9:.2f}")


if __name__ == "__main__":
    {"make": make, "convert": convert}[sys.argv[1]](*sys.argv[2:])
