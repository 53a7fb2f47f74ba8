"""Near ties: which logits are computed again, and that then a text is what it is alone."""

from itertools import islice

import numpy as np
import pytest
from drafting import scripted
from helpers import random_model

import gpt2
from decoding import ties
from decoding.sampling import for_text, greedy, make_sampler
from decoding.ties import NEAREST, is_near_tie, margin, settled


def test_margin_is_the_lead_of_the_choice():
    logits = np.float32([1, 5, 4.5, 2])
    assert margin(greedy, logits, 0) == 0.5
    assert margin(greedy, np.float32([3, 3]), 0) == 0
    assert is_near_tie(greedy, np.float32([3, 3, -50]), 0) and is_near_tie(greedy, np.float32([-100, -100.001]), 0)
    assert not is_near_tie(greedy, np.float32([3, 3.0005]), 0) and not is_near_tie(greedy, np.float32([3]), 0)
    assert margin(greedy, np.float32([3]), 0) == np.inf
    sample = make_sampler(1.0, seed=3)
    scores = np.sort(sample.scores(logits, 9))
    assert margin(sample, logits, 9) == pytest.approx(scores[-1] - scores[-2])
    assert sample(logits, 9) == sample.scores(logits, 9).argmax()
    # At any temperature in units of the logits, as they are compared: a change of the logits is one of the scores.
    for temperature in (0.01, 3):
        sample = make_sampler(temperature, seed=3)
        changed = sample.scores(np.float32([1, 5, 4.25, 2]), 9) - sample.scores(logits, 9)
        np.testing.assert_allclose(changed, [0, 0, -0.25, 0], atol=1e-12)
    # Rounding errors of the logits are magnified by the penalty, the margin is not.
    penalized = for_text(make_sampler(0, repetition_penalty=4), [0, 1])
    assert margin(penalized, np.float32([-2, -1.5, -20]), 2) == pytest.approx(0.5)


def test_the_nearest_ties_are_a_part_of_the_near_ones():
    near, nearest = np.float32([3, 3.00004]), np.float32([3, 3.000003])
    assert is_near_tie(greedy, near, 0) and not is_near_tie(greedy, near, 0, NEAREST)
    assert is_near_tie(greedy, nearest, 0, NEAREST)


@pytest.mark.parametrize("slide_by", [None, 7])
def test_the_nearest_are_settled_as_a_text_without_guesses_has_them(monkeypatch, slide_by):
    """To the bit, whatever the cache holds; also in a window that slides."""
    model, prompt, plain = random_model(n_ctx=30), [3, 1, 4, 1], {}
    n_new = 27 if slide_by is None else 70

    def noting(logits, position):
        plain[position] = logits
        return greedy(logits, position)

    text = prompt + list(gpt2.generate(model, prompt, n_new, noting, slide_by=slide_by))
    seen = []

    def settled_anew(model, cache, row, start, seq):
        empty = gpt2.KVCache(np.zeros_like(cache.kv), cache.length)
        logits = settled(model, empty, row, start, seq)
        seen.append((start, seq.n_first))
        if len(seq.ids) > seq.n_first:
            np.testing.assert_array_equal(logits, plain[len(seq.ids)])
        return logits

    monkeypatch.setattr(ties, "NEAREST", 1e9)
    monkeypatch.setattr("gpt2.is_near_tie", lambda sample, logits, position: True)
    monkeypatch.setattr("gpt2.settled", settled_anew)
    draft = scripted("right", text, len(prompt), 4, model.hparams["n_vocab"])
    assert prompt + list(gpt2.generate(model, prompt, n_new, draft=draft, slide_by=slide_by)) == text
    assert len(seen) > 0.8 * n_new and (len(set(seen)) > 5) == bool(slide_by)


def test_a_row_of_a_padded_batch_is_settled_as_alone(monkeypatch):
    model = random_model(n_ctx=40)
    seqs = [gpt2.Seq([5], 9, greedy), gpt2.Seq(list(range(12)), 9, greedy)]
    cache = model.new_cache(2, n_pad=[11, 0])
    for _ in islice(gpt2.decode(model, cache, seqs), 10):
        pass
    for part in (0.0, 1e9):
        monkeypatch.setattr(ties, "NEAREST", part)
        for row, seq in enumerate(seqs):
            alone = model.forward([seq.ids], model.new_cache())[0, 0]
            np.testing.assert_allclose(settled(model, cache, row, 0, seq), alone, rtol=0, atol=1e-5)
