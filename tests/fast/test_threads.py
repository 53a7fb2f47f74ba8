import os
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_model, run, shared_out

from fast import threads
from fast.threads import Stopped, blas, crews, team


def n_blas():
    return blas.controller.get_num_threads() if blas.controller else None


def test_results_come_in_order_and_threads_are_used_again():
    idents = [set(threads.run([threading.get_ident] * 3)) for _ in range(3)]
    assert idents[0] == idents[1] == idents[2] and len(idents[0]) == 3
    assert threads.run([lambda i=i: i for i in range(5)]) == list(range(5))
    assert threading.get_ident() not in idents[0]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_any_thread_arrives_and_stops_the_others(failing):
    stopped = threading.Event()

    def work(number):
        if number == failing:
            raise ZeroDivisionError(number)
        assert stopped.wait(60)
        raise Stopped

    for _ in range(3):  # and there are threads for the next
        stopped.clear()
        with pytest.raises(ZeroDivisionError):
            threads.run([lambda i=i: work(i) for i in range(2)], stopped.set)
    assert threads.run([int, int]) == [0, 0]


def test_several_callers_have_threads_of_their_own():
    together, idents = threading.Barrier(4), []

    def call():
        idents.extend(threads.run([lambda: (together.wait(60) and 0) or threading.get_ident()] * 2))

    callers = [threading.Thread(target=call, daemon=True) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert len(set(idents)) == 4


def test_a_thread_ends_with_its_crew():
    n_before = threading.active_count()
    threads.run([int] * 7)
    assert threading.active_count() >= n_before
    crews.clear()
    for _ in range(1000):
        if threading.active_count() <= n_before:
            return
        time.sleep(0.01)
    pytest.fail(f"{threading.active_count() - n_before} threads are left")


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


@pytest.mark.parametrize("is_large", [False, True])
def test_blas_has_one_thread_during_a_pass_and_its_own_before_and_after(is_large, monkeypatch):
    pytest.importorskip("threadpoolctl")
    model, during = random_model(), []
    if is_large:
        model = shared_out(model)
    cache = model.new_cache()
    store = type(cache).append
    monkeypatch.setattr(type(cache), "append", lambda *args: during.append(n_blas()) or store(*args))
    before = n_blas()
    blas.set(2)  # as a program may have set it
    try:
        for n in (5, 2, 1 if not is_large else 2):
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


def warns() -> bool:
    """Whether NumPy warns here of a difference that is not a number."""
    x = np.full(1000, np.inf, np.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x - x
    return bool(caught)


def test_threads_warn_as_their_caller_does():
    """Weights that are NaN are reported in one line, not by warnings of the threads that meet them first."""
    with np.errstate(invalid="ignore"):
        assert threads.run([warns]) == [False]
    assert threads.run([warns]) == [True]


def test_a_sandbox_that_binds_no_threads_is_no_error():
    code = """if True:
        import os, sys
        def refuse(*args):
            raise PermissionError
        os.sched_setaffinity = refuse
        sys.path.insert(0, "tests")
        from helpers import random_model, shared_out
        model = shared_out(random_model())
        assert model.forward([[1, 2]], model.new_cache()).shape == (1, 1, 61)
    """
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("limit", ["9" * 5000, "0", "-1", "many", ""])
def test_a_limit_that_is_none_is_ignored(monkeypatch, limit):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert threads.count_threads() == len(threads.CORES)


# ----------------------------------------------------------------------------------------------------------------------
# A team
# ----------------------------------------------------------------------------------------------------------------------


def in_team(work, n_helpers=2):
    return threads.run([work], n_helpers=n_helpers)[0]


def test_a_team_computes_its_works_at_once_each_on_its_own_thread():
    together = threading.Barrier(3)

    def work():
        idents = []
        for _ in range(100):  # one after another, as the products of a pass
            team.run([lambda: (together.wait(60), idents.append(threading.get_ident()))] * 3)
        return idents

    idents = in_team(work)
    assert len(idents) == 300 and len(set(idents)) == 3 and not team.helpers


def test_more_works_than_threads_and_works_within_works_are_all_done():
    def work(n_helpers):
        done = []
        team.run([lambda i=i: team.run([lambda: done.append(i)] * 2) for i in range(5)])
        assert sorted(done) == sorted([*range(5)] * 2) and len(team.helpers) == n_helpers

    for n_helpers in (0, 1, 2, 7):
        in_team(lambda n=n_helpers: work(n), n_helpers)
    work(0)  # on a thread without a team


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_of_a_helper_arrives_when_all_others_are_done(failing, error):
    done = []

    def part(i):
        if i == failing:
            raise error(i)
        time.sleep(0.01)
        done.append(i)

    def work():
        team.run([lambda i=i: part(i) for i in range(3)])

    n_crews = len(crews)
    with pytest.raises(error):
        in_team(work)
    assert sorted(done) == sorted({0, 1, 2} - {failing}) and len(crews) == max(0, n_crews - 1) and not blas.holders
    assert in_team(lambda: team.run([int] * 3)) is None


def test_an_interrupted_pass_ends_at_its_next_product(monkeypatch):
    began, n_products, start = threading.Event(), 0, threads.Worker.start

    def product():
        nonlocal n_products
        n_products += 1
        began.set()
        time.sleep(0.001)

    def work():
        while True:
            team.run([product] * 2)

    def wait():
        began.wait(60)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(threads.Worker, "start", lambda self, work: start(self, work) and SimpleNamespace(get=wait))
        in_team(work, 0)
    n_before = n_products
    time.sleep(0.01)
    assert n_products == n_before > 0


def test_helpers_warn_as_their_caller_does():
    warned = []
    with np.errstate(invalid="ignore"):
        in_team(lambda: [team.run([int, lambda: warned.append(warns())]) for _ in range(3)])
    assert warned == [False] * 3


@pytest.mark.parametrize("n", [7, 25, 61, 3072, 50257])
@pytest.mark.parametrize("n_parts", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 64])
def test_cuts_cover_everything_once_as_equally_as_can_be(n, n_parts, size):
    parts = threads.cut(n, n_parts, size)
    assert len(parts) == n_parts and [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 2 * size
