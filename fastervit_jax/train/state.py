"""The training state: all that a run carries from one step to the next."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.train.sharding import replicated
from fastervit_jax.weights import pretrained, sources
from fastervit_jax.weights.torch_file import WeightsError


@flax.struct.dataclass
class TrainState:
    """`step`, an int32 scalar, counts updates; it and the seed determine all randomness, so no key is carried."""

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}


def init_variables(model: FasterViT, config: ConfigDict) -> dict[str, Any]:
    """Fresh parameters and batch statistics, from config.seed."""
    size = config.data.image_size
    return model.init(jax.random.key(config.seed), jnp.zeros((1, size, size, model.config.in_chans)))


def create_state(
    model: FasterViT, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state at step 0 on the devices of `mesh`."""

    def create():
        variables = init_variables(model, config)
        params = variables["params"]
        return TrainState(jnp.int32(0), params, variables["batch_stats"], optimizer.init(params))

    return jax.jit(create, out_shardings=replicated(mesh))()


def load_weights(
    source: str, ema: bool, config: ConfigDict, mesh: jax.sharding.Mesh, *, exact: bool = False
) -> tuple[dict[str, Any], pretrained.Report]:
    """Variables for `config.model` from a file or folder of weights or a registered name, on the devices of `mesh`.

    The head is new, from config.seed, where its classes are not the source's. The report warns where the weights are
    for other windows, another carrier count or propagation. Raises WeightsError where they cannot fit; with `exact`,
    also where any of these differs.
    """
    opened = sources.open_source(source, ema=ema)
    model = ModelConfig(**config.model)
    unfit, other = pretrained.differences(opened, model, exact=exact)
    if unfit or (exact and other):
        raise WeightsError(f"{opened.where} is not for config.model: {'; '.join(unfit + other)}. Give the model that "
                           "it was trained as, with --config.model.FIELD=VALUE")
    opened.warnings += other
    return pretrained.load_variables(
        opened, model, seed=config.seed, put=lambda x: jax.device_put(x, replicated(mesh)))
