"""Weights into models and back: names, wrappers, architectures, changes on the way, forms, and what does not fit."""

import concurrent.futures
import dataclasses
import itertools
import json
import logging
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

import fastervit_jax as fv
from fastervit_jax.weights import architecture, pretrained, sources
from fastervit_jax.weights.torch_file import StoredArray, WeightsError, write_torch_file
from tests.golden import cases

SIDE = 128


@pytest.fixture(scope="module")
def model():
    return fv.create_model("testing")


@pytest.fixture(scope="module")
def official(model):
    """A state dict of the model, by official names, with every parameter and statistic its own."""
    return {name: cases.official_array(name, shape) for name, (_, _, shape) in pretrained.layout(model.config).items()}


@pytest.fixture(scope="module")
def variables(model, official):
    arrays = {name: pretrained._in_memory(array) for name, array in official.items()}
    return pretrained.load_variables(sources.Source("memory", arrays), model.config)[0]


@pytest.fixture(scope="module")
def whole(model, variables, tmp_path_factory):
    """The state dict with its buffers and doubles, as in official files."""
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    fv.save_pretrained(model, variables, path, resolution=SIDE)
    return safetensors.numpy.load_file(path)


def stored(arrays):
    return {name: StoredArray(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def torch_file(path, arrays):
    """A .pth without our note of the architecture, as others write them."""
    write_torch_file(path, stored(arrays).items(), {})
    return path


def assert_same(ours, theirs):
    ours, theirs = flatten_dict(ours, sep="/"), flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype == np.float32
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


# Names and wrappers


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "model.", "_orig_mod.", "module.model.encoder."])
def test_prefixes(prefix, whole, model, variables, tmp_path):
    path = torch_file(tmp_path / "a.pth", {f"{prefix}{name}": array for name, array in whole.items()})
    loaded, same = fv.from_pretrained(path, layer_scale=0.5, layer_scale_conv=0.5, drop_path_rate=0.2)
    assert dataclasses.replace(loaded.config, num_heads=(2, 4, 8, 16), window_size=(2, 2, 2, 2)) == model.config
    assert loaded.config.num_heads[2:] == (8, 16)
    assert loaded.config.window_size[2:] == (2, 2)
    assert_same(same, variables)


def test_either_name_of_the_shared_convolution(whole, variables, tmp_path):
    for dropped in ("global_tokenizer.pos_embed.", "global_tokenizer.to_global_feature.pos."):
        kept = {name: array for name, array in whole.items() if dropped not in name}
        assert len(kept) == len(whole) - 4
        assert_same(fv.from_pretrained(torch_file(tmp_path / "a.pth", kept))[1], variables)


def wrap(monkeypatch, tmp_path, saved):
    """A file that holds `saved`; reading the format itself is tested elsewhere."""
    path = tmp_path / "a.pth"
    path.write_bytes(b"PK")
    monkeypatch.setattr(sources, "read_torch_file", lambda _: (saved, {}))
    return path


@pytest.mark.parametrize(
    ("keys", "ema", "taken", "warning"),
    [
        (["state_dict"], False, "state_dict", None),
        (["state_dict", "state_dict_ema"], False, "state_dict", None),
        (["state_dict", "state_dict_ema"], True, "state_dict_ema", None),
        (["model", "model_ema"], True, "model_ema", None),
        (["model"], False, "model", None),
        (["model"], True, "model", "ema=True, but the file has no averaged weights"),
        (["state_dict_ema"], False, "state_dict_ema", "averaged (EMA) weights alone"),
    ],
)
def test_where_a_checkpoint_keeps_them(keys, ema, taken, warning, official, monkeypatch, tmp_path, caplog):
    saved = {"epoch": 3, "optimizer": {"state": {}}}
    saved |= {key: stored({**official, "head.bias": np.full(10, len(key), np.float32)}) for key in keys}
    _, variables = fv.from_pretrained(wrap(monkeypatch, tmp_path, saved), ema=ema)
    np.testing.assert_array_equal(variables["params"]["head"]["bias"], len(taken))
    messages = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert (warning is not None) == any(warning in message for message in messages if warning)
    assert any("averaged" in message for message in messages) == (warning is not None)


