"""OpenBLAS's own threads, handed what OpenBLAS itself never hands them: its kernel with packed weights, and Python.

They wait for the next product in a loop that needs neither waking nor the GIL, as no thread of Python can: 5 rows of
124M take 0.92 of the time that they take with threads of Python (docs/performance.md). The functions that hand work to
them are private. So they are looked up, both known layouts of their queue are tried, and jobs must arrive as they were
sent, and products be right, before any of it is used. Otherwise `find` returns None, and products are plain.

The queue is blas_queue_t of OpenBLAS's common_thread.h, the arguments are blas_arg_t of its common.h. Its server
(driver/others/blas_server.c, legacy_exec) calls a routine with m, n, k, alpha, a, lda, b, ldb, and the kernel
(kernel/x86_64/sgemm_kernel_8x4_haswell_2.c) takes these for m, n, k, alpha, A, B, C, ldc.
"""

import struct
import threading
from collections.abc import Callable, Sequence
from contextvars import copy_context
from ctypes import CFUNCTYPE, addressof, c_float, c_int, c_int64, c_void_p, cast
from functools import lru_cache, partial
from itertools import count

import numpy as np

from fast.library import blas
from fast.symbols import addresses

CORES = {"haswell", "zen", "skylakex", "cooperlake", "sapphirerapids"}  # OpenBLAS's names of those that have AVX2
KERNEL = "sgemm_kernel_HASWELL"
OTHERS = ["exec_blas", "exec_blas_async", "exec_blas_async_wait", "blas_num_threads"]
LAYOUTS = ((8, 20), (9, 21))  # words of 8 bytes before `next` and `mode`: OpenBLAS 0.3.29 to 0.3.34.0; 0.3.34.237
ARGS, N_ARGS = 3, 16  # words before the pointer to the arguments, and of these
KERNEL_MODE, PYTHON_MODE = 0x8002, 0x4000  # BLAS_LEGACY | BLAS_SINGLE, BLAS_PTHREAD
N_ROWS, WIDTH = 8, 4  # rows of x and columns of w that lie side by side for the kernel
ONE = c_float(1)

calls: dict[int, Callable] = {}  # that threads are about to make, by a number that stands for one in a queue
numbers = count(1)


@CFUNCTYPE(None, c_int64)
def call(number):
    calls.pop(number)()


class Queue:
    """Memory for n jobs, which OpenBLAS's threads do at once, one of them the caller's. Each is done by `routine`."""

    def __init__(self, layout: tuple[int, int], n: int, mode: int, routine: int):
        (at_next, at_mode), size = layout, layout[1] + 1
        self.words = (c_int64 * (n * (size + N_ARGS)))()
        self.address = addressof(self.words)
        self.entries, self.args = range(0, n * size, size), range(n * size, len(self.words), N_ARGS)
        for entry, args in zip(self.entries, self.args, strict=True):
            self.words[entry], self.words[entry + at_mode] = routine, mode
            self.words[entry + ARGS] = self.address + 8 * args
            self.words[entry + at_next] = self.address + 8 * (entry + size) if entry != self.entries[-1] else 0

    def set_product(self, i, x, panels, y, n_rows, n_columns, depth) -> None:  # three addresses
        """The i-th: add the product of x, [n_rows, depth] in blocks, and panels of n_columns to y."""
        args = self.args[i]
        self.words[args : args + 11] = (x, y, 0, 0, addressof(ONE), 0, n_rows, n_columns, depth, panels, n_rows)

    def set_call(self, i, number) -> None:
        self.words[self.entries[i] + ARGS] = number


