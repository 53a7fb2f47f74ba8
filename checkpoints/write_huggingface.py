"""A model as a Hugging Face folder, which transformers and everything that reads its models can open.

The weights are a safetensors file with the names and the order of GPT2LMHeadModel.save_pretrained: a header of JSON,
padded with spaces to a multiple of 8 bytes, then the numbers of each tensor without gaps (safetensors/src/tensor.rs).
The vocabulary is there twice, as vocab.json and merges.txt and in tokenizer.json, for old readers and new ones.
"""

import json
import math
from collections.abc import Iterator
from itertools import product

import numpy as np

from checkpoints.vocabulary import END_OF_TEXT, pattern_of
from checkpoints.writing import as_json, merges_of, merges_text, pieces_of, token_ids_of, token_ids_text, variables_of

MODULE_LEAVES = {"wte": "weight", "wpe": "weight", "lm_head": "weight", "w": "weight", "g": "weight", "b": "bias"}
ALIGNMENT = 8  # of the first number

# ----------------------------------------------------------------------------------------------------------------------
# The weights
# ----------------------------------------------------------------------------------------------------------------------


def tensor_name(name: str) -> str:
    """h0/attn/c_attn/w -> transformer.h.0.attn.c_attn.weight"""
    *path, leaf = name.split("/")
    path = path or [leaf]
    if leaf == "lm_head":
        return "lm_head.weight"
    if path[0].startswith("h"):
        path = ["h", path[0][1:], *path[1:]]
    return ".".join(["transformer", *path, MODULE_LEAVES[leaf]])


def tensors_of(params: dict) -> dict[str, np.ndarray]:
    """The weights by Hugging Face's names, in the order of the file."""
    tensors = {tensor_name(name): array for name, array in variables_of(params)}
    if "lm_head" in params:
        tensors["lm_head.weight"] = params["lm_head"].T  # [n_vocab, n_embd]
    return dict(sorted(tensors.items()))


def header_of(tensors: dict[str, np.ndarray]) -> bytes:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, array in tensors.items():
        start, end = end, end + 4 * math.prod(array.shape)
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def weight_pieces(params: dict) -> Iterator[bytes]:
    tensors = tensors_of(params)
    yield header_of(tensors)
    for array in tensors.values():
        yield from pieces_of(array)


# ----------------------------------------------------------------------------------------------------------------------
# What they are
# ----------------------------------------------------------------------------------------------------------------------


def config_of(encoder, hparams: dict, params: dict) -> dict:
    """config.json. Of what it leaves out GPT2Config has GPT-2's values as defaults."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": hparams["n_vocab"],
        "n_positions": hparams["n_ctx"],
        "n_ctx": hparams["n_ctx"],  # the older name of the same
        "n_embd": hparams["n_embd"],
        "n_head": hparams["n_head"],
        "n_layer": hparams["n_layer"],
        "n_inner": hparams.get("n_inner"),
        "activation_function": hparams.get("activation", "gelu_new"),
        "layer_norm_epsilon": hparams.get("layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": "lm_head" not in params,
        "bos_token_id": encoder.start_id,  # null where there is none, or GPT2Config says 50256
        "eos_token_id": encoder.eot_id,
    }


def generation_config_of(encoder) -> dict:
    eot_ids = encoder.eot_id if len(encoder.eot_ids) < 2 else list(encoder.eot_ids)
    return {"bos_token_id": encoder.start_id, "eos_token_id": eot_ids}


def added_tokens_of(encoder) -> dict[int, dict]:
    """Each added token by its id, with the settings that make the regular expression that finds it."""
    ends, added = {*encoder.eot_ids, encoder.start_id}, {}
    for text, i in sorted(encoder.added.items(), key=lambda item: item[1]):
        for values in product((False, True), repeat=3):
            token = {"content": text} | dict(zip(("single_word", "lstrip", "rstrip"), values, strict=True))
            if not encoder.patterns or encoder.patterns[text] == pattern_of(token):
                added[i] = token | {"normalized": False, "special": i in ends}
                break
    return added


def tokenizer_config_of(encoder, hparams: dict) -> dict:
    """tokenizer_config.json. GPT2Tokenizer would add <|endoftext|> to a vocabulary without it."""
    names = {"bos_token": encoder.start_id, "eos_token": encoder.eot_id, "unk_token": encoder.eot_id}
    added = added_tokens_of(encoder)
    return {
        "tokenizer_class": "GPT2Tokenizer" if END_OF_TEXT in encoder.added else "PreTrainedTokenizerFast",
        "model_max_length": hparams["n_ctx"],
        "add_prefix_space": encoder.adds_space,
        "clean_up_tokenization_spaces": False,  # transformers before 5 took spaces away when decoding
        "added_tokens_decoder": {str(i): token for i, token in added.items()},
    } | {name: added[i]["content"] for name, i in names.items() if i in added}


def tokenizer_of(encoder) -> dict:
    """tokenizer.json as the tokenizers library has it. Merges are strings, which its versions before 0.20 read too."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": encoder.adds_space, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i} | token for i, token in added_tokens_of(encoder).items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level | {"trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": token_ids_of(encoder),
            "merges": merges_of(encoder),
        },
    }


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------


def check(encoder, hparams: dict, params: dict) -> None:
    """ValueError: a token is found in a way that has no name. No file that is read has one."""
    if strange := [text for text, i in encoder.added.items() if i not in added_tokens_of(encoder)]:
        raise ValueError(
            f"Hugging Face's form cannot express how {strange[0]!r} is found, by {encoder.patterns[strange[0]]!r}; "
            "give it a pattern of checkpoints.vocabulary.pattern_of"
        )


def files(encoder, hparams: dict, params: dict) -> Iterator[tuple[str, Iterator[bytes]]]:
    """(name, content in pieces) of each file."""
    yield "config.json", iter([as_json(config_of(encoder, hparams, params))])
    yield "generation_config.json", iter([as_json(generation_config_of(encoder))])
    yield "tokenizer_config.json", iter([as_json(tokenizer_config_of(encoder, hparams))])
    yield "tokenizer.json", iter([as_json(tokenizer_of(encoder))])
    yield "vocab.json", iter([token_ids_text(encoder)])
    yield "merges.txt", iter([merges_text(encoder)])
    yield "model.safetensors", weight_pieces(params)
