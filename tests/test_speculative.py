"""Whatever guesses, the text is the plain one."""

import inspect
from functools import lru_cache, partial

import numpy as np
import pytest
from drafting import DRAFT, KINDS, TARGET, InTurn, drafters, limited, samplers, scripted
from helpers import random_model

from console.rounds import MarginRecorder
from decoding.draft_length import Adaptive
from decoding.sampling import gumbel_noise, make_sampler
from gpt2 import Model, generate, generate_batch
from speculative import DraftModel, PromptLookup, greedy_speculative_decoding


@pytest.mark.parametrize("n_draft", range(13))
def test_every_drafter_gives_plain_text_on_random_models(n_draft):
    rng = np.random.default_rng(n_draft)
    for sample in samplers(n_draft):
        prompt = rng.integers(61, size=rng.integers(1, 12)).tolist()
        n_tokens = 41 - len(prompt)  # to the very edge of the context
        plain = list(generate(TARGET, prompt, n_tokens, sample))
        for drafter in drafters(DRAFT, n_draft, sample, prompt + plain, len(prompt)):
            assert list(generate(TARGET, prompt, n_tokens, sample, limited(drafter))) == plain


class Unrepeated:
    """A sampler that depends on the text: greedy among the ids that are not in it."""

    def __init__(self, tokens=None):
        self.tokens = tokens

    def for_text(self, tokens):
        return Unrepeated(tokens)

    def scores(self, logits, position):
        assert len(self.tokens) == position
        scores = logits.copy()
        scores[[i for i in self.tokens if i < logits.size]] = -np.inf
        return scores

    def __call__(self, logits, position):
        return int(self.scores(logits, position).argmax())


@pytest.mark.parametrize("n_draft", [1, 4, 9])
def test_a_sampler_may_read_the_text(n_draft):
    prompt, sample = [3, 1, 4], Unrepeated()
    plain = list(generate(TARGET, prompt, 38, sample))
    assert len(set(prompt + plain)) == 41
    for drafter in drafters(DRAFT, n_draft, sample, prompt + plain, len(prompt)):
        assert list(generate(TARGET, prompt, 38, sample, drafter)) == plain
    assert list(generate(TARGET, prompt, 38, MarginRecorder(sample))) == plain


PROMPT_TEXT = inspect.cleandoc("""
    Before we proceed any further, hear me speak. ROMEO: O, what light? The king himself has said so, my good lord,
    and all the people of the city know that he will come to Rome at night with fire and sword; JULIET: nay, then
    farewell, sweet father, for I must away. First Citizen: We are accounted poor citizens, the patricians good.
    KING RICHARD: Now is the winter! What news? GLOUCESTER: none good, my liege, to please you with the hearing
""")


