"""Speed of ONNX files in onnxruntime on a CPU, one beside the other, and the official model's file to compare with.

    python -m tests.onnx_speed random faster_vit_0_224 random.safetensors
    python -m tests.onnx_speed official faster_vit_0_224 official.onnx
    python -m tests.onnx_speed compare ours.onnx official.onnx

The first writes weights of ours, every array of them random, to be exported. The second needs a Python with the
official package (the head of tests/golden/make.py says how to make one) and with `pip install onnx onnxscript`; its
weights are random, too. Rounds alternate between files, and medians over rounds are
printed, with the lowest and highest, one line of JSON for each file and batch size.
"""

import argparse
import json
import statistics
import time


def random_variables(config):
    """Variables of the model with this config: every array changes the logits, and activations keep their size."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from fastervit_jax.weights import pretrained

    rng = np.random.default_rng(0)

    def draw(key, x):
        last = key[-1].key
        if last == "kernel":
            values = rng.normal(size=x.shape) / np.prod(x.shape[:-1]) ** 0.5
        elif last in ("bias", "mean"):
            values = 0.1 * rng.normal(size=x.shape)
        else:  # scales and variances
            values = rng.uniform(0.5, 1.5, x.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, pretrained.abstract_variables(config))


def random_weights(name: str, path: str) -> None:
    """A file of weights for `fastervit_jax.export`."""
    import fastervit_jax as fv

    model = fv.create_model(name)
    fv.save_pretrained(model, random_variables(model.config), path)


def official(name: str, path: str, batch: int | None) -> None:
    """Export the official model with torch.onnx: for any number of images, or for `batch` of them."""
    import torch

    from tests.golden import make  # it lets torchvision be imported beside a CPU build of torch

    model = make.fastervit.create_model(name).eval()
    images = torch.zeros(batch or 2, 3, 224, 224)
    shapes = None if batch else ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (images,), path, input_names=["images"], output_names=["logits"], dynamo=True,
                      dynamic_shapes=shapes, external_data=False)


def compare(paths: list[str], batches: list[int], threads: int, rounds: int, seconds: float) -> None:
    """Images a second of each file at each batch size."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = {path: onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"]) for path in paths}
    for batch in batches:
        rates: dict[str, list[float]] = {path: [] for path in paths}
        work: dict[str, list[float]] = {path: [] for path in paths}
        feeds = {}
        for path, session in sessions.items():
            (inputs,) = session.get_inputs()
            shape = (batch, *inputs.shape[1:])
            feeds[path] = {inputs.name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
            session.run(None, feeds[path])
        for _ in range(rounds):
            for path, session in sessions.items():
                start, worked, done = time.perf_counter(), time.process_time(), 0
                while time.perf_counter() - start < seconds:
                    session.run(None, feeds[path])
                    done += batch
                rates[path].append(done / (time.perf_counter() - start))
                work[path].append(1e3 * (time.process_time() - worked) / done)
        for path, measured in rates.items():
            print(json.dumps({"file": path, "batch": batch, "threads": threads, "rounds": rounds,
                              "images_per_second": round(statistics.median(measured), 2),
                              "lowest": round(min(measured), 2), "highest": round(max(measured), 2),
                              "cpu_ms_per_image": round(statistics.median(work[path]), 1),
                              "onnxruntime": onnxruntime.__version__}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    ours = commands.add_parser("random")
    ours.add_argument("name")
    ours.add_argument("path")
    one = commands.add_parser("official")
    one.add_argument("name")
    one.add_argument("path")
    one.add_argument("--batch", type=int, help="images of each call; default: any number")
    two = commands.add_parser("compare")
    two.add_argument("paths", nargs="+")
    two.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    two.add_argument("--threads", type=int, default=2)
    two.add_argument("--rounds", type=int, default=7)
    two.add_argument("--seconds", type=float, default=2.0, help="of each file in each round, at least")
    args = parser.parse_args()
    if args.command == "random":
        random_weights(args.name, args.path)
    elif args.command == "official":
        official(args.name, args.path, args.batch)
    else:
        compare(args.paths, args.batch, args.threads, args.rounds, args.seconds)


if __name__ == "__main__":
    main()
