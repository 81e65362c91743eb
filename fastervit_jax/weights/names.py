"""The one table of names, PyTorch ↔ Flax, and how an array changes on the way.

Every parameter and batch statistic of the model has one name in each. The official state dict has two
kinds of name besides: buffers that are computed (`COMPUTED`), and a second name of one convolution (`ALIAS`).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

# Flax module path → PyTorch prefix; {} is a stage's or block's number, the same on both sides and in the same order.
MODULES = {
    "stem/conv1": "patch_embed.conv_down.0",
    "stem/norm1": "patch_embed.conv_down.1",
    "stem/conv2": "patch_embed.conv_down.3",
    "stem/norm2": "patch_embed.conv_down.4",
    "stages_{}/blocks_{}/conv1": "levels.{}.blocks.{}.conv1",
    "stages_{}/blocks_{}/conv2": "levels.{}.blocks.{}.conv2",
    "stages_{}/blocks_{}/norm1": "levels.{}.blocks.{}.norm1",
    "stages_{}/blocks_{}/norm2": "levels.{}.blocks.{}.norm2",
    "stages_{}/blocks_{}": "levels.{}.blocks.{}",
    "stages_{}/carrier_init/conv": "levels.{}.global_tokenizer.pos_embed",
    "stages_{}/blocks_{}/position/mlp/hidden": "levels.{}.blocks.{}.pos_embed.cpb_mlp.0",
    "stages_{}/blocks_{}/position/mlp/out": "levels.{}.blocks.{}.pos_embed.cpb_mlp.2",
    "stages_{}/blocks_{}/attention/qkv": "levels.{}.blocks.{}.attn.qkv",
    "stages_{}/blocks_{}/attention/out": "levels.{}.blocks.{}.attn.proj",
    "stages_{}/blocks_{}/attention/position_bias/mlp/hidden": "levels.{}.blocks.{}.attn.pos_emb_funct.cpb_mlp.0",
    "stages_{}/blocks_{}/attention/position_bias/mlp/out": "levels.{}.blocks.{}.attn.pos_emb_funct.cpb_mlp.2",
    "stages_{}/blocks_{}/mlp/hidden": "levels.{}.blocks.{}.mlp.fc1",
    "stages_{}/blocks_{}/mlp/out": "levels.{}.blocks.{}.mlp.fc2",
    "stages_{}/blocks_{}/carrier_position/mlp/hidden": "levels.{}.blocks.{}.hat_pos_embed.cpb_mlp.0",
    "stages_{}/blocks_{}/carrier_position/mlp/out": "levels.{}.blocks.{}.hat_pos_embed.cpb_mlp.2",
    "stages_{}/blocks_{}/carrier_norm1": "levels.{}.blocks.{}.hat_norm1",
    "stages_{}/blocks_{}/carrier_norm2": "levels.{}.blocks.{}.hat_norm2",
    "stages_{}/blocks_{}/carrier_attention/qkv": "levels.{}.blocks.{}.hat_attn.qkv",
    "stages_{}/blocks_{}/carrier_attention/out": "levels.{}.blocks.{}.hat_attn.proj",
    "stages_{}/blocks_{}/carrier_attention/position_bias/mlp/hidden":
        "levels.{}.blocks.{}.hat_attn.pos_emb_funct.cpb_mlp.0",
    "stages_{}/blocks_{}/carrier_attention/position_bias/mlp/out":
        "levels.{}.blocks.{}.hat_attn.pos_emb_funct.cpb_mlp.2",
    "stages_{}/blocks_{}/carrier_mlp/hidden": "levels.{}.blocks.{}.hat_mlp.fc1",
    "stages_{}/blocks_{}/carrier_mlp/out": "levels.{}.blocks.{}.hat_mlp.fc2",
    "downsamples_{}/norm": "levels.{}.downsample.norm",
    "downsamples_{}/conv": "levels.{}.downsample.reduction.0",
    "norm": "norm",
    "head": "head",
}

LEAVES = {
    "kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var",
    "gamma": "gamma", "gamma1": "gamma1", "gamma2": "gamma2", "gamma3": "gamma3", "gamma4": "gamma4",
}  # fmt: skip

COMPUTED = ("relative_bias", "relative_coords_table", "relative_position_index", "num_batches_tracked")
"""Last parts of the official names of buffers that are functions of parameters, coordinates or the run's length."""

ALIAS = (".global_tokenizer.to_global_feature.pos.", ".global_tokenizer.pos_embed.")
"""The official state dict lists the carrier initialiser's convolution under both, the same tensor."""

PREFIXES = ("module.", "model.", "encoder.", "_orig_mod.")
"""What wrappers put before the names: DataParallel, training frameworks, pretraining heads, torch.compile."""


def without_prefixes(name: str) -> str:
    """'module.encoder.head.weight' → 'head.weight'."""
    while name.startswith(PREFIXES):
        name = name.partition(".")[2]
    return name


def is_computed(name: str) -> bool:
    """Whether an official name is that of a computed buffer."""
    return name.rpartition(".")[2] in COMPUTED


def pytorch_name(path: str) -> str:
    """PyTorch name of a Flax path, 'head/kernel' → 'head.weight'. Raises KeyError if the table has no such path."""
    module, _, leaf = path.rpartition("/")
    numbers = re.findall(r"(?<=_)\d+", module)
    return f"{MODULES[re.sub(r'(?<=_)[0-9]+', '{}', module)].format(*numbers)}.{LEAVES[leaf]}"


def to_flax_layout(path: str, array: np.ndarray) -> np.ndarray:
    """Linear (out, in) → (in, out), convolution OIHW → HWIO; everything else as it is."""
    if not path.endswith("/kernel"):
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def to_pytorch_layout(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_flax_layout`."""
    if not path.endswith("/kernel"):
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def pytorch_names(variables: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """(collection, Flax path) of each parameter and batch statistic in `variables`, by PyTorch name."""
    return {
        pytorch_name(path): (collection, path)
        for collection in ("params", "batch_stats")
        for path in flatten_dict(variables[collection], sep="/")
    }
