"""What several test files need: random models of any shape, and the programs, as processes or in this one."""

import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest

from checkpoints.weights import expected_shapes, nest_params
from fast.library import blas
from fast.weights import Weights
from gpt2 import Model

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELS = os.path.join(ROOT, "models")


def random_variables(hparams, seed=0):
    """Weights by checkpoint name, large enough that every layer matters and the logits differ clearly."""
    rng = np.random.default_rng(seed)
    variables = {}
    for name, shape in expected_shapes(hparams):
        scale = 0.3 if name.endswith(("/w", "/b", "/g")) else 0.5
        array = rng.normal(scale=scale / (shape[-2] ** 0.5 / 4 if name.endswith("/w") else 1), size=shape)
        variables[f"model/{name}"] = np.float32(array + name.endswith("/g"))
    return variables


def random_model(n_vocab=61, n_ctx=24, n_embd=24, n_head=3, n_layer=3, seed=0, is_tied=True, order="C", **settings):
    """`settings`: what only relatives of GPT-2 have. `order` F: weights that lie transposed, as nanoGPT's."""
    hparams = {"n_vocab": n_vocab, "n_ctx": n_ctx, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer} | settings
    variables = random_variables(hparams, seed)
    if not is_tied:
        variables["model/lm_head"] = np.flipud(variables["model/wte"])
    variables = {name: np.asarray(array, order=order) for name, array in variables.items()}
    return Model(hparams, nest_params(variables, hparams, "random"))


def first_layer(model):
    """A draft for it: its embeddings and its first layer, which guess right now and then."""
    return Model(model.hparams | {"n_layer": 1}, model.params | {"blocks": model.params["blocks"][:1]})


class Spied(Model):
    """A model that remembers the shapes it was fed, and its cache."""

    def __init__(self, model):
        super().__init__(model.hparams, model.params)
        self.shapes = []

    def forward(self, tokens, cache, n_last=1, plainly=False):
        self.shapes.append(np.shape(tokens))
        self.cache = cache
        return super().forward(tokens, cache, n_last, plainly)


def shared_out(model, n_threads=3, way=None, is_packed=True):
    """The same model computed as a large one, all but single rows by a team of threads."""
    model = Model(model.hparams, model.params)
    model.passes.is_large, model.passes.weights, model.passes.n_threads = True, Weights(model.params), n_threads
    if blas.controller:
        before = blas.controller.get_num_threads()
        blas.set(max(n_threads, before))  # so many are started, and stay
        blas.set(before)
    if way:
        model.passes.weights.ways.update(dict.fromkeys(range(1, 65), way))
    if is_packed:
        model.passes.pack()
    return model


def latest(args):
    """Of `--name=value` flags that are given again, the last ones: the program takes none twice but --stop."""
    args = [str(arg) for arg in args]
    names = [arg.partition("=")[0] for arg in args]
    is_old = ["=" in args[i] and name != "--stop" and name in names[i + 1 :] for i, name in enumerate(names)]
    return [arg for arg, is_old in zip(args, is_old, strict=True) if not is_old]


def run(*args, stdin="", env=None, cwd=ROOT):
    """The finished process of `python args`, run from the project's folder, its output as text."""
    return subprocess.run(
        [sys.executable, *latest(args)],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        cwd=cwd,
        env={**os.environ, **(env or {})},
        timeout=120,
    )


def run_here(*args, stdin="", env=None, cwd=ROOT):
    """The same without a process, ten times as fast: for tests of what a program writes, not of how it runs."""
    argv = latest(args)
    if argv[0] == "-m":
        argv[:2] = [os.path.join(argv[1], "__main__.py")]
    program = partial(runpy.run_path, os.path.join(ROOT, argv[0]), run_name="__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        return subprocess.CompletedProcess(argv, *outcome(program))


@contextlib.contextmanager
def within(seconds, n_bytes):
    """What is done here takes less processor time, and less memory at its peak."""
    tracemalloc.start()
    started = time.process_time()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < seconds
    assert peak < n_bytes


def outcome(action):
    """(status, stdout, stderr) of `action` as the shell would see it. Any exception but SystemExit is a traceback."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGINT)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            action()
        except SystemExit as e:
            status = e.code
        finally:
            signal.signal(signal.SIGINT, handler)
    return status, out.getvalue(), err.getvalue()


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def write_bytes(path, content):
    with open(path, "wb") as f:
        f.write(content)
