"""x @ w at the speed of memory when x has few rows.

One row streams the weights as fast as memory delivers them, and a thousand rows keep the arithmetic units busy: there
`x @ w` is as good as it gets. Between them, for the 2 to 16 rows of a check of guesses or of a small batch, BLAS
first copies ("packs") all of `w` into another layout, which costs more than the product.

So the product is cut into slabs of `w`, as it lies in the checkpoint, that are small enough for BLAS to leave them
where they are (or, where it has no kernel for small matrices, to pack them within the cache); each slab is read
from memory once, in order, while all rows use it. The slabs are shared between threads of our own, because products
this small stay outside BLAS's threads. Which way is used for a model and a number of rows is decided by timing the
ways once. A whole step of 124M on two cores of a Xeon took, in ms (OpenBLAS 0.3.31, medians of one run):

    rows                      1     2     4     5     8    16
    AVX-512 kernels, x @ w   20    60    61    68    64    76
    in slabs                       28    33    35    38    50
    AVX2 kernels, x @ w      20    43    47    53    42    56
    of padded rows                 43    43    42

Tried and left out: one-row products over slabs in the cache (they read the L2 cache at 25 GB/s only), the transposed
product (2.6 to 3 times one row), columns divided between the threads (1.15 times slabs of whole rows), and threads
that spin rather than sleep (their fight for the interpreter's lock costs what they save).
"""

import contextlib
import operator
import threading
import time
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np

from threads import team

MAX_FEW_ROWS = 16
MIN_SIZE = 1 << 19  # numbers in w; below, as in the embedded models, a hand-over to a thread costs more than it saves
MAX_SLAB = 1 << 16  # numbers of w in a slab, 256 kB: the L2 cache holds a few
MIN_DEPTH = 16  # rows of w in a slab; each slab adds a partial sum of all outputs
# Multiply-adds of a product that OpenBLAS does not spread over its threads (interface/gemm.c, SMP_THRESHOLD_MIN *
# GEMM_MULTITHREAD_THRESHOLD). On AVX-512 it has a kernel without packing for up to 10^6, unless w is transposed.
SINGLE_THREAD = 1 << 18
SLAB_LIMITS = (SINGLE_THREAD, 10**6 - 1)
HEAD_START = 1 << 17  # numbers of w that the calling thread has done before another is awake, after 20 to 50 us

# ----------------------------------------------------------------------------------------------------------------------
# Products
# ----------------------------------------------------------------------------------------------------------------------


