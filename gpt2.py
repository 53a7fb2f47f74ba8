"""GPT-2 in NumPy: the whole forward pass, its KV cache, the one loop that generates, and the command line.

    python gpt2.py "Alan Turing theorized that computers would one day become" --n_tokens_to_generate 40

Follows Radford et al. 2019 and openai/gpt-2's src/model.py, in the manner of picoGPT. Left out: training, dropout.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise, takewhile
from queue import SimpleQueue

import numpy as np

import cli
from matmul import MAX_FEW_ROWS, is_large, matmul, matmul_heads, products_for
from sampling import NEAR_TIE, Sampler, for_text, greedy, is_whole, margin
from threads import blas_controller, blas_on_one_thread, team
from utils import load_encoder_hparams_and_params

Drafter = Callable[[list[int], int], list[int]]  # (tokens, n_max) -> at most n_max guesses of what follows
MASKED = -1e10  # added to the score of a key that may not be seen; -inf would give NaN where every key is masked
N_QUERIES = 128  # attended at once, so that no array of scores is [n_head, n_ctx, n_ctx]
MIN_PART = 256  # rows for each thread to carry; with fewer, BLAS's threads are as fast
N_GELU = 1 << 14  # numbers at once, so that the passes over them stay within the cache

# ----------------------------------------------------------------------------------------------------------------------
# The layers
# ----------------------------------------------------------------------------------------------------------------------


def gelu(x):  # [..., n] -> [..., n], in place
    # The tanh form of Hendrycks & Gimpel 2016: 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    scale = math.sqrt(2 / math.pi)
    flat = x.reshape(-1)
    for start in range(0, flat.size, N_GELU):
        part = flat[start : start + N_GELU]
        t = part * part
        t *= scale * 0.044715
        t += scale
        t *= part
        np.tanh(t, out=t)
        t += 1
        part *= 0.5
        part *= t
    return x


def layer_norm(x, g, b, eps=1e-5):  # [..., n_embd] -> [..., n_embd]
    x = x - np.add.reduce(x, axis=-1, keepdims=True) / x.shape[-1]
    variance = np.vecdot(x, x)[..., None] / x.shape[-1]
    x /= np.sqrt(variance + eps)
    x *= g
    x += b
    return x


def linear(x, w, b):  # [..., n_in] -> [..., n_out]
    y = matmul(x, w)
    y += b
    return y


@cache
def causal_mask(n):  # -> [n, n]
    return np.triu(np.full((n, n), MASKED, np.float32), 1)


def attend(q, k, v):  # [..., n_rows, d_head], [..., n_seq, d_head] twice -> [..., n_rows, d_head]
    """Scaled dot-product attention of the last n_rows positions, each seeing itself and what is before it."""
    n_rows = q.shape[-2]
    if n_rows <= MAX_FEW_ROWS:
        return attend_block(q, k, v)
    n_past = k.shape[-2] - n_rows
    out = np.empty_like(q)
    for head in np.ndindex(q.shape[:-2]):  # one head and N_QUERIES at a time: their scores stay within the cache
        for start in range(0, n_rows, N_QUERIES):
            rows = slice(start, min(start + N_QUERIES, n_rows))
            seen = slice(0, n_past + rows.stop)
            out[head][rows] = attend_block(q[head][rows], k[head][seen], v[head][seen])
    return out


def attend_block(q, k, v):  # as attend
    n_rows, d_head = q.shape[-2:]
    scores = matmul_heads(q * d_head**-0.5, k.swapaxes(-1, -2))
    if n_rows > 1:
        scores[..., -n_rows:] += causal_mask(n_rows)
    # softmax(scores) @ v, the division by the sum last, where there is less to divide
    scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    out = matmul_heads(scores, v)
    out /= np.vecdot(scores, np.ones(scores.shape[-1], np.float32))[..., None]
    return out


def attention(x, remember, n_head, n_rows, c_attn, c_proj):  # [n_batch, n_new, n_embd] -> [n_batch, n_rows, n_embd]
    n_batch, n_new, n_embd = x.shape
    qkv = linear(x, **c_attn).reshape(n_batch, n_new, 3, n_head, n_embd // n_head)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each [n_batch, n_head, n_new, d_head]
    heads = attend(q[:, :, n_new - n_rows :], *remember(k, v))
    return linear(heads.swapaxes(1, 2).reshape(n_batch, n_rows, n_embd), **c_proj)


def feed_forward(x, c_fc, c_proj):  # [..., n_embd] -> [..., n_embd]
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def transformer_block(x, remember, n_head, n_rows, attn, ln_1, ln_2, mlp):
    # [n_batch, n_new, n_embd] -> [n_batch, n_rows, n_embd]: keys and values of all, the rest of the last rows only
    x = x[:, x.shape[1] - n_rows :] + attention(layer_norm(x, **ln_1), remember, n_head, n_rows, **attn)
    x += feed_forward(layer_norm(x, **ln_2), **mlp)
    return x


def gpt2(tokens, cache, n_last, n_head, n_scored, wte, wpe, blocks, ln_f):
    # int[n_batch, n_new] -> [n_batch, n_last, n_scored]
    n_new = tokens.shape[1]
    x = wte[tokens] + wpe[cache.length : cache.length + n_new]
    for i, params in enumerate(blocks):
        n_rows = n_last if i == len(blocks) - 1 else n_new  # later blocks need every row, the output only the last
        x = transformer_block(x, partial(cache.append, i), n_head, n_rows, **params)
    return matmul(layer_norm(x, **ln_f), wte[:n_scored].T)


# ----------------------------------------------------------------------------------------------------------------------
# State
# ----------------------------------------------------------------------------------------------------------------------


class KVCache:
    """The keys and values of the tokens fed so far: float32[n_layer, n_batch, n_head, n_ctx, d_head], `length` used.

    A fresh one is "no cache". Setting `length` back forgets the tokens after it.
    """

    def __init__(self, hparams: dict, n_batch: int = 1):
        n_head, d_head = hparams["n_head"], hparams["n_embd"] // hparams["n_head"]
        shape = (hparams["n_layer"], n_batch, n_head, hparams["n_ctx"], d_head)
        self.keys = np.empty(shape, np.float32)
        self.values = np.empty(shape, np.float32)
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @length.setter
    def length(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"length {length} is not in 0 to {self._length}, what the cache holds: it only rolls back")
        self._length = length

    def append(self, layer, k, v):  # 2 of [n_batch, n_head, n_new, d_head] -> 2 of [n_batch, n_head, n_seq, d_head]
        """Store a layer's keys and values of the new tokens, return all it has; `advance` counts them, once."""
        stop = self._length + k.shape[2]
        self.keys[layer, :, :, self._length : stop] = k
        self.values[layer, :, :, self._length : stop] = v
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, n_new: int) -> None:
        self._length += n_new

    def take(self, rows: Sequence[int], n_same: int = 0) -> None:
        """Go on with these batch rows: as many as are named, each as often as it is named. IndexError: no such row.

        `n_same`: the rows hold the same up to this position, which need not be copied while their number stays.
        """
        rows, moved = np.asarray(rows), np.arange(len(rows))
        old = [*self.keys, *self.values]
        n_layer, n_batch, *shape = self.keys.shape
        if len(rows) == n_batch:
            moved = moved[rows != moved]
        else:
            self.keys, self.values = (np.empty((n_layer, len(rows), *shape), np.float32) for _ in range(2))
            n_same = 0
        used = slice(n_same, self._length)
        for new, source in zip([*self.keys, *self.values], old, strict=True):  # by layers: indexing makes a copy
            new[moved, :, used] = source[rows[moved], :, used]


