"""Long prompts, of which each thread takes some of the rows through all layers.

A token sees only those before it, so all that some rows need of the others are, at each layer, the keys and values of
the rows before. Each thread waits for those, instead of for all others at each product.
"""

from copy import copy
from functools import partial
from itertools import pairwise
from queue import SimpleQueue

import numpy as np

from fast.threads import Stopped, team

MIN_ROWS, MIN_ROWS_EACH = 150, 40  # in all and for each thread; with fewer, each reading all weights takes longer


class Part:
    """The cache as it is for some of the new tokens, which go through the layers beside those of `before`."""

    def __init__(self, cache, rows: slice, before: "Part | None"):
        self.cache, self.seen = copy(cache), copy(cache)
        self.cache.advance(rows.start)
        self.seen.advance(rows.stop)
        self.n_head, self.d_head = cache.n_head, cache.d_head
        self.positions, self.note = self.cache.positions, self.cache.note
        self.before, self.stored = before, SimpleQueue()  # True for each layer, False when the pass has failed

    def attend(self, layer, q, kv):  # as KVCache.attend
        self.cache.append(layer, kv)
        if self.before and not self.before.stored.get():
            raise Stopped
        self.stored.put(True)
        return self.seen.attend(layer, q, kv[:, :, :, :0])  # nothing is left to store


def equal_work(n_new: int, n_past: int, n_embd: int, n_parts: int) -> list[slice]:
    """range(n_new) in n_parts that take as long: a row's products cost 24 n_embd^2, its attention 8 n_embd keys."""
    work = np.cumsum(3 * n_embd + n_past + np.arange(n_new))
    edges = np.searchsorted(work, work[-1] * np.arange(1, n_parts) / n_parts)
    return [slice(int(start), int(stop)) for start, stop in pairwise([0, *edges, n_new])]


def are_long(tokens, cache) -> bool:
    """Whether each thread has enough rows. A cache of several texts one after another is not cut into rows."""
    n_least = max(MIN_ROWS, MIN_ROWS_EACH * team.n_threads)
    return team.n_threads > 1 and tokens.shape[1] >= n_least and hasattr(cache, "append")


def in_rows(gpt2, tokens, cache, n_last, params):  # int[n_batch, n_new] -> [n_batch, n_last, n_vocab]
    """gpt2(tokens, cache, n_last, **params), its rows shared out."""
    n_new, parts = tokens.shape[1], []
    slices = equal_work(n_new, cache.length, params["wte"].shape[1], team.n_threads)
    for rows in slices:
        parts.append(Part(cache, rows, parts[-1] if parts else None))

    def work(rows, part):
        return gpt2(tokens[:, rows], part, max(0, min(rows.stop - rows.start, n_last - n_new + rows.stop)), **params)

    def stop():
        for part in parts:
            part.stored.put(False)

    works = [partial(work, *each) for each in zip(slices, parts, strict=True)]
    return np.concatenate(team.run(works, stop), axis=1)
