"""gpt2.py --interactive, at a terminal and through a pipe."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
from functools import partial

import pytest
from helpers import ROOT, random_model, run_here

from console import interactive
from console.interactive import Conversation, converse
from decoding.stopping import text_until_end
from gpt2 import Model, generate

FLAGS = ("gpt2.py", "--interactive", "--model_size=nano")
PROMPT = "\r\n> "  # what a terminal shows after a text


class Terminal:
    """The program at a terminal, to type into and to read from."""

    def __init__(self, *flags, **streams):
        self.leader, follower = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *FLAGS, *flags],
            **({"stdin": follower, "stdout": follower, "stderr": follower} | streams),
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # whose Ctrl-C is a signal
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(follower)

    def type(self, text):
        os.write(self.leader, text.encode())

    def interrupt(self):
        """Ctrl-C while a line is read: again if need be, for Python misses one that comes between two characters."""
        for _ in range(50):
            self.type("\x03")
            if select.select([self.leader], [], [], 0.5)[0]:
                return

    def read_until(self, end):
        """All that is shown up to `end`, or to the program's end; fails after a minute without either."""
        shown = b""
        with contextlib.suppress(OSError):  # Linux's way to say that the terminal has no writer any more
            while not (end and shown.decode("utf-8", "ignore").endswith(end)):
                assert select.select([self.leader], [], [], 60)[0], shown
                chunk = os.read(self.leader, 1)
                if not chunk:
                    break
                shown += chunk
        return shown.decode()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait(60)
        os.close(self.leader)


def text_after(encoder_and_model, prompt, n_tokens):
    encoder, model = encoder_and_model
    return "".join(text_until_end(encoder, generate(model, encoder.encode_prompt(prompt), n_tokens), [], False))


def test_prompts_at_a_terminal(nano):
    """Texts, an empty line, line editing and history, Ctrl-D."""
    first, whole = (text_after(nano, "ROMEO:", n) for n in (12, 24))
    with Terminal("--n_tokens_to_generate=12") as terminal:
        terminal.read_until("> ")
        terminal.type("ROMEO;\x7f:\r")  # a slip, taken back
        shown = terminal.read_until(PROMPT).replace("\r\n", "\n")
        assert shown.endswith(first + "\n> ")
        terminal.type("\r")
        shown = terminal.read_until(PROMPT).replace("\r\n", "\n")
        assert shown.endswith(whole.removeprefix(first) + "\n> ")
        terminal.type("\x1b[A\r")  # the arrow up brings the prompt back
        assert terminal.read_until(PROMPT).replace("\r\n", "\n").endswith(first + "\n> ")
        terminal.type("\x04")
        terminal.read_until(None)
        assert terminal.process.wait(60) == 0


def test_interrupts_at_a_terminal():
    """Ctrl-C ends the text, or forgets the line; the program goes on, and on with the text."""
    with Terminal("--n_tokens_to_generate=100000", "--overflow=slide", "--ignore_eot") as terminal:
        terminal.read_until("> ")
        for line in ("ROMEO:\r", "\r"):
            terminal.type(line)
            for _ in range(7):  # it streams
                terminal.read_until("e")
            terminal.type("\x03")
            assert "Traceback" not in terminal.read_until(PROMPT)
        terminal.type("never mind")
        terminal.read_until("never mind")  # it is being read
        terminal.interrupt()
        assert "error" not in terminal.read_until(PROMPT)
        terminal.type("\x04")
        terminal.read_until(None)
        assert terminal.process.wait(60) == 0


def test_only_the_text_goes_to_stdout(nano):
    """At a terminal with stdout elsewhere, as in `> file`: no sign that a prompt is waited for."""
    with Terminal("--n_tokens_to_generate=6", stdout=subprocess.PIPE) as terminal:
        terminal.read_until("> ")
        terminal.type("ROMEO:\r")
        terminal.read_until("> ")
        terminal.type("\x04")
        expected = text_after(nano, "ROMEO:", 6) + "\n"
        assert terminal.process.stdout.read().decode() == expected
        assert terminal.process.wait(60) == 0
        terminal.process.stdout.close()


