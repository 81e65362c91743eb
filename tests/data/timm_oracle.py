"""Run timm's augmentation, as a black box, and write what it made: images, levels and draws.

    .venv-oracle/bin/python tests/data/timm_oracle.py OUT.npz

needs torch, torchvision, timm and scikit-learn (for its two photographs); tests/golden/make.py says how to set
that Python up. test_timm_augment.py runs it and compares.
"""

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
from sklearn.datasets import load_sample_images  # noqa: E402
from timm.data import auto_augment, create_transform  # noqa: E402
from timm.data.mixup import Mixup  # noqa: E402
from timm.data.random_erasing import RandomErasing  # noqa: E402

NAMES = {  # ours: timm's
    "AutoContrast": "AutoContrast", "Equalize": "Equalize", "Invert": "Invert", "Rotate": "Rotate",
    "Posterize": "PosterizeIncreasing", "Solarize": "SolarizeIncreasing", "SolarizeAdd": "SolarizeAdd",
    "Color": "ColorIncreasing", "Contrast": "ContrastIncreasing", "Brightness": "BrightnessIncreasing",
    "Sharpness": "SharpnessIncreasing", "ShearX": "ShearX", "ShearY": "ShearY", "TranslateX": "TranslateXRel",
    "TranslateY": "TranslateYRel",
}
MAGNITUDES = (0.0, 3.3, 5.0, 8.6, 9.0, 9.7, 10.0)
LEVEL_MAGNITUDES = np.arange(0, 10.001, 0.05)
DRAWS = 20_000
HEIGHT, WIDTH = 48, 32  # of images for draws
MEAN = (0.485, 0.456, 0.406)


def level_of(name: str, magnitude: float, sign: int) -> tuple:
    """The arguments of timm's operation at a magnitude; where timm draws a sign, that one."""
    function = auto_augment.LEVEL_TO_ARG[NAMES[name]]
    if function is None:
        return ()
    neutral = 1.0 if name in ("Color", "Contrast", "Brightness", "Sharpness") else 0.0
    for seed in range(64):
        random.seed(seed)
        level = function(magnitude, {})
        if (level[0] - neutral) * sign > 0:
            return level
    return level  # there is but one


