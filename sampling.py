"""From logits to the next token id.

A sampler is a callable (logits: float32[n_vocab], position: int) -> int; `position` is the index that the token will
have in the text. It may also have `scores(logits, position) -> float[n_vocab]`, whose argmax it returns, and
`for_text(tokens) -> Sampler`: the same sampler reading a text, a list that the caller goes on appending to.

Sampling adds Gumbel noise and takes the largest sum, which is an exact sample of softmax(logits) (Gumbel 1954;
Maddison et al. 2014). The noise is a function of (seed, position) alone, so a draft and its target see the same noise,
agree often, and the text does not depend on whether there was a draft (Daliri et al. 2024, drafter-invariant
speculative decoding).
"""

import math
import secrets
from collections.abc import Callable

import numpy as np

Sampler = Callable[[np.ndarray, int], int]
# Rows computed together round differently from a row computed alone: by up to 1e-4 with logits of the size of
# GPT-2's (30 to 100). Two scores closer than this are therefore computed again, alone.
NEAR_TIE = 1e-3


def greedy(logits: np.ndarray, position: int) -> int:
    """The likeliest token; of equals the one with the lowest id."""
    return int(logits.argmax())


def for_text(sample: Sampler, tokens: list[int]) -> Sampler:
    """`sample`, reading `tokens` if it depends on the text: at every call all of the text so far, prompt included."""
    return sample.for_text(tokens) if hasattr(sample, "for_text") else sample


def margin(sample: Sampler, logits: np.ndarray, position: int) -> float:
    """By how much the token that `sample` chooses is ahead of the next one, in units of the logits."""
    scores = sample.scores(logits, position) if hasattr(sample, "scores") else logits
    best = int(scores.argmax())
    rest = max(scores[:best].max(initial=-np.inf), scores[best + 1 :].max(initial=-np.inf))
    return float(scores[best] - rest)


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:  # [n_vocab] -> [n_vocab]
    """-inf for all but the k largest, and those equal to the k-th (Fan et al. 2018)."""
    if k >= logits.size:
        return logits
    return np.where(logits < np.partition(logits, -k)[-k], -np.inf, logits)


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:  # [n_vocab] -> [n_vocab]
    """-inf for all but the likeliest tokens that together have probability p (Holtzman et al. 2020)."""
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp((logits[order] - logits[order[0]]).astype(np.float64))
    before = np.cumsum(probabilities) - probabilities  # what the likelier ones have together
    kept = np.full_like(logits, -np.inf)
    keep = order[before < p * probabilities.sum()]
    kept[keep] = logits[keep]
    return kept


def gumbel_noise(seed: int, position: int, n: int) -> np.ndarray:  # -> float64[n]
    """Standard Gumbel noise for each id, the same for every call with this seed and position."""
    key = np.array([seed, position], np.uint64)  # from a list, large seeds would be rounded to float64
    uniform = np.random.Generator(np.random.Philox(key=key)).random(n)
    with np.errstate(divide="ignore"):  # 0 gives -inf, which is never the largest
        return -np.log(-np.log(uniform))


class NoisySampler:
    """Temperature, top-k and top-p, then Gumbel noise; see make_sampler."""

    def __init__(self, temperature: float, top_k: int, top_p: float, seed: int):
        self.temperature, self.top_k, self.top_p, self.seed = temperature, top_k, top_p, seed

    def scores(self, logits: np.ndarray, position: int) -> np.ndarray:
        """The filtered logits plus temperature times noise: ordered as logits / temperature + noise."""
        if self.top_k:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p < 1:
            logits = self.temperature * keep_top_p(logits / self.temperature, self.top_p)
        return logits + self.temperature * gumbel_noise(self.seed, position, logits.size)

    def __call__(self, logits: np.ndarray, position: int) -> int:
        return int(self.scores(logits, position).argmax())


def make_sampler(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None) -> Sampler:
    """A sampler of softmax(logits / temperature) among the `top_k` likeliest and then the likeliest of mass `top_p`.

    temperature 0 is greedy, top_k 0 and top_p 1 keep every token, seed None takes one at random.
    ValueError: a value outside its range, named with the range.
    """
    check("temperature", temperature, is_number(temperature) and 0 <= temperature < math.inf, "a number of 0 or more")
    check("top_k", top_k, is_whole(top_k) and top_k >= 0, "a whole number of 0 (all) or more")
    check("top_p", top_p, is_number(top_p) and 0 < top_p <= 1, "a number above 0 and up to 1 (all)")
    check("seed", seed, seed is None or (is_whole(seed) and 0 <= seed < 1 << 64), "a whole number from 0 to 2^64 - 1")
    if temperature == 0:
        return greedy
    return NoisySampler(temperature, top_k, top_p, secrets.randbits(63) if seed is None else seed)


def check(name: str, value, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def is_number(value) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def is_whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
