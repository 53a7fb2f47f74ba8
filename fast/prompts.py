"""A long prompt through the layers in several threads.

A token sees only those before it, so all that one part of a prompt needs of the others are, at each layer, the keys and
values of the parts before it. Each part goes through all layers on a thread of its own and waits for those only. BLAS's
own threads would share the products only, and leave attention, GELU and layer norms to one core.
"""

from functools import partial
from itertools import pairwise
from queue import SimpleQueue

import numpy as np

from fast.threads import Stopped, run


def equal_work(n_new, n_past, n_embd, n_parts):  # -> n_parts slices of range(n_new)
    """The row at position p costs 24 n_embd^2 additions and products, and attention the time of 8 n_embd p."""
    work = np.cumsum(3 * n_embd + n_past + np.arange(n_new))
    edges = np.searchsorted(work, work[-1] * np.arange(1, n_parts) / n_parts)
    return [slice(int(start), int(stop)) for start, stop in pairwise([0, *edges, n_new])]


def in_parts(gpt2, tokens, cache, n_last, params, n_parts):  # int[n_batch, n_new] -> [n_batch, n_last, n_vocab]
    """gpt2(tokens, cache, n_last, **params), the rows of each part on a thread of its own."""
    n_new = tokens.shape[1]
    rows = equal_work(n_new, cache.length, params["wte"].shape[1], n_parts)
    stored: list[SimpleQueue[bool]] = [SimpleQueue() for _ in rows]  # True for each layer; False: stop
    is_stopped = False

    def stop():
        nonlocal is_stopped
        is_stopped = True
        for queue in stored:
            queue.put(False)

    def append(i, part, layer, qkv):
        """As KVCache.append, once the parts before have stored this layer too."""
        seen = type(cache).append(part, layer, qkv)
        if is_stopped or (i and not stored[i - 1].get()):
            raise Stopped
        stored[i].put(True)
        return seen

    def work(i):
        part = type(cache)(cache.kv, cache.length + rows[i].start, cache.n_pad)
        part.append = partial(append, i, part)
        n_rows = max(0, min(rows[i].stop - rows[i].start, n_last - (n_new - rows[i].stop)))
        try:
            return gpt2(tokens[:, rows[i]], part, n_rows, **params)
        finally:
            del part.append  # it refers to `part`: the cache's memory would stay until garbage is collected

    return np.concatenate(run([partial(work, i) for i in range(len(rows))], stop), axis=1)
