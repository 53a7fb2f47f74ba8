"""How well a model predicts the last words of texts, and chooses endings: LAMBADA and HellaSwag, from a local file.

python -m benchmarks eval 124M lambada_test.jsonl

There are several ways to count. These are those of the published figures, which are shown beside the model's:

- LAMBADA as lambada_openai of EleutherAI's lm-evaluation-harness: the target is a space and what follows the last
  space of the text; it is right when each of its tokens is the likeliest. The perplexity is of whole words, exp of the
  mean negative log-probability. OpenAI's own figures (0.4599 for 124M) count the last token.
- HellaSwag as dev/data/hellaswag.py of karpathy/llm.c: the ending with the highest log-probability after "ctx" and a
  space, summed over its tokens or, normalised, their mean. The harness puts the activity label before, takes wikiHow's
  brackets out and divides by characters: it has 0.2892 and 0.3114 for 124M, 0.4004 and 0.5089 for 1558M.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import gpt2
from benchmarks.measure import as_markdown
from decoding.scoring import score_rest

# Of the whole test set: issues 2159 and 911 of EleutherAI/lm-evaluation-harness, and the head of llm.c's file.
PUBLISHED = {
    ("lambada", "124M"): {"accuracy": 0.3256, "perplexity": 40.06},
    ("lambada", "1558M"): {"perplexity": 10.63},
    ("hellaswag", "124M"): {"accuracy": 0.2859, "normalised accuracy": 0.2955},
    ("hellaswag", "1558M"): {"accuracy": 0.3842, "normalised accuracy": 0.4893},
}
N_PUBLISHED = {"lambada": 5153, "hellaswag": 10042}

# ----------------------------------------------------------------------------------------------------------------------
# The lines of a file
# ----------------------------------------------------------------------------------------------------------------------


class LastWord(NamedTuple):
    context: str
    target: str


class Choice(NamedTuple):
    context: str
    endings: list[str]
    label: int


def parse_last_word(line: dict) -> LastWord:
    """{"text": ...}. ValueError: there is no last word."""
    if not isinstance(line.get("text"), str):
        raise ValueError(f'"text" is {line.get("text")!r:.60}, expected a string')
    context, _, word = line["text"].rpartition(" ")
    if not word.strip():
        raise ValueError(f"the text ends in white space, {line['text'][-20:]!r}, expected a word")
    return LastWord(context, f" {word}")


def parse_choice(line: dict) -> Choice:
    """{"ctx": ..., "endings": [...], "label": 0}; ctx_a and ctx_b where "ctx" is missing, the label perhaps as text."""
    parts = [line["ctx"]] if "ctx" in line else [part for name in ("ctx_a", "ctx_b") if (part := line.get(name)) != ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError('no "ctx", expected the text before the endings, or "ctx_a" and "ctx_b"')
    endings, label = line.get("endings"), line.get("label")
    if not isinstance(endings, list) or not endings or not all(isinstance(ending, str) for ending in endings):
        raise ValueError(f'"endings" is {endings!r:.60}, expected a list of strings')
    if isinstance(label, str) and label.isascii() and label.isdigit():
        label = int(label)
    if type(label) is not int or not 0 <= label < len(endings):
        raise ValueError(f'"label" is {label!r:.60}, expected the number of the right ending, 0 to {len(endings) - 1}')
    return Choice(" ".join(parts), endings, label)


def read_lines(path: str) -> list[tuple[str, dict]]:
    """(where it is, object) of each line that is not empty. ValueError: one is no JSON object, or there is none."""
    lines = []
    with open(path, "rb") as f:
        for number, content in enumerate(f, start=1):
            where = f"{path}, line {number}"
            if not content.strip():
                continue
            try:
                line = json.loads(content)
            except (ValueError, RecursionError) as e:
                raise ValueError(f"{where}: expected a JSON object, found {e}") from e
            if not isinstance(line, dict):
                raise ValueError(f"{where}: expected a JSON object, found {line!r:.60}")
            lines.append((where, line))
    if not lines:
        raise ValueError(f"{path} has no lines, expected a JSON object in each")
    return lines


def located(where: str, action: Callable, *args):
    """What `action` gives. A ValueError says where."""
    try:
        return action(*args)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e


# ----------------------------------------------------------------------------------------------------------------------
# Scores
# ----------------------------------------------------------------------------------------------------------------------


def cut_to_context(given: list[int], target: list[int], encoder, n_ctx: int) -> tuple[list[int], int]:
    """(ids to score, how many of them are given): the last ones that fit; at least one is given."""
    if len(target) > n_ctx:
        raise ValueError(f"{len(target)} tokens to predict exceed the context of {n_ctx}; use a larger model")
    if not given and encoder.start_id is None:
        raise ValueError("nothing stands before what is to be predicted, and this vocabulary has no <|endoftext|>")
    ids = ((given or [encoder.start_id]) + target)[-n_ctx - 1 :]
    return ids, len(ids) - len(target)


def last_word_ids(encoder, example: LastWord) -> tuple[list[int], list[int]]:
    """(ids given, ids to predict). White space at the end of the context counts to the word, as tokens have it."""
    context = example.context.rstrip()
    given = encoder.encode(context, allow_special=True)
    whole = encoder.encode(example.context + example.target, allow_special=True)
    return given, whole[len(given) :]


def score_last_word(encoder, model, example: LastWord) -> tuple[float, bool]:
    """(log-probability of the target, whether each of its tokens is the likeliest)."""
    ids, n_given = cut_to_context(*last_word_ids(encoder, example), encoder, model.hparams["n_ctx"])
    scores, are_likeliest = score_rest(model, ids, n_given)
    return float(scores.sum(dtype=np.float64)), bool(are_likeliest.all())


def score_endings(encoder, model, example: Choice) -> list[np.ndarray]:
    """The log-probabilities of each ending's tokens. The context is computed once, and its keys and values are kept."""
    n_ctx = model.hparams["n_ctx"]
    given = encoder.encode(example.context, allow_special=True)
    targets = [encoder.encode(f" {ending}", allow_special=True) for ending in example.endings]
    texts = [cut_to_context(given, target, encoder, n_ctx) for target in targets]
    cache, fed = model.new_cache(n_seq=max(len(ids) for ids, _ in texts)), []
    scores = []
    for ids, n_given in texts:
        if ids[:n_given] != fed:  # one of them was cut
            cache.length = 0
        scores.append(score_rest(model, ids, n_given, cache)[0])
        fed = ids[:n_given]
    return scores


