"""Threads of our own, one on each core, and BLAS held to one thread while they work.

BLAS's own threads share a single product. They spin for up to 0.1 s after each, and a product of few rows is over
before they are awake. These threads share whole forward passes instead (shares.py); their caller waits.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor  # before `forks`, or a fork takes its lock first
from contextvars import copy_context
from functools import cached_property, partial
from itertools import groupby


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


crews: list[list] = []  # executors of one thread each, on a core of its own; a pass takes a crew and puts it back


class Stopped(Exception):
    """Raised in a thread that would wait for one that has failed."""


def stay_on(core: set[int]) -> None:
    """Linux likes to wake a thread where its waker runs, although another core idles."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or a sandbox that binds no threads
        os.sched_setaffinity(0, core)


def submit(run_one: Callable, executor: ThreadPoolExecutor, work: Callable[[], object]) -> Future:
    return executor.submit(copy_context().run, run_one, work)


def run(works: list[Callable[[], object]], stop: Callable[[], None] = bool) -> list:
    """Call all of `works` at once, each on a core of its own, and return what they return.

    `stop` makes those that wait for each other raise Stopped. It is called when one fails, and on Ctrl-C.
    """

    def stopping_others(work):
        try:
            with blas.held():  # here, where Ctrl-C does not come
                return work()
        except BaseException:
            stop()
            raise

    try:
        crew = crews.pop()
    except IndexError:
        crew = []
    try:
        for i in range(len(crew), len(works)):
            crew.append(ThreadPoolExecutor(1, initializer=stay_on, initargs=[CORES[i % len(CORES)]]))
        # Each in a copy of this thread's context, which says what NumPy warns of.
        futures = list(map(partial(submit, stopping_others), crew, works))
        errors = list(filter(None, map(Future.exception, futures)))
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
    except BaseException:
        stop()
        for executor in crew:  # works that still run write into memory that the caller goes on to use: wait for them
            executor.shutdown(cancel_futures=True)
        raise
    crews.append(crew)
    return [future.result() for future in futures]


class OthersTurn(threading.local):
    """`with others_turn:` around what runs without Python, for threads that take turns in running it.

    Two threads that both want the GIL hand it to each other in every call of NumPy, and each time one has to wake up:
    a step of 5 rows of 124M takes 48 ms instead of 43.
    """

    lock = None  # by which this thread takes turns, and which it holds

    def __enter__(self):
        if self.lock:
            self.lock.release()

    def __exit__(self, *error):
        if self.lock:
            self.lock.acquire()


others_turn = OthersTurn()


def in_turn(lock: threading.Lock, work: Callable):
    """work(), in turn with the other threads that have this lock."""
    with lock:
        others_turn.lock = lock
        try:
            return work()
        finally:
            others_turn.lock = None


class Blas:
    """NumPy's BLAS, held to one thread during passes that need that. The number holds for all threads of the process.

    Holding takes 3 us, so it is done for each pass and not for a text: between two tokens a program has BLAS as it was.
    """

    def __init__(self):
        self.lock, self.holders, self.n_before = threading.Lock(), set(), 0

    @cached_property
    def controller(self):
        """What sets the number of threads, or None."""
        try:
            import threadpoolctl  # only needed here; without it all products are plain ones on BLAS's threads
        except ImportError:
            return None
        found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
        return min(found, key=lambda library: "numpy" not in library.filepath, default=None)

    def set(self, n: int) -> None:
        # From 3.8 on the public method does nothing but in the first thread that called it, as long as that lives.
        getattr(self.controller, "_real_set_num_threads", self.controller.set_num_threads)(n)

    @contextlib.contextmanager
    def held(self):
        me = threading.get_ident()
        try:
            # On one line: a signal cannot come between the lines of a `with`, but the test's KeyboardInterrupt can.
            with self.lock: self.hold(me)  # fmt: skip  # noqa: E701
            yield
        finally:
            with self.lock: self.let_go(me)  # fmt: skip  # noqa: E701

    # In this order, an interrupt between two lines leaves BLAS's number to the thread's next pass, and never loses it.

    def hold(self, me: int) -> None:
        if self.controller:
            if not self.holders:
                self.n_before = self.controller.get_num_threads()
            self.holders.add(me)
            self.set(1)

    def let_go(self, me: int) -> None:
        if self.holders == {me}:
            self.set(self.n_before)
        self.holders.discard(me)


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
        finally:
            self.passing.discard(me)

    def before(self) -> None:
        self.forking.add(threading.get_ident())
        self.passing.discard(threading.get_ident())  # a pass that forks need not wait for itself
        while self.passing:
            time.sleep(self.POLL_S)

    def in_parent(self) -> None:
        self.forking.discard(threading.get_ident())

    def in_child(self) -> None:
        """A child has none of its parent's threads."""
        crews.clear()
        self.__init__()
        blas.__init__()


blas = Blas()
forks = Forks()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=forks.before, after_in_parent=forks.in_parent, after_in_child=forks.in_child)
