"""The command: what it reads, refuses, draws and writes."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

import fastervit_jax as fv
from configs import digits
from fastervit_jax import attention_maps, rollout, trained
from fastervit_jax.data import sources

CHANGES = {"model.dim": 8, "model.in_dim": 8, "model.depths": (1, 1, 2, 1), "model.num_heads": (1, 1, 2, 2)}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders as train.py leaves them, of the same network with and without carrier tokens."""
    folders = {}
    for name, hat in (("hat", True), ("windows", False)):
        config = digits.get_config()
        config.update_from_flattened_dict({**CHANGES, "model.hat": (False, False, hat, False)})
        model = fv.FasterViT(fv.ModelConfig(**config.model))
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 1)))
        rng = np.random.default_rng(0)
        variables = jax.tree.map(lambda x, rng=rng: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)
        variables["batch_stats"] = jax.tree.map(jnp.ones_like, variables["batch_stats"])
        folders[name] = tmp_path_factory.mktemp("runs") / name
        fv.save_pretrained(model, variables, folders[name])
        fv.save_pretrained(model, variables, folders[name] / "best.safetensors")
        (folders[name] / "config.json").write_text(config.to_json())
    return folders


@pytest.fixture
def digit(tmp_path):
    path = tmp_path / "digit.png"
    Image.fromarray(sources.digits("validation", 64).images[7, ..., 0]).save(path)
    return path


def command(*arguments):
    attention_maps.main([str(argument) for argument in arguments])


def colours(path: pathlib.Path) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return len(np.unique(pixels.reshape(-1, 3), axis=0))


