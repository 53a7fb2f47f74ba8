"""Speculative decoding: a cheap drafter guesses tokens, the target checks them all in one pass.

    python speculative.py "Alan Turing theorized that computers would one day become" \\
        --draft_model_size 124M --target_model_size 1558M --n_tokens_to_generate 40

A pass over several tokens reads the target's weights once, as a pass over one does, so every guess that turns out
right is nearly free (Leviathan et al. 2023; Chen et al. 2023). The text is the target's own, whatever is guessed: each
token is chosen from the target's logits by the one loop of gpt2.py, and a guess only saves the pass that it would have
taken. Sampled text is the same too, because noise belongs to positions (decoding/sampling.py).

A drafter is any callable (tokens, n_max) -> at most n_max guesses of what follows. Left out: trees of guesses.
"""

if __name__ == "__main__":
    from console.start import start

    start()  # before the other imports, which take most of a short run

from functools import partial

import numpy as np

from console import command
from console.flags import SPECULATIVE, check_speculative, nanogpt_of, sampler_of, with_flags
from console.rounds import Recorder, compare_with_plain, write_rounds
from console.streams import read_prompt
from decoding.draft_length import Adaptive, common_length
from decoding.prefill import begun
from decoding.sampling import Sampler, check, for_text, greedy, is_whole
from decoding.stopping import slide_of, text_until_end
from gpt2 import Drafter, Model, generate, load_model

# ----------------------------------------------------------------------------------------------------------------------
# Drafters
# ----------------------------------------------------------------------------------------------------------------------


def check_n_draft(n_draft: int) -> None:
    check("n_draft", n_draft, is_whole(n_draft) and n_draft >= 0, "a whole number of 0 or more")


