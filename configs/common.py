"""What all recipes share."""

import dataclasses

from ml_collections import ConfigDict, config_dict

from fastervit_jax.model.variants import ModelConfig, get_variant


def model(name: str, **changes) -> ConfigDict:
    """Every field of the registered model's `ModelConfig`, so that each can be changed on the command line."""
    config = ConfigDict(dataclasses.asdict(dataclasses.replace(get_variant(name).config, **changes)))
    for field in dataclasses.fields(ModelConfig):
        if config[field.name] is None:
            config[field.name] = config_dict.placeholder(float)
    return config


def base() -> ConfigDict:
    """The knobs that do not depend on the task."""
    config = ConfigDict()
    config.seed = 0
    config.init_from = ""  # a file or folder of weights, or a registered name, to start from; "": random numbers
    config.init_from_ema = False  # its averaged weights
    config.log_every_steps = 50
    config.eval_every_epochs = 1
    config.checkpoint_every_epochs = 1
    config.keep_checkpoints = 3
    return config
