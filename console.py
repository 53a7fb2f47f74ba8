"""The command line of gpt2.py: python gpt2.py "PROMPT" [flags]."""

import json as json_format
import secrets
import sys
from collections.abc import Iterator
from functools import partial

import numpy as np

import cli
from gpt2 import Model, check_n_tokens, check_slide, generate, generate_batch
from sampling import Sampler, check, for_text, is_whole, log_softmax, make_sampler, scores_of
from stats import Stopwatch
from stopping import check_overflow, check_stops, has_ended, step_of, text_until_end
from utils import load_encoder_hparams_and_params

MAX_TOGETHER = 8  # samples computed at once; more take more memory and hardly less time each

# ----------------------------------------------------------------------------------------------------------------------
# Writing texts
# ----------------------------------------------------------------------------------------------------------------------


def write_samples(complete, text_of, prompt_ids: list[int], samplers: list[Sampler], seed: int, json: bool) -> None:
    """A text for each sampler, MAX_TOGETHER of them computed at once by `complete`, a generate_batch."""
    number = 0
    for start in range(0, len(samplers), MAX_TOGETHER):
        some = samplers[start : start + MAX_TOGETHER]
        for ids in complete([prompt_ids] * len(some), sample=some):
            text = "".join(text_of(ids))
            as_json = as_line({"sample": number + 1, "seed": (seed + number) % 2**64, "text": text})
            number += 1
            cli.write_text([as_json if json else f"=== sample {number} ===\n{text}\n"])


def write_beams(search, text_of, json: bool) -> None:
    """The best text that `search` finds, or all as lines of JSON."""
    for score, ids in search():
        text = "".join(text_of(ids))
        if not json:
            return cli.write_text([text])
        cli.write_text([as_line({"score": round(score, 6), "text": text})])


def as_line(values: dict) -> str:
    return json_format.dumps(values, ensure_ascii=False) + "\n"


def write_one(text_of, ids: Iterator[int], json: bool, is_whole_text: bool) -> None:
    """The text as it comes, or in one piece after what --top prints meanwhile."""
    texts = text_of(ids)
    if is_whole_text:
        texts = ["".join(texts)]
    elif json:
        texts = [as_line({"text": "".join(texts)})]
    cli.write_text(texts)


# ----------------------------------------------------------------------------------------------------------------------
# Looking at the choice
# ----------------------------------------------------------------------------------------------------------------------


