"""What Ctrl-C does. It imports next to nothing: until its first function is called, Ctrl-C ends in a traceback."""

import os
import signal

INTERRUPTED = 130  # the status that shells give to programs ended by this signal: 128 + 2


def is_ignored() -> bool:
    """As under nohup, and in a program that has a handler of its own."""
    ours = (signal.SIG_DFL, signal.default_int_handler, raise_once, end)
    return signal.getsignal(signal.SIGINT) not in ours


def end_quietly() -> None:
    """Let Ctrl-C end the program as it ends others, without a traceback, until `end_with_status` takes over."""
    if not is_ignored():
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(number, frame, exit=os._exit) -> None:
    exit(INTERRUPTED)


def raise_once(number, frame) -> None:
    """KeyboardInterrupt; the next Ctrl-C ends the program at once, wherever the first has got to."""
    signal.signal(signal.SIGINT, end)
    raise KeyboardInterrupt


def end_with_status() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, from which `command.run` makes a status. Who catches it calls this again."""
    if not is_ignored():
        signal.signal(signal.SIGINT, raise_once)


def end_at_once() -> None:
    """Let Ctrl-C end the program at once, with its status. With SIG_DFL Python would print that it lost a signal."""
    if not is_ignored():
        signal.signal(signal.SIGINT, end)
