"""Train the official model for some batches, as a black box, with timm's optimiser and schedule, in float32.

    .venv-oracle/bin/python tests/train/timm_trajectory_oracle.py IN.npz OUT.npz

needs the official package, torch, torchvision and timm; tests/golden/make.py says how to set that Python up.
test_timm_trajectory.py writes IN.npz, runs this and compares.
"""

import json
import pathlib
import sys

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "golden"))
import cases
import make
from timm.data.mixup import mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV2

torch.set_num_threads(1)


def train(case: cases.Case, recipe: dict, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Loss, gradient norm and learning rate of each step, and the weights and their averages after the last."""
    model = make.build(case)
    names = make.fill(model)
    model.train()
    average = ModelEmaV2(model, decay=recipe["ema_decay"])
    optimizer = create_optimizer_v2(
        model, opt="adamw", lr=recipe["learning_rate"], weight_decay=recipe["weight_decay"], betas=(0.9, 0.999),
        eps=1e-8)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=recipe["epochs"], warmup_epochs=recipe["warmup_epochs"],
        warmup_lr=recipe["warmup_learning_rate"], min_lr=recipe["final_learning_rate"],
        cooldown_epochs=recipe["cooldown_epochs"], warmup_prefix=False, step_on_epochs=False, updates_per_epoch=1)
    of_parameter = {id(p): name for name, p in model.named_parameters()}
    decayed = [of_parameter[id(p)] for group in optimizer.param_groups if group["weight_decay"]
               for p in group["params"]]
    mean, std = (torch.tensor(recipe[name])[:, None, None] for name in ("mean", "std"))
    losses, norms, rates = [], [], []
    for step, (images, labels) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
        images = (torch.from_numpy(images.transpose(0, 3, 1, 2)).float() / 255 - mean) / std
        targets = mixup_target(
            torch.from_numpy(labels), case.kwargs["num_classes"], 1.0, recipe["label_smoothing"])
        rates.append(optimizer.param_groups[0]["lr"])
        loss = SoftTargetCrossEntropy()(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe["clip_norm"]).item())
        optimizer.step()
        average.update(model)
        scheduler.step_update(step + 1)
        losses.append(loss.item())
    out = {"losses": losses, "norms": norms, "rates": rates, "decayed": decayed}
    for prefix, state in (("weights", model.state_dict()), ("ema", average.module.state_dict())):
        out |= {f"{prefix}/{name}": state[name].numpy() for name in names}
    return out


class Weights(torch.nn.Module):
    """Arrays as buffers, with one name each, in float64."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        super().__init__()
        for name, x in arrays.items():
            self.register_buffer(name.replace(".", "/"), torch.from_numpy(x.astype(np.float64)))


def average_of(case: cases.Case, decay: float, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """timm's average of weights that are given after each step, begun at the case's own."""
    after = {key.removeprefix("after/"): x for key, x in arrays.items() if key.startswith("after/")}
    average = ModelEmaV2(Weights({name: cases.official_array(name, x.shape[1:]) for name, x in after.items()}), decay)
    for step in range(len(arrays["images"])):
        average.update(Weights({name: x[step] for name, x in after.items()}))
    return {f"average/{name.replace('/', '.')}": x.numpy() for name, x in average.module.state_dict().items()}


def main(given: str, out: str) -> None:
    with np.load(given) as file:
        arrays = dict(file)
    case, recipe = cases.Case(**json.loads(str(arrays["case"]))), json.loads(str(arrays["recipe"]))
    np.savez(out, **train(case, recipe, arrays), **average_of(case, recipe["ema_decay"], arrays))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
