"""Augmentation against timm's own, run as a black box by timm_oracle.py in the Python that FASTERVIT_ORACLE names."""

import math
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ml_collections import ConfigDict

from fastervit_jax.data import augment, randaugment
from fastervit_jax.data.randaugment import OPS

pytestmark = pytest.mark.oracle
SCRIPT = pathlib.Path(__file__).with_name("timm_oracle.py")
DRAWS, HEIGHT, WIDTH = 20_000, 48, 32  # as in the script
IDENTICAL = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")
jitted_apply = jax.jit(randaugment.apply)


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    python = os.environ.get("FASTERVIT_ORACLE")
    if not python:
        pytest.fail("set FASTERVIT_ORACLE to a Python that has timm; tests/golden/make.py says how")
    file = tmp_path_factory.mktemp("timm") / "timm.npz"
    subprocess.run([python, SCRIPT, file], check=True)
    with np.load(file) as arrays:
        return dict(arrays)


def same_distribution(ours, theirs):
    """Neither a different sample (Kolmogorov-Smirnov), nor a different mean by four standard errors."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert min(len(ours), len(theirs)) > 1000
    error = math.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
    assert abs(ours.mean() - theirs.mean()) < 4 * error
    return scipy.stats.ks_2samp(ours, theirs).pvalue > 1e-3


def same_frequency(ours, our_draws, theirs, their_draws):
    table = [[ours, our_draws - ours], [theirs, their_draws - theirs]]
    return scipy.stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("size", ["square", "odd", "small"])
@pytest.mark.parametrize("name", OPS)
def test_operation(timm, name, size):
    images, theirs = timm[f"images/{size}"], timm[f"ops/{size}/{name}"].astype(np.int32)
    magnitudes = timm["magnitudes"]
    cases = [(magnitude, sign, image) for magnitude in magnitudes for sign in (1, -1) for image in images]
    magnitude, sign, batch = (np.stack(x) for x in zip(*cases, strict=True))
    ours = jitted_apply(
        jnp.asarray(batch), jnp.full(len(batch), OPS.index(name)), jnp.float32(magnitude), jnp.float32(sign),
        jnp.asarray(timm["fill"]))
    difference = np.abs(np.asarray(ours, np.int32).reshape(theirs.shape) - theirs)
    assert (theirs != images).any() or name == "AutoContrast"
    print(f"{name} {size}: differ {(difference > 0).mean():.2e}, mean {difference.mean():.2e}, max {difference.max()}")
    if name in IDENTICAL:
        assert difference.max() == 0
    elif name in randaugment.GEOMETRIC:
        near = difference <= 2
        assert (~near).mean() < 2.5e-3  # places just on the edge, where the fill colour begins
        assert difference[near].mean() < 0.02
    else:
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.02  # whole values, where the factor differs in its last bit


def test_levels(timm):
    names = [name for name in OPS if name not in ("AutoContrast", "Equalize", "Invert")]
    magnitudes = jnp.float32(timm["level_magnitudes"])
    for name in names:
        theirs = timm[f"levels/{name}"]
        ours = np.stack([randaugment.level(name, magnitudes, jnp.full_like(magnitudes, sign)) for sign in (1, -1)])
        if name in ("Posterize", "Solarize", "SolarizeAdd"):
            np.testing.assert_array_equal(ours[:, ::20], theirs[:, ::20])  # magnitudes 0, 1 .. 10
            assert np.abs(ours - theirs).max() <= 1  # one more step where a product is whole but for rounding
            assert (ours != theirs).mean() < 0.03
        else:
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)


def test_rand_augment_draws(timm, key):
    op, magnitude, sign = (np.asarray(x).reshape(DRAWS, 2) for x in randaugment.draw(
        jax.random.split(key, 2 * DRAWS), 0.5, 9.0, 0.5))
    used = op < len(OPS)
    counts = np.stack([np.bincount(x, minlength=3) for x in (used.sum(1), timm["rand_augment/counts"])])
    assert scipy.stats.chi2_contingency(counts).pvalue > 1e-3
    frequencies = np.stack([np.bincount(x, minlength=len(OPS)) for x in (op[used], timm["rand_augment/ops"])])
    assert scipy.stats.chi2_contingency(frequencies).pvalue > 1e-3
    shears = randaugment.level("ShearX", jnp.float32(magnitude), jnp.float32(sign))
    assert same_distribution(np.asarray(shears)[op == OPS.index("ShearX")], timm["rand_augment/shears"])


def test_erasing(timm, key):
    draw = jax.vmap(lambda key: augment.draw_erase_box(key, HEIGHT, WIDTH, 0.25, (0.02, 1 / 3), (0.3, 3.3)))
    erased, top, left, bottom, right = (np.asarray(x) for x in draw(jax.random.split(key, DRAWS)))
    theirs = dict(zip(("top", "left", "height", "width"), timm["erase/boxes"].T, strict=True))
    ours = {name: x[erased] for name, x in
            (("top", top), ("left", left), ("height", bottom - top), ("width", right - left))}
    assert same_frequency(erased.sum(), DRAWS, len(theirs["top"]), DRAWS)
    for boxes in (ours, theirs):
        boxes["area"] = boxes["height"] * boxes["width"]
        boxes["aspect"] = boxes["height"] / boxes["width"]
        boxes["top part"] = boxes["top"] / (HEIGHT - boxes["height"])
    for name, values in ours.items():
        assert same_distribution(values, theirs[name]), name


def test_noise(timm, key):
    noise = augment.random_erase(
        jax.random.split(key, 300), jnp.full((300, HEIGHT, WIDTH, 3), 99.0), 1.0, "pixel", (0.02, 1 / 3), (0.3, 3.3))
    assert same_distribution(noise[noise != 99][:20_000], timm["erase/noise"][:20_000])


def test_mixes(timm, key):
    config = ConfigDict({"mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.9, "cutmix_switch": 0.5, "mix_group": 2})
    images = jnp.tile(jnp.array([0.0, 1.0])[:, None, None, None], (DRAWS, HEIGHT, WIDTH, 1))
    mixed, targets, _ = jax.jit(lambda images: augment.mix(
        key, images, jnp.tile(jnp.eye(2), (DRAWS, 1)), jnp.ones(2 * DRAWS), config))(images)
    kept, mixed = np.asarray(targets)[::2, 0], np.asarray(mixed)[::2, ..., 0]
    pasted = mixed == 1
    cut = pasted.any((1, 2)) & (mixed == 0).any((1, 2))
    their_cut, their_kept = timm["mix/cut"], timm["mix/kept"]
    assert same_frequency((kept == 1).sum(), DRAWS, (their_kept == 1).sum(), DRAWS)
    assert same_frequency(cut.sum(), DRAWS, their_cut.sum(), DRAWS)
    assert same_distribution(kept[cut], their_kept[their_cut])
    assert same_distribution(kept[~cut & (kept < 1)], their_kept[~their_cut & (their_kept < 1)])
    sides = np.stack([pasted.any(2).sum(1), pasted.any(1).sum(1)], axis=1)
    for i in range(2):
        assert same_distribution(sides[cut, i], timm["mix/sides"][their_cut, i])


def test_colour_jitter(timm, key):
    image, theirs = timm["jitter/image"], timm["jitter/results"]
    batch = jnp.tile(jnp.asarray(image)[None], (len(theirs), 1, 1, 1))
    ours = np.asarray(augment.random_color_jitter(jax.random.split(key, len(theirs)), batch, 0.8))
    ours, theirs = (x.reshape(len(x), -1).astype(np.float64) for x in (ours, theirs))
    for i in range(ours.shape[1]):
        assert same_distribution(ours[:, i], theirs[:, i]), i
    for i in range(1, ours.shape[1]):  # and the values of one image together
        assert same_distribution(ours[:, i] - ours[:, 0], theirs[:, i] - theirs[:, 0]), i
