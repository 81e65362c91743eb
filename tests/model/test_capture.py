"""Captured attention weights are those of the definition, and cost nothing unless they are asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import fastervit_jax as fv
from fastervit_jax.model import attention
from tests import official, reference
from tests.golden import cases

HEIGHT, WIDTH = 96, 160  # stage 2: 6 × 10 cells in 3 × 5 windows; stage 3: 3 × 5 cells, padded, in 2 × 3


@functools.cache
def parts():
    model, variables = official.model_and_variables(cases.Case("testing", {}, 0))
    return model, variables, cases.images(2, HEIGHT, WIDTH, 3)


@functools.cache
def captured():
    model, variables, images = parts()
    apply = jax.jit(lambda variables, images: model.apply(variables, images, mutable=["attention"]))
    return jax.device_get(apply(variables, images))


def primitives(jaxpr) -> list[str]:
    """Names of all equations, those of inner programs too."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            names += primitives(inner) if hasattr(inner, "eqns") else []
    return names


def test_values(monkeypatch):
    """Against the reference, which goes window by window, in raster order, one image after the other."""
    seen = {}

    def recording(p, name, x, heads, bias):
        tokens, channels = x.shape
        qkv = reference.linear(p, f"{name}.qkv", x).reshape(tokens, 3, heads, channels // heads)
        scores = np.einsum("qhd,khd->hqk", qkv[:, 0], qkv[:, 1]) * (channels // heads) ** -0.5
        scores[:, tokens - bias.shape[1] :, tokens - bias.shape[1] :] += bias
        weights = np.exp(scores)
        seen.setdefault(name, []).append(weights / weights.sum(-1, keepdims=True))
        return original(p, name, x, heads, bias)

    original = reference.attention
    monkeypatch.setattr(reference, "attention", recording)
    model, variables, images = parts()
    official.reference_outputs(model, variables, images)

    ours = flatten_dict(captured()[1], sep="/")
    theirs = {"attention": "attn", "carrier_attention": "hat_attn"}
    assert len(ours) == len(seen) == 6
    for path, weights in ours.items():
        collection, stage, block, kind, _ = path.split("/")
        assert collection == "attention"
        # One image after the other in both: of each the blocks in turn, of a block the windows row by row.
        expected = np.stack(seen[f"levels.{stage[-1]}.blocks.{block[-1]}.{theirs[kind]}"])
        assert weights.dtype == np.float32
        assert weights.shape == expected.shape
        np.testing.assert_allclose(weights, expected, atol=2e-6)


def test_logits_are_the_same():
    model, variables, images = parts()
    np.testing.assert_array_equal(captured()[0], jax.jit(model.apply)(variables, images))


def test_nothing_is_computed_unless_asked_for(monkeypatch, key):
    model, variables, images = parts()
    count = primitives(jax.make_jaxpr(model.apply)(variables, images).jaxpr).count("exp")
    assert count == 6  # a softmax each
    capturing = jax.make_jaxpr(lambda *args: model.apply(*args, mutable=["attention"]))(variables, images)
    assert primitives(capturing.jaxpr).count("exp") == 12
    assert len(capturing.out_avals) == 7

    def refuse(*args):
        raise AssertionError("captured")

    monkeypatch.setattr(attention, "attention_weights", refuse)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"], rngs={"dropout": key})
    assert len(jax.make_jaxpr(model.apply)(variables, images).out_avals) == 1
    assert set(jax.eval_shape(train, variables, images)[1]) == {"batch_stats"}
    assert set(jax.eval_shape(model.init, key, images)) == {"params", "batch_stats"}
    with pytest.raises(AssertionError, match="captured"):
        jax.eval_shape(functools.partial(model.apply, mutable=["attention"]), variables, images)


def test_with_remat_and_in_training(key):
    model, variables, images = parts()
    remat = fv.FasterViT(model.config, remat=(True,) * 4)
    apply = jax.jit(lambda variables, images: remat.apply(variables, images, mutable=["attention"]))
    again = jax.device_get(apply(variables, images))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), again[1], captured()[1])

    half = fv.create_model("testing", dtype="bfloat16", attn_drop_rate=0.5)
    _, updated = jax.eval_shape(
        functools.partial(half.apply, train=True, mutable=["batch_stats", "attention"], rngs={"dropout": key}),
        variables, images)
    assert set(updated) == {"batch_stats", "attention"}
    assert {x.dtype for x in jax.tree.leaves(updated["attention"])} == {jnp.dtype("float32")}


def test_going_on_from_a_stage():
    model, variables, images = parts()

    def again(variables, images):
        return [model.apply(variables, x, stage, method="from_stage")
                for stage, x in enumerate(model.apply(variables, images, method="features"))]

    for logits in jax.jit(again)(variables, images):
        assert official.relative_error(logits, captured()[0]) < 1e-6
