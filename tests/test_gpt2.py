import itertools

import numpy as np
import pytest
import reference
from helpers import random_model, shared_out
from reference import reference_logits

import gpt2
from fast import ACTIVATIONS

MODEL = random_model()
IDS = [int(i) for i in np.random.default_rng(1).integers(61, size=24)]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_embd": 8, "n_head": 1, "n_layer": 1},
        {"n_embd": 32, "n_head": 8, "n_vocab": 7, "n_layer": 2},
        {"n_ctx": 300, "n_layer": 2, "n_embd": 12},  # more than one block of queries
    ],
)
def test_logits_equal_the_float64_reference(shape):
    model = random_model(**shape)
    n_vocab, n_ctx = model.hparams["n_vocab"], model.hparams["n_ctx"]
    ids = np.random.default_rng(2).integers(n_vocab, size=n_ctx)
    logits = model.forward(ids[None], model.new_cache(), n_last=n_ctx)[0]
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference_logits(model, ids), rtol=0, atol=1e-4)


RELATIVES = [
    {"activation": "gelu"},
    {"activation": "relu", "layer_norm_epsilon": 0.1},
    {"activation": "silu", "n_inner": 40},
    {"activation": "gelu_new", "is_tied": False, "order": "F"},
]


@pytest.mark.parametrize("settings", RELATIVES, ids=str)
@pytest.mark.parametrize("n_threads", [None, 2])
def test_relatives_of_gpt2_equal_the_reference_too(settings, n_threads):
    model = whole = random_model(**settings)
    if n_threads:
        pytest.importorskip("threadpoolctl", reason="without threadpoolctl no pass is shared out")
        model = shared_out(whole, n_threads)
    cache = model.new_cache()
    logits = np.concatenate(
        [model.forward([ids], cache, n_last=len(ids))[0] for ids in (IDS[:16], IDS[16:21], IDS[21:22])]
    )
    np.testing.assert_allclose(logits, reference_logits(whole, IDS[:22]), rtol=0, atol=1e-4)
    other = random_model(n_inner=settings.get("n_inner")).forward([IDS], whole.new_cache(), n_last=24)[0]
    assert abs(other[:22] - logits).max() > 2e-4  # it is not GPT-2 itself


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_their_formulas_everywhere(name):
    x = np.linspace(-12, 12, 200_001, dtype=np.float32)  # more than one piece
    expected = reference.ACTIVATIONS[name](x.astype(np.float64))
    got = ACTIVATIONS[name](x.copy())
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, rtol=2e-7, atol=4e-7)


@pytest.mark.parametrize("chunks", [[1] * 24, [24], [5, 1, 1, 9, 8], [23, 1], [1, 23], [12, 12]])
def test_any_chunking_gives_the_same_logits(chunks):
    expected = MODEL.forward([IDS], MODEL.new_cache(), n_last=24)[0]
    cache, rows, rest = MODEL.new_cache(), [], iter(IDS)
    for n in chunks:
        rows.extend(MODEL.forward([list(itertools.islice(rest, n))], cache, n_last=n)[0])
    assert cache.length == 24
    np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-4)


def test_n_last_gives_the_last_rows():
    every = MODEL.forward([IDS], MODEL.new_cache(), n_last=24)
    for n_last in (1, 5):
        last = MODEL.forward([IDS], MODEL.new_cache(), n_last=n_last)
        np.testing.assert_allclose(last, every[:, -n_last:], rtol=0, atol=1e-4)


def test_a_batch_equals_single_rows():
    batch = np.random.default_rng(3).integers(61, size=(5, 10))
    cache = MODEL.new_cache(n_batch=5)
    first = MODEL.forward(batch[:, :7], cache, n_last=7)
    second = MODEL.forward(batch[:, 7:], cache, n_last=3)
    for row, ids in enumerate(batch):
        single = MODEL.forward(ids[None], MODEL.new_cache(), n_last=10)[0]
        np.testing.assert_allclose(np.concatenate([first[row], second[row]]), single, rtol=0, atol=1e-4)


def test_rolling_back_forgets():
    cache = MODEL.new_cache()
    MODEL.forward([IDS[:10]], cache)
    MODEL.forward([[60, 60, 60]], cache)
    cache.length = 10
    after = MODEL.forward([IDS[10:12]], cache)
    fresh = MODEL.forward([IDS[:12]], MODEL.new_cache())
    np.testing.assert_allclose(after, fresh, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [-1, 11])
def test_a_cache_only_rolls_back(length):
    cache = MODEL.new_cache()
    MODEL.forward([IDS[:10]], cache)
    with pytest.raises(ValueError, match=f"length {length} is not in 0 to 10"):
        cache.length = length


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [2, 2, 0], [0, 1], [2], [1, 0, 2, 2, 0, 1]])
@pytest.mark.parametrize("n_same", [0, 4])
def test_taken_rows_of_a_cache_equal_fresh_ones(rows, n_same):
    texts = np.random.default_rng(4).integers(61, size=(3, 12))
    texts[:, :n_same] = texts[0, :n_same]
    taken, fresh = MODEL.new_cache(n_batch=3), MODEL.new_cache(n_batch=len(rows))
    MODEL.forward(texts[:, :10], taken)
    MODEL.forward(texts[rows, :10], fresh)
    taken.take(rows, n_same)
    assert taken.length == 10 and taken.kv.shape == fresh.kv.shape
    np.testing.assert_allclose(*(cache.kv[..., :10, :] for cache in (taken, fresh)), rtol=0, atol=1e-5)
    after = [MODEL.forward(texts[rows, 10:], cache, n_last=2) for cache in (taken, fresh)]
    np.testing.assert_allclose(*after, rtol=0, atol=1e-4)


