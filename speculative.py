"""Speculative decoding: a cheap drafter guesses tokens, the target checks them all in one pass.

    python speculative.py "Alan Turing theorized that computers would one day become" \\
        --draft_model_size 124M --target_model_size 1558M --n_tokens_to_generate 40

A pass over several tokens reads the target's weights once, as a pass over one does, so every guess that turns out
right is nearly free (Leviathan et al. 2023; Chen et al. 2023). The text is the target's own, whatever is guessed: each
token is chosen from the target's logits by the one loop of gpt2.py, and a guess only saves the pass that it would have
taken. Sampled text is the same too, because noise belongs to positions (sampling.py).

A drafter is any callable (tokens, n_max) -> at most n_max guesses of what follows. Left out: trees of guesses.
"""

if __name__ == "__main__":
    import interrupts

    interrupts.end_quietly()  # before the other imports, which take most of a short run

import json as json_format
import os
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial

import numpy as np

import cli
from adaptive import Adaptive, common_length
from cli import read_prompt
from gpt2 import Drafter, Model, check_n_tokens, generate
from sampling import Sampler, check, for_text, greedy, is_whole, make_sampler, margin
from stats import peak_memory_gb
from stopping import check_overflow, check_stops, step_of, text_until_end
from utils import load_encoder_hparams_and_params

# ----------------------------------------------------------------------------------------------------------------------
# Drafters
# ----------------------------------------------------------------------------------------------------------------------


class DraftModel:
    """Guesses what a smaller model says, with a cache of its own that follows the text.

    `n_draft`: guesses a round, at most. `sample`: the target's sampler, so that both see the same noise.
    `min_confidence`: guessing stops after a token to which the draft itself gives a lower probability.
    """

    def __init__(self, model: Model, n_draft: int, sample: Sampler = greedy, min_confidence: float = 0.0):
        self.model = model
        self.n_draft = n_draft
        self.sample = sample
        self.min_confidence = min_confidence
        self.cache = self.model.new_cache()
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
# What happened
# ----------------------------------------------------------------------------------------------------------------------

COLOURS = {"accepted guess": "32", "correction": "33", "bonus": "36", "plain": "0"}


class Recorder:
    """A drafter that notes what another guesses, and when."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.rounds: list[tuple[int, list[int]]] = []  # (how long the text was, the guesses)
        self.draft_seconds = 0.0

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        started = time.perf_counter()
        guesses = self.drafter(tokens, n_max)
        self.draft_seconds += time.perf_counter() - started
        self.rounds.append((len(tokens), guesses))
        return guesses

    def origin(self, position: int, token: int) -> str:
        """Where the newest token comes from: a key of COLOURS."""
        start, guesses = self.rounds[-1]
        n = position - start
        if n == len(guesses):
            return "bonus" if guesses else "plain"
        return "accepted guess" if guesses[n] == token else "correction"

    def n_accepted(self, tokens: list[int]) -> int:
        return sum(common_length(guesses, tokens[start : start + len(guesses)]) for start, guesses in self.rounds)


class MarginRecorder:
    """A sampler that notes by how little a token ever won."""

    def __init__(self, sample: Sampler):
        self.sample = sample
        self.smallest = float("inf")

    def for_text(self, tokens: list[int]) -> Sampler:
        self.sample = for_text(self.sample, tokens)
        return self

    def __call__(self, logits: np.ndarray, position: int) -> int:
        self.smallest = min(self.smallest, margin(self.sample, logits, position))
        return self.sample(logits, position)


def one_row_seconds(model: Model) -> float:
    """What a step without packed weights takes at the beginning of the context, where it takes least."""
    cache = model.new_cache()
    times = []
    for _ in range(6):
        started = time.perf_counter()
        model.forward([[0]], cache, plainly=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def summarize(recorder: Recorder, tokens: list[int], n_prompt: int, ticks: list[float], target: Model) -> dict:
    """The run as one object; `ticks` are the times of its beginning and of each token."""
    n_new, n_guessed = len(tokens) - n_prompt, sum(len(guesses) for _, guesses in recorder.rounds)
    n_rounds, n_accepted = len(recorder.rounds), recorder.n_accepted(tokens)
    seconds, plain = ticks[-1] - ticks[0], one_row_seconds(target)
    summary = {
        "tokens": n_new,
        "rounds": n_rounds,
        "guesses": n_guessed,
        "accepted": n_accepted,
        "accepted_per_round": round(n_accepted / n_rounds, 3),
        "acceptance_rate": round(n_accepted / n_guessed, 3) if n_guessed else None,
        "tokens_per_target_pass": round(n_new / n_rounds, 3),
        "seconds": round(seconds, 4),
        "draft_seconds": round(recorder.draft_seconds, 4),
        "target_seconds": round(seconds - recorder.draft_seconds, 4),
        "plain_step_seconds": round(plain, 6),
    }
    if n_new > 1:  # after the first token, which both ways take a pass over the prompt for
        summary["speedup_over_plain_steps"] = round((n_new - 1) * plain / (ticks[-1] - ticks[1]), 3)
    return summary | {
        "weights_in_panels": target.passes.shares.report,
        "peak_memory_gb": round(peak_memory_gb() or 0, 3),
    }


def painted(texts: Iterator[str], recorder: Recorder, tokens: list[int]) -> Iterator[str]:
    """Each piece of text in the colour of its token's origin."""
    for text in texts:
        colour = COLOURS[recorder.origin(len(tokens) - 1, tokens[-1])]
        yield f"\033[{colour}m{text}\033[0m" if text else ""


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------

