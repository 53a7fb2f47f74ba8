"""Texts beyond the context, several texts at once, and numbers that are none."""

import numpy as np
import pytest
from drafting import DRAFT, TARGET, drafters, limited, samplers
from helpers import Spied, random_model, shared_out
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.sampling import for_text, greedy, make_sampler
from decoding.scoring import score
from gpt2 import Model, generate, generate_batch

MODEL = random_model()  # a context of 24
PROMPT = [3, 1, 4, 1, 5]

# ----------------------------------------------------------------------------------------------------------------------
# Beyond the context
# ----------------------------------------------------------------------------------------------------------------------


def windows_without_cache(model, ids, n_tokens, sample, slide_by):
    """Each token from a pass over the whole window, which begins at a multiple of slide_by."""
    ids, n_ctx = list(ids), model.hparams["n_ctx"]
    sample = for_text(sample, ids)
    for _ in range(n_tokens):
        start = 0
        while len(ids) - start > n_ctx:
            start += slide_by
        ids.append(sample(model.forward([ids[start:]], model.new_cache())[0, 0], len(ids)))
    return ids[-n_tokens:]


@pytest.mark.parametrize("n_prompt", [1, 23, 24, 25, 70])
@pytest.mark.parametrize("slide_by", [1, 7, 12, 24])
def test_sliding_equals_passes_over_the_newest_tokens(n_prompt, slide_by):
    prompt = np.random.default_rng(n_prompt).integers(61, size=n_prompt).tolist()
    for sample in (make_sampler(1.0, seed=3), make_sampler(0, repetition_penalty=1.5)):
        expected = windows_without_cache(MODEL, prompt, 80, sample, slide_by)
        assert len(set(expected)) > 5
        assert list(generate(MODEL, prompt, 80, sample, slide_by=slide_by)) == expected


def test_sliding_by_one_sees_the_newest_tokens_always():
    """Whatever was before them, the newest n_ctx tokens decide."""
    newest = np.random.default_rng(0).integers(61, size=24).tolist()
    first, second = (next(generate(MODEL, text + newest, 1, slide_by=1)) for text in ([], [7] * 60))
    assert first == second == int(MODEL.forward([newest], MODEL.new_cache())[0, 0].argmax())


def test_a_text_that_fits_does_not_slide():
    assert list(generate(MODEL, PROMPT, 20, slide_by=1)) == list(generate(MODEL, PROMPT, 20))


def test_half_a_window_at_a_time_costs_half_a_window():
    model = Spied(MODEL)
    assert len(list(generate(model, PROMPT, 100, slide_by=12))) == 100
    fed = [n for _, n in model.shapes]
    assert len(fed) == 100 and set(fed) == {1, len(PROMPT), 13}
    assert fed.count(13) == (104 - 24 + 11) // 12


@pytest.mark.parametrize("slide_by", [0, -1, 25, 1.0, "1", True])
def test_a_bad_slide_is_refused_at_the_call(slide_by):
    with pytest.raises(ValueError, match=r"slide_by is .*, expected a whole number from 1 to 24, the context"):
        generate(MODEL, PROMPT, 5, slide_by=slide_by)


@pytest.mark.parametrize("n_draft", [1, 4, 11])
@pytest.mark.parametrize("slide_by", [1, 20])
def test_every_drafter_gives_the_plain_text_beyond_the_context(n_draft, slide_by):
    """A context of 40, texts of up to 140 tokens."""
    rng = np.random.default_rng(n_draft)
    for n_prompt, sample in zip([2, 39, 41, 90, 5], samplers(n_draft), strict=True):
        prompt = rng.integers(61, size=n_prompt).tolist()
        plain = list(generate(TARGET, prompt, 50, sample, slide_by=slide_by))
        for drafter in drafters(DRAFT, n_draft, sample, prompt + plain, len(prompt)):
            assert list(generate(TARGET, prompt, 50, sample, limited(drafter), slide_by)) == plain


