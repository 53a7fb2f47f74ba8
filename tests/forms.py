"""Small models to write in other forms, and what the others' files should hold."""

import json
import re

import numpy as np
from helpers import random_model, read_bytes

from encoder import BYTE_TO_CHAR, END_OF_TEXT, Encoder

MERGES = {("Ġ", "t"): 0, ("h", "e"): 1, ("Ġt", "he"): 2}
SMALL = {"n_embd": 8, "n_head": 2, "n_layer": 11}  # h10 comes before h2
UNLIKE = {"activation": "relu", "layer_norm_epsilon": 1e-3, "n_inner": 20}


def small_encoder(special=(END_OF_TEXT,)):
    tokens = [*BYTE_TO_CHAR.values(), *map("".join, MERGES), *special]
    return Encoder({token: i for i, token in enumerate(tokens)}, MERGES)


def grown_encoder():
    """A vocabulary with tokens added for a chat, found in different ways, two of which end a text."""
    added = {END_OF_TEXT: 259, "<|user|>": 260, "né à": 261, "ok": 262}
    patterns = {text: re.escape(text) for text in added} | {"<|user|>": r"<\|user\|>\s*", "ok": r"(?<!\w)ok(?!\w)"}
    small = small_encoder()
    return Encoder(small.token_ids, MERGES, added, patterns, eot_ids=(259, 260), start_id=261, adds_space=True)


def small_model(encoder, **settings):
    return random_model(n_vocab=encoder.n_vocab, **SMALL | settings)


def read_safetensors(path):
    """(metadata, arrays by name in the order of the file), by safetensors' description alone."""
    content = read_bytes(path)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert start % 8 == 0 and content[8:9] == b"{"
    metadata, arrays, end = header.pop("__metadata__"), {}, 0
    for name, tensor in header.items():
        assert tensor["dtype"] == "F32" and tensor["data_offsets"][0] == end
        end = tensor["data_offsets"][1]
        arrays[name] = np.frombuffer(content[start:][slice(*tensor["data_offsets"])], "<f4").reshape(tensor["shape"])
    assert start + end == len(content)
    return metadata, arrays


def expected_tensors(params):
    """The weights by the names of GPT2LMHeadModel."""
    names = {"w": "weight", "g": "weight", "b": "bias"}
    tensors = {f"transformer.{name}.weight": params[name] for name in ("wte", "wpe")}
    for i, block in enumerate(params["blocks"]):
        for part in ("ln_1", "ln_2"):
            tensors |= {f"transformer.h.{i}.{part}.{names[k]}": v for k, v in block[part].items()}
        for part, linear in (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj")):
            tensors |= {f"transformer.h.{i}.{part}.{linear}.{names[k]}": v for k, v in block[part][linear].items()}
    tensors |= {f"transformer.ln_f.{names[k]}": v for k, v in params["ln_f"].items()}
    return tensors | ({"lm_head.weight": params["lm_head"].T} if "lm_head" in params else {})


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)
