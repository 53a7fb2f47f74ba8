"""Products of few rows at the speed of memory: weights copied once into panels that lie as they are read.

A product of a few rows with columns of a row-major w reads short runs, a whole row apart, which the processor does not
fetch ahead, or has BLAS copy ("pack") all of w first, which takes longer than the product. A panel [n_in, width] is
read from front to back. The fastest way depends on BLAS's kernels and the number of rows: docs/performance.md.
"""

import time
from functools import lru_cache

import numpy as np

from fast import kernel
from fast.threads import others_turn

SMALL = 10**6 - 1  # multiply-adds up to which OpenBLAS uses its kernel for small matrices (its interface/gemm.c)


class Matrix:
    """Some columns of a matrix, `w` a view [n_groups, n_in, n_columns]: x @ matrix is x @ w, its groups side by side.

    `panels` is memory of panels_shape(w, width) for `fill`. `ways` has the product to use, by the number of rows.
    """

    __array_ufunc__ = None  # so that NumPy leaves x @ matrix to __rmatmul__

    def __init__(self, w, ways: dict, panels=None):
        self.w, self.ways, self.panels = w, ways, panels
        self.shape = w.shape[1], w.shape[0] * w.shape[2]

    def __rmatmul__(self, x):  # [n_rows, n_in] -> [n_rows, n_groups * n_columns]
        return self.ways.get(len(x), as_it_lies)(x, self)

    def fill(self) -> None:
        n_columns, (n_deep, n_groups, _, depth, width) = self.w.shape[2], self.panels.shape
        n_whole, n_rest = divmod(n_columns, width)
        w = self.w.reshape(n_groups, n_deep, depth, n_columns).swapaxes(0, 1)
        whole = w[..., : n_whole * width].reshape(n_deep, n_groups, depth, n_whole, width).swapaxes(2, 3)
        into = self.panels[:, :, :n_whole]
        if width % 4 == 0 and whole.strides[-1] == 4:  # copy four numbers at a time: a fifth of the time
            into, whole = into.view(np.complex128), whole.view(np.complex128)
        np.copyto(into, whole)
        if n_rest:
            self.panels[:, :, n_whole, :, :n_rest] = w[..., n_whole * width :]
            self.panels[:, :, n_whole, :, n_rest:] = 0

    def part(self, i: int, n: int) -> "Matrix":
        """The i-th of n parts of its columns, or of fewer if there are fewer panels. Of a matrix with one group."""
        n_panels, width = self.panels.shape[2], self.panels.shape[4]
        n = min(n, n_panels)
        first, last = (n_panels * j // n for j in (i % n, i % n + 1))
        return Matrix(self.w[..., first * width : last * width], {}, self.panels[:, :, first:last])

    def columns(self, y):  # [n_rows, all columns of the panels] -> [n_rows, n_groups * n_columns]
        if y.shape[1] == self.shape[1]:
            return y
        return np.ascontiguousarray(y.reshape(len(y), len(self.w), -1)[..., : self.w.shape[2]]).reshape(len(y), -1)


def panels_shape(w, width):  # for [n_groups, n_in, n_columns] -> n_deep, n_groups, n_panels, n_in / n_deep, width
    n_deep = kernel.n_deep(w.shape[1]) if width == kernel.WIDTH else 1
    return n_deep, w.shape[0], -(-w.shape[2] // width), w.shape[1] // n_deep, width


@lru_cache(maxsize=1024)
def n_pieces(n_rows: int, n_in: int, width: int) -> int:
    """Into how many pieces a panel's depth is cut so that each product is small: a divisor of n_in."""
    return next(n for n in range(1, n_in + 1) if n_in % n == 0 and (n_rows * n_in * width // n <= SMALL or n == n_in))


def together(x, matrix):  # [n_rows, n_in] -> [n_rows, n_out]; for kernels that pack nothing, as AVX-512's
    if len(x) in (1, 3):  # NumPy's product of one row is slow with panels so wide, and the kernel is made for 2 and 4
        return together(kernel.filled_up(x, 2), matrix)[: len(x)]
    n_in, width = matrix.panels.shape[3:]
    panels = matrix.panels.reshape(-1, n_in, width)
    n_panels = len(panels)
    y = np.empty((len(x), n_panels * width), np.float32)
    by_panel = y.reshape(len(x), n_panels, width).swapaxes(0, 1)
    n_deep = n_pieces(len(x), n_in, width)
    with others_turn:
        if n_deep == 1:
            np.matmul(x, panels, out=by_panel)
        else:
            x_pieces = x.reshape(len(x), n_deep, -1).swapaxes(0, 1)
            np.add.reduce(x_pieces @ panels.reshape(n_panels, n_deep, -1, width), axis=1, out=by_panel)
    return matrix.columns(y)


def row_by_row(x, matrix):  # as together; for kernels that pack: the panel stays in the cache for all rows
    # Not into an array in the order of y: NumPy would take all panels for one row first.
    with others_turn:
        by_panel = x[:, None] @ matrix.panels.reshape(-1, 1, *matrix.panels.shape[3:])  # [n_panels, n_rows, 1, width]
    return matrix.columns(by_panel.swapaxes(0, 1).reshape(len(x), -1))


def streamed(x, matrix):  # as together; in panels that OpenBLAS's kernel reads as they lie
    n_deep, n_groups, n_panels, *shape = matrix.panels.shape
    return matrix.columns(kernel.times(kernel.find(), x, matrix.panels.reshape(n_deep, n_groups * n_panels, *shape)))


def as_it_lies(x, matrix):  # as together; for so many rows that packing pays
    y = np.empty((len(x), len(matrix.w), matrix.w.shape[2]), np.float32)
    with others_turn:
        np.matmul(x, matrix.w, out=y.swapaxes(0, 1))
    return y.reshape(len(x), -1)


WIDTHS = {streamed: kernel.WIDTH, together: 64, row_by_row: 32}  # of the panels that suit a way


def widths() -> dict:
    """Those to choose from here."""
    return {way: WIDTHS[way] for way in (streamed if kernel.find() else row_by_row, together)}


def ways(width: int) -> tuple:
    """What can be used with panels so wide."""
    return (streamed, as_it_lies) if width == kernel.WIDTH else (together, row_by_row, as_it_lies)


def in_panels(matrices: list[Matrix], width: int) -> list[Matrix]:
    """The same matrices, copied into panels of their own."""
    copies = [Matrix(matrix.w, {}, np.empty(panels_shape(matrix.w, width), np.float32)) for matrix in matrices]
    seconds_to_fill(copies)
    return copies


def seconds_to_fill(matrices: list[Matrix]) -> float:
    started = time.perf_counter()
    for matrix in matrices:
        matrix.fill()
    return time.perf_counter() - started


def seconds(way, n_rows: int, matrices: list[Matrix]) -> float:
    """What a product of n_rows rows with each of the matrices takes."""
    pairs = [(np.ones((n_rows, matrix.shape[0]), np.float32), matrix) for matrix in matrices]
    started = time.perf_counter()
    for x, matrix in pairs:
        way(x, matrix)
    return time.perf_counter() - started
