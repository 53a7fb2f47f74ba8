"""What every form of a model is written from: its arrays by name, in pieces, and its vocabulary as text."""

import json
from collections.abc import Iterator

import numpy as np

PIECE_SIZE = 1 << 22  # bytes of an array in memory at once

# ----------------------------------------------------------------------------------------------------------------------
# Arrays
# ----------------------------------------------------------------------------------------------------------------------


def variables_of(params, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) of each weight, named as nest_params found it: wte, h0/attn/c_attn/w ...; and lm_head."""
    if isinstance(params, np.ndarray):
        yield name, params
        return
    for key, value in params.items():
        if key == "blocks":
            for i, block in enumerate(value):
                yield from variables_of(block, f"h{i}")
        else:
            yield from variables_of(value, f"{name}/{key}" if name else key)


def pieces_of(array: np.ndarray) -> Iterator[bytes]:
    """The numbers of an array, row by row and little-endian, whatever their order in memory, a few megabytes at a time.

    So a mapped file is never in memory as a whole, nor is the transposed copy of a view.
    """
    rows = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array
    n_rows = max(1, PIECE_SIZE // rows[:1].nbytes)
    for start in range(0, len(rows), n_rows):
        yield rows[start : start + n_rows].astype("<f4", copy=False).tobytes()


# ----------------------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------------------


def as_json(values: dict) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def check_vocabulary(encoder) -> None:
    """ValueError: it is no byte-level BPE, which all forms need."""
    if encoder.added.keys() >= encoder.token_ids.keys():  # no pieces of words, only tokens as they are
        raise ValueError(
            f"a vocabulary of {encoder.n_vocab} characters cannot be written: OpenAI's and Hugging Face's forms need "
            "GPT-2's byte-level BPE; use the model as it is"
        )


def token_ids_of(encoder) -> dict[str, int]:
    """The vocabulary in the order of its ids, with the tokens that were added to it."""
    return {encoder.tokens[i]: i for i in sorted(encoder.tokens)}


def token_ids_text(encoder) -> bytes:
    """OpenAI's encoder.json, which is Hugging Face's vocab.json."""
    return json.dumps(token_ids_of(encoder)).encode()


def merges_of(encoder) -> list[str]:
    return [f"{left} {right}" for left, right in sorted(encoder.merge_ranks, key=encoder.merge_ranks.get)]


def merges_text(encoder) -> bytes:
    """OpenAI's vocab.bpe, which is Hugging Face's merges.txt."""
    return "\n".join(["#version: 0.2", *merges_of(encoder), ""]).encode()
