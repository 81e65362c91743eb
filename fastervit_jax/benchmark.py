"""Measure speed, side by side in one run.

    python -m fastervit_jax.benchmark speed [--mode inference] [--variant faster_vit_0_224] [--batch 128] [--peer]
    python -m fastervit_jax.benchmark figure results.jsonl --out speed.png
    python -m fastervit_jax.benchmark data [--workers 1 2] [--seconds 5] [--repeat 3]
    python -m fastervit_jax.benchmark input [--variant faster_vit_0_224] [--batch 512] [--workers 16]
    python -m fastervit_jax.benchmark train [--batch 128] [--devices 1 2 4] [--set mesh.fsdp=2 accumulate=4 ...]

`speed` times inference or training steps of this model on one device, beside NVIDIA's PyTorch package and models of
timm; `figure` draws its results against published accuracies. docs/benchmarks.md says what their figures mean.

`data` decodes JPEGs on the host, alone: in a plain loop, through the feed, and through tf.data where TensorFlow is
installed. `input` trains from JPEGs, and tells how long the step waits for them and what augmentation takes of it.
Their JPEGs are 500×375 cuts of scikit-learn's two photographs with noise, 70 to 110 kB each, in a folder that is
removed again. `train` trains on noise that is on the devices already, on each number of devices in turn with as many
images a device: how fast, with how much memory, and what a checkpoint holds up. All print a line of JSON a figure.

Each has its own --help.
"""

import argparse


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastervit_jax.benchmark", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "figure", "data", "input", "train"])
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of what is measured")
    given = parser.parse_args()
    # Each needs other packages: where PyTorch is measured there may be no Grain, and the reverse.
    if given.what == "speed":
        from fastervit_jax import benchmark_speed
        benchmark_speed.main(given.arguments)
    elif given.what == "figure":
        from fastervit_jax import benchmark_figure
        benchmark_figure.main(given.arguments)
    else:
        from fastervit_jax import benchmark_recipe
        benchmark_recipe.main(given.what, given.arguments)


if __name__ == "__main__":
    main()
