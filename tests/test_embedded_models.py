"""The embedded pair: what it says, and that the draft resembles the target as 124M resembles 1558M."""

import json
import os

import numpy as np
import pytest
from helpers import MODELS, ROOT, run
from reference import reference_logits

import gpt2
from checkpoints.tensorflow import verify_checkpoint

with open(os.path.join(ROOT, "tests", "goldens", "embedded_greedy.json"), encoding="utf-8") as f:
    GOLDENS = json.load(f)
PROMPTS = [
    "ROMEO:",
    "JULIET:\nO",
    "KING RICHARD III:",
    "First Citizen:\nWe",
    "What is",
    "The king",
    "MENENIUS:\nSir,",
    "My lord,",
    "GLOUCESTER:",
    "To be",
]


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: f"{golden['size']}-{golden['prompt']!r}")
def test_greedy_text(golden, request):
    encoder, model = request.getfixturevalue(golden["size"])
    prompt_ids = encoder.encode(golden["prompt"], allow_special=True)
    ids = list(gpt2.generate(model, prompt_ids, golden["n"]))
    assert encoder.decode(ids) == golden["text"]
    assert ids == golden["ids"]


@pytest.mark.parametrize("size", ["tiny", "nano"])
def test_logits_equal_the_float64_reference(size, request):
    encoder, model = request.getfixturevalue(size)
    ids = encoder.encode("KING RICHARD III:\nNow is the winter of our discontent")
    logits = model.forward([ids], model.new_cache(), n_last=len(ids))[0]
    np.testing.assert_allclose(logits, reference_logits(model, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", ["tiny", "nano"])
def test_the_files_are_undamaged_and_small(size):
    verify_checkpoint(os.path.join(MODELS, size, "model.ckpt"))
    sizes = [
        os.path.getsize(os.path.join(MODELS, s, name))
        for s in ("tiny", "nano")
        for name in os.listdir(MODELS + "/" + s)
    ]
    assert sum(sizes) < 14e6


def agreement(draft, ids, n_prompt):
    """In which share of positions the draft's greedy choice is the token that follows."""
    logits = draft.forward([ids[:-1]], draft.new_cache(), n_last=len(ids) - n_prompt)[0]
    return np.mean(logits.argmax(axis=-1) == ids[n_prompt:])


def test_the_draft_resembles_the_target(tiny, nano):
    encoder, target = tiny
    _, draft = nano
    rng = np.random.default_rng(0)

    def sample(logits, position):  # temperature 0.8, through Gumbel noise
        return int((logits / 0.8 + rng.gumbel(size=logits.size)).argmax())

    shares, prompts = {}, [encoder.encode(prompt) for prompt in PROMPTS]
    for kind, sampler in (("greedy", gpt2.greedy), ("sampled", sample)):
        texts = gpt2.generate_batch(target, prompts, 100, sampler)
        shares[kind] = [agreement(draft, p + ids, len(p)) for p, ids in zip(prompts, texts, strict=True)]
    print({kind: f"{np.mean(values):.3f}" for kind, values in shares.items()})
    assert np.mean(shares["sampled"]) >= 0.35 and np.mean(shares["greedy"]) >= 0.70


def test_the_command_of_the_readme():
    """It prints a speech: lines of words in the manner of the plays, none of them broken."""
    done = run("gpt2.py", "ROMEO:", "--model_size", "tiny", "--n_tokens_to_generate", 40)
    golden = next(g for g in GOLDENS if (g["size"], g["prompt"]) == ("tiny", "ROMEO:"))
    assert (done.returncode, done.stderr) == (0, "") and golden["text"].startswith(done.stdout)
    assert len(done.stdout) > 60 and "\n" in done.stdout
