"""The command line as a user meets it: its streams and its status, of a process where that matters."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import takewhile

import pytest
from helpers import MODELS, ROOT, latest, outcome, run, run_here
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2
import speculative
from console import command
from console.arguments import parse_arguments

GPT2 = ("gpt2.py", "--model_size=nano", "--n_tokens_to_generate=8")


def text_after(encoder_and_model, prompt, n_tokens=8):
    encoder, model = encoder_and_model
    ids = encoder.encode(prompt, allow_special=True) or [encoder.eot_id]
    return encoder.decode(takewhile(lambda i: i != encoder.eot_id, gpt2.generate(model, ids, n_tokens)))


AS_PROCESSES = ("", "a b", "\\n", "日本🙂")  # what a system could change on the way


@pytest.mark.parametrize(
    "prompt",
    ["ROMEO:", "123", "1+1", "a,b", "{x}", "[1, 2]", "None", "True", "'q'", "a b", "-5", "", "#", "\\n", "日本🙂"],
)
def test_the_prompt_arrives_as_typed(nano, prompt):
    done = (run if prompt in AS_PROCESSES else run_here)(*GPT2, prompt)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", text_after(nano, prompt))


@pytest.mark.parametrize("args", [["--prompt", "--x"], ["--prompt=--x"], ["--", "--x"]])
def test_a_prompt_may_begin_with_dashes(nano, args):
    done = run_here(*GPT2, *args)
    assert (done.returncode, done.stdout) == (0, text_after(nano, "--x"))


@pytest.mark.parametrize("prompt", ["-h", "--help"])
@pytest.mark.parametrize("flags", [["--prompt"], ["--"], ["--stop", "--help", "--"]])
def test_a_value_that_looks_like_help_is_a_value(nano, flags, prompt):
    done = run_here(*GPT2, *flags, prompt)
    assert (done.returncode, done.stdout) == (0, text_after(nano, prompt))


@pytest.mark.parametrize("words", [["true", "YES", "on", "1"], ["false", "No", "off", "0"]])
def test_yes_or_no_flags_take_a_word(words):
    for word in words:
        assert parse_arguments(gpt2.main, ["x", f"--json={word}"])["json"] is (words[0] == "true")


@pytest.mark.parametrize("args", [[], ["-"]])
@pytest.mark.parametrize("typed", ["To be", "To be\n", "To be\r\n"])
def test_stdin_is_read_less_its_line_end(nano, args, typed):
    done = run_here(*GPT2, *args, stdin=typed)
    assert (done.returncode, done.stdout) == (0, text_after(nano, "To be"))


def test_stats_before_the_prompt_go_to_stderr(nano):
    done = run_here("gpt2.py", "--stats", "ROMEO:", "--model_size", "nano", "--n_tokens_to_generate", "8")
    assert (done.returncode, done.stdout) == (0, text_after(nano, "ROMEO:"))
    for word in ("load", "prefill", "decode", "tokens/s", "GB/s", "memory"):
        assert word in done.stderr


def test_stats_of_one_token():
    done = run_here("gpt2.py", "ROMEO:", "--model_size=nano", "--n_tokens_to_generate=1", "--stats")
    assert done.returncode == 0 and "prefill" in done.stderr and "decode" not in done.stderr


FLAGS = [
    "prompt",
    "n_tokens_to_generate",
    "stats",
    "n_draft",
    "n_gram",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "verify",
]
FLAGS += ["drafter", "models_dir", "model_size", "help", "separator", "interactive", "completion", "trace", "nostats"]
VALUES = st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**400, "1e-320", "0x" + "f" * 9000])
ARGUMENTS = (
    st.sampled_from(
        ["", "-", "--", "-h", "-n", "-s", "---", "--=1", "x", "1", "0", "-1", "2.5", "1e999", "nan", "nano"]
    )
    | st.sampled_from(["None", "True", "[1, {}]", "{[]: 1}", "{{}}", "(" * 300, "-" * 5000 + "1", "9" * 5000, "1e-320"])
    | st.sampled_from(
        ["__doc__", "__class__", "__init_subclass__", "mro", "a\nb", "\x1b[2J", "\udcff", "lookup", "both"]
    )
    | st.sampled_from(FLAGS).map("--{}".format)
    | st.builds("--{}={}".format, st.sampled_from(FLAGS), VALUES)
    | st.text(st.characters(exclude_characters="\0/"), max_size=10)
)


@settings(max_examples=300)
@given(st.sampled_from([gpt2.main, speculative.main]), st.lists(ARGUMENTS, max_size=6))
def test_any_arguments_are_understood_or_refused_in_one_line(program, argv):
    argv = [arg for arg in argv if arg not in ("-h", "--help")]  # command.run answers these itself
    status, out, err = outcome(lambda: parse_arguments(program, argv))
    assert out == ""
    assert (status, err) == (0, "") or (status == 2 and err.count("\n") == 1 and err.startswith("error: "))


@pytest.fixture(scope="module")
def folder_with_nano(tmp_path_factory):
    folder = tmp_path_factory.mktemp("arguments")
    shutil.copytree(os.path.join(MODELS, "nano"), folder / "models" / "nano")
    return folder


BASE = ["--n_tokens_to_generate=3", "--model_size=nano"]
SPECULATIVE_BASE = ["--n_tokens_to_generate=3", "--target_model_size=nano", "--draft_model_size=nano"]


@settings(max_examples=150)
@given(st.booleans(), st.lists(ARGUMENTS, max_size=5))
def test_any_arguments_give_a_run_or_one_line(folder_with_nano, is_speculative, argv):
    program, base = (speculative.main, SPECULATIVE_BASE) if is_speculative else (gpt2.main, BASE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder_with_nano)
        patch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
        patch.setattr(sys, "argv", ["gpt2.py", *latest([*base, *argv])])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a prompt")))
        status, out, err = outcome(lambda: command.run(program))
    assert status == 0 or (status in (1, 2) and out == "" and err.count("\n") == 1 and err.startswith("error: "))


def test_the_embedded_models_are_found_from_any_folder(nano, tmp_path):
    done = run(os.path.join(ROOT, "gpt2.py"), "x", *GPT2[1:], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, text_after(nano, "x"))
    code = "from gpt2 import load_model; print(load_model('nano')[1].hparams['n_layer'])"
    done = run("-c", code, cwd=tmp_path, env={"PYTHONPATH": ROOT})
    assert (done.stdout, os.listdir(tmp_path)) == ("2\n", [])


def test_help_is_the_whole_manual():
    done = run_here("gpt2.py", "--help")
    assert done.returncode == 0
    for flag in ("--n_tokens_to_generate 40", "--model_size 124M", "--models_dir models", "--stats"):
        assert flag in done.stdout


def test_no_network_is_one_line(tmp_path):
    env = {"GPT2_BASE_URL": "http://127.0.0.1:9"}
    done = run_here("gpt2.py", "x", "--models_dir", tmp_path, env=env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "cannot fetch http://127.0.0.1:9/124M/" in done.stderr and "--model_size tiny works offline" in done.stderr


def test_a_damaged_model_is_one_line(tmp_path):
    shutil.copytree(os.path.join(MODELS, "nano"), tmp_path / "broken")
    os.truncate(tmp_path / "broken" / "model.ckpt.data-00000-of-00001", 1000)
    done = run_here("gpt2.py", "x", "--models_dir", tmp_path, "--model_size", "broken")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "has 1000 bytes, expected 1055744" in done.stderr


def test_it_runs_from_another_folder(nano, tmp_path):
    done = run_here(os.path.join(ROOT, "gpt2.py"), "x", *GPT2[1:], "--models_dir", MODELS, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, text_after(nano, "x"))


LONG = [sys.executable, "gpt2.py", "ROMEO:", "--model_size", "tiny", "--n_tokens_to_generate", "500"]


def test_a_closed_pipe_ends_it_quietly():
    with subprocess.Popen(LONG, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert len(process.stdout.read(20)) == 20
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 128 + signal.SIGPIPE


def test_interrupt_ends_it_quietly():
    with subprocess.Popen(LONG, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
        assert process.wait(60) == 128 + signal.SIGINT


def test_text_streams():
    """The first character arrives well before the last."""
    with subprocess.Popen(LONG, stdout=subprocess.PIPE, cwd=ROOT) as process:
        process.stdout.read(1)
        first = time.perf_counter()
        process.stdout.read()
        assert time.perf_counter() - first > 0.05  # 500 tokens take ten times that


def test_import_is_light():
    code = "import sys, gpt2; print(*sys.modules)"
    modules = run("-c", code).stdout.split()
    assert "numpy" in modules
    assert not {"tensorflow", "requests", "pytest", "matplotlib", "tqdm", "fire", "google_crc32c"} & set(modules)


def test_only_the_five_named_packages_are_needed(nano):
    """README: generating needs numpy, regex, requests, tqdm and fire."""
    others = ["tensorflow", "google_crc32c", "tokenizers", "matplotlib", "threadpoolctl", "pytest"]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import gpt2; gpt2.command.run(gpt2.main)"
    done = run("-c", code, "x", *GPT2[1:])
    assert (done.returncode, done.stdout) == (0, text_after(nano, "x"))


def test_without_docstrings_there_is_a_manual_or_a_word():
    assert run("-OO", "gpt2.py", "--help").stdout == run_here("gpt2.py", "--help").stdout
    for args in (("utils.py", "--help"), ("utils.py", "verify", "--help"), ("-m", "benchmarks", "rows", "--help")):
        done = run("-OO", *args)
        assert done.returncode == 0 and "run without -OO" in done.stdout


def test_an_old_numpy_is_named():
    done = run("-c", "import numpy; numpy.__version__ = '1.26.4'; del numpy.vecdot; import gpt2")
    assert "NumPy 2.0 or newer is needed, this is 1.26.4" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("package", "line"),
    [
        (
            "numpy.__version__ = '1.26.4'; del numpy.vecdot",
            "NumPy 2.0 or newer is needed, this is 1.26.4; pip install --",
        ),
        (
            "import sys; sys.modules['regex'] = None",
            "regex halted; None in sys.modules; pip install -r requirements-gen",
        ),
    ],
)
def test_a_package_that_is_old_or_missing_is_one_line(tmp_path, package, line):
    (tmp_path / "sitecustomize.py").write_text(f"import numpy; {package}")
    done = run("gpt2.py", "x", "--model_size=nano", env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and line in done.stderr
