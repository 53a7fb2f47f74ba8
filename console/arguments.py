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
    """What fire gets back from the command: without members, which a surplus argument could name."""

    def __dir__(self):
        return ()


def asks_for_help(argv: list[str], parameters: dict[str, inspect.Parameter]) -> bool:
    """Whether -h or --help stands where a flag may, not as a flag's value or as text after `--`."""
    rest = iter(argv)
    for arg in rest:
        if arg in ("-h", "--help") or arg == "--":
            return arg != "--"
        name, is_given, _ = flag_of(arg)
        if name in parameters and not is_given and not is_yes_or_no(parameters[name]):
            next(rest, None)
    return False


def flag_of(arg: str) -> tuple[str, bool, str]:
    """(name, whether there is a value, the value) of --name=value; other arguments have no name."""
    flag, equals, value = arg.partition("=")
    return flag[2:].replace("-", "_") if flag.startswith("--") else "", bool(equals), value


def is_yes_or_no(parameter: inspect.Parameter) -> bool:
    return isinstance(parameter.default, bool)


def refuse(problem: str):
    fail(f"{problem}; --help lists the flags, and -- stands before text that begins with a dash", status=2)


def join_values(argv: list[str], parameters: dict[str, inspect.Parameter]) -> list[str]:
    """`--name value` as `--name=value`, `--name` of a yes-or-no flag as `--name=True`, `-- text` as the first argument.

    So no value is taken for a flag, whatever it begins with, and no flag swallows the prompt. The values of a flag that
    may be repeated come in one, with NUL between them, which no argument can hold.
    """
    joined, rest, values = [], iter(argv), {}
    for arg in rest:
        name, is_given, value = flag_of(arg)
        if arg == "--":
            texts = list(rest)
            if len(texts) != 1:
                refuse(f"{len(texts)} arguments after --, expected one; put quotes around the text")
            name, value = next(iter(parameters)), texts[0]
        elif name in parameters and is_yes_or_no(parameters[name]):
            value = str(yes_or_no(arg, value)) if is_given else "True"
        elif name in parameters:
            value = value if is_given else next(rest, None)
            if value is None:
                fail(f"{arg} needs a value; --help lists the flags", status=2)
        elif arg.startswith("--") or (arg[1:2].isalpha() and arg.startswith("-")):
            refuse(unknown(arg, parameters))  # fire would take -j for --json
        else:
            joined.append(arg)
            continue
        values.setdefault(name, []).append(value)
    for name, given in values.items():
        if len(given) > 1 and parameters[name].annotation != list[str]:
            refuse(f"--{name} is given {len(given)} times, expected once")
    return joined + [f"--{name}={SEPARATOR.join(given)}" for name, given in values.items()]


def yes_or_no(arg: str, value: str) -> bool:
    meanings = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
    if value.lower() not in meanings:
        refuse(f"{arg}: expected true or false, or no value")
    return meanings[value.lower()]


def unknown(arg: str, parameters: dict[str, inspect.Parameter]) -> str:
    import difflib  # for this mistake only

    flag = arg.partition("=")[0]
    names = [f"--{name}" for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    like = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), names, n=1)
    return f"no flag {flag}" + (f", did you mean {like[0]}?" if like else "")


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
    refuse(problem)
