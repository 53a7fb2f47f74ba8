"""Prompts read one after another: gpt2.py --interactive.

An empty line goes on with the text so far. What a prompt has in common with the text before it, from the beginning, is
not computed again. Ctrl-C ends the text that is being written, Ctrl-D the program.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from itertools import chain

from console import interrupts
from console.stats import noted
from decoding.draft_length import common_length


def lines() -> Iterator[str]:
    """What is typed, until Ctrl-D; from a pipe, its lines."""
    if sys.stdin is None:  # closed by the caller: as if nothing were typed
        return
    sys.stdin.reconfigure(errors="replace")  # as prompts that come whole
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # not on Windows, which has its own
            import readline  # noqa: F401  # gives input() its line editing and history
    while True:
        try:
            if is_terminal and not sys.stdout.isatty():  # stdout is for the text only
                print("> ", end="", file=sys.stderr, flush=True)
            yield input("> " if is_terminal and sys.stdout.isatty() else "").removesuffix("\r")
        except EOFError:
            print(end="\n" if is_terminal else "", file=sys.stderr)  # after the "> "
            return
        except KeyboardInterrupt:  # forget the line
            interrupts.end_with_status()
            print(file=sys.stderr)


class Conversation:
    """The text so far, and its keys and values."""

    def __init__(self, model):
        self.cache = model.new_cache()
        self.n_ctx: int = model.hparams["n_ctx"]
        self.tokens: list[int] = []

    def follow(self, prompt_ids: list[int]) -> None:
        """Go on from `prompt_ids`; what the cache holds of them stays."""
        has_slid = len(self.tokens) > self.n_ctx
        n_same = 0 if has_slid else common_length(self.tokens, prompt_ids[:-1])
        self.cache.length = min(self.cache.length, n_same)
        self.tokens = list(prompt_ids)


def converse(model, encoder, complete: Callable, text_of: Callable, prompt: str | None) -> None:
    """Answer `prompt`, if there is one, and then line after line. complete(ids, cache) is decoded by `text_of`."""
    conversation = Conversation(model)
    for line in chain([] if prompt is None else [prompt], lines()):
        goes_on = line == "" and conversation.tokens
        prompt_ids = list(conversation.tokens) if goes_on else encoder.encode_prompt(line)
        try:
            conversation.follow(prompt_ids)
            for text in text_of(noted(complete(prompt_ids, cache=conversation.cache), conversation.tokens.append)):
                print(text, end="", flush=True)
        except KeyboardInterrupt:  # the text ends here
            interrupts.end_with_status()
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr)
        print(flush=True)
