"""The first lines of a program, before its own imports. It imports next to nothing."""

import sys

from console.interrupts import end_quietly


def say_what_is_missing(kind, error, traceback) -> None:
    """What Python prints of an exception that nobody catches: one line if a package is missing or too old."""
    if not issubclass(kind, ImportError) or sys.stderr is None:
        return sys.__excepthook__(kind, error, traceback)
    hint = "" if "pip install" in str(error) else "; pip install -r requirements-generate.txt"
    print(f"error: {error}{hint}", file=sys.stderr)


def start() -> None:
    """Ctrl-C ends the imports without a traceback, and a package that is missing or too old is one line."""
    end_quietly()
    sys.excepthook = say_what_is_missing
