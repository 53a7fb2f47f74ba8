"""Scores of a text are its log-probabilities, in one window or many."""

import json
import os

import numpy as np
import pytest
from helpers import ROOT, random_model, run_here
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding import scoring
from decoding.scoring import score

MODEL = random_model()  # a context of 24


with open(os.path.join(ROOT, "tests", "goldens", "transformers.json"), encoding="utf-8") as f:
    SCORES = json.load(f)["scores"]


@pytest.mark.parametrize("golden", SCORES, ids=lambda golden: str(len(golden["ids"])))
def test_scores_are_those_of_transformers(golden, tiny):
    found = score(tiny[1], golden["ids"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, golden["log_probabilities"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("n", [2, 3, 257, 258, 400, 601])
def test_scores_are_the_log_softmax_of_one_pass(n):
    """Also where they are computed in blocks, and at the edge of the context."""
    model = random_model(n_ctx=600, n_layer=1)
    ids = np.random.default_rng(n).integers(61, size=n).tolist()
    logits = model.forward([ids[:-1]], model.new_cache(), n_last=n - 1)[0].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    found = score(model, ids)
    assert found.shape == (n - 1,)
    np.testing.assert_allclose(found, expected[np.arange(n - 1), ids[1:]], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(score(model, np.array(ids)), found)


@pytest.mark.parametrize("n_given", [1, 2, 299, 300, 600, 601])
def test_the_rest_of_a_text_is_scored_as_in_the_whole(n_given):
    """With a cache that others have filled too: it is rolled back to what is given."""
    model = random_model(n_ctx=600, n_layer=1)
    ids = np.random.default_rng(n_given).integers(61, size=601).tolist()
    whole, cache = score(model, ids), model.new_cache()
    logits = model.forward([ids[:-1]], model.new_cache(), n_last=600)[0]
    for _ in range(2):
        scores, are_likeliest = scoring.score_rest(model, ids, n_given, cache)
        assert scores.dtype == np.float32 and are_likeliest.dtype == bool
        np.testing.assert_allclose(scores, whole[n_given - 1 :], rtol=0, atol=1e-4)
        assert are_likeliest.tolist() == (logits.argmax(axis=-1) == ids[1:])[n_given - 1 :].tolist()
        assert cache.length == (600 if n_given < 601 else 0)


def test_a_single_token_has_no_score():
    assert score(MODEL, [3]).shape == score(MODEL, []).shape == (0,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1] * 26, "26 ids exceed the context: at most 25 can be scored; cut them in windows"),
        ([1, 61], "token id 61 is outside the vocabulary, 0 to 60"),
        ([1, 2, -1], "token id -1 is outside the vocabulary"),
    ],
)
def test_score_refuses(ids, message):
    with pytest.raises(ValueError, match=message):
        score(MODEL, ids)


@settings(max_examples=300)
@given(st.integers(2, 90), st.integers(1, 24), st.data())
def test_windows_cover_each_token_once(n_ids, n_ctx, data):
    stride = data.draw(st.integers(1, n_ctx))
    scored = []
    for window, n_new in scoring.windows(n_ids, n_ctx, stride):
        seen = range(n_ids)[window]
        assert 1 <= n_new < len(seen) <= n_ctx + 1
        scored.extend(seen[-n_new:])
        # Every token but those of the first window sees all that the stride leaves it.
        assert seen.start == 0 or len(seen) - n_new >= min(n_ctx + 1 - stride, n_ids - n_new)
    assert scored == list(range(1, n_ids))


@pytest.mark.parametrize("stride", [1, 5, 24])
def test_log_probabilities_are_those_of_the_windows(stride):
    ids = np.random.default_rng(0).integers(61, size=60).tolist()
    found = scoring.log_probabilities(MODEL, ids, stride)
    for i in range(1, 60):
        start = max(0, -(-(i - 24) // stride)) * stride  # the first window that reaches it
        np.testing.assert_allclose(found[i - 1], score(MODEL, ids[start : i + 1])[-1], rtol=0, atol=1e-4)


def test_a_short_text_has_one_window():
    ids = np.random.default_rng(0).integers(61, size=25).tolist()
    np.testing.assert_array_equal(scoring.log_probabilities(MODEL, ids, 24), score(MODEL, ids))


@pytest.mark.parametrize("stride", [0, -1, 25, 2.5, "5", True])
def test_a_bad_stride_is_refused(stride):
    with pytest.raises(ValueError, match=r"stride is .*, expected a whole number from 1 to 24, the context"):
        scoring.log_probabilities(MODEL, [1, 2, 3], stride)


CORPUS = os.path.join(os.path.dirname(ROOT), "shared", "data", "tinyshakespeare.txt")


@pytest.mark.skipif(not os.path.exists(CORPUS), reason="the text that nano was trained on is not beside this checkout")
def test_the_held_out_text_is_predicted_as_in_training(tmp_path):
    """models/README.md has the figure that training gave."""
    with open(CORPUS, encoding="utf-8") as f:
        text = f.read()
    (tmp_path / "held_out.txt").write_text(text[len(text) * 9 // 10 :], encoding="utf-8")
    done = run_here("gpt2.py", "--model_size=nano", "--score", tmp_path / "held_out.txt", "--json")
    values = json.loads(done.stdout)
    assert (values["tokens"], values["cross_entropy"]) == (43558, 3.8779) and done.stderr == ""
