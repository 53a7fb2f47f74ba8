"""How well a model predicts a text: cross-entropy, perplexity and bits per byte.

A text longer than the context is scored in windows, each token once, as is usual for fixed-length models: the window
moves by `stride` tokens, and what it has seen before only serves as the text before. A stride of the context is the
cheapest and the least favourable; a small one gives nearly every token a whole context.
"""

import json as json_format
import math
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

import cli
from gpt2 import Model, score
from sampling import check, is_whole


def windows(n_ids: int, n_ctx: int, stride: int) -> Iterator[tuple[slice, int]]:
    """Windows of up to n_ctx + 1 ids (the last is only predicted), and how many of their last ids are new in each."""
    n_scored = 1
    for start in range(0, n_ids - 1, stride):
        stop = min(start + n_ctx + 1, n_ids)
        yield slice(start, stop), stop - n_scored
        n_scored = stop
        if stop == n_ids:
            return


def log_probabilities(model: Model, ids: Sequence[int], stride: int) -> np.ndarray:  # -> float32[len(ids) - 1]
    """Of each id after the first. A progress bar goes to stderr. ValueError: a stride outside 1 to the context."""
    n_ctx = model.hparams["n_ctx"]
    check("stride", stride, is_whole(stride) and 1 <= stride <= n_ctx, f"a whole number from 1 to {n_ctx}, the context")
    parts = []
    with tqdm(total=len(ids) - 1, unit=" tokens", disable=None) as bar:  # none where stderr is no terminal
        for window, n_new in windows(len(ids), n_ctx, stride):
            parts.append(score(model, ids[window])[-n_new:])
            bar.update(n_new)
    return np.concatenate(parts)


def write_score(model: Model, encoder, text: str, stride: int, json: bool) -> None:
    """One line on stdout. ValueError: a text of less than two tokens."""
    ids = encoder.encode(text, allow_special=True)
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens, expected 2 or more: the first is not scored")
    scores = log_probabilities(model, ids, stride)
    n_bytes = sum(len(encoder.token_bytes(i)) for i in ids[1:])
    nats = -float(scores.mean(dtype=np.float64))
    values = {
        "tokens": len(scores),
        "bytes": n_bytes,
        "cross_entropy": round(nats, 4),
        "perplexity": round(math.exp(nats), 2) if nats < 700 else math.inf,
        "bits_per_byte": round(nats * len(scores) / math.log(2) / n_bytes, 4),
    }
    line = "{cross_entropy} nats a token, perplexity {perplexity}, {bits_per_byte} bits a byte ({tokens} tokens)"
    cli.write_text([(json_format.dumps(values) if json else line.format(**values)) + "\n"])
