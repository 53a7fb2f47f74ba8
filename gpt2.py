"""GPT-2 in NumPy: the layers, the KV cache, the model, the one loop that generates, and the command line.

    python gpt2.py "Alan Turing theorized that computers would one day become" --n_tokens_to_generate 40

Follows Radford et al. 2019 and openai/gpt-2's src/model.py, in the manner of picoGPT. Left out: training, dropout.
"""

if __name__ == "__main__":
    from console.start import start

    start()  # before the other imports, which take most of a short run

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import numpy as np

from checkpoints.weights import why_not_finite
from console import command, flags, modes, stats
from decoding.prefill import left_padded, prefilled
from decoding.requests import check_batch, check_request, check_room, check_tokens
from decoding.sampling import Sampler, for_row, for_text, greedy
from decoding.ties import is_near_tie, settled
from fast import ACTIVATIONS, Passes, elementwise, mean, room, row_sums, take_rows, tiled, times_transposed

Drafter = Callable[[list[int], int], list[int]]  # (tokens, n_max) -> at most n_max guesses of what follows
MASKED = -1e38  # added to the score of a key that may not be seen; -inf would give NaN where every key is masked

# ----------------------------------------------------------------------------------------------------------------------
# The layers
# ----------------------------------------------------------------------------------------------------------------------


def embed(tokens, positions, wte, wpe):  # int[n_batch, n_new] -> [n_batch, n_new, n_embd]
    return wte[tokens] + wpe[positions]


@elementwise
def gelu(x):  # [...] -> [...]
    # Hendrycks & Gimpel 2016: 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3)
    scale = -2 * math.sqrt(2 / math.pi)
    return x / (1 + np.exp((x * x * (scale * 0.044715) + scale) * x))


def layer_norm(x, g, b, eps=1e-5):  # [..., n_embd] -> [..., n_embd]
    x = x - mean(x)
    x *= g / np.sqrt(np.vecdot(x, x, keepdims=True) / x.shape[-1] + eps)  # the variance and eps
    x += b
    return x