def test_drafts_beyond_the_context_save_passes():
    counted = Spied(random_model(n_ctx=128))
    plain = list(generate(counted, PROMPT, 400, slide_by=64))
    n_plain, counted.shapes = len(counted.shapes), []
    known = PROMPT + plain
    assert list(generate(counted, PROMPT, 400, draft=lambda t, n: known[len(t) :][: min(n, 5)], slide_by=64)) == plain
    assert len(counted.shapes) < n_plain / 5


def test_a_cache_of_the_prompt_is_used():
    model, cache = Spied(MODEL), MODEL.new_cache()
    MODEL.forward([PROMPT[:3]], cache)
    assert list(generate(model, PROMPT, 10, cache=cache)) == list(generate(MODEL, PROMPT, 10))
    assert model.shapes == [(1, 2)] + [(1, 1)] * 9
    assert cache.length == 14


# ----------------------------------------------------------------------------------------------------------------------
# Several texts
# ----------------------------------------------------------------------------------------------------------------------

BATCH_PROMPTS = [
    "ROMEO:",
    "What",
    "KING RICHARD III:\nNow is the winter of our discontent",
    "\n",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n",
    "My lord, the king",
    "JULIET:\nO",
    "What",
]


def some_samplers():
    return [
        greedy,
        make_sampler(1.0, seed=1),
        make_sampler(0.8, top_k=40, seed=2),
        make_sampler(0, repetition_penalty=1.3),
        greedy,
        make_sampler(1.2, top_p=0.9, seed=3),
        make_sampler(0.9, min_p=0.05, repetition_penalty=1.2, seed=4),
        make_sampler(1.0, seed=2**64 - 1),
    ]


def test_a_batch_gives_the_texts_of_each_alone(tiny, nano):
    """8 prompts of 8 lengths, 100 tokens each: greedy by many layers, then a sampler for each by few."""
    for (encoder, model), samples in ((tiny, [greedy] * 8), (nano, some_samplers())):
        prompts = [encoder.encode(text) for text in BATCH_PROMPTS]
        assert len({len(prompt) for prompt in prompts}) >= 6
        alone = [list(generate(model, *pair)) for pair in zip(prompts, [100] * 8, samples, strict=True)]
        together = generate_batch(model, prompts, 100, samples)
        assert together == alone
        assert all(type(i) is int for ids in together for i in ids)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=6), st.integers(0, 99))
