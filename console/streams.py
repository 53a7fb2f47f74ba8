"""Prompts and files come in, text goes out: stdin and stdout."""

import contextlib
import sys
from collections.abc import Iterable
from typing import BinaryIO

MAX_PROMPT, MAX_FILE = 1 << 24, 1 << 28  # bytes; a token has four or so, and 100 bytes of memory on the way


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
    text = ""
    for text in pieces:
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError as e:
            print(f"stdout is {e.encoding}, which has not all characters; these are escaped", file=sys.stderr)
            sys.stdout.reconfigure(errors="backslashreplace")
            sys.stdout.write(text)
        sys.stdout.flush()
    if sys.stdout.isatty() and not text.endswith("\n"):
        sys.stdout.write("\n")
