"""Mistakes of a user, in one line on stderr and a status."""

import os
import sys
from typing import TextIO


def abandon(stream: TextIO) -> None:
    """Python flushes its streams once more on the way out, and would complain of one that cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail(message: str, status: int = 1):
    # A name may hold a line end, or what a terminal obeys.
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    try:
        print(f"error: {line}", file=sys.stderr)
    except OSError:  # full, or a closed pipe: the status still says it
        abandon(sys.stderr)
    raise SystemExit(status)
