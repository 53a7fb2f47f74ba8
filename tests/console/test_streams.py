"""Streams that are closed, full or read by nobody."""

import contextlib
import json
import os
import signal
import sys
import time

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


@pytest.mark.parametrize("args", [[*SHORT, "--top=2", "--stats"], [*SHORT_SPECULATIVE, "--verify", "--stats"]])
def test_what_stderr_cannot_take_does_not_cost_the_text(args, broken_pipe):
    whole = finish_with(args)[1]
    assert whole and finish_with(args, stderr=broken_pipe)[:2] == (128 + signal.SIGPIPE, whole)
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as full:
            assert finish_with(args, stderr=full)[:2] == (1, whole)


def test_streams_that_do_not_wait_are_waited_for():
    """What comes late is read, what finds the pipe full is written, and the other program finds them as they were."""
    code = "import sys\nfrom console import command, streams\n"
    code += "command.run(lambda: streams.write_text([streams.read_prompt('-')] * 2000))"
    (stdin, to_stdin), (from_stdout, stdout) = os.pipe(), os.pipe()
    for descriptor in (stdin, stdout):
        os.set_blocking(descriptor, False)
    process = start("-c", code, stdin=stdin, stdout=stdout)
    with open(to_stdin, "wb", buffering=0) as text:
        for piece in (b"x" * 100, b"y" * 100):
            time.sleep(0.3)
            text.write(piece)
    time.sleep(0.3)  # 400 kB are more than a pipe holds
    with process, open(from_stdout, "rb") as out:
        os.close(stdout)
        assert out.read() == (b"x" * 100 + b"y" * 100) * 2000
        assert (process.wait(60), process.stderr.read()) == (0, b"")
    assert not os.get_blocking(stdin)
    os.close(stdin)


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
