"""What a run took: times, speed and memory."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np


def n_bytes(params) -> int:
    """Bytes of the weights that are read for every token: all, but one row of wpe, and of wte beside an lm_head."""
    if isinstance(params, np.ndarray):
        return params.nbytes
    if isinstance(params, list):
        return sum(map(n_bytes, params))
    rows = {"wpe", "wte"} if "lm_head" in params else {"wpe"}
    return sum(n_bytes(value) for name, value in params.items() if name not in rows)


def peak_memory_gb() -> float | None:
    """The most memory this process has held, mapped files included."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 / 1e9 for line in f if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def resident_memory_gb() -> float | None:
    """The memory this process holds now, mapped files included; where the system does not say, the most so far."""
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except OSError:
        return peak_memory_gb()


def noted(ids: Iterable[int], *notes: Callable[[int], object]) -> Iterator[int]:
    """The same ids, each handed to all `notes` as it comes."""
    for i in ids:
        for note in notes:
            note(i)
        yield i


class Stopwatch:
    """The times at which tokens came, for --stats."""

    def __init__(self):
        self.started = self.loaded = time.perf_counter()
        self.ticks: list[float] = []

    def watch(self, ids: Iterator[int]) -> Iterator[int]:
        self.loaded = time.perf_counter()
        return noted(ids, lambda _: self.ticks.append(time.perf_counter()))

    def report(self, model, n_prompt: int) -> str:
        first, last = self.ticks[0], self.ticks[-1]
        prefill = first - self.loaded
        lines = [
            f"load     {self.loaded - self.started:8.3f} s",
            f"prefill  {prefill:8.3f} s  {n_prompt / prefill:8.1f} tokens/s, {n_prompt} of them",
        ]
        if n_steps := len(self.ticks) - 1:
            rate = n_steps / (last - first)
            read = f"{rate * n_bytes(model.params) / 1e9:.1f} GB/s of weights read"
            lines.append(f"decode   {last - first:8.3f} s  {rate:8.1f} tokens/s, {n_steps} of them, {read}")
        if peak := peak_memory_gb():
            lines.append(f"memory   {peak:8.3f} GB at the peak")
        return "\n".join(lines)
