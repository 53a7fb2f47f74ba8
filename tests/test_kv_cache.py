"""Whatever is done to a cache, it gives the logits of a fresh one that was fed each text whole."""

import numpy as np
from helpers import random_model
from hypothesis import given, settings
from hypothesis import strategies as st

MODEL = random_model(n_layer=2, n_ctx=20)
N_CTX, N_VOCAB = 20, 61


class Followed:
    """A cache and, beside it, the texts that it should hold, each with its padding in front."""

    def __init__(self, n_pad, n_first, rng):
        self.rng = rng
        self.cache = MODEL.new_cache(len(n_pad), n_pad=n_pad)
        self.texts = [[] for _ in n_pad]
        self.feed(max(n_pad) + n_first)

    def feed(self, n_new):
        n_new = min(n_new, N_CTX - self.cache.length)
        if n_new:
            tokens = self.rng.integers(N_VOCAB, size=(len(self.texts), n_new))
            self.texts = [text + new.tolist() for text, new in zip(self.texts, tokens, strict=True)]
            n_last = min(n_new, len(self.texts[0]) - int(self.cache.n_pad.max()))
            logits = MODEL.forward(tokens, self.cache, n_last)
            for row, (text, n_pad) in enumerate(zip(self.texts, self.cache.n_pad, strict=True)):
                self.compare(logits[row], text[n_pad:])
        assert self.cache.length == len(self.texts[0])

    def roll_back(self, n):
        length = max(int(self.cache.n_pad.max()), self.cache.length - n)
        self.cache.length = length
        self.texts = [text[:length] for text in self.texts]

    def take(self, *rows):
        rows = [row % len(self.texts) for row in rows]
        n_same = next((i for i, tokens in enumerate(zip(*self.texts, strict=True)) if len(set(tokens)) > 1), 0)
        self.cache.take(rows, 0 if self.cache.n_pad.any() else n_same)
        self.texts = [self.texts[row] for row in rows]

    def look_at_row(self, row):
        """What is fed to a row alone is that row's, and forgotten by the whole."""
        row %= len(self.texts)
        if self.cache.length < N_CTX:
            alone, text = self.cache.row(row), self.texts[row][self.cache.n_pad[row] :]
            assert alone.length == len(text)
            text = [*text, int(self.rng.integers(N_VOCAB))]
            self.compare(MODEL.forward([text[-1:]], alone)[0], text)

    @staticmethod
    def compare(logits, text):
        fresh = MODEL.forward([text], MODEL.new_cache(), n_last=len(logits))[0]
        np.testing.assert_allclose(logits, fresh, rtol=0, atol=1e-4)


FEEDS = st.tuples(st.just("feed"), st.integers(1, 18))  # one row, few, and more than matmul and attention count as few
STEPS = (
    FEEDS
    | st.tuples(st.just("roll_back"), st.integers(0, 20))
    | st.lists(st.integers(0, 5), min_size=1, max_size=4).map(lambda rows: ("take", *rows))
    | st.tuples(st.just("look_at_row"), st.integers(0, 5))
)


def follow(steps, *args):
    followed = Followed(*args)
    for name, *values in [*steps, ("feed", 1)]:
        getattr(followed, name)(*values)


@settings(max_examples=100)
@given(st.lists(FEEDS | st.tuples(st.just("roll_back"), st.integers(0, 20)), max_size=12), st.integers(0, 99))
def test_any_feeds_and_rollbacks_equal_a_fresh_cache(steps, seed):
    follow(steps, [0], 1, np.random.default_rng(seed))


@settings(max_examples=150)
@given(
    st.lists(STEPS, max_size=10),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_any_steps_of_a_padded_batch_equal_fresh_caches(steps, n_pad, n_first, seed):
    follow(steps, n_pad, n_first, np.random.default_rng(seed))
