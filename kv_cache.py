"""The KV cache: what attention needs of the tokens that were fed before."""

from collections.abc import Sequence

import numpy as np

MASKED = -1e10  # added to the score of a key that may not be seen; -inf would give NaN where every key is masked


class KVCache:
    """The keys and values of the tokens fed so far: float32[n_layer, 2, n_batch, n_head, n_ctx, d_head], `length` used.

    A fresh one is "no cache". Setting `length` back forgets the tokens after it. `n_pad`: how many of a row's first
    tokens only fill it up to the length of the longest, and are never seen.
    """

    is_divisible = True  # its heads, or the rows of a long prompt, may be computed in several threads

    def __init__(self, kv: np.ndarray, length: int = 0, n_pad: Sequence[int] = ()):
        self.kv = kv
        self._length = length
        self.n_pad = np.array(n_pad if len(n_pad) else [0] * self.n_batch)

    @property
    def n_batch(self) -> int:
        return self.kv.shape[2]

    @property
    def n_head(self) -> int:
        return self.kv.shape[3]

    @property
    def d_head(self) -> int:
        return self.kv.shape[5]

    @property
    def n_ctx(self) -> int:
        return self.kv.shape[4]

    @property
    def n_pad(self) -> np.ndarray:  # int[n_batch]
        return self._n_pad

    @n_pad.setter
    def n_pad(self, n_pad: np.ndarray) -> None:
        self._n_pad = n_pad
        self.is_padded = bool(n_pad.any())

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"length {length} is not in 0 to {self._length}, what the cache holds: it only rolls back")
        self._length = length

    def positions(self, n_new):  # -> a slice or int[n_batch, n_new]: the rows of wpe for the new tokens
        start = self._length
        if not self.is_padded:
            return slice(start, start + n_new)
        return np.maximum(0, np.arange(start, start + n_new) - self.n_pad[:, None])

    def append(self, layer, qkv):  # [3, n_batch, n_head, n_new, d_head] -> [2, n_batch, n_head, n_seq, d_head]
        """Store a layer's keys and values of the new tokens, return all it has; `advance` counts them, once."""
        stop = self._length + qkv.shape[3]
        stored = self.kv[layer]
        stored[:, :, :, self._length : stop] = qkv[1:]
        return stored[:, :, :, :stop]

    def padding(self, n_seq):  # -> None or [n_batch, 1, 1, n_seq]
        if not self.is_padded:
            return None
        return np.where(np.arange(n_seq) < self.n_pad[:, None], np.float32(MASKED), np.float32(0))[:, None, None]

    def note(self, x: np.ndarray) -> None:
        """What goes into each layer passes here, and what comes out of the last, for caches that look (inside.py)."""

    def advance(self, n_new: int) -> None:
        self._length += n_new

    def take(self, rows: Sequence[int], n_same: int = 0) -> None:
        """Go on with these batch rows: as many as are named, each as often as it is named. IndexError: no such row.

        `n_same`: the rows hold the same up to this position, which need not be copied while their number stays.
        """
        rows, moved = np.asarray(rows), np.arange(len(rows))
        old = self.kv
        if len(rows) == self.n_batch:
            moved = moved[rows != moved]
        else:
            self.kv = np.empty((*old.shape[:2], len(rows), *old.shape[3:]), np.float32)
            n_same = 0
        self.n_pad = self.n_pad[rows]
        used = slice(n_same, self._length)
        for layer in np.ndindex(old.shape[:2]):  # indexing makes a copy, so not of all at once
            self.kv[layer][moved, :, used] = old[layer][rows[moved], :, used]

    def row(self, row: int) -> "KVCache":
        """One text of the batch, without its padding: a view, so what is fed to it is stored here."""
        n_pad = int(self.n_pad[row])
        return KVCache(self.kv[:, :, row : row + 1, :, n_pad:], self._length - n_pad)
