import os
import threading
import warnings

import numpy as np
import pytest
import threads


def test_a_busy_team_leaves_the_work_to_its_caller():
    team, done = threads.Team(2), []
    team.busy.acquire()
    team.run(lambda number, share: done.append((number, threading.get_ident())), [slice(0, 1), slice(1, 2)])
    assert done == [(0, threading.get_ident()), (1, threading.get_ident())]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_any_thread_arrives(failing):
    team = threads.Team(2)

    def work(number, share):
        if number == failing:
            raise ZeroDivisionError(number)

    for _ in range(3):  # and the team stays usable
        with pytest.raises(ZeroDivisionError):
            team.run(work, [slice(0, 1), slice(1, 2)])
    team.run(lambda number, share: None, [slice(0, 1), slice(1, 2)])


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_the_number_of_threads_is_respected(monkeypatch, name):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    n_cores = threads.n_threads()
    assert 1 <= n_cores <= (os.cpu_count() or 1)
    monkeypatch.setenv(name, "1")
    assert threads.n_threads() == 1
    for unusable in ("0", "many", "", "100000"):
        monkeypatch.setenv(name, unusable)
        assert threads.n_threads() == n_cores


def test_blas_has_its_threads_again_after_a_prompt():
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def n_blas():
        return [lib["num_threads"] for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas"]

    before = n_blas()
    with threads.blas_on_one_thread():
        during = n_blas()
    assert set(during) == {1} and n_blas() == before


def test_threads_warn_as_their_caller_does():
    """Weights that are NaN are reported in one line, not by warnings of the threads that meet them first."""
    x, team, warned = np.full(8, np.inf, np.float32), threads.Team(2), []

    def work(number, share):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            x - x
        warned.append(bool(caught))

    with np.errstate(invalid="ignore"):
        team.run(work, [slice(0, 1), slice(1, 2)])
    assert warned == [False, False]
