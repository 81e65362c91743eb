"""Every command in README.md and docs/ runs, made small, in the order of its page."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

import fastervit_jax as fv
from tests import QUICKLY

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
NEEDS = {"predict.md": ["finetune.md"]} | {
    name: ["train.md"] for name in ("README.md", "evaluate.md", "convert.md", "export.md", "attention_maps.md")}
"""Pages that use the runs of others."""

NOT_RUN = {
    "-m venv .venv": "sets up what the tests run in; CI runs it",
    ".venv/bin/pip install": "downloads; CI installs what the tests need",
    "-m fastervit_jax.data.prepare": "needs ImageNet's archives; tests/data/test_prepare.py makes small ones",
    "-m fastervit_jax.plan": "compiles for minutes, or needs libtpu; tests/test_plan.py plans a small model",
    "-oracle/bin/": "needs the official package; tests/weights/test_official_files.py compares with it",
    "-m tests.onnx_speed": "a measurement, of the full model",
    "speed --jobs 8": "measurements on a GPU; tests/test_benchmark_speed.py runs them small",
    "random.safetensors": "what that measures",
    "configs/imagenet.py:faster_vit_4_224,smoke": "a minute; tests/test_configs.py runs it",
    "#SBATCH": "needs Slurm; tests/train/test_processes.py starts what it starts",
    "gcloud": "needs Cloud TPUs",
    "--coordinator": "two processes and minutes; tests/train/test_processes.py and faults.py do it",
}
"""Parts of blocks that are not run as they stand, and why. The lines of a block that have none of these are run."""

FEW = ('--config.data.train_split="train[:128]" --config.data.eval_split="validation[:64]" --config.epochs=1 '
       "--config.warmup_epochs=0 --config.log_every_steps=1")
TINY = ("--config.data.image_size=64 --config.data.workers=0 --config.model.dim=16 --config.model.in_dim=8 "
        '--config.model.depths="(1,1,1,1)" --config.model.window_size="(2,2,2,2)" --config.model.ct_size=1 '
        "--config.batch_size=8 --config.epochs=2 --config.bn_group_size=8")
SMALLER = (
    (r"benchmark speed --variant faster_vit_0_224 faster_vit_2_224 --batch 1 128",
     "benchmark speed --batch 1 --precision float32 --ours deployed/xla --repeat 1 --seconds 0.01"),
    (r"train\.py --config=configs/digits\.py", f"train.py --config=configs/digits.py:smoke {FEW}"),
    (r"train\.py --(?!config=)", f"train.py --config=configs/digits.py:smoke {FEW} --"),
    (r"eval\.py --config=configs/digits\.py", "eval.py --config=configs/digits.py:smoke"),
    (r"eval\.py --(?!config=)", "eval.py --config=configs/digits.py:smoke --"),
    (r"--config\.epochs=10 ", ""),
    (r"configs/finetune\.py:faster_vit_0_224(.*?)--config\.batch_size=64",
     rf"configs/finetune.py:faster_vit_0_224\1{TINY}"),
    # The same program for ImageNet and its miniature, to compile it once.
    (r"configs/imagenet\.py:faster_vit_0_224 --config\.data\.dir=data",
     f"configs/imagenet.py:faster_vit_0_224 --config.data.dir=tests/golden/imagenet --config.augment.mix_group=8 "
     f"--config.ema_decay=0.5 --config.warmup_epochs=1 --config.cooldown_epochs=0 --config.learning_rate_batch=8 "
     f"--config.log_every_steps=1 {TINY}"),
    (r'--config\.model\.in_dim=16 --config\.model\.depths="\(1,1,2,1\)"',
     '--config.model.in_dim=8 --config.model.depths="(1,1,1,1)"'),
    (r"configs/imagenet\.py --config\.data\.dir=tests/golden/imagenet --config\.data\.workers=2",
     'configs/imagenet.py --config.data.dir=tests/golden/imagenet --config.data.workers=0 --config.data.image_size=64 '
     '--config.model.window_size="(2,2,2,2)" --config.model.ct_size=1'),
    (r"(configs/sweeps/\S+)", r"\1 --index=0 --of=18 --config.epochs=1 --config.data.train_split='train[:128]' "
     "--config.data.eval_split='validation[:64]'"),
    (r"\.venv/bin/python", "$python"),
)


def blocks(page):
    return re.findall(r"^```sh\n(.*?)^```", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)


def commands(block):
    """What of a block is run, made small."""
    lines = block.replace("\\\n", " ").splitlines()
    if any(reason in block for reason in ("#SBATCH", "gcloud", "--coordinator")):
        return ""
    text = "\n".join(line for line in lines if not any(part in line for part in NOT_RUN))
    for pattern, new in SMALLER:
        text = re.sub(pattern, new, text)
    return text


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The repository, with empty runs/, and what a reader of the pages has."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("configs", "fastervit_jax", "tests", "train.py", "eval.py"):
        (folder / name).symlink_to(ROOT / name)
    photographs = [Image.fromarray(x) for x in load_sample_images().images]
    for split, count in (("train", 8), ("val", 4)):
        for i, flower in enumerate(("daisy", "rose")):
            (folder / "flowers" / split / flower).mkdir(parents=True)
            for j in range(count):
                photographs[i].rotate(5 * j).resize((96, 80)).save(folder / "flowers" / split / flower / f"{j}.jpg")
    (folder / "photographs").mkdir()
    for photograph, name in zip(photographs * 2, ("cat.jpg", "dog.png", "photographs/a.jpg", "photographs/b.jpg"),
                                strict=True):
        photograph.resize((96, 80)).save(folder / name)
    model = fv.create_model(
        "faster_vit_0_224", dim=16, in_dim=8, depths=(1, 1, 1, 1), window_size=(2, 2, 2, 2), ct_size=1)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    fv.save_pretrained(model, variables, folder / "weights.pth", resolution=64)
    (folder / "weights.pth").rename(folder / "fastervit_0_224_1k.pth.tar")
    return folder


@pytest.fixture(scope="module")
def environment(place):
    """Of the commands, with a $python for all of them that has imported what they share."""
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(place / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": QUICKLY}
    with tempfile.TemporaryDirectory() as folder:  # with a short name, as sockets need
        socket = f"{folder}/socket"
        server = subprocess.Popen([sys.executable, "-m", "tests.warm", socket], cwd=place, env=environment, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert server.stdout.readline() == "ready\n"
        yield {**environment, "python": f"{sys.executable} -S {ROOT / 'tests/warm.py'} {socket}"}
        server.communicate()


@pytest.fixture(scope="module")
def run(place, environment):
    """Runs a page's commands, after those of the pages that it needs; each page once."""
    done = {}

    def page(name):
        for needed in NEEDS.get(name, ()):
            page(needed)
        if name not in done:
            done[name] = []
            for block in blocks(name):
                process = subprocess.run(["bash", "-euxc", commands(block)], cwd=place, env=environment, text=True,
                                         capture_output=True)
                assert process.returncode == 0, f"{name}:\n{block}\n{process.stderr[-4000:]}"
                done[name].append(process.stdout)
        return "".join(done[name])

    return page