# The architecture


def test_architecture_without_buffers(official, variables, tmp_path, caplog):
    """Windows and carrier count, too, are then those of the nearest variant, and are said to be assumed."""
    path = torch_file(tmp_path / "a.pth", official)
    model, same = fv.from_pretrained(path)
    assert_same(same, variables)
    assert model.config.window_size == (7, 7, 7, 7)
    assert model.config.ct_size == 2
    (warning,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "assumed do_propagation=True, ct_size=2, window_size=(7, 7, 7, 7), as in faster_vit_3_224" in warning

    caplog.clear()
    model, _ = fv.from_pretrained(path, do_propagation=False, ct_size=1, window_size=(2, 2, 2, 2))
    assert (model.config.do_propagation, model.config.ct_size, model.config.window_size) == (False, 1, (2, 2, 2, 2))
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def shapes_of(name, side=224, **changes):
    config = fv.create_model(name, **changes).config
    ours = {name: shape for name, (_, _, shape) in pretrained.layout(config).items()}
    arrays = {name: StoredArray(shape, np.dtype(np.float32), lambda: None) for name, shape in ours.items()}
    return config, ours, {name: x.shape for name, x in pretrained.make_buffers(config, side, arrays)}


@pytest.mark.parametrize("name", sources.PUBLISHED)
def test_every_published_architecture_is_its_own(name):
    config, arrays, buffers = shapes_of(name)
    found = architecture.infer({**arrays, **buffers})
    assert dataclasses.replace(found.config, drop_path_rate=config.drop_path_rate) == config
    assert found.nearest == ("faster_vit_5_224" if name == "faster_vit_6_224" else name) or name == found.nearest
    assert found.assumed == ({"do_propagation": config.do_propagation} if any(config.hat) else {})
    assert found.side == (224 if any(config.hat) else None)


@pytest.mark.parametrize(
    "changes",
    [
        {"window_size": (7, 7, 8, 4), "ct_size": 3},
        {"hat": (False, False, True, True), "window_size": (7, 7, 7, 2)},
        {"mlp_ratio": 2.53}, {"mlp_ratio": 3.3}, {"qkv_bias": False}, {"layer_norm_last": True}, {"in_chans": 5},
        {"num_classes": 0}, {"num_classes": 21841}, {"layer_scale": 0.1, "do_propagation": True}, {"dim": 48},
        {"num_heads": (2, 4, 4, 32)}, {"depths": (1, 2, 12, 11)}, {"layer_scale_conv": 1e-5},
    ],
)  # fmt: skip
def test_changed_architectures(changes):
    config, arrays, buffers = shapes_of("faster_vit_0_224", **changes)
    found = architecture.infer({**arrays, **buffers}).config
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.name == "mlp_ratio":
            for width in config.widths[2:]:
                assert int(width * value) == int(width * config.mlp_ratio)
        elif field.name in ("layer_scale", "layer_scale_conv"):
            assert (value is None) == (getattr(config, field.name) is None)
        elif field.name not in ("drop_path_rate", "do_propagation"):
            assert value == getattr(config, field.name), field.name


def test_the_files_own_word(model, variables, tmp_path):
    """Ours keep the whole config, what arrays do not tell included; what contradicts the arrays is refused."""
    config = dataclasses.replace(model.config, do_propagation=False, drop_path_rate=0.45, mlp_ratio=4.01)
    path = tmp_path / "a.safetensors"
    fv.save_pretrained(fv.FasterViT(config), variables, path, resolution=SIDE)
    assert fv.from_pretrained(path)[0].config == config

    arrays = safetensors.numpy.load_file(path)
    note = {"config": {**dataclasses.asdict(config), "hat": [False] * 4, "depths": [1, 1, 3, 1]}}
    safetensors.numpy.save_file(arrays, path, metadata={"fastervit_jax.json": json.dumps(note)})
    with pytest.raises(WeightsError, match=r"states is not that of its arrays:(?s:.)*depths: stated \(1, 1, 3, 1\), by "
                                           r"the arrays \(1, 1, 2, 1\)"):
        fv.from_pretrained(path)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda a: {name: x for name, x in a.items() if ".blocks.0." not in name or "levels.2" not in name},
         r"stage 2 has blocks \[1\]: block 0 is missing"),
        (lambda a: {**a, **{f"levels.1.blocks.{n}.gamma": np.zeros(1, np.float32) for n in range(501)}},
         "stage 1 has 501 blocks, expected at most 500"),
        (lambda a: {**a, **{f"levels.1.blocks.{n}.gamma": np.zeros(1, np.float32) for n in range(60)}},
         r"stages have \[1, 60, 2, 1\] blocks, but there are only \d+ arrays"),
        (lambda a: {"conv1.weight": a["patch_embed.conv_down.0.weight"]}, "no FasterViT: it lacks 'patch_embed"),
        (lambda a: {**a, "levels.3.blocks.0.mlp.fc1.weight": np.zeros((100, 64), np.float32)}, "expected one ratio"),
        (lambda a: {**a, "levels.2.blocks.0.attn.pos_emb_funct.relative_bias": np.zeros((1, 8, 6, 6), np.float32)},
         "for 6 tokens a window, of which 2² are"),
    ],
)
def test_no_architecture(broken, message, whole, tmp_path):
    path = torch_file(tmp_path / "a.pth", broken(whole))
    with pytest.raises(WeightsError, match=message) as error:
        fv.from_pretrained(path)
    assert str(error.value).startswith(str(path))


