import json
import math
import os

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from decoding import sampling
from decoding.sampling import (
    for_text,
    greedy,
    gumbel_noise,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    make_sampler,
    penalize,
)

with open(os.path.join(ROOT, "tests", "goldens", "transformers.json"), encoding="utf-8") as f:
    GOLDENS = json.load(f)
LOGITS = np.random.default_rng(0).normal(scale=3, size=50).astype(np.float32)


def test_temperature_0_is_greedy():
    assert make_sampler(0) is greedy
    assert greedy(LOGITS, 5) == LOGITS.argmax()
    assert greedy(np.float32([1, 2, 2]), 0) == 1


def test_top_k_keeps_the_k_largest():
    for k in (1, 2, 10, 49, 50, 1000):
        kept = np.isfinite(keep_top_k(LOGITS, k))
        assert set(np.flatnonzero(kept)) == set(np.argsort(-LOGITS)[:k])


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    exact = np.exp(LOGITS.astype(np.float64))
    exact /= exact.sum()
    kept = np.flatnonzero(np.isfinite(keep_top_p(LOGITS, p)))
    assert exact[kept].sum() >= p
    assert exact[kept].sum() - exact[kept].min() < p
    assert exact[kept].min() >= np.delete(exact, kept).max()


def test_noise_belongs_to_seed_and_position():
    assert (gumbel_noise(1, 2, 50) == gumbel_noise(1, 2, 50)).all()
    assert (gumbel_noise(1, 2, 100)[:50] == gumbel_noise(1, 2, 50)).all()  # a draft may score fewer ids
    for other in (gumbel_noise(1, 3, 50), gumbel_noise(2, 2, 50)):
        assert not (gumbel_noise(1, 2, 50) == other).any()
    largest = (1 << 64) - 1
    assert not (gumbel_noise(largest, 2, 50) == gumbel_noise(largest - 1, 2, 50)).any()


def test_noise_is_gumbel_distributed():
    noise = np.concatenate([gumbel_noise(7, position, 1000) for position in range(200)])
    assert abs(noise.mean() - 0.5772156649) < 0.01  # Euler's constant
    assert abs(noise.var() - math.pi**2 / 6) < 0.02


N_DRAWS = 40_000


@pytest.fixture(scope="module")
def noise():
    """The noise of seed 1 at the first positions, which every filter is tried with."""
    return [gumbel_noise(1, position, 7) for position in range(N_DRAWS)]


TEXT = [0, 4, 4, 6]
FREQUENCIES = [  # of the logits below, worked out by hand: as shares of e^logit, those kept
    ({}, [2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0]),
    ({"temperature": 0.5}, [4.0, 3.0, 2.0, 1.0, 0.0, -2.0, -4.0]),
    ({"temperature": 2}, [1.0, 0.75, 0.5, 0.25, 0.0, -0.5, -1.0]),
    ({"top_k": 4}, [2.0, 1.5, 1.0, 0.5, None, None, None]),
    ({"top_p": 0.7}, [2.0, 1.5, 1.0, None, None, None, None]),  # 0.40, 0.64, 0.79
    ({"min_p": 0.3}, [2.0, 1.5, 1.0, None, None, None, None]),  # 1, 0.61, 0.37, 0.22
    ({"repetition_penalty": 2.0}, [1.0, 1.5, 1.0, 0.5, 0.0, -1.0, -4.0]),
    # The penalty first, or id 0 would stay; the temperature before min_p, or id 3 would.
    (
        {"repetition_penalty": 8.0, "temperature": 0.5, "top_k": 3, "top_p": 0.99, "min_p": 0.2},
        [None, 3.0, 2.0, None, None, None, None],
    ),
]
FREQUENCY_IDS = ["-".join(flags) or "all tokens" for flags, _ in FREQUENCIES]


@pytest.mark.parametrize(("flags", "expected"), FREQUENCIES, ids=FREQUENCY_IDS)
def test_frequencies_are_the_distribution(flags, expected, noise, monkeypatch):
    logits = np.float32([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0])
    share = np.exp([-np.inf if x is None else x for x in expected])
    share /= share.sum()
    sample = for_text(make_sampler(**flags, seed=1), TEXT)
    first = [sample(logits, position) for position in range(1000)]
    monkeypatch.setattr(sampling, "gumbel_noise", lambda seed, position, n: noise[position])  # the same, made once
    draws = [sample(logits, position) for position in range(N_DRAWS)]
    assert draws[:1000] == first
    counts = np.bincount(draws, minlength=7)
    assert (counts[share == 0] == 0).all()
    kept = share > 0
    chi_squared = ((counts[kept] - N_DRAWS * share[kept]) ** 2 / (N_DRAWS * share[kept])).sum()
    assert chi_squared < 22.5  # of 6 degrees of freedom or fewer: chance 0.001


# Few values, so that ties are frequent; and any, however far apart.
ANY_LOGITS = arrays(
    np.float32, st.integers(1, 40), elements=st.integers(-9, 9) | st.floats(-(2.0**120), 2.0**120, width=32)
)
ANY_FLAGS = st.fixed_dictionaries(
    {
        "temperature": st.just(0) | st.floats(1e-6, 1e6),
        "top_k": st.integers(0, 50),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.sampled_from([0.01, 0.5, 1.0, 1.2, 100]),
        "seed": st.integers(0, (1 << 64) - 1),
    }
)