def matmul(x, w):  # [n_batch, ..., n_in] @ [n_in, n_out] -> [n_batch, ..., n_out]
    if len(x) == 1:
        return x @ w
    return (x.reshape(-1, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[1])  # one product for all texts


def linear(x, w, b):  # [..., n_in] -> [..., n_out]
    y = matmul(x, w)
    y += b
    return y


@lru_cache(maxsize=32)
def causal_mask(n):  # -> [n, n]
    return np.triu(np.full((n, n), MASKED, np.float32), 1)


def attention_scores(q, k, padding):  # [..., n_rows, d_head], [..., n_seq, d_head] -> [..., n_rows, n_seq]
    n_rows, d_head = q.shape[-2:]
    scores = times_transposed(q * d_head**-0.5, k)
    if n_rows > 1:
        scores[..., -n_rows:] += causal_mask(n_rows)
    if padding is not None:
        scores += padding
    return scores


@tiled
def attend(q, k, v, padding=None):
    # [n_batch, n_head, n_rows, d_head], [n_batch, n_head, n_seq, d_head] twice -> [n_batch, n_head, n_rows, d_head]
    """Scaled dot-product attention of the last n_rows positions, each seeing itself and what is before it.

    `padding`, float32[n_batch, 1, 1, n_seq], is added to the scores: MASKED for keys that are padding.
    """
    scores = attention_scores(q, k, padding)
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    return scores @ v / row_sums(scores)  # softmax(scores) @ v, divided last, where there is less to divide


def attention(x, cache, layer, n_rows, c_attn, c_proj):  # [n_batch, n_new, n_embd] -> [n_batch, n_rows, n_embd]
    n_batch, n_new, _ = x.shape
    qkv = linear(x, **c_attn).reshape(n_batch, n_new, 3, cache.n_head, cache.d_head).transpose(2, 0, 3, 1, 4)
    heads = cache.attend(layer, qkv[0, :, :, n_new - n_rows :], qkv[1:])
    return linear(heads.swapaxes(1, 2).reshape(n_batch, n_rows, cache.n_head * cache.d_head), **c_proj)


def feed_forward(x, activation, c_fc, c_proj):  # [..., n_embd] -> [..., n_embd]
    return linear(activation(linear(x, **c_fc)), **c_proj)


def transformer_block(x, cache, layer, n_rows, activation, eps, attn, ln_1, ln_2, mlp):
    # [n_batch, n_new, n_embd] -> [n_batch, n_rows, n_embd]: keys and values of all, the rest of the last rows only
    x = x[:, x.shape[1] - n_rows :] + attention(layer_norm(x, **ln_1, eps=eps), cache, layer, n_rows, **attn)
    x += feed_forward(layer_norm(x, **ln_2, eps=eps), activation, **mlp)
    return x


def gpt2(tokens, cache, n_last, wte, wpe, blocks, ln_f, lm_head=None, activation=gelu, eps=1e-5):
    # int[n_batch, n_new] -> [n_batch, n_last, n_vocab]
    """The model. `lm_head`: the output matrix, [n_embd, n_vocab], where it is not the transpose of wte."""
    x = embed(tokens, cache.positions(tokens.shape[1]), wte, wpe)
    for i, params in enumerate(blocks):
        cache.note(x)
        n_rows = n_last if i == len(blocks) - 1 else x.shape[1]  # later blocks need every row, the output only the last
        x = transformer_block(x, cache, i, n_rows, activation, eps, **params)
    cache.note(x)
    return matmul(layer_norm(x, **ln_f, eps=eps), wte.T if lm_head is None else lm_head)


# ----------------------------------------------------------------------------------------------------------------------
# The cache
# ----------------------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens fed so far: float32[n_layer, 2, n_batch, n_head, n_ctx, d_head], `length` used.

    A fresh one is "no cache". Setting `length` back forgets the tokens after it. `n_pad`, int[n_batch]: the left
    padding of each row, always masked.
    """

    def __init__(self, kv: np.ndarray, length: int = 0, n_pad: Sequence[int] = ()):
        _, _, self.n_batch, self.n_head, self.n_ctx, self.d_head = kv.shape
        self.kv, self._length = kv, length
        self.n_pad = np.array(n_pad if len(n_pad) else [0] * self.n_batch)
        self.mask = None  # or [n_batch, 1, 1, n_ctx]
        if self.n_pad.any():
            is_pad = np.arange(self.n_ctx) < self.n_pad[:, None]
            self.mask = np.where(is_pad, np.float32(MASKED), np.float32(0))[:, None, None]

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"length {length} is not in 0 to {self._length}, what the cache holds: it only rolls back")
        self._length = length

    def positions(self, n_new):  # -> a slice or int[n_batch, n_new]: the rows of wpe for the new tokens
        start, stop = self._length, self._length + n_new
        if self.mask is None:
            return slice(start, stop)
        return np.maximum(0, np.arange(start, stop) - self.n_pad[:, None])

    def append(self, layer, kv):  # [2, n_batch, n_head, n_new, d_head] -> [2, n_batch, n_head, n_seq, d_head]
        """Store a layer's keys and values of the new tokens, return all it has; `advance` counts them, once."""
        stop = self._length + kv.shape[3]
        stored = self.kv[layer]
        stored[:, :, :, self._length : stop] = kv
        return stored[:, :, :, :stop]

    def attend(self, layer, q, kv):  # [n_batch, n_head, n_rows, d_head], of the new: as append -> as q
        k, v = self.append(layer, kv)
        return attend(q, k, v, self.padding(k.shape[2]))

    def padding(self, n_seq):  # -> None or [n_batch, 1, 1, n_seq]
        return None if self.mask is None else self.mask[..., :n_seq]

    def note(self, x: np.ndarray) -> None:
        """What goes into each layer passes here, and what comes out of the last, for caches that look (analysis/)."""

    def advance(self, n_new: int) -> None:
        self._length += n_new

    def take(self, rows: Sequence[int], n_same: int = 0) -> None:
        """Go on with these batch rows, each as often as it is named; they hold the same up to position `n_same`."""
        KVCache.__init__(self, take_rows(self.kv, rows, n_same, self._length), self._length, self.n_pad[list(rows)])

    def row(self, row: int) -> "KVCache":
        """One text of the batch, without its padding: a view, so what is fed to it is stored here."""
        n_pad = int(self.n_pad[row])
        return KVCache(self.kv[:, :, row : row + 1, :, n_pad:], self._length - n_pad)


# ----------------------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------------------


class Model:
    """The weights, nested, and hparams: n_vocab, n_ctx, n_embd, n_head, n_layer, perhaps activation and epsilon."""

    def __init__(self, hparams: dict, params: dict):
        self.hparams, self.params = hparams, params
        activation, eps = ACTIVATIONS.get(hparams.get("activation"), gelu), hparams.get("layer_norm_epsilon", 1e-5)
        self.gpt2 = partial(gpt2, activation=activation, eps=eps)
        self.passes = Passes(params)

    def new_cache(self, n_batch: int = 1, n_seq: int | None = None, n_pad: Sequence[int] = ()) -> KVCache:
        """Room for the whole context, or for n_seq tokens if that is less: large memory takes time to be had."""
        n_head, d_head = self.hparams["n_head"], self.hparams["n_embd"] // self.hparams["n_head"]
        n_seq = self.hparams["n_ctx"] if n_seq is None else min(n_seq, self.hparams["n_ctx"])
        return KVCache(room((self.hparams["n_layer"], 2, n_batch, n_head, n_seq, d_head)), 0, n_pad)

    def forward(self, tokens, cache: KVCache, n_last: int = 1, plainly: bool = False) -> np.ndarray:
        """Feed `tokens`, int[n_batch, n_new], after those in `cache`; return float32[n_batch, n_last, n_vocab].

        Row i of the result scores the token after the (n_new - n_last + i)-th new one. The cache then holds the new
        tokens too. `plainly`: round as a pass of one row does that uses no packed weights. ValueError: no token, an id
        outside the vocabulary, more tokens than the cache has room for, more rows than tokens, or non-finite logits.
        """
        tokens = np.asarray(tokens)
        check_tokens(tokens, n_last, cache, self.hparams)
        logits = self.passes(self.gpt2, tokens, cache, n_last, plainly)
        if not np.isfinite(logits).all():
            raise ValueError(why_not_finite(logits, self.params))
        cache.advance(tokens.shape[1])
        return logits


def load_model(model_size: str, models_dir: str | None = None, **nanogpt):  # -> (Encoder, Model)
    """A model of `models_dir`, the folder beside this file unless given; an OpenAI size is downloaded if need be."""
    from utils import load_encoder_hparams_and_params  # which only programs need

    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir, **nanogpt)
    return encoder, Model(hparams, params)


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


