"""Run the official PyTorch package, as a black box, on the cases of cases.py and write NAME.npz.

    python3 -m venv .venv-oracle
    .venv-oracle/bin/pip install torch==2.13.0 numpy pillow pyyaml huggingface_hub safetensors
    .venv-oracle/bin/pip install --no-deps fastervit==1.0.0 timm==1.0.31 torchvision==0.28.0
    .venv-oracle/bin/python tests/golden/make.py --out tests/golden carriers scaled_propagated two_hat_stages

A file holds the logits (float64), the stage maps (NHWC, float32 of a float64 run) and the names of
every parameter and batch statistic. The weights and images are drawn again where they are needed.
"""

import argparse
import pathlib
import sys
import warnings

import numpy as np
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


def make(case: cases.Case) -> dict[str, np.ndarray]:
    any_res = case.arch.endswith("any_res")
    resolution = [case.resolution, case.resolution] if any_res else case.resolution
    model = fastervit.create_model(case.arch, resolution=resolution, **case.kwargs)
    # The initialiser's convolution is listed twice; the second name is the same tensor.
    names = [n for n in model.state_dict() if not n.endswith(COMPUTED) and ".to_global_feature." not in n]
    state = model.state_dict()
    with torch.no_grad():
        for name in names:
            state[name].copy_(torch.from_numpy(cases.official_array(name, tuple(state[name].shape))))

    stages = {}
    for i, level in enumerate(model.levels):
        if level.downsample is None:
            level.register_forward_hook(lambda module, args, out, i=i: stages.update({f"stage{i}": out}))
        else:
            level.downsample.register_forward_pre_hook(lambda module, args, i=i: stages.update({f"stage{i}": args[0]}))
    images = cases.images(case.batch, case.resolution, case.resolution, case.kwargs.get("in_chans", 3))
    with torch.no_grad():
        logits = model.double().eval()(torch.from_numpy(images.transpose(0, 3, 1, 2)).double())
    maps = {name: x.numpy().transpose(0, 2, 3, 1).astype(np.float32) for name, x in stages.items()}
    return {"names": np.array(names), "logits": logits.numpy(), **maps}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("case", nargs="*", default=list(cases.CASES), help=f"default: {' '.join(cases.CASES)}")
    args = parser.parse_args()
    for name in args.case:
        arrays = make(cases.CASES[name])
        np.savez_compressed(args.out / f"{name}.npz", **arrays)
        print(name, *(f"{key} {value.shape} std {value.std():.3f}" for key, value in arrays.items() if key != "names"))


if __name__ == "__main__":
    main()
