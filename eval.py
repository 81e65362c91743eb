"""Evaluate a trained FasterViT.

    python eval.py --config=configs/digits.py --workdir=runs/digits
    python eval.py --config=configs/digits.py --checkpoint=weights.safetensors

Prints ' * Acc@1 ... Acc@5 ...' and one line of JSON, for the newest checkpoint in the workdir or for a file of weights.
Changes of the model and the data that were given to train.py (--config.a.b=value) are given here too.
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
SPLIT = flags.DEFINE_enum("split", "validation", sources.SPLITS, "The images to evaluate on.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Evaluate this file or folder of weights (all that "
                                 "fastervit_jax.from_pretrained reads), not the workdir's newest checkpoint.")
EMA = flags.DEFINE_bool("ema", False, "The averaged weights of --checkpoint, if the file has them.")


def main(config: ConfigDict, workdir: pathlib.Path) -> None:
    if EMA.value and not CHECKPOINT.value:
        raise app.UsageError("--ema without --checkpoint: checkpoints of a run have one set of weights")
    mesh = sharding.make_mesh()
    model = FasterViT(ModelConfig(**config.model))
    if CHECKPOINT.value:
        evaluated = {"checkpoint": CHECKPOINT.value}
        variables, _ = load_weights(CHECKPOINT.value, EMA.value, config, mesh, exact=True)
    else:
        metrics.check_config(workdir, config, parts=("model.", "data."))
        abstract = jax.eval_shape(lambda: init_variables(model, config))
        step, variables = checkpoint.restore_variables(workdir, abstract, sharding.replicated(mesh))
        evaluated = {"step": step}
    source = sources.make_source(config, SPLIT.value)
    batches = loader.eval_batches(source, batch_size=config.batch_size, sharding=sharding.over_batch(mesh))
    result = evaluate.evaluate(evaluate.make_eval_step(model, config, mesh), variables, batches)
    print(evaluate.report(result))
    print(json.dumps({"name": config.name, "split": SPLIT.value, **evaluated, **result}))


if __name__ == "__main__":
    command.run(main)
