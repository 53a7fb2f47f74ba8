"""Models and vocabularies that nanoGPT has trained: ckpt.pt, as train.py saves it, and meta.pkl, as prepare.py does.

ckpt.pt holds {"model": state dict, "model_args": the shape, "optimizer": ..., "config": ...}. Only the first two are
looked at, and of the file's bytes only those of the model's weights are read, when they are used.

Follows karpathy/nanoGPT's model.py, train.py and data/shakespeare_char/prepare.py. nanoGPT's weights are
[n_out, n_in], the transposes of OpenAI's, and may have no biases. Which GELU it means depends on when it was trained:
by its formula (erf) since June 2023, in its tanh form before; the file does not say.
"""

import contextlib
import os
import reprlib
from collections.abc import Iterator

import numpy as np

from checkpoints.pickles import Damaged, read_pickle
from checkpoints.pytorch import TorchFile
from checkpoints.weights import expected_shapes

GELUS = {"erf": "gelu", "tanh": "gelu_new"}  # nanoGPT's, and the names that transformers gives them
SIZES = {"n_vocab": "vocab_size", "n_ctx": "block_size", "n_embd": "n_embd", "n_head": "n_head", "n_layer": "n_layer"}
PREFIX = "_orig_mod."  # of torch.compile
HEAD = "lm_head.weight"
MAX_META = 1 << 24  # shakespeare_char's has 703 bytes, all of Unicode 17 MB


@contextlib.contextmanager
def faults_named(path: str, way_out: str) -> Iterator[None]:
    """ValueError instead of Damaged, with the file's name."""
    try:
        yield
    except Damaged as e:
        raise ValueError(f"{path} is damaged or not nanoGPT's: {e}; {way_out}") from e


# ----------------------------------------------------------------------------------------------------------------------
# ckpt.pt
# ----------------------------------------------------------------------------------------------------------------------

SAVE_AGAIN = "copy it again, or save it with torch as nanoGPT's train.py does, with 'model' and 'model_args' alone"


def part(checkpoint: object, name: str) -> dict:
    found = checkpoint.get(name) if type(checkpoint) is dict else None
    if type(found) is not dict:
        raise Damaged(f"it has no {name!r}, expected a dict of 'model', the weights, and 'model_args', their shape")
    return found


def read_model_args(args: dict) -> tuple[dict[str, int], bool]:
    """(hparams, whether there are biases). Damaged: numbers that no model has, or settings that no GPT-2 has."""
    if strange := [name for name in args if name not in {*SIZES.values(), "bias", "dropout"}]:
        raise Damaged(f"model_args has {strange[0]!r:.80}, which GPT-2 does not know")
    for name in SIZES.values():
        value = args.get(name)
        if type(value) is not int or not 0 < value < 1 << 31:
            shown = reprlib.repr(value) if type(value) is int else type(value).__name__
            raise Damaged(f"{name} in model_args is {shown}, expected a whole number above 0")
    if args["n_embd"] % args["n_head"]:
        raise Damaged(f"n_embd {args['n_embd']} in model_args is no multiple of n_head {args['n_head']}")
    has_biases = args.get("bias", True)  # the first versions had no choice
    if type(has_biases) is not bool:
        raise Damaged(f"bias in model_args is of type {type(has_biases).__name__}, expected True or False")
    return {ours: args[theirs] for ours, theirs in SIZES.items()}, has_biases


def nanogpt_name(name: str) -> str:
    """transformer.h.0.attn.c_attn.weight for h0/attn/c_attn/w"""
    *path, leaf = name.split("/")
    if not path:
        path, leaf = [leaf], "w"  # wte and wpe
    if path[0].startswith("h"):
        path[0] = f"h.{path[0][1:]}"
    return ".".join(["transformer", *path, "bias" if leaf == "b" else "weight"])


def is_mask(name: str) -> bool:
    """The causal masks, which nanoGPT keeps with the weights where PyTorch is older than 2.0."""
    return name.startswith("transformer.h.") and name.endswith(".attn.bias")


