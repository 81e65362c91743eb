"""Where weights come from: PyTorch's files, safetensors, orbax folders of ours, and the published files.

Each becomes a `Source`, whose arrays have the official names and PyTorch's layout.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fastervit_jax.model.variants import ANY_RES, get_variant, list_models
from fastervit_jax.weights import names
from fastervit_jax.weights.torch_file import NOTE, StoredArray, WeightsError, check_shape, read_torch_file, shown

# Where checkpoints keep their weights, the usual ones and the averaged ones.
PREFERRED = ("state_dict", "model", "model_state_dict")
PREFERRED_EMA = ("state_dict_ema", "model_ema")

# The published files, under NVIDIA's own licence: repository and commit on the Hugging Face hub, and file names.
REPOSITORY, REVISION = "ahatamiz/FasterViT", "d43fc2311da25568a7ce8e932429d4b453308e59"
PUBLISHED = {
    **{f"faster_vit_{n}_224": f"fastervit_{n}_224_1k.pth.tar" for n in range(7)},
    **{f"faster_vit_4_21k_{side}": f"fastervit_4_21k_{side}_w{window}.pth.tar"
       for side, window in ((224, 14), (384, 24), (512, 32), (768, 48))},
}  # fmt: skip


@dataclasses.dataclass
class Source:
    """What a file of weights holds: arrays by official name, and what it says of the architecture."""

    where: str
    arrays: dict[str, StoredArray]
    nearest: str | None = None
    """The registered variant that it is named for, if it is."""
    stated: Mapping[str, Any] | None = None
    """Fields of `ModelConfig`, in files that we write."""
    registered: bool = False
    """Whether a user named the variant."""
    is_folder: bool = False
    """Whether it is one in orbax's format, rather than a file."""
    side: int | None = None
    """Pixels a side of a run's images."""
    warnings: list[str] = dataclasses.field(default_factory=list)
    """Where it is not quite what was asked for."""


def fetch(name: str) -> pathlib.Path:
    """The published file of a registered model, from the hub or its cache.

    Raises WeightsError if the file cannot be had, naming it, its address and the way round.
    """
    file = PUBLISHED.get(name)
    if file is None:
        raise WeightsError(f"no published weights for {name!r}: there are some for {', '.join(PUBLISHED)}")
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return pathlib.Path(huggingface_hub.hf_hub_download(REPOSITORY, file, revision=REVISION))
    except Exception as error:  # the client's own, its HTTP library's and the system's errors share no other class
        hidden = isinstance(error, LocalEntryNotFoundError) and error.__cause__
        reason = error.__cause__ if hidden else error  # that one says only that the hub was not reached, not why
        url = huggingface_hub.hf_hub_url(REPOSITORY, file, revision=REVISION)
        raise WeightsError(
            f"{file}, the published weights of {name}, could not be downloaded from {url} ({type(reason).__name__}: "
            f"{reason}). Try again, or get the file elsewhere and give its path: checkpoint_path={file!r}") from error


def open_registered(name: str, *, checkpoint_path: str | os.PathLike | None = None, ema: bool = False) -> Source:
    """The arrays of a registered model: those published, or those in a file, if one is given."""
    get_variant(name)
    name = ANY_RES.get(name, name)
    if checkpoint_path is not None:
        opened = open_source(pathlib.Path(checkpoint_path), ema=ema)
        return dataclasses.replace(opened, nearest=name, registered=True)
    path = fetch(name)
    # The client never looks into a file that it has: one that is damaged must go before it gets another.
    where = f"{path.name} (kept at {path.resolve()}; if it is damaged, delete that and try again)"
    try:
        return dataclasses.replace(open_source(path, ema=ema), where=where, nearest=name, registered=True)
    except WeightsError as error:
        raise WeightsError(f"{where}: {error}") from error.__cause__


def open_source(source: str | os.PathLike, *, ema: bool = False) -> Source:
    """The arrays of a file or folder, or of a registered model's published file.

    Raises FileNotFoundError if there is nothing of that name, WeightsError if it holds no weights.
    """
    path = pathlib.Path(source)
    if not path.exists():
        if source in list_models():  # a text, that is: a path means a file
            return open_registered(source, ema=ema)
        raise FileNotFoundError(
            f"no file, folder or registered model {os.fspath(source)!r}: expected a PyTorch checkpoint, a .safetensors "
            "file, a folder that convert or train.py made, or one of fastervit_jax.list_models()")
    try:
        if path.is_dir():
            return _open_orbax(path, ema)
        with path.open("rb") as file:
            head = file.read(9)
        if path.suffix == ".safetensors" or head[8:9] == b"{":
            return _open_safetensors(path, ema)
        return _open_torch(path, ema)
    except WeightsError as error:
        where = str(path)
        raise error if str(error).startswith(where) else WeightsError(f"{where}: {error}") from error.__cause__


def _named(entries: Mapping[Any, Any]) -> dict[str, StoredArray]:
    """Entries by official name. Raises WeightsError if two have the same, or one is no array."""
    arrays, theirs = {}, {}
    for key, array in entries.items():
        name = names.without_prefixes(key) if isinstance(key, str) else shown(key)
        if not isinstance(array, StoredArray):
            raise WeightsError(f"entry {shown(key)} of the state dict is {type(array).__name__}, expected a tensor")
        if name in arrays:
            raise WeightsError(f"{shown(theirs[name])} and {shown(key)} are both {shown(name)}, once the prefixes of "
                               "wrappers are taken off; expected one of them")
        arrays[name], theirs[name] = array, key
    for name in list(arrays):  # files may keep either name of the shared convolution
        for here, there in (names.ALIAS, names.ALIAS[::-1]):
            if here in name:
                arrays.setdefault(name.replace(here, there), arrays[name])
    return arrays


