"""Drafters of every kind, and samplers, for whatever must not change a text."""

import numpy as np
from helpers import random_model

from decoding.draft_length import Adaptive
from decoding.sampling import greedy, make_sampler
from speculative import DraftModel, FirstOf, PromptLookup

TARGET = random_model(n_ctx=40, n_layer=2)
DRAFT = random_model(n_ctx=40, n_layer=1, seed=0)  # shares the first layer's weights: right now and then


def scripted(kind, text, n_prompt, n_draft, n_vocab):
    """A drafter that knows `text` and is right, wrong, silent or either at random."""
    rng = np.random.default_rng(len(text) + n_draft)

    def draft(tokens, n_max):
        truth = text[len(tokens) : len(tokens) + min(n_max, n_draft)]
        wrong = [(i + 1) % n_vocab for i in truth]
        if kind == "right":
            return truth
        if kind == "wrong":
            return wrong
        if kind == "silent":
            return []
        n = rng.integers(len(truth) + 1)
        return [a if rng.random() < 0.7 else b for a, b in zip(truth[:n], wrong[:n], strict=True)]

    return draft


KINDS = ("right", "wrong", "silent", "random")


def drafters(draft, n_draft, sample, text, n_prompt):
    n_vocab = draft.hparams["n_vocab"]
    yield from (scripted(kind, text, n_prompt, n_draft, n_vocab) for kind in KINDS)
    yield DraftModel(draft, n_draft, sample)
    yield DraftModel(draft, n_draft, sample, min_confidence=0.3)
    yield PromptLookup(n_draft, 1 + n_draft % 4)
    yield FirstOf(PromptLookup(n_draft), DraftModel(draft, n_draft, sample))
    yield Adaptive(DraftModel(draft, n_draft, sample), n_draft)
    yield Adaptive(FirstOf(PromptLookup(n_draft), DraftModel(draft, n_draft, sample)), n_draft)


class InTurn:
    """Of several drafters another each round, so each finds a text that others went on with."""

    def __init__(self, drafters, n_before=0):
        self.drafters, self.n_calls = list(drafters), n_before

    def __call__(self, tokens, n_max):
        self.n_calls += 1
        return self.drafters[self.n_calls % len(self.drafters)](tokens, n_max)


def limited(drafter):
    """The drafter, checked: never more guesses than asked for, and the text is not touched."""

    def draft(tokens, n_max):
        before = list(tokens)
        guesses = drafter(tokens, n_max)
        assert len(guesses) <= n_max and tokens == before
        return guesses

    return draft


def samplers(seed):
    return (
        greedy,
        make_sampler(0.8, seed=seed),
        make_sampler(1.3, top_k=20, top_p=0.9, seed=seed),
        make_sampler(0, repetition_penalty=1.3),
        make_sampler(0.9, min_p=0.02, repetition_penalty=1.2, seed=seed),
    )


PAIR = ("speculative.py", "--target_model_size=tiny", "--draft_model_size=nano", "--n_tokens_to_generate=60")
