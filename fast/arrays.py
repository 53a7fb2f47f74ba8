"""Formulas on large arrays, spelled to be fast: in pieces that fit the cache, and as products where sums are slow."""

from functools import lru_cache, partial, wraps
from itertools import product

import numpy as np

from fast.memory import room
from fast.threads import team

N_PIECE = 1 << 15  # numbers, 128 kB: a formula and its temporaries stay in an L2 cache of 512 kB
N_SHARED_PRODUCTS = 1 << 22  # of a query's number and a key's, from which two threads are faster than one
N_TEXTS_SHARED = 8  # texts from which each thread takes some of them; of fewer it takes some of the heads
N_FEW = 16  # queries that are attended at once, whatever the number of keys
N_TEXTS = 32  # of a padded batch, attended at once without the padding that all of them have
N_QUERIES = 96  # of more, attended at once, so that no array of scores is [n_head, n_ctx, n_ctx]
N_SCORES = 1 << 18  # at once, 1 MB, of as many heads: few calls, since each waits for the GIL


@lru_cache(maxsize=32)
def full(n, value):  # -> [n]
    return np.full(n, value, np.float32)


def row_sums(x):  # [..., n] -> [..., 1]
    return np.vecdot(x, full(x.shape[-1], 1), keepdims=True)  # a third of the time of x.sum(-1)


def mean(x):  # [..., n] -> [..., 1]
    return np.vecdot(x, full(x.shape[-1], 1 / x.shape[-1]), keepdims=True)


def times_transposed(q, k):  # [..., n_rows, d_head], [..., n_seq, d_head] -> [..., n_rows, n_seq]
    """q @ k.T; 2 to 8 rows one by one: with 900 keys, 137 us instead of 277 for 5 rows of 6 heads."""
    k = k.swapaxes(-1, -2)
    if 1 < q.shape[-2] <= 8:
        return (q[..., None, :] @ k[..., None, :, :])[..., 0, :]
    return q @ k


def elementwise(function):
    """function(x), [...] -> [...], computed piece by piece; the result takes the place of x if that is large."""

    @wraps(function)
    def in_pieces(x):
        if x.size <= N_PIECE:
            return function(x)
        flat = x.reshape(-1)
        for start in range(0, flat.size, N_PIECE):
            piece = flat[start : start + N_PIECE]
            piece[:] = function(piece)
        return x

    return in_pieces


def texts_at_once(attend, q, k, v, padding):
    """attend(q, k, v, padding) of few rows, N_TEXTS texts at a time, without the padding that these all have."""
    out = np.empty_like(q)
    n_pad = np.minimum(np.count_nonzero(padding[:, 0, 0], axis=-1), k.shape[-2] - q.shape[-2])
    for start in range(0, len(q), N_TEXTS):
        some = slice(start, start + N_TEXTS)
        seen = some, slice(None), slice(n_pad[some].min(), None)
        out[some] = attend(q[some], k[seen], v[seen], padding[some, :, :, seen[2]])
    return out


def tiled(attend):
    """attend(q, k, v, padding) of gpt2.py, by heads; many rows some at a time, each with the keys that it may see."""

    def in_tiles(q, k, v, padding):
        (n_batch, n_head, n_rows), n_past = q.shape[:3], k.shape[-2] - q.shape[-2]
        out = np.empty_like(q)
        for start in range(0, n_rows, N_QUERIES):
            rows = slice(start, min(start + N_QUERIES, n_rows))
            seen = slice(0, n_past + rows.stop)
            n_heads = max(1, N_SCORES // (N_QUERIES * seen.stop))
            for row, head in product(range(n_batch), range(0, n_head, n_heads)):
                heads = row, slice(head, head + n_heads)
                mask = None if padding is None else padding[row, ..., seen]
                out[heads][:, rows] = attend(q[heads][:, rows], k[heads][:, seen], v[heads][:, seen], mask)
        return out

    def of_few_or_many(q, k, v, padding):
        if q.shape[-2] > N_FEW:
            return in_tiles(q, k, v, padding)
        return attend(q, k, v) if padding is None else texts_at_once(attend, q, k, v, padding)

    @wraps(attend)
    def in_shares(q, k, v, padding=None):
        n_rows = max(4, q.shape[-2])  # reading the keys takes as long as 4
        if team.n_threads == 1 or n_rows * k.size < N_SHARED_PRODUCTS:
            return of_few_or_many(q, k, v, padding)
        out = np.empty_like(q)

        def share(texts, heads=slice(None)):
            part = texts, heads
            out[part] = of_few_or_many(q[part], k[part], v[part], None if padding is None else padding[texts])

        if len(q) >= N_TEXTS_SHARED:
            team.run([partial(share, texts) for texts in team.cut(len(q))])
        else:
            team.run([partial(share, slice(None), heads) for heads in team.cut(q.shape[1])])
        return out

    return in_shares


def take_rows(kv, rows, start, stop):  # [n_layer, 2, n_batch, ...] -> [n_layer, 2, len(rows), ...]
    """These batch rows of keys and values, up to position `stop`. As many as before: in place, from `start` on."""
    rows, moved, new = np.asarray(rows), np.arange(len(rows)), kv
    if len(rows) == kv.shape[2]:
        moved = moved[rows != moved]
    else:
        new, start = room((*kv.shape[:2], len(rows), *kv.shape[3:])), 0
    used = slice(start, stop)
    for layer in np.ndindex(kv.shape[:2]):  # indexing makes a copy, so not of all at once
        new[layer][moved, :, used] = kv[layer][rows[moved], :, used]
    return new
