"""GPT-2 in NumPy: the whole forward pass, its KV cache, the one loop that generates, and the command line.

    python gpt2.py "Alan Turing theorized that computers would one day become" --n_tokens_to_generate 40

Follows Radford et al. 2019 and openai/gpt-2's src/model.py, in the manner of picoGPT. Left out: training, dropout.
"""

if __name__ == "__main__":
    import interrupts

    interrupts.end_quietly()  # before the other imports, which take most of a short run

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product

import numpy as np

import cli
from fast import Passes, times_transposed
from kv_cache import MASKED, KVCache
from sampling import Sampler, check, for_text, greedy, is_near_tie, is_whole, log_softmax

Drafter = Callable[[list[int], int], list[int]]  # (tokens, n_max) -> at most n_max guesses of what follows
N_FEW = 16  # queries that are attended at once, whatever the number of keys
N_QUERIES = 96  # of more, attended at once, so that no array of scores is [n_head, n_ctx, n_ctx]
N_SCORES = 1 << 18  # at once, 1 MB, of as many heads: few calls, since each waits for the interpreter's lock
N_SCORED = 256  # rows of logits that `score` has at once
N_GELU = 1 << 16  # numbers at once, so that the passes over them stay within the cache

# ----------------------------------------------------------------------------------------------------------------------
# The layers
# ----------------------------------------------------------------------------------------------------------------------


def embed(tokens, positions, wte, wpe):  # int[n_batch, n_new] -> [n_batch, n_new, n_embd]
    x = wte[tokens]
    x += wpe[positions]
    return x


@lru_cache(maxsize=32)
def full(n, value):  # -> [n]
    return np.full(n, value, np.float32)


def gelu(x):  # [..., n] -> [..., n], in place
    # The tanh form of Hendrycks & Gimpel 2016, 0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), as what it
    # equals in fewer passes: x / (1 + exp(-2u)).
    scale = -2 * math.sqrt(2 / math.pi)
    flat = x.reshape(-1)
    for start in range(0, flat.size, N_GELU):
        part = flat[start : start + N_GELU]
        t = part * part
        t *= scale * 0.044715
        t += scale
        t *= part
        np.exp(t, out=t)
        t += 1
        part /= t
    return x


def layer_norm(x, g, b, eps=1e-5):  # [..., n_embd] -> [..., n_embd]
    n_embd = x.shape[-1]
    x = x - np.vecdot(x, full(n_embd, 1 / n_embd), keepdims=True)  # the mean
    x *= g / np.sqrt(np.vecdot(x, x, keepdims=True) / n_embd + eps)  # the root of the variance
    x += b
    return x


def matmul(x, w):  # [..., n_in] @ [n_in, n_out] -> [..., n_out]
    """x @ w as one product of all rows: NumPy would take one for each text of a batch."""
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[1])


def linear(x, w, b):  # [..., n_in] -> [..., n_out]
    y = matmul(x, w)
    y += b
    return y


@lru_cache(maxsize=32)
def causal_mask(n):  # -> [n, n]
    return np.triu(np.full((n, n), MASKED, np.float32), 1)


