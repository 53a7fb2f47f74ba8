"""Everything that makes forward passes fast. The door: `Passes` computes them.

What is computed is in gpt2.py alone. Here is decided which thread computes what, and in what order weights lie.
"""

import copy
import sys

import numpy as np

from fast.memory import keep_freed_memory
from fast.shares import MAX_FEW, PRODUCTS, Shares, in_shares
from fast.threads import blas, count_threads, forks

MIN_SIZE = 1 << 19  # numbers in the smallest matrix; below, as in the embedded models, threads cost more than they save
MAX_FLIPPED = 16


class Flipped:
    """x @ flipped is x @ w.T for a small w, which BLAS packs as the right factor, but not as the left one.

    5 rows of `tiny` with its vocabulary take 92 us instead of 161, 2 rows with AVX2 kernels 57 instead of 78.
    """

    __array_ufunc__ = None  # so that NumPy leaves x @ flipped to __rmatmul__

    def __init__(self, w):  # [n_out, n_in]
        self.w, self.shape = w, w.shape[::-1]

    def __rmatmul__(self, x):  # [n_rows, n_in] -> [n_rows, n_out]
        return np.ascontiguousarray((self.w @ x.T).T) if 1 < len(x) <= MAX_FLIPPED else x @ self.w.T


class Passes:
    """How a model's passes are computed: a step of one row with BLAS's threads, all others in shares for ours."""

    least_rows = 2  # of what is computed in shares; one row streams the weights as fast on BLAS's threads

    def __init__(self, hparams: dict, params: dict):
        keep_freed_memory()
        self.params = params
        sizes = [block[part][name]["w"].size for block in params["blocks"] for part, name in PRODUCTS]
        self.is_large = min(sizes) >= MIN_SIZE
        self.shares = Shares(hparams, params, count_threads())

    def beside_others(self) -> "Passes":
        """The same, but passes of one row leave BLAS's threads asleep too: another model's find the cores idle."""
        passes = copy.copy(self)
        passes.least_rows = 1
        return passes

    def __call__(self, gpt2, tokens, cache, n_last):  # int[n_batch, n_new] -> [n_batch, n_last, n_vocab]
        """gpt2(tokens, cache, n_last, **params)"""
        with forks.wait_for_pass(), np.errstate(invalid="ignore", over="ignore"):  # the caller looks at the logits
            if not self.is_large:
                with blas.held():
                    return gpt2(tokens, cache, n_last, lm_head=Flipped(self.params["wte"]), **self.params)
            if tokens.size < self.least_rows or not cache.is_divisible or not blas.controller:
                return gpt2(tokens, cache, n_last, **self.params)
            if tokens.size <= MAX_FEW:
                self.shares.prepare({tokens.size, n_last * len(tokens)}, cache)
            return in_shares(gpt2, tokens, cache, n_last, self.shares)

    def few_rows_pay(self, n_left: int) -> bool:
        """Whether n_left tokens are enough to earn back what passes of few rows need first."""
        return not self.is_large or self.shares.pay(n_left)

    def pack(self) -> None:
        """Prepare for passes of few rows now, however few there will be, as benchmarks do."""
        if self.is_large and blas.controller:
            self.shares.pack(n_left=sys.maxsize)

    def way(self, n_rows: int) -> str:
        """How products of so many rows are computed, for benchmarks."""
        return self.shares.ways[n_rows].__name__ if n_rows in self.shares.ways else "x @ w"

    @property
    def report(self) -> str:
        """For --stats: the size of the weights in panels and how long it took to pack them, or why there are none."""
        return self.shares.report if self.is_large else "none, the model is small"


def few_row_scores(q, k):  # [..., n_rows, d_head], [..., n_seq, d_head] -> [..., n_rows, n_seq]
    """q @ k.T; 2 to 8 rows one by one: with 900 keys, 137 us instead of 277 for 5 rows of 6 heads."""
    k = k.swapaxes(-1, -2)
    if 1 < q.shape[-2] <= 8:
        return (q[..., None, :] @ k[..., None, :, :])[..., 0, :]
    return q @ k
