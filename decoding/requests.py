"""What can be asked of a model: ValueErrors before any work, each with the value, the limit and the way out."""

from collections.abc import Sequence

import numpy as np

from decoding.sampling import check, is_number, is_whole


def check_n_tokens(n_tokens: int) -> None:
    if not is_whole(n_tokens) or n_tokens < 1:
        raise ValueError(f"{n_tokens!r} tokens to generate, expected a whole number of 1 or more")


def check_slide(slide_by: int, n_ctx: int) -> None:
    is_part = is_whole(slide_by) and 1 <= slide_by <= n_ctx
    check("slide_by", slide_by, is_part, f"a whole number from 1 to {n_ctx}, the context")


def check_request(prompt_ids: Sequence[int], n_tokens: int, n_ctx: int, slide_by: int | None = None) -> None:
    """ValueError unless `n_tokens` can be generated after `prompt_ids`. The last token is never fed."""
    check_n_tokens(n_tokens)
    if not len(prompt_ids):
        raise ValueError("the prompt has no tokens, expected 1 or more; start from the id of <|endoftext|>")
    if slide_by is not None:
        check_slide(slide_by, n_ctx)
    elif len(prompt_ids) + n_tokens > n_ctx + 1:
        raise ValueError(
            f"{len(prompt_ids)} prompt tokens and {n_tokens} new ones exceed the context of {n_ctx}: "
            f"at most {max(0, n_ctx + 1 - len(prompt_ids))} new ones fit; shorten the prompt, ask for fewer, or slide"
        )


def check_room(n_room: int, n_fed: int, n_ctx: int) -> None:
    """ValueError unless a cache of n_room tokens holds the n_fed that are fed, or the context that slides over them."""
    if n_room < min(n_fed, n_ctx):
        raise ValueError(
            f"the cache has room for {n_room} tokens, expected {min(n_fed, n_ctx)} or more; make a larger one"
        )


def check_batch(
    prompts: Sequence[Sequence[int]], n_samplers: int, n_tokens: int, n_ctx: int, slide_by: int | None
) -> None:
    """ValueError unless `n_tokens` can be generated after each of `prompts`, all computed together."""
    if not len(prompts) or n_samplers != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {n_samplers} samplers, expected one or more, and as many")
    for prompt in prompts:
        check_request(prompt, n_tokens, n_ctx, slide_by)
    if slide_by is not None and min(map(len, prompts)) < max(map(len, prompts)):
        raise ValueError("prompts of different lengths cannot slide together; make them equally long, or one by one")


def check_ids(ids, n_vocab: int) -> None:
    """ValueError: an id outside the vocabulary, or no integer."""
    ids = np.asarray(ids)
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"token ids are {ids.dtype}{list(ids.shape)}, expected integers, which encode() makes of text")
    if ids.size and not 0 <= ids.min() <= ids.max() < n_vocab:
        bad = next(int(i) for i in ids.flat if not 0 <= i < n_vocab)
        raise ValueError(f"token id {bad} is outside the vocabulary, 0 to {n_vocab - 1}")


def check_length_penalty(length_penalty: float) -> None:
    is_penalty = is_number(length_penalty) and -10 <= length_penalty <= 10
    check("length_penalty", length_penalty, is_penalty, "a number from -10 to 10")


def check_cache(cache, hparams: dict) -> None:
    """ValueError: a cache of another model."""
    found = cache.kv.shape[0], cache.n_head, cache.d_head
    expected = hparams["n_layer"], hparams["n_head"], hparams["n_embd"] // hparams["n_head"]
    if found != expected:
        layers = "{} layers of {} heads of {} numbers"
        raise ValueError(
            f"the cache has {layers.format(*found)}, the model {layers.format(*expected)}; make it with new_cache()"
        )


def check_tokens(tokens: np.ndarray, n_last: int, cache, hparams: dict) -> None:
    """ValueError unless `tokens`, int[n_batch, n_new], can be fed after those in `cache`."""
    check_cache(cache, hparams)
    n_batch, n_new = tokens.shape if tokens.ndim == 2 else (0, 0)
    if n_batch != cache.n_batch or not is_whole(n_last) or not 1 <= n_last <= n_new or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"tokens are {tokens.dtype}{list(tokens.shape)} and n_last {n_last}; expected integers of shape "
            f"[{cache.n_batch}, n_new] and n_last from 1 to n_new"
        )
    check_ids(tokens, hparams["n_vocab"])
    if cache.length + n_new > cache.n_ctx:
        raise ValueError(f"{cache.length} tokens and {n_new} more exceed the context of {cache.n_ctx}; feed fewer")