class Part(KVCache):
    """A cache as it is for some of the new tokens, which pass through the layers beside those of `before`."""

    def __init__(self, cache: KVCache, start: int, before: "Part | None"):
        self.keys, self.values, self._length = cache.keys, cache.values, start
        self.before = before
        self.stored: SimpleQueue[bool] = SimpleQueue()  # True for each layer; then False

    def append(self, layer, k, v):
        """As KVCache.append, once the parts before have stored this layer too."""
        seen = super().append(layer, k, v)
        if self.before and not self.before.stored.get():
            raise RuntimeError("the part before this one failed")
        self.stored.put(True)
        return seen


def equal_work(n_new, n_past, n_embd, n_parts):  # -> n_parts slices of range(n_new)
    """The row at position p costs 24 n_embd^2 additions and products, and attention the time of 8 n_embd p."""
    work = np.cumsum(3 * n_embd + n_past + np.arange(n_new))
    edges = np.searchsorted(work, work[-1] * np.arange(1, n_parts) / n_parts)
    return [slice(int(start), int(stop)) for start, stop in pairwise([0, *edges, n_new])]


def gpt2_in_parts(tokens, cache, n_last, shares, **params):  # int[n_batch, n_new] -> [n_batch, n_last, n_scored]
    """gpt2 with the rows of each share on a thread of its own.

    A token sees only those before it, so all a part needs of the others are the keys and values of those before. BLAS
    has one thread meanwhile: its own threads share the products only. 1000 tokens of 124M take 480 ms instead of 680.
    """
    parts: list[Part] = []
    for share in shares:
        parts.append(Part(cache, cache.length + share.start, parts[-1] if parts else None))
    logits = [None] * len(parts)

    def work(number, share):
        n_rows = max(0, min(share.stop - share.start, n_last - (tokens.shape[1] - share.stop)))
        try:
            logits[number] = gpt2(tokens[:, share], parts[number], n_rows, **params)
        finally:
            parts[number].stored.put(False)

    team.run(work, shares, blas_on_one_thread)
    return np.concatenate(logits, axis=1)


