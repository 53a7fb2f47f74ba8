"""A command line around a function: fire reads the flags, and every mistake is one line on stderr.

What fire alone would do otherwise: text that looks like Python would become numbers and lists, a flag without
a value would swallow the prompt, and a misspelt flag would be noticed after the work is done.
"""

import contextlib
import errno
import functools
import inspect
import io
import os
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

import interrupts

BROKEN_PIPE = 141  # the status that shells give to programs ended by this signal: 128 + 13
SEPARATOR = "\0"


def typed(text: str) -> str:
    """A value as the user typed it, where fire would make a number, a list or None of it."""
    return text


def typed_list(text: str) -> list[str]:
    return text.split(SEPARATOR)


class Nothing:
    """What the command gives back to fire: it has no members that one argument too many could name."""

    def __dir__(self):
        return ()


def join_values(argv: list[str], parameters: dict[str, inspect.Parameter]) -> list[str]:
    """`--name value` as `--name=value`, `--name` of a yes-or-no flag as `--name=True`, `-- text` as the first argument.

    So no value is taken for a flag, whatever it begins with, and no flag swallows the prompt. The values of a flag that
    may be repeated come in one, with NUL between them, which no argument can hold.
    """
    joined, rest, repeated = [], iter(argv), {}
    for arg in rest:
        flag, is_given, value = arg.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if arg == "--":
            joined += [f"--{next(iter(parameters))}={text}" for text in rest]
        elif not arg.startswith("--") or name not in parameters:
            joined.append(arg)
        elif isinstance(parameters[name].default, bool) and not is_given:
            joined.append(f"{arg}=True")
        else:
            value = value if is_given else next(rest, None)
            if value is None:
                fail(f"{arg} needs a value; --help lists the flags", status=2)
            if parameters[name].annotation == list[str]:
                repeated.setdefault(flag, []).append(value)
            else:
                joined.append(f"{flag}={value}")
    return joined + [f"{flag}={SEPARATOR.join(values)}" for flag, values in repeated.items()]


def parse_arguments(command: Callable, argv: list[str]) -> dict:
    """The arguments of `command` in `argv`. SystemExit: they do not fit."""
    import fire

    parameters = dict(inspect.signature(command).parameters)
    parsers = {name: typed for name, p in parameters.items() if p.annotation in (str, str | None)}
    parsers |= {name: typed_list for name, p in parameters.items() if p.annotation == list[str]}
    bound: dict = {}

    @functools.wraps(command)
    def bind(*args, **kwargs):
        bound.update(inspect.signature(command).bind(*args, **kwargs).arguments)
        return Nothing()

    # fire ends a call's arguments at a separator, "-" unless told; no argument can hold a NUL.
    argv = [*join_values(argv, parameters), "--", f"--separator={SEPARATOR}"]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # fire's own message is a page
            parsed = fire.decorators.SetParseFns(**parsers)(bind)
            fire.Fire(parsed, command=argv, serialize=lambda result: None)
        return bound
    except fire.core.FireExit as e:
        problem = e.trace.elements[-1].ErrorAsStr()
    except Exception as e:  # `bind` only takes note: what else fails, such as reading {[]: 1}, is the arguments' fault
        problem = str(e)
    fail(f"{problem}; --help lists the flags, and -- stands before text that begins with a dash", status=2)


def read_prompt(prompt: str | None) -> str:
    """The prompt as typed, or from stdin, less the line end that `echo` adds. ValueError: there is none."""
    if prompt not in (None, "-"):
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise ValueError('no prompt: give it as the first argument, as in gpt2.py "Hello", or pipe it in')
    text = sys.stdin.buffer.read().decode("utf-8", "replace")
    return text.removesuffix("\n").removesuffix("\r")


def read_file(path: str) -> str:
    """The text of a file, or of stdin for "-". ValueError: it is not UTF-8, or stdin is closed."""
    if path == "-" and sys.stdin is None:
        raise ValueError("stdin is closed; give a file instead of -")
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as f:
        data = f.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); convert it, as with iconv") from e


def write_text(pieces: Iterable[str]) -> None:
    """Write text to stdout as it comes. A terminal gets a last line end; a pipe or a file the text and nothing else."""
    for text in pieces:
        sys.stdout.write(text)
        sys.stdout.flush()
    if sys.stdout.isatty():
        sys.stdout.write("\n")


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


def choose(commands: dict[str, Callable], argv: list[str]) -> tuple[Callable, list[str]]:
    """The command that the first argument names, and the other arguments. SystemExit: there is none of that name."""
    if argv and argv[0] in commands:
        return commands[argv[0]], argv[1:]
    if argv and argv[0] not in ("-h", "--help"):
        fail(f"no command {argv[0]!r}, expected one of {', '.join(commands)}", status=2)
    for name, command in commands.items():
        print(f"{name:12} {(inspect.getdoc(command) or '').splitlines()[0]}")
    raise SystemExit(0 if argv else 2)


def run(command: Callable | dict[str, Callable]) -> None:
    """Call `command`, or the one of several that the first argument names, with the arguments of this process.

    Exits with the conventional status when it cannot go on.
    """
    argv = sys.argv[1:]
    try:
        interrupts.end_with_status()
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # closed by the caller: what would go there goes nowhere
                setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for the rest of the run
        if isinstance(command, dict):
            command, argv = choose(command, argv)
        if {"-h", "--help"} & set(argv):
            print(inspect.getdoc(command))
        else:
            command(**parse_arguments(command, argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(interrupts.INTERRUPTED)
    except BrokenPipeError:
        abandon(sys.stdout)
        sys.exit(BROKEN_PIPE)
    except (ValueError, ConnectionError) as e:
        fail(str(e))
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) and not e.filename:
            abandon(sys.stdout)
            fail(f"cannot write the text: {e.strerror}")
        fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
    finally:
        interrupts.end_at_once()
