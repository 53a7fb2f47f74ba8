"""A vocabulary in Hugging Face's files: tokenizer.json, or vocab.json, merges.txt and added_tokens.json.

Read is what GPT-2 has, byte-level BPE (tokenizers' ByteLevel and BPE). Everything that would split or merge a text
otherwise (normalizers, other models, templates that add tokens) is refused by name.
"""

import os
import re
import reprlib
import sys
from typing import NamedTuple

from checkpoints import COPY_AGAIN
from checkpoints.files import check_files, present, read_json

TOKENIZER, TOKEN_IDS, MERGES, ADDED = "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"
SETTINGS, MAX_SIZE = "tokenizer_config.json", 1 << 26  # bytes of one of these; GPT-2's largest has 3.6e6
# Files of tokenizers that are no byte-level BPE.
FOREIGN = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "spm.model", "vocab.txt")
END_OF_TEXT = "<|endoftext|>"


class Vocabulary(NamedTuple):
    """`added`: tokens that are found in a text before it is split into words, as regular expressions, and their ids."""

    path: str
    token_ids: dict[str, int]
    merges: list[tuple[str, ...]]
    added: dict[str, int]
    patterns: dict[str, str]
    adds_space: bool = False

    def within(self, n_vocab: int) -> "Vocabulary":
        """Without added tokens that the weights have no row for, as real models have them: a word on stderr.

        ValueError: an added token has the id of another token.
        """
        added = {text: i for text, i in self.added.items() if i < n_vocab}
        if outside := [f"{text} ({i})" for text, i in self.added.items() if i >= n_vocab]:
            print(f"{self.path}: left out, the weights have {n_vocab} rows: {', '.join(outside)}", file=sys.stderr)
        pieces = {i: piece for piece, i in self.token_ids.items() if is_whole(i)}
        for text, i in added.items():
            if pieces.setdefault(i, text) != text or self.token_ids.get(text, i) != i:
                raise ValueError(f"{self.path}: {text!r} and {pieces[i]!r} both have id {i}; {COPY_AGAIN}")
        return self._replace(added=added)


def check_settings(found: dict, expected: dict, path: str) -> None:
    """ValueError: one of the settings in `found` is none of those in `expected`, which lists what may be there."""
    for name, values in expected.items():
        if found.get(name) not in values:
            raise ValueError(
                f"{path}: {name} is {reprlib.repr(found.get(name))}, expected {reprlib.repr(values[0])}; "
                "this program has GPT-2's byte-level BPE only"
            )


def is_whole(i) -> bool:
    return type(i) is int and 0 <= i < 1 << 31


def pattern_of(token: dict) -> str:
    """The regular expression that finds an added token, with the white space that it takes along."""
    text = re.escape(token["content"])
    if token.get("single_word"):
        text = rf"(?<!\w){text}(?!\w)"
    before = r"(?<!\s)\s*"  # from where white space begins, or each of its characters would be tried as a beginning
    return (before if token.get("lstrip") else "") + text + (r"\s*" if token.get("rstrip") else "")


def add_tokens(entries: list, path: str) -> tuple[dict[str, int], dict[str, str]]:
    """(ids by text, regular expressions by text) of entries as tokenizers writes them."""
    ids: dict[str, int] = {}
    patterns: dict[str, str] = {}
    for entry in entries:
        content, i = (entry.get("content"), entry.get("id")) if isinstance(entry, dict) else (None, None)
        if not isinstance(content, str) or not content or not is_whole(i) or content in ids:
            raise ValueError(f"{path}: expected an added token, found {reprlib.repr(entry)}; {COPY_AGAIN}")
        ids[content], patterns[content] = i, pattern_of(entry)
    return ids, patterns


def parts_of(section) -> list[dict]:
    """A step of a tokenizer, or the steps of which a Sequence is made."""
    if not isinstance(section, dict):
        return []
    if section.get("type") != "Sequence":
        return [section]
    inner = [value for value in section.values() if isinstance(value, list)]
    return [part for parts in inner for part in parts if isinstance(part, dict)]


def adds_nothing(part: dict) -> bool:
    """Whether a step after splitting leaves a single text as it is: a template of the text alone."""
    template = part.get("single") if part.get("type") == "TemplateProcessing" else None
    return isinstance(template, list) and len(template) == 1 and [*template[0]] == ["Sequence"]


