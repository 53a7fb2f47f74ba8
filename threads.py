"""Threads of our own, for what BLAS's threads do badly: products of few rows, and everything between products.

BLAS's threads spin for up to 0.1 s after each product, and take the cores meanwhile: a step of 5 rows then took 60 ms
instead of 21. So work that is shared here keeps BLAS to one thread, or has products so small that it uses none.
"""

import contextlib
import ctypes
import os
import queue
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import cache, partial


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


def n_threads() -> int:
    """Physical cores, or fewer if OMP_NUM_THREADS or OPENBLAS_NUM_THREADS says so."""
    limits = (os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return min([len(CORES), *(int(limit) for limit in limits if limit.isdecimal() and int(limit) > 0)])


def find_current_cpu() -> Callable[[], int] | None:
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(0))
        return ctypes.CDLL(None).sched_getcpu
    except (AttributeError, OSError, TypeError):
        return None  # not Linux, or a sandbox that binds no threads: none is moved


current_cpu = find_current_cpu()

FORK_POLL_S = 1e-3


class Team:
    """Threads that share a product. They are daemons: they never outlive the program."""

    def __init__(self, n_threads: int):
        self.n_threads = n_threads
        self.reset()

    def reset(self) -> None:
        self.busy = threading.Lock()
        self.helpers: list[Helper] = []

    def hire(self, n_helpers: int) -> None:
        while len(self.helpers) < n_helpers:
            self.helpers.append(Helper())

    def run(
        self,
        work: Callable[[int, slice], None],
        shares: list[slice],
        context=contextlib.nullcontext,
        release: Callable[[], None] = bool,
    ) -> None:
        """Call work(number, share) for all shares at once, within context(); in turn if the team is busy.

        `release` lets go those that wait for share 0, which Ctrl-C may have ended before it began.
        """
        if len(shares) == 1 or not self.busy.acquire(blocking=False):
            for number, share in enumerate(shares):
                work(number, share)
            return
        try:
            self.hire(len(shares) - 1)
            others = zip(self.helpers, range(1, len(shares)), strict=False)
            jobs: list[Job] = []
            with context():
                try:
                    for helper, number in others:
                        jobs.append(helper.start(partial(work, number, shares[number])))
                    work(0, shares[0])
                finally:
                    release()
                    errors = [job.wait() for job in jobs]
            for error in filter(None, errors):
                raise error
        finally:
            self.busy.release()

    @contextlib.contextmanager
    def one_core_each(self):
        """Keep this thread where it is, and the helpers off its core.

        Linux likes to wake a thread where its waker runs, and leaves it there for a while although other processors
        idle: a product of 5 rows with [768, 3072] then takes 1.0 ms instead of 0.55.
        """
        if current_cpu is None:
            yield
            return
        self.hire(self.n_threads - 1)  # now: a thread inherits where its maker may run
        cpu, allowed = current_cpu(), os.sched_getaffinity(0)
        for helper, core in zip(self.helpers, (core for core in CORES if cpu not in core), strict=False):
            helper.move(core)
        try:
            os.sched_setaffinity(0, {cpu})
            yield
        finally:
            os.sched_setaffinity(0, allowed)


class Helper:
    """One thread that takes work from a queue. A concurrent.futures executor takes twice as long to hand it over."""

    def __init__(self):
        self.jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self.core: set[int] = set()
        self.thread = threading.Thread(target=self.loop, daemon=True)
        self.thread.start()

    def move(self, core: set[int]) -> None:
        if self.core != core:
            os.sched_setaffinity(self.thread.native_id, core)
            self.core = core

    def loop(self) -> None:
        while True:
            self.jobs.get().do()

    def start(self, work: Callable[[], None]) -> "Job":
        job = Job(partial(copy_context().run, work))  # with it goes which warnings NumPy gives
        self.jobs.put(job)
        return job


class Job:
    """Work of a helper."""

    def __init__(self, work: Callable[[], None]):
        self.work = work
        self.error: BaseException | None = None
        self.is_done = False
        self.done = threading.Lock()
        self.done.acquire()

    def do(self) -> None:
        try:
            self.work()
        except BaseException as e:  # raised again in the thread that waits
            self.error = e
        self.is_done = True
        self.done.release()

    def wait(self) -> BaseException | None:
        """What went wrong. Ctrl-C does not end it: the work writes into memory that its caller goes on to use."""
        while not self.is_done:
            try:
                self.done.acquire()
            except BaseException as e:
                self.error = e
        return self.error


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
    def held_off(self):
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


team = Team(n_threads())
forks = Forks()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=forks.before, after_in_parent=forks.after, after_in_child=forks.reset)
    os.register_at_fork(after_in_child=team.reset)  # a child has none of its parent's threads


@cache
def blas_controller():
    """What holds NumPy's BLAS to one thread, or None."""
    try:
        import threadpoolctl  # only needed here, for prompts; without it they are computed on BLAS's threads
    except ImportError:
        return None
    controller = threadpoolctl.ThreadpoolController().select(user_api="blas")
    return controller if controller.lib_controllers else None


def blas_on_one_thread():
    return blas_controller().limit(limits=1)