class Model:
    """The weights and what they are: hparams (n_vocab, n_ctx, n_embd, n_head, n_layer) and nested params.

    `n_scored`: give logits of the first so many ids only. GPT-2's ids are in the order of merging, so frequent
    tokens come first, and a draft may leave out the rest. `is_draft`: its steps alternate with another model's.
    """

    def __init__(self, hparams: dict, params: dict, n_scored: int | None = None, is_draft: bool = False):
        self.hparams = hparams
        self.params = params
        self.n_scored = n_scored
        self.is_draft = is_draft
        attn, mlp = params["blocks"][0]["attn"], params["blocks"][0]["mlp"]
        wte = params["wte"][: 1 << 14]  # a part of the vocabulary tells as much as all of it
        self.sample = [attn["c_attn"]["w"], attn["c_proj"]["w"], mlp["c_fc"]["w"], mlp["c_proj"]["w"], wte.T]

    def new_cache(self, n_batch: int = 1) -> KVCache:
        return KVCache(self.hparams, n_batch)

    def forward(self, tokens, cache: KVCache, n_last: int = 1) -> np.ndarray:
        """Feed `tokens`, int[n_batch, n_new], after those in `cache`; return float32[n_batch, n_last, n_vocab].

        Row i of the result scores the token after the (n_new - n_last + i)-th new one. The cache then holds the new
        tokens too. ValueError: no token, an id outside the vocabulary, more tokens than the context has room for, or
        more rows than tokens.
        """
        tokens = np.asarray(tokens)
        n_vocab, n_ctx = self.hparams["n_vocab"], self.hparams["n_ctx"]
        n_batch, n_new = tokens.shape if tokens.ndim == 2 else (0, 0)
        if n_batch != cache.keys.shape[1] or not 1 <= n_last <= n_new or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"tokens are {tokens.dtype}{list(tokens.shape)} and n_last {n_last}; expected integers of shape "
                f"[{cache.keys.shape[1]}, n_new] and n_last from 1 to n_new"
            )
        if tokens.min() < 0 or tokens.max() >= n_vocab:
            bad = next(int(i) for i in tokens.flat if not 0 <= i < n_vocab)
            raise ValueError(f"token id {bad} is outside the vocabulary, 0 to {n_vocab - 1}")
        if cache.length + n_new > n_ctx:
            raise ValueError(f"{cache.length} tokens and {n_new} more exceed the context of {n_ctx}; feed fewer")
        params = {"n_head": self.hparams["n_head"], "n_scored": self.n_scored} | self.params
        if n_new >= MIN_PART * team.n_threads > MIN_PART and is_large(self.sample) and blas_controller():
            shares = equal_work(n_new, cache.length, self.hparams["n_embd"], team.n_threads)
            logits = gpt2_in_parts(tokens, cache, n_last, shares, **params)
        else:
            with products_for(n_batch * n_new, self.sample, self.is_draft):
                logits = gpt2(tokens, cache, n_last, **params)
        cache.advance(n_new)
        return logits


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


def check_n_tokens(n_tokens: int) -> None:
    if not is_whole(n_tokens) or n_tokens < 1:
        raise ValueError(f"{n_tokens!r} tokens to generate, expected a whole number of 1 or more")


def check_request(model: Model, prompt_ids: Sequence[int], n_tokens: int) -> None:
    """ValueError unless `n_tokens` can be generated after `prompt_ids`. The last token is never fed."""
    check_n_tokens(n_tokens)
    n_ctx = model.hparams["n_ctx"]
    if not len(prompt_ids):
        raise ValueError("the prompt has no tokens, expected 1 or more; start from the id of <|endoftext|>")
    if len(prompt_ids) + n_tokens > n_ctx + 1:
        raise ValueError(
            f"{len(prompt_ids)} prompt tokens and {n_tokens} new ones exceed the context of {n_ctx}: "
            f"at most {max(0, n_ctx + 1 - len(prompt_ids))} new ones fit; shorten the prompt or ask for fewer"
        )


