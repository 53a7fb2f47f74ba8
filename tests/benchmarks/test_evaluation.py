"""LAMBADA's and HellaSwag's figures are those of whole passes over made-up lines, one text at a time."""

import json
import math
import os
import shutil

import numpy as np
import pytest
from forms import small_encoder
from helpers import MODELS, random_model

from benchmarks import evaluation
from benchmarks.evaluation import (
    Choice,
    LastWord,
    evaluate,
    last_word_ids,
    parse_choice,
    parse_last_word,
    score_endings,
)
from encoder import Encoder

TEXTS = [
    "ROMEO: I will go to the king",
    "What is thy name? My name is",
    "KING RICHARD III: My lord, I am your friend",
    "to be, or not to  be",
    "the time\nis come to die.\n",
    "Alone",
]
CHOICES = [
    {"ctx": "The king is", "endings": ["dead.", "Dorset", "a man that is to be a king in the world"], "label": 0},
    {"ctx": "My lord, I will", "endings": ["not", "xylophone", "go to the king, and tell him so", "qqq"], "label": 2},
    {"ctx_a": "He was", "ctx_b": "", "activity_label": "Going", "endings": ["gone.", "to the"], "label": "1"},
    {"ctx_a": "O,", "ctx_b": "she", "endings": ["taught", "doth teach the king to be a man"], "label": 0},
]


def write_lines(path, lines):
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    return str(path)


def log_probabilities(logits, ids, n_given):
    """Of the ids from number n_given on, from the logits of all rows, and whether each is the likeliest."""
    logits = logits[n_given - 1 : len(ids) - 1].astype(np.float64)
    p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return p[np.arange(len(p)), ids[n_given:]], logits.argmax(axis=-1) == ids[n_given:]


def numpy_logits(model):
    return lambda ids: model.forward([ids], model.new_cache(), n_last=len(ids))[0]


def expected_lambada(encoder, logits_of, texts):
    nats, n_right = [], 0
    for text in texts:
        context, word = text[: text.rindex(" ")] if " " in text else "", text.split(" ")[-1]
        given = encoder.encode(context.rstrip()) or [encoder.eot_id]
        space = context[len(context.rstrip()) :]
        ids = given + encoder.encode(f"{space} {word}")
        scores, are_likeliest = log_probabilities(logits_of(ids), ids, len(given))
        nats.append(-scores.sum())
        n_right += are_likeliest.all()
    return n_right / len(texts), math.exp(np.mean(nats))


def expected_choices(encoder, logits_of, choices):
    by_sum, by_mean = [], []
    for choice in choices:
        context = choice.get("ctx") or " ".join(filter(None, (choice["ctx_a"], choice["ctx_b"])))
        given, sums, means = encoder.encode(context), [], []
        for ending in choice["endings"]:
            ids = given + encoder.encode(" " + ending)
            scores, _ = log_probabilities(logits_of(ids), ids, len(given))
            sums.append(scores.sum())
            means.append(scores.mean())
        by_sum.append(np.argmax(sums) == int(choice["label"]))
        by_mean.append(np.argmax(means) == int(choice["label"]))
    return np.mean(by_sum), np.mean(by_mean)


def figures(printed):
    """The numbers of the table by name, without their errors."""
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")][2:]
    return {row[0].strip(): float(row[1].split("±")[0]) for row in rows}


def test_lambada_equals_whole_passes(tiny, tmp_path, capsys):
    evaluate("tiny", write_lines(tmp_path / "l.jsonl", [{"text": text} for text in TEXTS]), MODELS)
    printed = capsys.readouterr().out
    accuracy, perplexity = expected_lambada(tiny[0], numpy_logits(tiny[1]), TEXTS)
    assert printed.startswith("tiny, lambada, n = 6 (l.jsonl)") and "published" not in printed
    assert figures(printed) == {"accuracy": round(accuracy, 4), "perplexity": pytest.approx(perplexity, rel=1e-3)}
    assert 0 < accuracy < 1


