"""Evaluate a trained FasterViT.

    python eval.py --config=configs/digits.py --workdir=runs/digits

Prints ' * Acc@1 ... Acc@5 ...' and one line of JSON, for the newest checkpoint in the workdir.
Changes that were given to train.py (--config.a.b=value) are given here too.
"""

import json
import pathlib

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from fastervit_jax.data import loader, sources
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.train import checkpoint, evaluate, metrics, sharding
from fastervit_jax.train.state import init_variables

CONFIG = config_flags.DEFINE_config_file("config", "configs/digits.py", "The recipe that the run was trained with.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run. Default: runs/, then the config's name.")
SPLIT = flags.DEFINE_enum("split", "validation", sources.SPLITS, "The images to evaluate on.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: settings are given as --config.a.b=value")
    config = CONFIG.value
    workdir = pathlib.Path(WORKDIR.value) if WORKDIR.value else pathlib.Path("runs") / config.name
    metrics.check_config(workdir, config, parts=("model.", "data."))

    mesh = sharding.make_mesh()
    model = FasterViT(ModelConfig(**config.model))
    abstract = jax.eval_shape(lambda: init_variables(model, config))
    step, variables = checkpoint.restore_variables(workdir, abstract, sharding.replicated(mesh))
    source = sources.make_source(config.data.source, SPLIT.value, config.data.image_size)
    batches = loader.eval_batches(source, batch_size=config.batch_size, sharding=sharding.over_batch(mesh))
    result = evaluate.evaluate(evaluate.make_eval_step(model, config, mesh), variables, batches)
    print(evaluate.report(result))
    print(json.dumps({"name": config.name, "split": SPLIT.value, "step": step, **result}))


if __name__ == "__main__":
    flags.FLAGS.verbosity = logging.WARNING  # unless given; orbax tells of every restore
    app.run(main)