class Server(threading.local):
    """What hands jobs to OpenBLAS's threads."""

    def __init__(self, layout: tuple[int, int], kernel: int, execute: int, start: int, wait: int, n_threads: int):
        self.layout, self.kernel = layout, kernel
        to_do = CFUNCTYPE(c_int, c_int64, c_int64)  # (number of jobs, the queue's address)
        self.execute, self.start, self.wait = to_do(execute), to_do(start), to_do(wait)
        self.n_started = c_int.from_address(n_threads)
        self.queues: dict[int, Queue] = {}  # of products, by the number of jobs: each thread of Python has its own

    @property
    def n_threads(self) -> int:
        """How many there are, the caller's included; more are started when a program asks OpenBLAS for more."""
        return self.n_started.value

    def multiply(self, x, n_rows, depth, jobs) -> None:  # an address; (panels' address, n_columns, y's address) of each
        """Add the products of x and the panels of each job to its y, all at once."""
        if not (queue := self.queues.get(len(jobs))):
            queue = self.queues[len(jobs)] = Queue(self.layout, len(jobs), KERNEL_MODE, self.kernel)
        for i, (panels, n_columns, y) in enumerate(jobs):
            queue.set_product(i, x, panels, y, n_rows, n_columns, depth)
        self.execute(len(jobs), queue.address)

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
        queue = Queue(self.layout, n, PYTHON_MODE, cast(call, c_void_p).value)
        try:
            for i in range(n):
                ours.append(next(numbers))
                calls[ours[i]] = partial(copy_context().run, keep, i + 1)  # the context says what NumPy warns of
                queue.set_call(i, ours[i])
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
    """Whether jobs come with the arguments that they were sent with."""
    expected, arrived = [[1, 2, 3, 1.0, 4, 5, 6, 1], [1, 7, 3, 1.0, 4, 8, 9, 1]], []

    @CFUNCTYPE(None, *[c_int64] * 3, c_float, *[c_int64] * 4)
    def note(*args):
        arrived.append(list(args))

    for n in range(1, 1 + min(2, server.n_threads)):
        arrived.clear()
        queue = Queue(server.layout, n, KERNEL_MODE, cast(note, c_void_p).value)
        for i, (m, n_columns, depth, _, x, panels, y, _) in enumerate(expected[:n]):
            queue.set_product(i, x, panels, y, m, n_columns, depth)
        server.execute(n, queue.address)
        if sorted(arrived) != expected[:n]:
            return False
    return True


def is_right(server: Server) -> bool:
    """Whether its products are."""
    some = np.cos(np.arange(1 << 12, dtype=np.float32))  # importing numpy.random takes 20 ms
    for n_rows, n_panels, depth in ((8, 7, 40), (24, 6, 33), (16, 2, 100), (4, 5, 9), (2, 3, 70), (1, 9, 64)):
        x, panels = np.resize(some, (n_rows, depth)), np.resize(some[7:], (n_panels, depth, WIDTH))
        blocks = np.array(x.reshape(-1, min(N_ROWS, n_rows), depth).swapaxes(1, 2), order="C")
        y = np.zeros((n_panels * WIDTH, n_rows), np.float32)
        half = n_panels // 2 if server.n_threads > 1 else 0
        jobs = [
            (panels[part].ctypes.data, WIDTH * len(panels[part]), y[WIDTH * part.start :].ctypes.data)
            for part in (slice(0, half), slice(half, n_panels))
            if part.stop
        ]
        server.multiply(blocks.ctypes.data, n_rows, depth, jobs)
        if not np.allclose(y.T, x @ panels.swapaxes(0, 1).reshape(depth, -1), rtol=0, atol=1e-4):
            return False
    return True


@lru_cache(maxsize=1)
def find() -> Server | None:
    """OpenBLAS's threads and kernel, or None where anything about them is not as expected."""
    library = blas.controller
    if getattr(library, "threading_layer", "") != "pthreads" or library.architecture.lower() not in CORES:
        return None
    try:
        found = addresses([KERNEL, *OTHERS], library.filepath)
    except (OSError, LookupError, ValueError, struct.error):
        return None
    servers = (Server(layout, *found) for layout in LAYOUTS)
    return next((server for server in servers if arrive(server) and is_right(server)), None)
