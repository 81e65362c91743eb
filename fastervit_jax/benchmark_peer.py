"""A worker of `python -m fastervit_jax.benchmark speed` that times a PyTorch model: NVIDIA's FasterViT, or one of timm.

It is run by its path and imports nothing of this package, so that its process has no JAX:

    python -P fastervit_jax/benchmark_peer.py '{"family": "official", "model": "faster_vit_0_224", "way": "eager", ...}'

`serve` is how a worker of either kind talks to the benchmark.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

PACKAGES = "pip install torch numpy pillow pyyaml huggingface_hub safetensors torchvision"
INSTALL = {
    "official": f"{PACKAGES} && pip install --no-deps timm fastervit==1.0.0",
    "timm": f"{PACKAGES} && pip install --no-deps timm",
}
"""What each family needs. fastervit asks for an old timm, but goes with a new one; without --no-deps pip would obey."""

LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM = 1e-4, 0.05, 5.0
"""Of training steps. The learning rate is small, so that on noise no number runs away."""


def serve(prepare: Callable[[dict[str, Any]], tuple[Callable[[int], None], Callable[[], dict[str, Any]]]]) -> None:
    """Answers the benchmark's orders, a line of JSON each, until there are no more.

    The first argument of the command line is what to prepare. `prepare` gives a function that makes so many calls and
    waits until the device has finished them, and one that tells the figures known so far. The first answer is
    {"ready": true}. Exceptions are answers, too: {"error": its type and text in one line}; then the process ends.
    What models print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        run, figures = prepare(json.loads(sys.argv[1]))
        answers.write(json.dumps({"ready": True}) + "\n")
        for line in sys.stdin:
            answers.write(json.dumps(_answer(json.loads(line), run, figures)) + "\n")
    except Exception as error:
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())
        answers.write(json.dumps({"error": text}) + "\n")
        sys.exit(1)


def _answer(order: dict[str, Any], run: Callable[[int], None], figures: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The orders: calibrate (calls that last some seconds), time (seconds of calls), latency (of single ones), tell."""

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        run(calls)
        return time.perf_counter() - start

    if order["do"] == "calibrate":
        calls = 1
        while (took := seconds(calls)) < order["seconds"]:
            calls = max(calls + 1, min(10 * calls, math.ceil(1.1 * calls * order["seconds"] / took)))
        return {"calls": calls}
    if order["do"] == "time":
        run(1 + order["calls"] // 10)  # clocks and caches as they are at work
        return {"seconds": seconds(order["calls"])}
    if order["do"] == "latency":
        run(1 + order["calls"] // 10)
        return {"seconds": [seconds(1) for _ in range(order["calls"])]}
    return figures()


def missing(name: str | None, family: str) -> str:
    """What to do about a package that is not there."""
    return (f"{name} is not installed for {sys.executable}; name a Python that has it with --peer-python, or install "
            f"what is missing of: {INSTALL[family]}")


def create(spec: dict[str, Any]) -> Any:
    """The PyTorch model that `spec` names, with random weights, for images of spec's height and width."""
    try:
        if spec["family"] == "official":
            import fastervit
            if "any_res" in spec:  # the package's second model, for other resolutions
                return fastervit.create_model(spec["any_res"], resolution=[spec["height"], spec["width"]])
            return fastervit.create_model(spec["model"])
        import timm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing(error.name, spec["family"])) from None
    try:
        return timm.create_model(spec["model"], img_size=(spec["height"], spec["width"]))
    except TypeError:  # a network of convolutions takes any size
        return timm.create_model(spec["model"])


def prepare(spec: dict[str, Any]) -> tuple[Callable[[int], None], Callable[[], dict[str, Any]]]:
    """See `serve`. The model is in channels_last memory; cuDNN looks for its fastest algorithms; float32 may be TF32.

    Inference is in spec's precision throughout, or, where the model cannot, under autocast, which is told. Training has
    float32 parameters, autocast for bfloat16, and fused AdamW.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(missing("torch", spec["family"])) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    dtype = getattr(torch, spec["precision"])
    half = dtype is not torch.float32
    images = torch.randn(spec["batch"], 3, spec["height"], spec["width"], device=device, dtype=dtype)
    images = images.to(memory_format=torch.channels_last)
    training = spec["mode"] == "train"
    model = create(spec).to(device, memory_format=torch.channels_last).train(training)
    autocast = half and training
    if half and not training:
        try:
            model = model.to(dtype)
            with torch.inference_mode():
                model(images)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # somewhere in it there is float32
            traceback.print_exc()
            model, autocast = create(spec).to(device, memory_format=torch.channels_last).eval(), True
    around = torch.autocast(device, dtype) if autocast else contextlib.nullcontext()
    called = model if spec["way"] == "eager" else torch.compile(model, mode=spec["way"], dynamic=False)

    if training:
        decaying = [x for x in model.parameters() if x.ndim > 1]
        others = [x for x in model.parameters() if x.ndim <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
            lr=LEARNING_RATE, fused=True)
        labels = torch.randint(0, 1000, (spec["batch"],), device=device)

    def call():
        if spec["way"] != "eager":
            torch.compiler.cudagraph_mark_step_begin()
        if not training:
            with torch.inference_mode(), around:
                return called(images)
        with around:
            loss = torch.nn.functional.cross_entropy(called(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def run(calls: int) -> None:
        for _ in range(calls):
            result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        run.result = result

    start = time.perf_counter()
    run(3)  # CUDA graphs are recorded in the second call
    compile_seconds = time.perf_counter() - start
    if not torch.isfinite(run.result).all():
        raise FloatingPointError(f"{spec['model']} computed numbers that are not finite; their speed means nothing")

    def figures() -> dict[str, Any]:
        return {
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "software": ", ".join([f"torch {torch.__version__}", *(
                f"{name} {importlib.metadata.version(name)}" for name in {"official": ("fastervit", "timm")}.get(
                    spec["family"], ("timm",))), f"Python {platform.python_version()}"]),
            "autocast": autocast, "compile_seconds": compile_seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
        }

    return run, figures


if __name__ == "__main__":
    serve(prepare)