def images() -> dict[str, np.ndarray]:
    """Batches of images of one size each."""
    rng = np.random.default_rng(0)
    china, flower = load_sample_images().images
    china, flower = (np.asarray(Image.fromarray(x).resize((320, 240))) for x in (china, flower))
    ramp = np.arange(97 * 61).reshape(97, 61) % 26  # 0..25, where autocontrast's rounding shows
    odd = [
        np.full((97, 61, 3), 7), np.broadcast_to([250, 0, 128], (97, 61, 3)),
        (rng.random((97, 61, 3)) < 0.3) * 200 + 20, np.stack([ramp, ramp * 3 + 50, ramp // 25 * 255], axis=-1),
        china[100:197, 50:111], flower[80:177, 100:161],
    ]
    return {
        "square": np.stack([china[8:232, 30:254], flower[8:232, 80:304]]),
        "odd": np.stack(odd).astype(np.uint8),
        "small": np.stack([rng.integers(0, 256, (17, 30, 3)), rng.integers(90, 140, (17, 30, 3))]).astype(np.uint8),
    }


def run_ops() -> dict[str, np.ndarray]:
    """Each operation at each magnitude and sign: (magnitude, sign, image, height, width, channel)."""
    arrays = {}
    transform = create_transform(
        64, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bilinear", mean=MEAN)
    (rand_augment,) = (t for t in transform.transforms if isinstance(t, auto_augment.RandAugment))
    kwargs = rand_augment.ops[0].kwargs
    arrays["fill"] = np.array(kwargs["fillcolor"])
    for size, batch in images().items():
        arrays[f"images/{size}"] = batch
        for name, theirs in NAMES.items():
            results = np.empty((len(MAGNITUDES), 2, *batch.shape), np.uint8)
            for i, magnitude in enumerate(MAGNITUDES):
                for j, sign in enumerate((1, -1)):
                    level = level_of(name, magnitude, sign)
                    if name == "Posterize" and level == (0,):
                        results[i, j] = 0  # Pillow 13 refuses to keep no bits; earlier versions made black
                        continue
                    for k, image in enumerate(batch):
                        result = auto_augment.NAME_TO_OP[theirs](Image.fromarray(image), *level, **kwargs)
                        results[i, j, k] = np.asarray(result)
            arrays[f"ops/{size}/{name}"] = results
    return arrays


def run_levels() -> dict[str, np.ndarray]:
    return {
        f"levels/{name}": np.array([[level_of(name, m, sign)[0] for m in LEVEL_MAGNITUDES] for sign in (1, -1)])
        for name, theirs in NAMES.items() if auto_augment.LEVEL_TO_ARG[theirs] is not None
    }


def draw_rand_augment() -> dict[str, np.ndarray]:
    """The operations that DRAWS images get, in their order, or 15 for none, and what ShearX was given each time."""
    transform = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": (124, 116, 104)})
    applied, shears = [], []
    for i, (name, op) in enumerate(zip(NAMES, transform.ops, strict=True)):
        assert op.name == NAMES[name], (op.name, name)

        def record(image, *args, i=i, **kwargs):
            applied.append(i)
            if args and list(NAMES)[i] == "ShearX":
                shears.append(args[0])
            return image

        op.aug_fn = record
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - timm draws from it
    image, counts, ops = Image.new("RGB", (4, 4)), [], []
    for _ in range(DRAWS):
        applied.clear()
        transform(image)
        counts.append(len(applied))
        ops.extend(applied)
    return {"rand_augment/counts": np.array(counts), "rand_augment/ops": np.array(ops), "rand_augment/shears": shears}


def draw_erasing() -> dict[str, np.ndarray]:
    """Top, left, height and width of the boxes in DRAWS images of HEIGHT × WIDTH that have one; how noise lies."""
    random.seed(0)
    torch.manual_seed(0)
    limits = {"probability": 0.25, "min_area": 0.02, "max_area": 1 / 3, "min_aspect": 0.3, "max_aspect": 3.3,
              "device": "cpu"}
    erase, boxes = RandomErasing(mode="const", **limits), []
    for _ in range(DRAWS):
        erased = erase(torch.ones(1, HEIGHT, WIDTH))[0].numpy() == 0
        if erased.any():
            rows, columns = np.nonzero(erased.any(1))[0], np.nonzero(erased.any(0))[0]
            boxes.append((rows[0], columns[0], len(rows), len(columns)))
    erase = RandomErasing(mode="pixel", **{**limits, "probability": 1.0})
    noisy = np.stack([erase(torch.full((3, HEIGHT, WIDTH), 99.0)).numpy() for _ in range(300)])
    return {"erase/boxes": np.array(boxes), "erase/noise": noisy[noisy != 99]}


def draw_mixes() -> dict[str, np.ndarray]:
    """For DRAWS batches of two, 0 and 1: λ, whether it was CutMix, and the rows and columns that were pasted."""
    np.random.seed(0)  # noqa: NPY002 - timm draws from it
    mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.9, switch_prob=0.5, mode="batch", correct_lam=True,
                label_smoothing=0.0, num_classes=2)
    images = torch.stack([torch.zeros(1, HEIGHT, WIDTH), torch.ones(1, HEIGHT, WIDTH)])
    kept, cut, sides = [], [], []
    for _ in range(DRAWS):
        mixed, targets = mix(images.clone(), torch.tensor([0, 1]))
        first = mixed[0, 0].numpy()
        kept.append(targets[0, 0].item())
        cut.append(set(np.unique(first)) == {0.0, 1.0})
        sides.append(((first == 1).any(1).sum(), (first == 1).any(0).sum()))
    return {"mix/kept": np.array(kept), "mix/cut": np.array(cut), "mix/sides": np.array(sides)}


def draw_jitter() -> dict[str, np.ndarray]:
    """The four pixels of an image after the colour jitter of 0.8 that timm asks of torchvision, DRAWS / 4 times."""
    torch.manual_seed(0)
    transform = create_transform(2, is_training=True, color_jitter=0.8)
    (jitter,) = (t for t in transform.transforms if type(t).__name__ == "ColorJitter")
    image = np.array([[[30, 90, 200], [240, 200, 20]], [[100, 100, 100], [250, 10, 10]]], np.uint8)
    results = np.stack([np.asarray(jitter(Image.fromarray(image))) for _ in range(DRAWS // 4)])
    return {"jitter/image": image, "jitter/results": results}


if __name__ == "__main__":
    parts = (run_ops, run_levels, draw_rand_augment, draw_erasing, draw_mixes, draw_jitter)
    np.savez(sys.argv[1], magnitudes=MAGNITUDES, level_magnitudes=LEVEL_MAGNITUDES,
             **{name: array for part in parts for name, array in part().items()})
