"""Ctrl-C during the imports: a module of its own, because every import before the call is one more moment for it."""

import signal


def end_quietly() -> None:
    """Let Ctrl-C end the program as it ends others, without a traceback, until `cli.run` takes over, and after it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
