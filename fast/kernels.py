"""OpenBLAS's functions that multiply, and what their matrices and their arguments have to look like.

Both matrices are cut into panels beforehand, which OpenBLAS itself does anew for each product. The arguments are
blas_arg_t of its common.h. Its threads call a function with m, n, k, alpha, a, lda, b, ldb (legacy_exec in
driver/others/blas_server.c), and these take that for m, n, k, alpha, A, B, C, ldc (kernel/x86_64:
sgemm_kernel_8x4_haswell_2.c, sgemm_kernel_16x4_skylakex_3.c).
"""

from ctypes import addressof, c_float
from typing import NamedTuple

import numpy as np

N_ARGS = 16  # words of 8 bytes
A, C, ALPHA, M, N, K, B, LDC = 0, 1, 4, 6, 7, 8, 9, 10  # of these: C [n, m] += A [k, m] B [k, n]
ONE = c_float(1)


class Kernel(NamedTuple):
    """A function that multiplies matrices that are cut into panels, and how they have to lie (docs/performance.md)."""

    name: str
    is_left: bool  # w is the matrix on its left, and results lie row by row; else on its right, and column by column
    width: int  # columns of w that lie side by side
    n_lanes: int  # rows of x that do
    n_rows: int  # of x in one call, at most
    max_depth: int  # of a panel; with deeper ones passes would be less exact than plain products


ANY = 1 << 20
LEFT = Kernel("sgemm_kernel_HASWELL", is_left=True, width=8, n_lanes=4, n_rows=8, max_depth=128)
LEFT_DEEP = LEFT._replace(max_depth=384)  # where plain products use AVX-512, and round more
RIGHT = Kernel("sgemm_kernel_HASWELL", is_left=False, width=4, n_lanes=8, n_rows=ANY, max_depth=128)
RIGHT_512 = Kernel("sgemm_kernel_SKYLAKEX", is_left=False, width=4, n_lanes=16, n_rows=ANY, max_depth=400)
# By OpenBLAS's names of processors that have AVX2, the last three AVX-512. Which is faster is timed (weights.py).
KERNELS = {
    "haswell": (RIGHT, LEFT),
    "zen": (RIGHT, LEFT),
    "skylakex": (LEFT_DEEP, RIGHT_512),
    "cooperlake": (LEFT_DEEP, RIGHT_512),
    "sapphirerapids": (LEFT_DEEP, RIGHT_512),
}


def side_by_side(x, kernel, n_deep):  # [n_rows, n_in] -> [n_deep, n_blocks, n_in / n_deep, 1, 2, 4 ... lanes]
    """The rows as the kernel reads them, then rows of zeros."""
    (n_rows, n_in), n_lanes = x.shape, min(kernel.n_lanes, 1 << (len(x) - 1).bit_length())
    n_more = -n_rows % (kernel.n_rows if kernel.is_left and n_rows > 2 else n_lanes)  # 4 rows take longer than 8
    blocks = np.zeros((n_deep, (n_rows + n_more) // n_lanes, n_in // n_deep, n_lanes), np.float32)
    for i, row in enumerate(x.reshape(n_rows, n_deep, -1)):  # 5 rows of 6400 in 12 us; transposed at once 40
        blocks[:, i // n_lanes, :, i % n_lanes] = row
    return blocks


def jobs_of(kernel, panels, parts: list[slice]) -> np.ndarray:  # -> int64[n_jobs, n_turns, N_ARGS, 6]
    """The arguments to multiply x and panels, [n_turns, n_panels, depth, width], each job some of the panels.

    They are linear in 1, the number of rows, of those before this call, of those in it, and the addresses of x and y.
    Each turn adds the product of a part of x.
    """
    n_turns, n_panels, depth, width = panels.shape
    turns, (starts, stops) = np.arange(n_turns), np.array([(part.start, part.stop) for part in parts]).T[..., None]
    jobs = np.zeros((len(parts), n_turns, N_ARGS, 6), np.int64)
    one, n_rows, n_before, n_called, x, y = np.moveaxis(jobs, -1, 0)
    w_matrix, n_columns, x_matrix, n_x = (A, M, B, N) if kernel.is_left else (B, N, A, M)
    one[..., w_matrix] = panels.ctypes.data + turns * panels.strides[0] + starts * panels.strides[1]
    one[..., n_columns], one[..., K], one[..., ALPHA] = (stops - starts) * width, depth, addressof(ONE)
    x[..., x_matrix], n_rows[..., x_matrix], n_before[..., x_matrix] = 1, turns * depth * 4, depth * 4
    y[..., C], n_called[..., n_x] = 1, 1
    if kernel.is_left:  # y is [n_rows, n_panels * width]
        one[..., C], n_before[..., C], one[..., LDC] = starts * width * 4, n_panels * width * 4, n_panels * width
    else:  # [n_panels * width, n_rows]
        n_rows[..., C], n_before[..., C], n_rows[..., LDC] = starts * width * 4, 4, 1
    return jobs
