"""Processes that fetch the same model take turns, as long as the one before does something."""

import contextlib
import os
import sys
from collections.abc import Iterator

from checkpoints.download import STALE_S, size_of


@contextlib.contextmanager
def lock(path: str, folder: str) -> Iterator[bool]:
    """Hold the lock file `path` while downloading into `folder`. False: there is none to be had, go on without."""
    try:
        import filelock  # not among the packages that generating needs; without it two processes fetch the same file
    except ImportError:
        yield False
        return
    held = filelock.FileLock(path, fallback_to_soft=False)  # a file that outlives a killed holder is no lock
    if isinstance(held, filelock.SoftFileLock):  # on systems without locks
        yield False
        return
    try:
        yield acquire(held, folder)
    finally:
        held.release()


def acquire(held, folder: str) -> bool:
    """Wait for a lock as long as its holder does something. False: it does not, or nothing can be locked here."""
    import filelock

    timeout, before = 0, None
    while True:
        try:
            held.acquire(timeout=timeout, poll_interval=0.1)
            return True
        except filelock.Timeout:
            now = sizes(folder)
        except (OSError, NotImplementedError):
            return False
        if now == before:
            print(f"{folder}: no progress for {STALE_S} s; going on without waiting", file=sys.stderr)
            return False
        if before is None:
            print(f"{folder}: another process is downloading it; waiting for that", file=sys.stderr)
        timeout, before = STALE_S, now


def sizes(folder: str) -> dict[str, int]:
    return {name: size_of(os.path.join(folder, name)) for name in os.listdir(folder)}
