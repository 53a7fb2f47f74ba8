"""What ends the program from outside, and what its streams may be: the right status, no traceback, no stuck thread."""

import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
from conftest import ROOT, random_model, shared_out

import fast
from fast import panels, shares
from fast.threads import blas, forks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and descriptors of POSIX")

GPT2 = ["gpt2.py", "ROMEO:", "--model_size=tiny", "--overflow=slide", "--n_tokens_to_generate=100000"]
SPECULATIVE = ["speculative.py", "ROMEO:", "--target_model_size=tiny", "--draft_model_size=nano", *GPT2[3:]]
SHORT = ["gpt2.py", "x", "--model_size=nano", "--n_tokens_to_generate=5"]
FROM_STDIN = [SHORT[0], *SHORT[2:]]
SHORT_SPECULATIVE = ["speculative.py", "x", "--target_model_size=nano", "--draft_model_size=nano", SHORT[-1]]
# The program as it is, which writes a byte when its first line has run and the imports begin: D if Ctrl-C ends it now.
SIGNALLING = """if True:
    import os, runpy, signal, sys
    def tell(event, args):
        if event == "import" and args[0] == "math" and not told:
            told.append(os.write(1, b"D" if signal.getsignal(signal.SIGINT) is signal.SIG_DFL else b"?"))
    told = []
    sys.modules.pop("math", None)
    sys.addaudithook(tell)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
# The same with threads of our own for all but single rows, on however many processors.
THREADED = """if True:
    import fast, fast.shares
    fast.MIN_BYTES, fast.count_threads, fast.shares.MIN_GAIN = 1, lambda: 3, 1e9
    import sys, cli, {module}
    cli.run({module}.main)