# Changes on the way


def test_new_head(whole, variables, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastervit_jax")
    path = torch_file(tmp_path / "a.pth", whole)
    loaded, new = fv.from_pretrained(path, num_classes=7)
    assert loaded.config.num_classes == 7
    head = new["params"].pop("head")
    assert head["kernel"].shape == (64, 7)
    assert 0.015 < head["kernel"].std() < 0.025
    np.testing.assert_array_equal(head["bias"], np.zeros(7))
    rest = {name: x for name, x in variables["params"].items() if name != "head"}
    assert_same(new, {**variables, "params": rest})
    assert "head: head.weight, head.bias initialised anew" in caplog.text
    other = fv.from_pretrained(path, num_classes=7, seed=1)[1]["params"]["head"]["kernel"]
    assert not np.array_equal(other, head["kernel"])
    assert_same(fv.from_pretrained(path, num_classes=0)[1], {**variables, "params": rest})


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channels(channels, whole, variables, tmp_path):
    _, folded = fv.from_pretrained(torch_file(tmp_path / "a.pth", whole), in_chans=channels)
    rest = jax.tree.map(lambda x: x, variables)
    old, new = (np.asarray(v["params"]["stem"]["conv1"].pop("kernel")) for v in (rest, folded))
    expected = old.sum(2, keepdims=True) if channels == 1 else np.stack(
        [old[:, :, i % 3] * np.float32(3 / channels) for i in range(channels)], axis=2)
    np.testing.assert_array_equal(new, expected)
    assert_same(folded, rest)


def test_other_windows_and_images(whole, variables, tmp_path):
    model, same = fv.from_pretrained(torch_file(tmp_path / "a.pth", whole), window_size=(4, 4, 4, 2), ct_size=2)
    assert_same(same, variables)
    assert jax.jit(model.apply)(same, jnp.ones((1, 96, 160, 3))).shape == (1, 10)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions(dtype, whole, variables, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastervit_jax")
    floats = {name: array.astype(dtype) if array.dtype == np.float32 else array for name, array in whole.items()}
    safetensors.numpy.save_file(floats, tmp_path / "a.safetensors")
    _, loaded = fv.from_pretrained(tmp_path / "a.safetensors")
    assert_same(loaded, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), variables))
    assert f"{np.dtype(dtype).name} in the file, float32 in the model" in caplog.text


