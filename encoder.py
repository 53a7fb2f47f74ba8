"""GPT-2's byte-level BPE: text <-> token ids.

Follows openai/gpt-2's src/encoder.py. Text is split into words by a regular expression, each word is written as
UTF-8 bytes, each byte stands for one printable character, and neighbouring characters are merged in the order of
vocab.bpe until no merge applies. encoder.json gives the pieces their ids. The characters of nanoGPT's character-level
models stand for themselves.

Left out: training a vocabulary (tools/train_demo.py).
"""

import codecs
import heapq
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain

import regex

from checkpoints import DOWNLOAD_AGAIN

MODELS_DIR = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models")  # in whatever folder one is
END_OF_TEXT = "<|endoftext|>"
# openai/gpt-2, src/encoder.py: contractions, then runs of letters, of digits, of anything else, and of white space,
# which leaves its last space to the word that follows.
WORDS = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")


def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each byte; those that print keep their own."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


BYTE_TO_CHAR = bytes_to_unicode()
LATIN1_TO_CHAR = str.maketrans({chr(b): c for b, c in BYTE_TO_CHAR.items()})
CHAR_TO_LATIN1 = str.maketrans({c: chr(b) for b, c in BYTE_TO_CHAR.items()})


class Encoder:
    """A vocabulary: ids of pieces (`token_ids`) and the order in which pairs merge (`merge_ranks`).

    `added`: ids of tokens that are found in a text before it is split into words, as <|endoftext|>, which is the only
    one unless given. `patterns`: regular expressions that find them, themselves unless given. `eot_ids` end a text, and
    `start_id` begins an empty one. `adds_space`: a text begins with a space where it has none.
    """

    def __init__(
        self,
        token_ids: dict[str, int],
        merge_ranks: dict[tuple[str, str], int],
        added: dict[str, int] | None = None,
        patterns: dict[str, str] | None = None,
        eot_ids: Sequence[int] | None = None,
        start_id: int | None = None,
        adds_space: bool = False,
    ):
        self.token_ids, self.merge_ranks = token_ids, merge_ranks
        if added is None:
            added = {END_OF_TEXT: token_ids[END_OF_TEXT]} if END_OF_TEXT in token_ids else {}
        self.added, self.patterns, self.adds_space = added, patterns, adds_space
        self.tokens = {i: token for token, i in token_ids.items()} | {i: token for token, i in added.items()}
        self.n_vocab = len(self.tokens)
        ends = [added[END_OF_TEXT]] if END_OF_TEXT in added else []
        self.eot_ids = tuple(ends if eot_ids is None else eot_ids)
        self.eot_id = next(iter(self.eot_ids), None)  # None in a vocabulary without it
        self.start_id = self.eot_id if start_id is None else start_id
        longest = sorted(added, key=len, reverse=True)
        found = "|".join(f"({patterns[text] if patterns else regex.escape(text)})" for text in longest)
        self._added, self._added_ids = regex.compile(found) if found else None, [added[text] for text in longest]
        self._word_ids = lru_cache(maxsize=1 << 16)(self._merge_word)  # text repeats its words

    def __reduce__(self):  # without its cache, which cannot be pickled
        settings = (self.added, self.patterns, self.eot_ids, self.start_id, self.adds_space)
        return Encoder, (self.token_ids, self.merge_ranks, *settings)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of `text`; `<|endoftext|>` is plain text unless `allow_special` gives it, and others, its own id.

        A lone surrogate, which UTF-8 cannot hold, counts as U+FFFD, as in tiktoken.
        """
        if not allow_special or not self._added:
            return self._encode_words(text)
        ids, start = [], 0
        for found in self._added.finditer(text):
            ids += [*self._encode_words(text[start : found.start()]), self._added_ids[found.lastindex - 1]]
            start = found.end()
        return ids + self._encode_words(text[start:])

    def _encode_words(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if self.adds_space and text and not text.startswith(" "):
            text = " " + text
        return list(chain.from_iterable(map(self._word_ids, WORDS.findall(text))))

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text to continue: added tokens count, and an empty text starts from <|endoftext|>."""
        ids = self.encode(text, allow_special=True)
        return ids if ids or self.start_id is None else [self.start_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. ValueError: an id outside the vocabulary."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """One piece of text for each id, held back while a character is incomplete (an emoji spans several tokens)."""
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield utf8.decode(self.token_bytes(i))
        yield utf8.decode(b"", final=True)

    def token_bytes(self, i: int) -> bytes:
        """The bytes of one token. ValueError: an id outside the vocabulary."""
        if i not in self.tokens:
            raise ValueError(f"token id {i} is not in this vocabulary of {self.n_vocab} ids (0 to {max(self.tokens)})")
        token = self.tokens[i]
        return token.encode() if token in self.added else token.translate(CHAR_TO_LATIN1).encode("latin-1")

    def _merge_word(self, word: str) -> tuple[int, ...]:
        """The ids of one word: always the pair of lowest rank next, everywhere it stands, from left to right.

        The positions of each pair wait in a bucket of their own and the ranks in a heap, so a word of n characters
        takes n log n steps, where OpenAI's loop over the whole word for each merge takes n squared.
        """
        parts: list[str | None] = list(word.encode().decode("latin-1").translate(LATIN1_TO_CHAR))
        after = list(range(1, len(parts) + 1))  # the next part still there, for each position
        before = list(range(-1, len(parts) - 1))
        waiting: dict[int, list[int]] = {}
        ranks: list[int] = []

        def offer(left: int, right: int) -> None:
            rank = self.merge_ranks.get((parts[left], parts[right]))
            if rank is None:
                return
            if rank not in waiting:
                waiting[rank] = []
                heapq.heappush(ranks, rank)
            waiting[rank].append(left)

        for left in range(len(parts) - 1):
            offer(left, left + 1)
        while ranks:
            rank = heapq.heappop(ranks)
            merged_at = []
            for left in sorted(waiting.pop(rank)):
                right = after[left]
                # One of the two may have been merged with its other neighbour since.
                if right == len(parts) or self.merge_ranks.get((parts[left], parts[right])) != rank:
                    continue
                parts[left], parts[right] = parts[left] + parts[right], None
                after[left] = after[right]
                if after[left] < len(parts):
                    before[after[left]] = left
                merged_at.append(left)
            for left in merged_at:
                if before[left] >= 0:
                    offer(before[left], left)
                if after[left] < len(parts):
                    offer(left, after[left])
        return tuple(self.token_ids[part] for part in parts if part is not None)


class CharacterEncoder(Encoder):
    """A vocabulary of single characters, which nanoGPT's character-level models have: no words, bytes or merges."""

    def __init__(self, token_ids: dict[str, int]):
        super().__init__(token_ids, {}, added={}, start_id=token_ids.get("\n"))  # as nanoGPT's sample.py begins
        self.added = token_ids  # decoded as they are, not from the byte alphabet

    def __reduce__(self):
        return CharacterEncoder, (self.token_ids,)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The id of each character; none is special. ValueError: one is not in the vocabulary."""
        if foreign := set(text) - self.token_ids.keys():
            raise ValueError(
                f"the characters {sorted(foreign)[:5]} are not among the {self.n_vocab} of this model's vocabulary; "
                "leave them out"
            )
        return [self.token_ids[c] for c in text]


# ----------------------------------------------------------------------------------------------------------------------
# Reading encoder.json and vocab.bpe
# ----------------------------------------------------------------------------------------------------------------------


def check_token_ids(token_ids, path: str, added=()) -> dict[str, int]:
    """A mapping of pieces to distinct ids that covers all 256 bytes; `added` may be pieces of another kind.

    ValueError: `token_ids`, of the file `path`, is none.
    """
    if not isinstance(token_ids, dict) or set(map(type, token_ids.values())) != {int}:
        raise ValueError(f"{path}: expected a JSON object of strings to whole numbers; {DOWNLOAD_AGAIN}")
    if len(set(token_ids.values())) != len(token_ids) or min(token_ids.values()) < 0:
        raise ValueError(f"{path}: expected distinct ids from 0 up, found another; {DOWNLOAD_AGAIN}")
    if missing := set(BYTE_TO_CHAR.values()) - token_ids.keys():
        raise ValueError(f"{path}: expected a token for each of the 256 bytes, found none for {sorted(missing)[:5]}")
    if foreign := set("".join(token_ids.keys() - set(added))) - set(BYTE_TO_CHAR.values()):
        raise ValueError(f"{path}: expected tokens written in GPT-2's byte alphabet, found {sorted(foreign)[:5]}")
    return token_ids


def rank_merges(pairs: list[tuple], token_ids: dict[str, int], path: str, first: int = 1) -> dict[tuple[str, str], int]:
    """pair -> rank. ValueError: one is no pair of pieces that makes a piece, or is there twice."""
    ranks: dict[tuple[str, str], int] = {}
    for number, pair in enumerate(pairs, start=first):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= token_ids.keys() or pair in ranks:
            raise ValueError(
                f"{path}, line {number}: expected two pieces that make a token of the vocabulary, each pair once, "
                f"found {' '.join(pair)[:40]!r}; the files must belong together"
            )
        ranks[pair] = len(ranks)
    return ranks


def read_token_ids(path: str) -> dict[str, int]:
    """encoder.json, checked, or a ValueError."""
    with open(path, encoding="utf-8") as f:
        try:
            token_ids = json.load(f)
        except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, or nested a thousand deep
            raise ValueError(f"{path}: expected a JSON object of token ids, found {e}; {DOWNLOAD_AGAIN}") from e
    return check_token_ids(token_ids, path)


def read_merge_ranks(path: str, token_ids: dict[str, int]) -> dict[tuple[str, str], int]:
    """vocab.bpe, one merge a line after the version line, as pair -> rank, or a ValueError."""
    with open(path, encoding="utf-8") as f:
        try:
            lines = f.read().split("\n")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: expected UTF-8 text, found {e}; {DOWNLOAD_AGAIN}") from e
    if not lines[0].startswith("#version"):
        raise ValueError(f"{path}: expected '#version' in line 1, found {lines[0][:40]!r}; {DOWNLOAD_AGAIN}")
    pairs = [tuple(line.split()) for line in lines[1:]]
    while pairs and not pairs[-1]:
        pairs.pop()
    return rank_merges(pairs, token_ids, path, first=2)


def get_encoder(model_size: str, models_dir: str = MODELS_DIR) -> Encoder:
    """The encoder of `models_dir/model_size`. ValueError: a damaged file, with its name."""
    folder = os.path.join(models_dir, model_size)
    token_ids = read_token_ids(os.path.join(folder, "encoder.json"))
    return Encoder(token_ids, read_merge_ranks(os.path.join(folder, "vocab.bpe"), token_ids))
