"""The arguments of a command: fire reads the flags, and every mistake is one line on stderr.

What fire alone would do otherwise: text that looks like Python would become numbers and lists, a flag without
a value would swallow the prompt, and a misspelt flag would be noticed after the work is done.
"""

import contextlib
import functools
import inspect
import io
from collections.abc import Callable

from console.errors import fail

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
