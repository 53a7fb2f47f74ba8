"""How many guesses pay: a drafter's draft length, chosen from what was measured so far."""

from collections import deque
from collections.abc import Callable
from itertools import accumulate, pairwise

from fast import clock


def common_length(a: list[int], b: list[int]) -> int:
    """How many tokens two texts have in common from the start."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


class Adaptive:
    """Asks a drafter for as many guesses as pay, by what they cost and how often they were right so far.

    A drafter that is asked for n guesses may stop at one that it is not sure of: after each it makes another with
    probability m. Each is made and right with probability p, if those before it were. So a round yields
    1 + p + ... + p^n tokens on average, and takes a plain round's time, what the first guess adds, m times what the
    second adds, m^2 times what the third adds, and so on. The n with the most tokens a second is asked for, 0 if none
    beats plain decoding; then a guess is tried again from time to time, since texts change. With guesses, too, one more
    is tried from time to time: what was measured while the machine was busy may be too much.

    `pays`: whether checking guesses can pay at all with so many tokens to come (Passes.few_rows_pay).
    """

    MEMORY = 0.95  # of p and m, a round
    N_TRIALS = 3  # rounds with guesses before their number is chosen
    RETRY = 16  # rounds without a guess before one is tried again; twice as many after each try that fails
    ONE_MORE = 8  # of so many rounds with guesses, one asks for one more

    def __init__(
        self,
        drafter: Callable[[list[int], int], list[int]],
        n_max: int = 10,
        pays: Callable[[int], bool] = lambda n_left: True,
        clock=clock,  # on which packing weights takes no time
    ):
        self.drafter, self.n_max, self.pays, self.clock = drafter, n_max, pays, clock
        self.n_right, self.n_wrong = 3.0, 1.0  # guesses, and rounds in which not all that were asked for were right
        self.n_more, self.n_unsure = 1.0, 0.0  # guesses after the first, and rounds in which fewer were made
        self.round_seconds: dict[int, Recent] = {}  # by the number of guesses
        self.n_wanted = 0
        self.n_idle, self.n_retry = 0, self.RETRY  # rounds since a guess was wanted, and until one is tried again
        self.n_guessed = 0  # rounds with guesses
        self.n_asked, self.guesses = 0, []
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
            n += self.n_guessed % self.ONE_MORE == 0
        elif can_pay and self.n_idle >= self.n_retry:
            n, self.n_retry = 1, 2 * self.n_retry
        self.n_idle = 0 if n else self.n_idle + 1
        self.n_asked = min(n, self.n_max, n_max)
        self.guesses = self.drafter(tokens, self.n_asked)[: self.n_asked] if self.n_asked and not is_first else []
        self.n_before, self.asked = len(tokens), now
        return self.guesses

    def learn(self, tokens: list[int], seconds: float) -> None:
        """From the last round: how long it took, and what became of its guesses."""
        n = len(self.guesses)
        self.round_seconds.setdefault(n, Recent()).add(seconds)
        if n:
            n_right = common_length(self.guesses, tokens[self.n_before :])
            self.n_right = self.MEMORY * self.n_right + n_right
            self.n_wrong = self.MEMORY * self.n_wrong + (n_right < self.n_asked)
            self.n_more = self.MEMORY * self.n_more + n - 1
            self.n_unsure = self.MEMORY * self.n_unsure + (n < self.n_asked)
        timed = self.timed()
        if 0 in timed:  # first plain rounds, then some with guesses, then what pays
            is_tried = self.n_guessed >= self.N_TRIALS and timed[-1] > 0
            self.n_wanted = self.best_n() if is_tried else min(3, self.n_max)

    def timed(self) -> list[int]:
        """The numbers of guesses of which a round has been timed, from the smallest."""
        return sorted(n for n, seconds in self.round_seconds.items() if seconds.values)

    def best_n(self) -> int:
        """The number of guesses with the most tokens a second, as predicted."""
        p = self.n_right / (self.n_right + self.n_wrong)
        m = self.n_more / (self.n_more + self.n_unsure)
        seconds = self.predicted_seconds()
        added = (m**i * (after - before) for i, (before, after) in enumerate(pairwise(seconds)))
        tokens, times = accumulate(p**n for n in range(self.n_max + 1)), accumulate(added, initial=seconds[0])
        rates = [n_tokens / time for n_tokens, time in zip(tokens, times, strict=True)]
        return rates.index(max(rates))

    def predicted_seconds(self) -> list[float]:  # n_max + 1
        """A round's time by its guesses: what was measured, between and beyond a straight line."""
        known = self.timed()
        times = [self.round_seconds[n].least for n in known]
        slope = max(0.0, (times[-1] - times[0]) / known[-1])
        known, times = [*known, self.n_max + 1], [*times, times[-1] + slope * (self.n_max + 1 - known[-1])]
        seconds = []
        for (n, n_next), (t, t_next) in zip(pairwise(known), pairwise(times), strict=True):
            seconds += [t + (t_next - t) * i / (n_next - n) for i in range(n_next - n)]
        return seconds


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
