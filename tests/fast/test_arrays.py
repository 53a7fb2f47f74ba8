"""Attention and formulas that are computed in parts."""

import numpy as np
import pytest

from fast import arrays, server
from fast.threads import team
from gpt2 import MASKED, attend, gelu


@pytest.mark.skipif(not server.find(), reason="this BLAS has no threads that can be used")
@pytest.mark.parametrize("n_texts", [1, 3, 8, 9, 70])
@pytest.mark.parametrize("n_rows", [1, 5, 20])
@pytest.mark.parametrize("is_padded", [False, True])
def test_attention_is_the_same_by_texts_by_heads_and_on_one_thread(n_texts, n_rows, is_padded, monkeypatch):
    monkeypatch.setattr(arrays, "N_SHARED_PRODUCTS", 0)
    rng, n_seq = np.random.default_rng(n_texts), 31
    q = rng.standard_normal((n_texts, 5, n_rows, 4), np.float32)
    k, v = rng.standard_normal((2, n_texts, 5, n_seq, 4), np.float32)
    padding = None
    if is_padded:
        n_pad = rng.integers(n_seq - n_rows, size=n_texts)
        padding = np.where(np.arange(n_seq) < n_pad[:, None], np.float32(MASKED), np.float32(0))[:, None, None]
    expected, parts, run = attend(q, k, v, padding), [], team.run
    monkeypatch.setattr(team, "run", lambda works: (parts.append(len(works)), run(works)))
    with team.of(2):
        got = attend(q, k, v, padding)
    assert parts == [2]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, arrays.N_PIECE, arrays.N_PIECE + 1, 3 * arrays.N_PIECE + 7])
def test_a_formula_in_pieces_gives_what_it_gives_at_once(n):
    x = np.random.default_rng(n).standard_normal((1, n), np.float32)
    np.testing.assert_allclose(gelu(x.copy()), gelu.__wrapped__(x), rtol=1e-6)
