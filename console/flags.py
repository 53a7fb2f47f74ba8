"""The flags of gpt2.py and speculative.py, each declared, documented and checked once."""

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

from checkpoints import OPENAI_N_CTX, OPENAI_SIZES
from decoding.requests import check_length_penalty, check_n_tokens, check_request
from decoding.sampling import check, is_whole, make_sampler
from decoding.stopping import check_overflow, check_stops, slide_of

# ----------------------------------------------------------------------------------------------------------------------
# The tables
# ----------------------------------------------------------------------------------------------------------------------


class Flag(NamedTuple):
    """`kind`: str takes a value as it was typed, list[str] several of them, bool none; object a Python literal.

    `shown`: what the manual shows as its value where the default says nothing.
    """

    default: object
    help: str
    kind: object = object
    shown: str = ""


POSITIONAL = ("prompt", "prompts")  # the first argument's names
PROMPT = Flag(None, 'the text to continue; "-", or none and a pipe: it is read from stdin', str)
LENGTH = {"n_tokens_to_generate": Flag(40, "how many tokens to add; fewer if the model ends the text")}
MODELS_DIR = {"models_dir": Flag(None, "where the models are, beside the programs unless given", str, "models")}
NANOGPT = {
    "gelu": Flag(None, "of nanoGPT's models: erf, or tanh for those trained before June 2023", str, "erf"),
    "vocabulary": Flag(None, "of nanoGPT's models without a meta.pkl: the model with the same tokens", str, "124M"),
}
SAMPLING = {
    "temperature": Flag(0, "0 takes the likeliest token; above, sample from softmax(logits / temperature)"),
    "top_k": Flag(0, "sample among the k likeliest tokens only; 0: among all"),
    "top_p": Flag(1.0, "sample among the likeliest tokens that together have this probability"),
    "min_p": Flag(0.0, "sample among tokens with at least this share of the highest probability"),
    "repetition_penalty": Flag(1.0, "above 1, make tokens that are in the text already less likely"),
    "seed": Flag(None, "the same seed gives the same text; a drafter does not change it", shown="N"),
}
ENDING = {
    "stop": Flag((), "end before this text; may be given several times", list[str], "TEXT"),
    "ignore_eot": Flag(False, "go on after <|endoftext|>", bool),
    "overflow": Flag("error", "a text longer than the context: error, or slide, which forgets the oldest tokens", str),
    "slide_by": Flag(None, "how many tokens slide forgets at a time, half of the context unless given", shown="N"),
}

GPT2 = {
    "": {
        "prompt": PROMPT._replace(help=PROMPT.help + ';\n"" begins a text of its own, and <|endoftext|> in it ends one')
    }
    | LENGTH
    | {
        "model_size": Flag(
            "124M",
            "124M, 355M, 774M or 1558M, downloaded when first used, a folder of models_dir or a path\n"
            "(OpenAI's files, Hugging Face's or nanoGPT's), or hf:OWNER/MODEL, which is fetched from the hub",
            str,
        )
    }
    | MODELS_DIR
    | NANOGPT,
    "Choosing tokens:": SAMPLING
    | {
        "n_samples": Flag(1, "this many texts, computed together, with the seeds N, N + 1, ..."),
        "n_beam": Flag(1, "above 1, the best text that beam search finds with this many beams"),
        "length_penalty": Flag(1.0, "beams are compared by log-probability / length ** length_penalty"),
    },
    "Ending:": ENDING,
    "Looking closer:": {
        "interactive": Flag(False, "read prompts one after another; an empty line goes on with the text", bool),
        "top": Flag(0, "at each step, this many of the likeliest tokens and their probabilities, on stderr"),
        "score": Flag(
            None, "how well the model predicts a file: cross-entropy, perplexity, bits per byte", str, "FILE"
        ),
        "stride": Flag(
            None,
            "with --score: how many tokens the window moves, the context unless given; with fewer\n"
            "each token is scored after more text, which takes longer",
            shown="N",
        ),
        "json": Flag(False, "JSON instead of text, one object a line; with --top for its lines on stderr", bool),
        "stats": Flag(False, "print times, speed and memory to stderr", bool),
    },
}

SPECULATIVE = {
    "": {
        "prompt": PROMPT,
        "target_model_size": Flag("1558M", "the model whose text it is", str),
        "draft_model_size": Flag("124M", "the model that guesses", str),
        "drafter": Flag("model", "model, lookup (no second model: guesses from the text itself) or both", str),
        "n_draft": Flag(None, "guesses a round; without it, as many as pay, which is measured as it runs", shown="N"),
        "n_gram": Flag(3, "the longest n-gram that lookup looks for"),
    }
    | LENGTH
    | MODELS_DIR
    | NANOGPT
    | SAMPLING
    | ENDING
    | {
        "verify": Flag(False, "decode without a draft too and compare; status 1 if the texts differ", bool),
        "stats": Flag(False, "rounds, acceptance, times and memory, to stderr", bool),
        "json": Flag(False, "what --stats prints, as one JSON object", bool),
        "show": Flag(False, "in a terminal, colour accepted guesses, corrections and other tokens", bool),
    }
}

