"""An exported file computes what the model computes, for any number of images; one that does not is not kept."""

import dataclasses
import re
import sys

import jax
import numpy as np
import onnx
import onnxruntime
import pytest

import fastervit_jax as fv
from fastervit_jax import export, onnx_graph
from tests.official import relative_error
from tests.onnx_speed import random_variables

SIDE = 64


@pytest.fixture(scope="module")
def model_and_variables():
    """The tests' variant with random numbers in every array, so that no term is zero or one."""
    model = fv.create_model("testing")
    return model, random_variables(model.config)


@pytest.fixture
def images():
    """Of two batch sizes that the export was not checked with."""
    rng = np.random.default_rng(7)
    return [rng.normal(size=(batch, SIDE, SIDE, 3)).astype(np.float32) for batch in (2, 5)]


def errors(run, model_and_variables, images):
    model, variables = model_and_variables
    return [relative_error(run(x), jax.jit(model.apply)(variables, x)) for x in images]


def test_stablehlo(model_and_variables, images, tmp_path):
    path = tmp_path / "tiny.stablehlo"
    told = export.export(*model_and_variables, path, resolution=SIDE)
    assert 0 < told < 1e-5
    read = jax.export.deserialize(bytearray(path.read_bytes()))
    assert read.platforms == ("cpu", "cuda", "tpu")
    assert max(errors(read.call, model_and_variables, images)) < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.stablehlo"]


def test_onnx(model_and_variables, images, tmp_path, monkeypatch):
    built = []
    build = onnx_graph.build
    monkeypatch.setattr(onnx_graph, "build", lambda *args: built.append(build(*args)) or built[-1])
    path = tmp_path / "tiny.onnx"
    assert 0 < export.export(*model_and_variables, path, resolution=SIDE) < 1e-5

    def run(x):
        return onnxruntime.InferenceSession(path).run(["logits"], {"images": x})[0]

    assert max(errors(run, model_and_variables, images)) < 1e-5
    graph = onnx.load(path).graph
    assert [n.dim_param or n.dim_value for n in graph.input[0].type.tensor_type.shape.dim] == ["batch", SIDE, SIDE, 3]
    assert {node.domain for node in graph.node} == {""}
    operators = [node.op_type for node in graph.node]
    # Batch norms are in the convolutions, and what is one operator in ONNX is one.
    assert operators.count("Conv") == 2 + 2 + 2 + 3 + 1  # stem, stages, downsamplers, carrier tokens
    assert {"Gelu", "LayerNormalization", "Softmax"} < set(operators)
    assert not {"Erf", "Exp", "Sqrt"} & set(operators)

    # The same graph with its weights in a file beside it, in place of the first.
    monkeypatch.setattr(onnx_graph, "build", lambda *args: built[0])
    monkeypatch.setattr(onnx_graph, "EXTERNAL_FROM", 0)
    export.export(*model_and_variables, path, resolution=SIDE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.onnx", "tiny.onnx.data"]
    assert path.stat().st_size < (tmp_path / "tiny.onnx.data").stat().st_size
    assert max(errors(run, model_and_variables, images)) < 1e-5

    # A graph that is another function is refused, and the file that is there stays.
    before = path.read_bytes()
    node = next(node for node in onnx_graph.nodes(built[0]) if node.op == "Linear")
    node.inputs = (node.inputs[0], 1.01 * node.inputs[1], *node.inputs[2:])
    with pytest.raises(export.ExportError, match=r"tiny.onnx differs from the model by a relative .*: not kept"):
        export.export(*model_and_variables, path, resolution=SIDE)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.onnx", "tiny.onnx.data"]


def test_a_wrong_stablehlo_is_refused(model_and_variables, tmp_path, monkeypatch):
    exported = export._exported

    def wrong(model, variables, *rest, **options):
        head = variables["params"]["head"]
        other = {**variables, "params": {**variables["params"], "head": {**head, "bias": head["bias"] + 0.01}}}
        return exported(model, other, *rest, **options)

    monkeypatch.setattr(export, "_exported", wrong)
    with pytest.raises(export.ExportError, match="differs from the model by a relative"):
        export.export(*model_and_variables, tmp_path / "tiny.stablehlo", resolution=SIDE)
    assert not list(tmp_path.iterdir())


def test_check_refuses_what_is_no_number(model_and_variables):
    model, variables = model_and_variables
    shape = (SIDE, SIDE, 3)
    with pytest.raises(export.ExportError, match="by a relative nan"):
        export.check(lambda x: np.full((len(x), 10), np.nan), model, variables, shape, "it")
    with pytest.raises(export.ExportError, match=r"gives \(1, 9\) for 1 images, the model \(1, 10\)"):
        export.check(lambda x: np.zeros((len(x), 9)), model, variables, shape, "it")


def test_command(model_and_variables, tmp_path, capsys):
    fv.save_pretrained(*model_and_variables, tmp_path / "tiny.safetensors", resolution=128)
    export.main([str(tmp_path / "tiny.safetensors"), str(tmp_path / "tiny.stablehlo"), f"--resolution={SIDE}"])
    out = capsys.readouterr().out
    assert re.search(r"tiny.stablehlo: stablehlo, 1\.\d MB, images \(batch, 64, 64, 3\) in float32; largest relative "
                     r"error \d\.\de-0\d, on 1 and 3 random images", out)


def test_errors(model_and_variables, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "folder.onnx").mkdir()
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        (["text.pth", "model.tflite"], "model.tflite: expected a name that ends in .stablehlo or .onnx"),
        (["gone.pth", "model.stablehlo"], "no file, folder or registered model 'gone.pth'"),
        (["text.pth", "model.stablehlo"], "WeightsError: text.pth"),
    ):
        with pytest.raises(SystemExit, match=message):
            export.main(arguments)
    with pytest.raises(IsADirectoryError, match=r"folder.onnx is a folder"):
        export.export(*model_and_variables, "folder.onnx", resolution=SIDE)
    with pytest.raises(FileExistsError, match=r"folder.onnx exists"):
        export.export(*model_and_variables, "folder.onnx", resolution=SIDE, to="saved_model")
    with pytest.raises(ValueError, match="each side at least 32"):
        export.export(*model_and_variables, "model.stablehlo", resolution=16)
    monkeypatch.setattr(export, "LARGEST_STABLEHLO", 1000)
    with pytest.raises(export.ExportError, match=r"GB of weights, a .stablehlo file has less"):
        export.export(*model_and_variables, "model.stablehlo", resolution=SIDE)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "package"), [("model.onnx", "onnx"), ("saved_model", "tensorflow"), ("model.stablehlo", "flatbuffers")])
def test_missing_package(name, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"this form needs {package}.*pip install {package}"):
        export.main(["weights.pth", name])
    assert not list(tmp_path.iterdir())


def test_float32_whatever_the_config_says(model_and_variables, tmp_path, monkeypatch):
    written = []
    monkeypatch.setitem(export.WRITERS, "stablehlo", lambda model, *rest: written.append(model.config) or 0.0)
    model, variables = model_and_variables
    half = fv.FasterViT(dataclasses.replace(model.config, dtype="bfloat16"))
    export.export(half, variables, tmp_path / "tiny.stablehlo", resolution=SIDE)
    assert written == [model.config]