def attend(q, k, v, padding=None):
    # [n_batch, n_head, n_rows, d_head], [n_batch, n_head, n_seq, d_head] twice -> [n_batch, n_head, n_rows, d_head]
    """Scaled dot-product attention of the last n_rows positions, each seeing itself and what is before it.

    `padding`, float32[n_batch, 1, 1, n_seq], is added to the scores: MASKED for keys that are padding.
    """
    n_rows = q.shape[-2]
    if n_rows <= N_FEW:
        return attend_block(q, k, v, padding)
    (n_batch, n_head), n_past = q.shape[:2], k.shape[-2] - n_rows
    out = np.empty_like(q)
    for start in range(0, n_rows, N_QUERIES):
        rows = slice(start, min(start + N_QUERIES, n_rows))
        seen = slice(0, n_past + rows.stop)
        n_heads = max(1, N_SCORES // (N_QUERIES * seen.stop))
        for text, head in product(range(n_batch), range(0, n_head, n_heads)):
            heads = text, slice(head, head + n_heads)
            mask = None if padding is None else padding[text][..., seen]
            out[heads][:, rows] = attend_block(q[heads][:, rows], k[heads][:, seen], v[heads][:, seen], mask)
    return out


def attend_block(q, k, v, padding):  # as attend
    scores = attention_scores(q, k, padding)
    # softmax(scores) @ v, the division by the sum last, where there is less to divide
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    out = scores @ v
    out /= np.vecdot(scores, full(scores.shape[-1], 1), keepdims=True)  # their sum
    return out


def attention_scores(q, k, padding):  # [..., n_rows, d_head], [..., n_seq, d_head] -> [..., n_rows, n_seq]
    n_rows, d_head = q.shape[-2:]
    scores = times_transposed(q * d_head**-0.5, k)
    if n_rows > 1:
        scores[..., -n_rows:] += causal_mask(n_rows)
    if padding is not None:
        scores += padding
    return scores


def attention(x, cache, layer, n_rows, c_attn, c_proj):  # [n_batch, n_new, n_embd] -> [n_batch, n_rows, n_embd]
    """Of the heads that the weights and the cache are of: all, or a share of them. Heads know nothing of each other."""
    n_batch, n_new, _ = x.shape
    qkv = linear(x, **c_attn).reshape(n_batch, n_new, 3, cache.n_head, cache.d_head).transpose(2, 0, 3, 1, 4)
    k, v = cache.append(layer, qkv)  # of the past too: each [n_batch, n_head, n_seq, d_head]
    heads = attend(qkv[0, :, :, n_new - n_rows :], k, v, cache.padding(k.shape[2]))
    return linear(heads.swapaxes(1, 2).reshape(n_batch, n_rows, cache.n_head * cache.d_head), **c_proj)


def feed_forward(x, c_fc, c_proj):  # [..., n_embd] -> [..., n_embd], of all hidden units or a share of them
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def transformer_block(x, cache, layer, n_rows, total, attn, ln_1, ln_2, mlp):
    # [n_batch, n_new, n_embd] -> [n_batch, n_rows, n_embd]: keys and values of all, the rest of the last rows only
    x = x[:, x.shape[1] - n_rows :] + total(attention(layer_norm(x, **ln_1), cache, layer, n_rows, **attn))
    x += total(feed_forward(layer_norm(x, **ln_2), **mlp))
    return x


def gpt2(tokens, cache, n_last, wte, wpe, blocks, ln_f, lm_head=None, total=lambda x: x):
    # int[n_batch, n_new] -> [n_batch, n_last, n_vocab]
    """The model. What a layer adds to x is a sum over its heads and over its hidden units, so several threads can each
    compute a share of them; `total` then adds up what all have. `lm_head` is wte.T, or a share of its columns.
    """
    n_new = tokens.shape[1]
    x = embed(tokens, cache.positions(n_new), wte, wpe)
    for i, params in enumerate(blocks):
        cache.note(x)
        n_rows = n_last if i == len(blocks) - 1 else n_new  # later blocks need every row, the output only the last
        x = transformer_block(x, cache, i, n_rows, total, **params)
    cache.note(x)
    return matmul(layer_norm(x, **ln_f), wte.T if lm_head is None else lm_head)


# ----------------------------------------------------------------------------------------------------------------------
# State
# ----------------------------------------------------------------------------------------------------------------------


def describe_bad(array: np.ndarray) -> str:
    return f"{array.size - np.count_nonzero(np.isfinite(array))} of {array.size} numbers are NaN or infinite"


def bad_weights(params, name: str = "") -> list[str]:
    """Which weights are not finite, by their names in the checkpoint's order, and how many of each."""
    if isinstance(params, np.ndarray):
        return [] if np.isfinite(params).all() else [f"{describe_bad(params)} in {name}"]
    items = params.items() if isinstance(params, dict) else enumerate(params)
    return [bad for key, value in items for bad in bad_weights(value, f"{name}/{key}" if name else str(key))]


class Model:
    """The weights and what they are: hparams (n_vocab, n_ctx, n_embd, n_head, n_layer) and nested params."""

    def __init__(self, hparams: dict, params: dict):
        self.hparams = hparams
        self.params = params
        self.passes = Passes(hparams, params)

    def checks_pay(self, n_left: int) -> bool:
        """Whether passes of several rows can cost little more than those of one, with n_left tokens to come."""
        return self.passes.few_rows_pay(n_left)

    def new_cache(self, n_batch: int = 1, n_seq: int | None = None) -> KVCache:
        """Room for the whole context, or for n_seq tokens if that is less: large memory takes time to be had."""
        n_head, d_head = self.hparams["n_head"], self.hparams["n_embd"] // self.hparams["n_head"]
        n_seq = self.hparams["n_ctx"] if n_seq is None else min(n_seq, self.hparams["n_ctx"])
        return KVCache(np.empty((self.hparams["n_layer"], 2, n_batch, n_head, n_seq, d_head), np.float32))

    def forward(self, tokens, cache: KVCache, n_last: int = 1, plainly: bool = False) -> np.ndarray:
        """Feed `tokens`, int[n_batch, n_new], after those in `cache`; return float32[n_batch, n_last, n_vocab].

        Row i of the result scores the token after the (n_new - n_last + i)-th new one. The cache then holds the new
        tokens too. `plainly`: round as a pass of one row does that uses no packed weights. ValueError: no token, an id
        outside the vocabulary, more tokens than the cache has room for, more rows than tokens, or logits that are NaN
        or infinite.
        """
        tokens = np.asarray(tokens)
        n_vocab, n_ctx = self.hparams["n_vocab"], cache.n_ctx
        n_batch, n_new = tokens.shape if tokens.ndim == 2 else (0, 0)
        if n_batch != cache.n_batch or not 1 <= n_last <= n_new or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"tokens are {tokens.dtype}{list(tokens.shape)} and n_last {n_last}; expected integers of shape "
                f"[{cache.n_batch}, n_new] and n_last from 1 to n_new"
            )
        if tokens.min() < 0 or tokens.max() >= n_vocab:
            bad = next(int(i) for i in tokens.flat if not 0 <= i < n_vocab)
            raise ValueError(f"token id {bad} is outside the vocabulary, 0 to {n_vocab - 1}")
        if cache.length + n_new > n_ctx:
            raise ValueError(f"{cache.length} tokens and {n_new} more exceed the context of {n_ctx}; feed fewer")
        logits = self.passes(gpt2, tokens, cache, n_last, plainly)
        if not np.isfinite(logits).all():
            causes = "; ".join(bad_weights(self.params)) or "finite weights, so sums overflow"
            raise ValueError(f"{describe_bad(logits)} among the logits: {causes}; utils.py verify checks a model")
        cache.advance(n_new)
        return logits


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


