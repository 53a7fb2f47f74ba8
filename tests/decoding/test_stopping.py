"""Where a text ends."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decoding.stopping import before_stop, check_overflow, check_stops, has_ended, slide_of, text_until_end
from encoder import BYTE_TO_CHAR

PIECES = st.lists(st.text("ab", max_size=3), max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


@given(PIECES, STOPS)
def test_a_text_ends_before_the_first_stop_that_is_complete(pieces, stops):
    for n in range(len(pieces) + 1):  # the first piece that completes a stop ends the text
        text = "".join(pieces[:n])
        if found := [text.index(stop) for stop in stops if stop in text]:
            text = text[: min(found)]
            break
    assert "".join(before_stop(pieces, stops)) == text


@given(PIECES, st.text("ab", min_size=1, max_size=4))
def test_how_a_text_is_cut_does_not_matter_for_one_stop(pieces, stop):
    assert "".join(before_stop(pieces, [stop])) == "".join(pieces).split(stop)[0]


@given(PIECES, STOPS)
def test_no_more_is_held_back_than_may_begin_a_stop(pieces, stops):
    sent = ""
    source = iter(pieces)
    for n, piece in enumerate(before_stop(source, stops), 1):
        sent += piece
        text = "".join(pieces[:n])
        held = text[len(sent) :]
        if n > len(pieces) or any(stop in text for stop in stops):
            break
        assert text == sent + held and (held == "" or any(stop.startswith(held) for stop in stops))


@given(PIECES, STOPS)
def test_nothing_is_read_after_the_end(pieces, stops):
    read = []
    list(before_stop((read.append(piece) or piece for piece in pieces), stops))
    ends = [n for n in range(len(pieces) + 1) if any(stop in "".join(pieces[:n]) for stop in stops)]
    assert len(read) == (ends[0] if ends else len(pieces))


EVIL = ["日本", "🙂", "é", "a\n", "\n\n", "ROMEO:", " the", "<|endoftext|>"]


@pytest.mark.parametrize("stop", EVIL)
@pytest.mark.parametrize("before", ["", "x", "🙂é", "ROMEO: the\n"])
def test_the_end_is_seen_at_the_token_that_completes_it(tiny, before, stop):
    """Also when a stop spans tokens, or a character does: at the first token at which the text is cut."""
    encoder, _ = tiny
    ids = encoder.encode(before + stop + " and more of it, 日本 or not")
    n = next(n for n in range(1, len(ids) + 1) if stop in encoder.decode(ids[:n]))
    ended = [has_ended(encoder, ids[:i], [stop], True) for i in range(1, n + 1)]
    assert ended == [False] * (n - 1) + [True]
    text = encoder.decode(ids[:n])
    assert "".join(text_until_end(encoder, ids, [stop], True)) == text[: text.index(stop)]
    read = []
    list(text_until_end(encoder, (read.append(i) or i for i in ids), [stop], True))
    assert len(read) == n


@given(st.binary(max_size=12), st.sampled_from(["\ufffd", "\ufffd" * 3, "\ufffdA", "🙂\ufffd", "🙂"]))
def test_bytes_that_are_no_characters_end_a_text_as_they_are_shown(tiny, noise, stop):
    """The beginning of a character is none yet, nor is its end what stands where the text is cut to look at its end."""
    encoder, _ = tiny
    utf8 = "🙂A🙂".encode()
    ids = [encoder.token_ids[BYTE_TO_CHAR[b]] for b in utf8 + bytes(utf8[b % len(utf8)] for b in noise)]
    read = []
    list(text_until_end(encoder, (read.append(i) or i for i in ids), [stop], True))
    assert next((n for n in range(1, len(ids) + 1) if has_ended(encoder, ids[:n], [stop], True)), len(ids)) == len(read)


def test_a_stop_that_no_text_can_hold_never_ends_one(tiny):
    encoder, _ = tiny
    assert not has_ended(encoder, encoder.encode("a\udcff"), ["\udcff"], True)


def test_endoftext_ends_unless_it_is_ignored(tiny):
    encoder, _ = tiny
    ids = [*encoder.encode("one"), encoder.eot_id, *encoder.encode(" two")]
    n = ids.index(encoder.eot_id) + 1
    assert "".join(text_until_end(encoder, ids, [], False)) == "one"
    assert "".join(text_until_end(encoder, ids, [], True)) == "one<|endoftext|> two"
    assert has_ended(encoder, ids[:n], [], False) and not has_ended(encoder, ids[:n], [], True)
    assert has_ended(encoder, ids[:n], ["<|endoftext|>"], True)
    assert not has_ended(encoder, ids, [], False)  # only the newest is looked at


def test_half_a_character_is_shown_at_the_end_only(tiny):
    encoder, _ = tiny
    ids = encoder.encode("🙂")
    assert len(ids) > 1
    assert "".join(text_until_end(encoder, ids[:-1], ["x"], False)) == "\ufffd"
    assert list(filter(None, text_until_end(encoder, ids, ["x"], False))) == ["🙂"]


def test_how_far_the_window_moves():
    assert slide_of("error", None, 100) is None
    assert [slide_of("slide", None, n_ctx) for n_ctx in (1, 2, 5, 1024)] == [1, 1, 2, 512]
    assert slide_of("slide", 3, 100) == 3


def test_what_is_refused():
    with pytest.raises(ValueError, match="stop is '', expected a text of one character or more"):
        check_stops(["a", ""])
    with pytest.raises(ValueError, match="overflow is 'wrap', expected error or slide"):
        check_overflow("wrap", None)
    with pytest.raises(ValueError, match="slide_by is 5, expected none unless --overflow slide is given too"):
        check_overflow("error", 5)
    check_overflow("slide", 5)
