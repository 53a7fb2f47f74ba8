import itertools
import json
import os
import pickle
import random
import time

import pytest
from helpers import MODELS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from encoder import (
    BYTE_TO_CHAR,
    END_OF_TEXT,
    WORDS,
    CharacterEncoder,
    Encoder,
    get_encoder,
    read_merge_ranks,
    read_token_ids,
)

with open(os.path.join(ROOT, "tests", "goldens", "gpt2_tokens.json"), encoding="utf-8") as f:
    GOLDENS = json.load(f)
OPENAI_DIR = os.environ.get("GPT2_MODELS_DIR", MODELS)

EVIL = [
    "",
    " ",
    "\n\n \n",
    "\t\tx",
    "a" * 3000,
    " " * 3000 + "x",
    "I'm you're THEY'LL don't 'tis ''s",
    "\x00\x01\x7f\x80\xa0\xad\u200b\ufeff",
    "日本語のテキスト",
    "🙂👍🏽👨‍👩‍👧‍👦",
    "e\u0301 \u1e9b\u0323 ﷺ ﬁ İi",
    "١٢٣ Ⅷ ½ ²",
    "\u2028\u2029\x85\r\n\v\f",
    "<|endoftext|>",
    "<|endoftext|",
    "x" + "\U0010ffff" + "\ud7ff",
    "العربية עברית हिन्दी ไทย",
    "{}[]()<>!@#$%^&*~`|\\/?.,;:'\"-_=+",
]


@pytest.fixture(scope="session")
def openai_encoder():
    if not os.path.exists(os.path.join(OPENAI_DIR, "124M", "vocab.bpe")):
        pytest.skip(f"OpenAI's vocabulary is not in {OPENAI_DIR}/124M; GPT2_MODELS_DIR says where it is")
    return get_encoder("124M", OPENAI_DIR)


@pytest.fixture(scope="session")
def encoder():
    return get_encoder("tiny", MODELS)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: repr(golden["text"][:20]))
def test_ids_equal_openais(openai_encoder, golden):
    assert openai_encoder.encode(golden["text"]) == golden["ids"]
    assert openai_encoder.decode(golden["ids"]) == golden["text"]


def slow_merge(encoder, word):
    """OpenAI's own procedure: find the lowest pair, merge it everywhere, look again."""
    parts = list(word)
    while True:
        ranked = [encoder.merge_ranks.get(pair) for pair in itertools.pairwise(parts)]
        if not any(rank is not None for rank in ranked):
            return [encoder.token_ids[part] for part in parts]
        lowest = min(rank for rank in ranked if rank is not None)
        merged, i = [], 0
        while i < len(parts):
            pair = tuple(parts[i : i + 2])
            width = 2 if encoder.merge_ranks.get(pair) == lowest else 1
            merged.append("".join(parts[i : i + width]))
            i += width
        parts = merged


def test_merging_equals_openais_procedure(encoder):
    rng = random.Random(0)
    for _ in range(300):
        alphabet = rng.choice(["ab", "aeiou", "the ", "etaoinshrdlu", "Aa1", "thou"])
        word = "".join(rng.choices(alphabet.strip(), k=rng.randrange(1, 60)))
        assert list(encoder._merge_word(word)) == slow_merge(encoder, word)


def test_merges_out_of_order_follow_openais_procedure():
    """A vocabulary no training makes: the merge of a product stands before the merge that makes it."""
    letters = {chr(c): c for c in range(ord("a"), ord("d"))}
    ranks = {("ab", "c"): 0, ("a", "b"): 1, ("b", "c"): 2, ("abc", "abc"): 3, ("c", "abc"): 4}
    pieces = {left + right for left, right in ranks}
    ids = letters | {piece: 1000 + i for i, piece in enumerate(sorted(pieces))}
    encoder = Encoder(ids, ranks)
    rng = random.Random(1)
    for _ in range(200):
        word = "".join(rng.choices("abc", k=rng.randrange(1, 20)))
        assert list(encoder._merge_word(word)) == slow_merge(encoder, word)


@pytest.mark.parametrize("text", EVIL, ids=lambda text: ascii(text[:20]))
def test_any_text_survives(encoder, text):
    ids = encoder.encode(text)
    assert encoder.decode(ids) == text
    assert "".join(encoder.decode_stream(ids)) == text
    assert encoder.eot_id not in ids