def not_clearly_filtered(logits, temperature, top_k, top_p, min_p):
    """The ids that the definitions keep, one after the other; where rounding decides, both are right."""
    kept = set(range(len(logits)))
    highest = max(logits)
    probability = [math.exp((x - highest) / (temperature or 1e-300)) for x in logits]
    if top_k:
        kept = {i for i in kept if sum(x > logits[i] for x in logits) < top_k}
    total = math.fsum(probability[i] for i in kept)
    likelier = {i: math.fsum(probability[j] for j in kept if logits[j] > logits[i]) for i in kept}
    kept = {i for i in kept if likelier[i] <= top_p * total * (1 + 1e-9)}
    return {i for i in kept if probability[i] >= min_p * (1 - 1e-9)}


@given(logits=ANY_LOGITS, flags=ANY_FLAGS, text=st.lists(st.integers(0, 60), max_size=9), position=st.integers(0, 1023))
@settings(derandomize=True, deadline=None, database=None, max_examples=300)
def test_a_filtered_token_never_comes(logits, flags, text, position):
    sample = for_text(make_sampler(**flags), text)
    with np.errstate(all="raise", under="ignore"):
        chosen = sample(logits, position)
    penalized = penalize(logits, text, flags["repetition_penalty"]).astype(float).tolist()
    filters = {name: flags[name] for name in ("temperature", "top_k", "top_p", "min_p")}
    assert chosen in not_clearly_filtered(penalized, **filters)


def test_the_repetition_penalty_without_noise_is_greedy_on_penalized_logits():
    sample = make_sampler(0, repetition_penalty=2)
    logits = np.float32([3, -1, 2, 1.75])
    for text, expected in (([], 0), ([1], 0), ([0, 0], 2), ([0, 2], 3), ([0, 2, 3, 99], 0)):
        assert for_text(sample, text)(logits, len(text)) == expected
    assert for_text(sample, [0])(np.float32([-1, -1.5]), 1) == 1
    assert (logits == np.float32([3, -1, 2, 1.75])).all()


def test_the_repetition_penalty_sees_the_text_grow():
    text = []
    sample = for_text(make_sampler(0, repetition_penalty=100), text)
    for _ in range(len(LOGITS)):
        text.append(sample(LOGITS, len(text)))
    positive = int((LOGITS > 0).sum())
    assert text[:positive] == np.argsort(-LOGITS, kind="stable")[:positive].tolist()


def test_the_repetition_penalty_without_a_text_is_refused():
    with pytest.raises(ValueError, match="the repetition penalty depends on the text"):
        make_sampler(repetition_penalty=1.2)(LOGITS, 0)


def test_no_penalty_depends_on_no_text():
    assert not hasattr(make_sampler(0.7), "for_text") and for_text(greedy, [1]) is greedy


# ----------------------------------------------------------------------------------------------------------------------
# The same as Hugging Face transformers (tools/make_goldens.py)
# ----------------------------------------------------------------------------------------------------------------------


def golden_logits(golden):
    return np.random.RandomState(golden["seed"]).normal(scale=3, size=GOLDENS["n_vocab"]).astype(np.float32)


@pytest.mark.parametrize("keep", [keep_top_k, keep_top_p, keep_min_p])
def test_a_filter_keeps_what_transformers_keeps(keep):
    for golden in GOLDENS["logits"]:
        logits = golden_logits(golden)
        for value, ids in golden["kept"][keep.__name__.removeprefix("keep_")]:
            kept = keep(logits, value)
            assert np.flatnonzero(np.isfinite(kept)).tolist() == ids
            assert (kept[ids] == logits[ids]).all() and kept.dtype == np.float32


def test_the_repetition_penalty_is_that_of_transformers():
    for golden in GOLDENS["logits"]:
        expected = golden_logits(golden)
        for penalty, values in golden["penalized"]:
            penalized = penalize(golden_logits(golden), golden["seen"], penalty)
            expected[[int(i) for i in values]] = list(values.values())
            np.testing.assert_allclose(penalized, expected, rtol=6e-6)  # of six digits
            assert penalized.dtype == np.float32


def test_all_filters_together_keep_what_transformers_keeps():
    sample = make_sampler(**GOLDENS["all"], seed=5)
    for golden in GOLDENS["logits"]:
        scores = for_text(sample, golden["seen"]).scores(golden_logits(golden), 25)
        assert np.flatnonzero(np.isfinite(scores)).tolist() == golden["kept_by_all"]


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes, seeds
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": -1}, "temperature is -1, expected 0 or a number from 1e-6 to 1e6"),
        ({"temperature": 1e-320}, "temperature is 1e-320"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": -1}, "top_k is -1, expected a whole number of 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0}, "top_p is 0, expected a number above 0 and up to 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1, expected a number from 0"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number from 0.01 to 100"),
        ({"repetition_penalty": 101}, "repetition_penalty is 101"),
        ({"repetition_penalty": "x"}, "repetition_penalty is 'x'"),
        ({"seed": -1}, "seed is -1, expected a whole number"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": 1 << 64}, "seed is 18446744073709551616"),
    ],
)
def test_a_value_outside_its_range_is_named(flags, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**flags)


def test_without_a_seed_each_sampler_has_its_own():
    draws = {tuple(make_sampler()(LOGITS, position) for position in range(30)) for _ in range(3)}
    assert len(draws) == 3
