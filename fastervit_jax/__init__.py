"""FasterViT in JAX/Flax."""

from fastervit_jax.model.fastervit import FasterViT, create_model
from fastervit_jax.model.variants import ModelConfig, list_models

__all__ = ["FasterViT", "ModelConfig", "create_model", "list_models"]
__version__ = "0.1.0"
