"""Every flag of gpt2.py and speculative.py through the command line, in this process; test_streams.py starts some."""

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from itertools import takewhile

import numpy as np
import pytest
from bundles import write_bundle
from drafting import PAIR
from helpers import MODELS, ROOT, run_here

from checkpoints.tensorflow import read_checkpoint
from console import modes
from decoding.beam import beam_search
from decoding.sampling import make_sampler
from decoding.scoring import score
from gpt2 import generate

NANO = ("gpt2.py", "--model_size=nano")
NANO_PAIR = ("speculative.py", "--target_model_size=nano", "--draft_model_size=nano")
PROMPT = "ROMEO:\nI"


def ids_after(encoder_and_model, prompt, n_tokens, *args, **options):
    encoder, model = encoder_and_model
    return list(generate(model, encoder.encode_prompt(prompt), n_tokens, *args, **options))


def text_after(encoder_and_model, prompt, n_tokens, *args, **options):
    encoder, _ = encoder_and_model
    ids = ids_after(encoder_and_model, prompt, n_tokens, *args, **options)
    return encoder.decode(takewhile(lambda i: i != encoder.eot_id, ids))


def out_of(*args, **options):
    done = run_here(*args, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


SAMPLINGS = [
    {"temperature": 0.9, "seed": 1},
    {"temperature": 1.5, "top_k": 20, "seed": 2},
    {"temperature": 1.5, "top_p": 0.7, "seed": 3},
    {"temperature": 1.5, "min_p": 0.1, "seed": 4},
    {"temperature": 0, "repetition_penalty": 1.5},
]


@pytest.mark.parametrize("flags", SAMPLINGS, ids=lambda flags: list(flags)[-2])
def test_tokens_are_chosen_as_the_flags_say(nano, flags):
    found = out_of(*NANO, PROMPT, *(f"--{name}={value}" for name, value in flags.items()))
    assert found == text_after(nano, PROMPT, 40, make_sampler(**flags))
    assert found != text_after(nano, PROMPT, 40)


def test_without_a_seed_texts_differ():
    flags = (*NANO, PROMPT, "--temperature=1")
    assert out_of(*flags) != out_of(*flags)


@pytest.mark.parametrize("program", [NANO, (*PAIR, "--drafter=lookup")], ids=["gpt2", "speculative"])
def test_texts_end_before_a_stop(tiny, nano, program):
    flags = (*program, PROMPT, "--n_tokens_to_generate=60")
    whole = text_after(nano if program is NANO else tiny, PROMPT, 60)
    stops = whole[20:26], whole[31:33]  # wherever their tokens begin
    assert out_of(*flags, "--stop", stops[0]) == whole[: whole.index(stops[0])]
    expected = whole[: min(whole.index(stop) for stop in stops)]
    assert out_of(*flags, "--stop", stops[1], f"--stop={stops[0]}") == expected
    assert out_of(*flags, "--stop", "never said") == whole


@pytest.mark.parametrize("program", [NANO, (*PAIR, "--drafter=lookup")], ids=["gpt2", "speculative"])
def test_ignore_eot_goes_on(nano, tiny, program):
    pair = nano if program is NANO else tiny
    encoder, _ = pair
    flags = {"temperature": 2.0, "top_k": 2048}
    seed = next(
        s for s in range(200) if encoder.eot_id in ids_after(pair, PROMPT, 60, make_sampler(**flags, seed=s))[:-1]
    )
    ids = ids_after(pair, PROMPT, 60, make_sampler(**flags, seed=seed))
    args = (*program, PROMPT, "--n_tokens_to_generate=60", "--temperature=2", "--top_k=2048", f"--seed={seed}")
    assert out_of(*args) == encoder.decode(ids[: ids.index(encoder.eot_id)])
    assert out_of(*args, "--ignore_eot") == encoder.decode(ids)


@pytest.mark.parametrize(("flags", "slide_by"), [([], 256), (["--slide_by", "100"], 100), (["--slide_by=512"], 512)])
def test_overflow_slides(nano, flags, slide_by):
    found = out_of(*NANO, PROMPT, "--n_tokens_to_generate=700", "--overflow", "slide", "--ignore_eot", *flags)
    assert found == nano[0].decode(ids_after(nano, PROMPT, 700, slide_by=slide_by))


def test_speculation_slides_too(nano):
    flags = ["--n_tokens_to_generate=560", "--overflow=slide", "--slide_by=50", "--ignore_eot", "--verify"]
    done = run_here(*NANO_PAIR, PROMPT, *flags, "--n_draft=4")
    assert done.returncode == 0 and "verified: 560 tokens identical" in done.stderr
    assert done.stdout == nano[0].decode(ids_after(nano, PROMPT, 560, slide_by=50))


def test_samples_are_the_texts_of_their_seeds(nano):
    """More than are computed at once, some of them ended early by a stop."""
    flags = (PROMPT, "--n_tokens_to_generate=20", "--temperature=1", "--seed=7", "--stop=the")
    texts = [text_after(nano, PROMPT, 20, make_sampler(1, seed=7 + i)).split("the")[0] for i in range(10)]
    lines = out_of(*NANO, *flags, "--n_samples=10", "--json").splitlines()
    expected = [{"sample": i + 1, "seed": 7 + i, "text": text} for i, text in enumerate(texts)]
    assert [json.loads(line) for line in lines] == expected and len(set(texts)) == 10
    found = out_of(*NANO, *flags, "--n_samples", "2")
    assert found == f"=== sample 1 ===\n{texts[0]}\n=== sample 2 ===\n{texts[1]}\n"
    assert out_of(*NANO, *flags) == texts[0]


def test_samples_slide(nano):
    flags = ("--n_samples=2", "--overflow=slide", "--n_tokens_to_generate=600", "--temperature=1", "--seed=1", "--json")
    lines = out_of(*NANO, PROMPT, *flags, "--ignore_eot").splitlines()
    expected = [ids_after(nano, PROMPT, 600, make_sampler(1, seed=s), slide_by=256) for s in (1, 2)]
    assert [json.loads(line)["text"] for line in lines] == [nano[0].decode(ids) for ids in expected]


def test_seeds_begin_anew_after_the_last():
    flags = ("--n_samples=2", "--n_tokens_to_generate=3", "--temperature=1", f"--seed={2**64 - 1}", "--json")
    assert [json.loads(line)["seed"] for line in out_of(*NANO, PROMPT, *flags).splitlines()] == [2**64 - 1, 0]


@pytest.mark.parametrize("penalty", [1.0, 0.0])
def test_beams(nano, penalty):
    encoder, model = nano
    beams = beam_search(model, encoder.encode(PROMPT), 12, 3, penalty, encoder.eot_ids)
    flags = (*NANO, PROMPT, "--n_beam", "3", "--length_penalty", str(penalty), "--n_tokens_to_generate=12")
    assert out_of(*flags) == encoder.decode(beams[0][1])
    lines = [json.loads(line) for line in out_of(*flags, "--json").splitlines()]
    assert [line["text"] for line in lines] == [encoder.decode(ids) for _, ids in beams]
    np.testing.assert_allclose([line["score"] for line in lines], [value for value, _ in beams], atol=1e-5)


def test_json_is_one_object():
    assert json.loads(out_of(*NANO, PROMPT, "--json")) == {"text": out_of(*NANO, PROMPT)}


# ----------------------------------------------------------------------------------------------------------------------
# Looking closer
# ----------------------------------------------------------------------------------------------------------------------


def test_top_shows_the_likeliest_tokens(nano):
    encoder, model = nano
    flags = ("--n_tokens_to_generate=6", "--top=4", "--temperature=1", "--seed=3")
    sample = make_sampler(1, seed=3)
    ids = ids_after(nano, PROMPT, 6, sample)
    done = run_here(*NANO, PROMPT, *flags, "--json")
    assert (done.returncode, done.stdout) == (0, encoder.decode(ids))
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["id"] for line in lines] == ids
    prompt_ids = encoder.encode(PROMPT)
    for n, line in enumerate(lines):
        logits = model.forward([prompt_ids + ids[:n]], model.new_cache())[0, 0].astype(np.float64)
        probabilities = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-probabilities)[:4]
        assert [token["id"] for token in line["top"]] == best.tolist()
        np.testing.assert_allclose([token["probability"] for token in line["top"]], probabilities[best], rtol=1e-4)
        np.testing.assert_allclose(line["probability"], probabilities[ids[n]], rtol=1e-4)
        assert line["token"] == encoder.decode([ids[n]])
    table = run_here(*NANO, PROMPT, *flags)
    assert table.stdout == done.stdout
    for row, line in zip(table.stderr.splitlines(), lines, strict=True):
        assert repr(line["token"]) in row and row.count("%") == 5
        assert f"{line['top'][0]['probability']:.1%}" in row