def check_n_tokens(n_tokens: int) -> None:
    if not is_whole(n_tokens) or n_tokens < 1:
        raise ValueError(f"{n_tokens!r} tokens to generate, expected a whole number of 1 or more")


def check_slide(slide_by: int, n_ctx: int) -> None:
    is_part = is_whole(slide_by) and 1 <= slide_by <= n_ctx
    check("slide_by", slide_by, is_part, f"a whole number from 1 to {n_ctx}, the context")


def check_request(model: Model, prompt_ids: Sequence[int], n_tokens: int, slide_by: int | None = None) -> None:
    """ValueError unless `n_tokens` can be generated after `prompt_ids`. The last token is never fed."""
    check_n_tokens(n_tokens)
    n_ctx = model.hparams["n_ctx"]
    if not len(prompt_ids):
        raise ValueError("the prompt has no tokens, expected 1 or more; start from the id of <|endoftext|>")
    if slide_by is not None:
        check_slide(slide_by, n_ctx)
    elif len(prompt_ids) + n_tokens > n_ctx + 1:
        raise ValueError(
            f"{len(prompt_ids)} prompt tokens and {n_tokens} new ones exceed the context of {n_ctx}: "
            f"at most {max(0, n_ctx + 1 - len(prompt_ids))} new ones fit; shorten the prompt, ask for fewer, or slide"
        )


def generate(
    model: Model,
    prompt_ids: Sequence[int],
    n_tokens: int,
    sample: Sampler = greedy,
    draft: Drafter | None = None,
    slide_by: int | None = None,
    cache: KVCache | None = None,
) -> Iterator[int]:
    """Yield `n_tokens` ids that follow `prompt_ids`, each chosen by `sample` from the model's logits.

    `draft` guesses tokens ahead, which are checked in one pass: the text is the same, only the time differs.
    `slide_by`: when the context is full, forget the oldest tokens, so many at a time, and compute the rest anew.
    `cache` may hold the first of the prompt's tokens already. ValueError, before any work: no prompt, n_tokens below 1,
    or, without `slide_by`, more than the context has room for.
    """
    check_request(model, prompt_ids, n_tokens, slide_by)
    cache = cache or model.new_cache(n_seq=len(prompt_ids) + n_tokens)
    return (i for _, i in decode(model, cache, [list(prompt_ids)], n_tokens, [sample], draft, slide_by))


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    sample: Sampler | Sequence[Sampler] = greedy,
    slide_by: int | None = None,
    is_end: Callable[[list[int]], bool] = lambda ids: False,
) -> list[list[int]]:
    """The ids that `generate` yields after each of `prompts`, all computed together: weights are read once for all.

    `sample` may be one for each prompt. A text ends after n_tokens, or when is_end(its new ids) is true, and costs
    nothing from then on. Equal prompts are computed once. ValueError, before any work: what generate refuses for any
    prompt, no prompts, another number of samplers, or slide_by with prompts of different lengths.
    """
    samples = list(sample) if isinstance(sample, Sequence) else [sample] * len(prompts)
    if not prompts or len(samples) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(samples)} samplers, expected one or more, and as many")
    for prompt in prompts:
        check_request(model, prompt, n_tokens, slide_by)
    texts, n_longest = [list(prompt) for prompt in prompts], max(map(len, prompts))
    if slide_by is not None and min(map(len, prompts)) < n_longest:
        raise ValueError("prompts of different lengths cannot slide together; make them equally long, or one by one")
    cache = prefilled(model, texts, n_longest + n_tokens if slide_by is None else None)
    new: list[list[int]] = [[] for _ in texts]
    ended = [False] * len(texts)
    for index, i in decode(model, cache, texts, n_tokens, samples, None, slide_by, ended):
        new[index].append(i)
        ended[index] = is_end(new[index])
    return new


