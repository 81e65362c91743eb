"""Run timm's evaluation transform and its random crop, as a black box, on image files.

    .venv-oracle/bin/python tests/data/timm_decode_oracle.py IMAGES OUT.npz

needs torch, torchvision, timm; tests/golden/make.py says how to set that Python up. test_timm_decode.py runs it.
"""

import itertools
import pathlib
import random
import sys

import numpy as np
import torch

# The prebuilt torchvision lacks its compiled operators beside a CPU build of torch; importing needs their names only.
library = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    try:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        print(f"torchvision has {operator}", file=sys.stderr)

from PIL import Image  # noqa: E402
from timm.data import create_transform  # noqa: E402
from timm.data.transforms import RandomResizedCropAndInterpolation  # noqa: E402

CROPS = {224: 0.875, 288: 1.0, 97: 0.93}
SHAPES = ((375, 500), (80, 400))
DRAWS = 20_000


def main(folder: pathlib.Path, out: pathlib.Path) -> None:
    arrays = {}
    for size, mode in itertools.product(CROPS, ("center", "squash")):
        transform = create_transform(
            (3, size, size), is_training=False, interpolation="bicubic", crop_pct=CROPS[size], crop_mode=mode,
            use_prefetcher=True)
        pixels = [np.asarray(transform(Image.open(path).convert("RGB"))) for path in sorted(folder.iterdir())]
        arrays[f"eval/{size}/{mode}"] = np.stack(pixels).transpose(0, 2, 3, 1)
    random.seed(0)
    torch.manual_seed(0)
    for height, width in SHAPES:
        image = Image.new("RGB", (width, height))
        boxes = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(DRAWS)]
        arrays[f"boxes/{height}"] = np.array(boxes)  # top, left, height, width
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