def test_scores_of_a_short_file(nano, tmp_path):
    encoder, model = nano
    text = "ROMEO:\nI'll tell thee, sir. 日本\n"
    (tmp_path / "text").write_text(text, encoding="utf-8")
    ids = encoder.encode(text)
    nats = -score(model, ids).mean(dtype=np.float64)
    n_bytes = len(text.encode()) - len(encoder.token_bytes(ids[0]))
    found = json.loads(out_of(*NANO, "--score", tmp_path / "text", "--json"))
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, n_bytes)
    np.testing.assert_allclose(found["cross_entropy"], nats, atol=1e-4)
    np.testing.assert_allclose(found["perplexity"], np.exp(nats), atol=0.01)
    np.testing.assert_allclose(found["bits_per_byte"], nats * (len(ids) - 1) / np.log(2) / n_bytes, atol=1e-4)
    line = out_of(*NANO, "--score=-", stdin=text)
    assert line == out_of(*NANO, "--score", tmp_path / "text") and line.count("\n") == 1
    for name in ("cross_entropy", "perplexity", "bits_per_byte", "tokens"):
        assert str(found[name]) in line


def test_a_smaller_stride_sees_more(tmp_path):
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        (tmp_path / "text").write_text(f.read()[:3000], encoding="utf-8")
    flags = (*NANO, "--score", tmp_path / "text", "--json")
    whole, half = (json.loads(out_of(*flags, *more)) for more in ([], ["--stride", "100"]))
    assert whole["tokens"] == half["tokens"] > 1024 and half["cross_entropy"] < whole["cross_entropy"]
    assert out_of(*flags, "--stride=512") == out_of(*flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a text of 0 tokens, expected 2 or more"),
        (b"a", "a text of 1 tokens, expected 2 or more"),
        (b"good \xff bad", "is not UTF-8 text (invalid start byte at byte 5)"),
        (None, "No such file"),
    ],
)
def test_a_file_that_cannot_be_scored_is_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    refused(run_here(*NANO, "--score", tmp_path / "text"), message)


