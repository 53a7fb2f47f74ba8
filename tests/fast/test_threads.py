import os
import threading
import time
import warnings

import numpy as np
import pytest
from helpers import random_model, shared_out

from fast import server, threads
from fast.threads import Stopped, blas, team


def n_blas():
    return blas.controller.get_num_threads() if blas.controller else None


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"])
def test_the_number_of_threads_is_respected(monkeypatch, name):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    n_cores = threads.count_threads()
    assert 1 <= n_cores <= (os.cpu_count() or 1)
    monkeypatch.setenv(name, "1")
    assert threads.count_threads() == 1
    for unusable in ("0", "many", "", "100000"):
        monkeypatch.setenv(name, unusable)
        assert threads.count_threads() == n_cores


def test_blas_has_one_thread_during_a_small_models_pass_and_its_own_before_and_after(monkeypatch):
    pytest.importorskip("threadpoolctl")
    model, during = random_model(), []
    cache = model.new_cache()
    store = type(cache).append
    monkeypatch.setattr(type(cache), "append", lambda *args: during.append(n_blas()) or store(*args))
    before = n_blas()
    blas.set(2)  # as a program may have set it
    try:
        for n in (5, 2, 1):
            model.forward([list(range(n))], cache)
            assert n_blas() == 2
    finally:
        blas.set(before)
    assert set(during) == {1} and not blas.holders


def test_the_last_of_several_passes_lets_blas_go():
    pytest.importorskip("threadpoolctl")
    before, inside, leave = n_blas(), threading.Barrier(3), threading.Event()

    def hold():
        with blas.held():
            inside.wait(60)
            leave.wait(60)

    holders = [threading.Thread(target=hold, daemon=True) for _ in range(2)]
    for holder in holders:
        holder.start()
    inside.wait(60)
    with blas.held():
        assert n_blas() == 1
    assert n_blas() == 1
    leave.set()
    for holder in holders:
        holder.join(60)
    assert n_blas() == before


@pytest.mark.parametrize("limit", ["9" * 5000, "0", "-1", "many", ""])
def test_a_limit_that_is_none_is_ignored(monkeypatch, limit):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert threads.count_threads() == len(threads.CORES)


# ----------------------------------------------------------------------------------------------------------------------
# A team
# ----------------------------------------------------------------------------------------------------------------------

found_only = pytest.mark.skipif(not server.find(), reason="this BLAS has no threads that can be used")


def in_team(works, n_threads=3, stop=bool):
    shared_out(random_model(), n_threads, is_packed=False)  # so many are started
    with team.of(n_threads):
        return team.run(works, stop)


@found_only
def test_works_are_done_at_once_each_on_its_own_thread_and_results_come_in_order():
    together = threading.Barrier(3)
    works = [lambda i=i: (i, together.wait(60) * 0, threading.get_ident()) for i in range(3)]
    for _ in range(100):  # one after another, as the products of a pass
        results = in_team(works)
        assert [i for i, *_ in results] == [0, 1, 2]
        idents = [ident for *_, ident in results]
        assert len(set(idents)) == 3 and idents[0] == threading.get_ident()
    assert team.n_threads == 1 and not server.calls


@found_only
def test_blas_has_one_thread_while_its_threads_call_python():
    before = n_blas()
    assert in_team([n_blas] * 2) == [1, 1] and n_blas() == before and not blas.holders


@found_only
@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_more_works_than_threads_and_works_within_works_are_all_done(n_threads):
    done = []
    in_team([lambda i=i: team.run([lambda: done.append(i)] * 2) for i in range(5)], n_threads)
    assert sorted(done) == sorted([*range(5)] * 2)


def test_without_a_team_works_are_done_one_after_another():
    idents = team.run([threading.get_ident] * 3)
    assert idents == [threading.get_ident()] * 3


@found_only
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_arrives_when_all_others_are_done(failing, error):
    done = []

    def part(i):
        if i == failing:
            raise error(i)
        time.sleep(0.01)
        done.append(i)

    for _ in range(3):  # and threads go on
        done.clear()
        with pytest.raises(error):
            in_team([lambda i=i: part(i) for i in range(3)])
        assert sorted(done) == sorted({0, 1, 2} - {failing}) and not blas.holders
    assert in_team([int] * 3) == [0, 0, 0]


@found_only
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_stops_the_others_that_wait_and_is_the_one_that_arrives(failing):
    stopped = threading.Event()

    def work(number):
        if number == failing:
            raise ZeroDivisionError(number)
        assert stopped.wait(60)
        raise Stopped

    for _ in range(3):
        stopped.clear()
        with pytest.raises(ZeroDivisionError):
            in_team([lambda i=i: work(i) for i in range(2)], 2, stopped.set)


def warns() -> bool:
    """Whether NumPy warns here of a difference that is not a number."""
    x = np.full(1000, np.inf, np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x - x
    return bool(caught)


@found_only
def test_threads_warn_as_their_caller_does():
    """Weights that are NaN are reported in one line, not by warnings of the threads that meet them first."""
    with np.errstate(invalid="ignore"):
        assert in_team([int, warns]) == [0, False]
    assert in_team([int, warns]) == [0, True]


@pytest.mark.parametrize("n", [7, 25, 61, 3072, 50257])
@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 64])
def test_cuts_cover_everything_once_as_equally_as_can_be(n, n_parts, size):
    parts = threads.cut(n, n_parts, size)
    assert len(parts) == n_parts and [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 2 * size
