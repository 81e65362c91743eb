"""Convert weights from one form to another: PyTorch's .pth, .safetensors, or a folder in orbax's format.

    python -m fastervit_jax.convert fastervit_0_224_1k.pth.tar weights.safetensors
    python -m fastervit_jax.convert fastervit_0_224_1k.pth.tar weights --verify
    python -m fastervit_jax.convert weights weights.pth

SOURCE is all that `from_pretrained` reads: those forms, a workdir of train.py, a registered name. Files load into the
official model with strict=True. PyTorch is needed for --verify only.
"""

import argparse
import ast
import dataclasses
import logging
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from fastervit_jax import compilation_cache
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig, check_keywords, get_variant
from fastervit_jax.weights import names, pretrained, sources

LARGEST_DIFFERENCE = 1e-4
"""Relative difference of logits, in norm, above which --verify fails; rounding gives 1e-6 or less."""


def convert(
    source: str, destination: str, *, ema: bool = False, resolution: int | None = None, verify: bool = False,
    changes: dict[str, Any] | None = None,
) -> None:
    """Write the weights in `source` to `destination`; see `python -m fastervit_jax.convert --help`."""
    check_keywords("--set", changes or {})
    if verify:
        _official_package()
    opened = sources.open_source(source, ema=ema)
    found, config = pretrained.infer(opened, changes or {})
    told = (resolution, found.side, opened.side, get_variant(found.nearest).resolution)
    side = next(side for side in told if side is not None)
    arrays, report = pretrained.fit(opened, config)
    report.log()
    pretrained.write(destination, config, arrays, resolution=side)
    written = pathlib.Path(destination)
    size = sum(path.stat().st_size for path in ([written] if written.is_file() else written.rglob("*")))
    parameters = sum(x.size for x in jax.tree.leaves(pretrained.abstract_variables(config)["params"]))
    buffers = f", buffers for images of {side} pixels" if written.is_file() else ""
    print(f"{destination}: {parameters:,} parameters, {size / 1e6:,.1f} MB{buffers}")
    if verify:
        _verify(opened, sources.open_source(destination), config, found.nearest, side)


def _official_package() -> tuple[Any, Any]:
    try:
        import fastervit
        import torch
    except Exception as error:  # also what torchvision raises beside another build of torch, a RuntimeError
        sys.exit("--verify runs the official package, which cannot be imported here: pip install torch torchvision "
                 f"timm fastervit ({type(error).__name__}: {error})")
    return fastervit, torch


def _verify(
    source: sources.Source, destination: sources.Source, config: ModelConfig, nearest: str, side: int
) -> None:
    """Compare the official model, with each file for PyTorch, and ours, with each side, on random images.

    The official model is the one of that name if the architecture is the registered one: so our table is tested, too.
    It must take all arrays of the destination; from the source, all but the buffers.
    """
    fastervit, torch = _official_package()
    images = np.random.RandomState(0).normal(size=(2, side, side, config.in_chans)).astype(np.float32)
    variant = get_variant(nearest)
    free = {name: getattr(config, name) for name in ("num_classes", "in_chans")}
    if dataclasses.replace(variant.config, **free) == config and side == variant.resolution:
        model = fastervit.create_model(nearest, **free)
    else:
        fields = {name: value for name, value in dataclasses.asdict(config).items() if name != "dtype"}
        model = fastervit.create_model("faster_vit_0_any_res", resolution=[side, side], **fields)
    own = model.state_dict()

    ours, theirs = {}, {}
    for opened in (source, destination):
        variables, _ = pretrained.load_variables(opened, config)
        with jax.default_matmul_precision("highest"):
            ours[opened.where] = np.asarray(jax.jit(FasterViT(config).apply)(variables, images), np.float64)
        if opened.is_folder:
            continue
        state = {name: torch.from_numpy(np.array(array.read())) for name, array in opened.arrays.items()}
        if opened is source:
            unfit = [name for name, x in own.items() if not names.is_computed(name)
                     and (name not in state or state[name].shape != x.shape)]
            if unfit:
                print(f"official with {opened.where}: left out, {len(unfit)} arrays are others there, {unfit[0]} first")
                continue
            state = {name: x if names.is_computed(name) else state[name] for name, x in own.items()}
        model.float().load_state_dict(state, strict=True)
        with torch.no_grad():
            logits = model.double().eval()(torch.from_numpy(images.transpose(0, 3, 1, 2)).double())
        theirs[opened.where] = logits.numpy()
    if not theirs:
        sys.exit("--verify: nothing to compare, for the official model reads neither; expected .pth or .safetensors")
    for theirs_name, reference in theirs.items():
        for ours_name, logits in ours.items():
            difference = np.abs(logits - reference).max()
            relative = np.linalg.norm(logits - reference) / np.linalg.norm(reference)
            print(f"ours with {ours_name}, official with {theirs_name}: max |Δlogit| {difference:.2e}, relative "
                  f"{relative:.1e}, logits up to {np.abs(reference).max():.1f}")
            if not relative < LARGEST_DIFFERENCE:
                sys.exit(f"--verify: not the same function: a relative difference of {relative:.1e}, expected less "
                         f"than {LARGEST_DIFFERENCE:.0e}")


def _assignment(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIELD=VALUE, with a number, True, False, None or a tuple "
                                         "of them") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastervit_jax.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE")
    parser.add_argument("destination", metavar="DESTINATION",
                        help="ends in .safetensors, .pth, .pt or .pth.tar; without an ending it is a folder")
    parser.add_argument("--ema", action="store_true", help="the averaged weights, if the file has them")
    parser.add_argument("--resolution", type=int, metavar="PIXELS",
                        help="side of the images for which the official model is created, on which the buffers of its "
                             "carrier tokens depend; by default the source's")
    parser.add_argument("--set", action="append", default=[], type=_assignment, metavar="FIELD=VALUE",
                        help="a field of ModelConfig that the source does not tell, such as do_propagation=True")
    parser.add_argument("--verify", action="store_true",
                        help="compare with the official package, which must be installed: prints max |Δlogit|")
    args = parser.parse_args()
    logging.basicConfig(format="%(levelname)s %(message)s")
    logging.getLogger("fastervit_jax").setLevel(logging.INFO)
    jax.config.update("jax_platforms", "cpu")  # copying only: no need of an accelerator's memory
    try:
        convert(args.source, args.destination, ema=args.ema, resolution=args.resolution, verify=args.verify,
                changes=dict(args.set))
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    compilation_cache.enable()
    main()