def shares(n: int, size: int) -> list[slice]:
    """range(n), slabs of `size` numbers of w, in one slice for each thread; the caller's has a head start."""
    n_others = team.n_threads - 1
    first = n if n <= n_others else min(n, round((n + HEAD_START / size * n_others) / (n_others + 1)))
    edges = [0, *(first + (n - first) * i // max(1, n_others) for i in range(n_others + 1))]
    return [slice(start, stop) for start, stop in pairwise(edges) if start < stop]


@lru_cache(maxsize=1024)
def slab_shape(n_rows: int, n_in: int, n_out: int, limit: int) -> tuple[int, int]:
    """(rows, columns) of the slabs of w[n_in, n_out]: divisors, as many whole rows as fit."""
    size = min(MAX_SLAB, limit // n_rows)
    n_columns = n_out
    while n_columns * MIN_DEPTH > size and n_columns % 2 == 0:
        n_columns //= 2
    return max(d for d in range(1, n_in + 1) if n_in % d == 0 and (d == 1 or d * n_columns <= size)), n_columns


def split_k(x, w, limit):  # [n_rows, n_in] @ [n_in, n_out] -> [n_rows, n_out], w in rows
    """The sum of small products over slabs of consecutive rows of w."""
    (n_rows, n_in), n_out = x.shape, w.shape[1]
    depth, width = slab_shape(n_rows, n_in, n_out, limit)
    n_deep, n_wide = n_in // depth, n_out // width
    x_slabs = x.reshape(n_rows, n_deep, 1, depth).transpose(1, 2, 0, 3)  # [n_deep, 1, n_rows, depth]
    w_slabs = w.reshape(n_deep, depth, n_wide, width).swapaxes(1, 2)  # [n_deep, n_wide, depth, width]
    parts = shares(n_deep, n_out * depth)
    sums = np.empty((len(parts), n_wide, n_rows, width), np.float32)

    def work(number, deep):
        np.add.reduce(np.matmul(x_slabs[deep], w_slabs[deep]), axis=0, out=sums[number])

    team.run(work, parts)
    return np.add.reduce(sums, axis=0).swapaxes(0, 1).reshape(n_rows, n_out)


def row_blocks(x, w):  # [n_rows, n_in] @ [n_out, n_in].T -> [n_rows, n_out], w in rows
    """Small products with blocks of consecutive rows of w, each of which gives outputs of its own."""
    (n_rows, n_in), n_out = x.shape, w.shape[0]
    height = min(n_out, max(1, min(MAX_SLAB, SINGLE_THREAD // n_rows) // n_in))
    n_whole = n_out // height * height
    y = np.empty((n_rows, n_out), np.float32)
    w_blocks = w[:n_whole].reshape(-1, height, n_in).swapaxes(1, 2)  # [n_blocks, n_in, height]
    y_blocks = y[:, :n_whole].reshape(n_rows, -1, height).swapaxes(0, 1)  # [n_blocks, n_rows, height]

    def work(number, blocks):
        np.matmul(x, w_blocks[blocks], out=y_blocks[blocks])

    team.run(work, shares(len(w_blocks), height * n_in))
    np.matmul(x, w[n_whole:].T, out=y[:, n_whole:])
    return y


def in_slabs(x, w, limit):  # [n_rows, n_in] @ [n_in, n_out] -> [n_rows, n_out]
    return split_k(x, w, limit) if w.flags.c_contiguous else row_blocks(x, w.T)


def plain(x, w):  # [n_rows, n_in] @ [n_in, n_out] -> [n_rows, n_out]
    if 1 < len(x) <= MAX_FEW_ROWS and w.size < MIN_SIZE and not w.flags.c_contiguous:
        # BLAS packs a transposed w for any number of rows; as the left factor it does not: 2 rows of `tiny` with its
        # vocabulary take 23 us instead of 61, on AVX2 kernels 30 instead of 46.
        return np.ascontiguousarray((w.T @ x.T).T)
    return x @ w


def padded(x, w):  # [n_rows, n_in] @ [n_in, n_out] -> [n_rows, n_out]
    """With rows of zeros up to a multiple of 8: the AVX2 kernels are faster with 8 rows than with 2 to 7."""
    return (np.concatenate([x, np.zeros((-len(x) % 8, x.shape[1]), np.float32)]) @ w)[: len(x)]


# ----------------------------------------------------------------------------------------------------------------------
# Which product
# ----------------------------------------------------------------------------------------------------------------------

N_TIMINGS = 3
MIN_GAIN = 0.1  # another way must be this much faster, so that noise never makes it slower than x @ w
SETTLE_S = 0.12  # for so long after a product BLAS's own threads go on spinning, and take the cores (threads.py)
PLAIN, PADDED = "x @ w", "x @ w of padded rows"
SLABS = {f"slabs of {limit} multiply-adds": partial(in_slabs, limit=limit) for limit in SLAB_LIMITS}
WAYS = SLABS | {PLAIN: plain, PADDED: padded}  # slabs first, since BLAS's threads spin on
fastest: dict[tuple, str] = {}  # (n_rows, shapes of the weights) -> the name of a way
faster_heads: dict[tuple, Callable] = {}  # (n_rows, sizes, order in memory) -> how to multiply a stack


class Step(threading.local):
    way = PLAIN  # how the step of a model that this thread is in multiplies


step = Step()


def seconds_of(multiply: Callable, a, b) -> float:
    started = time.perf_counter()
    multiply(a, b)
    return time.perf_counter() - started


def seconds(way: str, pairs: list) -> float:
    return sum(seconds_of(WAYS[way], x, w) for x, w in pairs)


def is_large(weights: list[np.ndarray]) -> bool:
    return min(w.size for w in weights) >= MIN_SIZE


def fastest_way(n_rows: int, weights: list[np.ndarray]) -> str:
    """Time the ways to multiply `n_rows` rows with these matrices of one model, once, and remember the fastest.

    One way for all of them: BLAS's threads spin after each product, and would disturb ours in the next.
    """
    if not 1 < n_rows <= MAX_FEW_ROWS or not is_large(weights):
        return PLAIN
    key = n_rows, *(w.shape for w in weights)
    if key not in fastest:
        time.sleep(SETTLE_S)
        pairs = [(np.ones((n_rows, w.shape[0]), np.float32), w) for w in weights]
        ways = [way for way in WAYS if n_rows % 8 or way != PADDED]
        with team.one_core_each():
            times = {way: min(seconds(way, pairs) for _ in range(N_TIMINGS)) for way in ways}
        times[PLAIN] *= 1 - MIN_GAIN
        fastest[key] = min(times, key=times.get)
    return fastest[key]


@contextlib.contextmanager
def products_for(n_rows: int, weights: list[np.ndarray], is_draft: bool):
    """Within it, `matmul` multiplies in the fastest way for a step of `n_rows` rows of a model with these weights.

    A draft's single rows go in slabs too, where few rows do, although that takes a fourth longer: BLAS's threads,
    spinning on, would cost the check that follows more than the draft gains (four steps of 124M and a check by
    1558M: 479 ms instead of 518).
    """
    way = fastest_way(n_rows, weights)
    if is_draft and n_rows == 1 and (few := fastest_way(2, weights)) in SLABS:
        way = few
    before, step.way = step.way, way
    try:
        with team.one_core_each() if way in SLABS else contextlib.nullcontext():
            yield
    finally:
        step.way = before


def matmul(x, w):  # [..., n_in] @ [n_in, n_out] -> [..., n_out]
    """x @ w, all rows in one product; w as it lies in the checkpoint, or the transpose of such."""
    if step.way == PLAIN and x.shape[0] == 1:  # as below, a microsecond faster
        return x @ w
    rows = x.reshape(-1, x.shape[-1])
    return WAYS[step.way](rows, w).reshape(*x.shape[:-1], w.shape[1])


def by_rows(a, b):  # [..., n_rows, k] @ [..., k, n] -> [..., n_rows, n]
    return (a[..., None, :] @ b[..., None, :, :])[..., 0, :]


def matmul_heads(a, b):  # [..., n_rows, k] @ [..., k, n] -> [..., n_rows, n]
    """A stack of products with few rows each: at once, or row by row where that is faster.

    Which it is depends on the kernels and the sizes, by up to four times either way, and is timed once for each.
    """
    n_rows = a.shape[-2]
    if not 1 < n_rows <= MAX_FEW_ROWS:
        return a @ b
    key = n_rows, b.shape[-2].bit_length(), b.shape[-1].bit_length(), b.strides[-1] == b.itemsize
    if key not in faster_heads:
        times = {way: min(seconds_of(way, a, b) for _ in range(2 * N_TIMINGS)) for way in (operator.matmul, by_rows)}
        faster_heads[key] = min(times, key=times.get)
    return faster_heads[key](a, b)
