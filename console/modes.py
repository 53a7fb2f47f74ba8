"""What gpt2.py writes: one text, several, the best of a beam search, a score, or an answer to each prompt."""

import json as json_format
import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np

from console.flags import check_gpt2, sampler_of
from console.streams import read_file, read_prompt, write_text
from decoding.requests import check_slide
from decoding.sampling import Sampler, for_text, log_softmax, new_seed, scores_of
from decoding.stopping import has_ended, slide_of, text_until_end

MAX_TOGETHER = 8  # samples computed at once; more take more memory and hardly less time each

# ----------------------------------------------------------------------------------------------------------------------
# Writing texts
# ----------------------------------------------------------------------------------------------------------------------


def write_samples(complete, text_of, prompt_ids: list[int], make_sampler, seeds: Iterator[int], json: bool) -> None:
    """A text for each of `seeds`, MAX_TOGETHER of them computed at once by `complete`, a generate_batch."""
    number = 0
    while some := list(islice(seeds, MAX_TOGETHER)):
        samplers = [make_sampler(seed) for seed in some]
        for seed, ids in zip(some, complete([prompt_ids] * len(some), sample=samplers), strict=True):
            number, text = number + 1, "".join(text_of(ids))
            as_json = as_line({"sample": number, "seed": seed, "text": text})
            write_text([as_json if json else f"=== sample {number} ===\n{text}\n"])


def write_beams(search, text_of, json: bool) -> None:
    """The best text that `search` finds, or all as lines of JSON."""
    for score, ids in search():
        text = "".join(text_of(ids))
        if not json:
            return write_text([text])
        write_text([as_line({"score": round(score, 6), "text": text})])


def as_line(values: dict) -> str:
    line = json_format.dumps(values, ensure_ascii=False) + "\n"
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json_format.dumps(values) + "\n"
    return line


def write_score(model, encoder, text: str, stride: int, json: bool) -> None:
    """One line on stdout. ValueError: a text of less than two tokens."""
    from decoding.scoring import log_probabilities  # for this mode only

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
        "perplexity": round(math.exp(nats), 2) if nats < 700 else None,  # JSON has no infinity
        "bits_per_byte": round(nats * len(scores) / math.log(2) / n_bytes, 4),
    }
    line = "{cross_entropy} nats a token, perplexity {perplexity}, {bits_per_byte} bits a byte ({tokens} tokens)"
    write_text([(json_format.dumps(values) if json else line.format(**values)) + "\n"])


# ----------------------------------------------------------------------------------------------------------------------
# Looking at the choice
# ----------------------------------------------------------------------------------------------------------------------


class Alternatives:
    """A sampler that notes at each call (id, probability): `chosen` of its token, `best` of the likeliest ones.

    Probabilities are softmax(logits): the model's own, before temperature and filters.
    """

    def __init__(self, sample: Sampler, n: int):
        self.sample, self.n = sample, n

    def for_text(self, tokens: list[int]) -> Sampler:
        self.sample = for_text(self.sample, tokens)
        return self

    def scores(self, logits: np.ndarray, position: int) -> np.ndarray:
        return scores_of(self.sample, logits, position)

    def __call__(self, logits: np.ndarray, position: int) -> int:
        probabilities = np.exp(log_softmax(logits.astype(np.float64)))
        i = self.sample(logits, position)
        self.chosen = i, float(probabilities[i])
        self.best = [(int(j), float(probabilities[j])) for j in np.argsort(-logits, kind="stable")[: self.n]]
        return i


def show_alternatives(ids: Iterator[int], watched: Alternatives, encoder, json: bool) -> Iterator[int]:
    """A line on stderr for each id: the token, its probability, and the likeliest ones."""

    def text(i):
        return encoder.token_bytes(i).decode("utf-8", "replace")

    for i in ids:
        token, best = watched.chosen, watched.best
        if json:
            keys = ("id", "probability")
            line = {"token": text(i)} | dict(zip(keys, token, strict=True))
            line["top"] = [{"token": text(j)} | dict(zip(keys, (j, p), strict=True)) for j, p in best]
            print(as_line(line), end="", file=sys.stderr)
        else:
            others = "  ".join(f"{text(j)!r:>10} {p:6.1%}" for j, p in best)
            print(f"{text(i)!r:>14} {token[1]:6.1%} | {others}", file=sys.stderr)
        yield i


def write_one(options, seed: int, complete, text_of, encoder, model, prompt_ids, stopwatch) -> None:
    """The text as it comes, or in one piece after what --top prints meanwhile."""
    sample = sampler_of(options, seed)
    watched = Alternatives(sample, options.top) if options.top else sample
    ids = stopwatch.watch(complete(prompt_ids, sample=watched))
    texts = text_of(show_alternatives(ids, watched, encoder, options.json) if options.top else ids)
    if options.top:
        texts = ["".join(texts)]
    elif options.json:
        texts = [as_line({"text": "".join(texts)})]
    write_text(texts)
    if options.stats:
        print(stopwatch.report(model, len(prompt_ids)), file=sys.stderr)
        if options.temperature:
            print(f"seed     {seed}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# Which of them
# ----------------------------------------------------------------------------------------------------------------------


def checked_text(options) -> str | None:
    """The prompt, or the text to score, after all flags were checked. ValueError: one is wrong, or there is no text."""
    check_gpt2(options)
    if options.interactive:
        return None
    return read_prompt(options.prompt) if options.score is None else read_file(options.score)


def seed_of(options) -> int:
    is_random = options.seed is None and options.temperature
    return new_seed() if is_random else options.seed or 0  # greedy texts have no noise


def write(options, text: str | None, encoder, model, generate: Callable, generate_batch: Callable, stopwatch) -> None:
    """What the flags ask for, after `text`; `generate` and `generate_batch` are those of gpt2.py."""
    n_ctx, n_tokens = model.hparams["n_ctx"], options.n_tokens_to_generate
    slide_by = slide_of(options.overflow, options.slide_by, n_ctx)
    if slide_by is not None:
        check_slide(slide_by, n_ctx)  # now: --interactive survives mistakes in a prompt
    seed = seed_of(options)
    complete = partial(generate, model, n_tokens=n_tokens, slide_by=slide_by)
    ending = {"stops": options.stop, "ignore_eot": options.ignore_eot}
    text_of = partial(text_until_end, encoder, **ending)
    if options.score is not None:
        write_score(model, encoder, text, n_ctx if options.stride is None else options.stride, options.json)
    elif options.interactive:
        from console.interactive import converse  # this and beam search are for some runs only

        def answer(prompt_ids, cache):  # without --seed each text has noise of its own
            return complete(prompt_ids, cache=cache, sample=sampler_of(options, seed_of(options)))

        converse(model, encoder, answer, text_of, options.prompt)
    elif options.n_beam > 1:
        from decoding.beam import beam_search

        eot_ids = () if options.ignore_eot else encoder.eot_ids
        search = partial(beam_search, model, encoder.encode_prompt(text), n_tokens, options.n_beam)
        write_beams(partial(search, options.length_penalty, eot_ids), text_of, options.json)
    elif options.n_samples > 1:
        is_end = partial(has_ended, encoder, **ending)
        batch = partial(generate_batch, model, n_tokens=n_tokens, slide_by=slide_by, is_end=is_end)
        seeds = ((seed + i) % 2**64 for i in range(options.n_samples))
        write_samples(batch, text_of, encoder.encode_prompt(text), partial(sampler_of, options), seeds, options.json)
    else:
        write_one(options, seed, complete, text_of, encoder, model, encoder.encode_prompt(text), stopwatch)