def test_no_position_for_carriers(whole, variables, tmp_path, caplog):
    """Official files for windows that form no square lack it: zero, by its last layer, so that it can be trained."""
    path = torch_file(tmp_path / "a.pth", {name: x for name, x in whole.items() if "hat_pos_embed" not in name})
    _, loaded = fv.from_pretrained(path)
    assert "no position embedding for carrier tokens" in caplog.text
    flat, before = flatten_dict(loaded, sep="/"), flatten_dict(variables, sep="/")
    for name, array in flat.items():
        if "carrier_position" not in name:
            np.testing.assert_array_equal(array, before[name])
        elif name.endswith("hidden/kernel"):
            assert 0.015 < array.std() < 0.025
        else:
            np.testing.assert_array_equal(array, np.zeros_like(before[name]))


def test_stage_with_one_window(tmp_path, caplog):
    """Official files have an initialiser of carrier tokens there, and no carrier tokens."""
    caplog.set_level(logging.INFO, "fastervit_jax")
    config = fv.create_model("testing", hat=(False, False, True, False)).config
    arrays = {name: cases.official_array(name, shape) for name, (_, _, shape) in pretrained.layout(config).items()}
    conv = "levels.3.global_tokenizer.pos_embed"
    extra = {f"{conv}.weight": np.ones((64, 1, 3, 3), np.float32), f"{conv}.bias": np.ones(64, np.float32)}
    model, _ = fv.from_pretrained(torch_file(tmp_path / "a.pth", {**arrays, **extra}))
    assert model.config.hat == (False, False, True, False)
    assert f"left out: {conv}.weight, {conv}.bias, of a stage with a single window" in caplog.text


# What does not fit


@pytest.mark.parametrize(
    ("broken", "lines"),
    [
        (lambda a: {name: x for name, x in a.items() if name != "norm.bias"},
         ["norm.bias: not in the file, expected (64,)"]),
        (lambda a: {**a, "norm.bias": np.zeros(65, np.float32), "levels.0.blocks.0.extra": np.zeros(3, np.float32)},
         ["levels.0.blocks.0.extra: (3,) in the file, none expected",
          "norm.bias: (65,) of float32 in the file, expected (64,) of floating point"]),
        (lambda a: {**a, "norm.bias": np.zeros(64, np.int64)},
         ["norm.bias: (64,) of int64 in the file, expected (64,) of floating point"]),
    ],
)
def test_mismatches_are_listed(broken, lines, whole, tmp_path):
    path = torch_file(tmp_path / "a.pth", broken(whole))
    with pytest.raises(WeightsError) as error:
        fv.from_pretrained(path)
    first, *rest = str(error.value).split("\n  ")
    assert first.startswith(f"{path}: {len(lines)} array(s) do not fit the model with dim=8, ")
    assert rest == lines


def test_changes_that_cannot_be(whole, tmp_path):
    path = torch_file(tmp_path / "a.pth", whole)
    with pytest.raises(WeightsError, match=r"do not fit(?s:.)*levels.2.blocks.2.attn.qkv.weight: not in"):
        fv.from_pretrained(path, depths=(1, 1, 3, 1))
    with pytest.raises(TypeError, match="from_pretrained got unknown keywords: num_class; known are dim"):
        fv.from_pretrained(path, num_class=3)
    with pytest.raises(ValueError, match="ct_size=9: more carrier tokens a side"):
        fv.from_pretrained(path, ct_size=9)
    with pytest.raises(FileNotFoundError, match="no file, folder or registered model 'faster_vit_9'"):
        fv.from_pretrained("faster_vit_9")
    with pytest.raises(FileNotFoundError, match="no file, folder"):
        fv.create_model("faster_vit_0_224", checkpoint_path="faster_vit_1_224")
    with pytest.raises(ValueError, match="unknown model 'faster_vit_9'"):
        fv.create_model("faster_vit_9", checkpoint_path=path)


def test_another_models_file_under_a_registered_name(whole, variables, tmp_path, caplog):
    _, same = fv.create_model("faster_vit_3_224", checkpoint_path=torch_file(tmp_path / "a.pth", whole))
    assert_same(same, variables)
    assert "the arrays are not those of faster_vit_3_224: ct_size 1 in the file, 2 expected; depths (1, " in caplog.text
    assert "num_classes" not in caplog.text.partition("not those of")[2]