MIN_CONFIDENCE = 0.1  # rarer guesses are right too seldom: 1.62 times plain decoding with it, 1.5 without
MAX_DRAFT = 10


def load_model(model_size: str, models_dir: str):
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    return encoder, Model(hparams, params)


def make_drafter(drafter, draft_model_size, target, target_encoder, models_dir, n_draft, n_gram, sample) -> Drafter:
    """The drafter of the flags, its length adaptive unless `n_draft` fixes it."""
    longest, confidence = (MAX_DRAFT, MIN_CONFIDENCE) if n_draft is None else (n_draft, 0.0)
    drafters = []
    if drafter in ("lookup", "both"):
        drafters.append(PromptLookup(longest, n_gram))
    if drafter in ("model", "both"):
        encoder, draft = load_model(draft_model_size, models_dir)
        if encoder.token_ids != target_encoder.token_ids or encoder.merge_ranks != target_encoder.merge_ranks:
            raise ValueError(
                f"{draft_model_size} has another vocabulary than the target; choose a draft of the same family"
            )
        drafters.append(DraftModel(draft, longest, sample, confidence))
    chosen = drafters[0] if len(drafters) == 1 else FirstOf(*drafters)
    return Adaptive(chosen, MAX_DRAFT, target.checks_pay) if n_draft is None else chosen


def compare_with_plain(complete, sample, ids, seconds) -> None:
    """Decode plainly as many tokens, compare, say so on stderr. SystemExit: the texts differ."""
    sample = MarginRecorder(sample)
    started = time.perf_counter()
    plain = list(complete(len(ids), sample))
    plain_seconds = time.perf_counter() - started
    if plain != ids:
        at = common_length(plain, ids)
        cli.fail(
            f"the texts differ at token {at}: plain decoding has {plain[at : at + 1]}, speculation {ids[at : at + 1]}; "
            f"smallest margin {sample.smallest:.2g}"
        )
    print(
        f"verified: {len(ids)} tokens identical; plain {plain_seconds:.3f} s, speculative {seconds:.3f} s, "
        f"{plain_seconds / seconds:.2f} times as fast; smallest margin {sample.smallest:.2g}",
        file=sys.stderr,
    )


