"""The cases on which this model is compared with the official one, and the arrays that both are given.

NumPy alone, with its frozen RandomState streams: the same numbers wherever this is imported. Each
array is drawn by its official name, so a wrong name in our table shows as a wrong output.
"""

import dataclasses
import zlib
from typing import Any

import numpy as np

TINY = {"dim": 8, "in_dim": 8, "depths": [1, 1, 2, 1], "num_classes": 10}


@dataclasses.dataclass(frozen=True)
class Case:
    """`arch` and `kwargs` are the official package's names; so are ours."""

    arch: str
    kwargs: dict[str, Any]
    resolution: int
    batch: int = 2


CASES = {
    # Committed: the files NAME.npz beside this one.
    "carriers": Case("faster_vit_0_224", {**TINY, "dim": 4}, 224),
    "scaled_propagated": Case(
        "faster_vit_0_any_res",
        {**TINY, "window_size": [4, 4, 4, 2], "ct_size": 1, "layer_scale": 1e-5, "do_propagation": True,
         "layer_scale_conv": 1e-5}, 128),
    "two_hat_stages": Case(
        "faster_vit_0_any_res",
        {**TINY, "window_size": [4, 4, 4, 2], "hat": [False, False, True, True], "layer_norm_last": True}, 128),
    # Made when the tests run.
    "four_by_four_carriers": Case(
        "faster_vit_0_224", {**TINY, "ct_size": 4, "layer_scale": 1e-5, "do_propagation": True}, 224),
    "three_by_three_carriers": Case(
        "faster_vit_0_224", {**TINY, "ct_size": 3, "mlp_ratio": 2, "do_propagation": True}, 224),
    "window_8": Case("faster_vit_0_any_res", {**TINY, "window_size": [7, 7, 8, 8]}, 256),
    "padded": Case(
        "faster_vit_0_any_res",
        {**TINY, "window_size": [7, 7, 7, 7], "hat": [False, False, True, True], "do_propagation": True}, 256),
    "no_carriers_window_14": Case("faster_vit_4_21k_224", {**TINY, "num_heads": [2, 4, 8, 16]}, 224),
    "no_carriers_window_24": Case("faster_vit_4_21k_384", {**TINY, "num_heads": [2, 4, 8, 16]}, 384),
    "carriers_in_stage_3": Case(
        "faster_vit_0_any_res",
        {**TINY, "window_size": [7, 7, 8, 4], "hat": [False, False, False, True], "layer_scale": 1e-5,
         "do_propagation": True}, 256),
    "grey_no_qkv_bias": Case("faster_vit_0_224", {**TINY, "in_chans": 1, "qkv_bias": False}, 224),
    "pooled": Case("faster_vit_0_224", {**TINY, "num_classes": 0, "layer_norm_last": True}, 224),
    "faster_vit_0_224": Case("faster_vit_0_224", {}, 224, batch=1),
    "faster_vit_3_any_res": Case("faster_vit_3_any_res", {"depths": [1, 1, 2, 1], "dim": 32}, 448, batch=1),
}
COMMITTED = ["carriers", "scaled_propagated", "two_hat_stages"]

# The published models, for files of weights; the two largest with fewer blocks.
PUBLISHED = {
    **{f"faster_vit_{n}_224": Case(f"faster_vit_{n}_224", {}, 224, batch=1) for n in range(5)},
    **{f"faster_vit_{n}_224": Case(f"faster_vit_{n}_224", {"depths": [1, 1, 2, 1]}, 224, batch=1) for n in (5, 6)},
    **{f"faster_vit_4_21k_{side}": Case(f"faster_vit_4_21k_{side}", {}, side, batch=1)
       for side in (224, 384, 512, 768)},
}  # fmt: skip


def official_array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values of the official parameter or statistic `name`: activations stay of order one, every term shows."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    leaf = name.rpartition(".")[2]
    if leaf == "running_var":
        array = random.uniform(0.5, 1.5, shape)
    elif leaf == "running_mean":
        array = random.normal(0.0, 0.2, shape)
    elif "gamma" in leaf:
        array = random.uniform(0.2, 0.8, shape)
    elif leaf == "weight" and len(shape) == 1:
        array = random.uniform(0.6, 1.4, shape)
    elif len(shape) == 1:
        array = random.normal(0.0, 0.1, shape)
    elif "cpb_mlp" in name:
        array = random.normal(0.0, 0.5 if shape[1] == 2 else 0.05, shape)
    else:
        array = random.normal(0.0, (1.2 / np.prod(shape[1:])) ** 0.5, shape)
    return array.astype(np.float32)


def images(batch: int, height: int, width: int, channels: int) -> np.ndarray:
    """Float32 (batch, height, width, channels), normal."""
    return np.random.RandomState(1).normal(size=(batch, height, width, channels)).astype(np.float32)
