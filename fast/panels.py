"""Products of few rows at the speed of memory: weights copied once into panels that lie as the kernel reads them.

Before BLAS calls its inner kernel, it copies ("packs") both matrices of a product, and while it packs it computes
nothing: for few rows that takes longer than the product. NumPy has no way to keep the packed copy. So it is made here,
once, and the kernel is called on it directly (server.py): panels [depth, width] stream from memory through the kernel,
and 8 rows take as long as one, with AVX-512 16 (docs/performance.md).
"""

import time
from functools import partial

import numpy as np

from fast.kernels import jobs_of
from fast.server import find
from fast.threads import N_PYTHON, cut, team

N_SIDE_BY_SIDE = 6  # panels that a kernel reads at once, or a divisor of it
MAX_DEEP = 64  # pieces of a panel
MAX_UNPACKED = 10**6  # multiplications; with AVX-512, OpenBLAS packs nothing for so many: sgemm_small_kernel_permit
N_TURNED = 6144  # numbers of a result, which stay in the L1 cache while they are turned: 0.7 of the time of 65536


class Matrix:
    """A matrix w, [n_in, n_out], so that x @ matrix is x @ w.

    `ways` has the product to use, by the number of rows; `streamed` wants panels, made by `use` and `fill`.
    """

    __array_ufunc__ = None  # so that NumPy leaves x @ matrix to __rmatmul__

    def __init__(self, w, ways: dict):
        self.w, self.ways, self.shape = w, ways, w.shape
        self.kernel = self.panels = self.jobs = None
        self.parts: list[slice] = []  # of the panels, one for each thread

    def __rmatmul__(self, x):  # [..., n_in] -> [..., n_out]
        rows = x.reshape(-1, x.shape[-1])
        return self.ways.get(len(rows), as_it_lies)(rows, self).reshape(*x.shape[:-1], self.shape[1])

    def use(self, kernel, panels, n_threads: int) -> None:  # of panels_shape(w, kernel)
        self.kernel, self.panels = kernel, panels
        self.parts = cut(panels.shape[1], min(n_threads, panels.shape[1]), N_SIDE_BY_SIDE)
        self.jobs = jobs_of(kernel, panels, self.parts)

    def fill(self, part: slice) -> None:
        width = self.kernel.width
        panels, w = self.panels[:, part], self.w[:, part.start * width : part.stop * width]
        n_deep, _, depth, _ = panels.shape
        n_whole, n_rest = divmod(w.shape[1], width)
        w = w.reshape(n_deep, depth, -1)
        whole, into = w[..., : n_whole * width].reshape(n_deep, depth, n_whole, width), panels[:, :n_whole]
        if whole.strides[-1] == 4:  # copy four or eight numbers as one: a fifth of the time
            whole, into = (array.view(f"V{4 * width}") for array in (whole, into))
        np.copyto(into, whole.swapaxes(1, 2))
        if n_rest:
            panels[:, n_whole, :, :n_rest] = w[..., n_whole * width :]
            panels[:, n_whole, :, n_rest:] = 0


def count_deep(n_in: int, max_depth: int) -> int:
    """Into how many pieces panels are cut: the kernel rounds after each product, so errors grow with the depth."""
    return next((n for n in range(1, MAX_DEEP) if n_in % n == 0 and n_in // n <= max_depth), 1)


def panels_shape(w, kernel):  # [n_in, n_out] -> n_deep, n_panels, n_in / n_deep, width
    n_deep = count_deep(len(w), kernel.max_depth)
    return n_deep, -(-w.shape[1] // kernel.width), len(w) // n_deep, kernel.width


def streamed(x, matrix):  # [n_rows, n_in] -> [n_rows, n_out]; OpenBLAS's kernel reads the panels as they lie
    y = find().product(x, matrix.kernel, matrix.panels, matrix.jobs)[:, : matrix.shape[1]]
    if matrix.kernel.is_left:
        return np.ascontiguousarray(y)  # which it is, unless n_out is no multiple of the panels' width
    out, n_columns = np.empty(y.shape, np.float32), N_TURNED // len(y)
    for start in range(0, y.shape[1], n_columns):
        some = slice(start, start + n_columns)
        out[:, some] = y[:, some]
    return out


def as_it_lies(x, matrix):  # as streamed, of w itself; for so many rows that packing pays
    if team.n_threads > N_PYTHON:
        return x @ matrix.w
    out = np.empty((len(x), matrix.shape[1]), np.float32)  # by columns: prompts of 140 tokens take 0.93 of the time
    columns = team.cut(matrix.shape[1], 64)
    team.run([partial(np.matmul, x, matrix.w[:, some], out=out[:, some]) for some in columns])
    return out


def unpacked(x, matrix):  # as streamed, of w itself, by so few columns that OpenBLAS need not pack them
    out = np.empty((len(x), matrix.shape[1]), np.float32)
    n_columns = max(64, MAX_UNPACKED // x.size // 64 * 64)
    for start in range(0, matrix.shape[1], n_columns):
        some = slice(start, start + n_columns)
        np.matmul(x, matrix.w[:, some], out=out[:, some])
    return out


def seconds(way, n_rows: int, matrices: list[Matrix]) -> float:
    """What a product of n_rows rows with each of the matrices takes."""
    pairs = [(np.ones((n_rows, matrix.shape[0]), np.float32), matrix) for matrix in matrices]
    started = time.perf_counter()
    for x, matrix in pairs:
        way(x, matrix)
    return time.perf_counter() - started


def seconds_to_fill(matrices: list[Matrix], i: int) -> float:
    """What it takes to copy the columns of the i-th thread."""
    started = time.perf_counter()
    for matrix in matrices:
        for part in matrix.parts[i : i + 1]:  # a small one has fewer parts
            matrix.fill(part)
    return time.perf_counter() - started
