"""Caches that hold a beginning already, and prompts of a batch: what they have in common is computed once."""

from collections.abc import Sequence


def begun(cache, n_same: int, kv):
    """`cache`, which is empty, with the first n_same tokens of `kv` in it."""
    if n_same:
        cache.kv[..., :n_same, :] = kv[..., :n_same, :]
        cache.advance(n_same)
    return cache


def left_padded(ids: Sequence[int], n: int) -> list[int]:
    return [0] * (n - len(ids)) + list(ids)


def prefilled(model, prompts: Sequence[Sequence[int]], n_seq: int | None):
    """A cache with a row for each prompt. Where some are equal, it holds all but their last tokens, computed once."""
    n_longest, distinct = max(map(len, prompts)), list(dict.fromkeys(map(tuple, prompts)))
    cache = model.new_cache(len(distinct), n_seq, [n_longest - len(prompt) for prompt in distinct])
    if len(distinct) < len(prompts):
        if 1 < n_longest <= model.hparams["n_ctx"]:  # a longer one slides
            model.forward([left_padded(prompt[:-1], n_longest - 1) for prompt in distinct], cache)
        cache.take([distinct.index(tuple(prompt)) for prompt in prompts])
    return cache
