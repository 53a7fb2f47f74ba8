"""Where a text ends, and what happens at the end of the context."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

from decoding.sampling import check, is_whole

CONTINUING = bytes(range(0x80, 0xC0))  # all bytes of a character in UTF-8 but its first


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
    if not stops:
        return False
    n_bytes = max(len(stop.encode("utf-8", "surrogatepass")) for stop in stops)  # a token has one or more
    text = whole_characters(b"".join(map(encoder.token_bytes, ids[-n_bytes - 3 :])), is_cut=len(ids) > n_bytes + 3)
    return any(stop in text for stop in stops)


def whole_characters(utf8: bytes, is_cut: bool) -> str:
    """The text without the rest of a character that begins before it, if it is cut there, and without half of one."""
    n_rest = len(utf8[:3]) - len(utf8[:3].lstrip(CONTINUING)) if is_cut else 0
    return codecs.getincrementaldecoder("utf-8")("replace").decode(utf8[n_rest:])


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
    """By how many tokens the window moves: slide_by, or half of the context; None if it does not move."""
    if overflow == "error":
        return None
    return max(1, n_ctx // 2) if slide_by is None else slide_by