def test_each_text_of_a_batch_ends_on_its_own(shapes, seed):
    """Any lengths of prompts, each text ending after any number of tokens: the longest prompt first, or last."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(61, size=n).tolist() for n, _ in shapes]
    samples = [make_sampler(1.5, seed=seed + i) for i in range(len(shapes))]
    alone = [list(generate(MODEL, *pair)) for pair in zip(prompts, [12] * len(shapes), samples, strict=True)]
    ends = [ids[:n] for ids, (_, n) in zip(alone, shapes, strict=True)]
    found = generate_batch(MODEL, prompts, 12, samples, is_end=lambda ids: ids in ends)
    # One text may happen to be the beginning of another, and ends there then.
    assert found == [next(ids[:n] for n in range(1, 13) if n == 12 or ids[:n] in ends) for ids in alone]


def test_texts_that_have_ended_cost_nothing():
    samples = [lambda logits, position, i=i: i for i in range(3)]
    model = Spied(MODEL)
    found = generate_batch(model, [[9]] * 3, 8, samples, is_end=lambda ids: len(ids) == 2 + 2 * ids[0])
    assert found == [[0] * 2, [1] * 4, [2] * 6]
    assert model.shapes == [(3, 1)] * 2 + [(2, 1)] * 2 + [(1, 1)] * 2


@pytest.mark.parametrize("slide_by", [None, 12])
def test_a_shared_prompt_is_computed_once(slide_by):
    model = Spied(MODEL)
    samples = [make_sampler(1.0, seed=seed) for seed in range(5)]
    found = generate_batch(model, [PROMPT] * 5, 4, samples, slide_by)
    assert found == [list(generate(MODEL, PROMPT, 4, sample)) for sample in samples]
    assert len(set(map(tuple, found))) > 1
    assert model.shapes == [(1, 4)] + [(5, 1)] * 4


def test_equal_prompts_among_others_are_computed_once():
    model, prompts = Spied(MODEL), [[1, 2], PROMPT, [1, 2], [7]]
    samples = [make_sampler(1.0, seed=seed) for seed in range(4)]
    found = generate_batch(model, prompts, 4, samples)
    assert found == [list(generate(MODEL, *pair)) for pair in zip(prompts, [4] * 4, samples, strict=True)]
    assert model.shapes == [(3, 4)] + [(4, 1)] * 4


@pytest.mark.parametrize("n_prompt", [1, 24, 25, 60])
@pytest.mark.parametrize("slide_by", [1, 12])
def test_a_batch_slides(n_prompt, slide_by):
    prompts = np.random.default_rng(n_prompt).integers(61, size=(3, n_prompt)).tolist()
    samples = [make_sampler(1.0, seed=1), greedy, make_sampler(1.0, repetition_penalty=1.2, seed=2)]
    alone = [list(generate(MODEL, p, 50, s, slide_by=slide_by)) for p, s in zip(prompts, samples, strict=True)]
    assert generate_batch(MODEL, prompts, 50, samples, slide_by) == alone


def test_a_batch_fills_the_context_exactly():
    assert generate_batch(MODEL, [PROMPT, [2]], 20) == [list(generate(MODEL, p, 20)) for p in (PROMPT, [2])]


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"top_k": 20}])
def test_one_sampler_for_several_prompts_has_a_seed_for_each(options):
    found = generate_batch(MODEL, [PROMPT] * 3, 15, make_sampler(1.0, seed=2**64 - 2, **options))
    for ids, seed in zip(found, (2**64 - 2, 2**64 - 1, 0), strict=True):
        assert ids == list(generate(MODEL, PROMPT, 15, make_sampler(1.0, seed=seed, **options)))


def test_one_sampler_that_reads_the_text_reads_each_its_own():
    sample, prompts = make_sampler(0, repetition_penalty=2.0), [PROMPT, [2], [7, 8]]
    assert generate_batch(MODEL, prompts, 12, sample) == [list(generate(MODEL, p, 12, sample)) for p in prompts]


@pytest.mark.parametrize(
    ("prompts", "n_tokens", "options", "message"),
    [
        ([], 5, {}, "0 prompts and 0 samplers"),
        ([[1], [2]], 5, {"sample": [greedy]}, "2 prompts and 1 samplers, expected one or more, and as many"),
        ([[1], []], 5, {}, "the prompt has no tokens"),
        ([[1], [2] * 20], 6, {}, "20 prompt tokens and 6 new ones exceed the context of 24"),
        ([[1], [2]], 0, {}, "0 tokens to generate"),
        ([[1], [2, 3]], 5, {"slide_by": 4}, "prompts of different lengths cannot slide together"),
        ([[1], [2]], 5, {"slide_by": 0}, "slide_by is 0"),
        ([[1], [61]], 5, {}, "token id 61 is outside the vocabulary"),
    ],
)
def test_a_batch_refuses(prompts, n_tokens, options, message):
    with pytest.raises(ValueError, match=message):
        generate_batch(MODEL, prompts, n_tokens, **options)


def test_padding_changes_no_logits():
    """Nor what the padding holds, nor threads."""
    rng, small = np.random.default_rng(5), random_model(n_ctx=40)
    tokens, n_pad = rng.integers(61, size=(3, 36)), [0, 5, 35]
    found = []
    for model, fill in ((small, 0), (small, 60), (shared_out(small, 2, is_packed=False), 0), (shared_out(small), 60)):
        cache = model.new_cache(3, n_pad=n_pad)
        filled = np.where(np.arange(36) < cache.n_pad[:, None], fill, tokens)
        model.forward(filled[:, :30], cache)
        found.append(model.forward(filled[:, 30:], cache)[:, 0])
        for row, n in enumerate(n_pad):
            alone = small.forward([tokens[row, n:]], small.new_cache())[0, 0]
            np.testing.assert_allclose(found[-1][row], alone, rtol=0, atol=1e-4)
            assert cache.row(row).length == 36 - n
        again = cache.row(1)
        again.length = 20
        np.testing.assert_allclose(model.forward([tokens[1, 25:]], again)[0, 0], found[-1][1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are none
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("path", [("wte",), ("wpe",), ("blocks", 2, "mlp", "c_proj", "w"), ("ln_f", "g")])
def test_weights_that_are_no_numbers_are_named(bad, path):
    model = random_model()
    array = model.params
    for key in path:
        array = array[key]
    array.reshape(-1)[1] = bad  # of wpe, the first position
    model = Model(model.hparams, model.params)  # small models keep a copy of wte

    def sample(logits, position):
        raise AssertionError("it was sampled from")

    for ask in (lambda: next(generate(model, PROMPT, 3, sample)), lambda: generate_batch(model, [[1], [2]], 3, sample)):
        with pytest.raises(
            ValueError, match=rf"1 of {array.size} numbers are NaN or infinite in {'/'.join(map(str, path))}"
        ):
            ask()


def test_overflow_is_named():
    model = random_model()
    model.params["ln_f"]["g"][:] = 3e38
    with pytest.raises(ValueError, match="among the logits: finite weights, so sums overflow"):
        next(generate(model, PROMPT, 3))


@pytest.mark.parametrize("n_held", [0, 4, 5, 9])
def test_a_cache_that_holds_the_whole_prompt_or_more_is_used(n_held):
    """The prompt's last token is computed again, for its logits."""
    expected = list(generate(MODEL, PROMPT, 8))
    cache = MODEL.new_cache()
    if n_held:
        MODEL.forward([[*PROMPT, *expected][:n_held]], cache)
    assert list(generate(MODEL, PROMPT, 8, cache=cache)) == expected


