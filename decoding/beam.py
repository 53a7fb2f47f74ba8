"""Beam search: the likeliest continuations of a prompt that are found by keeping several at each length.

Of all continuations by one token the `n_beam` likeliest are kept (Lowerre 1976; Sutskever et al. 2014). The score of a
finished one is the sum of its tokens' log-probabilities divided by length ** length_penalty, the simple form in which
Hugging Face transformers has the normalisation of Wu et al. 2016; the results are those of its generate() with
early_stopping=False.

Left out: sampled, diverse and constrained beams, several prompts at once.
"""

from collections.abc import Sequence

import numpy as np

from decoding.requests import check_length_penalty, check_request
from decoding.sampling import check, is_whole, log_softmax
from fast import check_memory

N_ROWS = 16  # scored at once, in float64: all of 2000 beams would take gigabytes


def scored(logits, totals):  # [n_rows, n_vocab], [n_rows] -> some rows after others, float64[..., n_vocab]
    """The scores of all continuations by one token."""
    for start in range(0, len(logits), N_ROWS):
        rows = slice(start, start + N_ROWS)
        yield log_softmax(logits[rows].astype(np.float64)) + np.array(totals[rows])[:, None]


def likeliest(parts, n):  # rows after rows, [..., n_vocab] -> up to n of (total, row, id), best first
    best, at, n_vocab, n_seen = np.empty(0), np.empty(0, int), 1, 0
    for totals in parts:
        best, n_vocab = np.concatenate([best, totals.ravel()]), totals.shape[1]
        at, n_seen = np.concatenate([at, np.arange(n_seen, n_seen + totals.size)]), n_seen + totals.size
        if n < best.size:
            kept = np.argpartition(-best, n)[:n]
            best, at = best[kept], at[kept]
    order = np.lexsort((at, -best))
    return [(float(best[i]), *(int(part) for part in divmod(at[i], n_vocab))) for i in order]


def check_search(n_vocab: int, n_beam: int, length_penalty: float) -> None:
    is_beam = is_whole(n_beam) and 1 <= n_beam <= n_vocab
    check("n_beam", n_beam, is_beam, f"a whole number from 1 to {n_vocab}, the size of the vocabulary")
    check_length_penalty(length_penalty)


def check_room(hparams: dict[str, int], n_beam: int, n_seq: int) -> None:
    """MemoryError, before any work: more than there is for the keys, values and logits of so many beams."""
    n_numbers = 2 * hparams["n_layer"] * hparams["n_embd"] * n_seq + hparams["n_vocab"]
    check_memory(4 * n_beam * n_numbers, f"the keys, values and logits of {n_beam} beams")


def beam_search(
    model,
    prompt_ids: Sequence[int],
    n_tokens: int,
    n_beam: int,
    length_penalty: float = 1.0,
    eot_ids: Sequence[int] = (),
) -> list[tuple[float, list[int]]]:
    """The `n_beam` best continuations of `prompt_ids` that beam search finds, as (score, new ids), best first.

    One of `eot_ids` finishes it, as the last of its ids, which counts in its length, or `n_tokens` do. The search ends
    when the likeliest unfinished one, scored as if it ended now, is no better than any of `n_beam` finished
    ones. A length_penalty above 0 favours long ones, below 0 short ones, 0 compares bare probabilities.
    ValueError: n_beam or length_penalty outside its range, or what generate refuses. MemoryError: too many beams.
    """
    check_request(prompt_ids, n_tokens, model.hparams["n_ctx"])
    check_search(model.hparams["n_vocab"], n_beam, length_penalty)
    if n_tokens > 1:
        check_room(model.hparams, n_beam, len(prompt_ids) + n_tokens)
    cache = model.new_cache(n_seq=len(prompt_ids) + n_tokens)
    beams, totals, finished = [[]], [0.0], []
    new = [list(prompt_ids)]
    for n in range(1, n_tokens + 1):
        logits = model.forward(new, cache)[:, 0]
        open_beams = []
        # More than are kept: of each beam's continuations eot_ids may end so many, and n_beam are to go on.
        candidates = likeliest(scored(logits, totals), (1 + max(1, len(eot_ids))) * n_beam)
        for rank, (total, row, i) in enumerate(candidates):
            if i not in eot_ids and n < n_tokens:
                open_beams.append((total, row, [*beams[row], i]))
            elif rank < n_beam:  # one that would not have been kept does not count as finished
                finished.append((total / n**length_penalty, [*beams[row], i]))
        finished = sorted(finished, key=lambda beam: -beam[0])[:n_beam]
        if not open_beams or (len(finished) == n_beam and open_beams[0][0] / n**length_penalty <= finished[-1][0]):
            break
        totals, rows, beams = map(list, zip(*open_beams[:n_beam], strict=True))
        cache.take(rows, n_same=len(prompt_ids))
        new = [ids[-1:] for ids in beams]
    return finished
