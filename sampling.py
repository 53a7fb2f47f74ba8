"""From logits to the next token id.

A sampler is any callable (logits: float32[n_vocab], position: int) -> int; `position` is the index that the token
will have in the text.
"""

from collections.abc import Callable

import numpy as np

Sampler = Callable[[np.ndarray, int], int]


def greedy(logits: np.ndarray, position: int) -> int:
    """The likeliest token; of equals the one with the lowest id."""
    return int(logits.argmax())
