"""Prompts and files come in, text goes out: stdin and stdout. What stderr cannot take is lost."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import BinaryIO, TextIO

from console.errors import abandon

MAX_PROMPT, MAX_FILE = 1 << 24, 1 << 28  # bytes; a token has four or so, and 100 bytes of memory on the way


class Lossy:
    """A stream that drops what it cannot write; `error` says why."""

    def __init__(self, stream: TextIO):
        self.stream, self.error = stream, None

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self.attempt(self.stream.write, text)

    def flush(self) -> None:
        self.attempt(self.stream.flush)

    def attempt(self, action, *args) -> None:
        try:
            action(*args)
        except OSError as e:  # full, or a pipe that nobody reads
            self.error = self.error or e
            abandon(self.stream)


@contextlib.contextmanager
def blocking() -> Iterator[None]:
    """Let reads and writes wait, also where another program has set these streams not to (O_NONBLOCK)."""
    changed = []
    for number in range(3):
        with contextlib.suppress(OSError, AttributeError):  # closed, or no such thing on this system
            if not os.get_blocking(number):
                os.set_blocking(number, True)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            os.set_blocking(number, False)  # the other program relies on it


def read_at_most(n_bytes: int, stream: BinaryIO, name: str) -> bytes:
    """All of a stream. ValueError: it is longer, as /dev/zero, which has no end."""
    data = stream.read(n_bytes + 1)
    if len(data) > n_bytes:
        raise ValueError(f"{name} has more than {n_bytes / 1e6:.0f} MB, which is the most; cut it into parts")
    return data


def read_prompt(prompt: str | None) -> str:
    """The prompt as typed, or from stdin, less the line end that `echo` adds. ValueError: there is none."""
    if prompt not in (None, "-"):
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise ValueError('no prompt: give it as the first argument, as in gpt2.py "Hello", or pipe it in')
    text = read_at_most(MAX_PROMPT, sys.stdin.buffer, "stdin").decode("utf-8", "replace")
    return text.removesuffix("\n").removesuffix("\r")


def read_file(path: str) -> str:
    """The text of a file, or of stdin for "-". ValueError: it is not UTF-8, or stdin is closed."""
    if path == "-" and sys.stdin is None:
        raise ValueError("stdin is closed; give a file instead of -")
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as f:
        data = read_at_most(MAX_FILE, f, path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); convert it, as with iconv") from e


def write_text(pieces: Iterable[str]) -> None:
    """Write text to stdout as it comes. A terminal gets a last line end; a pipe or a file the text and nothing else."""
    last = ""
    for text in pieces:
        last = text or last
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError as e:
            print(f"stdout is {e.encoding}, which has not all characters; these are escaped", file=sys.stderr)
            sys.stdout.reconfigure(errors="backslashreplace")
            sys.stdout.write(text)
        sys.stdout.flush()
    if sys.stdout.isatty() and not last.endswith("\n"):
        sys.stdout.write("\n")
