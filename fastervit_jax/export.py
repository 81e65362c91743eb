"""Export a model for other runtimes: StableHLO, ONNX, or a TensorFlow SavedModel.

    python -m fastervit_jax.export fastervit_0_224_1k.pth.tar model.onnx
    python -m fastervit_jax.export runs/digits digits.stablehlo
    python -m fastervit_jax.export faster_vit_0_224 model --to=saved_model

SOURCE is all that `from_pretrained` reads: a file of weights, a workdir of train.py, a registered name. DESTINATION's
ending chooses the form: .onnx, .stablehlo, or a folder named saved_model. The exported function takes float32 images
(batch, height, width, channels), normalised, of one size and of any number, and gives the logits in eval mode. It is
run in its own runtime and compared with the model before it gets its name: one that differs is not kept.
"""

import argparse
import dataclasses
import importlib
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from fastervit_jax import compilation_cache, trained
from fastervit_jax.data import sources as data_sources
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import get_variant
from fastervit_jax.weights import pretrained, sources
from fastervit_jax.weights.torch_file import replacing

LARGEST_ERROR = 1e-4
"""Relative error of an image's logits, in norm, above which an export fails; rounding gives 1e-6 or less."""
BATCH_SIZES = (1, 3)
"""Of the random images that each export is compared on."""
LARGEST_STABLEHLO = 2**31
"""Bytes that a .stablehlo file can have; jax.export's format counts them with 32 bits."""
PLATFORMS = ("cpu", "cuda", "tpu")
FORMS = {".stablehlo": "stablehlo", ".onnx": "onnx"}
PACKAGES = {"stablehlo": ("flatbuffers",), "onnx": ("onnx", "onnxruntime"), "saved_model": ("tensorflow",)}
"""That a form needs, and training does not."""

Run = Callable[[np.ndarray], Any]


class ExportError(RuntimeError):
    """What was exported is not the model, or the model cannot be exported."""


def export(
    model: FasterViT, variables: Mapping[str, Any], path: str | os.PathLike, *, resolution: int | tuple[int, int],
    to: str | None = None,
) -> float:
    """Write the model to `path` and return the largest relative error of its logits on random images.

    Args:
      resolution: height and width of the images in pixels, or the side of square ones.
      to: "stablehlo", "onnx" or "saved_model"; by default what the path's ending says.

    What is at `path` is replaced once the new one has been checked, and only then (a folder must not be there yet).
    The model computes in float32, whatever its config's dtype.
    Raises ValueError for another ending or images too small, ModuleNotFoundError saying what to install, ExportError if
    the largest relative error is above LARGEST_ERROR, or the form cannot hold the model.
    """
    path = pathlib.Path(path)
    form = to or form_of(path)
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if path.is_dir() and form != "saved_model":
        raise IsADirectoryError(f"{path} is a folder: give a file's name")
    if path.exists() and form == "saved_model":
        raise FileExistsError(f"{path} exists: give a folder that does not")
    config = dataclasses.replace(model.config, dtype="float32")
    model = FasterViT(config, kernels="xla")  # ours are for one platform, and no format has them
    variables = jax.tree.map(jnp.asarray, dict(variables))
    shape = (height, width, config.in_chans)
    jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((1, *shape), jnp.float32))  # refuses what cannot be
    path.parent.mkdir(parents=True, exist_ok=True)
    return WRITERS[form](model, variables, shape, path)


def form_of(path: pathlib.Path) -> str:
    """The form that a path's ending means. Raises ValueError for another one."""
    if path.name == "saved_model":
        return "saved_model"
    if path.suffix not in FORMS:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(FORMS)}, or a folder named saved_model, "
                         "or --to to say the form")
    return FORMS[path.suffix]


def check(run: Run, model: FasterViT, variables: Mapping[str, Any], shape: tuple[int, int, int], what: str) -> float:
    """The largest relative error of `run`'s logits on random images, over images and batch sizes.

    Raises ExportError if it is above LARGEST_ERROR, or not a number.
    """
    rng, worst = np.random.default_rng(0), 0.0
    apply = jax.jit(model.apply)
    for batch in BATCH_SIZES:
        images = rng.normal(size=(batch, *shape)).astype(np.float32)
        with jax.default_matmul_precision("highest"):
            expected = np.asarray(apply(variables, images), np.float64)
        given = np.asarray(run(images), np.float64)
        if given.shape != expected.shape:
            raise ExportError(f"{what} gives {given.shape} for {batch} images, the model {expected.shape}: not kept")
        errors = np.linalg.norm(given - expected, axis=1) / np.linalg.norm(expected, axis=1)
        worst = max(worst, float(errors.max()), key=lambda error: np.inf if np.isnan(error) else error)
    if not worst <= LARGEST_ERROR:
        raise ExportError(f"{what} differs from the model by a relative {worst:.1e}, expected at most "
                          f"{LARGEST_ERROR:.0e}: not kept")
    return worst


def _exported(model: FasterViT, variables: Mapping[str, Any], shape: tuple[int, int, int], inside: bool) -> Any:
    """jax.export's form of images → logits, or, without the weights `inside`, of (images, *weights) → logits."""
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *shape), jnp.float32)
    leaves, tree = jax.tree.flatten(variables)
    if inside:
        return jax.export.export(jax.jit(lambda x: model.apply(variables, x)), platforms=PLATFORMS)(images)
    function = jax.jit(lambda x, *weights: model.apply(jax.tree.unflatten(tree, weights), x))
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
    return jax.export.export(function, platforms=PLATFORMS)(images, *shapes)