def test_pictures_and_arrays(checkpoints, digit, tmp_path, capsys):
    out = tmp_path / "maps"
    command(digit, f"--checkpoint={checkpoints['hat']}", f"--versus={checkpoints['windows'] / 'best.safetensors'}",
            "--query=30,20", f"--out={out}")
    printed = capsys.readouterr().out
    assert printed.count("64 × 64 pixels, 1 of the image (squash), mean 0.3, deviation 0.35") == 2
    assert "best.safetensors has no carrier tokens in images of 64 pixels: no carrier attention to draw" in printed
    expected = {"photograph", "rollout", "grad_cam", "rollout_stage2", "rollout_stage3", "window_attention_stage2",
                "window_attention_stage3", "carrier_attention_stage2"}
    assert {path.name for path in (out / "digit").iterdir()} == {f"{name}.png" for name in expected} | {"maps.npz"}
    for name in expected:
        assert colours(out / "digit" / f"{name}.png") > 40, name

    arrays = np.load(out / "digit" / "maps.npz")
    model, variables = fv.from_pretrained(checkpoints["hat"])
    np.testing.assert_array_equal(arrays["image"], sources.digits("validation", 64).images[7])
    images = (arrays["image"][None].astype(np.float32) / 255 - 0.3) / 0.35
    logits, attention = rollout.capture(model, variables, images)
    np.testing.assert_allclose(arrays["logits"], logits[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["rollout"], rollout.query_map(model, variables, images, 30, 20)[0], atol=1e-6)
    np.testing.assert_allclose(arrays["stage2_block1_rollout"], arrays["rollout"], atol=1e-9)
    np.testing.assert_allclose(arrays["stage2_block0_carrier_attention"],
                               attention[2]["blocks_0"]["carrier_attention"]["weights"], atol=1e-6)
    np.testing.assert_allclose(arrays["grad_cam"], rollout.grad_cam(model, variables, images)[0], rtol=1e-3, atol=1e-6)
    # What windows do not see without carrier tokens, they see with them: the query is in the first window of four.
    far = np.s_[2:, 2:]
    assert arrays["rollout"][far].min() > 0
    assert arrays["versus_rollout"][far].max() == 0
    assert "versus_stage2_block0_carrier_attention" not in arrays


def test_the_class_score_of_one_block_and_head(checkpoints, digit, tmp_path):
    out = tmp_path / "maps"
    command(digit, f"--checkpoint={checkpoints['hat']}", "--block=2.0", "--head=1", "--class=4", f"--out={out}")
    assert {path.name for path in (out / "digit").glob("*stage*")} == {
        "rollout_stage2.png", "window_attention_stage2.png", "carrier_attention_stage2.png"}
    arrays = np.load(out / "digit" / "maps.npz")
    model, variables = fv.from_pretrained(checkpoints["hat"])
    images = (arrays["image"][None].astype(np.float32) / 255 - 0.3) / 0.35
    np.testing.assert_allclose(arrays["rollout"], rollout.class_map(model, variables, images)[0], atol=1e-6)
    np.testing.assert_allclose(arrays["grad_cam"], rollout.grad_cam(model, variables, images, 4)[0], rtol=1e-3,
                               atol=1e-6)
    assert "stage2_block1_rollout" not in arrays


def test_a_map_lies_over_the_pixels_that_it_is_of():
    """3 cells of 16 pixels on an image of 40: the last one is cut off. The photograph shows where a cell is NaN."""
    values = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [np.nan, 0.0, 0.0]])
    drawn = Figure(figsize=(4, 4), dpi=100)
    axes = drawn.add_axes((0, 0, 1, 1))
    panel = attention_maps.Panel(values, (48, 48), "")
    attention_maps._draw(axes, np.full((40, 40, 1), 255, np.uint8), panel, Normalize(0, 1), None)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    seen = np.asarray(canvas.buffer_rgba())[..., :3].astype(int).sum(-1)
    seen = seen[5::10, 5::10]  # the middle of each pixel of the image, row and column
    assert seen[20, 36] > 1.5 * seen[20, 20]
    assert (seen[17:31, 33:40] == seen[20, 36]).all()
    assert (seen[33:40, 1:15] == 3 * 255).all()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--query=64,3"], r"--query=64,3: outside the image; expected X,Y .* from 0 to 63"),
        (["--query=3,-1"], r"--query=3,-1: outside the image"),
        (["--block=2.2"], r"--block=2.2: .* has the blocks with attention 2.0, 2.1, 3.0"),
        (["--block=1.0"], r"--block=1.0: .* 2.0, 2.1, 3.0"),
        (["--head=2"], r"--head=2: stage 2 of .* has the heads 0 to 1"),
        (["--class=10"], r"--class=10: .* has the classes 0 to 9"),
        (["--versus=nowhere"], r"no file, folder or registered model 'nowhere'"),
        (["nowhere.png"], r"No such file or directory: .*nowhere.png"),
        (["{folder}/text.png"], r"text.png: cannot be read as an image \(ValueError: no image"),
        (["{folder}/half.png"], r"half.png: cannot be read as an image"),
        (["{folder}/other/digit.png"], r"several images are called 'digit'"),
    ],
)  # fmt: skip
def test_refuses_before_anything_is_written(checkpoints, digit, tmp_path, arguments, expected):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes(digit.read_bytes()[:-200])
    (tmp_path / "other").mkdir()
    shutil.copy(digit, tmp_path / "other")
    out = tmp_path / "maps"
    given = [argument.format(folder=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit, match=expected):
        command(digit, *given, f"--checkpoint={checkpoints['hat']}", f"--out={out}")
    assert not out.exists()


def test_refuses_models_that_see_other_images(checkpoints, digit, tmp_path):
    other = tmp_path / "larger"
    shutil.copytree(checkpoints["windows"], other)
    config = json.loads((other / "config.json").read_text())
    config["data"]["image_size"] = 96
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"size=96.*size=64.*expected two models that see the same part"):
        command(digit, f"--checkpoint={checkpoints['hat']}", f"--versus={other}", f"--out={tmp_path / 'maps'}")
    with pytest.raises(SystemExit, match=r"--out=.*digit.png: a file; expected a folder"):
        command(digit, f"--checkpoint={checkpoints['hat']}", f"--out={digit}")


def test_a_bare_file_is_taken_as_the_nearest_variant(tmp_path):
    model = fv.create_model("faster_vit_0_224", dim=8, in_dim=8, num_heads=(1, 1, 1, 1), num_classes=3)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    fv.save_pretrained(model, jax.tree.map(lambda x: jnp.ones(x.shape), shapes), tmp_path / "weights.safetensors")
    loaded = trained.load(str(tmp_path / "weights.safetensors"))
    assert (loaded.crop.size, loaded.crop.crop, loaded.crop.channels) == (224, 0.875, 3)
    assert loaded.mean == (0.485, 0.456, 0.406)
    Image.fromarray(load_sample_image("china.jpg")).save(tmp_path / "china.jpg")
    pixels = trained.read_image(tmp_path / "china.jpg", loaded.crop)
    assert pixels.shape == (224, 224, 3)
    assert pixels.std() > 20
