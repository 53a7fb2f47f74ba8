"""A terminal that is resized, or closed."""

import io
import itertools
import os
import re
import select
import signal
import sys
from functools import partial

import numpy as np
import pytest
from processes import GPT2, restore_sigint, start

from console import modes
from console.streams import write_text
from decoding.sampling import greedy
from gpt2 import generate_batch

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and descriptors of POSIX")


# How readline draws its line anew when a window changes: it goes to the beginning of the line and deletes the rest.
REDRAWN = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\r(?!\n|$)")


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
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, also by children
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
        written = self.shown = b""
        while self.shown.count(text) < n_times and select.select([self.master], [], [], 60)[0]:
            written += os.read(self.master, 64)
            self.shown = REDRAWN.sub(b"", written)
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


class Shown(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("pieces", "shown"), [(["a", "b"], "ab\n"), (["a\n"], "a\n"), (["a\n", ""], "a\n"), (["a\n\n", "", ""], "a\n\n")]
)
def test_a_text_in_a_terminal_ends_with_its_line(monkeypatch, pieces, shown):
    """And with no other, as those of --json, --score and --n_samples, which end with one."""
    monkeypatch.setattr(sys, "stdout", Shown())
    write_text(pieces)
    assert sys.stdout.getvalue() == shown


def test_samples_beams_and_scores_have_no_blank_line_after_them(monkeypatch, nano):
    encoder, model = nano
    monkeypatch.setattr(sys, "stdout", Shown())

    def text_of(ids):
        return ["text", ""]

    for json in (False, True):
        complete = partial(generate_batch, model, n_tokens=2)
        modes.write_samples(complete, text_of, [1], lambda seed: greedy, iter([1, 2]), json)
        modes.write_score(model, encoder, "to be or not", 512, json)
    modes.write_beams(lambda: [(0.5, [1]), (0.25, [2])], text_of, True)
    lines = sys.stdout.getvalue().splitlines()
    assert len(lines) > 8 and all(lines)


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
        terminal.read_until(expected, meanwhile=lambda: terminal.resize(next(widths)))
        terminal.resize(80)  # the prompt is drawn after that, or drawn anew
        terminal.read_until(b"> ")
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
