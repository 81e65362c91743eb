"""The name table is one-to-one and covers every variant; layouts invert each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.model.variants import VARIANTS
from fastervit_jax.weights import names


@pytest.mark.parametrize("name", VARIANTS)
def test_every_array_has_its_own_name(name):
    shapes = jax.eval_shape(fv.create_model(name).init, jax.random.key(0), jnp.ones((1, 64, 64, 3)))
    assert len(names.pytorch_names(shapes)) == len(jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("stem/conv2/kernel", "patch_embed.conv_down.3.weight"),
        ("stages_1/blocks_12/norm2/var", "levels.1.blocks.12.norm2.running_var"),
        ("stages_3/blocks_0/gamma3", "levels.3.blocks.0.gamma3"),
        ("stages_2/blocks_10/carrier_attention/position_bias/mlp/hidden/bias",
         "levels.2.blocks.10.hat_attn.pos_emb_funct.cpb_mlp.0.bias"),
        ("downsamples_0/conv/kernel", "levels.0.downsample.reduction.0.weight"),
        ("norm/scale", "norm.weight"),
    ],
)
def test_names(path, name):
    assert names.pytorch_name(path) == name


def test_unknown_path():
    with pytest.raises(KeyError):
        names.pytorch_name("stages_2/blocks_0/no_such_layer/kernel")


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (3, 3, 1, 5), (4, 5)])
def test_layouts(shape):
    x = np.arange(np.prod(shape)).reshape(shape)
    torch_layout = names.to_pytorch_layout("a/kernel", x)
    np.testing.assert_array_equal(names.to_flax_layout("a/kernel", torch_layout), x)
    if len(shape) == 4:
        assert torch_layout[4, 0, 2, 1] == x[2, 1, 0, 4]
    else:
        assert torch_layout[4, 3] == x[3, 4]
    np.testing.assert_array_equal(names.to_pytorch_layout("a/scale", x), x)
