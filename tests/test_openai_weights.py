"""The published outputs of OpenAI's models. Each test runs where the real files are and is skipped elsewhere."""

import json
import os

import numpy as np
import pytest
from helpers import MODELS, ROOT, run

import gpt2
from checkpoints.openai import MODEL_FILES
from speculative import greedy_speculative_decoding
from utils import load_encoder_hparams_and_params

MODELS_DIR = os.environ.get("GPT2_MODELS_DIR", MODELS)


def goldens(name):
    with open(os.path.join(ROOT, "tests", "goldens", name), encoding="utf-8") as f:
        return json.load(f)


NUMBERS = goldens("openai_numbers.json")


def skip_without(size):
    missing = [name for name in MODEL_FILES if not os.path.exists(os.path.join(MODELS_DIR, size, name))]
    if missing:
        pytest.skip(f"OpenAI's {size} is not in {MODELS_DIR} (no {missing[0]}); GPT2_MODELS_DIR says where it is")


def openai_model(size):
    skip_without(size)
    encoder, hparams, params = load_encoder_hparams_and_params(size, MODELS_DIR)
    return encoder, gpt2.Model(hparams, params)


@pytest.mark.parametrize(
    "golden", goldens("openai_greedy.json"), ids=lambda golden: f"{golden['size']}-{golden['prompt'][:20]}"
)
def test_published_greedy_text(golden):
    encoder, model = openai_model(golden["size"])
    prompt_ids = encoder.encode(golden["prompt"], allow_special=True)
    assert prompt_ids == golden["prompt_ids"]
    ids = list(gpt2.generate(model, prompt_ids, golden["n"]))
    assert ids == golden["ids"]
    assert encoder.decode(ids) == golden["text"]


@pytest.mark.parametrize("size", ["124M", "1558M"])
def test_the_command_of_the_readme(size):
    skip_without(size)
    prompt = "Alan Turing theorized that computers would one day become"
    golden = next(g for g in goldens("openai_greedy.json") if (g["size"], g["prompt"]) == (size, prompt))
    done = run("gpt2.py", prompt, "--n_tokens_to_generate", 40, "--model_size", size, "--models_dir", MODELS_DIR)
    assert (done.returncode, done.stdout) == (0, golden["text"])


def test_speculation_gives_the_published_text():
    """The user's own use: 124M guesses for 1558M, and the text is 1558M's."""
    golden = next(g for g in goldens("openai_greedy.json") if g["size"] == "1558M")
    _, target = openai_model("1558M")
    _, draft = openai_model("124M")
    assert greedy_speculative_decoding(target, draft, golden["prompt_ids"], golden["n"]) == golden["ids"]


@pytest.mark.parametrize("golden", NUMBERS["logits_124M"])
def test_published_logits(golden):
    _, model = openai_model("124M")
    ids = golden["ids"]
    logits = model.forward([ids], model.new_cache(), n_last=len(ids))[0]
    if "values" in golden:
        found = logits[golden["row"], golden["at"]]
        np.testing.assert_allclose(found, golden["values"], rtol=0, atol=golden["tolerance"])
        assert abs(logits.mean(dtype=np.float64) - golden["mean_of_all"]) < golden["tolerance"]
    else:
        assert logits.argmax(axis=-1).tolist() == golden["argmax_per_row"]


@pytest.mark.parametrize("golden", NUMBERS["loss_124M"])
def test_published_loss(golden):
    _, model = openai_model("124M")
    ids = golden["ids"]
    logits = model.forward([ids], model.new_cache(), n_last=len(ids))[0, :-1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    loss = -log_p[np.arange(len(ids) - 1), ids[1:]].mean()
    assert abs(loss - golden["mean_cross_entropy"]) < 1e-4
