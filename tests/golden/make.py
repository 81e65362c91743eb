"""Run the official PyTorch package, as a black box, on the cases of cases.py and write NAME.npz.

    python3 -m venv .venv-oracle
    .venv-oracle/bin/pip install torch==2.13.0 numpy pillow pyyaml huggingface_hub safetensors
    .venv-oracle/bin/pip install --no-deps fastervit==1.0.0 timm==1.0.31 torchvision==0.28.0
    .venv-oracle/bin/pip install -r requirements.txt
    .venv-oracle/bin/python tests/golden/make.py --out tests/golden carriers scaled_propagated two_hat_stages

A file holds the logits (float64), the stage maps (NHWC, float32 of a float64 run) and the names of
every parameter and batch statistic. The weights and images are drawn again where they are needed.

For the tests of files of weights: `--checkpoint` writes NAME.pth.tar, laid out as the published ones are;
`--load FILE` loads a file into the case's model with strict=True and writes FILE.npz, the logits with it;
`--shapes` writes NAME.json, names and shapes of the whole state dict at full size. `--serve` does what each line of
stdin says, a JSON list of arguments, and then says "done": PyTorch and the package take seconds to import.
"""

import argparse
import json
import pathlib
import sys
import warnings

import numpy as np
import safetensors.torch
import torch

# The prebuilt torchvision lacks its compiled operators beside a CPU build of torch; importing needs their names only.
library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    try:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        print(f"torchvision has {operator}", file=sys.stderr)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the official package's own deprecations
    import fastervit

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import cases  # noqa: E402

COMPUTED = ("relative_bias", "relative_coords_table", "relative_position_index", "num_batches_tracked")


def build(case: cases.Case, **changes) -> torch.nn.Module:
    any_res = case.arch.endswith("any_res")
    resolution = [case.resolution, case.resolution] if any_res else case.resolution
    return fastervit.create_model(case.arch, resolution=resolution, **{**case.kwargs, **changes})


def fill(model: torch.nn.Module) -> list[str]:
    """Give every parameter and batch statistic its array; their names."""
    # The initialiser's convolution is listed twice; the second name is the same tensor.
    names = [n for n in model.state_dict() if not n.endswith(COMPUTED) and ".to_global_feature." not in n]
    state = model.state_dict()
    with torch.no_grad():
        for name in names:
            state[name].copy_(torch.from_numpy(cases.official_array(name, tuple(state[name].shape))))
    return names


def logits_and_maps(model: torch.nn.Module, case: cases.Case) -> dict[str, np.ndarray]:
    stages = {}
    for i, level in enumerate(model.levels):
        if level.downsample is None:
            level.register_forward_hook(lambda module, args, out, i=i: stages.update({f"stage{i}": out}))
        else:
            level.downsample.register_forward_pre_hook(lambda module, args, i=i: stages.update({f"stage{i}": args[0]}))
    images = cases.images(case.batch, case.resolution, case.resolution, case.kwargs.get("in_chans", 3))
    # In float64, but for the largest images, whose position biases alone would take 8 GB.
    model, images = model.eval(), torch.from_numpy(images.transpose(0, 3, 1, 2))
    if case.resolution <= 400:
        model, images = model.double(), images.double()
    with torch.no_grad():
        logits = model(images)
    maps = {name: x.numpy().transpose(0, 2, 3, 1).astype(np.float32) for name, x in stages.items()}
    return {"logits": logits.numpy(), **maps}


def make(case: cases.Case, checkpoint: pathlib.Path | None) -> dict[str, np.ndarray]:
    model = build(case)
    names = fill(model)
    if checkpoint:
        state = model.state_dict()
        torch.save({"epoch": 309, "arch": case.arch, "state_dict": state, "state_dict_ema": state, "version": 2,
                    "args": argparse.Namespace(model=case.arch, lr=0.005, opt="lamb"), "metric": 82.1}, checkpoint)
        del state
    return {"names": np.array(names), **logits_and_maps(model, case)}


def load(case: cases.Case, file: pathlib.Path) -> dict[str, np.ndarray]:
    model = build(case)
    if file.suffix == ".safetensors":
        state = safetensors.torch.load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    model.load_state_dict(state, strict=True)
    del state
    computed = {name: x.clone() for name, x in model.state_dict().items() if name.endswith(COMPUTED)}
    outputs = {"logits": logits_and_maps(model, case)["logits"]}
    # What the official model makes of them once it has run, against what was in the file.
    worst = {name: np.linalg.norm((computed[name].double() - x.double()).numpy()) / (x.double().norm().item() or 1.0)
             for name, x in model.state_dict().items() if name in computed}
    return {**outputs, "computed": np.array(list(worst)), "computed_errors": np.array(list(worst.values()))}


def shapes(case: cases.Case) -> dict[str, list[int]]:
    linspace = torch.linspace
    torch.linspace = lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"})  # it asks for their values
    try:
        with torch.device("meta"):
            return {name: list(x.shape) for name, x in build(cases.Case(case.arch, {}, 224)).state_dict().items()}
    finally:
        torch.linspace = linspace


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--load", type=pathlib.Path, nargs="*", metavar="FILE", help="one file for each case")
    parser.add_argument("--shapes", action="store_true")
    parser.add_argument("case", nargs="*", default=list(cases.CASES), help=f"default: {' '.join(cases.CASES)}")
    args = parser.parse_args(arguments)
    all_cases = {**cases.PUBLISHED, **cases.CASES}
    for i, name in enumerate(args.case):
        if args.shapes:
            (args.out / f"{name}.json").write_text(json.dumps(shapes(all_cases[name])))
        elif args.load:
            np.savez(args.out / f"{args.load[i].name}.npz", **load(all_cases[name], args.load[i]))
        else:
            arrays = make(all_cases[name], args.out / f"{name}.pth.tar" if args.checkpoint else None)
            save = np.savez if args.checkpoint else np.savez_compressed
            save(args.out / f"{name}.npz", **arrays)
            del arrays["names"]
            print(name, *(f"{key} {value.shape} std {value.std():.3f}" for key, value in arrays.items()))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        for line in sys.stdin:
            main(json.loads(line))
            print("done", flush=True)
    else:
        main(sys.argv[1:])
