"""Room for the keys and values of the texts that are computed together, a row each, which come and go.

All rows end at the same position, `end`, so that one pass appends to all of them; where each begins follows from its
length. A row that has ended is replaced by the last one, so a text costs one copy of a row at most. When `end` reaches
the last position all rows are moved back together, which frees what no row reaches back to any more.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

from batch.beside import Beside, Piece
from decoding.draft_length import common_length
from decoding.prefill import begun
from fast import N_TEXTS, check_memory, take_rows
from gpt2 import KVCache, Model, Seq, decode

N_SPARE = 128  # positions more than the longest text needs: so many steps at least between two moves
N_BESIDE = 1024  # tokens of prompts that are fed in one pass; more gain nothing and take more memory
MIN_COMMON = 32  # tokens that prompts begin with alike, for which it pays to compute them apart
N_KEPT = 8  # of such beginnings, at most
SHARE_OF_KEPT = 1 / 8  # of the memory for keys and values


class Beginnings:
    """Keys and values of what prompts begin with alike, computed once: the newest N_KEPT in max_bytes, newest last."""

    def __init__(self, model: Model, max_bytes: float):
        self.model, self.max_bytes = model, max_bytes
        self.kept: list[tuple[Sequence[int], np.ndarray]] = []

    def find(self, ids: Sequence[int]) -> tuple[int, np.ndarray | None]:
        """How many of `ids`, less the last, are kept, and the kept keys and values that begin with these."""
        n_same, kv = max(((common_length(kept, ids[:-1]), kv) for kept, kv in self.kept), key=first, default=(0, None))
        return (n_same, kv) if n_same >= MIN_COMMON else (0, None)

    def keep(self, ids: Sequence[int]) -> None:
        """Compute and keep all of `ids`, if they are not kept and there is room."""
        n_same, kv = self.find([*ids, -1])
        cache = self.model.new_cache(n_seq=len(ids))
        if len(ids) < n_same + MIN_COMMON or cache.kv.nbytes > self.max_bytes:
            return
        self.model.forward([ids[n_same:]], begun(cache, n_same, kv))
        self.kept = [*self.kept, (ids, cache.kv)][-N_KEPT:]
        while sum(kv.nbytes for _, kv in self.kept) > self.max_bytes:
            del self.kept[0]


def zeros(shape: tuple[int, ...]) -> np.ndarray:  # -> float32[shape]
    """Memory for rows. Not np.empty: what is left of a row is masked, but there may be NaN, which no mask hides."""
    check_memory(4 * math.prod(shape), "keys and values")
    return np.zeros(shape, np.float32)


def first(pair):
    return pair[0]


class Rows:
    """The texts that are computed together, as `Seq`s, and their keys and values.

    `max_bytes`: how much memory keys and values may take; one text may have more if it needs that.
    """

    def __init__(self, model: Model, max_bytes: float, max_rows: int):
        self.model, self.max_bytes, self.max_rows = Beside(model), max_bytes * (1 - SHARE_OF_KEPT), max_rows
        self.n_position_bytes = model.new_cache(n_seq=1).kv.nbytes  # of a row
        self.kv = model.new_cache(0, 1).kv  # [n_layer, 2, n_rows, n_head, n_seq, d_head]
        self.end = 0
        self.seqs: list[Seq] = []
        self.beginnings = Beginnings(model, max_bytes * SHARE_OF_KEPT)
        self.rounds = None

    # ------------------------------------------------------------------------------------------------------------------
    # Memory
    # ------------------------------------------------------------------------------------------------------------------

    def count(self, n_longest: int) -> int:
        """How many texts of up to n_longest tokens, the new ones included, there is memory for."""
        return max(1, min(self.max_rows, int(self.max_bytes / (self.n_position_bytes * (n_longest + N_SPARE)))))

    def n_longest(self, seqs: Sequence[Seq] = ()) -> int:
        """Of these and of those that are here already: what the longest has in the end."""
        return max((seq.n_end for seq in (*self.seqs, *seqs)), default=0)

    def is_large(self, n_rows: int, n_longest: int) -> bool:
        """Whether there is room for so many texts, and for a good number of steps before they are moved."""
        return n_rows <= self.kv.shape[2] and n_longest + N_SPARE // 2 <= self.kv.shape[4]

    def n_joining(self, waiting: Iterable[Seq]) -> int:
        """How many of the first of `waiting` can join now. One always can where there is none."""
        n, n_longest, n_fed = 0, self.n_longest(), 0
        for seq in waiting:
            n_longest, n_rows, n_fed = max(n_longest, seq.n_end), len(self.seqs) + n + 1, n_fed + len(seq.ids) - 1
            n_new_bytes = self.n_position_bytes * self.count(n_longest) * (n_longest + N_SPARE)
            is_moved = self.seqs and not self.is_large(n_rows, n_longest)  # while both memories are there
            is_too_large = is_moved and n_new_bytes + self.kv.nbytes > self.max_bytes
            if n_rows > self.count(n_longest) or is_too_large or (n and n_fed > N_BESIDE):
                break
            n += 1
        return n

    def make_room(self, n_before: int, n_rows: int, n_longest: int) -> None:
        """Room for n_rows rows, n_before tokens up to `end`, a step after it, and texts of n_longest tokens."""
        n_before = max([n_before, *(len(seq.ids) - 1 for seq in self.seqs)])
        is_large = self.is_large(n_rows, n_longest)
        if is_large and n_before <= self.end < self.kv.shape[4]:
            return
        old, kv = self.kv, self.kv
        if not is_large:
            if not self.seqs:
                self.kv = old = old[:, :, :0]  # freed before
            n_rows = max(n_rows, self.count(n_longest))
            kv = zeros((*old.shape[:2], n_rows, old.shape[3], n_longest + N_SPARE, old.shape[5]))
        for row, seq in enumerate(self.seqs):
            n = len(seq.ids) - 1
            kv[:, :, row, :, n_before - n : n_before] = old[:, :, row, :, self.end - n : self.end]
        self.kv, self.end = kv, n_before

    # ------------------------------------------------------------------------------------------------------------------
    # Coming, going on, going
    # ------------------------------------------------------------------------------------------------------------------

    def join(self, seqs: list[Seq], n_common: list[int]) -> None:
        """Go on with `seqs` too, whose prompts the next step feeds. Their first `n_common` tokens others have too."""
        self.leave_rounds()
        self.make_room(max(len(seq.ids) for seq in seqs) - 1, len(self.seqs) + len(seqs), self.n_longest(seqs))
        for seq, n in zip(seqs, n_common, strict=True):
            if n >= MIN_COMMON:
                self.beginnings.keep(seq.ids[:n])
        self.seqs += seqs
        self.arrange()
        for row, seq in enumerate(self.seqs):
            if seq in seqs and len(seq.ids) > 1:
                self.begin(seq, KVCache(self.kv[:, :, row : row + 1, :, self.end - len(seq.ids) + 1 : self.end]))

    def begin(self, seq: Seq, cache: KVCache) -> None:
        """Have all but the last of its tokens fed to `cache`, but for those whose keys and values are kept."""
        n_same, kv = self.beginnings.find(seq.ids)
        cache = begun(cache, n_same, kv)
        if len(seq.ids) - 1 > n_same:
            self.model.pieces.append(Piece(seq.ids[n_same:-1], cache))

    def arrange(self) -> None:
        """The longest texts first, by the N_TEXTS, so that attention, which takes these at once, reads less padding."""
        n = len(self.seqs)
        by_length = sorted(range(n), key=lambda row: -len(self.seqs[row].ids))
        rows = list(range(n))
        for start in range(0, n, N_TEXTS):
            here, wanted = rows[start : start + N_TEXTS], by_length[start : start + N_TEXTS]
            free, coming = ([row for row in a if row not in b] for a, b in ((here, wanted), (wanted, here)))
            for slot, row in zip(free, coming, strict=True):
                rows[slot] = row
        take_rows(self.kv[:, :, :n], rows, self.end - len(self.seqs[by_length[0]].ids) + 1, self.end)
        self.seqs = [self.seqs[row] for row in rows]

    def step(self) -> list[Seq]:
        """A new token for each text; those that have ended with it, which are no longer here."""
        if self.end == self.kv.shape[4]:
            self.leave_rounds()
            self.make_room(0, len(self.seqs), 0)
        if self.rounds is None:
            n_past = [len(seq.ids) - 1 for seq in self.seqs]
            n_longest = max(n_past)
            kv = self.kv[:, :, : len(self.seqs), :, self.end - n_longest :]
            self.rounds = decode(self.model, KVCache(kv, n_longest, [n_longest - n for n in n_past]), list(self.seqs))
        for _ in islice(self.rounds, len(self.seqs)):
            pass
        self.end += 1
        ended = [seq for seq in self.seqs if seq.has_ended]
        if ended:
            self.leave_rounds()
            self.remove()
        return ended

    def leave_rounds(self) -> None:
        if self.rounds:
            self.rounds.close()
        self.rounds = None

    def remove(self) -> None:
        """The rows of texts that have ended go to the last ones."""
        going_on = [row for row, seq in enumerate(self.seqs) if not seq.has_ended]
        n = len(going_on)
        holes = [row for row in range(n) if self.seqs[row].has_ended]
        for hole, row in zip(holes, going_on[n - len(holes) :], strict=True):
            used = slice(self.end - (len(self.seqs[row].ids) - 1), self.end)
            self.kv[:, :, hole, :, used] = self.kv[:, :, row, :, used]
            self.seqs[hole] = self.seqs[row]
        del self.seqs[n:]