class Seq:
    """One sequence of a batch: its ids so far, the prompt's included, how the next is chosen, and when it ends."""

    def __init__(self, prompt_ids, n_tokens, sample, is_end=None):
        self.ids, self.n_prompt, self.n_end = list(prompt_ids), len(prompt_ids), len(prompt_ids) + n_tokens
        self.sample, self.is_end, self.has_ended = for_text(sample, self.ids), is_end, False
        self.n_first = self.n_prompt  # of the ids, which were fed at once: later ones followed one by one

    def choose(self, logits) -> None:
        self.ids.append(self.sample(logits, len(self.ids)))
        self.has_ended = len(self.ids) == self.n_end or bool(self.is_end and self.is_end(self.ids[self.n_prompt :]))


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
    a cache that is too short, or, without `slide_by`, more than the context has room for.
    """
    check_request(prompt_ids, n_tokens, model.hparams["n_ctx"], slide_by)
    cache = cache or model.new_cache(n_seq=len(prompt_ids) + n_tokens)
    check_room(cache.n_ctx, len(prompt_ids) + n_tokens - 1, model.hparams["n_ctx"])
    cache.length = min(cache.length, len(prompt_ids) - 1)  # the last token is fed, for its logits
    return (seq.ids[-1] for seq in decode(model, cache, [Seq(prompt_ids, n_tokens, sample)], draft, slide_by))


def generate_batch(
    model: Model,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    sample: Sampler | Sequence[Sampler] = greedy,
    slide_by: int | None = None,
    is_end: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """The ids that `generate` yields after each of `prompts`, all computed together: weights are read once for all.

    `sample` may be one for each prompt; one for all gets the seeds N, N + 1 and so on. A text ends after n_tokens, or
    when is_end(its new ids) is true, and costs nothing from then on. Equal prompts are computed once. ValueError,
    before any work: what generate refuses, no prompts, other numbers of samplers, or slide_by with different lengths.
    """
    samples = list(sample) if isinstance(sample, Sequence) else [for_row(sample, i) for i in range(len(prompts))]
    check_batch(prompts, len(samples), n_tokens, model.hparams["n_ctx"], slide_by)
    cache = prefilled(model, prompts, max(map(len, prompts)) + n_tokens if slide_by is None else None)
    seqs = [Seq(prompt, n_tokens, choose, is_end) for prompt, choose in zip(prompts, samples, strict=True)]
    for _ in decode(model, cache, seqs, slide_by=slide_by):
        pass
    return [seq.ids[seq.n_prompt :] for seq in seqs]


def decode(model, cache, seqs, draft=None, slide_by=None):
    """Extend each of `seqs` until it ends; yield one each time that it has a new token."""
    n_ctx, start = model.hparams["n_ctx"], 0  # the window's first token: it moves when it slides
    while seqs:
        first, n_pad = seqs[0], int(cache.n_pad[0])
        n_text = n_pad + len(first.ids)  # all rows are as long as this, with their padding
        if (n_over := n_text - start - n_ctx) > 0:  # the window moves, and its tokens are fed anew
            start, cache.length = start + -(-n_over // slide_by) * slide_by, 0
            for seq in seqs:
                seq.n_first = len(seq.ids)
        n_room = min(first.n_end - len(first.ids) - 1, n_ctx - (n_text - start))
        guesses = list(draft(first.ids, n_room))[:n_room] if draft else []  # an array would be added, not appended
        new = [left_padded(seq.ids[start:], n_text - start)[cache.length :] + guesses for seq in seqs]
        logits = model.forward(new, cache, n_last=len(guesses) + 1)
        is_exact = model.passes.are_plain(len(seqs) * len(logits[0]))
        try:
            for row, seq in enumerate(seqs):
                settle = None if is_exact else partial(settled, model, cache, row, start)
                yield from accept(seq, logits[row], guesses, settle)
        finally:  # also where the caller leaves: the newest is not fed yet, wrong guesses are forgotten
            cache.length = n_pad + len(first.ids) - start - 1
        going_on = [row for row, seq in enumerate(seqs) if not seq.has_ended]
        if 0 < len(going_on) < len(seqs):
            cache.take(going_on)
        seqs = [seqs[row] for row in going_on]


def accept(seq, rows, guesses, settle):
    """Choose a token from each of `rows` until it is not what was guessed. Near ties are settled by a row alone."""
    for logits, guess in zip(rows, [*guesses, None], strict=True):
        is_tie = settle is not None and is_near_tie(seq.sample, logits, len(seq.ids))
        seq.choose(settle(seq) if is_tie else logits)
        yield seq
        if is_tie or seq.ids[-1] != guess or seq.has_ended:
            return


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


@flags.with_flags('Continue a text with GPT-2: python gpt2.py "PROMPT" [flags]', flags.GPT2)
def main(options):
    stopwatch = stats.Stopwatch()
    text = modes.checked_text(options)  # all mistakes are found before a model is downloaded
    encoder, model = load_model(options.model_size, options.models_dir, **flags.nanogpt_of(options))
    modes.write(options, text, encoder, model, generate, generate_batch, stopwatch)


if __name__ == "__main__":
    command.run(main)
