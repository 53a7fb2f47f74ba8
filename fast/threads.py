"""Threads of our own, one on each core, and BLAS held to one thread while they work.

BLAS's own threads share a single product. They spin for up to 0.1 s after each, and a product of few rows is over before
they are awake. These threads share whole forward passes instead (shares.py, prompts.py); the calling thread waits.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import cache
from queue import SimpleQueue


def cpus_by_core() -> list[set[int]]:
    """The processors this process may use, those of one physical core together."""
    cores: dict[str, set[int]] = {}
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1):
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as f:
                cores.setdefault(f.read(), set()).add(cpu)
        except OSError:  # no Linux, or a sandbox: count every processor
            cores[str(cpu)] = {cpu}
    return list(cores.values())


CORES = cpus_by_core()


def count_threads() -> int:
    """Physical cores, or fewer if OMP_NUM_THREADS or OPENBLAS_NUM_THREADS says so."""
    limits = (os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return min([len(CORES), *(int(limit) for limit in limits if limit.isdecimal() and int(limit) > 0)])


n_threads = count_threads()

# ----------------------------------------------------------------------------------------------------------------------
# Work for threads
# ----------------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Raised in a thread that would wait for another which has failed."""


class Job:
    """Work for another thread. The first to get the `ticket`, the worker or who cancels, decides whether it is done."""

    def __init__(self, work: Callable[[], object]):
        self.work = copy_context().run, work  # the context says which warnings NumPy gives
        self.ticket, self.is_done, self.done = threading.Lock(), False, threading.Lock()
        self.result = self.error = None
        self.done.acquire()

    def __call__(self) -> None:
        if self.ticket.acquire(blocking=False):
            try:
                run, work = self.work
                self.result = run(work)
            except BaseException as e:  # raised again in the thread that waits
                self.error = e
            self.is_done = True
            self.done.release()

    def cancel(self) -> None:
        """Return when the work is over or will not begin. Ctrl-C does not end this: the work writes to its caller's memory."""
        while not (self.is_done or self.ticket.acquire(blocking=False)):
            with contextlib.suppress(KeyboardInterrupt):
                self.done.acquire()


class Worker:
    """A daemon thread on the processors of one core; it ends with this object. An executor takes twice as long to wake.

    Left to itself, Linux likes to wake a thread where its waker runs, although another core idles.
    """

    def __init__(self, core: set[int]):
        self.jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        threading.Thread(target=work_off, args=[self.jobs, core], daemon=True).start()

    def __del__(self):
        self.jobs.put(sys.exit)  # which ends a thread without a word


def work_off(jobs: SimpleQueue, core: set[int]) -> None:
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or a sandbox that binds no threads
        os.sched_setaffinity(0, core)
    while True:
        jobs.get()()


crews: list[list[Worker]] = []  # which no pass is using


def run(works: list[Callable[[], object]], stop: Callable[[], None] = bool) -> list:
    """Call all of `works` at once, each on a core of its own, and return what they return.

    `stop` makes those that wait for each other raise Stopped. It is called when one fails, and on Ctrl-C.
    """

    def stopping_others(work):
        try:
            return work()
        except BaseException:
            stop()
            raise

    try:
        crew = crews.pop()
    except IndexError:
        crew = []
    crew += [Worker(CORES[i % len(CORES)]) for i in range(len(crew), len(works))]
    jobs = [Job(lambda work=work: stopping_others(work)) for work in works]
    try:
        with blas.held():
            for worker, job in zip(crew, jobs, strict=False):
                worker.jobs.put(job)
            for job in jobs:
                job.done.acquire()
    finally:
        stop()  # changes nothing where all are done
        for job in jobs:
            job.cancel()
    crews.append(crew)
    errors = [job.error for job in jobs if job.error]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [job.result for job in jobs]


# ----------------------------------------------------------------------------------------------------------------------
# BLAS
# ----------------------------------------------------------------------------------------------------------------------


class Blas:
    """NumPy's BLAS, held to one thread while any pass of ours needs that. The number holds for the whole process.

    Holding takes 3 us, so it is done for each pass and not for a text: between two tokens a program has BLAS as it was.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.holders: set[int] = set()  # threads
        self.n_before = 0

    @cache  # noqa: B019  # there is one Blas
    def controller(self):
        """What sets the number of threads, or None."""
        try:
            import threadpoolctl  # only needed here; without it all products are plain ones on BLAS's threads
        except ImportError:
            return None
        found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
        return next(iter(sorted(found, key=lambda library: "numpy" not in library.filepath)), None)

    @contextlib.contextmanager
    def held(self):
        me = threading.get_ident()
        try:
            # On one line, or else the test that interrupts at every line could leave the lock locked. Signals cannot.
            with self.lock: self.hold(me)  # fmt: skip  # noqa: E701
            yield
        finally:
            with self.lock: self.let_go(me)  # fmt: skip  # noqa: E701

    def hold(self, me: int) -> None:
        if self.controller() and not self.holders:
            self.n_before = self.controller().get_num_threads()
            self.holders.add(me)
            self.controller().set_num_threads(1)
        self.holders.add(me)

    def let_go(self, me: int) -> None:
        self.holders.discard(me)
        if self.controller() and not self.holders:
            self.controller().set_num_threads(self.n_before)


blas = Blas()

# ----------------------------------------------------------------------------------------------------------------------
# Forks
# ----------------------------------------------------------------------------------------------------------------------

FORK_POLL_S = 1e-3


class Forks:
    """What keeps a fork and the forward passes of other threads apart.

    Before a fork OpenBLAS ends its threads, even where a product of another thread still waits for what they compute
    (blas_thread_shutdown in driver/others/blas_server.c): that product would never end. There is no lock here, which
    Ctrl-C could leave locked.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.forking: set[int] = set()  # threads
        self.passing: set[int] = set()

    @contextlib.contextmanager
    def wait_for_pass(self):
        """Within it, other threads wait with their forks. First it waits for theirs."""
        me = threading.get_ident()
        try:
            self.passing.add(me)
            while self.forking:
                self.passing.discard(me)
                time.sleep(FORK_POLL_S)
                self.passing.add(me)
            yield
        finally:
            self.passing.discard(me)

    def before(self) -> None:
        self.forking.add(threading.get_ident())
        self.passing.discard(threading.get_ident())  # a pass that forks need not wait for itself
        while self.passing:
            time.sleep(FORK_POLL_S)

    def after(self) -> None:
        self.forking.discard(threading.get_ident())


forks = Forks()


def forget_threads() -> None:
    """A child has none of its parent's threads."""
    crews.clear()
    forks.reset()
    blas.__init__()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=forks.before, after_in_parent=forks.after, after_in_child=forget_threads)
