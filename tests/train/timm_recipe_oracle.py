"""Run PyTorch's and timm's part of the recipe, as a black box, in float64, on the arrays of a file.

    .venv-oracle/bin/python tests/train/timm_recipe_oracle.py IN.npz OUT.npz

needs torch, torchvision and timm; tests/golden/make.py says how to set that Python up. test_timm_recipe.py writes
IN.npz, runs this and compares.
"""

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

from timm.data.mixup import mixup_target  # noqa: E402
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from torch.nn import functional  # noqa: E402

torch.set_num_threads(1)
UPDATES_PER_EPOCH = (1251, 312)  # batches of 1,024 and of 4,096
WARMUP_EPOCHS = (20, 35)  # of variant 3, the latter
OPTIMIZERS = {"adamw": 0.05, "lamb": 0.12, "lamb_without_decay": 0.0}  # weight decay


class Model(torch.nn.Module):
    """Something of everything that decides on decay: kernels, biases, norms, scales; and a kernel of zeros."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)
        self.norm = torch.nn.BatchNorm2d(4)
        self.linear = torch.nn.Linear(4, 5)
        self.zero = torch.nn.Linear(2, 2, bias=False)
        self.gamma = torch.nn.Parameter(torch.ones(5))


def model_with(arrays: dict[str, np.ndarray]) -> Model:
    model = Model().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(arrays[f"params/{name}"]))
    return model


def run_optimizer(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters before the first step and after each; the gradients' norms, and what is left of one after clipping."""
    model = model_with(arrays)
    optimizer = create_optimizer_v2(
        model, opt=name.split("_")[0], lr=1.0, weight_decay=OPTIMIZERS[name], betas=(0.9, 0.999), eps=1e-8)
    params = {key: [p.detach().numpy().copy()] for key, p in model.named_parameters()}
    norms, clipped = [], []
    for step, rate in enumerate(arrays["rates"].tolist()):
        for key, parameter in model.named_parameters():
            parameter.grad = torch.from_numpy(arrays[f"grads/{key}"][step].astype(np.float64))
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0).item())
        clipped.append(model.conv.weight.grad.numpy().copy())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for key, parameter in model.named_parameters():
            params[key].append(parameter.detach().numpy().copy())
    out = {f"{name}/params/{key}": np.stack(values) for key, values in params.items()}
    return {**out, "clip/norms": np.array(norms), "clip/conv.weight": np.stack(clipped)}


def run_schedule() -> dict[str, np.ndarray]:
    """The learning rate of every step of the official run, the cool-down included."""
    rates = {}
    for updates in UPDATES_PER_EPOCH:
        for warmup in WARMUP_EPOCHS:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-3)
            scheduler, epochs = create_scheduler_v2(
                optimizer, "cosine", num_epochs=300, warmup_epochs=warmup, warmup_lr=1e-6, min_lr=5e-6,
                cooldown_epochs=10, warmup_prefix=False, step_on_epochs=False, updates_per_epoch=updates)
            each = np.empty(epochs * updates)
            for step in range(len(each)):
                each[step] = optimizer.param_groups[0]["lr"]
                scheduler.step_update(step + 1)
            rates[f"schedule/{updates}/{warmup}"] = each
    return rates


def run_losses(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means over the batch, and gradients, of each loss."""
    logits, teacher, targets = (
        torch.from_numpy(arrays[name].astype(np.float64)) for name in ("logits", "teacher", "targets"))
    losses = {
        "cross_entropy": lambda x: SoftTargetCrossEntropy()(x, targets),
        "binary_cross_entropy": lambda x: BinaryCrossEntropy(smoothing=0.1)(x, targets),
        "mesa": lambda x: 50 * functional.kl_div(
            functional.log_softmax(x / 3, 1), functional.softmax(teacher / 3, 1), reduction="batchmean"),
    }
    out = {}
    for name, loss in losses.items():
        x = logits.clone().requires_grad_()
        value = loss(x)
        value.backward()
        out[f"losses/{name}"], out[f"gradients/{name}"] = value.item(), x.grad.numpy()
    return out


def mix_targets(arrays: dict[str, np.ndarray]) -> np.ndarray:
    """Of each batch with its λ."""
    labels, kept = torch.from_numpy(arrays["labels"]), arrays["kept"].astype(np.float64)
    classes = arrays["logits"].shape[1]
    return np.concatenate([mixup_target(x, classes, lam, 0.1).numpy() for x, lam in zip(labels, kept, strict=True)])


def main(given: str, out: str) -> None:
    with np.load(given) as file:
        arrays = dict(file)
    made = {name: value for optimizer in OPTIMIZERS for name, value in run_optimizer(optimizer, arrays).items()}
    made |= {**run_schedule(), **run_losses(arrays), "mixed": mix_targets(arrays)}
    np.savez(out, **made)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