def _stablehlo(
    model: FasterViT, variables: Mapping[str, Any], shape: tuple[int, int, int], path: pathlib.Path
) -> float:
    _need("stablehlo")
    size = sum(x.nbytes for x in jax.tree.leaves(variables))
    if size >= LARGEST_STABLEHLO:
        raise ExportError(f"{path}: {size / 1e9:.1f} GB of weights, a .stablehlo file has less than "
                          f"{LARGEST_STABLEHLO / 1e9:.1f} GB; an .onnx file can have more")
    exported = _exported(model, variables, shape, inside=True)
    with replacing(path) as partial:
        partial.write_bytes(exported.serialize())
        read = jax.export.deserialize(bytearray(partial.read_bytes()))
        return check(jax.jit(read.call), model, variables, shape, str(path))


def _onnx(model: FasterViT, variables: Mapping[str, Any], shape: tuple[int, int, int], path: pathlib.Path) -> float:
    _need("onnx")
    import onnxruntime

    from fastervit_jax import onnx_graph

    path = path.resolve()
    data = path.with_name(f"{path.name}.data")
    graph = onnx_graph.build(model, variables, *shape[:2])
    # In a folder of its own, since the file refers to its data by name.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.", suffix=".partial") as folder:
        partial = pathlib.Path(folder, path.name)
        onnx_graph.write(graph, partial, "logits" if model.config.num_classes else "features")
        session = onnxruntime.InferenceSession(partial, providers=["CPUExecutionProvider"])
        error = check(lambda x: session.run(None, {"images": x})[0], model, variables, shape, str(path))
        del session
        if data.exists() or partial.with_name(data.name).exists():
            path.unlink(missing_ok=True)  # never an old graph with new data
            data.unlink(missing_ok=True)
        if partial.with_name(data.name).exists():
            os.replace(partial.with_name(data.name), data)
        os.replace(partial, path)
    return error


def _saved_model(
    model: FasterViT, variables: Mapping[str, Any], shape: tuple[int, int, int], path: pathlib.Path
) -> float:
    _need("saved_model")
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.python import xla

    exported = _exported(model, variables, shape, inside=False)
    module = tf.Module()
    module.weights = [tf.Variable(x, trainable=False) for x in jax.tree.leaves(variables)]
    outputs = exported.out_avals[0].shape[-1]

    @tf.function(input_signature=[tf.TensorSpec((None, *shape), tf.float32, name="images")])
    def logits(images):
        # What jax.export made, as an operation of TensorFlow's; XLA compiles it there for each number of images.
        (result,) = xla.call_module(
            [images, *module.weights], version=exported.calling_convention_version, Tout=[tf.float32],
            Sout=[(None, outputs)], module=exported.mlir_module_serialized,
            platforms=[platform.upper() for platform in exported.platforms])
        return {"logits" if model.config.num_classes else "features": result}

    module.serving_default = logits
    with replacing(path) as partial:
        tf.saved_model.save(module, str(partial), signatures={"serving_default": logits})
        loaded = tf.saved_model.load(str(partial)).signatures["serving_default"]
        return check(lambda x: next(iter(loaded(tf.constant(x)).values())).numpy(), model, variables, shape, str(path))


def _need(form: str) -> None:
    packages = PACKAGES[form]
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"this form needs {' and '.join(packages)}: pip install {' '.join(packages)} "
                                      f"({error})", name=package) from error


WRITERS = {"stablehlo": _stablehlo, "onnx": _onnx, "saved_model": _saved_model}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastervit_jax.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="DESTINATION", type=pathlib.Path)
    parser.add_argument("--to", choices=sorted(WRITERS), help="the form, whatever DESTINATION's ending")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help="the averaged weights; by default those "
                        "of a workdir that has them, of nothing else")
    parser.add_argument("--resolution", type=int, metavar="PIXELS",
                        help="side of the images; by default that of the run, or of the registered variant")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(levelname)s %(message)s")
    try:
        form = args.to or form_of(args.destination)  # before anything is read
        _need(form)
        run = trained.run_config(args.source)
        averaged = trained.has_averages(args.source, run) if args.ema is None else args.ema
        opened = sources.open_source(args.source, ema=averaged)
        found, config = pretrained.infer(opened, {"dtype": "float32"})
        variables, _ = pretrained.load_variables(opened, config)
        told = (args.resolution, found.side, opened.side, get_variant(found.nearest).resolution)
        side = next(side for side in told if side is not None)
        sides = (side, side)
        if run and args.resolution is None:
            sides = data_sources.image_sides(ConfigDict(run))
        error = export(FasterViT(config), variables, args.destination, resolution=sides, to=form)
    except (ValueError, TypeError, OSError, ImportError, ExportError, NotImplementedError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    written = args.destination
    files = [p for p in written.rglob("*") if p.is_file()] if written.is_dir() else [
        p for p in (written, written.with_name(f"{written.name}.data")) if p.exists()]
    size = sum(p.stat().st_size for p in files)
    images = ", ".join(map(str, (*sides, config.in_chans)))
    print(f"{written}: {form}, {size / 1e6:,.1f} MB, images (batch, {images}) in float32; "
          f"largest relative error {error:.1e}, on {' and '.join(map(str, BATCH_SIZES))} random images")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # so that the check has float32 products, and needs no accelerator
    compilation_cache.enable()
    main()
