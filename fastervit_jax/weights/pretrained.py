"""Weights from files into models, and from models into files.

Every source is a mapping from official names to `StoredArray`, in PyTorch's layout, and every destination is written
from one. Between them stand the name table of `names.py` and the inference of `architecture.py`.
"""

import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fastervit_jax.model import fastervit
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig, check_keywords, get_variant
from fastervit_jax.weights import architecture, names
from fastervit_jax.weights.buffers import make_buffers
from fastervit_jax.weights.sources import Source, open_registered, open_source
from fastervit_jax.weights.torch_file import NOTE, StoredArray, WeightsError, replacing, write_torch_file

LOG = logging.getLogger("fastervit_jax")

# Fields of ModelConfig that a load can change by changing arrays; and those that change the function, but no array.
CHANGED_BY_LOADING = {"num_classes", "in_chans"}
ONLY_FUNCTION = {"window_size", "ct_size", "do_propagation"}


@dataclasses.dataclass
class Report:
    """What a load did, array by array, by official name; `str` of it is for people."""

    source: str
    derived: list[str] = dataclasses.field(default_factory=list)
    """Buffers and doubles, which are computed here."""
    head: list[str] = dataclasses.field(default_factory=list)
    """Parameters of the head that are new, because the number of classes is."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What else was changed on the way."""
    warnings: list[str] = dataclasses.field(default_factory=list)
    """What was assumed, or is not quite what was asked for."""

    def __str__(self) -> str:
        lines = [f"{self.source}: loaded"]
        if self.derived:
            lines.append(f"derived: {len(self.derived)} buffers and doubles, recomputed")
        if self.head:
            lines.append(f"head: {', '.join(self.head)} initialised anew")
        return "\n  ".join([*lines, *self.notes])

    def log(self) -> None:
        LOG.info("%s", self)
        for warning in self.warnings:
            LOG.warning("%s: %s", self.source, warning)


# From a source into a model


