"""The threads of a pass: one computes it, and those of OpenBLAS (server.py) help it where `team` is asked to.

They take columns of a product, heads of attention, rows of a prompt.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, pairwise

from fast.library import blas
from fast.server import find


def core_of(cpu: int) -> str:
    """A name that all processors of one physical core share."""
    try:
        with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as f:
            return f.read()
    except OSError:  # no Linux, or a sandbox: count every processor
        return str(cpu)


CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
CORES = [set(cpus) for _, cpus in groupby(sorted(CPUS, key=core_of), key=core_of)]


def count_threads() -> int:
    """Physical cores, or fewer if OMP_NUM_THREADS or OPENBLAS_NUM_THREADS says so."""
    limits = (os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return min(
        [len(CORES), *(int(limit) for limit in limits if limit.isdecimal() and len(limit) < 10 and int(limit) > 0)]
    )


def share_cores(i: int, n: int) -> None:
    """Leave this process the i-th of n parts of the cores, before its first pass: others have the rest."""
    n_cores, i = len(CORES), i % n
    first = i * n_cores // n
    CORES[:] = CORES[first : max(first + 1, (i + 1) * n_cores // n)]
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        os.environ[name] = str(len(CORES))
    if blas.controller:
        blas.set(len(CORES))


def cut(n: int, n_parts: int, size: int = 1) -> list[slice]:
    """range(n) in n_parts as equal as can be, each but the last of whole `size`s if there are enough of these."""
    size = size if n >= size * n_parts else 1
    edges = [min(n, round(n * i / n_parts / size) * size) for i in range(n_parts)]
    return [slice(*edge) for edge in pairwise([*edges, n])]


class Stopped(Exception):
    """Raised in a thread that would wait for one that has failed."""


N_PYTHON = 2  # threads that Python on small arrays is shared by: more of them wait for the GIL instead


class Team(threading.local):
    """The threads that a pass may use, as the thread that computes the pass sees them."""

    n_threads = 1

    @contextlib.contextmanager
    def of(self, n_threads: int) -> Iterator[None]:
        self.n_threads = n_threads
        try:
            yield
        finally:
            self.n_threads = 1

    def cut(self, n: int, size: int = 1) -> list[slice]:
        """range(n) in parts for works that call NumPy."""
        return cut(n, min(self.n_threads, N_PYTHON), size)

    def run(self, works: Sequence[Callable[[], object]], stop: Callable[[], None] = bool) -> list:
        """What each of the works returns, all called at once if there are threads, the first here.

        stop() is called when one fails and on Ctrl-C: it makes those that wait for others raise Stopped.
        """
        if self.n_threads == 1 or len(works) == 1:
            return [work() for work in works]
        with blas.held(self.n_threads):  # products of the works would wait for the threads that make them
            n_threads, self.n_threads = self.n_threads, 1  # works share out nothing themselves
            try:
                return find().call_all(works, stop)
            finally:
                self.n_threads = n_threads


team = Team()


class Forks:
    """What keeps a fork and the forward passes of other threads apart, without a lock that Ctrl-C could leave locked.

    Before a fork OpenBLAS ends its threads, even where a product of another thread still waits for what they compute
    (blas_thread_shutdown in driver/others/blas_server.c): that product would never end.
    """

    POLL_S = 1e-3

    def __init__(self):
        self.forking, self.passing = set(), set()  # threads

    @contextlib.contextmanager
    def wait_for_pass(self):
        """Within it, forks of other threads wait. It begins when theirs are done."""
        me = threading.get_ident()
        try:
            self.passing.add(me)
            while self.forking:
                self.passing.discard(me)
                time.sleep(self.POLL_S)
                self.passing.add(me)
            yield
            self.passing.discard(me)
        except BaseException:  # as in Blas.held
            self.passing.discard(me)
            raise

    def before(self) -> None:
        self.forking.add(threading.get_ident())
        self.passing.discard(threading.get_ident())  # a pass that forks need not wait for itself
        while self.passing:
            time.sleep(self.POLL_S)

    def in_parent(self) -> None:
        self.forking.discard(threading.get_ident())

    def in_child(self) -> None:
        """A child has none of its parent's threads."""
        self.__init__()
        blas.__init__()


forks = Forks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=forks.before, after_in_parent=forks.in_parent, after_in_child=forks.in_child)