def prefilled(model: Model, texts: list[list[int]], n_seq: int | None) -> KVCache:
    """A cache with a row for each text, shorter ones padded on the left.

    Where some are equal, all but the last tokens are in it already, computed once for each distinct text.
    """
    n_longest, distinct = max(map(len, texts)), list(dict.fromkeys(map(tuple, texts)))
    cache = model.new_cache(len(distinct), n_seq)
    cache.n_pad = np.array([n_longest - len(text) for text in distinct])
    if len(distinct) < len(texts):
        n_ctx = model.hparams["n_ctx"]
        if 1 < n_longest <= n_ctx:  # a longer one slides
            model.forward([padded(text[:-1], n_longest - 1) for text in distinct], cache)
        cache.take([distinct.index(tuple(text)) for text in texts])
    return cache


def padded(tokens: Sequence[int], n: int) -> list[int]:
    return [0] * (n - len(tokens)) + list(tokens)


def decode(model, cache, texts, n_tokens, samples, draft, slide_by, ended=(False,)):
    """Extend each of `texts` by n_tokens, yield (its index, the id) as they come; stop for those that have `ended`."""
    n_ctx, n_end, start = model.hparams["n_ctx"], [len(text) + n_tokens for text in texts], 0
    samples = [for_text(sample, text) for sample, text in zip(samples, texts, strict=True)]
    rows = list(range(len(texts)))  # the index of each row's text
    while rows:
        n_text = int(cache.n_pad[0]) + len(texts[rows[0]])  # all rows are as long as this, with their padding
        if (n_over := n_text - start - n_ctx) > 0:  # only when sliding: the window moves, and its tokens are fed anew
            start, cache.length = start + -(-n_over // slide_by) * slide_by, 0
        n_room = min(n_end[rows[0]] - n_text - 1, n_ctx - (n_text - start))
        guesses = draft(texts[rows[0]], n_room) if draft else []
        new = [padded(texts[i][start:], n_text - start)[cache.length :] + guesses for i in rows]
        logits = model.forward(new, cache, n_last=len(guesses) + 1)
        is_exact = model.passes.are_plain(len(rows) + len(guesses))
        for row, i in enumerate(rows):
            text = texts[i]
            for scores, guess in zip(logits[row], [*guesses, None], strict=True):
                if not is_exact and is_near_tie(samples[i], scores, len(text)):
                    scores, guess = forward_alone(model, cache.row(row), text, start), None  # and the round ends
                text.append(samples[i](scores, len(text)))
                yield i, text[-1]
                if text[-1] != guess:
                    break
        # The newest has not been fed, wrong guesses are forgotten.
        cache.length = int(cache.n_pad[0]) + len(texts[rows[0]]) - start - 1
        going_on = [row for row, i in enumerate(rows) if len(texts[i]) < n_end[i] and not ended[i]]
        if going_on and len(going_on) < len(rows):
            cache.take(going_on)
        rows = [rows[row] for row in going_on]


def forward_alone(model, cache, tokens, start):  # -> [n_vocab]
    cache.length = len(tokens) - 1 - start
    return model.forward([tokens[-1:]], cache, plainly=True)[0, 0]


def score(model: Model, ids: Sequence[int]) -> np.ndarray:
    """The log-probability, in nats, of each id after the first, given those before it: float32[len(ids) - 1].

    ValueError: more than the context and one, an id outside the vocabulary.
    """
    n_vocab, n_ctx = model.hparams["n_vocab"], model.hparams["n_ctx"]
    if len(ids) > n_ctx + 1:
        raise ValueError(f"{len(ids)} ids exceed the context: at most {n_ctx + 1} can be scored; cut them in windows")
    if bad := [int(i) for i in ids if not 0 <= i < n_vocab]:
        raise ValueError(f"token id {bad[0]} is outside the vocabulary, 0 to {n_vocab - 1}")
    cache, scores = model.new_cache(n_seq=len(ids)), np.empty(max(0, len(ids) - 1), np.float32)
    for start in range(0, len(scores), N_SCORED):  # not all at once: the logits of 1024 tokens take 206 MB
        rows = slice(start, min(start + N_SCORED, len(scores)))
        logits = model.forward([ids[rows]], cache, n_last=rows.stop - start)[0]
        following = ids[start + 1 : rows.stop + 1]
        scores[rows] = log_softmax(logits)[np.arange(len(following)), following]
    return scores


if __name__ == "__main__":
    from console import main  # which imports this file in its turn

    cli.run(main)
