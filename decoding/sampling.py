"""From logits to the next token id.

A sampler is a callable (logits: float32[n_vocab], position: int) -> int; `position` is the index that the token will
have in the text. It may also have `scores(logits, position) -> float[n_vocab]`, whose argmax it returns,
`for_text(tokens) -> Sampler`: the same sampler reading a text, a list that the caller goes on appending to, and
`for_row(row) -> Sampler`: the same with noise of its own, for a row of a batch.

Sampling adds Gumbel noise and takes the largest sum, which is an exact sample of softmax(logits) (Gumbel 1954;
Maddison et al. 2014). The noise is a function of (seed, position) alone, so a draft and its target see the same noise,
agree often, and the text does not depend on whether there was a draft (Daliri et al. 2024, drafter-invariant
speculative decoding).
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np

Sampler = Callable[[np.ndarray, int], int]


def greedy(logits: np.ndarray, position: int) -> int:
    """The likeliest token; of equals the one with the lowest id."""
    return int(logits.argmax())


def for_text(sample: Sampler, tokens: list[int]) -> Sampler:
    """`sample`, bound to `tokens` if it depends on the text: they are the whole text at each call, prompt included."""
    return sample.for_text(tokens) if hasattr(sample, "for_text") else sample


def for_row(sample: Sampler, row: int) -> Sampler:
    """`sample` for a row of a batch: with a seed of its own, the seed and the row's number added up."""
    return sample.for_row(row) if hasattr(sample, "for_row") else sample


def scores_of(sample: Sampler, logits: np.ndarray, position: int) -> np.ndarray:  # -> [n_vocab]
    """What `sample` takes the largest of."""
    return sample.scores(logits, position) if hasattr(sample, "scores") else logits


def log_softmax(x):  # [..., n] -> [..., n]
    x = x - x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


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


def keep_min_p(logits: np.ndarray, p: float) -> np.ndarray:  # [n_vocab] -> [n_vocab]
    """-inf for all but the tokens with p times the highest probability or more (Nguyen et al. 2024)."""
    return np.where(logits < logits.max() + math.log(p), -np.inf, logits)


def penalize(logits: np.ndarray, tokens: list[int], penalty: float) -> np.ndarray:  # [n_vocab] -> [n_vocab]
    """The logits of the ids in `tokens` divided by the penalty if positive, multiplied by it if negative.

    Keskar et al. 2019 (CTRL) divide always, which would make a negative logit likelier.
    """
    ids = np.array(tokens, int)
    ids = ids[ids < logits.size]  # a draft may score fewer
    penalized = logits.copy()
    penalized[ids] = np.where(logits[ids] > 0, logits[ids] / penalty, logits[ids] * penalty)
    return penalized


def gumbel_noise(seed: int, position: int, n: int) -> np.ndarray:  # -> float64[n]
    """Standard Gumbel noise for each id, the same for every call with this seed and position."""
    key = np.array([seed, position], np.uint64)  # from a list, large seeds would be rounded to float64
    uniform = np.random.Generator(np.random.Philox(key=key)).random(n)
    with np.errstate(divide="ignore"):  # 0 gives -inf, which is never the largest
        return -np.log(-np.log(uniform))


class NoisySampler:
    """Temperature, then filters, then Gumbel noise; see make_sampler."""

    def __init__(self, temperature: float, filters: list[Callable[[np.ndarray], np.ndarray]], seed: int):
        self.temperature, self.filters, self.seed = temperature, filters, seed

    def for_row(self, row: int) -> Sampler:
        return NoisySampler(self.temperature, self.filters, (self.seed + row) % 2**64)

    def scores(self, logits: np.ndarray, position: int) -> np.ndarray:
        """Temperature times the noisy filtered logits, so that they are in units of the logits."""
        scores = np.subtract(logits, logits.max(), dtype=np.float64)
        with np.errstate(over="ignore"):  # temperatures near 0 leave the likeliest at 0 and take others to -inf
            scores /= self.temperature
        for keep in self.filters:
            scores = keep(scores)
        scores += gumbel_noise(self.seed, position, logits.size)
        scores *= self.temperature
        return scores

    def __call__(self, logits: np.ndarray, position: int) -> int:
        return int(self.scores(logits, position).argmax())