def test_a_closed_stdin_cannot_be_scored():
    command = f'"{sys.executable}" {" ".join(NANO)} --score - <&-'
    refused(subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT), "stdin is closed")


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes
# ----------------------------------------------------------------------------------------------------------------------


def refused(done, message, status=1):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1), done.stderr
    assert message in done.stderr and done.stderr.startswith("error: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--stride=0"], "stride is 0"), (["--stride=513"], "a whole number from 1 to 512"), (["--stride=x"], "'x'")],
)
def test_a_bad_stride_is_one_line(flags, message):
    refused(run_here(*NANO, "--score=README.md", *flags), message)


@pytest.mark.parametrize("flag", ["stop", "overflow", "slide_by", "n_samples", "n_beam", "top", "score", "stride"])
def test_a_flag_without_its_value_is_one_line(flag):
    refused(run_here(*NANO, "x", f"--{flag}"), f"--{flag} needs a value", status=2)


@pytest.fixture(scope="module")
def broken_models(tmp_path_factory):
    """A folder with `broken`: nano with a NaN and an infinity in one tensor."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(os.path.join(MODELS, "nano"), folder / "broken")
    variables = {
        name: np.array(value) for name, value in read_checkpoint(str(folder / "broken" / "model.ckpt")).items()
    }
    variables["model/h1/mlp/c_fc/w"][0, 3, 5:7] = np.nan, np.inf
    write_bundle(str(folder / "broken" / "model.ckpt"), variables)
    return folder


@pytest.mark.parametrize("flags", [[], ["--n_samples=2"], ["--n_beam=2"], ["--top=2"], ["--temperature=1"]])
def test_weights_that_are_no_numbers_are_one_line(broken_models, flags):
    done = run_here("gpt2.py", "--model_size=broken", "--models_dir", broken_models, PROMPT, *flags)
    refused(done, "2 of 16384 numbers are NaN or infinite in blocks/1/mlp/c_fc/w")


def test_the_same_with_a_file_to_score_and_with_speculation(broken_models):
    model = ("--models_dir", broken_models)
    refused(run_here("gpt2.py", "--model_size=broken", *model, "--score=README.md"), "in blocks/1/mlp/c_fc/w")
    pair = ("speculative.py", "--target_model_size=broken", "--draft_model_size=broken")
    refused(run_here(*pair, *model, PROMPT), "in blocks/1/mlp/c_fc/w")


def test_the_manual_names_every_flag():
    for program in ("gpt2", "speculative"):
        manual = out_of(f"{program}.py", "--help")
        names = list(inspect.signature(importlib.import_module(program).main).parameters)
        assert len(names) > 15 and not [name for name in names[1:] if f"--{name}" not in manual]


def test_an_infinite_perplexity_is_no_number_in_json(nano, monkeypatch, capsys):
    monkeypatch.setattr("decoding.scoring.log_probabilities", lambda model, ids, stride: np.full(len(ids) - 1, -800.0))
    modes.write_score(nano[1], nano[0], "to be or not to be", 512, True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["perplexity"] is None