class DraftModel:
    """Guesses what a smaller model says, with a cache of its own that follows the text.

    `n_draft`: guesses a round, at most. `sample`: the target's sampler, so that both see the same noise.
    `min_confidence`: guessing stops after a token to which the draft itself gives a lower probability.
    """

    def __init__(self, model: Model, n_draft: int, sample: Sampler = greedy, min_confidence: float = 0.0):
        check_n_draft(n_draft)
        self.model = model
        self.n_draft = n_draft
        self.sample = sample
        self.min_confidence = min_confidence
        self.cache = self.model.new_cache(n_seq=0)
        self.start = 0  # the first token that the cache holds: it keeps the newest when its context is full
        self.fed: list[int] = []  # the text from there to the newest token that it holds

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        n_ctx = self.model.hparams["n_ctx"]
        n_guesses = min(n_max, self.n_draft, n_ctx // 2)
        if n_guesses < 1:
            return []
        n_same = common_length(self.fed, tokens[self.start : -1])
        # The newest token is fed now; each guess but the last is fed to make the next.
        if (self.start and not n_same) or len(tokens) - self.start + n_guesses - 1 > n_ctx:
            self.start, n_same = max(0, len(tokens) - n_ctx // 2), 0
        self.cache.length = n_same
        if (n_seq := len(tokens) - self.start + n_guesses - 1) > self.cache.n_ctx:
            # Not room for all of the context: so much text would seem to follow, and to pay for packing.
            self.cache = begun(self.model.new_cache(n_seq=2 * n_seq), n_same, self.cache.kv)
        self.fed = tokens[self.start :]
        # Its own guesses are text to the draft, as they will be to the target. Few samplers read it: a copy takes time.
        text = list(tokens) if hasattr(self.sample, "for_text") else []
        sample = for_text(self.sample, text)
        new, guesses = self.fed[n_same:], []
        while True:
            logits = self.model.forward([new], self.cache)[0, 0]
            guesses.append(sample(logits, len(tokens) + len(guesses)))
            if len(guesses) == n_guesses or (self.min_confidence and self.is_unsure(logits, guesses[-1])):
                return guesses
            new = guesses[-1:]
            self.fed += new
            text += new

    def is_unsure(self, logits: np.ndarray, guess: int) -> bool:
        return float(np.exp(logits - logits[guess]).sum()) * self.min_confidence > 1


N_COMPARED = 256  # tokens; comparing all of a long text would take longer with every token


class PromptLookup:
    """Guesses that the text goes on as it did after the last occurrence of its newest n-gram; costs next to nothing.

    After Saxena 2023 (prompt lookup decoding). `n_gram`: the longest to look for; shorter ones down to 2 follow.
    """

    def __init__(self, n_draft: int, n_gram: int = 3):
        check_n_draft(n_draft)
        check("n_gram", n_gram, is_whole(n_gram) and n_gram >= 1, "a whole number of 1 or more")
        self.n_draft = n_draft
        self.sizes = range(n_gram, min(n_gram, 2) - 1, -1)
        self.n_seen, self.newest = 0, []  # how long the text was, and its end, by which another text is noticed
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> where its last occurrence but the newest ended

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        if self.newest != tokens[max(0, self.n_seen - N_COMPARED) : self.n_seen]:
            self.n_seen, self.ends = 0, {}
        for end in range(max(1, self.n_seen), len(tokens)):
            for size in self.sizes:
                if size <= end:
                    self.ends[tuple(tokens[end - size : end])] = end
        self.n_seen, self.newest = len(tokens), tokens[-N_COMPARED:]
        for size in self.sizes:
            if end := self.ends.get(tuple(tokens[-size:])):
                return tokens[end : end + min(n_max, self.n_draft)]
        return []


class FirstOf:
    """The guesses of the first drafter that has any."""

    def __init__(self, *drafters: Drafter):
        self.drafters = drafters

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        return next((guesses for drafter in self.drafters if (guesses := drafter(tokens, n_max))), [])


def greedy_speculative_decoding(
    target: Model, draft: Model, prompt_ids: list[int], n_tokens: int, n_draft: int = 4
) -> list[int]:
    """The `n_tokens` ids that plain greedy decoding of `target` gives after `prompt_ids`, with the help of `draft`.

    ValueError: the vocabularies differ in size, or what generate refuses.
    """
    check_vocabularies(target, draft)
    return list(generate(target, prompt_ids, n_tokens, draft=DraftModel(draft, n_draft)))


def check_vocabularies(target: Model, draft: Model) -> None:
    sizes = target.hparams["n_vocab"], draft.hparams["n_vocab"]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the target has {sizes[0]} ids and the draft {sizes[1]}; they need the same vocabulary")


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------

MIN_CONFIDENCE = 0.1  # rarer guesses are right too seldom: 1.32 times plain decoding with it, 1.22 without (embedded)
MAX_DRAFT = 10


def make_drafter(options, target: Model, target_encoder, sample: Sampler) -> Drafter:
    """The drafter of the flags, its length adaptive unless `n_draft` fixes it."""
    longest, confidence = (MAX_DRAFT, MIN_CONFIDENCE) if options.n_draft is None else (options.n_draft, 0.0)
    drafters: list[Drafter] = []
    if options.drafter in ("lookup", "both"):
        drafters.append(PromptLookup(longest, options.n_gram))
    if options.drafter in ("model", "both"):
        encoder, draft = load_model(options.draft_model_size, options.models_dir, **nanogpt_of(options))
        if encoder.tokens != target_encoder.tokens or encoder.merge_ranks != target_encoder.merge_ranks:
            raise ValueError(
                f"{options.draft_model_size} has another vocabulary than the target; choose a draft of the same family"
            )
        drafters.append(DraftModel(draft, longest, sample, confidence))
    chosen = drafters[0] if len(drafters) == 1 else FirstOf(*drafters)
    return Adaptive(chosen, MAX_DRAFT, target.passes.few_rows_pay) if options.n_draft is None else chosen


@with_flags(
    'Continue a text with a large model, helped by a small one: python speculative.py "PROMPT" [flags]', SPECULATIVE
)
def main(options):
    check_speculative(options)  # before a model is downloaded
    sample = sampler_of(options, options.seed)
    prompt = read_prompt(options.prompt)
    encoder, target = load_model(options.target_model_size, options.models_dir, **nanogpt_of(options))
    recorder = Recorder(make_drafter(options, target, encoder, sample))
    prompt_ids = encoder.encode_prompt(prompt)
    slide_by = slide_of(options.overflow, options.slide_by, target.hparams["n_ctx"])
    complete = partial(generate, target, prompt_ids, slide_by=slide_by)
    if options.verify:  # the first pass reads the weights into memory, and would count as speculation's
        target.forward([prompt_ids[:1]], target.new_cache(n_seq=1))
    ids = recorder.watch(prompt_ids, complete(options.n_tokens_to_generate, sample, recorder))
    write_rounds(options, text_until_end(encoder, ids, options.stop, options.ignore_eot), recorder, target)
    if options.verify:
        compare_with_plain(complete, sample, recorder.ids[len(prompt_ids) :], recorder.seconds)


if __name__ == "__main__":
    command.run(main)
