"""GPT-2 as Hugging Face's transformers saves it: config.json and model.safetensors, one file or several shards.

Names and settings follow transformers' GPT2Config and modeling_gpt2.py. What this program's forward pass does not
compute is refused by name. Factors on attention scores (scale_attn_weights, scale_attn_by_inverse_layer_idx) are
multiplied into the weights of the queries. Left out: pickled weights (pytorch_model.bin), which could run code.
"""

import math
import os
import re
import reprlib
import sys

import numpy as np

from checkpoints import COPY_AGAIN
from checkpoints.files import check_files, present, read_json
from checkpoints.safetensors import Tensor, read_header, read_safetensors

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
SHARDS = WEIGHTS + ".index.json"
MAX_SIZES = {CONFIG: 1 << 20, GENERATION: 1 << 20, SHARDS: 1 << 24, WEIGHTS: 1 << 62}
# Names in config.json, other names for the same, and what transformers takes where there is none.
SIZES = {
    "n_vocab": (("vocab_size",), 50257),
    "n_ctx": (("n_positions", "max_position_embeddings", "n_ctx"), 1024),
    "n_embd": (("n_embd", "hidden_size"), 768),
    "n_head": (("n_head", "num_attention_heads"), 12),
    "n_layer": (("n_layer", "num_hidden_layers"), 12),
}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}  # other names
ACTIVATIONS |= {name: name for name in ("gelu_new", "gelu", "relu", "silu")}
LAYER = re.compile(r"h\.(\d+)\.(ln_[12]|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.(weight|bias)")
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask, which some versions saved
ENDS = {"wte.weight": "wte", "wpe.weight": "wpe", "ln_f.weight": "ln_f/g", "ln_f.bias": "ln_f/b"}
HEAD = "lm_head.weight"
SAVE_AGAIN = "load it with transformers and save_pretrained() it"

# ----------------------------------------------------------------------------------------------------------------------
# config.json
# ----------------------------------------------------------------------------------------------------------------------


def read_size(config: dict, names: tuple[str, ...], default: int | None, path: str) -> int | None:
    name, value = next(((name, config[name]) for name in names if config.get(name) is not None), (names[0], default))
    if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
        raise ValueError(f"{path}: {name} is {reprlib.repr(value)}, expected a whole number above 0; {COPY_AGAIN}")
    return value


def check_model(config: dict, path: str) -> None:
    """ValueError: a model that is computed otherwise than GPT-2, and why."""
    kind, architectures = config.get("model_type", "gpt2"), config.get("architectures") or ["GPT2LMHeadModel"]
    if kind != "gpt2" or not str(architectures[0] if isinstance(architectures, list) else "").startswith("GPT2"):
        found = f"{reprlib.repr(kind)}, {reprlib.repr(architectures)}"
        raise ValueError(f"{path}: the model is a {found}; this program computes gpt2 only")
    for name in ("add_cross_attention", "is_encoder_decoder", "quantization_config"):
        if config.get(name):
            raise ValueError(f"{path}: {name} is set; this program computes plain GPT-2 in float32 only")


def read_config(path: str) -> tuple[dict, dict]:
    """(hparams, the whole of config.json). ValueError: it is damaged, or not of a GPT-2 that is computed here."""
    config = read_json(path)
    check_model(config, path)
    hparams: dict = {name: read_size(config, names, default, path) for name, (names, default) in SIZES.items()}
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(
            f"{path}: n_embd {hparams['n_embd']} is no multiple of n_head {hparams['n_head']}; {COPY_AGAIN}"
        )
    if n_inner := read_size(config, ("n_inner",), None, path):
        hparams["n_inner"] = n_inner
    activation, eps = config.get("activation_function", "gelu_new"), config.get("layer_norm_epsilon", 1e-5)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(
            f"{path}: activation_function is {reprlib.repr(activation)}, expected one of {', '.join(ACTIVATIONS)}; "
            "others are not computed here"
        )
    if type(eps) not in (int, float) or not 0 <= eps < 1:
        raise ValueError(f"{path}: layer_norm_epsilon is {reprlib.repr(eps)}, expected a number from 0 to 1")
    return hparams | {"activation": ACTIVATIONS[activation], "layer_norm_epsilon": float(eps)}, config


def special_ids(folder: str, config: dict, n_vocab: int) -> tuple[list[int], int | None]:
    """(the ids that end a text, the one that begins it) as generation_config.json says, or else config.json.

    Real models name ids that they do not have: those are left out, with a word on stderr.
    """
    path = os.path.join(folder, GENERATION)
    generation = read_json(path) if os.path.exists(path) else {}
    found: dict[str, list[int]] = {}
    for name in ("eos_token_id", "bos_token_id"):
        value = config.get(name, 50256) if generation.get(name) is None else generation[name]
        values = value if isinstance(value, list) else [] if value is None else [value]
        found[name] = [i for i in values if type(i) is int and 0 <= i < n_vocab]
        if name == "eos_token_id" and len(found[name]) < len(values):
            print(
                f"{folder}: eos_token_id is {reprlib.repr(value)}, the vocabulary has {n_vocab} ids; "
                + ("the others end a text" if found[name] else "no token ends a text"),
                file=sys.stderr,
            )
    return found["eos_token_id"], next(iter(found["bos_token_id"] + found["eos_token_id"]), None)