@given(st.text(st.characters()))  # lone surrogates too
def test_every_text_survives(encoder, text):
    ids = encoder.encode(text)
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert encoder.decode(ids) == "".join(encoder.decode_stream(ids)) == expected


@given(st.text(st.sampled_from("the aou'sl\n 1.é日") | st.characters(exclude_categories=("Cs",)), max_size=80))
def test_every_text_is_encoded_as_by_openais_procedure(encoder, text):
    words = ["".join(BYTE_TO_CHAR[b] for b in word.encode()) for word in WORDS.findall(text)]
    assert encoder.encode(text) == [i for word in words for i in slow_merge(encoder, word)]


@given(st.lists(st.integers(0, 2047)))
def test_any_ids_give_text_and_the_stream_gives_the_same(encoder, ids):
    assert "".join(encoder.decode_stream(ids)) == encoder.decode(ids)


@given(st.lists(st.text(st.sampled_from("<|endoftxt>") | st.characters(exclude_categories=("Cs",)))))
def test_every_end_of_text_is_special_on_request_and_none_without(encoder, parts):
    text = END_OF_TEXT.join(parts)
    ids = encoder.encode(text, allow_special=True)
    assert ids.count(encoder.eot_id) == text.count(END_OF_TEXT) and encoder.eot_id not in encoder.encode(text)
    assert encoder.decode(ids) == text