def test_layer_scale_of_zero(model, variables, tmp_path):
    """The initial value says whether there is any, and 0 is one."""
    config = dataclasses.replace(model.config, layer_scale=0.0, layer_scale_conv=0.0)
    fv.save_pretrained(fv.FasterViT(config), variables, tmp_path / "a.pth")
    assert fv.from_pretrained(tmp_path / "a.pth")[0].config == config


@pytest.mark.parametrize("side", [256, 464, 512])
def test_side_of_the_images(side):
    """From the buffers, an image size that has the same grids of carrier tokens in both stages, padded or not."""
    changes = {"hat": (False, False, True, True), "window_size": (7, 7, 7, 5)}
    config, arrays, buffers = shapes_of("faster_vit_0_224", side, **changes)
    found = architecture.infer({**arrays, **buffers}).side
    assert shapes_of("faster_vit_0_224", found, **changes)[2] == buffers
    for stage in (2, 3):
        assert config.windows(stage, found, found) == config.windows(stage, side, side)


def test_writers_at_the_same_time_do_not_mix(model, variables, tmp_path):
    """And what a link points to is replaced, not the link."""
    (tmp_path / "there").mkdir()
    for name in ("a.pth", "a.safetensors"):
        target, link = tmp_path / "there" / name, tmp_path / name
        target.write_bytes(b"")
        link.symlink_to(target)
        others = jax.tree.map(lambda x: x + 1, variables)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            done = [pool.submit(fv.save_pretrained, model, weights, link) for weights in (variables, others) * 4]
            for one in done:
                one.result()
        _, read = fv.from_pretrained(target)
        assert link.is_symlink()
        first = np.array_equal(read["params"]["head"]["bias"], variables["params"]["head"]["bias"])
        assert_same(read, variables if first else others)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["a.pth", "a.safetensors"]


# Forms


@pytest.mark.parametrize("form", ["a.pth", "a.pth.tar", "a.pt", "a.safetensors", "folder"])
def test_round_trip(form, model, variables, tmp_path):
    path = tmp_path / "new" / form
    fv.save_pretrained(model, variables, path, resolution=SIDE)
    assert [entry.name for entry in path.parent.iterdir()] == [form]
    loaded, same = fv.from_pretrained(path)
    assert loaded == model
    assert_same(same, variables)


def test_run(model, variables, tmp_path, caplog):
    """The newest step that is whole; of a run with averaged weights, either."""
    fv.save_pretrained(model, variables, tmp_path / "a")
    others = jax.tree.map(lambda x: x + 1, variables)
    fv.save_pretrained(model, others, tmp_path / "b")
    steps = tmp_path / "a" / "checkpoints"
    for name in ("9", "damaged_11", "12.orbax-checkpoint-tmp-0"):
        shutil.copytree(tmp_path / "a" / "variables", steps / name / "variables")
    (tmp_path / "a" / "variables").rename(steps / "variables")
    shutil.copytree(tmp_path / "b" / "variables", steps / "10" / "variables")
    assert_same(fv.from_pretrained(tmp_path / "a")[1], others)
    assert not caplog.records
    assert_same(fv.from_pretrained(tmp_path / "a", ema=True)[1], others)
    assert "ema=True, but the folder has one set of weights" in caplog.text
    caplog.clear()
    (steps / "variables").rename(steps / "10" / "ema")
    assert_same(fv.from_pretrained(tmp_path / "a", ema=True)[1], variables)
    assert_same(fv.from_pretrained(tmp_path / "a")[1], others)
    assert not caplog.records


