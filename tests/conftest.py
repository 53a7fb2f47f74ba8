"""What several test files need: random models of any shape, the embedded ones, and the program as a subprocess."""

import hashlib
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import settings

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELS = os.path.join(ROOT, "models")
sys.path.insert(0, ROOT)

from fast.shares import Shares  # noqa: E402
from gpt2 import Model  # noqa: E402
from utils import expected_shapes, load_encoder_hparams_and_params, nest_params  # noqa: E402

# The same examples in every run, however slow the machine, and no folder of them.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def random_variables(hparams, seed=0):
    """Weights by checkpoint name, large enough that every layer matters and the logits differ clearly."""
    rng = np.random.default_rng(seed)
    variables = {}
    for name, shape in expected_shapes(hparams):
        scale = 0.3 if name.endswith(("/w", "/b", "/g")) else 0.5
        array = rng.normal(scale=scale / (shape[-2] ** 0.5 / 4 if name.endswith("/w") else 1), size=shape)
        variables[f"model/{name}"] = np.float32(array + name.endswith("/g"))
    return variables


def random_model(n_vocab=61, n_ctx=24, n_embd=24, n_head=3, n_layer=3, seed=0):
    hparams = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    return Model(hparams, nest_params(random_variables(hparams, seed), hparams, "random"))


def shared_out(model, n_threads=3, way=None, is_packed=True):
    """The same model computed as a large one, all but single rows in shares."""
    model = Model(model.hparams, model.params)
    model.passes.is_large, model.passes.shares = True, Shares(model.hparams, model.params, n_threads)
    if way:
        model.passes.shares.ways.update(dict.fromkeys(range(1, 65), way))
    if is_packed:
        model.passes.shares.pack()
    return model


@pytest.fixture(scope="session")
def tiny():
    """(encoder, Model) of the embedded target."""
    encoder, hparams, params = load_encoder_hparams_and_params("tiny", MODELS)
    return encoder, Model(hparams, params)


@pytest.fixture(scope="session")
def nano():
    """(encoder, Model) of the embedded draft."""
    encoder, hparams, params = load_encoder_hparams_and_params("nano", MODELS)
    return encoder, Model(hparams, params)


def run(*args, stdin="", env=None, cwd=ROOT):
    """The finished process of `python args`, run from the project's folder, its output as text."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=120,
    )


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between attempts to download, which are not made."""
    pauses = []
    monkeypatch.setattr("download.time.sleep", pauses.append)
    return pauses


@pytest.fixture
def server(monkeypatch):
    """A running Server, where downloads go."""
    import download_server  # it needs this file

    with download_server.Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        monkeypatch.setenv("GPT2_BASE_URL", server.url)
        monkeypatch.setattr("utils.SHA256", download_server.HASHES)
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def etag_server(server):
    server.etag = lambda content: f'"{hashlib.md5(content).hexdigest()}"'
    return server
