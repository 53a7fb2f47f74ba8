"""Products of few rows at the speed of memory: weights copied once into panels that lie as they are read.

A product of a few rows with columns of a row-major w reads short runs, a whole row apart, which the processor does not
fetch ahead, or has BLAS copy ("pack") all of w first, which takes longer than the product. A panel [n_in, width] is
read from front to back. Each thread of a pass has columns of its own: docs/performance.md.
"""

import time
from functools import partial
from typing import NamedTuple

import numpy as np

from fast import kernel
from fast.threads import cut, team

N_SIDE_BY_SIDE = 3  # panels that the kernel reads at once
ROW_BY_ROW_WIDTH = 32  # of the panels without the kernel


class Part(NamedTuple):
    """What one thread multiplies: these panels, [n_deep, n_panels, depth, width], hold these columns and perhaps zeros.

    `pointers` are to the panels, one for each of n_deep.
    """

    columns: slice
    panels: np.ndarray
    pointers: list


class Matrix:
    """A matrix w, [n_in, n_out], so that x @ matrix is x @ w, of which each of n_threads multiplies some columns.

    `ways` has the product to use, by the number of rows; all but as_it_lies want panels, made by `use` and `fill`.
    """

    __array_ufunc__ = None  # so that NumPy leaves x @ matrix to __rmatmul__

    def __init__(self, w, ways: dict, n_threads: int):
        self.w, self.ways, self.n_threads, self.shape = w, ways, n_threads, w.shape
        self.parts: list[Part] = []

    def __rmatmul__(self, x):  # [n_rows, n_in] -> [n_rows, n_out]
        return self.ways.get(len(x), as_it_lies)(x, self)

    def use(self, panels) -> None:  # of panels_shape(w)
        parts, width = cut(panels.shape[1], min(self.n_threads, panels.shape[1]), N_SIDE_BY_SIDE), panels.shape[3]
        columns = [slice(part.start * width, min(part.stop * width, self.shape[1])) for part in parts]
        pieces = [panels[:, part] for part in parts]
        self.parts = list(map(Part, columns, pieces, map(kernel.pointers, pieces)))

    def fill(self, part: Part) -> None:
        columns, panels, _ = part
        n_deep, _, depth, width = panels.shape
        n_whole, n_rest = divmod(columns.stop - columns.start, width)
        w = self.w[:, columns].reshape(n_deep, depth, -1)
        whole, into = w[..., : n_whole * width].reshape(n_deep, depth, n_whole, width), panels[:, :n_whole]
        if whole.strides[-1] == 4:  # copy four numbers at a time: a fifth of the time
            whole, into = whole.view(np.complex128), into.view(np.complex128)
        np.copyto(into, whole.swapaxes(1, 2))
        if n_rest:
            panels[:, n_whole, :, :n_rest] = w[..., n_whole * width :]
            panels[:, n_whole, :, n_rest:] = 0


def panels_shape(w):  # [n_in, n_out] -> n_deep, n_panels, n_in / n_deep, width
    n_deep, width = (kernel.n_deep(len(w)), kernel.WIDTH) if kernel.find() else (1, ROW_BY_ROW_WIDTH)
    return n_deep, -(-w.shape[1] // width), len(w) // n_deep, width


def streamed(x, matrix):  # [n_rows, n_in] -> [n_rows, n_out]; OpenBLAS's kernel reads the panels as they lie
    out, works = np.empty((len(x), matrix.shape[1]), np.float32), []
    x = kernel.side_by_side(x, len(matrix.parts[0].pointers))
    pointers, multiply = kernel.pointers(x), partial(kernel.products, kernel.find(), x.shape[2])
    y = np.empty((-(-matrix.shape[1] // kernel.WIDTH) * kernel.WIDTH, x.shape[1] * x.shape[3]), np.float32)
    for columns, _, panels in matrix.parts:  # all is prepared: the first that threads do then needs no GIL
        total = y[columns.start : -(-columns.stop // kernel.WIDTH) * kernel.WIDTH]
        works.append(partial(add_up, multiply(pointers, panels, total), total, out[:, columns]))
    team.run(works)
    return out


def add_up(products, y, out):
    y.fill(0)  # by the thread that uses it: 0.98 of the time with 64 rows
    for product in products:
        product()
    out[:] = y[: out.shape[1], : len(out)].T


def row_by_row(x, matrix):  # as streamed, without the kernel: a panel stays in the cache for all rows
    out = np.empty((len(x), matrix.shape[1]), np.float32)

    def multiply(part):
        # Not into an array in the order of `out`: NumPy would take all panels for one row first.
        by_panel = x[:, None] @ part.panels[0, :, None]  # [n_panels, n_rows, 1, width]
        columns = out[:, part.columns]
        columns[:] = by_panel.swapaxes(0, 1).reshape(len(x), -1)[:, : columns.shape[1]]

    team.run([partial(multiply, part) for part in matrix.parts])
    return out


def as_it_lies(x, matrix):  # as streamed; for so many rows that packing pays
    out = np.empty((len(x), matrix.shape[1]), np.float32)
    columns = cut(matrix.shape[1], matrix.n_threads, 64)
    team.run([partial(np.matmul, x, matrix.w[:, some], out=out[:, some]) for some in columns])
    return out


def way_in_panels():
    """The way to use panels here."""
    return streamed if kernel.find() else row_by_row


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
