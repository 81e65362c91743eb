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
from fastervit_jax.train import checkpoint, command, evaluate, metrics, sharding
from fastervit_jax.train.state import init_variables, load_weights, make_model

flags.adopt_module_key_flags(command)
SPLIT = flags.DEFINE_string("split", None, "The images to evaluate on; default: config.data.eval_split.")
DATASETS = flags.DEFINE_list("datasets", [], "Names of datasets to evaluate on, as in config.data.source, each perhaps "
                             "with @SPLIT. ImageNet-A and -R predict among their 200 classes.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Evaluate this file or folder of weights (all that "
                                 "fastervit_jax.from_pretrained reads), not the workdir's newest checkpoint.")
# What of the config must be the run's; how images are cut, say, may be changed.
EXPECTED = ("ema_decay", "model.", "data.source", "data.image_size", "data.mean", "data.std")
EMA = flags.DEFINE_bool("ema", None, "The averaged weights, or with --noema the others. Default: the averaged ones of "
                        "a run that has them (config.ema_decay), the others of --checkpoint.")


def main(config: ConfigDict, workdir: pathlib.Path) -> None:
    if SPLIT.value and DATASETS.value:
        raise app.UsageError("--split with --datasets: give --datasets=NAME@SPLIT")
    loader.check(config)
    # All are opened, and checked, before minutes go by.
    pairs = [name.partition("@")[::2] for name in DATASETS.value] or [(config.data.source, SPLIT.value)]
    pairs = [(name, split or sources.default_eval_split(name, config)) for name, split in pairs]
    opened = {pair: sources.make_source(config, pair[1], pair[0]) for pair in pairs}

    mesh = sharding.make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp)
    model = make_model(config)
    if CHECKPOINT.value:
        evaluated = {"checkpoint": CHECKPOINT.value}
        variables, _ = load_weights(CHECKPOINT.value, bool(EMA.value), config, mesh, exact=True)
    else:
        metrics.check_config(workdir, config, parts=EXPECTED)
        abstract = jax.eval_shape(lambda: init_variables(model, config))
        ema = config.ema_decay > 0 if EMA.value is None else EMA.value
        if ema and not config.ema_decay:
            raise app.UsageError("--ema with config.ema_decay=0: the run has no averaged weights")
        lying = sharding.shardings(abstract, mesh)
        step, variables = checkpoint.restore_variables(workdir, abstract, lying, ema=ema, say=print)
        evaluated = {"step": step, **({"ema": True} if ema else {})}
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