@pytest.mark.parametrize("name", [name for name in PAGES if any(commands(block) for block in blocks(name))])
def test_the_commands_of_a_page_run(run, name):
    run(name)


def test_what_they_leave(run, place):
    assert " * Acc@1 " in run("README.md")
    evaluated = run("evaluate.md")
    assert evaluated.count("imagenet_a") == 2  # in the table, and in its line of JSON
    assert '"split": "validation[:100]"' in evaluated
    run("predict.md")
    table = (place / "flowers.csv").read_text().splitlines()
    assert table[0] == "image,rank,class,name,probability"
    assert {line.split(",")[3] for line in table[1:]} == {"daisy", "rose"}
    assert "top-1" in run("ablate.md")
    assert (place / "runs/window_and_carrier/result.md").exists()
    assert "largest relative error" in run("export.md")
    run("attention_maps.md")
    assert (place / "attention_maps/digit/rollout.png").exists()
    assert {"digits", "flowers", "larger", "miniature", "tuned"} < {x.name for x in (place / "runs").iterdir()}


def test_every_block_is_run_or_has_a_reason():
    texts = [block for name in PAGES for block in blocks(name)]
    for part in NOT_RUN:
        assert any(part in text for text in texts), f"no block has {part!r} any more"
    assert sum(bool(commands(text).strip()) for text in texts) >= 12


def test_links_of_the_pages_exist():
    for path in PAGES.values():
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
