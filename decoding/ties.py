"""Near ties: where rounding could choose another token, logits are computed again, as a text alone would have them.

Rows computed together round differently from a row computed alone, by up to 3e-6 of the largest logit (tiny 1e-6,
nano 3e-6, 124M's shapes 2e-6; 1e-4 with logits of 30 to 100). So do keys and values, by up to 6e-7 of the largest,
which decided where two logits agreed to the last bit: 2 of 122,000 tokens of nano.
"""

import numpy as np

from decoding.sampling import Sampler, scores_of

NEAR_TIE = 2e-5  # of the largest logit; scores closer than this are computed again, by a pass over the newest token
NEAREST = 0.1  # of that; so much closer still, and all that were generated are fed again, one after another


def margin(sample: Sampler, logits: np.ndarray, position: int) -> float:
    """By how much the token that `sample` chooses is ahead of the next one, in units of the logits."""
    scores = scores_of(sample, logits, position)
    best = int(scores.argmax())
    rest = max(scores[:best].max(initial=-np.inf), scores[best + 1 :].max(initial=-np.inf))
    return float(scores[best] - rest)


def is_near_tie(sample: Sampler, logits: np.ndarray, position: int, part: float = 1.0) -> bool:
    """Whether rounding could make `sample` choose another token."""
    return margin(sample, logits, position) < part * NEAR_TIE * float(max(logits.max(), -logits.min()))


def newest_alone(model, cache, ids, start):  # -> [n_vocab]
    """Logits after ids[start:], of which `cache` has keys and values: those of the newest are computed again."""
    cache.length = len(ids) - 1 - start
    return model.forward([ids[-1:]], cache, plainly=True)[0, 0]


def settled(model, cache, row, start, seq):  # -> [n_vocab]
    """The logits of the newest token of `seq`, a row of `cache`, which holds it from ids[start] on."""
    logits = newest_alone(model, cache.row(row), seq.ids, start)
    if not is_near_tie(seq.sample, logits, len(seq.ids), NEAREST):
        return logits
    cache = model.new_cache(n_seq=len(seq.ids) - start)
    model.forward([seq.ids[start : seq.n_first]], cache)
    for i in seq.ids[seq.n_first :]:
        model.forward([[i]], cache, plainly=True)
    return newest_alone(model, cache, seq.ids, start)
