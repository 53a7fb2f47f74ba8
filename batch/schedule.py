"""Continuous batching: a text that ends gives its row to the next prompt at once, and all rows take each step together.

The loop is that of gpt2.py, and so is each text: noise is a function of seed and position, near ties are settled by a
row alone (decoding/sampling.py), and a row never sees another.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from batch.requests import Request, checked
from batch.rows import Rows
from console.flags import sampler_of
from decoding.draft_length import common_length
from decoding.requests import check_ids, check_request
from decoding.sampling import Sampler, for_text, log_softmax, scores_of
from decoding.scoring import N_ROWS
from decoding.stopping import has_ended, text_until_end
from fast.memory import available_bytes
from gpt2 import Model, Seq

MAX_ROWS = 128  # 64 write 5 % fewer tokens a second (124M); keys and values take twice the memory
N_AHEAD = 4  # times as many prompts as rows are looked at together for what they have in common


class Choice(NamedTuple):
    """A text: up to its end, with the prompt before it if that was asked for. `n_tokens` counts the end's too."""

    text: str
    finish_reason: str  # "length" or "stop"
    n_tokens: int
    logprobs: dict | None = None


class Result(NamedTuple):
    """What came of a request: a choice for each sample of each prompt, or an error."""

    request: Request
    choices: list[Choice]
    n_prompt: int = 0  # tokens
    error: str = ""
    code: str = "invalid_request"


# ----------------------------------------------------------------------------------------------------------------------
# Log-probabilities
# ----------------------------------------------------------------------------------------------------------------------


class Noted:
    """A sampler that computes its scores once for a row of logits, and notes log-probabilities if `n_top` is given.

    `notes`: of each token its log-probability and the `n_top` likeliest ids with theirs, before the temperature.
    """

    def __init__(self, sample: Sampler, n_top: int | None):
        self.sample, self.n_top, self.notes = sample, n_top, []
        self.logits = self.kept = None

    def for_text(self, tokens: list[int]) -> Sampler:
        self.sample = for_text(self.sample, tokens)
        return self

    def scores(self, logits: np.ndarray, position: int) -> np.ndarray:
        self.logits, self.kept = logits, scores_of(self.sample, logits, position)
        return self.kept

    def __call__(self, logits: np.ndarray, position: int) -> int:
        is_kept = self.logits is logits and not hasattr(self.sample, "for_text")
        i = int(self.kept.argmax()) if is_kept else self.sample(logits, position)
        self.logits = self.kept = None
        if self.n_top is not None:
            self.notes.append(note_of(logits, i, self.n_top))
        return i


def note_of(logits: np.ndarray, i: int, n_top: int) -> tuple[float, list[tuple[int, float]]]:
    scores = log_softmax(logits.astype(np.float64))
    best = np.argsort(-logits, kind="stable")[:n_top]
    return float(scores[i]), [(int(j), float(scores[j])) for j in best]


def notes_of_prompt(model: Model, ids: list[int], n_top: int) -> list:
    """The same of each id after the first."""
    cache, notes = model.new_cache(n_seq=len(ids)), []
    for start in range(0, len(ids) - 1, N_ROWS):
        fed = ids[start : min(start + N_ROWS, len(ids) - 1)]
        logits = model.forward([fed], cache, n_last=len(fed))[0]
        notes += [note_of(row, i, n_top) for row, i in zip(logits, ids[start + 1 :], strict=False)]
    return notes


def shown(encoder, i: int) -> str:
    """A token as OpenAI shows it: bytes that are no text by their numbers."""
    token = encoder.token_bytes(i)
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def logprobs_of(encoder, ids: list[int], notes: list, n_chars: int) -> dict:
    """OpenAI's form, of the tokens that begin before the end of the text. A prompt's first has no note."""
    offsets, n = [], 0
    for text in islice(encoder.decode_stream(ids), len(ids)):
        offsets.append(n)
        n += len(text)
    n_kept = sum(offset < n_chars for offset in offsets)
    notes = [None] * (len(ids) - len(notes)) + notes
    rounded = [note and (round(note[0], 4), {shown(encoder, j): round(p, 4) for j, p in note[1]}) for note in notes]
    return {
        "tokens": [shown(encoder, i) for i in ids[:n_kept]],
        "token_logprobs": [note and note[0] for note in rounded[:n_kept]],
        "top_logprobs": [note and note[1] for note in rounded[:n_kept]],
        "text_offset": offsets[:n_kept],
    }


# ----------------------------------------------------------------------------------------------------------------------
# From requests to texts and back
# ----------------------------------------------------------------------------------------------------------------------


