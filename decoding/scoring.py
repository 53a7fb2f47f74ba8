"""How well a model predicts a text: the log-probability of each of its tokens.

A text longer than the context is scored in windows, each token once, as is usual for fixed-length models: the window
moves by `stride` tokens, and tokens that were scored before are only context. A stride of the context is the
cheapest and the least favourable; a small one gives nearly every token a whole context.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from decoding.requests import check_ids
from decoding.sampling import check, is_whole, log_softmax

N_ROWS = 256  # of logits at once: those of 1024 tokens would take 206 MB


def score_rest(model, ids: Sequence[int], n_given: int, cache=None) -> tuple[np.ndarray, np.ndarray]:
    """Of each id from number `n_given` on: its log-probability given those before it, in nats, and whether no other is
    likelier; float32 and bool[len(ids) - n_given].

    `n_given` is 1 or more. `cache` may hold the first of the ids already, and holds all but the last afterwards: texts
    that begin alike share it. ValueError: more than the context and one, an id outside the vocabulary.
    """
    n_ctx = model.hparams["n_ctx"]
    if len(ids) > n_ctx + 1:
        raise ValueError(f"{len(ids)} ids exceed the context: at most {n_ctx + 1} can be scored; cut them in windows")
    check_ids(ids, model.hparams["n_vocab"])
    cache = cache or model.new_cache(n_seq=len(ids))
    cache.length = min(cache.length, n_given - 1)  # the last given is fed, for its logits
    scores, are_likeliest = np.empty(max(0, len(ids) - n_given), np.float32), np.empty(max(0, len(ids) - n_given), bool)
    for start in range(0, len(scores), N_ROWS):
        rows = slice(start, min(start + N_ROWS, len(scores)))
        stop = n_given - 1 + rows.stop
        logits = model.forward([ids[cache.length : stop]], cache, n_last=rows.stop - start)[0]
        following = np.asarray(ids[n_given + start : stop + 1])
        scores[rows] = log_softmax(logits)[np.arange(len(following)), following]
        are_likeliest[rows] = logits.argmax(axis=-1) == following
    return scores, are_likeliest


def score(model, ids: Sequence[int]) -> np.ndarray:
    """The log-probability, in nats, of each id after the first, given those before it: float32[len(ids) - 1].

    ValueError: more than the context and one, an id outside the vocabulary.
    """
    return score_rest(model, ids, 1)[0]


def windows(n_ids: int, n_ctx: int, stride: int) -> Iterator[tuple[slice, int]]:
    """Windows of up to n_ctx + 1 ids (the last is only predicted), and how many of their last ids are new in each."""
    n_scored = 1
    for start in range(0, n_ids - 1, stride):
        stop = min(start + n_ctx + 1, n_ids)
        yield slice(start, stop), stop - n_scored
        n_scored = stop
        if stop == n_ids:
            return


def log_probabilities(model, ids: Sequence[int], stride: int) -> np.ndarray:  # -> float32[len(ids) - 1]
    """As `score`, of any length, with a progress bar on stderr. ValueError: a stride outside 1 to the context."""
    from tqdm import tqdm  # only whole files take long enough for a bar

    n_ctx = model.hparams["n_ctx"]
    check("stride", stride, is_whole(stride) and 1 <= stride <= n_ctx, f"a whole number from 1 to {n_ctx}, the context")
    parts = []
    with tqdm(total=len(ids) - 1, unit=" tokens", disable=None) as bar:  # none where stderr is no terminal
        for window, n_new in windows(len(ids), n_ctx, stride):
            parts.append(score(model, ids[window])[-n_new:])
            bar.update(n_new)
    return np.concatenate(parts)
