"""OpenBLAS's own threads, handed what OpenBLAS itself never hands them: its kernel with packed weights, and Python.

They wait for the next product in a loop that needs neither waking nor the GIL, as no thread of Python can: 5 rows of
124M take 0.92 of the time that they take with threads of Python (docs/performance.md). The functions that hand work to
them are private. So they are looked up, both known layouts of their queue are tried, and jobs must arrive as they were
sent, and products be right, before any of it is used. Otherwise `find` returns None, and products are plain.

The queue is blas_queue_t of OpenBLAS's common_thread.h. Its server is driver/others/blas_server.c.
"""

import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from ctypes import CFUNCTYPE, PYFUNCTYPE, addressof, c_float, c_int, c_int64, c_void_p, cast, py_object, pythonapi
from functools import lru_cache, partial
from itertools import count, pairwise

import numpy as np

from fast.kernels import ALPHA, KERNELS, LDC, N_ARGS, ONE, A, B, C, K, Kernel, M, N, jobs_of, side_by_side
from fast.library import blas
from fast.symbols import addresses

OTHERS = ["exec_blas", "exec_blas_async", "exec_blas_async_wait", "blas_num_threads"]
LAYOUTS = ((8, 20), (9, 21))  # words of 8 bytes before `next` and `mode`: OpenBLAS 0.3.29 to 0.3.34.0; 0.3.34.237
ARGS = 3  # words before the pointer to the arguments, which three others follow: range_m, range_n, sa
KERNEL_MODE, PYTHON_MODE, LOOP_MODE = 0x8002, 0x4000, 2  # BLAS_LEGACY | BLAS_SINGLE, BLAS_PTHREAD, BLAS_SINGLE
calls: dict[int, Callable] = {}  # that threads are about to make, by a number that stands for one in a queue
numbers = count(1)


@CFUNCTYPE(None, c_int64)
def call(number):
    calls.pop(number)()


def address_of(function) -> int:
    return cast(function, c_void_p).value


class Queue:
    """Memory for n jobs, which OpenBLAS's threads do at once, one of them the caller's.

    `args`, int64[n, N_ARGS], are to be set. Each job is done by `routine`.
    """

    def __init__(self, layout: tuple[int, int], n: int, mode: int, routine: int):
        (at_next, at_mode), size = layout, layout[1] + 1
        self.words = np.zeros((n, size + N_ARGS), np.int64)
        self.n_bytes = self.words.strides[0]  # of a job
        addresses = self.words.ctypes.data + self.n_bytes * np.arange(n)
        self.args, self.address = self.words[:, size:], int(addresses[0])
        self.words[:, 0], self.words[:, at_mode], self.words[:, ARGS] = routine, mode, addresses + 8 * size
        self.words[:-1, at_next] = addresses[1:]


def numpy_loop() -> int:
    """The address of PyUFunc_D_D(args, dimensions, steps, function) of NumPy's C API, which has it as number 10.

    It calls function(address of a number, address of a result) for each number of an array.
    """
    get = PYFUNCTYPE(c_void_p, py_object, c_void_p)(("PyCapsule_GetPointer", pythonapi))
    return (c_void_p * 11).from_address(get(np._core._multiarray_umath._UFUNC_API, None))[10]


class Chains:
    """Memory for n jobs, each n_calls calls of `routine` one after the other: threads meet when all are done.

    `args`, int64[n, n_calls, N_ARGS], are to be set. A job is NumPy's loop, and the function that it calls exec_blas:
    what that takes for the number of jobs is an address, but its queue ends after one, so it does that one itself.
    """

    def __init__(self, layout: tuple[int, int], n: int, n_calls: int, routine: int, execute: int):
        self.calls = Queue(layout, n * n_calls, KERNEL_MODE, routine)
        self.calls.words[:, layout[0]] = 0  # each call is the only job of its queue
        self.args = self.calls.args.reshape(n, n_calls, N_ARGS)
        self.jobs = Queue(layout, n, LOOP_MODE, numpy_loop())
        self.address, stride = self.jobs.address, self.calls.n_bytes
        first, args = self.calls.address + n_calls * stride * np.arange(n), self.jobs.words[:, ARGS]
        for i, word in enumerate((first, first, n_calls, 0, stride)):  # two args, a dimension, two steps
            self.jobs.args[:, i] = word
        for i, word in enumerate((args + 16, args + 24, execute), ARGS + 1):  # where the last two lie, the function
            self.jobs.words[:, i] = word


