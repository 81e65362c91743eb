"""The real client of the Hugging Face hub, in processes of its own, against a small hub that breaks in many ways."""

import dataclasses
import hashlib
import http.server
import os
import pathlib
import pickle
import re
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import fastervit_jax as fv
from fastervit_jax.model.variants import ANY_RES, VARIANTS
from fastervit_jax.weights.pretrained import abstract_variables
from fastervit_jax.weights.sources import PUBLISHED, REPOSITORY, REVISION

ROOT = pathlib.Path(__file__).parents[2]
WHOLE, CUT, STALLED, MISSING, FAILING, GATED, DAMAGED = [f"faster_vit_{n}_224" for n in range(7)]
FOREIGN, AWAY = "faster_vit_4_21k_224", "faster_vit_4_21k_384"
STATUS = {MISSING: (404, "EntryNotFound"), FAILING: (500, None), GATED: (401, "GatedRepo")}
CUT_AT = 11 * 2**20  # the client keeps what it has in parts of 10 MiB

# Makes models and gives back their configs and variables, or the errors; does not wait between tries.
CLIENT = """
import pickle, sys, time
time.sleep = lambda seconds: None
import jax
import fastervit_jax as fv
results = []
for call in sys.argv[1:]:
    try:
        model, variables = eval(call)
        results.append((model.config, jax.device_get(variables)))
    except Exception as error:
        results.append((type(error), str(error)))
sys.stdout.buffer.write(pickle.dumps(results))
"""


def address(endpoint, name):
    return f"{endpoint}/{REPOSITORY}/resolve/{REVISION}/{PUBLISHED[ANY_RES.get(name, name)]}"


def client(endpoint, home, calls, **environment):
    """The result of each call, in a process whose hub is at `endpoint` and whose cache is in `home`."""
    others = {name: value for name, value in os.environ.items()
              if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not name.lower().endswith("_proxy")}
    environment = {**others, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1",
                   "HF_HUB_DISABLE_XET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", CLIENT, *calls], cwd=home, env=environment, capture_output=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return dict(zip(calls, pickle.loads(done.stdout), strict=True))