def test_what_cannot_be_saved(model, variables, tmp_path):
    with pytest.raises(ValueError, match=r"expected a name that ends in \.safetensors"):
        fv.save_pretrained(model, variables, tmp_path / "a.npz", resolution=SIDE)
    with pytest.raises(WeightsError, match="images of 32 pixels are one window of 2 tokens a side in stage 2"):
        fv.save_pretrained(model, variables, tmp_path / "a.pth", resolution=32)
    with pytest.raises(WeightsError, match=r"not this model's:\n  params/head/bias: \(10,\), expected \(3,\)\n"):
        fv.save_pretrained(fv.create_model("testing", num_classes=3), variables, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"not this model's:\n  batch_stats/norm/mean: missing, expected \(64,\)"):
        fv.save_pretrained(model, {"params": variables["params"]}, tmp_path / "a.pth")
    for resolution in (0, 100_000, "224", (224, 448), None, True):
        with pytest.raises((ValueError, TypeError), match="resolution"):  # or by its type
            fv.save_pretrained(model, variables, tmp_path / "a.pth", resolution=resolution)
    bad = jax.tree.map(lambda x: x, variables)
    bad["params"]["norm"]["scale"] = np.full(64, np.nan, np.float32)
    for form in ("a.pth", "a.safetensors", "folder"):
        with pytest.raises(WeightsError, match=r"norm\.weight: 64 of 64 values are NaN or infinite"):
            fv.save_pretrained(model, bad, tmp_path / form, resolution=SIDE)
    assert not list(tmp_path.iterdir())
    fv.save_pretrained(model, variables, tmp_path / "folder")
    with pytest.raises(FileExistsError, match="give a folder that does not"):
        fv.save_pretrained(model, variables, tmp_path / "folder")


def test_damaged_folder(model, variables, tmp_path):
    fv.save_pretrained(model, variables, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text("[" * 100_000)
    with pytest.raises(WeightsError, match=r"/a: config\.json or variables/ is damaged"):
        fv.from_pretrained(tmp_path / "a")
    # In a process of its own: the reads that orbax leaves behind complain in their threads that its event loop is gone.
    (tmp_path / "whole" / "variables" / "manifest.ocdbt").unlink()
    done = convert(tmp_path / "whole", tmp_path / "b.safetensors")
    assert done.returncode != 0
    assert re.search(r"WeightsError: .*/whole: config\.json or variables/ is damaged", done.stderr)


def test_foreign_folder(tmp_path):
    with pytest.raises(WeightsError, match=r"the folder is none of ours: expected config\.json, and variables/"):
        fv.from_pretrained(tmp_path)


def convert(*arguments):
    command = [sys.executable, "-m", "fastervit_jax.convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2])


def test_convert(model, variables, whole, tmp_path):
    parameters = sum(x.size for x in jax.tree.leaves(variables["params"]))
    start = torch_file(tmp_path / "a.pth", whole)
    paths = [start, tmp_path / "b", tmp_path / "c.safetensors", tmp_path / "d.pt"]
    for source, destination in itertools.pairwise(paths):
        done = convert(source, destination, "--set", "layer_scale=0.5", "--resolution", SIDE)
        assert done.returncode == 0, done.stderr
        assert f"{destination}: {parameters:,} parameters, " in done.stdout
        assert ("buffers for images of 128 pixels" in done.stdout) == (destination.suffix != "")
    assert "inferred in_chans=3, in_dim=8, dim=8, depths=(1, 1, 2, 1)" in convert(start, tmp_path / "e.pth").stderr
    loaded, same = fv.from_pretrained(tmp_path / "d.pt")
    assert loaded.config.layer_scale == 0.5
    assert_same(same, variables)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.pth", "b.pth"), "FileNotFoundError: no file, folder or registered model 'none.pth'"),
        (("a.pth", "b.npz"), "ValueError: b.npz: expected a name that ends in"),
        (("a.pth", "b.pth", "--set", "ct=1"), "TypeError: --set got unknown keywords: ct; known are dim"),
        (("a.pth", "b.pth", "--set", "ct_size"), "expected FIELD=VALUE"),
        (("a.pth", "b.pth", "--resolution", "0"), "ValueError: resolution=0: expected the side of square images"),
    ],
)
def test_convert_says_what_is_wrong(arguments, message, whole, tmp_path):
    path = torch_file(tmp_path / "a.pth", whole)
    done = convert(*(path if argument == "a.pth" else argument for argument in arguments))
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
