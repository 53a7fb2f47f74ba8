"""Where a text ends, and what happens at the end of the context."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from decoding.sampling import check, is_whole


def before_stop(texts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a text up to the first of `stops` in it. What may be the beginning of one is held back."""
    held = ""
    for text in texts:
        held += text
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)]
            return
        lengths = [n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])]
        n_sent = len(held) - max(lengths, default=0)
        yield held[:n_sent]
        held = held[n_sent:]
    yield held


def text_until_end(encoder, ids: Iterable[int], stops: Sequence[str], ignore_eot: bool) -> Iterator[str]:
    """The text of `ids` in pieces, up to <|endoftext|> (unless that is ignored) and to the first of `stops`."""
    if not ignore_eot:
        ids = takewhile(lambda i: i not in encoder.eot_ids, ids)
    return before_stop(encoder.decode_stream(ids), stops)


def has_ended(encoder, ids: Sequence[int], stops: Sequence[str], ignore_eot: bool) -> bool:
    """Whether the newest of `ids` is <|endoftext|> (unless that is ignored) or completes one of `stops`."""
    if ids[-1] in encoder.eot_ids and not ignore_eot:
        return True
    n_bytes = max((len(stop.encode()) for stop in stops), default=0)  # a token has one or more
    text = encoder.decode(ids[-n_bytes - 3 :]) if stops else ""  # a character has up to four
    return any(stop in text for stop in stops)


def check_stops(stops: Sequence[str]) -> None:
    for stop in stops:
        check("stop", stop, stop != "", "a text of one character or more")


def check_overflow(overflow: str, slide_by) -> None:
    check("overflow", overflow, overflow in ("error", "slide"), "error or slide")
    check("slide_by", slide_by, slide_by is None or overflow == "slide", "none unless --overflow slide is given too")
    check(
        "slide_by", slide_by, slide_by is None or (is_whole(slide_by) and slide_by > 0), "a whole number of 1 or more"
    )


def slide_of(overflow: str, slide_by: int | None, n_ctx: int) -> int | None:
    """By how many tokens the window moves: half of the context unless it is said, None if it does not."""
    if overflow == "error":
        return None
    return max(1, n_ctx // 2) if slide_by is None else slide_by