@pytest.mark.parametrize("slide_by", [None, 3])
def test_a_cache_that_is_too_short_is_refused_at_the_call(slide_by):
    with pytest.raises(ValueError, match="the cache has room for 11 tokens, expected 12 or more; make a larger one"):
        generate(MODEL, PROMPT, 8, slide_by=slide_by, cache=MODEL.new_cache(n_seq=11))
    assert len(list(generate(MODEL, PROMPT, 8, slide_by=slide_by, cache=MODEL.new_cache(n_seq=12)))) == 8


def test_prompts_may_be_an_array():
    prompts = np.array([PROMPT, PROMPT[::-1]])
    assert generate_batch(MODEL, prompts, 5) == [list(generate(MODEL, prompt, 5)) for prompt in prompts.tolist()]


def test_a_cache_of_another_model_is_named():
    """Of fewer layers it would fail in the middle, of more it would not be noticed."""
    for others in ({"n_layer": 2}, {"n_layer": 4}, {"n_head": 6}, {"n_embd": 48}):
        with pytest.raises(ValueError, match="the cache has .* layers .*, the model 3 layers of 3 heads of 8"):
            list(generate(MODEL, [1, 2], 3, cache=random_model(**others).new_cache()))


def test_text_instead_of_ids_is_named():
    for ids in ("text", [1.0, 2.0]):
        with pytest.raises(ValueError, match="expected integers"):
            score(MODEL, ids)
        with pytest.raises(ValueError, match="expected integers"):
            list(generate(MODEL, ids, 3))