@pytest.mark.parametrize("part", range(5))
def test_every_drafter_gives_plain_text_on_the_embedded_pair(tiny, nano, part):
    """50 prompts of 100 tokens: ten drafters in turn, one a round, then one of them alone."""
    encoder, target = tiny
    _, draft = nano
    ids = encoder.encode(PROMPT_TEXT)
    numbers = range(part, 50, 5)
    prompts = [ids[i * 2 : i * 2 + 1 + i % 9] for i in numbers]
    samples = [samplers(i)[i // 5 % 5] for i in numbers]
    texts = generate_batch(target, prompts, 100, samples)
    for i, prompt, sample, plain in zip(numbers, prompts, samples, texts, strict=True):
        turns = InTurn(drafters(draft, i % 13, sample, prompt + plain, len(prompt)), i)
        alone = [*drafters(draft, i % 13, sample, prompt + plain, len(prompt))][i % 10]
        for drafter in (turns, alone):
            assert list(generate(target, prompt, 100, sample, drafter)) == plain


def test_the_plain_entry():
    prompt = [3, 1, 4, 1, 5]
    plain = list(generate(TARGET, prompt, 30))
    for n_draft in range(8):
        assert greedy_speculative_decoding(TARGET, DRAFT, prompt, 30, n_draft) == plain
    assert greedy_speculative_decoding(TARGET, TARGET, prompt, 30) == plain
    assert prompt == [3, 1, 4, 1, 5]


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="the target has 61 ids and the draft 60; they need the same vocabulary"):
        greedy_speculative_decoding(TARGET, random_model(n_vocab=60), [1, 2], 5)


def test_the_context_limit_holds():
    with pytest.raises(ValueError, match="exceed the context of 40"):
        greedy_speculative_decoding(TARGET, DRAFT, [1] * 20, 22)


@pytest.mark.parametrize("n_ctx", [2, 7, 20, 39])
def test_a_draft_with_a_smaller_context_falls_silent(n_ctx):
    draft = random_model(n_ctx=n_ctx, n_layer=1)
    plain = list(generate(TARGET, [5, 6, 7], 38))
    assert greedy_speculative_decoding(TARGET, draft, [5, 6, 7], 38, 5) == plain


def test_caches_after_a_run_equal_fresh_ones():
    caches = []

    class Spied(Model):
        def new_cache(self, n_batch=1, n_seq=None):
            caches.append(super().new_cache(n_batch, n_seq))
            return caches[-1]

    target = Spied(TARGET.hparams, TARGET.params)
    drafter = DraftModel(DRAFT, 4)
    prompt = [9, 8, 7]
    text = prompt + list(generate(target, prompt, 30, draft=drafter))
    (cache,) = caches
    assert cache.length == len(text) - 1
    for model, kept, tokens in ((TARGET, cache, text[:-1]), (DRAFT, drafter.cache, drafter.fed)):
        fresh = model.new_cache()
        model.forward([tokens[: kept.length]], fresh)
        n = kept.length
        np.testing.assert_allclose(kept.kv[..., :n, :], fresh.kv[..., :n, :], rtol=0, atol=1e-5)


def test_a_draft_has_room_for_as_much_text_again():
    drafter, text = DraftModel(DRAFT, 4), [1] * 3
    for n_more in (0, 1, 2, 4, 8, 13):
        text = text + [2] * n_more
        fresh = DraftModel(DRAFT, 4)
        assert drafter(text, 4) == fresh(text, 4)
        assert len(text) + 3 <= drafter.cache.n_ctx <= min(2 * (len(text) + 3), DRAFT.hparams["n_ctx"])


def test_a_drafter_can_be_used_for_another_text():
    for drafter in (DraftModel(DRAFT, 4), PromptLookup(4), Adaptive(DraftModel(DRAFT, 4))):
        for prompt in ([1, 2, 3], [1, 2, 3, 4, 5], [7], [1, 2, 3]):
            plain = list(generate(TARGET, prompt, 30))
            assert list(generate(TARGET, prompt, 30, draft=drafter)) == plain


class LongText(list):
    """A text of which only windows may be read: reading all of it takes longer with every token."""

    def __getitem__(self, key):
        part = super().__getitem__(key)
        assert not isinstance(key, slice) or len(part) < 300
        return part

    def __iter__(self):
        pytest.fail("read as a whole")


@pytest.mark.parametrize(
    "drafter",
    [DraftModel(DRAFT, 4), Adaptive(DraftModel(DRAFT, 4)), PromptLookup(4)],
    ids=["model", "adaptive", "lookup"],
)
def test_a_round_takes_as_long_in_a_long_text(drafter):
    text = LongText([1, 2, 3])
    n_guesses = 0
    for i in range(3, 1000):
        guesses = drafter(text, 4)
        n_guesses += len(guesses)
        text.append(guesses[0] if guesses and i % 3 else i % 61)
    assert n_guesses > 5  # the adaptive one has found out that they are wrong


def test_lookup_goes_on_as_before():
    lookup = PromptLookup(3, 3)
    assert lookup([1, 2, 3, 4, 5, 1, 2, 3], 9) == [4, 5, 1]
    assert lookup([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert lookup([1, 2, 3, 4, 5, 1, 2, 3, 9, 2, 3], 9) == [9, 2, 3]  # the latest occurrence, of the longest n-gram
    assert lookup([5, 6, 7], 9) == []
    assert lookup([4, 4, 4, 4], 9) == [4]


class NoisyTarget(Model):
    """A target whose rows round much differently when computed together, as they do a little in any BLAS."""

    def forward(self, tokens, cache, n_last=1, plainly=False):
        logits = super().forward(tokens, cache, n_last, plainly)
        if n_last > 1:
            noise = np.random.default_rng(cache.length).uniform(-8e-6, 8e-6, logits.shape) * np.abs(logits).max()
            logits += noise.astype(np.float32)
        return logits


def tied_target():
    """Every id has a twin with nearly the same output row: half of all choices are near ties."""
    model = random_model(n_vocab=60, n_ctx=40)
    wte = model.params["wte"].copy()
    wte[30:] = wte[:30] * np.float32(1 + 1e-6)
    return NoisyTarget(model.hparams, model.params | {"wte": wte})


@pytest.mark.parametrize("settled", [True, False])
def test_near_ties_are_settled_alone(monkeypatch, settled):
    target = tied_target()
    if not settled:
        monkeypatch.setattr("decoding.ties.NEAR_TIE", 0.0)
    same = []
    for seed in range(8):
        prompt = np.random.default_rng(seed).integers(60, size=4).tolist()
        plain = list(generate(target, prompt, 36))
        same.append(list(generate(target, prompt, 36, draft=scripted("right", prompt + plain, 4, 5, 60))) == plain)
    assert all(same) == settled  # without the second look, the noise does change texts


class Remembering(Model):
    """A model that computes a pass over the same text once: few texts are possible, and many are sampled."""

    def __init__(self, model):
        super().__init__(model.hparams, model.params)
        self.known = {}

    def forward(self, tokens, cache, n_last=1, plainly=False):
        cache.ids = [*getattr(cache, "ids", [])[: cache.length], *tokens[0]]
        key = tuple(cache.ids), n_last
        if key not in self.known:
            self.known[key] = super().forward([cache.ids], self.new_cache(), n_last)
        cache.advance(len(tokens[0]))
        return self.known[key].copy()


def test_the_distribution_is_the_targets(monkeypatch):
    """The second token of 30,000 sampled texts, all made with a draft: total variation below 1 %."""
    monkeypatch.setattr("decoding.sampling.gumbel_noise", lru_cache(16)(gumbel_noise))  # draft and target ask for it
    target = Remembering(random_model(n_vocab=7, n_ctx=4, n_embd=8, n_head=2, n_layer=1))
    draft = Remembering(random_model(n_vocab=7, n_ctx=4, n_embd=8, n_head=2, n_layer=1, seed=5))

    def probabilities(ids):
        logits = target.forward([ids], target.new_cache())[0, 0].astype(np.float64)
        p = np.exp(logits - logits.max())
        return p / p.sum()

    first = probabilities([3])
    expected = sum(first[i] * probabilities([3, i]) for i in range(7))
    counts = np.zeros(7)
    for seed in range(30_000):
        sample = make_sampler(1.0, seed=seed)
        counts[list(generate(target, [3], 2, sample, DraftModel(draft, 2, sample)))[1]] += 1
    assert np.abs(counts / counts.sum() - expected).sum() / 2 < 0.01


@pytest.mark.parametrize("n_taken", [1, 2, 3, 4, 7])
def test_a_cache_holds_no_guesses_where_a_text_is_left_early(n_taken):
    """Whatever was guessed: the next text from this cache is that of a fresh one."""
    expected = list(generate(TARGET, [3, 1, 4], 30))
    for kind in KINDS:
        cache = TARGET.new_cache()
        draft = scripted(kind, [3, 1, 4, *expected], 3, 4, 61)
        left = generate(TARGET, [3, 1, 4], 30, draft=draft, cache=cache)
        ids = [3, 1, 4, *(next(left) for _ in range(n_taken))]
        left.close()
        assert cache.length == len(ids) - 1
        assert list(generate(TARGET, ids, 10, cache=cache)) == list(generate(TARGET, ids, 10))
        cache.length = 3
        assert list(generate(TARGET, [3, 1, 4, 1], 10, cache=cache)) == list(generate(TARGET, [3, 1, 4, 1], 10))


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_guesses_may_be_any_sequence_and_too_many(kind):
    """An array would be added to the prompt's ids, without a word."""
    model, prompt = random_model(), [3, 1, 4, 1, 5]
    plain = list(generate(model, prompt, 10))
    for n in (1, 2, 50):
        assert list(generate(model, prompt, 10, draft=lambda tokens, n_max, n=n: kind([2] * n))) == plain


@pytest.mark.parametrize("n_draft", [2.5, -1, "4", None])
def test_a_number_of_guesses_that_is_none_is_refused(n_draft):
    for make in (partial(DraftModel, random_model()), PromptLookup):
        with pytest.raises(ValueError, match="n_draft is .*, expected a whole number of 0 or more"):
            make(n_draft)
    with pytest.raises(ValueError, match="n_gram is 0"):
        PromptLookup(4, 0)
