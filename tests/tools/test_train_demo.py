import glob
import importlib.util
import os
import random
import re

import numpy as np
import pytest
from helpers import ROOT

import gpt2
from checkpoints.tensorflow import verify_checkpoint
from checkpoints.weights import nest_params
from utils import load_encoder_hparams_and_params

# importorskip would import TensorFlow in every worker while tests are collected.
pytestmark = [
    pytest.mark.xdist_group("tensorflow"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("tensorflow", "tokenizers")),
        reason="TensorFlow or tokenizers is not installed; TensorFlow has no wheel for this Python yet",
    ),
]


@pytest.fixture(scope="module")
def train_demo():
    spec = importlib.util.spec_from_file_location("train_demo", os.path.join(ROOT, "tools", "train_demo.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def speeches():
    """A text in the manner of a play, from the words of the project's own source."""
    words = set()
    for path in glob.glob(os.path.join(ROOT, "**", "*.py"), recursive=True):
        with open(path, encoding="utf-8") as f:
            words |= set(re.findall(r"[a-z]{3,}", f.read()))
    rng = random.Random(0)
    words = sorted(words)
    return "\n\n".join(f"{rng.choice(words).upper()}:\n{' '.join(rng.choices(words, k=12))}" for _ in range(700))


def test_training_writes_models_that_load(train_demo, tmp_path, capsys, monkeypatch):
    """With fewer layers and windows, which TensorFlow takes long to trace."""
    monkeypatch.setitem(train_demo.TINY, "n_layer", 2)
    monkeypatch.setitem(train_demo.NANO, "n_layer", 1)
    monkeypatch.setattr(train_demo, "N_BATCH", 2)
    (tmp_path / "text.txt").write_text(speeches(), encoding="utf-8")
    train_demo.main(str(tmp_path / "text.txt"), models_dir=str(tmp_path), n_steps=1, n_distil_steps=1)
    printed = capsys.readouterr().out
    for name, n_layer in (("tiny", 2), ("nano", 1)):
        encoder, hparams, params = load_encoder_hparams_and_params(name, str(tmp_path))
        verify_checkpoint(str(tmp_path / name / "model.ckpt"))
        assert (hparams["n_layer"], hparams["n_vocab"], encoder.n_vocab) == (n_layer, 2048, 2048)
        assert encoder.eot_id == 2047 and encoder.token_ids["!"] == 0
        assert len(list(gpt2.generate(gpt2.Model(hparams, params), encoder.encode("The"), 5))) == 5
        assert re.search(rf"{name}: \d+\.\d{{4}} nats a token on the held-out text", printed)


def test_the_trained_model_is_the_numpy_model(train_demo):
    """The same weights give the same logits in TensorFlow, dropout off."""
    params = train_demo.init_params(train_demo.NANO)
    variables = {}
    for name, variable in train_demo.named_variables(params):
        # At initialisation biases are 0 and gains 1, which would hide their being swapped or left out.
        variable.assign_add(np.random.default_rng(len(name)).normal(scale=0.05, size=variable.shape).astype(np.float32))
        value = variable.numpy()
        variables[name] = value[None] if name.endswith("/w") else value
    model = gpt2.Model(train_demo.NANO, nest_params(variables, train_demo.NANO, "TensorFlow"))
    tokens = np.random.default_rng(0).integers(2048, size=(2, 100)).astype(np.int32)
    expected = train_demo.forward(params, tokens, 4, 0.0).numpy().reshape(2, 100, 2048)
    found = model.forward(tokens, model.new_cache(2), n_last=100)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