def main(
    prompt: str | None = None,
    *,
    draft_model_size: str = "124M",
    target_model_size: str = "1558M",
    n_tokens_to_generate=40,
    models_dir: str = "models",
    drafter: str = "model",
    n_draft=None,
    n_gram=3,
    temperature=0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    seed=None,
    stop: list[str] = (),
    ignore_eot=False,
    overflow: str = "error",
    slide_by=None,
    verify=False,
    stats=False,
    json=False,
    show=False,
):
    """Continue a text with a large model, helped by a small one: python speculative.py "PROMPT" [flags]

    PROMPT                     the text to continue; "-", or none and a pipe: it is read from stdin
    --target_model_size 1558M  the model whose text it is
    --draft_model_size 124M    the model that guesses
    --drafter model            model, lookup (no second model: guesses from the text itself) or both
    --n_draft N                guesses a round; without it, as many as pay by what was measured
    --n_gram 3                 the longest n-gram that lookup looks for
    --n_tokens_to_generate 40  how many tokens to add; fewer if the text ends
    --models_dir models        where the models are
    --temperature 0            0 takes the likeliest token; above, sample from softmax(logits / temperature)
    --top_k 0                  sample among the k likeliest only, 0: all
    --top_p 1.0                sample among the likeliest that together have this probability
    --min_p 0.0                sample among those with this share of the highest probability or more
    --repetition_penalty 1.0   above 1, make tokens that are in the text already less likely
    --seed N                   the same seed gives the same text, with any drafter and without
    --stop TEXT                end before this text; may be repeated
    --ignore_eot               go on after <|endoftext|>
    --overflow error           more tokens than the context holds: error, or slide, which forgets the oldest
    --slide_by N               how many it forgets at a time, half of the context unless given
    --verify                   decode plainly too, compare, exit with 1 if the texts differ
    --stats                    rounds, acceptance, times and memory to stderr; --json: as one object
    --show                     colour the text by origin, in a terminal
    """
    check_n_tokens(n_tokens_to_generate)
    check("drafter", drafter, drafter in ("model", "lookup", "both"), "model, lookup or both")
    check("n_draft", n_draft, n_draft is None or (is_whole(n_draft) and n_draft >= 0), "a whole number of 0 or more")
    check("n_gram", n_gram, is_whole(n_gram) and n_gram >= 1, "a whole number of 1 or more")
    check_stops(stop)
    check_overflow(overflow, slide_by)
    sample = make_sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    prompt = read_prompt(prompt)
    encoder, target = load_model(target_model_size, models_dir)
    recorder = Recorder(make_drafter(drafter, draft_model_size, target, encoder, models_dir, n_draft, n_gram, sample))
    prompt_ids = encoder.encode_prompt(prompt)
    tokens, ticks = list(prompt_ids), [time.perf_counter()]

    def noted(ids):
        for i in ids:
            tokens.append(i)
            ticks.append(time.perf_counter())
            yield i

    complete = partial(generate, target, prompt_ids, slide_by=step_of(overflow, slide_by, target.hparams["n_ctx"]))
    ids = noted(complete(n_tokens_to_generate, sample, recorder))
    texts = text_until_end(encoder, ids, stop, ignore_eot)
    if show and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        texts = painted(texts, recorder, tokens)
        legend = "  ".join(f"\033[{colour}m{origin}\033[0m" for origin, colour in COLOURS.items())
        print(legend, file=sys.stderr)
    cli.write_text(texts)
    seconds = time.perf_counter() - ticks[0]
    if stats or json:
        summary = summarize(recorder, tokens, len(prompt_ids), ticks, target)
        lines = [json_format.dumps(summary)] if json else [f"{name:26} {value}" for name, value in summary.items()]
        print("\n".join(lines), file=sys.stderr)
    if verify:
        compare_with_plain(complete, sample, tokens[len(prompt_ids) :], seconds)


if __name__ == "__main__":
    cli.run(main)
