"""Files of the official package into our model, and our files into the official model, logits on both sides."""

import dataclasses

import jax
import numpy as np

import fastervit_jax as fv
from tests import official
from tests.golden import cases

NO_EFFECT = ("num_heads", "window_size")  # of stages 0 and 1


def assert_same_architecture(found, expected):
    found, expected = dataclasses.asdict(found), dataclasses.asdict(expected)
    for config in (found, expected):
        config.update({name: config[name][2:] for name in NO_EFFECT})
    assert found == expected


def assert_same(variables, others):
    """Bit for bit."""
    bits = [jax.tree.map(lambda x: np.asarray(x).view(np.uint32), tree) for tree in (variables, others)]
    jax.tree.map(np.testing.assert_array_equal, *bits)


def read(case, path, **told):
    """Our model from a file, and its logits on the case's images."""
    model, variables = fv.from_pretrained(path, **told)
    images = cases.images(case.batch, case.resolution, case.resolution, model.config.in_chans)
    return model, variables, np.asarray(jax.jit(model.apply)(variables, images))


def there_and_back(name, case, folder, suffixes, **told):
    """Official file → ours → files → official model; gives the relative errors of logits."""
    model, variables, logits = read(case, folder / f"{name}.pth.tar", **told)
    errors = {"theirs to ours": official.relative_error(logits, np.load(folder / f"{name}.npz")["logits"])}
    assert_same_architecture(model.config, fv.create_model(case.arch, **case.kwargs).config)
    files = [folder / f"{name}.ours{suffix}" for suffix in suffixes]
    for file in files:
        fv.save_pretrained(model, variables, file, resolution=case.resolution)
        again, same = fv.from_pretrained(file)
        assert again.config == model.config
        assert_same(same, variables)
        del same
    return logits, files, errors


def check_loaded(logits, folder, files, errors):
    for file in files:
        loaded = np.load(folder / f"{file.name}.npz")
        errors[f"ours to theirs, {file.suffix}"] = official.relative_error(logits, loaded["logits"])
        errors[f"buffers, {file.suffix}"] = loaded["computed_errors"].max()
    print(files[0].name, {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5, errors
