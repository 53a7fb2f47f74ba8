"""What the program asks the system about memory, and tells it."""

import math
import os

import numpy as np


def keep_freed_memory() -> None:
    """Keep freed memory in the process, so that the next array needs no page faults. Other systems: does nothing.

    Freeing one untouched 31 MB block raises glibc's limits to its size (mallopt(3), "dynamic mmap threshold").
    """
    np.empty(31 << 20, np.uint8)


def first_number(path: str, name: str = "") -> float:
    """The number on the line of a file that begins with `name`; infinite where there is none."""
    try:
        with open(path) as f:
            return next(float(line.removeprefix(name).split()[0]) for line in f if line.startswith(name))
    except (OSError, ValueError, StopIteration, IndexError):
        return float("inf")


def available_bytes() -> float:
    """Memory that can be had without swapping, the page cache included; half of all where the system does not say."""
    in_system = first_number("/proc/meminfo", "MemAvailable:") * 1024
    if in_system == float("inf") and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        in_system = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    in_group = first_number("/sys/fs/cgroup/memory.max")  # of a container; its page cache counts as used
    if in_group < float("inf"):
        in_group -= first_number("/sys/fs/cgroup/memory.current") - first_number("/sys/fs/cgroup/memory.stat", "file ")
    return min(in_system, in_group)


def check_memory(n_bytes: int, purpose: str) -> None:
    """MemoryError: more than is available. The system might promise it all the same."""
    if n_bytes >= 1e9 and n_bytes > (available := available_bytes()):
        raise MemoryError(
            f"{n_bytes / 1e9:,.1f} GB are needed for {purpose}, {available / 1e9:,.1f} GB are available; compute fewer "
            "texts or beams at once, or shorter ones"
        )


def room(shape: tuple[int, ...]) -> np.ndarray:  # -> float32[shape]
    """Memory for keys and values. MemoryError: more than is available."""
    check_memory(4 * math.prod(shape), "keys and values")
    return np.empty(shape, np.float32)