def _open_torch(path: pathlib.Path, ema: bool) -> Source:
    saved, note = read_torch_file(path)
    if not isinstance(saved, dict):
        raise WeightsError(f"it holds {type(saved).__name__}, expected a state dict, or a dict that has one")
    order = (*PREFERRED_EMA, *PREFERRED) if ema else (*PREFERRED, *PREFERRED_EMA)
    key = next((key for key in order if isinstance(saved.get(key), dict) and saved[key]), None)
    if key is None and not any(isinstance(value, StoredArray) for value in saved.values()):
        raise WeightsError(f"no state dict in it: it has the keys {', '.join(map(shown, list(saved)[:20]))}; expected "
                           f"tensors, or one of {', '.join(map(repr, order))}")
    arch = saved.get("arch")
    opened = Source(f"{path}{f' [{key}]' if key else ''}", _named(saved[key] if key else saved),
                    nearest=arch if isinstance(arch, str) and arch in list_models() else None, stated=_stated(note))
    if ema and key not in PREFERRED_EMA:
        opened.warnings.append("ema=True, but the file has no averaged weights: loaded the ordinary ones")
    elif not ema and key in PREFERRED_EMA:
        opened.warnings.append("the file has averaged (EMA) weights alone: loaded these")
    return opened


def _stated(note: Any) -> dict[str, Any] | None:
    if not isinstance(note, dict):
        raise WeightsError(f"{NOTE} holds {type(note).__name__}, expected an object of JSON")
    config = note.get("config")
    if config is not None and not isinstance(config, dict):
        raise WeightsError(f"the file's note of its architecture is {shown(config)}, expected an object")
    return config


def _open_safetensors(path: pathlib.Path, ema: bool) -> Source:
    import safetensors

    known = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64,
             "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
             "U8": np.uint8, "BOOL": np.bool_, "C64": np.complex64}  # fmt: skip
    try:
        # Reads into new memory: pages of a mapped file would count as this process's.
        file = safetensors.safe_open(path, "np", backend="pread")
        arrays = {}
        for name in file.keys():  # noqa: SIM118, no dict
            part = file.get_slice(name)
            if part.get_dtype() not in known:
                raise WeightsError(f"{name} has dtype {part.get_dtype()}, expected one of {', '.join(known)}")
            check_shape(tuple(part.get_shape()))
            arrays[name] = StoredArray(tuple(part.get_shape()), np.dtype(known[part.get_dtype()]),
                                       lambda name=name: file.get_tensor(name))
        note = (file.metadata() or {}).get(NOTE)
        stated = _stated(json.loads(note)) if note is not None else None
    except WeightsError:
        raise
    except (safetensors.SafetensorError, ValueError, OSError, RecursionError) as error:
        raise WeightsError(f"no safetensors file, or a damaged one ({error}): download or save it again") from error
    source = Source(str(path), _named(arrays), stated=stated)
    if ema:
        source.warnings.append("ema=True, but a .safetensors file has one set of weights: loaded it")
    return source


def _open_orbax(path: pathlib.Path, ema: bool) -> Source:
    """A folder with config.json, and the arrays in variables/ (from convert), or in checkpoints/STEP/ of a run.

    There they are in variables/, those that are averaged in ema/. A step under another name is not whole.
    """
    import orbax.checkpoint as ocp

    steps = sorted((p for p in path.glob("checkpoints/*/variables") if p.parent.name.isdecimal()),
                   key=lambda p: int(p.parent.name))
    folder = path / "variables" if (path / "variables").exists() else steps[-1] if steps else None
    if folder is None or not (path / "config.json").exists():
        raise WeightsError("the folder is none of ours: expected config.json, and variables/ (made by convert) or "
                           "checkpoints/STEP/variables/ (made by train.py)")
    averaged = ema and folder.parent != path and (folder.parent / "ema").exists()
    if averaged:
        folder = folder.parent / "ema"
    # In parts of a quarter of a gigabyte, so that the whole is in memory once, not twice.
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=0.25)
    arrays = {}
    try:
        config = json.loads((path / "config.json").read_text())
        stated, side = _stated({"config": config["model"]}), config.get("data", {}).get("image_size")
        tree = handler.metadata(folder.absolute()).tree
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = handler.restore(folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=wanted))
        for collection in ("params", "batch_stats"):
            for flax_path, array in flatten_dict(restored[collection], sep="/").items():
                array = names.to_pytorch_layout(flax_path, array)
                arrays[names.pytorch_name(flax_path)] = StoredArray(array.shape, array.dtype, lambda array=array: array)
    except WeightsError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise WeightsError(f"config.json or {folder.name}/ is damaged ({type(error).__name__}: {str(error)[:300]}): "
                           "convert the weights again, or take a whole checkpoint") from error
    finally:
        handler.close()
    source = Source(str(folder), arrays, stated=stated, is_folder=True,
                    side=side if isinstance(side, int) else None)
    if ema and not averaged:
        source.warnings.append("ema=True, but the folder has one set of weights: loaded it")
    return source