def weight(file: TorchFile, tensors: dict, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32[shape]. Damaged: it is missing, or has another shape."""
    tensor = tensors.get(name)
    if tensor is None:
        raise Damaged(f"the model lacks {name!r}, expected its shape to be {list(shape)}")
    if getattr(tensor, "shape", None) != shape:
        found = f"shape {list(tensor.shape)}" if hasattr(tensor, "shape") else f"a {type(tensor).__name__}"
        raise Damaged(f"{name!r} has {found}, expected {list(shape)} as model_args says")
    try:
        return file.array(tensor)
    except Damaged as e:
        raise Damaged(f"{name!r}: {e}") from e


def read_weights(file: TorchFile, tensors: dict, hparams: dict[str, int], has_biases: bool) -> dict[str, np.ndarray]:
    variables = {}
    for name, shape in expected_shapes(hparams):
        if name.endswith("/b") and not has_biases:
            variables[f"model/{name}"] = np.zeros(shape, np.float32)
        elif name.endswith("/w"):
            n_in, n_out = shape[-2:]
            variables[f"model/{name}"] = weight(file, tensors, nanogpt_name(name), (n_out, n_in)).T
        else:
            variables[f"model/{name}"] = weight(file, tensors, nanogpt_name(name), shape)
    known = {nanogpt_name(name) for name, _ in expected_shapes(hparams) if has_biases or not name.endswith("/b")}
    if strange := [name for name in tensors if name not in known and name != HEAD and not is_mask(name)]:
        raise Damaged(f"the model has {strange[0]!r:.80}, which a GPT-2 of these model_args has not")
    wte = tensors[nanogpt_name("wte")]
    if tensors.get(HEAD, wte) != wte:  # else tied: the same bytes
        head = weight(file, tensors, HEAD, wte.shape)
        if not np.array_equal(head, variables["model/wte"]):
            variables["model/lm_head"] = head
    return variables


def read_nanogpt(path: str, gelu: str = "erf") -> tuple[dict, dict[str, np.ndarray]]:
    """(hparams, variables) of a ckpt.pt; `gelu` is erf or tanh, as the model was trained.

    hparams has n_vocab, n_ctx, n_embd, n_head, n_layer and the activation, "gelu" or "gelu_new". The variables are
    float32, by the names of OpenAI's checkpoints: model/h0/attn/c_attn/w is a transposed view [n_in, n_out], biases
    that the model has not are zeros, and model/lm_head is there only where it differs from model/wte. They are
    read-only views of the mapped file, which must not be changed while they are in use; float16 and bfloat16 are
    converted, in memory.

    ValueError: the file is damaged, means harm, or holds another kind of model. OSError: it cannot be read.
    """
    if gelu not in GELUS:
        raise ValueError(f"gelu is {gelu!r}, expected {' or '.join(GELUS)}, as the model was trained")
    with faults_named(path, SAVE_AGAIN):
        file = TorchFile(path)
        tensors = part(file.content, "model")
        hparams, has_biases = read_model_args(part(file.content, "model_args"))
        plain = {str(name).removeprefix(PREFIX): tensors[name] for name in tensors}
        if len(plain) != len(tensors):
            raise Damaged(f"the model has weights twice, with and without {PREFIX!r}")
        return hparams | {"activation": GELUS[gelu]}, read_weights(file, plain, hparams, has_biases)


def verify_nanogpt(path: str) -> None:
    """Read every byte of a ckpt.pt and compare the checksums. ValueError: one is wrong, or the file is none."""
    with faults_named(path, SAVE_AGAIN):
        TorchFile(path).verify()


# ----------------------------------------------------------------------------------------------------------------------
# meta.pkl
# ----------------------------------------------------------------------------------------------------------------------


def read_meta(path: str) -> dict[str, int]:
    """The ids of a character-level vocabulary: character -> id, from 0 on without holes. ValueError: it is none."""
    with faults_named(path, "run nanoGPT's prepare.py again"):
        if os.path.getsize(path) > MAX_META:
            raise Damaged(f"{os.path.getsize(path)} bytes, expected {MAX_META} at most")
        with open(path, "rb") as f:
            meta = read_pickle(f.read())
        ids = meta.get("stoi") if type(meta) is dict else None
        if type(ids) is not dict or not ids or not all(type(c) is str and len(c) == 1 for c in ids):
            raise Damaged("no 'stoi', expected a dict of single characters to ids")
        if not all(type(i) is int for i in ids.values()) or sorted(ids.values()) != list(range(len(ids))):
            raise Damaged(f"the ids of its {len(ids)} characters are not 0 to {len(ids) - 1}, each once")
        chars = meta.get("itos")
        if type(chars) is not dict or len(chars) != len(ids) or any(chars.get(i) != c for c, i in ids.items()):
            raise Damaged("'itos' is not 'stoi' the other way round")
        if meta.get("vocab_size") != len(ids):
            raise Damaged(f"vocab_size is not {len(ids)}, as many as it has characters")
        return ids