def test_prompts_through_a_pipe(nano):
    both = text_after(nano, "ROMEO:", 16)
    first, juliet = text_after(nano, "ROMEO:", 8), text_after(nano, "JULIET:", 8)
    done = run_here(*FLAGS, "--n_tokens_to_generate=8", stdin="ROMEO:\n\nJULIET:")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{first}\n{both.removeprefix(first)}\n{juliet}\n"


def test_a_prompt_as_argument_comes_first(nano):
    done = run_here(*FLAGS, "--n_tokens_to_generate=8", "ROMEO:", stdin="JULIET:\n")
    assert done.stdout == "".join(text_after(nano, prompt, 8) + "\n" for prompt in ("ROMEO:", "JULIET:"))


def test_an_empty_line_first_begins_a_text_of_its_own(nano):
    done = run_here(*FLAGS, "--n_tokens_to_generate=8", stdin="\n")
    assert done.stdout == text_after(nano, "", 8) + "\n"


def test_a_pipe_with_an_interrupt():
    """The text that is being written ends, then the pipe does."""
    with subprocess.Popen(
        [sys.executable, *FLAGS, "--n_tokens_to_generate=1000000", "--overflow=slide", "--ignore_eot"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        process.stdin.write(b"ROMEO:\n")
        process.stdin.flush()
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        assert process.stdout.read().endswith(b"\n")
        assert process.stderr.read() == b"" and process.wait(60) == 0


def test_a_mistake_in_a_prompt_is_one_line_and_the_next_is_read(nano):
    done = run_here(*FLAGS, "--n_tokens_to_generate=500", stdin="the king " * 30 + "\nROMEO:\n")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "exceed the context of 512" in done.stderr
    assert done.stdout == "\n" + text_after(nano, "ROMEO:", 500) + "\n"


def test_bytes_that_are_no_text_are_replaced(nano):
    done = subprocess.run(
        [sys.executable, *FLAGS, "--n_tokens_to_generate=4"], input=b"a\xff\n", capture_output=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == text_after(nano, "a\ufffd", 4) + "\n"


def test_a_closed_stdin_is_the_end():
    command = f'"{sys.executable}" {" ".join(FLAGS)} <&-'
    done = subprocess.run(command, shell=True, capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("flags", [["--overflow=slide", "--slide_by=0"], ["--overflow=slide", "--slide_by=513"]])
def test_bad_flags_end_it_before_a_prompt(flags):
    done = run_here(*FLAGS, *flags, stdin="ROMEO:\n")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1) and "slide_by is" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# What is computed
# ----------------------------------------------------------------------------------------------------------------------


class Counting(Model):
    """A model that notes how many tokens each forward call feeds."""

    def __init__(self, model):
        super().__init__(model.hparams, model.params)
        self.fed = []

    def forward(self, tokens, cache, n_last=1, plainly=False):
        self.fed.append(len(tokens[0]))
        return super().forward(tokens, cache, n_last, plainly)


class Letters:
    """An encoder of one token a letter; nothing ends a text."""

    eot_id, eot_ids = None, ()

    def encode_prompt(self, text):
        return [ord(c) % 61 for c in text]

    def decode_stream(self, ids):
        return (chr(48 + i) for i in ids)


def conversation(monkeypatch, capsys, lines, model=None, **options):
    """(how many tokens each forward call was fed, the texts) after these lines."""
    model = Counting(model or random_model())
    monkeypatch.setattr(interactive, "lines", lambda: iter(lines))
    complete = partial(generate, model, **({"n_tokens": 5} | options))
    converse(model, Letters(), complete, lambda ids: text_until_end(Letters(), ids, [], True), None)
    return model.fed, capsys.readouterr().out.split("\n")[:-1]


def expected_text(ids, **options):
    return "".join(Letters().decode_stream(generate(random_model(), ids, **({"n_tokens": 5} | options))))


def test_going_on_feeds_the_last_token_only(monkeypatch, capsys):
    fed, texts = conversation(monkeypatch, capsys, ["abc", "", ""])
    assert fed == [3, 1, 1, 1, 1] + [1] * 10
    assert "".join(texts) == expected_text(Letters().encode_prompt("abc"), n_tokens=15)


def test_a_prompt_that_goes_on_from_the_last_keeps_what_is_computed(monkeypatch, capsys):
    prompts = ["abcdef", "abcdefgh", "abcdxf", "abc", "abc"]
    fed, texts = conversation(monkeypatch, capsys, prompts)
    assert fed[::5] == [6, 2, 2, 1, 1]
    assert texts == [expected_text(Letters().encode_prompt(prompt)) for prompt in prompts]


@pytest.mark.parametrize("slide_by", [1, 12])
def test_going_on_beyond_the_context(monkeypatch, capsys, slide_by):
    _, texts = conversation(monkeypatch, capsys, ["abc"] + [""] * 9 + ["abc"], slide_by=slide_by)
    ids = Letters().encode_prompt("abc")
    assert "".join(texts[:-1]) == expected_text(ids, n_tokens=50, slide_by=slide_by)
    assert texts[-1] == expected_text(ids)


def test_a_full_context_is_an_error_and_the_next_prompt_is_answered(monkeypatch, capsys):
    model = random_model()
    monkeypatch.setattr(interactive, "lines", lambda: iter(["abc", "", "", "", "", "abc"]))
    complete = partial(generate, model, n_tokens=5)
    converse(model, Letters(), complete, lambda ids: text_until_end(Letters(), ids, [], True), None)
    out, err = capsys.readouterr()
    first, last = out.split("\n")[0], out.split("\n")[-2]
    assert first == last == expected_text(Letters().encode_prompt("abc"))
    assert err.count("\n") == 1 and err.startswith("error: 23 prompt tokens and 5 new ones exceed")


@pytest.mark.parametrize("n_before", range(1, 6))
def test_an_interrupt_leaves_a_text_to_go_on_with(monkeypatch, capsys, n_before):
    """Wherever it comes: between tokens, or while one is computed."""
    model, ids = random_model(), Letters().encode_prompt("abc")

    class Interrupted(Model):
        n_calls = 0

        def forward(self, tokens, cache, n_last=1, plainly=False):
            self.n_calls += 1
            if self.n_calls == n_before:
                raise KeyboardInterrupt
            return super().forward(tokens, cache, n_last, plainly)

    interrupted = Interrupted(model.hparams, model.params)
    monkeypatch.setattr(interactive, "lines", lambda: iter(["abc", ""]))
    complete = partial(generate, interrupted, n_tokens=5)
    converse(interrupted, Letters(), complete, lambda ids: text_until_end(Letters(), ids, [], True), None)
    first, second = capsys.readouterr().out.split("\n")[:-1]
    assert len(first) == n_before - 1
    assert first + second == expected_text(ids, n_tokens=n_before + 4)


def test_the_cache_is_never_longer_than_what_is_known():
    talk = Conversation(random_model())
    talk.follow([1, 2, 3])
    assert talk.cache.length == 0 and talk.tokens == [1, 2, 3]
    talk.cache.advance(3)
    talk.follow([1, 2, 3])
    assert talk.cache.length == 2  # the last is fed, for its logits
    talk.follow([4])
    assert talk.cache.length == 0


def test_line_ends_of_windows_are_no_part_of_a_prompt():
    flags = (*FLAGS, "--n_tokens_to_generate=8")
    assert run_here(*flags, stdin="ROMEO:\r\nJULIET:\r\n").stdout == run_here(*flags, stdin="ROMEO:\nJULIET:\n").stdout


def test_without_a_seed_the_same_prompt_has_other_texts():
    flags = (*FLAGS, "--n_tokens_to_generate=8", "--temperature=1", "--ignore_eot")
    assert len(set(run_here(*flags, "--stop=\n", stdin="A \n" * 8).stdout.split("\n"))) > 3
    seeded = run_here(*flags, "--stop=\n", "--seed=3", stdin="A \n" * 3).stdout.split("\n")
    assert seeded[0] == seeded[1] == seeded[2]
