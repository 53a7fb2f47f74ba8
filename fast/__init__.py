"""Everything that makes forward passes fast. The door: `Passes` computes them, the other names are formulas.

What is computed is in gpt2.py alone. Here is decided which thread computes what, and in what order weights lie.
"""

import numpy as np

from fast.activations import ACTIVATIONS
from fast.arrays import N_TEXTS, elementwise, mean, row_sums, take_rows, tiled, times_transposed
from fast.memory import check_memory, keep_freed_memory, room
from fast.panels import Matrix, unpacked
from fast.prompts import are_long, in_rows
from fast.server import find
from fast.threads import blas, count_threads, forks, team
from fast.weights import MAX_FEW, MIN_GAIN, Weights, clock, output_matrix

if not hasattr(np, "vecdot"):
    raise ImportError(f"NumPy 2.0 or newer is needed, this is {np.__version__}; pip install --upgrade numpy")
__all__ = ["ACTIVATIONS", "Passes", "elementwise", "mean", "row_sums", "tiled", "times_transposed"]  # formulas
__all__ += ["N_TEXTS", "check_memory", "clock", "room", "take_rows"]
N_UNPACKED = 17  # rows from which packing costs less than many calls
MIN_BYTES = 1 << 26  # of weights; smaller models, as the embedded ones, are in the cache, and threads gain nothing


class Passes:
    """How a model's passes are computed: by a team of threads, or one row with plain products."""

    def __init__(self, params: dict):
        keep_freed_memory()
        self.weights = Weights(params)
        self.is_large = self.weights.n_bytes >= MIN_BYTES
        if not self.is_large:
            # BLAS packs a transpose, and a large product: 5 rows of `tiny` with its vocabulary in 37 us instead of 112.
            lm_head = np.ascontiguousarray(output_matrix(params))
            params = params | {"lm_head": lm_head}
            few = Matrix(lm_head, dict.fromkeys(range(2, N_UNPACKED), unpacked))
            self.weights.params = params | {"lm_head": few}
            self.weights.report = "none, the model is small"
        self.params = params
        self.n_threads = count_threads()

    def are_plain(self, n_rows: int) -> bool:
        """Whether passes of so many rows use plain products of one row, which round alike in every process."""
        return n_rows == 1

    def can_share(self) -> bool:
        """Whether BLAS's threads and kernel can be used."""
        if not find():
            self.weights.give_up("NumPy's BLAS has no kernel for them here")
        return bool(find())

    def team(self):
        return team.of(min(self.n_threads, find().n_threads))

    def pack(self, n_rows: int = 1) -> None:
        """Pack the weights now, if that can be, for passes of so many rows."""
        if self.can_share():
            with self.team():
                self.weights.pack(n_rows)

    def __call__(self, gpt2, tokens, cache, n_last, plainly):  # int[n_batch, n_new] -> [n_batch, n_last, n_vocab]
        """gpt2(tokens, cache, n_last, **params)"""
        with forks.wait_for_pass(), np.errstate(invalid="ignore", over="ignore"):  # the caller looks at the logits
            if not self.is_large:
                with blas.held():
                    params = self.params if self.are_plain(tokens.size) else self.weights.params
                    return gpt2(tokens, cache, n_last, **params)
            if plainly or self.are_plain(tokens.size) or not self.can_share():
                return gpt2(tokens, cache, n_last, **self.params)
            with self.team():
                if are_long(tokens, cache):
                    return in_rows(gpt2, tokens, cache, n_last, self.params)
                if tokens.size <= MAX_FEW:
                    self.weights.prepare({tokens.size, n_last * len(tokens)}, cache)
                return gpt2(tokens, cache, n_last, **self.weights.params)

    def few_rows_pay(self, n_left: int) -> bool:
        """Whether a pass of few rows can cost little more than one of a single row, with n_left tokens to come."""
        return not self.is_large or self.weights.pays(MIN_GAIN * n_left)
