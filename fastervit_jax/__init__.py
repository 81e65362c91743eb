"""FasterViT in JAX/Flax."""

from fastervit_jax.deploy import deploy
from fastervit_jax.model.fastervit import FasterViT
from fastervit_jax.model.variants import ModelConfig, list_models
from fastervit_jax.ops.kernels import compiler_options
from fastervit_jax.weights.pretrained import create_model, from_pretrained, save_pretrained
from fastervit_jax.weights.torch_file import WeightsError

__all__ = [
    "FasterViT", "ModelConfig", "WeightsError", "compiler_options", "create_model", "deploy", "from_pretrained",
    "list_models", "save_pretrained",
]  # fmt: skip
__version__ = "0.1.0"
