"""What ends the program from outside, and what its streams may be: the right status, no traceback, no stuck thread."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import partial

import numpy as np
import pytest
from helpers import random_model, shared_out
from processes import GPT2, SPECULATIVE, finish, read, start

import fast
from fast import library, panels, prompts, server, weights
from fast.threads import blas, forks

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and descriptors of POSIX")

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
# The same with shared passes for all but single rows, on however many processors.
THREADED = """if True:
    import fast, fast.weights
    fast.MIN_BYTES, fast.count_threads, fast.weights.MIN_GAIN = 1, lambda: 3, 1e9
    import sys, {module}
    from console import command
    command.run({module}.main)
"""


# ----------------------------------------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("args", "n_moments"), [(GPT2, 12), (SPECULATIVE, 8)], ids=lambda value: str(value)[:8])
def test_interrupt_at_any_moment_ends_it_quietly(args, n_moments):
    """From the first line on: during the imports the signal itself ends it, later the status says it."""
    statuses = set()
    for moment in range(n_moments):
        process = start("-c", SIGNALLING, *args)
        assert read(process, 1) == b"D"
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
    read(process, 5)
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
    read(process, n_read)
    process.terminate()
    status, _, err = finish(process)
    assert (status, err) == (-signal.SIGTERM, b"")


def test_an_ignored_interrupt_stays_ignored():
    """As under nohup."""
    args = [*GPT2[:-1], "--n_tokens_to_generate=100"]
    _, whole, _ = finish(start(*args))
    process = start("-c", SIGNALLING, *args, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    out = read(process, 2)
    process.send_signal(signal.SIGINT)
    status, rest, err = finish(process)
    assert (status, out[1:] + rest, err) == (0, whole, b"")


@pytest.mark.parametrize("module", ["gpt2", "speculative"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_threads_never_outlive_the_program(module, number):
    args = (GPT2 if module == "gpt2" else SPECULATIVE)[2:]
    for n_read in (0, 1, 30):
        process = start("-c", THREADED.format(module=module), "to be or not to be, " * 12, *args)
        read(process, n_read)
        process.send_signal(number)
        status, _, err = finish(process)
        if n_read:  # else it may come before the first line
            assert (status, err) == (128 + number if number == signal.SIGINT else -number, b"")
    process = start("-c", THREADED.format(module=module), "to be, " * 12, *args[:-1], "--n_tokens_to_generate=20")
    assert finish(process)[::2] == (0, b"")


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C at every line of what shares work between threads
# ----------------------------------------------------------------------------------------------------------------------

TRACED = {module.__file__ for module in (fast, library, fast.threads, panels, prompts, server, weights)}


def interrupted_at(n, action) -> bool:
    """Call `action`, with a KeyboardInterrupt at the n-th line that this thread runs there. Whether it came so far.

    A line that comes again and again, as in a loop, counts twice only.
    """
    n_seen, visits = 0, Counter()

    def trace(frame, event, arg):
        nonlocal n_seen
        if frame.f_code.co_filename not in TRACED:
            return None
        place = (frame.f_code, frame.f_lineno)
        visits[place] += event == "line"
        if event == "line" and visits[place] <= 2:
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


@pytest.mark.parametrize("kind", ["few rows", "rows of a prompt", "packing", "a small model"])
def test_an_interrupt_at_any_line_leaves_nothing_stuck_locked_or_bound(kind, monkeypatch):
    small = random_model(n_layer=2, n_ctx=20)
    ids = [[3, 1, 4, 1]]
    for name in ("MIN_ROWS", "MIN_ROWS_EACH"):
        monkeypatch.setattr(prompts, name, 1 if kind == "rows of a prompt" else 9)
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
            action = model.passes.pack if kind == "packing" else partial(model.forward, ids, cache)
            is_interrupted = interrupted_at(n_lines + 1, action)
            n_lines += is_interrupted
            locks = model.passes.weights.lock, blas.lock
            untidy.extend([n_lines] * bool(blas.holders or forks.passing or any(lock.locked() for lock in locks)))
            untidy.extend(server.calls)
            if kind == "packing":
                model.passes.pack()
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
    assert not untidy, untidy
