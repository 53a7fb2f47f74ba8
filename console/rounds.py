"""What happened in speculative decoding: rounds, guesses and times, for --stats, --show and --verify."""

import json as json_format
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from console.errors import fail
from console.stats import peak_memory_gb
from console.streams import write_text
from decoding.draft_length import common_length
from decoding.sampling import Sampler, for_text
from decoding.ties import margin

COLOURS = {"accepted guess": "32", "correction": "33", "bonus": "36", "plain": "0"}


class Recorder:
    """A drafter that notes what another guesses, what becomes of the text, and when."""

    def __init__(self, drafter: Callable[[list[int], int], list[int]]):
        self.drafter = drafter
        self.rounds: list[tuple[int, list[int]]] = []  # (how long the text was, the guesses)
        self.draft_seconds = 0.0
        self.ids: list[int] = []  # of the text
        self.n_prompt = 0
        self.ticks: list[float] = []  # of the text's beginning and of each new token, without the time of writing them

    def watch(self, prompt_ids: Sequence[int], ids: Iterator[int]) -> Iterator[int]:
        self.ids, self.n_prompt, self.ticks = list(prompt_ids), len(prompt_ids), [time.perf_counter()]
        written = 0.0  # seconds
        for i in ids:
            self.ids.append(i)
            stopped = time.perf_counter()
            self.ticks.append(stopped - written)
            yield i
            written += time.perf_counter() - stopped

    @property
    def seconds(self) -> float:
        return self.ticks[-1] - self.ticks[0]

    def __call__(self, tokens: list[int], n_max: int) -> list[int]:
        started = time.perf_counter()
        guesses = self.drafter(tokens, n_max)
        self.draft_seconds += time.perf_counter() - started
        self.rounds.append((len(tokens), guesses))
        return guesses

    def origin(self) -> str:
        """Where the newest token comes from: a key of COLOURS."""
        start, guesses = self.rounds[-1]
        n = len(self.ids) - 1 - start
        if n == len(guesses):
            return "bonus" if guesses else "plain"
        return "accepted guess" if guesses[n] == self.ids[-1] else "correction"

    def n_accepted(self) -> int:
        return sum(common_length(guesses, self.ids[start : start + len(guesses)]) for start, guesses in self.rounds)


class MarginRecorder:
    """A sampler that notes the smallest margin by which a token won."""

    def __init__(self, sample: Sampler):
        self.sample = sample
        self.smallest = float("inf")

    def for_text(self, tokens: list[int]) -> Sampler:
        self.sample = for_text(self.sample, tokens)
        return self

    def __call__(self, logits: np.ndarray, position: int) -> int:
        self.smallest = min(self.smallest, margin(self.sample, logits, position))
        return self.sample(logits, position)


def one_row_seconds(model) -> float:
    """What a step without packed weights takes at the beginning of the context, where it takes least."""
    cache = model.new_cache()
    times = []
    for _ in range(6):
        cache.length, started = 0, time.perf_counter()
        model.forward([[0]], cache, plainly=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def summarize(recorder: Recorder, target) -> dict:
    """The run as one object."""
    ticks, n_new = recorder.ticks, len(recorder.ids) - recorder.n_prompt
    n_guessed = sum(len(guesses) for _, guesses in recorder.rounds)
    n_rounds, n_accepted = len(recorder.rounds), recorder.n_accepted()
    seconds, plain = recorder.seconds, one_row_seconds(target)
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
    if n_rounds > 1:  # after the first token, for which both ways take a pass over the prompt
        summary["speedup_over_plain_steps"] = round((n_new - 1) * plain / (ticks[-1] - ticks[1]), 3)
    return summary | {
        "weights_in_panels": target.passes.weights.report,
        "peak_memory_gb": round(peak_memory_gb() or 0, 3),
    }


def painted(texts: Iterator[str], recorder: Recorder) -> Iterator[str]:
    """Each piece of text in the colour of its token's origin."""
    for text in texts:
        colour = COLOURS[recorder.origin()]
        yield f"\033[{colour}m{text}\033[0m" if text else ""


def write_rounds(options, texts: Iterator[str], recorder: Recorder, target) -> None:
    """The text, in colours with --show, and on stderr what --stats and --json ask for."""
    if options.show and sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        texts = painted(texts, recorder)
        print("  ".join(f"\033[{colour}m{origin}\033[0m" for origin, colour in COLOURS.items()), file=sys.stderr)
    write_text(texts)
    if options.stats or options.json:
        summary = summarize(recorder, target)
        lines = [json_format.dumps(summary)] if options.json else [f"{k:26} {v}" for k, v in summary.items()]
        print("\n".join(lines), file=sys.stderr)


def compare_with_plain(complete, sample: Sampler, ids: list[int], seconds: float) -> None:
    """Decode plainly as many tokens, compare, say so on stderr. SystemExit: the texts differ."""
    sample, started = MarginRecorder(sample), time.perf_counter()
    plain = list(complete(len(ids), sample))
    plain_seconds = time.perf_counter() - started
    if plain != ids:
        at = common_length(plain, ids)
        fail(
            f"the texts differ at token {at}: plain decoding has {plain[at : at + 1]}, speculation {ids[at : at + 1]}; "
            f"smallest margin {sample.smallest:.2g}"
        )
    print(
        f"verified: {len(ids)} tokens identical; plain {plain_seconds:.3f} s, speculative {seconds:.3f} s, "
        f"{plain_seconds / seconds:.2f} times as fast; smallest margin {sample.smallest:.2g}",
        file=sys.stderr,
    )