def test_hellaswag_equals_whole_passes(tiny, tmp_path, capsys):
    evaluate("tiny", write_lines(tmp_path / "h.jsonl", CHOICES), MODELS)
    accuracy, normalised = expected_choices(tiny[0], numpy_logits(tiny[1]), CHOICES)
    assert figures(capsys.readouterr().out) == {"accuracy": accuracy, "normalised accuracy": normalised}
    assert accuracy != normalised


@pytest.mark.xdist_group("matplotlib")  # where the other tests that import transformers are
def test_figures_equal_transformers(tiny, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    from benchmarks.peers import Transformers

    encoder, model = tiny
    theirs = Transformers(model).gpt2

    def logits_of(ids):
        with torch.inference_mode():
            return theirs(torch.tensor([ids])).logits[0].numpy()

    evaluate("tiny", write_lines(tmp_path / "l.jsonl", [{"text": text} for text in TEXTS]), MODELS)
    accuracy, perplexity = expected_lambada(encoder, logits_of, TEXTS)
    assert figures(capsys.readouterr().out) == {
        "accuracy": round(accuracy, 4),
        "perplexity": pytest.approx(perplexity, rel=1e-3),
    }
    evaluate("tiny", write_lines(tmp_path / "h.jsonl", CHOICES), MODELS)
    assert tuple(figures(capsys.readouterr().out).values()) == expected_choices(encoder, logits_of, CHOICES)


@pytest.mark.parametrize(("task", "lines"), [("lambada", [{"text": "a b"}]), ("hellaswag", CHOICES[:1])])
def test_published_figures_stand_beside_openais_models(task, lines, tmp_path, capsys):
    shutil.copytree(os.path.join(MODELS, "nano"), tmp_path / "124M")
    evaluate("124M", write_lines(tmp_path / "lines.jsonl", lines), str(tmp_path), task=task)
    printed = capsys.readouterr().out
    assert f"published, n = {evaluation.N_PUBLISHED[task]}" in printed
    for name, value in evaluation.PUBLISHED[task, "124M"].items():
        assert any(name in line and line.endswith(f"| {value} |") for line in printed.splitlines())


# ----------------------------------------------------------------------------------------------------------------------
# Where texts are cut
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "given", "target"),
    [
        ("the the", "the", " the"),
        ("a b", "a", " b"),
        ("a  b", "a", "  b"),  # as the harness does it: white space belongs to what follows
        ("a\n b\n", "a", "\n b\n"),
        ("word", "", " word"),
        (" word", "", " word"),
        ("a <|endoftext|>", "a", " <|endoftext|>"),
    ],
)
def test_the_last_word(text, given, target):
    encoder = small_encoder()
    ids = last_word_ids(encoder, parse_last_word({"text": text}))
    assert ids == (encoder.encode(given), encoder.encode(target, allow_special=True))


def test_long_texts_lose_their_beginning():
    encoder = small_encoder()
    model = random_model(n_vocab=encoder.n_vocab)  # a context of 24
    for n in (10, 22, 23, 24, 25, 60):
        ids = encoder.encode("x" * n + " ab")[-25:]
        scores, are_likeliest = log_probabilities(numpy_logits(model)(ids[:-1]), ids, len(ids) - 3)
        found = evaluation.score_last_word(encoder, model, LastWord("x" * n, " ab"))
        assert found == (pytest.approx(scores.sum(), abs=1e-4), are_likeliest.all())


def test_endings_share_their_context_also_where_it_is_cut():
    encoder = small_encoder()
    model = random_model(n_vocab=encoder.n_vocab)
    endings = ["a", "abcdefghijkl", "bc", "abcdefghijklmnopqrst", "c"]
    given = encoder.encode("abcabcxyzxyz")
    found = score_endings(encoder, model, Choice("abcabcxyzxyz", endings, 0))
    for ending, scores in zip(endings, found, strict=True):
        target = encoder.encode(" " + ending)
        ids = (given + target)[-25:]
        expected, _ = log_probabilities(numpy_logits(model)(ids[:-1]), ids, len(ids) - len(target))
        np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)