class Job:
    """A request that is being done: the texts that it asks for, each with its sequence and its sampler."""

    def __init__(self, model: Model, encoder, request: Request):
        if request.error:
            raise ValueError(request.error)
        self.request, self.encoder = request, encoder
        n_ctx, n_vocab = model.hparams["n_ctx"], model.hparams["n_vocab"]
        self.prompts = [encoder.encode_prompt(p) if isinstance(p, str) else p for p in request.prompts]
        for ids in self.prompts:
            check_ids(ids, n_vocab)
            check_request(ids, max(1, request.n_tokens_to_generate), n_ctx)
        prompts = [ids for ids in self.prompts for _ in range(request.n_samples)]
        self.seqs = [self.seq(ids, n) for n, ids in enumerate(prompts)]
        self.n_left = len(self.seqs) if request.n_tokens_to_generate else 0
        self.notes = [[] for _ in self.prompts]
        if request.echo and request.logprobs is not None:
            self.notes = [notes_of_prompt(model, ids, request.logprobs) for ids in self.prompts]

    def seq(self, ids: list[int], n: int) -> Seq:
        request = self.request
        sample = sampler_of(request, (request.seed + n) % 2**64)
        if request.temperature or request.logprobs is not None:
            sample = Noted(sample, request.logprobs)
        is_end = partial(has_ended, self.encoder, stops=request.stop, ignore_eot=request.ignore_eot)
        seq = Seq(ids, request.n_tokens_to_generate, sample, is_end)
        seq.job = self
        return seq

    def choice(self, seq: Seq, notes: list) -> Choice:
        request, new = self.request, seq.ids[seq.n_prompt :]
        text = "".join(text_until_end(self.encoder, new, request.stop, request.ignore_eot))
        is_stop = bool(new) and has_ended(self.encoder, new, request.stop, request.ignore_eot)
        before = seq.ids[: seq.n_prompt] if request.echo else []
        whole = self.encoder.decode(before) + text
        logprobs = None
        if request.logprobs is not None:
            noted = (notes if request.echo else []) + (seq.sample.notes if new else [])
            logprobs = logprobs_of(self.encoder, before + new, noted, len(whole))
        return Choice(whole, "stop" if is_stop else "length", len(new), logprobs)

    def result(self) -> Result:
        n_samples = self.request.n_samples
        choices = [self.choice(seq, self.notes[n // n_samples]) for n, seq in enumerate(self.seqs)]
        self.seqs.clear()  # each refers to this
        return Result(self.request, choices, sum(map(len, self.prompts)))


# ----------------------------------------------------------------------------------------------------------------------
# The schedule
# ----------------------------------------------------------------------------------------------------------------------


class Waiting:
    """Texts that have no row yet, with what prompts near each begin with alike.

    They are in the order of their requests; the last ones, of which no more come, have the longest first, so that no
    long text is left to run almost alone.
    """

    def __init__(self, model: Model, encoder, requests: Iterable[Request], n_ahead: int):
        self.model, self.encoder, self.requests, self.n_ahead = model, encoder, iter(requests), n_ahead
        self.seqs: deque[Seq] = deque()
        self.n_common: dict[int, int] = {}  # by id()

    def fill(self) -> Iterator[Result]:
        """Read on where few are left. The results of requests for which there is nothing to generate."""
        if len(self.seqs) > self.n_ahead // 2:
            return
        new: list[Seq] = []
        while len(self.seqs) + len(new) < self.n_ahead and (request := next(self.requests, None)):
            try:
                job = Job(self.model, self.encoder, request if request.line else checked(request))
            except ValueError as e:
                where = f"line {request.line}: " if request.line else ""
                yield Result(request, [], error=f"{where}{e}")
                continue
            if job.n_left:
                new += job.seqs
            else:
                yield job.result()
        self.n_common |= common_with_neighbours(new)
        self.seqs += new
        if len(self.seqs) < self.n_ahead:  # there are no more requests
            self.seqs = deque(sorted(self.seqs, key=lambda seq: seq.n_prompt - seq.n_end))

    def take(self, n: int) -> tuple[list[Seq], list[int]]:
        seqs = [self.seqs.popleft() for _ in range(n)]
        return seqs, [self.n_common.pop(id(seq)) for seq in seqs]


def common_with_neighbours(seqs: list[Seq]) -> dict[int, int]:
    """By id(): how many tokens of a prompt, less its last, another begins with too. In order, that is a neighbour."""
    n_common = {id(seq): 0 for seq in seqs}
    for one, other in pairwise(sorted(seqs, key=lambda seq: seq.ids)):
        n = common_length(one.ids, other.ids)
        for seq in (one, other):
            n_common[id(seq)] = max(n_common[id(seq)], min(n, seq.n_prompt - 1))
    return n_common


def complete_many(
    model: Model,
    encoder,
    requests: Iterable[Request],
    max_bytes: float | None = None,
    max_rows: int = MAX_ROWS,
) -> Iterator[Result]:
    """The result of each request as soon as all of its texts have ended; `requests` are read as they are needed.

    Each text is that of gpt2.generate for its prompt and seed. `max_bytes`: of keys and values, half of what is
    available unless given. What is wrong with a request is the error of its result.
    """
    max_bytes = available_bytes() / 2 if max_bytes is None else max_bytes
    rows, waiting = Rows(model, max_bytes, max_rows), Waiting(model, encoder, requests, N_AHEAD * max_rows)
    while True:
        yield from waiting.fill()
        if n := rows.n_joining(waiting.seqs):
            rows.join(*waiting.take(n))
        if not rows.seqs:
            return
        for seq in rows.step():
            seq.job.n_left -= 1
            if not seq.job.n_left:
                yield seq.job.result()