def generate(
    model: Model,
    prompt_ids: Sequence[int],
    n_tokens: int,
    sample: Sampler = greedy,
    draft: Drafter | None = None,
) -> Iterator[int]:
    """Yield `n_tokens` ids that follow `prompt_ids`, each chosen by `sample` from the model's logits.

    `draft` guesses tokens ahead, which are checked in one pass: the text is the same, only the time differs.
    ValueError, before any work: no prompt, n_tokens below 1, or more than the context has room for.
    """
    check_request(model, prompt_ids, n_tokens)
    return decode(model, list(prompt_ids), n_tokens, sample, draft or (lambda tokens, n_max: []))


def decode(model, tokens, n_tokens, sample, draft):
    cache = model.new_cache()
    sample = for_text(sample, tokens)
    n_end = len(tokens) + n_tokens
    while len(tokens) < n_end:
        guesses = draft(tokens, n_end - len(tokens) - 1)
        logits = model.forward([tokens[cache.length :] + guesses], cache, n_last=len(guesses) + 1)
        for row, guess in zip(logits[0], [*guesses, None], strict=True):
            if guesses and margin(sample, row, len(tokens)) < NEAR_TIE:
                cache.length = len(tokens) - 1
                row, guess = model.forward([tokens[-1:]], cache)[0, 0], None  # alone, and the round ends
            tokens.append(sample(row, len(tokens)))
            yield tokens[-1]
            if tokens[-1] != guess:
                break
        cache.length = len(tokens) - 1  # the newest token has not been fed, rejected guesses are forgotten


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


def read_prompt(prompt: str | None) -> str:
    """The prompt as typed, or from stdin, less the line end that `echo` adds. ValueError: there is none."""
    if prompt not in (None, "-"):
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise ValueError('no prompt: give it as the first argument, as in gpt2.py "Hello", or pipe it in')
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    return text.removesuffix("\n").removesuffix("\r")


def n_bytes(params) -> int:
    """Bytes of the weights that are read for every token: all of them, but one row of wpe."""
    if isinstance(params, np.ndarray):
        return params.nbytes
    if isinstance(params, list):
        return sum(map(n_bytes, params))
    return sum(n_bytes(value) for name, value in params.items() if name != "wpe")


def peak_memory_gb() -> float | None:
    """The most memory this process has held, mapped files included."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 / 1e9 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


class Stopwatch:
    """The times at which tokens came, for --stats."""

    def __init__(self):
        self.started = self.loaded = time.perf_counter()
        self.ticks: list[float] = []

    def watch(self, ids: Iterator[int]) -> Iterator[int]:
        self.loaded = time.perf_counter()
        for i in ids:
            self.ticks.append(time.perf_counter())
            yield i

    def report(self, model: Model, n_prompt: int) -> str:
        first, last = self.ticks[0], self.ticks[-1]
        prefill = first - self.loaded
        lines = [
            f"load     {self.loaded - self.started:8.3f} s",
            f"prefill  {prefill:8.3f} s  {n_prompt / prefill:8.1f} tokens/s, {n_prompt} of them",
        ]
        if n_steps := len(self.ticks) - 1:
            rate = n_steps / (last - first)
            read = f"{rate * n_bytes(model.params) / 1e9:.1f} GB/s of weights read"
            lines.append(f"decode   {last - first:8.3f} s  {rate:8.1f} tokens/s, {n_steps} of them, {read}")
        if peak := peak_memory_gb():
            lines.append(f"memory   {peak:8.3f} GB at the peak")
        return "\n".join(lines)


def main(
    prompt: str | None = None,
    *,
    n_tokens_to_generate=40,
    model_size: str = "124M",
    models_dir: str = "models",
    stats=False,
):
    """Continue a text with GPT-2: python gpt2.py "PROMPT" [flags]

    PROMPT                     the text to continue; "-", or none and a pipe: it is read from stdin;
                               "" begins a text of its own, and <|endoftext|> in it ends one
    --n_tokens_to_generate 40  how many tokens to add; fewer if the text ends
    --model_size 124M          124M, 355M, 774M or 1558M, downloaded when first used, or a folder of models_dir
    --models_dir models        where the models are
    --stats                    print times, speed and memory to stderr
    """
    stopwatch = Stopwatch()
    check_n_tokens(n_tokens_to_generate)  # before a model is downloaded
    prompt = read_prompt(prompt)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    model = Model(hparams, params)
    prompt_ids = encoder.encode_prompt(prompt)
    ids = stopwatch.watch(generate(model, prompt_ids, n_tokens_to_generate))
    cli.write_text(encoder.decode_stream(takewhile(lambda i: i != encoder.eot_id, ids)))
    if stats:
        print(stopwatch.report(model, len(prompt_ids)), file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
