"""Speculation with random weights: real passes of a target and a draft, guesses that are right as often as published.

The draft runs for each guess, but the guess is taken from the target's plain text, or made wrong by chance. So times
are real, and the acceptance is one that was measured with trained models.
"""

import time
from typing import NamedTuple

import numpy as np

import gpt2
from benchmarks.measure import random_ids
from console.rounds import Recorder
from decoding.draft_length import Adaptive
from speculative import MAX_DRAFT, DraftModel

PUBLISHED_ACCEPTANCE = 0.73  # of 124M's guesses for 1558M: 40 tokens in about 13.6 passes at 4 guesses
LENGTHS = (1, 2, 3, 4, 5, 6, 10)
N_STEPS = 10  # plain ones, of which the first makes the prompt's pass


def expected_tokens(n):
    """Tokens of a round with n guesses, each right with the published probability (Leviathan et al. 2023, eq. 1)."""
    return (1 - PUBLISHED_ACCEPTANCE ** (n + 1)) / (1 - PUBLISHED_ACCEPTANCE)


class Measured(NamedTuple):
    speedup: float  # over plain decoding in the same turn
    is_identical: bool  # whether the text is that of plain decoding
    seconds: float = 0.0  # a round
    n_guesses: float = 0.0  # a round, on average


class Simulation:
    """A target, a draft, and the target's plain text."""

    def __init__(self, target: gpt2.Model, draft: gpt2.Model, n_tokens: int):
        self.target, self.draft = target, draft
        self.n_tokens = n_tokens
        self.prompt, self.plain_ids = random_ids(target, 10), []
        self.plain_ids, _ = self.timed(n_tokens)

    def timed(self, n_tokens, drafter=None, n_before=0):
        """(ids, seconds after the first of them, which takes a pass over the prompt with any drafter)

        The prompt has n_before tokens of the plain text, too.
        """
        started, ids = 0.0, []
        for i in gpt2.generate(self.target, self.prompt + self.plain_ids[:n_before], n_tokens, draft=drafter):
            started = started or time.perf_counter()
            ids.append(i)
        return ids, time.perf_counter() - started

    def drafter(self, n, seed):
        rng, text = np.random.default_rng(seed), self.prompt + self.plain_ids

        def guess(logits, position):
            right = text[position] if position < len(text) else 0
            return right if rng.random() < PUBLISHED_ACCEPTANCE else (right + 1) % self.target.hparams["n_vocab"]

        return DraftModel(self.draft, n, guess)

    def rounds(self, n_tokens, drafter):
        """(seconds of each round after the first, its guesses, whether the text is the plain one)"""
        recorder, ticks = Recorder(drafter), []

        def ticking(tokens, n_max):
            ticks.append(time.perf_counter())
            return recorder(tokens, n_max)

        ids, _ = self.timed(n_tokens, ticking)
        seconds = np.diff([*ticks, time.perf_counter()])[1:]
        n_guesses = np.array([len(guesses) for _, guesses in recorder.rounds[1:]])
        return seconds, n_guesses, self.is_plain(ids)

    def is_plain(self, ids):
        return ids == self.plain_ids[: len(ids)]

    def unpack(self) -> None:
        """Forget the packed weights, and what was measured about packing them."""
        for model in (self.target, self.draft):
            model.passes = type(model.passes)(model.params)

    def pack(self) -> None:
        for model in (self.target, self.draft):
            model.passes.pack()

    def step(self, position: int) -> float:
        """Seconds of a plain step, taken just before what it is compared to: the machine's speed changes.

        The steps are about `position`, the middle of the text that is measured: later ones attend to more tokens.
        """
        return self.timed(N_STEPS, n_before=max(0, position - N_STEPS // 2))[1] / (N_STEPS - 1)

    def with_length(self, n, n_tokens, seed) -> Measured:
        """Rounds of n guesses, with packed weights."""
        step = self.step(n_tokens // 2)
        seconds, n_guesses, is_identical = self.rounds(n_tokens, self.drafter(n, seed))
        a_round = float(np.median(seconds[n_guesses == n]))
        return Measured(expected_tokens(n) * step / a_round, is_identical, a_round, n)

    def with_adaptive(self, seed) -> Measured:
        """The second half of a text, with packed weights, where the length has settled."""
        step = self.step(3 * self.n_tokens // 4)
        seconds, n_guesses, is_identical = self.rounds(
            self.n_tokens, Adaptive(self.drafter(MAX_DRAFT, seed), MAX_DRAFT)
        )
        seconds, n_guesses = seconds[len(seconds) // 2 :], n_guesses[len(seconds) // 2 :]
        for n in set(n_guesses):  # medians, as with_length has
            seconds[n_guesses == n] = np.median(seconds[n_guesses == n])
        speedup = expected_tokens(n_guesses).sum() * step / seconds.sum()
        return Measured(speedup, is_identical, n_guesses=n_guesses.mean())

    def whole_text(self, n_tokens, seed) -> Measured:
        """A text after its first token, packing included if it is done, against the plain text just before."""
        _, plain_seconds = self.timed(n_tokens)
        self.unpack()
        pays = self.target.passes.few_rows_pay
        ids, seconds = self.timed(n_tokens, Adaptive(self.drafter(MAX_DRAFT, seed), MAX_DRAFT, pays))
        return Measured(plain_seconds / seconds, self.is_plain(ids))

    def turn(self, n_short: int, number: int) -> dict[int | str, Measured]:
        """Everything once: plain decoding (0), each draft length, adaptive lengths, and whole texts."""
        ids, seconds = self.timed(n_short)
        turn: dict[int | str, Measured] = {0: Measured(1.0, self.is_plain(ids), seconds / (n_short - 1))}
        self.pack()
        for n in LENGTHS:
            turn[n] = self.with_length(n, n_short, 100 * number + n)
        turn["adaptive"] = self.with_adaptive(number)
        for n in (n_short, self.n_tokens):
            turn[f"a text of {n} tokens, packing included"] = self.whole_text(n, number)
        return turn
