"""How many guesses pay: a drafter's draft length, chosen from what was measured so far."""

import time

import numpy as np

from gpt2 import Drafter


def common_length(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common from the start."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


class Adaptive:
    """Asks a drafter for as many guesses as pay, by what they cost and how often they were right so far.

    A round with n guesses, each right with probability p, makes (1 - p^(n+1)) / (1 - p) tokens on average and costs n
    draft steps and a pass of the target over n + 1 rows. The n with the most tokens a second is asked for, 0 if none
    beats plain decoding; then a guess is tried again from time to time, since texts change.
    """

    MEMORY = 0.95  # of p and of times, a round
    RETRY = 16  # rounds without a guess before one is tried again; twice as many after each try that fails

    def __init__(self, drafter: Drafter, n_max: int = 10, clock=time.perf_counter):
        self.drafter, self.n_max, self.clock = drafter, n_max, clock
        self.n_right, self.n_wrong = 1.0, 1.0  # as if two guesses had been checked
        self.draft_seconds = Average(self.MEMORY)
        self.pass_seconds: dict[int, Average] = {}  # by the number of guesses
        self.n_wanted = 0
        self.n_idle, self.n_retry = 0, self.RETRY  # rounds since a guess was wanted, and until one is tried again
        self.guesses: list[int] = []
        self.n_before = 0  # length of the text when they were made
        self.asked = 0.0  # when they were ready

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        started = self.clock()
        # The first pass is over the prompt, and tells nothing of a round.
        is_first = not self.n_before or len(tokens) <= self.n_before
        if not is_first:
            self.learn(tokens, started - self.asked)
        n = self.n_wanted
        if n:
            self.n_retry = self.RETRY
        elif self.n_idle == self.n_retry:
            n, self.n_retry = 1, 2 * self.n_retry
        self.n_idle = 0 if n else self.n_idle + 1
        self.guesses = self.drafter(tokens, min(n, n_max)) if n and not is_first else []
        self.n_before, self.asked = len(tokens), self.clock()
        if self.guesses:
            self.draft_seconds.add((self.asked - started) / len(self.guesses))
        return self.guesses

    def learn(self, tokens: list[int], seconds: float) -> None:
        """From the pass that checked the last guesses: how long it took, and what became of them."""
        n = len(self.guesses)
        self.pass_seconds.setdefault(n, Average(self.MEMORY)).add(seconds)
        if n:
            n_right = common_length(self.guesses, tokens[self.n_before :])
            self.n_right = self.MEMORY * self.n_right + n_right
            self.n_wrong = self.MEMORY * self.n_wrong + (n_right < n)
            self.n_wanted = self.best_n()
        elif len(self.pass_seconds) == 1:
            self.n_wanted = min(3, self.n_max)  # a plain round has been timed; now one with guesses

    def best_n(self) -> int:
        """The number of guesses with the most tokens a second, as predicted."""
        p = self.n_right / (self.n_right + self.n_wrong)
        seconds = self.predicted_pass_seconds()
        tokens = np.cumsum(p ** np.arange(self.n_max + 1))
        return int(np.argmax(tokens / (np.arange(self.n_max + 1) * self.draft_seconds.value + seconds)))

    def predicted_pass_seconds(self) -> np.ndarray:  # -> [n_max + 1]
        """A pass's time by its guesses: what was measured, between and beyond a straight line."""
        known = sorted(self.pass_seconds)
        times = [self.pass_seconds[n].value for n in known]
        wanted = np.arange(self.n_max + 1)
        slope = max(0.0, (times[-1] - times[0]) / max(1, known[-1] - known[0]))
        return np.interp(wanted, known, times) + slope * np.maximum(0, wanted - known[-1])


class Average:
    """A mean in which each new value counts more than the ones before."""

    def __init__(self, memory: float):
        self.memory, self.total, self.weight = memory, 0.0, 0.0

    def add(self, value: float) -> None:
        self.total = self.memory * self.total + value
        self.weight = self.memory * self.weight + 1

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else 0.0
