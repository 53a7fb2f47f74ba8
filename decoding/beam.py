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


def likeliest(totals, n):  # [n_rows, n_vocab] -> up to n of (total, row, id), best first
    flat = totals.ravel()
    best = np.argpartition(-flat, n)[:n] if n < flat.size else np.arange(flat.size)
    best = best[np.lexsort((best, -flat[best]))]
    return [(float(flat[i]), *(int(part) for part in divmod(i, totals.shape[1]))) for i in best]


def check_search(n_vocab: int, n_beam: int, length_penalty: float) -> None:
    is_beam = is_whole(n_beam) and 1 <= n_beam <= n_vocab
    check("n_beam", n_beam, is_beam, f"a whole number from 1 to {n_vocab}, the size of the vocabulary")
    check_length_penalty(length_penalty)


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
    ValueError: n_beam or length_penalty outside its range, or what generate refuses.
    """
    check_request(prompt_ids, n_tokens, model.hparams["n_ctx"])
    check_search(model.hparams["n_vocab"], n_beam, length_penalty)
    cache = model.new_cache(n_seq=len(prompt_ids) + n_tokens)
    beams, totals, finished = [[]], [0.0], []
    new = [list(prompt_ids)]
    for n in range(1, n_tokens + 1):
        logits = model.forward(new, cache)[:, 0]
        open_beams = []
        # More than are kept: of each beam's continuations eot_ids may end so many, and n_beam are to go on.
        n_candidates = (1 + max(1, len(eot_ids))) * n_beam
        candidates = likeliest(log_softmax(logits.astype(np.float64)) + np.array(totals)[:, None], n_candidates)
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
