"""A program around a function: arguments in, a conventional exit status out."""

import errno
import inspect
import os
import sys
from collections.abc import Callable

from console import interrupts
from console.arguments import asks_for_help, parse_arguments
from console.errors import abandon, fail
from console.streams import Lossy, blocking

BROKEN_PIPE = 141  # the status that shells give to programs ended by this signal: 128 + 13


def manual_of(command: Callable) -> str:
    """The docstring; flags that it does not name follow with their defaults."""
    manual = inspect.getdoc(command) or "python -OO leaves the manual out; run without -OO"
    flags = inspect.signature(command).parameters.values()
    if "--" in manual or not flags:
        return manual
    shown = (f"--{flag.name}" + ("" if flag.default in (None, flag.empty) else f" {flag.default}") for flag in flags)
    return f"{manual}\n\nFlags: {'  '.join(shown)}"


def choose(commands: dict[str, Callable], argv: list[str]) -> tuple[Callable, list[str]]:
    """The command that the first argument names, and the other arguments. SystemExit: there is none of that name."""
    if argv and argv[0] in commands:
        return commands[argv[0]], argv[1:]
    if argv and argv[0] not in ("-h", "--help"):
        fail(f"no command {argv[0]!r}, expected one of {', '.join(commands)}", status=2)
    for name, command in commands.items():
        print(f"{name:12} {manual_of(command).splitlines()[0]}")
    raise SystemExit(0 if argv else 2)


def call(command: Callable | dict[str, Callable], argv: list[str]) -> None:
    """`run` without its statuses. SystemExit: stderr is full or broken (as close_stdout of the GNU tools)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: what would go there goes nowhere
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for the rest of the run
    sys.stderr = lossy = Lossy(sys.stderr)
    if isinstance(command, dict):
        command, argv = choose(command, argv)
    if asks_for_help(argv, dict(inspect.signature(command).parameters)):
        print(manual_of(command))
    else:
        command(**parse_arguments(command, argv))
    sys.stdout.flush()
    if lossy.error:
        sys.exit(BROKEN_PIPE if isinstance(lossy.error, BrokenPipeError) else 1)


def run(command: Callable | dict[str, Callable]) -> None:
    """Call `command`, or the one of several that the first argument names, with the arguments of this process.

    Exits with the conventional status when it cannot go on.
    """
    with blocking():
        try:
            interrupts.end_with_status()
            call(command, sys.argv[1:])
        except KeyboardInterrupt:
            sys.exit(interrupts.INTERRUPTED)
        except BrokenPipeError:
            abandon(sys.stdout)
            sys.exit(BROKEN_PIPE)
        except MemoryError as e:
            fail(str(e) or "there is not enough memory; ask for less at once")
        except (ValueError, ConnectionError) as e:
            fail(str(e))
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) and not e.filename:
                abandon(sys.stdout)
                fail(f"cannot write the text: {e.strerror}")
            fail(f"{e.filename}: {e.strerror}" if e.filename else str(e))
        finally:
            interrupts.end_at_once()
