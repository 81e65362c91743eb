"""Our model with the weights of a golden case."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import fastervit_jax as fv
from fastervit_jax.weights import names
from tests import reference
from tests.golden import cases

GOLDEN = pathlib.Path(__file__).parent / "golden"


def official_weights(variables: dict) -> dict[str, np.ndarray]:
    """For variables (or their shapes), the arrays that the official model is given, by its names and layouts."""
    flat = {collection: flatten_dict(tree, sep="/") for collection, tree in variables.items()}
    weights = {}
    for name, (collection, path) in names.pytorch_names(variables).items():
        shape = names.to_pytorch_layout(path, np.empty(flat[collection][path].shape)).shape
        weights[name] = cases.official_array(name, shape)
    return weights


def model_and_variables(case: cases.Case) -> tuple[fv.FasterViT, dict]:
    """Our model of a case with the official arrays."""
    model = fv.create_model(case.arch, **case.kwargs)
    images = jax.ShapeDtypeStruct((1, 64, 64, model.config.in_chans), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    weights = official_weights(shapes)
    variables = {"params": {}, "batch_stats": {}}
    for name, (collection, path) in names.pytorch_names(shapes).items():
        variables[collection][path] = jnp.asarray(names.to_flax_layout(path, weights[name]))
    return model, {collection: unflatten_dict(flat, sep="/") for collection, flat in variables.items()}


def reference_outputs(
    model: fv.FasterViT, variables: dict, images: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits and stage maps by the NumPy reference, for a model that has the official arrays."""
    c = model.config
    return reference.forward(
        official_weights(variables), images, depths=c.depths, num_heads=c.num_heads, window_size=c.window_size,
        ct_size=c.ct_size, hat=c.hat, do_propagation=c.do_propagation, layer_norm_last=c.layer_norm_last)


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """‖ours - theirs‖ / ‖theirs‖ in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
