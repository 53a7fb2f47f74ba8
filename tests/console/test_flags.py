"""A mistake in the flags, whichever and of whichever program, is one line on stderr and a status."""

import sys

import pytest
from helpers import ROOT, outcome

import gpt2
import speculative
from console import command

GPT2 = ("gpt2.py", "--model_size=nano")
LOOKUP = ("speculative.py", "--target_model_size=tiny", "--drafter=lookup")
PAIR = ("speculative.py", "--target_model_size=tiny", "--draft_model_size=nano")
# What both programs refuse: the arguments and a part of the message.
SHARED = [
    (["--temperature=-1"], "temperature is -1"),
    (["--top_k=-1"], "top_k is -1"),
    (["--top_p=0"], "top_p is 0"),
    (["--min_p=2"], "min_p is 2"),
    (["--repetition_penalty=x"], "repetition_penalty is 'x'"),
    (["--seed=-1"], "seed is -1"),
    (["--stop="], "stop is '', expected a text of one character or more"),
    (["--overflow=wrap"], "overflow is 'wrap', expected error or slide"),
    (["--slide_by=3"], "slide_by is 3, expected none unless --overflow slide is given too"),
    (["--overflow=slide", "--slide_by=0"], "slide_by is 0, expected a whole number of 1 or more"),
    (["--overflow=slide", "--slide_by=513"], "slide_by is 513"),
    (["--overflow=slide", "--slide_by=half"], "slide_by is 'half'"),
    (["--n_tokens_to_generate=600"], "exceed the context of 512"),
]
OF_GPT2 = [
    (["--n_samples=0"], "n_samples is 0, expected a whole number of 1 or more"),
    (["--n_beam=0"], "n_beam is 0, expected a whole number of 1 or more"),
    (["--n_beam=3000"], "n_beam is 3000, expected a whole number from 1 to 2048"),
    (["--n_beam=2", "--length_penalty=11"], "length_penalty is 11, expected a number from -10 to 10"),
    (["--length_penalty=2"], "length_penalty is 2, expected 1 unless --n_beam is above 1"),
    (["--top=-1"], "top is -1"),
    (["--top=all"], "top is 'all'"),
    (["--stride=5"], "stride is 5, expected none unless --score FILE is given too"),
    (["--n_samples=2", "--n_beam=2"], "--n_samples and --n_beam do not go together; choose one of them"),
    (["--n_samples=2", "--top=2"], "--n_samples and --top do not go together"),
    (["--n_samples=2", "--stats"], "--n_samples and --stats do not go together"),
    (["--n_beam=2", "--temperature=1"], "--n_beam and --temperature do not go together"),
    (["--n_beam=2", "--repetition_penalty=2"], "--n_beam and --repetition_penalty do not go together"),
    (["--n_beam=2", "--overflow=slide"], "--n_beam and --overflow do not go together"),
    (["--interactive", "--score=README.md"], "--interactive and --score do not go together"),
    (["--interactive", "--stats"], "--interactive and --stats do not go together"),
    (["--interactive", "--top=1"], "--interactive and --top do not go together"),
    (["--interactive", "--json"], "--interactive and --json do not go together"),
    (["--score=README.md"], "--score and --prompt do not go together"),
]
OF_SPECULATIVE = [
    (["--n_draft", "-1"], "n_draft is -1, expected a whole number of 0 or more"),
    (["--n_draft", "x"], "n_draft is 'x'"),
    (["--n_gram", "0"], "n_gram is 0, expected a whole number from 1 to 100"),
    (["--n_gram", "100000000"], "n_gram is 100000000, expected a whole number from 1 to 100"),
    (["--target_model_size=124M", "--n_tokens_to_generate=1025"], "exceed the context of 1024"),
    (["--drafter", "oracle"], "drafter is 'oracle', expected model, lookup or both"),
    (["--temperature", "-1"], "temperature is -1"),
    (["--top_p", "2"], "top_p is 2"),
    (["--min_p", "2"], "min_p is 2"),
    (["--repetition_penalty", "0"], "repetition_penalty is 0"),
    (["--seed", "1.5"], "seed is 1.5"),
    (["--n_tokens_to_generate", "0"], "0 tokens to generate"),
    (["--n_tokens_to_generate", "600"], "exceed the context of 512"),
    (["--draft_model_size", "125M"], "no model '125M'"),
]
# The same with the status.
OF_ARGUMENTS = [
    (["x", "--n_tokens_to_generate", "0"], "0 tokens to generate, expected a whole number of 1 or more", 1),
    (["x", "--n_tokens_to_generate", "-5"], "-5 tokens to generate", 1),
    (["x", "--n_tokens_to_generate", "many"], "'many' tokens to generate", 1),
    (["x", "--n_tokens_to_generate", "2.5"], "2.5 tokens to generate", 1),
    (["x", "--n_tokens_to_generate"], "--n_tokens_to_generate needs a value", 2),
    (["x", "--n_tokens_to_generate", "9999"], "9999 new ones exceed the context of 512", 1),
    (["x", "--model_size=124M", "--n_tokens_to_generate=1025"], "1025 new ones exceed the context of 1024", 1),
    (["x", "--model_size=1558M", "--overflow=slide", "--slide_by=1025"], "slide_by is 1025, expected a whole", 1),
    (["x", "--model_size=355M", "--n_beam=2", "--length_penalty=11"], "length_penalty is 11, expected a number", 1),
    (["x", "--model_size=774M", "--overflow=slide", "--slide_by=-1"], "slide_by is -1, expected a whole number", 1),
    (["x", "--model_size", "125M"], "no model '125M': OpenAI's sizes are 124M, 355M, 774M, 1558M; ", 1),
    (["x", "--models_dir", "/nowhere", "--model_size", "tiny"], "no model 'tiny'", 1),
    (["x", "--temprature", "1"], "no flag --temprature, did you mean --temperature?", 2),
    (["two", "prompts"], "Could not consume arg: prompts", 2),
    (["x", "--json=maybe"], "--json=maybe: expected true or false, or no value", 2),
    (["x", "-j"], "no flag -j", 2),
    (["x", "-s", "5"], "no flag -s", 2),
    (["x", "--seed=1", "--seed", "2"], "--seed is given 2 times, expected once", 2),
    (["x", "--stats", "--stats"], "--stats is given 2 times", 2),
    (["x", "--model-sise=nano"], "no flag --model-sise, did you mean --model_size?", 2),
    (["x", "--xyzzy"], "no flag --xyzzy;", 2),
    (["--", "my", "prompt"], "2 arguments after --, expected one; put quotes around the text", 2),
    (["--"], "0 arguments after --", 2),
    (["--prompt=x", "--", "y"], "--prompt is given 2 times", 2),
    (["-x"], "-- stands before text that begins with a dash", 2),
]
CASES = [(program, ["x", *flags], message, 1) for flags, message in SHARED for program in (GPT2, LOOKUP)]
CASES += [(GPT2, ["x", *flags], message, 1) for flags, message in OF_GPT2]
CASES += [(PAIR, ["x", *flags], message, 1) for flags, message in OF_SPECULATIVE]
CASES += [(("gpt2.py", "--model_size=tiny"), *case) for case in OF_ARGUMENTS]


@pytest.mark.parametrize(("program", "args", "message", "status"), CASES)
def test_a_mistake_is_one_line(program, args, message, status, monkeypatch):
    """The whole program but its process, which test_streams.py and others start."""
    monkeypatch.chdir(ROOT)
    given = {arg.partition("=")[0] for arg in args}
    monkeypatch.setattr(sys, "argv", [*(arg for arg in program if arg.partition("=")[0] not in given), *args])
    main = gpt2.main if program[0] == "gpt2.py" else speculative.main
    found, out, err = outcome(lambda: command.run(main))
    assert (found, out, err.count("\n")) == (status, "", 1), err
    assert message in err and err.startswith("error: ")