class Alternatives:
    """A sampler that notes what else the model had in mind: after each call `chosen` is (id, probability), `best` more.

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


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------


def check_counts(n_tokens, n_samples, n_beam, top) -> None:
    check_n_tokens(n_tokens)
    check("n_samples", n_samples, is_whole(n_samples) and n_samples >= 1, "a whole number of 1 or more")
    check("n_beam", n_beam, is_whole(n_beam) and n_beam >= 1, "a whole number of 1 or more")
    check("top", top, is_whole(top) and top >= 0, "a whole number of 0 (none) or more")


def check_one(**is_on: bool) -> None:
    """ValueError: several flags that do not go together."""
    asked = [f"--{name}" for name, on in is_on.items() if on]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} do not go together; choose one of them")


def main(
    prompt: str | None = None,
    *,
    n_tokens_to_generate=40,
    model_size: str = "124M",
    models_dir: str = "models",
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
    n_samples=1,
    n_beam=1,
    length_penalty=1.0,
    interactive=False,
    top=0,
    score: str | None = None,
    stride=None,
    json=False,
    stats=False,
):
    """Continue a text with GPT-2: python gpt2.py "PROMPT" [flags]

    PROMPT                     the text to continue; "-", or none and a pipe: it is read from stdin;
                               "" begins a text of its own, and <|endoftext|> in it ends one
    --n_tokens_to_generate 40  how many tokens to add; fewer if the text ends
    --model_size 124M          124M, 355M, 774M or 1558M, downloaded when first used, or a folder of models_dir
    --models_dir models        where the models are

    Choosing tokens:
    --temperature 0            0 takes the likeliest token; above, sample from softmax(logits / temperature)
    --top_k 0                  sample among the k likeliest only, 0: all
    --top_p 1.0                sample among the likeliest that together have this probability
    --min_p 0.0                sample among those with this share of the highest probability or more
    --repetition_penalty 1.0   above 1, make tokens that are in the text already less likely
    --seed N                   the same seed gives the same text
    --n_samples 1              so many texts, computed together, with the seeds N, N + 1, ...
    --n_beam 1                 above 1, the best text that beam search finds with so many beams
    --length_penalty 1.0       beams are compared by log-probability / length ** length_penalty

    Ending:
    --stop TEXT                end before this text; may be repeated
    --ignore_eot               go on after <|endoftext|>
    --overflow error           more tokens than the context holds: error, or slide, which forgets the oldest
    --slide_by N               how many it forgets at a time, half of the context unless given

    Looking closer:
    --interactive              read prompts one after another; an empty line goes on with the text
    --top 0                    the so many likeliest tokens at each step, with their probabilities, to stderr
    --score FILE               how well the model predicts a file: cross-entropy, perplexity, bits per byte
    --stride N                 with --score: how far the window moves, the context unless given; less sees more of
                               the text before each token, and takes longer
    --json                     one object a line instead of text, for --top on stderr
    --stats                    print times, speed and memory to stderr
    """
    stopwatch = Stopwatch()
    check_counts(n_tokens_to_generate, n_samples, n_beam, top)  # all this before a model is downloaded
    check("length_penalty", length_penalty, length_penalty == 1 or n_beam > 1, "1 unless --n_beam is above 1")
    check("stride", stride, stride is None or score is not None, "none unless --score FILE is given too")
    check_stops(stop)
    check_overflow(overflow, slide_by)
    modes = {"n_samples": n_samples > 1, "n_beam": n_beam > 1, "interactive": interactive, "score": score is not None}
    check_one(**modes, top=top > 0)
    check_one(**modes, stats=stats)
    check_one(interactive=interactive, json=json)
    check_one(score=score is not None, prompt=prompt is not None)
    check_one(n_beam=n_beam > 1, temperature=temperature != 0)
    check_one(n_beam=n_beam > 1, repetition_penalty=repetition_penalty != 1)
    check_one(n_beam=n_beam > 1, overflow=overflow != "error")
    seed = secrets.randbits(63) if seed is None else seed
    sampler = partial(make_sampler, temperature, top_k, top_p, min_p, repetition_penalty)
    sample = sampler(seed)
    text = None if interactive else cli.read_prompt(prompt) if score is None else cli.read_file(score)

    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    model = Model(hparams, params)
    slide_by = step_of(overflow, slide_by, hparams["n_ctx"])
    if slide_by is not None:
        check_slide(slide_by, hparams["n_ctx"])  # now: --interactive survives mistakes in a prompt
    complete = partial(generate, model, n_tokens=n_tokens_to_generate, sample=sample, slide_by=slide_by)
    text_of = partial(text_until_end, encoder, stops=stop, ignore_eot=ignore_eot)

    if score is not None:
        from evaluation import write_score  # this and the following are for some runs only

        write_score(model, encoder, text, hparams["n_ctx"] if stride is None else stride, json)
    elif interactive:
        from interactive import converse

        converse(model, encoder, complete, text_of, prompt)
    elif n_beam > 1:
        from beam import beam_search

        eot_id = None if ignore_eot else encoder.eot_id
        search = partial(beam_search, model, encoder.encode_prompt(text), n_tokens_to_generate, n_beam, length_penalty)
        write_beams(partial(search, eot_id), text_of, json)
    elif n_samples > 1:
        is_end = partial(has_ended, encoder, stops=stop, ignore_eot=ignore_eot)
        batch = partial(generate_batch, model, n_tokens=n_tokens_to_generate, slide_by=slide_by, is_end=is_end)
        samplers = [sampler((seed + i) % 2**64) for i in range(n_samples)]
        write_samples(batch, text_of, encoder.encode_prompt(text), samplers, seed, json)
    else:
        watched = Alternatives(sample, top) if top else sample
        prompt_ids = encoder.encode_prompt(text)
        ids = stopwatch.watch(complete(prompt_ids, sample=watched))
        write_one(text_of, show_alternatives(ids, watched, encoder, json) if top else ids, json, is_whole_text=top > 0)
        if stats:
            print(stopwatch.report(model, len(prompt_ids)), file=sys.stderr)
