"""GPT-2s as Hugging Face has them, of every kind that is read, written byte by byte from seeded random weights.

tools/make_huggingface_goldens.py has transformers read the same folders, for tests/goldens/huggingface.json.
"""

import json
import os
import re
import shutil

import numpy as np
from helpers import MODELS, random_variables

SIZES = {"vocab_size": 2048, "n_positions": 64, "n_embd": 16, "n_head": 4, "n_layer": 2}
BOTH_FACTORS = {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "scale_attn_weights": True}
PREFIX = "transformer."
# config: what differs in config.json, None where a name is missing; dtype, prefix, n_shards, pad: of the files.
# head: the output matrix, same as wte, another one, or the only one of the two.
CASES: dict[str, dict] = {
    "gpt2": {"config": {"n_ctx": 64}},
    "no prefix": {"prefix": ""},
    "cerebras": {"config": {"activation_function": "gelu", "n_inner": 64}, "seed": 3},
    "relu": {"config": {"activation_function": "relu", "n_inner": 40, "layer_norm_epsilon": 0.001}},
    "silu": {"config": {"activation_function": "silu"}, "pad": 1},
    "tanh": {"config": {"activation_function": "gelu_pytorch_tanh", "activation": "ignored"}},
    "by layer": {"config": BOTH_FACTORS, "pad": 3},
    "unscaled": {"config": {"scale_attn_weights": False}, "dtype": "F16"},
    "by layer, unscaled": {"config": BOTH_FACTORS | {"scale_attn_weights": False}, "dtype": "BF16"},
    "masks": {"masks": "F32", "prefix": ""},
    "boolean masks": {"masks": "BOOL", "dtype": "F16", "pad": 1},
    "shards": {"n_shards": 3},
    "one shard": {"n_shards": 1, "prefix": ""},
    "untied": {"config": {"tie_word_embeddings": False}, "head": "another"},
    "untied shards": {"config": {"tie_word_embeddings": False}, "head": "another", "n_shards": 2, "dtype": "BF16"},
    "head as wte": {"head": "same"},
    "another head, said to be tied": {"head": "another"},
    "head alone": {"head": "only"},
    "no default is named": {"config": {"activation_function": None, "n_positions": None, "n_ctx": None}, "n_ctx": 1024},
    "special ids outside": {"config": {"eos_token_id": 50256, "bos_token_id": 50256}},
}


def dumped(array: np.ndarray, dtype: str) -> bytes:
    """The bytes of numbers in a dtype of safetensors."""
    if dtype == "BF16":
        return (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return array.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?", "U8": "u1"}[dtype]).tobytes()


def safetensors_bytes(arrays: dict[str, tuple[str, np.ndarray]], pad: int = 0, metadata=None) -> bytes:
    """A file of (dtype, numbers) by name; `pad` spaces more in the header move the tensors to odd places."""
    header, data = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, (dtype, array) in arrays.items():
        content = dumped(array, dtype)
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    return len(text).to_bytes(8, "little") + text + data


def huggingface_name(variable: str) -> str:
    name = re.sub(r"^model/", "", variable)
    name = re.sub(r"^h(\d+)/", r"h.\1.", name).replace("/", ".")
    name = re.sub(r"\.[gw]$", ".weight", re.sub(r"\.b$", ".bias", name))
    return name + ".weight" if name in ("wte", "wpe") else name


def tensors_of(case: dict) -> dict[str, tuple[str, np.ndarray]]:
    """(dtype, numbers) by name, of the weights that the case's seed gives."""
    config, dtype, prefix = SIZES | case.get("config", {}), case.get("dtype", "F32"), case.get("prefix", PREFIX)
    hparams = {"n_vocab": config["vocab_size"], "n_ctx": case.get("n_ctx", config["n_positions"])}
    hparams |= {name: config[name] for name in ("n_embd", "n_head", "n_layer")} | {"n_inner": config.get("n_inner")}
    variables = random_variables(hparams, case.get("seed", 1))
    tensors = {
        prefix + huggingface_name(name): (dtype, array[0] if array.ndim == 3 else array)
        for name, array in variables.items()
    }
    wte = tensors[prefix + "wte.weight"][1]
    if head := case.get("head"):
        tensors["lm_head.weight"] = dtype, np.flipud(wte) if head == "another" else wte
    if head == "only":
        del tensors[prefix + "wte.weight"]
    for layer in range(hparams["n_layer"]) if (masks := case.get("masks")) else ():
        tensors[f"{prefix}h.{layer}.attn.bias"] = masks, np.tri(64)[None, None]
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = "F32", np.float32(-1e4)
    return tensors


def write_tokenizer(folder: str) -> None:
    """nano's vocabulary as vocab.json and merges.txt."""
    for name, as_named in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copyfile(os.path.join(MODELS, "nano", name), os.path.join(folder, as_named))


def write_folder(folder, case: dict) -> None:
    """A whole model."""
    os.makedirs(folder, exist_ok=True)
    config = SIZES | {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "eos_token_id": 2047}
    config |= {"bos_token_id": 2047} | case.get("config", {})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({name: value for name, value in config.items() if value is not None}, f)
    write_tokenizer(folder)
    tensors, n_shards, pad = tensors_of(case), case.get("n_shards"), case.get("pad", 0)
    files = {
        name: f"model-{i % n_shards + 1:05}-of-{n_shards:05}.safetensors" if n_shards else "model.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(files.values()):
        with open(os.path.join(folder, file), "wb") as f:
            f.write(safetensors_bytes({name: tensors[name] for name in tensors if files[name] == file}, pad))
    if n_shards:
        with open(os.path.join(folder, "model.safetensors.index.json"), "w") as f:
            json.dump({"metadata": {"total_size": 0}, "weight_map": files}, f)