def test_what_does_not_fit_is_named():
    encoder, without_end = small_encoder(), small_encoder(())
    model = random_model(n_vocab=encoder.n_vocab)
    with pytest.raises(ValueError, match="25 tokens to predict exceed the context of 24"):
        evaluation.score_last_word(encoder, model, LastWord("a", " " + "x" * 24))
    with pytest.raises(ValueError, match="nothing stands before what is to be predicted"):
        evaluation.score_last_word(without_end, model, LastWord("", " x"))
    assert isinstance(without_end, Encoder) and without_end.start_id is None


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------

TEXT, CHOICE = '{"text": "a b"}', json.dumps(CHOICES[0])


@pytest.mark.parametrize(
    ("content", "task", "message"),
    [
        ("", None, "lines.jsonl has no lines"),
        (f"{TEXT}\n\n[1]\n", None, r"lines.jsonl, line 3: expected a JSON object, found \[1\]"),
        (f"{TEXT}\n{{", None, "line 2: expected a JSON object, found Expecting property name"),
        ("[" * 100_000, None, "line 1: expected a JSON object, found "),
        (f"{TEXT}\n{CHOICE}", None, 'line 2: "text" is None, expected a string'),
        ('{"text": 7}', None, 'line 1: "text" is 7'),
        ('{"text": "a b "}', None, "line 1: the text ends in white space, 'a b '"),
        ('{"text": ""}', None, "line 1: the text ends in white space, ''"),
        (f"{CHOICE}\n{TEXT}", None, 'line 2: no "ctx"'),
        (TEXT, "hellaswag", 'line 1: no "ctx"'),
        ('{"ctx": "a", "endings": [], "label": 0}', None, r'line 1: "endings" is \[\]'),
        ('{"ctx": "a", "endings": ["b", 1], "label": 0}', None, 'line 1: "endings" is '),
        ('{"ctx": "a", "endings": ["b"], "label": 1}', None, 'line 1: "label" is 1, expected .* 0 to 0'),
        ('{"ctx": "a", "endings": ["b"], "label": ""}', None, "line 1: \"label\" is ''"),
        ('{"ctx": "a", "endings": ["b"], "label": true}', None, 'line 1: "label" is True'),
        (TEXT, "race", "task 'race' is not known, expected lambada or hellaswag"),
    ],
)
def test_a_bad_line_is_named_before_the_model_is_loaded(content, task, message, tmp_path):
    (tmp_path / "lines.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluate("none", str(tmp_path / "lines.jsonl"), str(tmp_path), task=task)


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    (tmp_path / "lines.jsonl").write_bytes(TEXT.encode() + b'\n{"text": "\xff b"}\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        evaluate("nano", str(tmp_path / "lines.jsonl"), MODELS)


def test_a_line_that_does_not_fit_is_named(tmp_path):
    lines = [{"text": "a b"}, {"text": "a " + "é" * 600}]
    with pytest.raises(ValueError, match="lines.jsonl, line 2: .* tokens to predict exceed the context of 512"):
        evaluate("nano", write_lines(tmp_path / "lines.jsonl", lines), MODELS)


def test_contexts_in_two_parts():
    choice = {"endings": ["x"], "label": "0"}
    assert parse_choice(choice | {"ctx_a": "A man.", "ctx_b": "he"}).context == "A man. he"
    assert parse_choice(choice | {"ctx_a": "A man.", "ctx_b": ""}).context == "A man."
    assert parse_choice(choice | {"ctx_a": "A", "ctx_b": "b", "ctx": "C"}) == ("C", ["x"], 0)
