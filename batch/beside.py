"""Prompts fed in the passes in which texts take their steps: products are of all tokens, attention is each text's own.

A product of more rows takes less time a row, up to a few hundred of them, and prompts of different lengths need no
padding (Yu et al. 2022, Orca, "selective batching").
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpt2 import KVCache, Model


class Piece(NamedTuple):
    """Tokens to be fed, the next ones of the text in `cache`."""

    ids: Sequence[int]
    cache: KVCache


class Mixed:
    """As the cache of one text, [1, n_new]: the tokens of `pieces`, one after another, then one of each row of `cache`.

    The rows of `cache` may hold what the pieces store. Only they have logits: n_last is their number.
    """

    n_batch, length = 1, 0

    def __init__(self, pieces: Sequence[Piece], cache: KVCache):
        self.pieces, self.cache = pieces, cache
        self.kv, self.n_head, self.d_head = cache.kv, cache.n_head, cache.d_head
        self.n_ctx = sum(len(piece.ids) for piece in pieces) + cache.n_batch  # room there is, in the caches

    def positions(self, n_new):  # -> int[1, n_new]
        of_pieces = [np.arange(cache.length, cache.length + len(ids)) for ids, cache in self.pieces]
        return np.concatenate([*of_pieces, self.cache.length - self.cache.n_pad])[None]

    def attend(self, layer, q, kv):  # [1, n_head, n_rows, d_head], [2, 1, n_head, n_new, d_head] -> as q
        heads, start, without_q = np.empty_like(q), 0, kv.shape[3] - q.shape[2]
        for ids, cache in self.pieces:
            rows = slice(start, start := start + len(ids))
            if without_q:
                cache.append(layer, kv[:, :, :, rows])
            else:
                heads[:, :, rows] = cache.attend(layer, q[:, :, rows], kv[:, :, :, rows])
        # the rest is a text each: [1, n_head, n_batch, d_head] -> [n_batch, n_head, 1, d_head]
        q, kv = q[:, :, start - without_q :].transpose(2, 1, 0, 3), kv[:, :, :, start:].transpose(0, 3, 2, 1, 4)
        heads[:, :, start - without_q :] = self.cache.attend(layer, q, kv).transpose(2, 1, 0, 3)
        return heads

    def note(self, x) -> None:
        pass

    def advance(self, n_new: int) -> None:
        self.cache.advance(1)


class Beside:
    """A model, as `decode` needs one, of which the next pass feeds `pieces` too."""

    def __init__(self, model: Model):
        self.model, self.hparams, self.new_cache, self.passes = model, model.hparams, model.new_cache, self
        self.pieces: list[Piece] = []

    def are_plain(self, n_rows: int) -> bool:
        return False  # so all near ties are settled

    def forward(self, tokens, cache, n_last: int = 1, plainly: bool = False) -> np.ndarray:
        pieces = [] if plainly else self.pieces
        if not pieces:
            return self.model.forward(tokens, cache, n_last, plainly)
        self.pieces = []
        ids = [i for piece in pieces for i in piece.ids] + [i for [i] in tokens]
        return self.model.forward([ids], Mixed(pieces, cache), n_last=len(tokens)).swapaxes(0, 1)
