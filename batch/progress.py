"""How far a run is, on stderr: a bar in a terminal, and one line at the end."""

import sys
import time
from collections.abc import Iterator

from batch.records import GO_ON
from batch.schedule import Result


def counted(n: int, name: str) -> str:
    return f"{n:,} {name}" + ("" if n == 1 else "s")


class Progress:
    """Counts what is done of `n_all` prompts, of which `n_before` were done by earlier runs."""

    def __init__(self, n_all: int, n_before: int):
        from tqdm import tqdm  # only here is more than one line shown

        self.n_all, self.n_before = n_all, n_before
        self.n = self.n_errors = self.n_tokens = 0
        self.started = time.monotonic()
        self.bar = tqdm(total=n_all, initial=n_before, unit=" prompts", disable=None, smoothing=0.05)

    def watch(self, results: Iterator[Result]) -> Iterator[Result]:
        for result in results:
            self.n += 1
            self.n_errors += bool(result.error)
            self.n_tokens += sum(choice.n_tokens for choice in result.choices)
            rate = self.n_tokens / max(1e-9, time.monotonic() - self.started)
            self.bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            self.bar.update()
            yield result

    def end(self) -> None:
        """One line, also of a run that was stopped."""
        self.bar.close()
        print(self.summary(), file=sys.stderr)

    def summary(self) -> str:
        seconds = time.monotonic() - self.started
        parts = [counted(self.n - self.n_errors, "prompt") + " done", counted(self.n_errors, "error")]
        parts += [f"{self.n_before:,} done before"] * bool(self.n_before)
        parts += [f"{counted(self.n_tokens, 'token')} in {seconds:.1f} s, {self.n_tokens / max(1e-9, seconds):.1f}/s"]
        if n_left := self.n_all - self.n_before - self.n:
            parts += [f"{n_left:,} to do: {GO_ON}"]
        return ", ".join(parts)