class Server(threading.local):
    """What hands jobs to OpenBLAS's threads."""

    def __init__(self, kernels: dict[Kernel, int], layout: tuple[int, int], *addresses: int):
        self.kernels, self.layout = kernels, layout
        self.address, start, wait, n_threads = addresses  # of OTHERS
        to_do = CFUNCTYPE(c_int, c_int64, c_int64)  # (number of jobs, the queue's address)
        self.execute, self.start, self.wait = to_do(self.address), to_do(start), to_do(wait)
        self.n_started = c_int.from_address(n_threads)
        self.memories: dict[tuple, Queue | Chains] = {}  # each thread of Python has its own

    @property
    def n_threads(self) -> int:
        """How many there are, the caller's included; more are started when a program asks OpenBLAS for more."""
        return self.n_started.value

    def memory(self, of, *size) -> Queue | Chains:
        """The same for the same size."""
        if (of, size) not in self.memories:
            self.memories[of, size] = of(self.layout, *size)
        return self.memories[of, size]

    def multiply(self, kernel, x, n_rows, y, jobs) -> None:  # addresses of x and y
        """Add to y the product of x, which lies as side_by_side has it, and the panels that `jobs` are of."""
        n_jobs, n_turns, _, _ = jobs.shape
        n_called = min(n_rows, kernel.n_rows)
        n_calls = n_rows // n_called  # for each panel, which is in a cache from the second on
        chains = self.memory(Chains, n_jobs, n_turns * n_calls, self.kernels[kernel], self.address)
        for i in range(n_calls):
            np.matmul(jobs, (1, n_rows, i * n_called, n_called, x, y), out=chains.args[:, i::n_calls])
        self.execute(n_jobs, chains.address)

    def product(self, x, kernel, panels, jobs):  # [n_rows, n_in] -> [n_rows, n_panels * width]
        """x and the panels that `jobs` are of, multiplied."""
        n_deep, n_panels, _, width = panels.shape
        blocks = side_by_side(x, kernel, n_deep)
        n_rows, n_columns = blocks.size // x.shape[1], n_panels * width
        y = np.zeros((n_rows, n_columns) if kernel.is_left else (n_columns, n_rows), np.float32)
        self.multiply(kernel, blocks.ctypes.data, n_rows, y.ctypes.data, jobs)
        return (y if kernel.is_left else y.T)[: len(x)]

    def call_all(self, works: Sequence[Callable[[], object]], stop: Callable[[], None]) -> list:
        """What each of the works returns, all called at once, the first here.

        stop() is called when one fails or on Ctrl-C; the error is raised when all have ended.
        """
        results, errors = [None] * len(works), []

        def keep(i):
            try:
                results[i] = works[i]()
            except BaseException as error:
                errors.append(error)
                stop()

        # More jobs than threads would wait for ever: OpenBLAS wakes threads that sleep when it has handed out all.
        n, ours = min(len(works), self.n_threads) - 1, []
        queue = self.memory(Queue, n, PYTHON_MODE, address_of(call))
        try:
            for i in range(n):
                ours.append(next(numbers))
                calls[ours[i]] = partial(copy_context().run, keep, i + 1)  # the context says what NumPy warns of
                queue.words[i, ARGS] = ours[i]
            self.start(n, queue.address)
            for i in (0, *range(n + 1, len(works))):
                keep(i)
            self.wait(n, queue.address)
        except BaseException:  # Ctrl-C, between two lines
            stop()
            self.wait(n, queue.address)
            raise
        finally:
            for number in ours:
                calls.pop(number, None)
        if errors:
            del errors[1:]  # they came of the first
            raise errors.pop()
        return results


