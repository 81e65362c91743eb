"""Evaluate a trained FasterViT.

    python eval.py --config=configs/digits.py --workdir=runs/digits
    python eval.py --config=configs/digits.py --checkpoint=weights.safetensors

    python eval.py --config=... --datasets=imagenet2012,imagenet_v2,imagenet_a,imagenet_r,imagenet2012_real

Prints ' * Acc@1 ... Acc@5 ...' and one line of JSON, for the newest checkpoint in the workdir or for a file of weights;
with --datasets a table, and a line of JSON for each. Changes of the model and the data that were given to train.py
(--config.a.b=value) are given here too.
"""

import json
import pathlib

import jax
from absl import app, flags
from ml_collections import ConfigDict

from fastervit_jax.data import loader, sources
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.train import checkpoint, command, evaluate, metrics, sharding
from fastervit_jax.train.state import init_variables, load_weights

flags.adopt_module_key_flags(command)
SPLIT = flags.DEFINE_string("split", None, "The images to evaluate on; default: config.data.eval_split.")
DATASETS = flags.DEFINE_list("datasets", [], "Names of datasets to evaluate on, as in config.data.source, each perhaps "
                             "with @SPLIT. ImageNet-A and -R predict among their 200 classes.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Evaluate this file or folder of weights (all that "
                                 "fastervit_jax.from_pretrained reads), not the workdir's newest checkpoint.")
# What of the config must be the run's; how images are cut, say, may be changed.
EXPECTED = ("model.", "data.source", "data.image_size", "data.mean", "data.std")
EMA = flags.DEFINE_bool("ema", False, "The averaged weights of --checkpoint, if the file has them.")


def main(config: ConfigDict, workdir: pathlib.Path) -> None:
    if EMA.value and not CHECKPOINT.value:
        raise app.UsageError("--ema without --checkpoint: checkpoints of a run have one set of weights")
    if SPLIT.value and DATASETS.value:
        raise app.UsageError("--split with --datasets: give --datasets=NAME@SPLIT")
    loader.check(config)
    # All are opened, and checked, before minutes go by.
    pairs = [name.partition("@")[::2] for name in DATASETS.value] or [(config.data.source, SPLIT.value)]
    pairs = [(name, split or sources.default_eval_split(name, config)) for name, split in pairs]
    opened = {pair: sources.make_source(config, pair[1], pair[0]) for pair in pairs}

    mesh = sharding.make_mesh()
    model = FasterViT(ModelConfig(**config.model))
    if CHECKPOINT.value:
        evaluated = {"checkpoint": CHECKPOINT.value}
        variables, _ = load_weights(CHECKPOINT.value, EMA.value, config, mesh, exact=True)
    else:
        metrics.check_config(workdir, config, parts=EXPECTED)
        abstract = jax.eval_shape(lambda: init_variables(model, config))
        step, variables = checkpoint.restore_variables(workdir, abstract, sharding.replicated(mesh))
        evaluated = {"step": step}
    eval_step = evaluate.make_eval_step(model, config, mesh)

    width = max(len(f"{name} {split}") for name, split in opened)
    results = []
    for (dataset, split), source in opened.items():
        result = evaluate.evaluate(eval_step, variables, source, config, mesh)
        results.append({"name": config.name, "dataset": dataset, "split": split, **evaluated, **result})
        title = f"{f'{dataset} {split}':{width}}" if DATASETS.value else ""
        print(title + evaluate.report(result), flush=True)
    for result in results:
        print(json.dumps(result))


if __name__ == "__main__":
    command.run(main)
