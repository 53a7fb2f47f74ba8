"""A terminal that is resized, or closed."""

import itertools
import os
import select
import signal
import sys

import numpy as np
import pytest
from processes import GPT2, restore_sigint, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and descriptors of POSIX")


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