def arrive(server: Server) -> bool:
    """Whether jobs come with the arguments that they were sent with: calls, loops, and only then loops of calls."""
    arrived, n_most = [], min(2, server.n_threads)

    @CFUNCTYPE(None, *[c_int64] * 3, c_float, *[c_int64] * 4)
    def note_call(*args):
        arrived.append(list(args))

    @CFUNCTYPE(None, *[c_int64] * 4)
    def note_loop(*args):
        arrived.append(list(args))

    def are_right(jobs: Queue, expected) -> bool:
        arrived.clear()
        server.execute(len(jobs.words), jobs.address)
        return sorted(arrived) == expected

    def set_args(calls: Queue) -> list[list]:
        expected = [[i, 2, 3, 1.0, 4, 5, 6, 7] for i in range(len(calls.args))]
        for args, (m, n_columns, depth, _, x, panels, y, stride) in zip(calls.args, expected, strict=True):
            args[[A, C, ALPHA, M, N, K, B, LDC]] = x, y, addressof(ONE), m, n_columns, depth, panels, stride
        return expected

    for n in range(1, 1 + n_most):
        calls = Queue(server.layout, n, KERNEL_MODE, address_of(note_call))
        loops = Queue(server.layout, n, LOOP_MODE, address_of(note_loop))
        loops.words[:, ARGS + 1 : ARGS + 4] = 7, 8, 9
        expected = [[args, 7, 8, 9] for args in loops.words[:, ARGS].tolist()]
        if not (are_right(calls, set_args(calls)) and are_right(loops, expected)):
            return False
    chains = Chains(server.layout, n_most, 3, address_of(note_call), server.address)
    return are_right(chains.jobs, set_args(chains.calls))


def is_right(server: Server, kernel: Kernel) -> bool:
    """Whether its products are."""
    some = np.cos(np.arange(1 << 12, dtype=np.float32))  # importing numpy.random takes 20 ms
    for n_rows, n_panels, depth in ((8, 7, 40), (24, 6, 20), (16, 2, 50), (4, 5, 9), (2, 3, 70), (1, 9, 50)):
        x, panels = np.resize(some, (n_rows, 2 * depth)), np.resize(some[7:], (2, n_panels, depth, kernel.width))
        edges = (0, n_panels // 2, n_panels) if server.n_threads > 1 else (0, n_panels)
        jobs = jobs_of(kernel, panels, [slice(*edge) for edge in pairwise(edges)])
        expected = x @ panels.swapaxes(1, 2).reshape(2 * depth, -1)
        if not np.allclose(server.product(x, kernel, panels, jobs), expected, rtol=0, atol=1e-4):
            return False
    return True


@lru_cache(maxsize=1)
def find() -> Server | None:
    """OpenBLAS's threads and kernels, or None where anything about them is not as expected."""
    library, kernels = blas.controller, {}
    if getattr(library, "threading_layer", "") != "pthreads":
        return None
    with suppress(OSError, LookupError, ValueError, AttributeError, struct.error):  # there is no such function
        for kernel in KERNELS.get(library.architecture.lower(), ()):
            with suppress(LookupError):
                kernels[kernel] = addresses([kernel.name], library.filepath)[0]
        if kernels:
            others = addresses(OTHERS, library.filepath)
            for server in (Server(kernels, layout, *others) for layout in LAYOUTS):
                if arrive(server):
                    right = {kernel: routine for kernel, routine in kernels.items() if is_right(server, kernel)}
                    return Server(right, server.layout, *others) if right else None
    return None