@functools.lru_cache(maxsize=16)  # it traces the model
def abstract_variables(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of a model's variables, which depend on neither windows nor images. Not to be changed."""
    return jax.eval_shape(lambda: _initial(config, 0))


def _initial(config: ModelConfig, seed: int) -> dict[str, Any]:
    config = dataclasses.replace(config, window_size=(1, 1, 1, 1), ct_size=1)
    return FasterViT(config).init(jax.random.key(seed), jnp.zeros((1, 32, 32, config.in_chans)))


@functools.lru_cache(maxsize=16)
def layout(config: ModelConfig) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Collection, Flax path and shape in PyTorch of each array of a model, by official name."""
    abstract = abstract_variables(config)
    flat = {collection: flatten_dict(tree, sep="/") for collection, tree in abstract.items()}
    entries = {}
    for name, (collection, path) in names.pytorch_names(abstract).items():
        no_memory = np.broadcast_to(0.0, flat[collection][path].shape)
        entries[name] = collection, path, names.to_pytorch_layout(path, no_memory).shape
    return entries


def fit(source: Source, config: ModelConfig, *, seed: int = 0) -> tuple[dict[str, StoredArray], Report]:
    """The arrays of the model with this config by official name, in float32, and a report.

    The head is new, drawn from `seed`, where its number of classes is not the source's. Other channels of the
    images are met by summing the first convolution over its input channels (for one), or by repeating them,
    scaled so that their sum stays (as timm does).

    Raises WeightsError that lists every array that is missing, left over or of another shape.
    """
    wanted = {name: shape for name, (_, _, shape) in layout(config).items()}
    report = Report(source.where, warnings=list(source.warnings))
    left = dict(source.arrays)
    replaced = {}

    head = left.get("head.weight")
    if config.num_classes and (head is None or head.shape[:1] != (config.num_classes,)):
        report.head = ["head.weight", "head.bias"]
        fresh = jax.jit(lambda: _initial(config, seed)["params"]["head"])()  # the compiler leaves out all the rest
        replaced = {"head.weight": np.asarray(fresh["kernel"]).T, "head.bias": np.asarray(fresh["bias"])}
    if replaced or not config.num_classes:
        dropped = [left.pop(name) for name in ("head.weight", "head.bias") if name in left]
        if dropped and not replaced:
            report.notes.append("head: left out, for num_classes=0")
    positions = [name for name in wanted if ".hat_pos_embed." in name]
    if any(".hat_attn." in name for name in left) and not any(".hat_pos_embed." in name for name in left):
        report.warnings.append("the file has no position embedding for carrier tokens (the official model has none "
                               "where windows form no square): set to zero")
        replaced |= {name: _zero_position(name, wanted[name], seed) for name in positions}

    fitted, mismatches = {name: _in_memory(array) for name, array in replaced.items()}, []
    for name, shape in wanted.items():
        if name in fitted:
            continue
        array = left.pop(name, None)
        if array is None:
            mismatches.append(f"{name}: not in the file, expected {shape}")
            continue
        if name == "patch_embed.conv_down.0.weight" and len(array.shape) == 4 and array.shape[1] != shape[1]:
            report.notes.append(f"{name}: {array.shape[1]} input channels folded to {shape[1]}")
            array = _fold_channels(array, shape[1])
        if array.shape != shape or not jnp.issubdtype(array.dtype, jnp.floating):
            mismatches.append(f"{name}: {array.shape} of {array.dtype} in the file, expected {shape} of floating point")
        else:
            fitted[name] = _as_float32(name, array)

    report.derived = [name for name in left if names.is_computed(name) or names.ALIAS[0] in name]
    idle = [name for name in left if ".global_tokenizer." in name and name not in report.derived
            and f"levels.{name.split('.')[1]}.blocks.0.hat_attn.qkv.weight" not in source.arrays]
    if idle:
        report.notes.append(f"left out: {', '.join(idle)}, of a stage with a single window, so without carrier tokens")
    mismatches += [f"{name}: {array.shape} in the file, none expected"
                   for name, array in left.items() if name not in (*report.derived, *idle)]
    if mismatches:
        raise WeightsError("\n  ".join([
            f"{source.where}: {len(mismatches)} array(s) do not fit the model with {_describe(config)}:",
            *sorted(mismatches)]))
    casts = {str(source.arrays[name].dtype) for name in wanted if name in source.arrays and name not in replaced}
    if casts - {"float32"}:
        report.notes.append(f"{', '.join(sorted(casts))} in the file, float32 in the model")
    return fitted, report


def _describe(config: ModelConfig) -> str:
    fields = ("dim", "in_dim", "depths", "num_heads", "hat", "layer_scale", "num_classes", "in_chans")
    return ", ".join(f"{name}={getattr(config, name)}" for name in fields)


def _in_memory(array: np.ndarray) -> StoredArray:
    return StoredArray(array.shape, array.dtype, lambda: array)


def _zero_position(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Weights of a position network that gives zeros and can be trained: its last layer is zero, its first is not."""
    if not name.endswith("cpb_mlp.0.weight"):
        return np.zeros(shape, np.float32)
    return np.random.RandomState(seed).normal(0.0, 0.02, shape).astype(np.float32)


def _fold_channels(array: StoredArray, channels: int) -> StoredArray:
    """A convolution's weights for another number of input channels."""
    out, given, *kernel = array.shape

    def read() -> np.ndarray:
        weights = array.read().astype(np.float32)
        if channels == 1:
            return weights.sum(1, keepdims=True)
        return np.tile(weights, (1, -(-channels // given), 1, 1))[:, :channels] * np.float32(given / channels)

    return StoredArray((out, channels, *kernel), np.dtype(np.float32), read, array.release)


def _as_float32(name: str, array: StoredArray) -> StoredArray:
    def read() -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):  # what becomes, or is, not finite is refused
            values = array.read().astype(np.float32, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            raise WeightsError(f"{name}: {values.size - finite.sum():,} of {values.size:,} values are NaN or infinite: "
                               "the run that wrote them had diverged, or the file is damaged")
        return values

    return StoredArray(array.shape, np.dtype(np.float32), read, array.release)


def _architecture(source: Source) -> architecture.Architecture:
    shapes = {name: array.shape for name, array in source.arrays.items()}
    try:
        return architecture.infer(shapes, nearest=source.nearest, stated=source.stated)
    except WeightsError as error:
        raise WeightsError(f"{source.where}: {error}") from error.__cause__


def infer(source: Source, changes: Mapping[str, Any]) -> tuple[architecture.Architecture, ModelConfig]:
    """The architecture of a source, and its config with the changes; says in the log what was assumed."""
    found = _architecture(source)
    told = ", ".join(f"{name}={value}" for name, value in found.inferred.items())
    LOG.info("%s: inferred %s; the rest %s", source.where, told,
             "is stated in the file" if source.stated else f"as in {found.nearest}")
    assumed = {name: value for name, value in found.assumed.items() if name not in changes}
    variant = get_variant(found.nearest).config
    free = {name: getattr(variant, name) for name in ("num_classes", "in_chans")}
    if assumed:
        text = f"assumed {', '.join(f'{name}={value}' for name, value in assumed.items())}, as in {found.nearest}"
        if source.nearest and dataclasses.replace(found.config, **free) == variant:
            LOG.info("%s: %s, the name that it came with", source.where, text)
        else:
            source.warnings.append(f"{text}: the arrays do not tell; if it is otherwise, say so by keyword")
    if source.registered:
        other = _differences(found.config, variant, {*found.inferred, "do_propagation"} - CHANGED_BY_LOADING)
        if other:
            source.warnings.append(f"the arrays are not those of {source.nearest}: {'; '.join(other)}")
    return found, dataclasses.replace(found.config, **changes)


def _differences(theirs: ModelConfig, ours: ModelConfig, fields: Iterable[str]) -> list[str]:
    """Which of the fields make two configs different functions."""
    last_two = ("num_heads", "window_size")  # their entries for stages 0 and 1 have no effect
    different = []
    for name in sorted(fields):
        a, b = getattr(theirs, name), getattr(ours, name)
        if name in ("layer_scale", "layer_scale_conv"):
            same = (a is None) == (b is None)
        elif name in ("ct_size", "do_propagation"):
            same = a == b or not any(ours.hat)
        else:
            same = a == b or (name in last_two and a[2:] == b[2:])
        if not same:
            different.append(f"{name} {a} in the file, {b} expected")
    return different


def differences(source: Source, config: ModelConfig, *, exact: bool) -> tuple[list[str], list[str]]:
    """What a source tells of its architecture that is otherwise in `config`.

    Returns what its arrays cannot fit (classes and channels, which can be changed, with `exact` only), and what they
    fit, though it is another function: windows, carrier count, propagation.
    """
    found = _architecture(source)
    told = {*found.inferred, *(ONLY_FUNCTION if source.stated else ())}
    fixed = told - ONLY_FUNCTION - (set() if exact else CHANGED_BY_LOADING)
    return _differences(found.config, config, fixed), _differences(found.config, config, told & ONLY_FUNCTION)


def load_variables(
    source: Source, config: ModelConfig, *, seed: int = 0, put: Callable[[np.ndarray], Any] = np.asarray
) -> tuple[dict[str, Any], Report]:
    """Variables of the model with this config from a source that fits it (see `fit`), each given to `put`."""
    fitted, report = fit(source, config, seed=seed)
    flat: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for name, (collection, path, _) in layout(config).items():
        array = fitted.pop(name)
        try:
            flat[collection][path] = put(np.array(names.to_flax_layout(path, array.read()), order="C"))
        except WeightsError as error:
            raise WeightsError(f"{source.where}: {error}") from error.__cause__
        array.release()
    report.log()
    return {collection: unflatten_dict(arrays, sep="/") for collection, arrays in flat.items()}, report


def from_pretrained(
    source: str | os.PathLike, *, ema: bool = False, checkpoint_path: str | os.PathLike | None = None, seed: int = 0,
    **changes: Any,
) -> tuple[FasterViT, dict[str, Any]]:
    """A model and its variables from a file of weights.

        model, variables = from_pretrained("fastervit_0_224_1k.pth.tar", num_classes=10)

    Args:
      source: a file of torch.save (.pth, .pth.tar, .pt; torch is not needed, and nothing in the file is run), a
        .safetensors file, a folder that `convert` or train.py made, or a registered name, whose published file is
        downloaded through huggingface_hub (and kept in its cache). Those are under NVIDIA's own licence.
      ema: the averaged weights, if the file has them.
      checkpoint_path: a file to read in place of the published one, for a registered name.
      seed: for what is initialised anew.
      **changes: fields of `ModelConfig` to change. Windows, carrier count and image size may differ from the file's
        without more ado. Another `num_classes` gives a new head, another `in_chans` folds the first convolution.

    The architecture comes from the arrays. What they cannot tell comes from the nearest registered variant, and
    the log (logger 'fastervit_jax') says so; the load's `Report` is logged there too.

    Raises FileNotFoundError if there is no such file, TypeError for a keyword that is no field of `ModelConfig`,
    ValueError for values that fit no model, WeightsError (a ValueError) for files that cannot be read or do not fit.
    """
    check_keywords("from_pretrained", changes)
    if checkpoint_path is None:
        opened = open_source(source, ema=ema)
    else:
        opened = open_registered(source, checkpoint_path=checkpoint_path, ema=ema)
    return _build(opened, changes, seed)


def _build(source: Source, changes: Mapping[str, Any], seed: int) -> tuple[FasterViT, dict[str, Any]]:
    _, config = infer(source, changes)
    variables, _ = load_variables(source, config, seed=seed, put=jnp.asarray)
    return FasterViT(config), variables


def create_model(
    name: str, *, pretrained: bool = False, checkpoint_path: str | os.PathLike | None = None, ema: bool = False,
    seed: int = 0, **changes: Any,
) -> FasterViT | tuple[FasterViT, dict[str, Any]]:
    """The registered model `name`, with any field of `ModelConfig` changed.

        model = create_model("faster_vit_0_224", num_classes=10, ct_size=1)
        variables = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
        model, variables = create_model("faster_vit_0_224", pretrained=True)

    With `pretrained`, or a `checkpoint_path`, the model and its variables, as `from_pretrained` gives them: see there,
    for `ema` and `seed`, too.

    Raises ValueError for an unknown name (with the nearest ones) or values that fit no model,
    TypeError for a keyword that is no field of `ModelConfig`.
    """
    if not pretrained and checkpoint_path is None:
        return fastervit.create_model(name, **changes)
    check_keywords("create_model", changes)
    return _build(open_registered(name, checkpoint_path=checkpoint_path, ema=ema), changes, seed)


# Writing


def write(
    path: str | os.PathLike, config: ModelConfig, arrays: Mapping[str, StoredArray], *, resolution: int = 224
) -> None:
    """Write a model's arrays, by official name, to a .safetensors or .pth file or a folder; see `save_pretrained`."""
    path = pathlib.Path(path)
    if isinstance(resolution, bool) or not isinstance(resolution, int) or not 32 <= resolution < 2**16:
        raise ValueError(f"resolution={resolution!r}: expected the side of square images, a whole number of pixels "
                         "of at least 32")
    note = {"config": dataclasses.asdict(config)}
    if path.suffix not in (".safetensors", ".pth", ".pt", ".tar"):
        if path.suffix:
            raise ValueError(f"{path}: expected a name that ends in .safetensors, .pth, .pt or .pth.tar, or a folder's")
        return _write_orbax(path, config, arrays)
    aliases = {name.replace(*names.ALIAS[::-1]): array for name, array in arrays.items() if names.ALIAS[1] in name}
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give a file's name")
    buffers = make_buffers(config, resolution, arrays)
    everything = dict(sorted({**arrays, **aliases, **dict(buffers)}.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        _write_safetensors(path, everything, note)
    else:
        write_torch_file(path, everything.items(), note)


def _write_safetensors(path: pathlib.Path, arrays: Mapping[str, StoredArray], note: dict[str, Any]) -> None:
    """A .safetensors file, one array at a time: the library's writer takes all of them at once.

    Its form: the header's length (8 bytes), the header (JSON), the arrays' bytes in the header's order.
    """
    dtypes = {np.dtype(np.float32): "F32", np.dtype(np.int64): "I64"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", NOTE: json.dumps(note)}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + math.prod(array.shape) * array.dtype.itemsize
        header[name] = {"dtype": dtypes[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.asarray(array.read(), order="C").reshape(-1).view(np.uint8).data)
            array.release()


def _write_orbax(path: pathlib.Path, config: ModelConfig, arrays: Mapping[str, StoredArray]) -> None:
    import orbax.checkpoint as ocp

    if path.exists():
        raise FileExistsError(f"{path} exists: give a folder that does not")
    flat: dict[str, dict[str, Any]] = {"params": {}, "batch_stats": {}}
    for name, (collection, flax_path, _) in layout(config).items():
        flat[collection][flax_path] = jnp.asarray(
            np.array(names.to_flax_layout(flax_path, arrays[name].read()), order="C"))
        arrays[name].release()
    tree = {collection: unflatten_dict(leaves, sep="/") for collection, leaves in flat.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.mkdir()
        # In parts of a quarter of a gigabyte, so that the whole is in memory once, not twice.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=0.25)) as checkpointer:
            checkpointer.save(partial / "variables", tree)
        (partial / "config.json").write_text(json.dumps({"model": dataclasses.asdict(config)}, indent=2) + "\n")


def check_variables(config: ModelConfig, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables' arrays by their paths. Raises WeightsError, naming each difference, if they fit another model."""
    given = flatten_dict(dict(variables), sep="/")
    expected = flatten_dict(abstract_variables(config), sep="/")
    different = [
        f"{key}: {np.shape(given[key]) if key in given else 'missing'}, expected "
        f"{expected[key].shape if key in expected else 'none'}"
        for key in sorted({*given, *expected})
        if key not in given or key not in expected or np.shape(given[key]) != expected[key].shape
    ]
    if different:
        raise WeightsError("the variables are not this model's:\n  " + "\n  ".join(different))
    return given


def save_pretrained(
    model: FasterViT, variables: Mapping[str, Any], path: str | os.PathLike, *, resolution: int = 224
) -> None:
    """Write a .safetensors or .pth file that the official PyTorch model loads with strict=True.

    Its computed buffers are in it; those of carrier tokens are for square images of `resolution` pixels, for which the
    official model must then be created. A path without a suffix becomes a folder in
    orbax's format. All forms keep the model's config, and `from_pretrained` reads all. Files of that name are replaced.

    Raises ValueError for another suffix, FileExistsError for a folder that exists, WeightsError if the variables are
    not this model's, or not finite, or the official model has no such form at that resolution.
    """
    given = check_variables(model.config, variables)
    arrays = {}
    for name, (collection, flax_path, _) in layout(model.config).items():
        array = names.to_pytorch_layout(flax_path, np.asarray(given[f"{collection}/{flax_path}"]))
        arrays[name] = _as_float32(name, _in_memory(array))
    write(path, model.config, arrays, resolution=resolution)