# ----------------------------------------------------------------------------------------------------------------------
# Weights
# ----------------------------------------------------------------------------------------------------------------------


def tensors_by_file(folder: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a model by the path of their file: one, or what the index of the shards names.

    ValueError: a file is damaged, or the index names what is not there. FileNotFoundError: a file is missing.
    """
    single, index = os.path.join(folder, WEIGHTS), os.path.join(folder, SHARDS)
    if os.path.exists(single):
        return {single: read_header(single)}
    if not os.path.exists(index):
        pickled = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".h5", ".msgpack", ".ckpt"))]
        found = f"only {', '.join(pickled)}, which is not read here" if pickled else "no other weights either"
        raise ValueError(f"{folder} has no {WEIGHTS}, and {found}; {SAVE_AGAIN}")
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: weight_map is {reprlib.repr(files)}, expected names of tensors and files")
    found: dict[str, dict[str, Tensor]] = {}
    for file in sorted(set(files.values())):
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: expected .safetensors files of this folder, found {reprlib.repr(file)}")
        found[os.path.join(folder, file)] = read_header(os.path.join(folder, file))
    for name, file in files.items():
        if name not in found[os.path.join(folder, file)]:
            raise ValueError(f"{index}: {reprlib.repr(name)} is not in {file}; the files must belong to one model")
    return found


def variable_of(name: str) -> str | None:
    """The variable that a tensor is, less its prefix; None for masks. KeyError: it is not GPT-2's."""
    if name in ENDS:
        return ENDS[name]
    if name == HEAD:
        return "lm_head"
    if MASKS.fullmatch(name):
        return None
    if not (found := LAYER.fullmatch(name)):
        raise KeyError(name)
    layer, part, leaf = found.groups()
    return f"h{int(layer)}/{part.replace('.', '/')}/" + ("b" if leaf == "bias" else "g" if part[0] == "l" else "w")


def wanted(tensors: dict[str, Tensor], path: str) -> dict[str, str]:
    """Variable by tensor name, of those that the forward pass needs. ValueError: some that it does not know."""
    variables, others = {}, []
    for name in tensors:
        bare = name.removeprefix("transformer.")
        try:
            variables[name] = variable_of(bare)
        except KeyError:
            others.append(name)
            if bare.startswith("h."):
                raise ValueError(
                    f"{path}: {reprlib.repr(name)} is no tensor of GPT-2; this program computes plain GPT-2 only"
                ) from None
    if others:
        print(f"{path}: left out, not of the language model: {reprlib.repr(sorted(others))}", file=sys.stderr)
    return {name: f"model/{variable}" for name, variable in variables.items() if variable}


def score_factor(config: dict, layer: int, d_head: int) -> float:
    """What attention scores are multiplied by in a layer, beside 1 / sqrt(d_head), which gpt2.py has."""
    factor = 1.0 if config.get("scale_attn_weights", True) else math.sqrt(d_head)
    return factor / (layer + 1) if config.get("scale_attn_by_inverse_layer_idx") else factor


def scale_queries(variables: dict[str, np.ndarray], hparams: dict, config: dict) -> None:
    """Multiply the factors of attention scores into the queries' third of c_attn: a copy, where there are any."""
    n_embd = hparams["n_embd"]
    for layer in range(hparams["n_layer"]):
        if (factor := score_factor(config, layer, n_embd // hparams["n_head"])) != 1:
            for leaf in ("w", "b"):
                name = f"model/h{layer}/attn/c_attn/{leaf}"
                if name in variables:  # what is missing is named later
                    variables[name] = np.array(variables[name])
                    variables[name][..., :n_embd] *= np.float32(factor)


def untie(variables: dict[str, np.ndarray], config: dict, folder: str) -> None:
    """Keep an output matrix where it is not wte, as transformers does: also where config.json says that they are tied.

    ValueError: it is not tied, and missing.
    """
    output, wte = variables.get("model/lm_head"), variables.get("model/wte")
    if output is None:
        if not config.get("tie_word_embeddings", True):
            raise ValueError(f"{folder}: tie_word_embeddings is false, and {HEAD} is missing; {SAVE_AGAIN}")
    elif wte is None:
        variables["model/wte"] = variables.pop("model/lm_head")
    elif config.get("tie_word_embeddings", True) and np.array_equal(output, wte):
        del variables["model/lm_head"]


def read_huggingface(folder: str) -> tuple[dict, dict, dict[str, np.ndarray]]:
    """(hparams, config, variables by OpenAI's names, float32) of a folder; views of the mapped files where they can be.

    ValueError: a damaged file, or a model that is computed otherwise. FileNotFoundError: a file is missing.
    """
    check_files(folder, present(folder, MAX_SIZES), MAX_SIZES, COPY_AGAIN)
    hparams, config = read_config(os.path.join(folder, CONFIG))
    variables: dict[str, np.ndarray] = {}
    for path, tensors in tensors_by_file(folder).items():
        names = wanted(tensors, path)
        for name, array in read_safetensors(path, {name: tensors[name] for name in names}).items():
            if names[name] in variables:
                raise ValueError(f"{path}: {reprlib.repr(name)} is there twice, under another name too; {SAVE_AGAIN}")
            variables[names[name]] = array
    untie(variables, config, folder)
    scale_queries(variables, hparams, config)
    return hparams, config, variables