# ----------------------------------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------------------------------


def share(are_right: Sequence[bool]) -> str:
    """The mean and its standard error."""
    p, n = float(np.mean(are_right)), len(are_right)
    return f"{p:.4f} ± {math.sqrt(p * (1 - p) / max(1, n - 1)):.4f}"


def lambada(encoder, model, examples: Iterator[tuple[str, LastWord]]) -> dict[str, str]:
    scores, are_right = zip(
        *(located(where, score_last_word, encoder, model, example) for where, example in examples), strict=True
    )
    nats = -float(np.mean(scores))
    return {"accuracy": share(are_right), "perplexity": f"{math.exp(nats) if nats < 700 else math.inf:.2f}"}


def hellaswag(encoder, model, examples: Iterator[tuple[str, Choice]]) -> dict[str, str]:
    by_sum, by_mean = [], []
    for where, example in examples:
        scores = located(where, score_endings, encoder, model, example)
        by_sum.append(np.argmax([part.sum(dtype=np.float64) for part in scores]) == example.label)
        by_mean.append(np.argmax([part.mean(dtype=np.float64) for part in scores]) == example.label)
    return {"accuracy": share(by_sum), "normalised accuracy": share(by_mean)}


TASKS = {"lambada": (parse_last_word, lambada), "hellaswag": (parse_choice, hellaswag)}


def evaluate(
    model_size: str,
    file: str,
    models_dir: str | None = None,
    *,
    task: str | None = None,
    gelu: str | None = None,
    vocabulary: str | None = None,
):
    """Last words (LAMBADA) or endings (HellaSwag) of a local JSONL file: eval MODEL FILE [--task lambada|hellaswag]

    LAMBADA's lines are {"text": ...}, HellaSwag's {"ctx": ..., "endings": [...], "label": 0}; --task is what the first
    line looks like unless given. Accuracy with its standard error, and for OpenAI's models what is published of the
    whole test set. How it is counted: the head of benchmarks/evaluation.py. --gelu and --vocabulary are gpt2.py's.
    """
    lines = read_lines(file)
    task = task or ("hellaswag" if "endings" in lines[0][1] else "lambada")
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not known, expected {' or '.join(TASKS)}")
    parse, measure = TASKS[task]
    examples = [(where, located(where, parse, line)) for where, line in lines]  # all mistakes before the first pass
    encoder, model = gpt2.load_model(model_size, models_dir, gelu=gelu, vocabulary=vocabulary)
    found = measure(encoder, model, tqdm(examples, desc=task, unit=" lines", disable=None))
    published = PUBLISHED.get((task, model_size), {})
    column = f"published, n = {N_PUBLISHED[task]}"
    rows = [
        {"": name, "measured": value} | ({column: published.get(name, "")} if published else {})
        for name, value in found.items()
    ]
    print(f"{model_size}, {task}, n = {len(examples)} ({os.path.basename(file)})\n\n{as_markdown(rows)}")
