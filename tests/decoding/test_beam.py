import itertools
import json
import os
import tracemalloc

import numpy as np
import pytest
from helpers import ROOT, Spied, random_model

from decoding.beam import beam_search, likeliest
from gpt2 import generate

with open(os.path.join(ROOT, "tests", "goldens", "transformers.json"), encoding="utf-8") as f:
    GOLDENS = json.load(f)["beams"]
MODEL = random_model()
PROMPT = [3, 1, 4, 1, 5]


def log_probability(model, prompt, ids):
    """Of `ids` after `prompt`, by one pass over the whole text and in float64."""
    logits = model.forward([prompt + ids[:-1]], model.new_cache(), n_last=len(ids))[0].astype(np.float64)
    return sum(row[i] - np.log(np.exp(row - row.max()).sum()) - row.max() for row, i in zip(logits, ids, strict=True))


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda g: f"{g['eot_id']}-{g['n_beam']}-{g['length_penalty']}")
def test_beams_are_those_of_transformers(golden, tiny):
    _, model = tiny
    found = beam_search(
        model, golden["prompt"], golden["n_tokens"], golden["n_beam"], golden["length_penalty"], [golden["eot_id"]]
    )
    expected = golden["beams"]
    assert [ids for _, ids in found] == [ids for _, ids in expected]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], rtol=0, atol=1e-4)


def test_the_goldens_hold_hypotheses_that_end_early():
    lengths = [[len(ids) for _, ids in golden["beams"]] for golden in GOLDENS]
    assert sum(min(n) < golden["n_tokens"] for n, golden in zip(lengths, GOLDENS, strict=True)) > 10
    assert any(len(set(n)) > 2 for n in lengths)


@pytest.mark.parametrize("n_tokens", [1, 2, 20])
@pytest.mark.parametrize("length_penalty", [-1, 0, 1.0])
def test_one_beam_is_greedy(n_tokens, length_penalty):
    greedy = list(generate(MODEL, PROMPT, n_tokens))
    ((_, ids),) = beam_search(MODEL, PROMPT, n_tokens, 1, length_penalty)
    assert ids == greedy and all(type(i) is int for i in ids)
    eot_id = greedy[-1]
    ((_, ids),) = beam_search(MODEL, PROMPT, n_tokens, 1, length_penalty, [eot_id])
    assert ids == greedy[: greedy.index(eot_id) + 1]


@pytest.mark.parametrize("eot_id", [None, 32])
@pytest.mark.parametrize("length_penalty", [0.6, 1.0])
def test_scores_are_the_sums_that_one_pass_gives(length_penalty, eot_id):
    prompt = list(PROMPT)
    eot_ids = [] if eot_id is None else [eot_id]
    found = beam_search(MODEL, prompt, 20, 6, length_penalty, eot_ids)  # to the very edge of the context
    assert prompt == PROMPT and len(found) == 6
    assert len({tuple(ids) for _, ids in found}) == 6
    assert (min(len(ids) for _, ids in found) < 20) == (eot_id is not None)
    for score, ids in found:
        assert len(ids) == 20 or ids.index(eot_id) == len(ids) - 1
        assert score == pytest.approx(log_probability(MODEL, PROMPT, ids) / len(ids) ** length_penalty, abs=1e-4)
    scores = [score for score, _ in found]
    assert scores == sorted(scores, reverse=True)


def every_continuation(n_vocab, n_tokens, eot_id):
    for n in range(1, n_tokens + 1):
        for ids in itertools.product(range(n_vocab), repeat=n):
            if eot_id not in ids[:-1] and (n == n_tokens or ids[-1] == eot_id):
                yield list(ids)


@pytest.mark.parametrize("n_tokens", [1, 2])
@pytest.mark.parametrize("eot_id", [None, 0, 3])
@pytest.mark.parametrize("length_penalty", [0, 1.0, 1.5, -1])
@pytest.mark.parametrize("seed", range(3))
def test_as_many_beams_as_ids_find_the_best_pairs(n_tokens, eot_id, length_penalty, seed):
    """Then no first token is ever dropped, and the search is exhaustive."""
    model = random_model(n_vocab=6, n_ctx=5, n_embd=8, n_head=2, n_layer=2, seed=seed)
    scored = [
        (log_probability(model, [2, 5], ids) / len(ids) ** length_penalty, ids)
        for ids in every_continuation(6, n_tokens, eot_id)
    ]
    best = sorted(scored, reverse=True)[:6]
    found = beam_search(model, [2, 5], n_tokens, 6, length_penalty, [] if eot_id is None else [eot_id])
    assert [ids for _, ids in found] == [ids for _, ids in best]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in best], rtol=0, atol=1e-4)