class Hub(http.server.ThreadingHTTPServer):
    """Serves the same file under every published name, or what goes wrong with that."""

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), Handler)
        middle = len(content) // 2
        self.content, self.damaged = content, content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.seen = []

    def requests(self, name):
        """Method and range of the requests for a published file."""
        return [(method, span) for method, path, span in self.seen if path == address("", name)]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        hub, span = self.server, self.headers["Range"]
        hub.seen.append((self.command, self.path, span))
        name = next((name for name in PUBLISHED if address("", name) == self.path), None)
        if name is None or name in STATUS:
            status, code = STATUS.get(name, (404, None))
            return self.head(status, {"Content-Length": 0, **({"X-Error-Code": code} if code else {})})
        content = hub.damaged if name == DAMAGED else hub.content
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span else 0
        headers = {"ETag": f'"{hashlib.sha256(name.encode()).hexdigest()}"', "Accept-Ranges": "bytes",
                   "Content-Length": len(content) - start}
        if name != FOREIGN:
            headers["X-Repo-Commit"] = REVISION
        if span:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.head(206 if span else 200, headers)
        if self.command == "GET":
            first = [method for method, _ in hub.requests(name)].count("GET") == 1
            stop = 0 if name == STALLED else CUT_AT if name == CUT and first else len(content)
            self.wfile.write(content[start:stop])
            self.close_connection = stop < len(content)

    do_GET = do_HEAD = answer

    def head(self, status, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file, and the config and the variables in it: a small model, but for a large head."""
    config = fv.create_model(WHOLE, dim=8, in_dim=8, depths=(1, 1, 2, 1), num_classes=50_000).config
    rng = np.random.RandomState(0)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract_variables(config))
    path = tmp_path_factory.mktemp("saved") / "saved.pth"
    fv.save_pretrained(fv.FasterViT(config), variables, path)
    return path, config, variables


@pytest.fixture(scope="module")
def hub(saved):
    with Hub(saved[0].read_bytes()) as hub:
        thread = threading.Thread(target=hub.serve_forever)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


LOAD = {name: f"fv.from_pretrained({name!r})" for name in [*PUBLISHED, *ANY_RES]}
CREATE = f"fv.create_model({WHOLE!r}, pretrained=True, num_classes=3)"
UNPUBLISHED = "fv.create_model('testing', pretrained=True)"
OWN = "fv.{}({!r}, checkpoint_path={!r})"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def online(hub, home):
    """Results of calls that reach the hub."""
    # CUT twice: huggingface_hub 1.0 fails first and goes on in the second call, 2.4 goes on in the first.
    loaded = (WHOLE, "faster_vit_0_any_res", CUT, CUT, STALLED, MISSING, FAILING, GATED, DAMAGED, FOREIGN)
    return client(hub.endpoint, home, [CREATE, *(LOAD[name] for name in loaded)])


@pytest.fixture(scope="module")
def closed(saved, tmp_path_factory):
    """An endpoint where nothing listens, and results of calls with that and an empty cache."""
    calls = [LOAD[WHOLE], UNPUBLISHED,
             *(OWN.format(function, WHOLE, str(saved[0])) for function in ("create_model", "from_pretrained"))]
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{bound.getsockname()[1]}"
        return endpoint, client(endpoint, tmp_path_factory.mktemp("empty"), calls)


def assert_same(result, config, variables):
    assert result[0] == config, result
    jax.tree.map(np.testing.assert_array_equal, result[1], variables)


def assert_told(result, endpoint, name, reason):
    kind, message = result
    assert kind is fv.WeightsError, result
    assert message.startswith(f"{PUBLISHED[name]}, the published weights of {name}, could not be downloaded")
    assert f" {address(endpoint, name)} (" in message
    assert message.endswith(f"checkpoint_path={PUBLISHED[name]!r}")
    assert re.search(reason, message)


def test_published_names():
    assert set(PUBLISHED) == set(ANY_RES.values()) == {name for name in VARIANTS if name.startswith("faster_vit_")}
    assert len(PUBLISHED) == len(set(PUBLISHED.values())) == 11
    assert re.fullmatch("[0-9a-f]{40}", REVISION)


def test_nothing_published(closed):
    kind, message = closed[1][UNPUBLISHED]
    assert kind is fv.WeightsError
    assert message.startswith("no published weights for 'testing': there are some for faster_vit_0_224, ")


def test_fetched_once(online, hub, saved):
    _, config, variables = saved
    for name in (WHOLE, "faster_vit_0_any_res"):
        assert_same(online[LOAD[name]], config, variables)
    changed, created = online[CREATE]
    assert changed == dataclasses.replace(config, num_classes=3)
    assert created["params"].pop("head")["kernel"].shape == (64, 3)
    body = {**variables, "params": {name: x for name, x in variables["params"].items() if name != "head"}}
    jax.tree.map(np.testing.assert_array_equal, created, body)
    assert hub.requests(WHOLE) == [("HEAD", None), ("GET", None)]


def test_cut_download_goes_on(online, hub, saved):
    assert_same(online[LOAD[CUT]], *saved[1:])
    first, second = [span for method, span in hub.requests(CUT) if method == "GET"]
    assert first is None
    assert 0 < int(re.fullmatch(r"bytes=(\d+)-", second)[1]) <= CUT_AT


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (STALLED, r"received 0 bytes, expected \d+"),
        (MISSING, "404 Client Error"),
        (FAILING, "500 Internal Server Error"),
        (GATED, "gated repo"),
        (FOREIGN, r"\(\w+: "),  # no hub, for it names no commit; the client's words differ by version
    ],
)
def test_failed_download(name, reason, online, hub):
    assert_told(online[LOAD[name]], hub.endpoint, name, reason)


def test_damaged_download(online):
    kind, message = online[LOAD[DAMAGED]]
    assert kind is fv.WeightsError
    assert message.startswith(f"{PUBLISHED[DAMAGED]} (kept at ")
    assert "; if it is damaged, delete that and try again): " in message
    assert "checksum: the file is damaged" in message
    assert pathlib.Path(re.search(r"kept at (.*?);", message)[1]).is_file()


def test_offline(online, hub, home, saved):
    seen = len(hub.seen)
    results = client(hub.endpoint, home, [LOAD[WHOLE], LOAD[AWAY]], HF_HUB_OFFLINE="1")
    assert len(hub.seen) == seen
    assert_same(results[LOAD[WHOLE]], *saved[1:])
    assert_told(results[LOAD[AWAY]], hub.endpoint, AWAY, "(?i)offline")


def test_no_hub(closed):
    endpoint, results = closed
    assert_told(results[LOAD[WHOLE]], endpoint, WHOLE, "Connection refused")


@pytest.mark.parametrize("function", ["create_model", "from_pretrained"])
def test_own_file_needs_no_hub(function, closed, saved):
    path, config, variables = saved
    assert_same(closed[1][OWN.format(function, WHOLE, str(path))], config, variables)