def read_tokenizer(path: str) -> Vocabulary:
    """tokenizer.json. ValueError: it is damaged, or no byte-level BPE as GPT-2's."""
    content = read_json(path)
    model = content.get("model") if isinstance(content.get("model"), dict) else {}
    check_settings(content, {"normalizer": (None,)}, path)
    nothing = (None, "")
    check_settings(model, {"type": ("BPE", None), "continuing_subword_prefix": nothing}, path)
    check_settings(model, {"end_of_word_suffix": nothing, "dropout": (None, 0)}, path)
    check_settings(model, {"byte_fallback": (False, None), "ignore_merges": (False, None)}, path)
    before = parts_of(content.get("pre_tokenizer"))
    check_settings({"pre_tokenizer": [part.get("type") for part in before]}, {"pre_tokenizer": (["ByteLevel"],)}, path)
    check_settings(before[0], {"use_regex": (True, None)}, path)
    for part in parts_of(content.get("post_processor")):
        if not adds_nothing(part):
            check_settings(part, {"type": ("ByteLevel",)}, path)
    token_ids, merges, added = model.get("vocab"), model.get("merges"), content.get("added_tokens") or []
    if not all(isinstance(part, kind) for part, kind in ((token_ids, dict), (merges, list), (added, list))):
        raise ValueError(f"{path}: expected a vocabulary, merges and added tokens; {COPY_AGAIN}")
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(pair, list | tuple) and all(isinstance(part, str) for part in pair) for pair in pairs):
        raise ValueError(f"{path}: expected merges as strings or pairs of strings; {COPY_AGAIN}")
    ids, patterns = add_tokens(added, path)
    return Vocabulary(path, token_ids, [*map(tuple, pairs)], ids, patterns, before[0].get("add_prefix_space") is True)


def read_merges(path: str) -> list[tuple[str, ...]]:
    with open(path, encoding="utf-8") as f:
        try:
            lines = f.read().split("\n")
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: expected UTF-8 text, found {e}; {COPY_AGAIN}") from e
    return [tuple(line.split(" ")) for line in lines[lines[0].startswith("#version") :] if line]


def read_slow(folder: str) -> Vocabulary:
    """vocab.json and merges.txt, what added_tokens.json adds, and tokenizer_config.json."""
    path, added_path, settings_path = (os.path.join(folder, name) for name in (TOKEN_IDS, ADDED, SETTINGS))
    token_ids = read_json(path)
    settings = read_json(settings_path) if os.path.exists(settings_path) else {}
    check_settings(settings, {"add_bos_token": (False, None)}, settings_path)
    if "GPT2" not in (kind := str(settings.get("tokenizer_class") or "GPT2Tokenizer")):
        raise ValueError(f"{settings_path}: tokenizer_class is {kind}, expected GPT2Tokenizer; others are not read")
    entries = {END_OF_TEXT: {"content": END_OF_TEXT, "id": token_ids[END_OF_TEXT]}} if END_OF_TEXT in token_ids else {}
    if os.path.exists(added_path):
        entries |= {text: {"content": text, "id": i} for text, i in read_json(added_path).items()}
    for i, entry in (settings.get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict):
            entries[entry.get("content")] = entry | {"id": int(i) if i.isascii() and i.isdigit() else i}
    ids, patterns = add_tokens(list(entries.values()), added_path)
    adds_space = settings.get("add_prefix_space") is True
    return Vocabulary(path, token_ids, read_merges(os.path.join(folder, MERGES)), ids, patterns, adds_space)


def read_vocabulary(folder: str) -> Vocabulary:
    """The vocabulary of a Hugging Face folder; tokenizer.json counts where both forms are there, as for transformers.

    ValueError: a damaged file, another kind of tokenizer, or none.
    """
    names = present(folder, (TOKENIZER, TOKEN_IDS, MERGES, ADDED, SETTINGS))
    check_files(folder, names, dict.fromkeys(names, MAX_SIZE), COPY_AGAIN)
    if TOKENIZER in names:
        return read_tokenizer(os.path.join(folder, TOKENIZER))
    missing = [name for name in (TOKEN_IDS, MERGES) if not os.path.exists(os.path.join(folder, name))]
    if not missing:
        return read_slow(folder)
    foreign = [name for name in FOREIGN if os.path.exists(os.path.join(folder, name))]
    if foreign:
        raise ValueError(f"{folder} has {', '.join(foreign)}: no byte-level BPE as GPT-2's, which is all that is read")
    raise ValueError(f"{folder} lacks {' and '.join(missing)}, and {TOKENIZER}; copy the model's vocabulary there")