def test_the_prompt_is_fed_once_and_then_a_token_a_beam():
    model = Spied(MODEL)
    beam_search(model, PROMPT, 10, 4)
    assert model.shapes == [(1, 5)] + [(4, 1)] * 9


def test_reordered_rows_of_the_cache_equal_fresh_ones():
    model = Spied(MODEL)
    found = beam_search(model, PROMPT, 15, 4)
    n = len(PROMPT) + 14  # the last token is never fed
    assert model.cache.length == n
    for _, ids in found:
        fresh = MODEL.new_cache()
        MODEL.forward([PROMPT + ids[:-1]], fresh)
        differences = [np.abs(model.cache.kv[:, :, row, :, :n] - fresh.kv[:, :, 0, :, :n]).max() for row in range(4)]
        assert min(differences) < 1e-5


def test_a_vocabulary_of_one_ends_at_once():
    model = random_model(n_vocab=1, n_ctx=5, n_embd=8, n_head=2, n_layer=1)
    assert beam_search(model, [0], 4, 1, eot_ids=[0]) == [(0.0, [0])]
    assert beam_search(model, [0], 4, 1) == [(0.0, [0, 0, 0, 0])]


@pytest.mark.parametrize("n_rows", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 3, 11, 12, 20])
def test_likeliest_are_the_largest_in_order(n, n_rows):
    totals = np.random.default_rng(n).integers(5, size=(3, 4)).astype(float)  # with ties: the first one first
    every = sorted((-total, row, i) for (row, i), total in np.ndenumerate(totals))
    found = likeliest([totals[:n_rows], totals[n_rows:]], n)
    assert len(found) == min(n, 12) and [total for total, _, _ in found] == [-total for total, _, _ in every[:n]]
    assert found == sorted(found, key=lambda c: (-c[0], c[1:])) and all(totals[row, i] == t for t, row, i in found)


class OfOpenAI:
    """What beam search sees of 124M, with random logits; `shapes` are those of what it was fed."""

    def __init__(self):
        self.hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12}
        self.shapes = []

    def new_cache(self, n_seq):
        return self

    def take(self, rows, n_same):
        pass

    def forward(self, tokens, cache):
        self.shapes.append(np.shape(tokens))
        return np.random.default_rng(0).random((len(tokens), 1, 50257), np.float32)


def test_scoring_takes_little_memory_beside_the_logits():
    """In float64 and all at once it took twelve times that of the logits, for 2000 beams 5 GB."""
    tracemalloc.start()
    beam_search(OfOpenAI(), [1], 2, 150)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 150 * 50257 * 4


def test_more_beams_than_memory_are_refused_before_any_work(monkeypatch):
    model = OfOpenAI()
    monkeypatch.setattr("fast.memory.available_bytes", lambda: 4e9)
    with pytest.raises(MemoryError, match="6.4 GB are needed for the keys, values and logits of 2000 beams, 4.0 GB"):
        beam_search(model, [1], 40, 2000)
    assert model.shapes == []
    assert len(beam_search(model, [1], 1, 2000)) == 2000  # whose keys are of one row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_beam": 0}, "n_beam is 0, expected a whole number from 1 to 61, the size of the vocabulary"),
        ({"n_beam": 62}, "n_beam is 62, expected a whole number from 1 to 61"),
        ({"n_beam": 2.0}, "n_beam is 2.0"),
        ({"n_beam": "x"}, "n_beam is 'x'"),
        ({"n_beam": True}, "n_beam is True"),
        ({"length_penalty": float("nan")}, "length_penalty is nan, expected a number from -10 to 10"),
        ({"length_penalty": 11}, "length_penalty is 11"),
        ({"length_penalty": "x"}, "length_penalty is 'x'"),
        ({"n_tokens": 21}, "5 prompt tokens and 21 new ones exceed the context of 24"),
        ({"n_tokens": 0}, "0 tokens to generate"),
        ({"prompt_ids": []}, "the prompt has no tokens"),
        ({"prompt_ids": [61]}, "token id 61 is outside the vocabulary"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        beam_search(MODEL, **({"prompt_ids": PROMPT, "n_tokens": 5, "n_beam": 2} | arguments))