"""


def restore_sigint():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & and nohup pass it on ignored


def start(*args, preexec_fn=restore_sigint, **streams):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | streams
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, preexec_fn=preexec_fn, **pipes)


def finish(process):
    """(status, stdout, stderr); TimeoutExpired: it hangs."""
    with process:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, out, err


# ----------------------------------------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("args", "n_moments"), [(GPT2, 12), (SPECULATIVE, 8)], ids=lambda value: str(value)[:8])
def test_interrupt_at_any_moment_ends_it_quietly(args, n_moments):
    """From the first line on: during the imports the signal itself ends it, later the status says it."""
    statuses = set()
    for moment in range(n_moments):
        process = start("-c", SIGNALLING, *args)
        assert process.stdout.read(1) == b"D"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.4 * moment / n_moments)
        process.send_signal(signal.SIGINT)
        status, _, err = finish(process)
        assert status in (-signal.SIGINT, 128 + signal.SIGINT) and err == b""
        statuses.add(status)
    assert -signal.SIGINT in statuses


@pytest.mark.parametrize("args", [GPT2, SPECULATIVE], ids=lambda args: args[0])
@pytest.mark.parametrize("n_more", [0, 1, 50])
def test_interrupt_during_generation_has_its_status_however_often(args, n_more):
    process = start(*args)
    process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    for _ in range(n_more):
        process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 128 + signal.SIGINT if n_more == 0 else status in (-signal.SIGINT, 128 + signal.SIGINT)
    assert err == b""


@pytest.mark.parametrize("args", [GPT2, SPECULATIVE], ids=lambda args: args[0])
@pytest.mark.parametrize("n_read", [1, 2, 100])
def test_termination_ends_it_at_once(args, n_read):
    process = start("-c", SIGNALLING, *args)  # its first byte comes before the imports
    process.stdout.read(n_read)
    process.terminate()
    status, _, err = finish(process)
    assert (status, err) == (-signal.SIGTERM, b"")


def test_an_ignored_interrupt_stays_ignored():
    """As under nohup."""
    args = [*GPT2[:-1], "--n_tokens_to_generate=100"]
    _, whole, _ = finish(start(*args))
    process = start("-c", SIGNALLING, *args, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    out = process.stdout.read(2)
    process.send_signal(signal.SIGINT)
    status, rest, err = finish(process)
    assert (status, out[1:] + rest, err) == (0, whole, b"")


@pytest.mark.parametrize("module", ["console", "speculative"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_threads_never_outlive_the_program(module, number):
    args = (GPT2 if module == "console" else SPECULATIVE)[2:]
    for n_read in (0, 1, 30):
        process = start("-c", THREADED.format(module=module), "to be or not to be, " * 12, *args)
        process.stdout.read(n_read)
        process.send_signal(number)
        status, _, err = finish(process)
        if n_read:  # else it may come before the first line
            assert (status, err) == (128 + number if number == signal.SIGINT else -number, b"")
    process = start("-c", THREADED.format(module=module), "to be, " * 12, *args[:-1], "--n_tokens_to_generate=20")
    assert finish(process)[::2] == (0, b"")


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C at every line of what shares work between threads
# ----------------------------------------------------------------------------------------------------------------------

TRACED = {module.__file__ for module in (fast, fast.threads, panels, shares)}


def interrupted_at(n, action) -> bool:
    """Call `action`, with a KeyboardInterrupt at the n-th line that this thread runs there. Whether it came so far."""
    n_seen = 0

    def trace(frame, event, arg):
        nonlocal n_seen
        if frame.f_code.co_filename not in TRACED:
            return None
        if event == "line":
            n_seen += 1
            if n_seen == n:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return n_seen >= n


@pytest.mark.parametrize("kind", ["rows in shares", "packing", "a small model"])
def test_an_interrupt_at_any_line_leaves_nothing_stuck_locked_or_bound(kind):
    small = random_model(n_layer=2, n_ctx=20)
    ids = [[3, 1, 4, 1]]
    expected = small.forward(ids, small.new_cache())
    n_blas = blas.controller.get_num_threads() if blas.controller else None
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    n_lines, wrong, untidy = 0, [], []

    def interrupt_everywhere():
        nonlocal n_lines
        model, is_interrupted = small if kind == "a small model" else shared_out(small), True
        cache = model.new_cache()
        while is_interrupted:
            if kind == "packing":
                model = shared_out(small, is_packed=False)
            action = model.passes.shares.pack if kind == "packing" else partial(model.forward, ids, cache)
            is_interrupted = interrupted_at(n_lines + 1, action)
            n_lines += is_interrupted
            is_held = bool(blas.holders or forks.passing or model.passes.shares.lock.locked() or blas.lock.locked())
            untidy.extend([n_lines] * is_held)  # by the lines that would have tidied up; the next pass does
            if kind == "packing":
                model.passes.shares.pack()
            cache.length = 0
            if not np.allclose(model.forward(ids, cache), expected, atol=1e-4):
                wrong.append(n_lines)
            cache.length = 0
            assert not (blas.holders or forks.passing)
            assert n_blas is None or blas.controller.get_num_threads() == n_blas
            assert cores is None or os.sched_getaffinity(0) == cores

    failures = []

    def noted():
        try:
            interrupt_everywhere()
        except Exception as e:
            failures.append(e)

    thread = threading.Thread(target=noted, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), f"stuck after an interrupt at line {n_lines + 1}"
    assert n_lines > (10 if kind == "a small model" else 25) and not wrong and not failures, failures
    # By lines that give something back: of the pass itself, and of BLAS where the pass is not on other threads.
    assert len(untidy) <= (8 if kind == "a small model" else 3)


# ----------------------------------------------------------------------------------------------------------------------
# Streams
# ----------------------------------------------------------------------------------------------------------------------


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
    ["benchmark.py", "--help"],
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


MISTAKES = [([*SHORT, "--model_size=none"], 1), ([*SHORT, "--misspelt"], 2), ([*SHORT, "--n_draft"], 2)]


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
    whole = finish_with(SHORT)[1]
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


# ----------------------------------------------------------------------------------------------------------------------
# A terminal
# ----------------------------------------------------------------------------------------------------------------------


class Terminal:
    """The program in a terminal of its own, which sends it what a user types and what a window's change sends."""

    def __init__(self, *args):
        import fcntl
        import termios

        self.fcntl, self.termios = fcntl, termios
        self.master, slave = os.openpty()
        self.resize(80)

        def enter():
            restore_sigint()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        streams = dict.fromkeys(("stdin", "stdout", "stderr"), slave)
        environment = {**os.environ, "TERM": "xterm"}
        self.process = start(*args, preexec_fn=enter, start_new_session=True, env=environment, **streams)
        os.close(slave)
        self.shown = b""

    def resize(self, n_columns):
        size = np.array([24, n_columns, 0, 0], np.uint16).tobytes()
        self.fcntl.ioctl(self.master, self.termios.TIOCSWINSZ, size)

    def read_until(self, text, n_times=1, meanwhile=lambda: None):
        """Read on until what has come since the last call has `text` so often, or nothing comes for a minute."""
        self.shown = b""
        while self.shown.count(text) < n_times and select.select([self.master], [], [], 60)[0]:
            self.shown += os.read(self.master, 64)
            meanwhile()
        assert self.shown.count(text) >= n_times and b"Traceback" not in self.shown

    def type(self, text):
        os.write(self.master, text)

    def hang_up(self):
        os.close(self.master)
        self.master = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        if self.master is not None:
            os.close(self.master)


def test_a_terminal_that_is_resized_all_the_time(tiny):
    import gpt2

    encoder, model = tiny
    expected = encoder.decode(gpt2.generate(model, encoder.encode("ROMEO:"), 200)).replace("\n", "\r\n").encode()
    with Terminal("gpt2.py", "--interactive", "--model_size=tiny", "--n_tokens_to_generate=200") as terminal:
        terminal.read_until(b"> ")
        widths = itertools.cycle(range(20, 300))
        for _ in range(50):
            terminal.resize(next(widths))
        terminal.type(b"ROMEO:\n")
        terminal.read_until(b"\n> ", meanwhile=lambda: terminal.resize(next(widths)))
        assert expected in terminal.shown
        terminal.type(b"\x04")
        assert terminal.process.wait(60) == 0


def test_a_terminal_that_is_closed_ends_the_program():
    for n_lines in (0, 3):
        with Terminal("gpt2.py", "--interactive", *GPT2[2:]) as terminal:
            terminal.read_until(b"> ")
            terminal.type(b"ROMEO:\n" * (n_lines > 0))
            if n_lines:
                terminal.read_until(b"\n", n_lines)
            terminal.hang_up()
            assert terminal.process.wait(60) == -signal.SIGHUP
