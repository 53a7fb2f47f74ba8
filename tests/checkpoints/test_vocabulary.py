"""Vocabularies in Hugging Face's files against the tokenizers library, and what is refused."""

import json
import os
import pickle
import shutil

import pytest
import relatives
from helpers import MODELS, write_bytes

import utils
from checkpoints.vocabulary import read_vocabulary

tokenizers = pytest.importorskip("tokenizers")
TEXTS = [
    "",
    " ",
    "JULIET: O Romeo, Romeo!\n\n  wherefore art thou",
    "<|endoftext|><|endoftext|> x",
    "a<pad>b <pad>  c",
    "é\U0001f600 \u200b ñandú  don't 1234",
    "open <left>  the <right>  door<left><right>",
    "word xwordx word, sword words",
    "<|ação|>ação <|ação|> \n",
    "tab\t<left>\n\n<right>\n",
]


def built(adds_space=False):
    """nano's vocabulary in the library, with added tokens of every kind."""
    folder = os.path.join(MODELS, "nano")
    model = tokenizers.models.BPE.from_file(f"{folder}/encoder.json", f"{folder}/vocab.bpe")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    added = tokenizers.AddedToken
    tokenizer.add_special_tokens(["<|endoftext|>", "<pad>"])
    tokenizer.add_tokens(
        [added("<left>", lstrip=True), added("<right>", rstrip=True), added("word", single_word=True), "<|ação|>", "<|"]
    )
    return tokenizer


def load(folder):
    return utils.read_huggingface(str(folder))[0]


@pytest.fixture
def folder(tmp_path):
    """A model whose vocabulary is to be written."""
    relatives.write_folder(tmp_path, {"config": {"vocab_size": 2054}})
    os.remove(tmp_path / "vocab.json")
    os.remove(tmp_path / "merges.txt")
    return tmp_path


@pytest.mark.parametrize("merges", ["pairs", "strings"])
@pytest.mark.parametrize("adds_space", [False, True])
def test_tokenizer_json_alone_gives_the_ids_of_its_library(merges, adds_space, folder):
    tokenizer = built(adds_space)
    content = json.loads(tokenizer.to_str())
    if merges == "strings":
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    encoder = load(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        assert encoder.encode(text, allow_special=True) == ids
        if "ação" not in text:  # the library takes the letters of an added token for bytes
            assert encoder.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    assert encoder.decode(encoder.encode("<|ação|>", allow_special=True)) == ("<|ação|>")
    again = pickle.loads(pickle.dumps(encoder))
    assert [again.encode(text, allow_special=True) for text in TEXTS] == [
        encoder.encode(text, allow_special=True) for text in TEXTS
    ]


def test_the_older_files_say_the_same(folder):
    """vocab.json, merges.txt, added_tokens.json, and what tokenizer_config.json says of the added ones."""
    tokenizer = built()
    relatives.write_tokenizer(str(folder))
    added = tokenizer.get_added_tokens_decoder()
    (folder / "added_tokens.json").write_text(json.dumps({token.content: i for i, token in added.items() if i > 2047}))
    fields = ("content", "lstrip", "rstrip", "single_word", "special", "normalized")
    decoder = {str(i): {name: getattr(token, name) for name in fields} for i, token in added.items()}
    settings = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = load(folder)
    for text in TEXTS:
        assert encoder.encode(text, allow_special=True) == tokenizer.encode(text).ids


def test_added_tokens_without_a_row_are_left_out_aloud(folder, capsys):
    shutil.rmtree(folder)
    relatives.write_folder(folder, {})
    (folder / "added_tokens.json").write_text('{"<pad>": 2048}')
    encoder = load(folder)
    assert encoder.encode("<pad>", allow_special=True) == encoder.encode("<pad>")
    assert "left out, the weights have 2048 rows: <pad> (2048)" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["O", "<|endoftext|>"])
def test_two_tokens_of_one_id_are_refused(other, folder):
    relatives.write_tokenizer(str(folder))
    ids = json.loads((folder / "vocab.json").read_text())
    added = {"<pad>": ids[other]} if other == "O" else {other: 2049}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ValueError, match="both have id"):
        load(folder)


CHANGES = {
    "another model": ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "type is 'Unigram', expected 'BPE'"),
    "no model": ({"model": None}, "expected a vocabulary, merges and added tokens"),
    "a normalizer": ({"normalizer": {"type": "NFC"}}, "normalizer is .'type': 'NFC'., expected None"),
    "no splitting": ({"pre_tokenizer": None}, r"pre_tokenizer is \[\], expected \['ByteLevel'\]"),
    "other splitting": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}},
        "pre_tokenizer is .'Split', 'ByteLevel'.",
    ),
    "no words": ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "use_regex is False, expected True"),
    "a template": (
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {}}, {"Sequence": {}}]}},
        "type is 'TemplateProcessing', expected 'ByteLevel'",
    ),
    "added tokens": ({"added_tokens": [{"id": 3}]}, "expected an added token"),
    "added ids": ({"added_tokens": [{"id": -1, "content": "a"}]}, "expected an added token"),
    "added twice": ({"added_tokens": [{"id": 1, "content": "a"}, {"id": 2, "content": "a"}]}, "expected an added"),
}
PARTS = {
    "dropout": ({"dropout": 0.1}, "dropout is 0.1, expected None"),
    "a suffix": ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix is '</w>'"),
    "a prefix": ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix is '##'"),
    "bytes": ({"byte_fallback": True}, "byte_fallback is True"),
    "merges of numbers": ({"merges": [[1, 2]]}, "expected merges as strings or pairs"),
    "merges of three": ({"merges": [["a", "b", "c"]]}, "expected two pieces that make a token"),
    "a list": ({"vocab": []}, "expected a vocabulary, merges and added tokens"),
    "a word as an id": ({"vocab": {"a": "b"}}, "strings to whole numbers"),
    "few bytes": ({"vocab": {"a": 0}, "merges": []}, "a token for each of the 256 bytes"),
}


@pytest.mark.parametrize("name", [*CHANGES, *PARTS])
def test_other_tokenizers_are_refused_by_name(name, folder):
    content = json.loads(built().to_str())
    change, message = (CHANGES | PARTS)[name]
    content = content | change if name in CHANGES else content | {"model": content["model"] | change}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as e:
        load(folder)
    assert "tokenizer.json" in str(e.value) and "\n" not in str(e.value)


def test_a_template_of_the_text_alone_adds_nothing(folder):
    content = json.loads(built().to_str())
    content["post_processor"] = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert load(folder).encode("O Romeo")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"add_bos_token": True}, "add_bos_token is True, expected False"),
        ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class is BertTokenizer, expected GPT2Tokenizer"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "expected an added token"),
    ],
)
def test_settings_of_other_tokenizers_are_refused(settings, message, folder):
    relatives.write_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        read_vocabulary(str(folder))


def test_folders_without_a_vocabulary_say_what_is_missing(folder):
    with pytest.raises(ValueError, match=r"lacks vocab.json and merges.txt, and tokenizer.json; copy the model's"):
        load(folder)
    write_bytes(folder / "vocab.txt", b"[CLS]")
    with pytest.raises(ValueError, match="has vocab.txt: no byte-level BPE as GPT-2's"):
        load(folder)


def test_merges_without_a_version_line_are_read(folder):
    relatives.write_tokenizer(str(folder))
    expected = read_vocabulary(str(folder)).merges
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    (folder / "merges.txt").write_text("\n".join(lines[1:]), encoding="utf-8")
    assert read_vocabulary(str(folder)).merges == expected and len(expected) > 1000
