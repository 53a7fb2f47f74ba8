import math

import numpy as np
import pytest

from sampling import NEAR_TIE, greedy, gumbel_noise, keep_top_k, keep_top_p, make_sampler, margin

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


@pytest.mark.parametrize(
    "flags", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"temperature": 2, "top_k": 6, "top_p": 0.9}]
)
def test_frequencies_are_the_distribution(flags):
    logits = np.float32([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -2.0])
    scaled = logits / flags.get("temperature", 1)
    if "top_k" in flags:
        scaled = keep_top_k(scaled, flags["top_k"])
    if "top_p" in flags:
        scaled = keep_top_p(scaled, flags["top_p"])
    expected = np.exp(scaled.astype(np.float64))
    expected /= expected.sum()
    n = 30_000
    sample = make_sampler(**{"temperature": 1} | flags, seed=1)
    counts = np.bincount([sample(logits, position) for position in range(n)], minlength=7)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_squared = ((counts[kept] - n * expected[kept]) ** 2 / (n * expected[kept])).sum()
    assert chi_squared < 25  # of 6 degrees of freedom or fewer: chance 0.0003


def test_margin_is_the_lead_of_the_choice():
    logits = np.float32([1, 5, 4.5, 2])
    assert margin(greedy, logits, 0) == 0.5
    assert margin(greedy, np.float32([3, 3]), 0) == 0 < NEAR_TIE
    assert margin(greedy, np.float32([3]), 0) == np.inf
    sample = make_sampler(1.0, seed=3)
    scores = np.sort(sample.scores(logits, 9))
    assert margin(sample, logits, 9) == pytest.approx(scores[-1] - scores[-2])
    assert sample(logits, 9) == sample.scores(logits, 9).argmax()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": -1}, "temperature is -1, expected a number of 0 or more"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"temperature": True}, "temperature is True"),
        ({"top_k": -1}, "top_k is -1, expected a whole number of 0"),
        ({"top_k": 2.5}, "top_k is 2.5"),
        ({"top_p": 0}, "top_p is 0, expected a number above 0 and up to 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
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
