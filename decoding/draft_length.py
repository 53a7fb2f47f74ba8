"""How many guesses pay: a drafter's draft length, chosen from what was measured so far."""

from collections import deque
from collections.abc import Callable

import numpy as np

from fast import clock


def common_length(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common from the start."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


class Adaptive:
    """Asks a drafter for as many guesses as pay, by what they cost and how often they were right so far.

    A round with n guesses, each right with probability p, makes (1 - p^(n+1)) / (1 - p) tokens on average and costs the
    drafter's time and a pass of the target over n + 1 rows. The n with the most tokens a second is asked for, 0 if none
    beats plain decoding; then a guess is tried again from time to time, since texts change. With guesses, too, one more
    is tried in every RETRY rounds: what was measured while the machine was busy may be too much.

    `pays`: whether checking guesses can pay at all with so many tokens to come (Passes.few_rows_pay).
    """

    MEMORY = 0.95  # of p, a round
    N_TRIALS = 2  # rounds with guesses that are timed before their number is chosen
    RETRY = 16  # rounds without a guess before one is tried again; twice as many after each try that fails

    def __init__(
        self,
        drafter: Callable[[list[int], int], list[int]],
        n_max: int = 10,
        pays: Callable[[int], bool] = lambda n_left: True,
        clock=clock,  # on which packing weights takes no time
    ):
        self.drafter, self.n_max, self.pays, self.clock = drafter, n_max, pays, clock
        self.n_right, self.n_wrong = 1.0, 1.0  # as if two guesses had been checked
        self.round_seconds: dict[int, Recent] = {}  # by the number of guesses
        self.n_wanted = 0
        self.n_idle, self.n_retry = 0, self.RETRY  # rounds since a guess was wanted, and until one is tried again
        self.n_guessed = 0  # rounds with guesses
        self.guesses: list[int] = []
        self.n_before = 0  # length of the text when they were made
        self.asked = 0.0  # when they were asked for

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        now = self.clock()
        # The first pass is over the prompt, and tells nothing of a round.
        is_first = not self.n_before or len(tokens) <= self.n_before
        if not is_first:
            self.learn(tokens, now - self.asked)
        can_pay = self.pays(n_max)
        n = self.n_wanted if can_pay else 0
        if n:
            self.n_retry = self.RETRY
            self.n_guessed += 1
            n += self.n_guessed % self.RETRY == 0
        elif can_pay and self.n_idle >= self.n_retry:
            n, self.n_retry = 1, 2 * self.n_retry
        self.n_idle = 0 if n else self.n_idle + 1
        self.guesses = self.drafter(tokens, min(n, self.n_max, n_max)) if n and not is_first else []
        self.n_before, self.asked = len(tokens), now
        return self.guesses

    def learn(self, tokens: list[int], seconds: float) -> None:
        """From the last round: how long it took, and what became of its guesses."""
        n = len(self.guesses)
        self.round_seconds.setdefault(n, Recent()).add(seconds)
        if n:
            n_right = common_length(self.guesses, tokens[self.n_before :])
            self.n_right = self.MEMORY * self.n_right + n_right
            self.n_wrong = self.MEMORY * self.n_wrong + (n_right < n)
        timed = self.timed()
        if 0 in timed:  # first plain rounds, then some with guesses, then what pays
            is_tried = sum(len(self.round_seconds[n].values) for n in timed if n) >= self.N_TRIALS
            self.n_wanted = self.best_n() if is_tried else min(3, self.n_max)

    def timed(self) -> list[int]:
        """The numbers of guesses of which a round has been timed, from the smallest."""
        return sorted(n for n, seconds in self.round_seconds.items() if seconds.values)

    def best_n(self) -> int:
        """The number of guesses with the most tokens a second, as predicted."""
        p = self.n_right / (self.n_right + self.n_wrong)
        tokens = np.cumsum(p ** np.arange(self.n_max + 1))
        return int(np.argmax(tokens / self.predicted_seconds()))

    def predicted_seconds(self) -> np.ndarray:  # -> [n_max + 1]
        """A round's time by its guesses: what was measured, between and beyond a straight line."""
        known = self.timed()
        times = [self.round_seconds[n].least for n in known]
        wanted = np.arange(self.n_max + 1)
        slope = max(0.0, (times[-1] - times[0]) / max(1, known[-1] - known[0]))
        return np.interp(wanted, known, times) + slope * np.maximum(0, wanted - known[-1])


class Recent:
    """The least of the last values: what else runs on the machine only ever adds to a time.

    The first is left out: a draft's first round reads the prompt too, and the first pass over so many rows also finds
    out how they are best multiplied.
    """

    def __init__(self):
        self.values: deque[float] | None = None

    def add(self, value: float) -> None:
        if self.values is None:
            self.values = deque(maxlen=16)
        else:
            self.values.append(value)

    @property
    def least(self) -> float:
        return min(self.values)
