"""Prompts in the passes of other texts' steps: each text as if it had been fed alone."""

import numpy as np
import pytest
from helpers import Spied, random_model, shared_out
from reference import reference_logits

import gpt2
from batch import rows
from batch.beside import Beside, Piece

MODEL = random_model(n_ctx=64)
RNG = np.random.default_rng(0)
IDS = [RNG.integers(MODEL.hparams["n_vocab"], size=n).tolist() for n in (30, 1, 7, 22, 50)]


def fed_together(model):
    """Three rows that take a step while the prompts of the last two of them are fed; and their cache."""
    texts = [IDS[0], IDS[3], IDS[4]]
    n_longest = len(IDS[4]) - 1
    cache = model.new_cache(3, n_longest + 1, [n_longest - (len(ids) - 1) for ids in texts])
    cache.kv[:] = 0  # what is masked is finite
    model.forward([IDS[0][:-1]], gpt2.KVCache(cache.kv[:, :, :1, :, n_longest - 29 :]))
    model.forward([IDS[4][:20]], gpt2.KVCache(cache.kv[:, :, 2:]))
    beside = Beside(model)
    beside.pieces = [
        Piece(IDS[3][:-1], gpt2.KVCache(cache.kv[:, :, 1:2, :, n_longest - 21 :])),
        Piece(IDS[4][20:-1], gpt2.KVCache(cache.kv[:, :, 2:], 20)),
    ]
    cache = gpt2.KVCache(cache.kv, n_longest, cache.n_pad)
    return texts, beside.forward([ids[-1:] for ids in texts], cache), cache, beside


@pytest.mark.parametrize("model", [MODEL, shared_out(MODEL, 1), shared_out(MODEL, 3)], ids=["plain", "one", "three"])
def test_a_mixed_pass_is_that_of_each_text(model):
    texts, logits, cache, beside = fed_together(model)
    assert logits.shape == (3, 1, MODEL.hparams["n_vocab"]) and cache.length == len(IDS[4]) and not beside.pieces
    for row, ids in enumerate(texts):
        np.testing.assert_allclose(logits[row, 0], reference_logits(MODEL, ids)[-1], rtol=0, atol=1e-4)
        alone = MODEL.new_cache(n_seq=len(ids))
        MODEL.forward([ids], alone)
        np.testing.assert_allclose(cache.row(row).kv[..., : len(ids), :], alone.kv, rtol=0, atol=1e-5)


def test_the_next_pass_is_of_the_rows_alone():
    texts, _, cache, beside = fed_together(MODEL)
    longer = np.concatenate([cache.kv, np.zeros_like(cache.kv[..., :1, :])], axis=4)
    cache = gpt2.KVCache(longer, cache.length, cache.n_pad)
    logits = beside.forward([[3], [4], [5]], cache)
    for row, ids in enumerate(texts):
        np.testing.assert_allclose(logits[row, 0], reference_logits(MODEL, [*ids, row + 3])[-1], rtol=0, atol=1e-4)


def test_a_pass_that_settles_a_near_tie_feeds_no_prompt():
    beside = Beside(MODEL)
    beside.pieces = [Piece(IDS[3], MODEL.new_cache())]
    cache = MODEL.new_cache()
    logits = beside.forward([IDS[2]], cache, plainly=True)
    np.testing.assert_array_equal(logits, MODEL.forward([IDS[2]], MODEL.new_cache(), plainly=True))
    assert len(beside.pieces) == 1 and cache.length == len(IDS[2])


def test_near_ties_of_a_single_row_are_settled():
    """Beside a prompt it rounds otherwise than alone."""
    assert MODEL.passes.are_plain(1) and not Beside(MODEL).are_plain(1)


def test_prompts_need_no_passes_of_their_own(monkeypatch):
    """Nor more tokens at once than are allowed, unless one has more."""
    monkeypatch.setattr(rows, "N_BESIDE", 40)
    monkeypatch.setattr("gpt2.is_near_tie", lambda *args: False)
    spied = Spied(MODEL)
    seqs = [gpt2.Seq(ids, 3, gpt2.greedy) for ids in (IDS[3], IDS[2], IDS[1], IDS[4], IDS[0])]
    together, waiting, n_steps = rows.Rows(spied, 1e9, 8), list(seqs), 0
    while waiting or together.seqs:
        if n := together.n_joining(waiting):
            together.join(waiting[:n], [0] * n)
            waiting = waiting[n:]
        together.step()
        n_steps += 1
    assert spied.shapes == [(1, 21 + 6 + 3), (1, 49 + 4), (1, 29 + 5), (2, 1), (1, 1)] and n_steps == 5
    assert [seq.ids[seq.n_prompt :] for seq in seqs] == [
        list(gpt2.generate(MODEL, seq.ids[: seq.n_prompt], 3)) for seq in seqs
    ]