# ----------------------------------------------------------------------------------------------------------------------
# From a table to a command
# ----------------------------------------------------------------------------------------------------------------------


def manual(title: str, sections: dict[str, dict[str, Flag]]) -> str:
    lines = [title]
    for heading, flags in sections.items():
        lines += ["", heading] if heading else [""]
        for name, flag in flags.items():
            value = "" if flag.kind is bool else flag.shown or str(flag.default)
            left = name.upper() if name in POSITIONAL else f"--{name} {value}".rstrip()
            lines.append(f"{left:26} " + flag.help.replace("\n", "\n" + 27 * " "))
    return "\n".join(lines)


def with_flags(title: str, sections: dict[str, dict[str, Flag]]) -> Callable:
    """Make of main(options) a command with these flags, whose values `options` has as attributes."""
    flags = {name: flag for section in sections.values() for name, flag in section.items()}
    kinds = dict.fromkeys(flags, inspect.Parameter.KEYWORD_ONLY)
    kinds |= dict.fromkeys(POSITIONAL, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature(
        [inspect.Parameter(name, kinds[name], default=f.default, annotation=f.kind) for name, f in flags.items()]
    )

    def decorate(main: Callable[[SimpleNamespace], None]) -> Callable[..., None]:
        @functools.wraps(main)
        def command(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            main(SimpleNamespace(**bound.arguments))

        command.__signature__ = signature
        command.__doc__ = manual(title, sections)
        return command

    return decorate


# ----------------------------------------------------------------------------------------------------------------------
# Checks, all of them before a model is downloaded
# ----------------------------------------------------------------------------------------------------------------------


def check_together(**is_on: bool) -> None:
    """ValueError: several flags that do not go together."""
    asked = [f"--{name}" for name, on in is_on.items() if on]
    if len(asked) > 1:
        raise ValueError(f"{' and '.join(asked)} do not go together; choose one of them")


def check_count(options, name: str, least: int, meaning: str = "") -> None:
    value = getattr(options, name)
    check(name, value, is_whole(value) and value >= least, f"a whole number of {least}{meaning} or more")


def check_shared(options) -> None:
    check_n_tokens(options.n_tokens_to_generate)
    check_stops(options.stop)
    check_overflow(options.overflow, options.slide_by)
    check("gelu", options.gelu, options.gelu in (None, "erf", "tanh"), "erf or tanh")
    sampler_of(options, options.seed)


def check_openai_size(options, model_size: str) -> None:
    """What an OpenAI size would refuse after its download."""
    if model_size in OPENAI_SIZES:
        slide_by = slide_of(options.overflow, options.slide_by, OPENAI_N_CTX)
        check_request([0], options.n_tokens_to_generate, OPENAI_N_CTX, slide_by)


def check_gpt2(options) -> None:
    o = options
    check_count(o, "n_samples", 1)
    check_count(o, "n_beam", 1)
    check_count(o, "top", 0, " (none)")
    check("length_penalty", o.length_penalty, o.length_penalty == 1 or o.n_beam > 1, "1 unless --n_beam is above 1")
    check("stride", o.stride, o.stride is None or o.score is not None, "none unless --score FILE is given too")
    check_shared(o)
    is_beam = o.n_beam > 1
    modes = {
        "n_samples": o.n_samples > 1,
        "n_beam": is_beam,
        "interactive": o.interactive,
        "score": o.score is not None,
    }
    check_together(**modes, top=o.top > 0)
    check_together(**modes, stats=o.stats)
    check_together(interactive=o.interactive, json=o.json)
    check_together(score=o.score is not None, prompt=o.prompt is not None)
    check_together(n_beam=is_beam, temperature=o.temperature != 0)
    check_together(n_beam=is_beam, repetition_penalty=o.repetition_penalty != 1)
    check_together(n_beam=is_beam, overflow=o.overflow != "error")
    check_length_penalty(o.length_penalty)
    if o.score is None and not o.interactive:
        check_openai_size(o, o.model_size)


def check_speculative(options) -> None:
    check_shared(options)
    drafter, n_draft = options.drafter, options.n_draft
    check("drafter", drafter, drafter in ("model", "lookup", "both"), "model, lookup or both")
    check("n_draft", n_draft, n_draft is None or (is_whole(n_draft) and n_draft >= 0), "a whole number of 0 or more")
    n_gram = options.n_gram
    check("n_gram", n_gram, is_whole(n_gram) and 1 <= n_gram <= 100, "a whole number from 1 to 100")
    check_openai_size(options, options.target_model_size)


def sampler_of(options, seed: int | None):
    """The sampler that the flags ask for. ValueError: a value outside its range."""
    o = options
    return make_sampler(o.temperature, o.top_k, o.top_p, o.min_p, o.repetition_penalty, seed)


def nanogpt_of(options) -> dict[str, str | None]:
    """What loading one of nanoGPT's models is told."""
    return {"gelu": options.gelu, "vocabulary": options.vocabulary}
