"""The adaptive draft length finds what pays, on simulated rounds."""

from itertools import count

import numpy as np

from decoding.draft_length import Adaptive


def simulate(p, draft_cost, pass_cost, n_rounds=200, p_unsure=0.0):
    """The lengths asked for, on a clock of its own.

    Guesses are right with probability p. With p_unsure, the drafter is not sure of one, which is wrong and its last.
    """
    now, rng, asked, n_sure = [0.0], np.random.default_rng(0), [], [0]

    def drafter(tokens, n_max):
        asked[-1] = n_max
        n_sure[0] = next((i for i in range(n_max) if rng.random() < p_unsure), n_max)
        n_guesses = min(n_sure[0] + 1, n_max)
        now[0] += draft_cost * n_guesses
        return [1] * n_guesses

    adaptive = Adaptive(drafter, 10, clock=lambda: now[0])
    tokens = [0] * 5
    for _ in range(n_rounds):
        asked.append(0)
        guesses = adaptive(tokens, 10)
        now[0] += pass_cost(len(guesses))
        n_right = next((i for i in range(len(guesses)) if i == n_sure[0] or rng.random() >= p), len(guesses))
        tokens = tokens + [1] * n_right + [2]
    return asked


def test_length_grows_when_guesses_are_right_and_cheap():
    asked = simulate(0.98, 0.01, lambda n: 1 + 0.02 * n)
    assert np.mean(asked[50:]) > 8


def test_guesses_cost_nothing_where_the_drafter_is_not_sure_of_them():
    asked = simulate(0.98, 0.25, lambda n: 1 + 0.15 * n, p_unsure=0.3)
    assert np.mean(asked[50:]) > 8  # if all were made, one would pay best


def test_length_shrinks_when_guesses_are_wrong():
    asked = simulate(0.4, 0.05, lambda n: 1 + 0.1 * n)
    assert 0.5 < np.mean(asked[50:]) < 3


def test_speculation_switches_itself_off_when_it_loses():
    for p, draft_cost, slope in ((0.1, 0.5, 0.3), (0.7, 1.0, 0.5), (0.9, 0.01, 3.0)):
        asked = simulate(p, draft_cost, lambda n, slope=slope: 1 + slope * n)
        assert np.mean(np.array(asked[50:]) == 0) > 0.85
        assert max(asked[50:]) <= 2  # tried again now and then


def test_what_slows_a_round_down_once_does_not_switch_speculation_off():
    seen = set()

    def pass_cost(n):
        is_first = n not in seen
        seen.add(n)
        return 1 + 0.1 * n + 50 * (is_first and n > 0)  # which chooses how to multiply n + 1 rows

    assert np.mean(simulate(0.8, 0.02, pass_cost, n_rounds=60)[20:]) > 3


def test_a_busy_machine_does_not_decide_the_length_for_ever():
    n_rounds = [0]

    def pass_cost(n):
        n_rounds[0] += 1
        return (1 + 0.02 * n) * (4 if n > 1 and n_rounds[0] < 12 else 1)

    asked = simulate(0.8, 0.1, pass_cost, n_rounds=400)
    assert np.mean(asked[150:]) > 2.5


def test_more_guesses_than_were_asked_for_are_left_out():
    adaptive, tokens = Adaptive(lambda tokens, n_max: [1] * 20, 4, clock=count().__next__), [0]
    for _ in range(30):
        guesses = adaptive(tokens, 10)
        assert len(guesses) <= 4
        tokens = tokens + guesses + [1]
    assert len(guesses) == 4