def test_taking_rows_copies_only_what_differs():
    cache = MODEL.new_cache(n_batch=2)
    MODEL.forward([IDS[:6], IDS[6:12]], cache)
    before = cache.kv.copy()
    cache.take([1, 1], n_same=4)
    assert (cache.kv[..., :4, :] == before[..., :4, :]).all()
    assert (cache.kv[:, :, 0, :, 4:6] == before[:, :, 1, :, 4:6]).all()


def test_everything_is_float32():
    seen = []

    def spy(name):
        function = getattr(gpt2, name)

        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.append((name, result.dtype))
            return result

        return wrapped

    names = ["gelu", "layer_norm", "linear", "attend", "attention", "feed_forward", "transformer_block"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(gpt2, name, spy(name))
        model = gpt2.Model(MODEL.hparams, MODEL.params)  # which looks up its activation
        cache = model.new_cache()
        model.forward([IDS[:5]], cache)
        model.forward([IDS[5:6]], cache)
    assert {name for name, _ in seen} == set(names)
    assert {dtype for _, dtype in seen} | {cache.kv.dtype} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("tokens", "n_last", "message"),
    [
        ([[61]], 1, "token id 61 is outside the vocabulary, 0 to 60"),
        ([[3, -1]], 1, "token id -1 is outside"),
        ([list(range(25))], 1, "0 tokens and 25 more exceed the context of 24"),
        ([[]], 1, "n_last 1"),
        ([[1, 2]], 3, "n_last 3"),
        ([[1], [2]], 1, r"int64\[2, 1\]"),
        ([[1.5]], 1, "float64"),
    ],
)
def test_forward_names_what_is_wrong(tokens, n_last, message):
    cache = MODEL.new_cache()
    with pytest.raises(ValueError, match=message):
        MODEL.forward(tokens, cache, n_last)
    assert cache.length == 0


# ----------------------------------------------------------------------------------------------------------------------
# generate
# ----------------------------------------------------------------------------------------------------------------------


def greedy_without_cache(model, ids, n_tokens):
    ids = list(ids)
    for _ in range(n_tokens):
        ids.append(int(model.forward([ids], model.new_cache())[0, -1].argmax()))
    return ids[-n_tokens:]


@pytest.mark.parametrize("n_prompt", [1, 7, 23, 24])
def test_generate_fills_the_context_exactly(n_prompt):
    n_tokens = 24 + 1 - n_prompt
    prompt = IDS[:n_prompt]
    ids = list(gpt2.generate(MODEL, prompt, n_tokens))
    assert ids == greedy_without_cache(MODEL, prompt, n_tokens)
    assert prompt == IDS[:n_prompt]
    assert all(type(i) is int for i in ids)


@pytest.mark.parametrize("n_tokens", [0, -3, 2.0, "40", True, None])
def test_generate_refuses_a_bad_number_at_the_call(n_tokens):
    with pytest.raises(ValueError, match="tokens to generate, expected a whole number of 1 or more"):
        gpt2.generate(MODEL, IDS[:3], n_tokens)


def test_generate_refuses_more_than_the_context_at_the_call():
    with pytest.raises(ValueError, match=r"20 prompt tokens and 6 new ones exceed the context of 24: at most 5"):
        gpt2.generate(MODEL, IDS[:20], 6)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        gpt2.generate(MODEL, [], 6)


@pytest.mark.parametrize("n_draft", range(5))
def test_drafts_do_not_change_the_text(n_draft):
    prompt, n_tokens = IDS[:4], 21
    expected = greedy_without_cache(MODEL, prompt, n_tokens)
    rng = np.random.default_rng(n_draft)

    def right_or_wrong(tokens, n_max):
        at = len(tokens) - len(prompt)
        guesses = [i if rng.random() < 0.7 else (i + 1) % 61 for i in expected[at : at + n_draft]]
        return guesses[:n_max]

    assert list(gpt2.generate(MODEL, prompt, n_tokens, draft=right_or_wrong)) == expected


def test_sample_gets_each_position():
    positions = []

    def sample(logits, position):
        assert logits.shape == (61,) and logits.dtype == np.float32
        positions.append(position)
        return 5

    assert list(gpt2.generate(MODEL, IDS[:4], 6, sample)) == [5] * 6
    assert positions == list(range(4, 10))


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9, 1e15])
def test_no_score_is_so_large_that_the_future_is_seen(scale):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 20, 8), np.float32) for _ in range(3))
    q *= np.float32(scale)
    seen = gpt2.attend(q, k, v)
    k[:, :, 10:], v[:, :, 10:] = 100 * np.abs(k[:, :, 10:]), 1e6
    assert np.array_equal(gpt2.attend(q, k, v)[:, :, :10], seen[:, :, :10])
