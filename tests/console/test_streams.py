"""Streams that are closed, full or read by nobody."""

import contextlib
import json
import os
import signal
import sys

import pytest
from helpers import run, run_here
from processes import FROM_STDIN, GPT2, SHORT, SHORT_SPECULATIVE, finish, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and descriptors of POSIX")


@pytest.fixture
def broken_pipe():
    """The end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    yield write
    os.close(write)


WRITERS = [
    SHORT,
    [*SHORT, "--n_samples=3"],
    [*SHORT, "--n_beam=2", "--json"],
    [*FROM_STDIN, "--interactive"],
    [*FROM_STDIN, "--score=README.md"],
    [*SHORT, "--top=2"],
    ["gpt2.py", "--help"],
    SHORT_SPECULATIVE,
    [*SHORT_SPECULATIVE, "--verify", "--stats"],
    ["-m", "benchmarks", "--help"],
]


def finish_with(args, stdin=b"hello\n", **streams):
    process = start(*args, **streams)
    with contextlib.suppress(BrokenPipeError), process.stdin as stream:
        stream.write(stdin)
    process.stdin = None
    return finish(process)


@pytest.mark.parametrize("args", WRITERS, ids=" ".join)
def test_a_pipe_that_nobody_reads(args, broken_pipe):
    status, _, err = finish_with(args, stdout=broken_pipe)
    assert status == 128 + signal.SIGPIPE and b"Traceback" not in err and b"error" not in err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("args", WRITERS, ids=" ".join)
def test_a_full_disk(args):
    with open("/dev/full", "wb") as full:
        status, _, err = finish_with(args, stdout=full)
    assert status == 1 and err.splitlines()[-1] == b"error: cannot write the text: No space left on device"
    assert b"Traceback" not in err


def test_a_limit_on_file_size(tmp_path):
    import resource

    args = [*GPT2[:-1], "--n_tokens_to_generate=100"]
    _, whole, _ = finish(start(*args))
    with open(tmp_path / "text", "wb") as f:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))  # noqa: E731
        status, _, err = finish(start(*args, stdout=f, preexec_fn=limit))
    assert (status, err) == (1, b"error: cannot write the text: File too large\n")
    assert (tmp_path / "text").read_bytes() == whole[:50]


MISTAKES = [([SHORT[0], "x", "--model_size=none"], 1), ([*SHORT, "--misspelt"], 2), ([*SHORT, "--n_draft"], 2)]


@pytest.mark.parametrize(("args", "status"), MISTAKES, ids=str)
def test_a_mistake_keeps_its_status_where_it_cannot_be_said(args, status, broken_pipe):
    assert finish_with(args, stderr=broken_pipe)[:2] == (status, b"")
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            assert finish_with(args, stderr=full)[:2] == (status, b"")
    assert finish_closing("2", args)[:2] == (status, b"")


def finish_closing(descriptors, args):
    return finish_with(args, preexec_fn=lambda: [os.close(int(d)) for d in descriptors])


@pytest.mark.parametrize("closed", ["0", "1", "2", "01", "02", "12", "012"])
def test_closed_streams(closed):
    whole = run_here(*SHORT).stdout.encode()
    status, out, err = finish_closing(closed, [*SHORT, "--stats"])
    assert (status, out) == (0, b"" if "1" in closed else whole)
    assert (b"prefill" in err) == ("2" not in closed)


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (FROM_STDIN, 1, b"error: no prompt"),
        ([*FROM_STDIN, "-"], 1, b"error: no prompt"),
        ([*FROM_STDIN, "--score=-"], 1, b"error: stdin is closed"),
        ([*FROM_STDIN, "--interactive"], 0, b""),
        ([SHORT_SPECULATIVE[0], *SHORT_SPECULATIVE[2:]], 1, b"error: no prompt"),
    ],
)
def test_stdin_that_is_needed_and_closed(args, status, message):
    done = finish_closing("0", args)
    assert done[:2] == (status, b"") and done[2].startswith(message) and done[2].count(b"\n") == bool(message)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_stdout_has_not_are_escaped_and_said_once(encoding):
    """The whole text comes: what follows such a character too."""
    flags = ["--model_size=tiny", "--n_tokens_to_generate=60", "--temperature=3", "--seed=4", "--ignore_eot"]
    environment, texts = {"PYTHONIOENCODING": encoding}, {}
    for name in ("utf-8", encoding):
        done = run_here("gpt2.py", "x", *flags) if name == "utf-8" else run("gpt2.py", "x", *flags, env=environment)
        assert done.returncode == 0
        texts[name] = done.stdout
        assert done.stderr.count("which has not all characters") == (name != "utf-8")
    plain = texts["utf-8"].encode(encoding, "backslashreplace").decode(encoding)
    assert plain != texts["utf-8"] and texts[encoding] == plain
    done = run("gpt2.py", "x", *flags, "--json", env=environment)
    assert json.loads(done.stdout)["text"] == texts["utf-8"] and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="no file without an end")
@pytest.mark.parametrize("args", [["--score=/dev/zero"], ["-"]])
def test_a_stream_without_an_end_is_one_line(args):
    with open("/dev/zero", "rb") as zero:
        process = start("gpt2.py", "--model_size=nano", *args, stdin=zero)
        status, out, err = finish(process)
    assert (status, out, err.count(b"\n")) == (1, b"", 1) and b"which is the most; cut it into parts" in err