class PenalizedSampler:
    """A sampler of logits after the repetition penalty; `for_text` gives it the text. ValueError: it has none."""

    def __init__(self, sample: Sampler, penalty: float, tokens: list[int] | None = None):
        self.sample, self.penalty, self.tokens = sample, penalty, tokens
        self.n_read, self.ids = 0, set()  # how much of the text, which only grows, was read, and its ids

    def for_text(self, tokens: list[int]) -> Sampler:
        return PenalizedSampler(self.sample, self.penalty, tokens)

    def for_row(self, row: int) -> Sampler:
        return PenalizedSampler(for_row(self.sample, row), self.penalty)

    def penalized(self, logits: np.ndarray) -> np.ndarray:
        if self.tokens is None:
            raise ValueError("the repetition penalty depends on the text: call for_text(sample, tokens) first")
        self.ids.update(self.tokens[self.n_read :])
        self.n_read = len(self.tokens)
        return penalize(logits, list(self.ids), self.penalty)

    def scores(self, logits: np.ndarray, position: int) -> np.ndarray:
        # The penalty magnifies rounding errors of the logits too, and `margin` is compared with these.
        return scores_of(self.sample, self.penalized(logits), position) / max(self.penalty, 1 / self.penalty)

    def __call__(self, logits: np.ndarray, position: int) -> int:
        return self.sample(self.penalized(logits), position)


def make_sampler(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
) -> Sampler:
    """A sampler of softmax(logits / temperature) among the tokens that each filter in turn keeps.

    The order is that of Hugging Face transformers: the repetition penalty, the temperature, the `top_k` likeliest, the
    likeliest of mass `top_p`, those of `min_p` times the highest probability or more. temperature 0 is greedy; top_k 0,
    top_p 1 and min_p 0 keep every token, repetition_penalty 1 is none, seed None takes one at random.
    ValueError: a value outside its range, named with the range.
    """
    in_range = is_number(temperature) and (temperature == 0 or 1e-6 <= temperature <= 1e6)  # float32 divides by it
    check("temperature", temperature, in_range, "0 or a number from 1e-6 to 1e6")
    check("top_k", top_k, is_whole(top_k) and top_k >= 0, "a whole number of 0 (all) or more")
    check("top_p", top_p, is_number(top_p) and 0 < top_p <= 1, "a number above 0 and up to 1 (all)")
    check("min_p", min_p, is_number(min_p) and 0 <= min_p <= 1, "a number from 0 (all) to 1")
    is_penalty = is_number(repetition_penalty) and 0.01 <= repetition_penalty <= 100
    check("repetition_penalty", repetition_penalty, is_penalty, "a number from 0.01 to 100, of which 1 is none")
    check("seed", seed, seed is None or (is_whole(seed) and 0 <= seed < 1 << 64), "a whole number from 0 to 2^64 - 1")
    filters = []
    if top_k:
        filters.append(partial(keep_top_k, k=top_k))
    if top_p < 1:
        filters.append(partial(keep_top_p, p=top_p))
    if min_p > 0:
        filters.append(partial(keep_min_p, p=min_p))
    sample = NoisySampler(temperature, filters, new_seed() if seed is None else seed) if temperature else greedy
    return sample if repetition_penalty == 1 else PenalizedSampler(sample, repetition_penalty)


def new_seed() -> int:
    import secrets  # and with it OpenSSL, which a greedy text does not need

    return secrets.randbits(63)


def check(name: str, value, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise ValueError(f"{name} is {value!r}, expected {expected}")


def is_number(value) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def is_whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
