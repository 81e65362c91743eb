"""The training state: all that a run carries from one step to the next."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig
from fastervit_jax.train.sharding import shardings
from fastervit_jax.weights import pretrained, sources
from fastervit_jax.weights.torch_file import WeightsError


@flax.struct.dataclass
class TrainState:
    """`step`, an int32 scalar, counts batches; it and the seed determine all randomness, so no key is carried.

    `ema` holds averaged parameters and batch statistics, or is None; `bad_steps`, an int32 scalar, counts the updates
    in a row, up to this one, that were skipped.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any
    bad_steps: Any

    @property
    def variables(self) -> dict[str, Any]:
        return {"params": self.params, "batch_stats": self.batch_stats}

    def starting_from(self, variables: dict[str, Any]) -> "TrainState":
        """The state with these parameters and batch statistics, lying as its own do, and the average begun at them."""
        variables = jax.tree.map(lambda x, own: jax.device_put(x, own.sharding), variables, self.variables)
        ema = self.ema and jax.tree.map(jnp.copy, variables)
        return self.replace(**variables, ema=ema)


def make_model(config: ConfigDict) -> FasterViT:
    """The model of a config, computed as it says."""
    return FasterViT(ModelConfig(**config.model), remat=tuple(config.remat), bn_group_size=config.bn_group_size,
                     kernels=config.kernels)


def init_variables(model: FasterViT, config: ConfigDict) -> dict[str, Any]:
    """Fresh parameters and batch statistics, from config.seed."""
    size = config.data.image_size
    return model.init(jax.random.key(config.seed), jnp.zeros((1, size, size, model.config.in_chans)))


def _create(model: FasterViT, optimizer: optax.GradientTransformation, config: ConfigDict) -> TrainState:
    variables = init_variables(model, config)
    return TrainState(
        step=jnp.int32(0), **variables, opt_state=optimizer.init(variables["params"]),
        ema=variables if config.ema_decay else None, bad_steps=jnp.int32(0))


def abstract_state(
    model: FasterViT, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: jax.sharding.Mesh
) -> TrainState:
    """Shapes and dtypes of the state, and how it lies on the devices of `mesh` (see `sharding.shardings`)."""
    shapes = jax.eval_shape(lambda: _create(model, optimizer, config))
    return jax.tree.map(
        lambda x, lying: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=lying), shapes, shardings(shapes, mesh))


def create_state(
    model: FasterViT, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: jax.sharding.Mesh,
    abstract: TrainState | None = None,
) -> TrainState:
    """The state at step 0 on the devices of `mesh`; `abstract` is its `abstract_state`, where that is there already."""
    if abstract is None:
        abstract = abstract_state(model, optimizer, config, mesh)  # traces the model
    lying = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda: _create(model, optimizer, config), out_shardings=lying)()


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
        opened, model, seed=config.seed, put=lambda x: jax.device_put(x, shardings(x, mesh)))