@settings(max_examples=30)
@given(st.text(st.sampled_from("a e\t'.1🙂日\u0301") | st.characters(), min_size=1, max_size=6))
def test_no_repeated_text_is_quadratic(encoder, unit):
    text = unit * (100_000 // len(unit))
    started = time.process_time()
    encoder.encode(text)
    assert time.process_time() - started < 10  # 0.02 to 0.3 s were measured; a quadratic merge takes minutes


def test_lone_surrogates_become_replacement_characters(encoder):
    assert encoder.decode(encoder.encode("a\ud800b\udc80")) == "a\ufffdb\ufffd"
    assert encoder.encode("\ud83d\ude42") == encoder.encode("🙂")


def test_end_of_text_is_special_only_on_request(encoder):
    text = f"One{END_OF_TEXT}{END_OF_TEXT} two"
    assert encoder.eot_id not in encoder.encode(text)
    ids = encoder.encode(text, allow_special=True)
    assert ids == [*encoder.encode("One"), encoder.eot_id, encoder.eot_id, *encoder.encode(" two")]
    assert encoder.decode(ids) == text


def test_streamed_text_never_holds_half_a_character(encoder):
    ids = encoder.encode("a🙂b日")
    pieces = list(encoder.decode_stream(ids))
    assert "".join(pieces) == "a🙂b日" and not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > 4  # the characters did span tokens
    assert "".join(encoder.decode_stream(ids[:2])) == "a\ufffd"  # an end within one is shown


def test_decode_never_raises_on_broken_utf8(encoder):
    rng = random.Random(2)
    for _ in range(200):
        assert isinstance(encoder.decode(rng.choices(range(encoder.n_vocab), k=20)), str)


@pytest.mark.parametrize("bad", [-1, 2048, 10**12])
def test_decode_names_an_id_outside_the_vocabulary(encoder, bad):
    with pytest.raises(ValueError, match=f"token id {bad} is not in this vocabulary of 2048"):
        encoder.decode([1, bad])


@pytest.mark.parametrize("text", ["a" * 10**6, " " * 10**6 + "x", "🙂" * 250_000], ids=["letter", "spaces", "emoji"])
def test_a_megabyte_of_one_thing_is_not_quadratic(encoder, text):
    started = time.perf_counter()
    ids = encoder.encode(text)
    # 0.3 to 1.2 s were measured; a quadratic merge would take hours.
    assert time.perf_counter() - started < 60
    assert encoder.decode(ids) == text


GOOD_IDS = os.path.join(MODELS, "tiny", "encoder.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a JSON object"),
        (b"\xff\xfe{}", "expected a JSON object"),
        (b"[" * 100_000, "expected a JSON object"),
        (b"[1, 2]", "strings to whole numbers"),
        (b'{"a": 1.5}', "strings to whole numbers"),
        (b'{"a": true}', "strings to whole numbers"),
        (b"{}", "strings to whole numbers"),
        (b'{"a": 1, "b": 1}', "distinct ids"),
        (b'{"a": -1}', "distinct ids"),
        (b'{"a": 1}', "a token for each of the 256 bytes"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_a_damaged_encoder_json_is_named(tmp_path, content, message):
    path = tmp_path / "encoder.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        read_token_ids(str(path))
    assert str(path) in str(e.value)


def test_a_token_outside_the_byte_alphabet_is_named(tmp_path):
    token_ids = read_token_ids(GOOD_IDS) | {"two words": 5000}
    path = tmp_path / "encoder.json"
    path.write_text(json.dumps(token_ids))
    with pytest.raises(ValueError, match="byte alphabet"):
        read_token_ids(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected '#version' in line 1"),
        (b"<html>", "expected '#version' in line 1"),
        (b"#version: 0.2\n\xff", "expected UTF-8"),
        (b"#version: 0.2\na\n", "line 2: expected two pieces"),
        (b"#version: 0.2\nt h\nt h e\n", "line 3: expected two pieces"),
        (b"#version: 0.2\nqq zz\n", "line 2: expected two pieces"),
        (b"#version: 0.2\nt h\n\nt h\n", "line 3: expected two pieces"),
    ],
)
def test_a_damaged_vocab_bpe_is_named(tmp_path, content, message):
    path = tmp_path / "vocab.bpe"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as e:
        read_merge_ranks(str(path), read_token_ids(GOOD_IDS))
    assert str(path) in str(e.value)


def test_an_encoder_can_be_pickled():
    encoder = get_encoder("nano", MODELS)
    encoder.encode("to be or not to be")
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.encode("to be or not to be") == encoder.encode("to be or not to be") and copy.eot_id == encoder.eot_id


# ----------------------------------------------------------------------------------------------------------------------
# Vocabularies of characters
# ----------------------------------------------------------------------------------------------------------------------

CHARACTERS = "\n !'abc日é🙂<|endoftx>"


@pytest.fixture
def characters():
    return CharacterEncoder({c: i for i, c in enumerate(CHARACTERS)})


@given(st.text(st.sampled_from(CHARACTERS)))
def test_every_text_of_its_characters_survives(text):
    characters = CharacterEncoder({c: i for i, c in enumerate(CHARACTERS)})
    ids = characters.encode(text)
    assert ids == [CHARACTERS.index(c) for c in text] == characters.encode(text, allow_special=True)
    assert characters.decode(ids) == "".join(characters.decode_stream(ids)) == text
    assert b"".join(map(characters.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize(
    ("text", "named"),
    [("zaz", "['z']"), ("a\x1b", r"['\x1b']"), ("\udc80", r"['\udc80']"), ("Ãé", "['Ã']"), ("日本", "['本']")],
)
def test_a_character_that_the_model_has_not_is_named(characters, text, named):
    with pytest.raises(ValueError) as e:
        characters.encode(text)
    assert str(e.value).startswith(f"the characters {named} are not among the 20 of this model's vocabulary; ")


def test_an_empty_prompt_of_characters_begins_with_a_line_end(characters):
    assert characters.encode_prompt("") == [0] == characters.encode("\n") and characters.encode("") == []
    assert characters.encode_prompt(END_OF_TEXT) == [CHARACTERS.index(c) for c in END_OF_TEXT]
    assert CharacterEncoder({"a": 0}).encode_prompt("") == []


def test_characters_are_what_other_vocabularies_are(characters):
    assert characters.n_vocab == 20 and characters.merge_ranks == {} and characters.eot_id is None
    assert characters.tokens == dict(enumerate(CHARACTERS)) and characters.eot_ids == ()
    copy = pickle.loads(pickle.dumps(characters))
    assert type(copy) is CharacterEncoder and copy.token_ids == characters.token_ids
    assert copy.decode(copy.encode_prompt("abc日")) == "abc日" and copy.encode_prompt("") == [0]
    with pytest.raises(ValueError, match=r"token id 20 is not in this vocabulary of 20 ids \(0 to 19\)"):
        characters.decode([0, 20])
