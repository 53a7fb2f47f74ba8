"""A long prompt through the layers in several threads.

A token sees only those before it, so all that one part of a prompt needs of the others are, at each layer, the keys and
values of the parts before it. Each part goes through all layers on a thread of its own and waits for those only. BLAS
has one thread meanwhile; its own threads share the products only, and leave attention, GELU and layer norm to one core:
1000 tokens of 124M took 493 ms in parts and 576 on BLAS's threads (two cores, Zen 5, OpenBLAS 0.3.31, one run).
"""

from functools import partial
from itertools import pairwise
from queue import SimpleQueue

import numpy as np

from kv_cache import KVCache
from matmul import is_large
from threads import blas_controller, blas_on_one_thread, team

MIN_PART = 256  # rows for each thread to carry; with fewer, BLAS's threads are as fast


class Part(KVCache):
    """A cache as it is for some of the new tokens, which pass through the layers beside those of `before`."""

    def __init__(self, cache: KVCache, start: int, before: "Part | None"):
        super().__init__(cache.kv, start, cache.n_pad)
        self.before = before
        self.stored: SimpleQueue[bool] = SimpleQueue()  # True for each layer; then False

    def append(self, layer, qkv):
        """As KVCache.append, once the parts before have stored this layer too."""
        seen = super().append(layer, qkv)
        if self.before and not self.before.stored.get():
            raise RuntimeError("the part before this one failed")
        self.stored.put(True)
        return seen


def equal_work(n_new, n_past, n_embd, n_parts):  # -> n_parts slices of range(n_new)
    """The row at position p costs 24 n_embd^2 additions and products, and attention the time of 8 n_embd p."""
    work = np.cumsum(3 * n_embd + n_past + np.arange(n_new))
    edges = np.searchsorted(work, work[-1] * np.arange(1, n_parts) / n_parts)
    return [slice(int(start), int(stop)) for start, stop in pairwise([0, *edges, n_new])]


def in_parts(forward, tokens, cache, n_last, n_embd):  # int[n_batch, n_new] -> [n_batch, n_last, n_vocab]
    """forward(tokens, cache, n_last), the rows of each part on a thread of its own."""
    shares = equal_work(tokens.shape[1], cache.length, n_embd, team.n_threads)
    parts: list[Part] = []
    for share in shares:
        parts.append(Part(cache, cache.length + share.start, parts[-1] if parts else None))
    logits = [None] * len(parts)

    def work(number, share):
        try:
            n_rows = max(0, min(share.stop - share.start, n_last - (tokens.shape[1] - share.stop)))
            logits[number] = forward(tokens[:, share], parts[number], n_rows)
        finally:
            parts[number].stored.put(False)

    team.run(work, shares, blas_on_one_thread, partial(parts[0].stored.put, False))
    return np.concatenate(logits, axis=1)


def can_share(n_new: int, cache: KVCache, weights: list[np.ndarray]) -> bool:
    """Whether the parts of so many new tokens are worth a thread each."""
    is_long = n_new >= MIN_PART * team.n_threads > MIN_PART
    return is_long and cache.in_parts and is_large(weights) and blas_controller() is not None
