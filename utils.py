"""A model by its name: fetch what is missing, read what is there, check that it fits together.

A name is a folder of models_dir or a path. It holds OpenAI's files, Hugging Face's or nanoGPT's; checkpoints/ reads
them. Here is which files make up OpenAI's and what makes them right. python utils.py verify MODEL_SIZE checks a model.
"""

import contextlib
import functools
import glob
import hashlib
import importlib.util
import json
import math
import os
import reprlib
import stat
import sys
from collections.abc import Callable

from checkpoints import DOWNLOAD_AGAIN
from checkpoints.tensorflow import data_path, read_checkpoint, read_index, verify_checkpoint
from checkpoints.weights import check_finite, expected_shapes, nest_params
from encoder import MODELS_DIR, Encoder, check_token_ids, get_encoder, rank_merges

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
D_HEAD = 64  # in all OpenAI sizes
OPENAI_SIZES = ("124M", "355M", "774M", "1558M")
HPARAMS, TOKEN_IDS, MERGES = "hparams.json", "encoder.json", "vocab.bpe"
CHECKPOINT, NANOGPT = "model.ckpt", "ckpt.pt"
INDEX, DATA = CHECKPOINT + ".index", data_path(CHECKPOINT)
MODEL_FILES = (HPARAMS, TOKEN_IDS, MERGES, INDEX, DATA)  # the order matters: each is checked with the ones before it
MAX_SIZES = {HPARAMS: 1 << 16, TOKEN_IDS: 1 << 24, MERGES: 1 << 24}  # OpenAI's have 90, 1.0e6 and 0.5e6 bytes
SHA256 = {
    # The vocabulary is the same for all sizes; the other files' hashes are published for 124M only.
    TOKEN_IDS: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    MERGES: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "124M/" + HPARAMS: "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "124M/" + INDEX: "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "124M/" + DATA: "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
}
OFFLINE_HINT = "--model_size tiny works offline"

# ----------------------------------------------------------------------------------------------------------------------
# Which files are right
# ----------------------------------------------------------------------------------------------------------------------


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(model_size: str, name: str, path: str, folder: str) -> None:
    """ValueError unless `path` holds the model's file `name`, whole and undamaged; `folder` has the ones before it."""
    expected = SHA256.get(f"{model_size}/{name}") or SHA256.get(name)
    if expected and model_size in OPENAI_SIZES:
        found = sha256_of(path)
        if found != expected:
            raise ValueError(f"{path} has sha256 {found}, expected {expected}; {DOWNLOAD_AGAIN}")
    elif name == HPARAMS:
        read_hparams(path)
    elif name == INDEX:
        read_index(path)
    elif name == DATA:
        is_named = path == os.path.join(folder, DATA)  # else it was just downloaded
        verify_checkpoint(os.path.join(folder, CHECKPOINT), None if is_named else path)


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def check_files(folder: str) -> None:
    """ValueError unless each of a model's files is a file of this folder, and not larger than it can be.

    A pipe would be waited for and a device be read without end, and a link could pass off any file of this machine as
    the model's. A link to the whole folder is the user's own.
    """
    home = os.path.realpath(folder)
    for name in files_of(folder):
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        status = os.stat(path)
        if os.path.commonpath([home, real]) != home:
            raise ValueError(f"{path} is a link to {real}, out of its folder; copy the file, or link the whole folder")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is a folder, a pipe or a device, expected a file; put the model's file there")
        if status.st_size > (limit := MAX_SIZES.get(name, status.st_size)):
            raise ValueError(f"{path} has {status.st_size} bytes, expected {limit} at most; {DOWNLOAD_AGAIN}")


def read_hparams(path: str) -> dict[str, int]:
    """hparams.json, every value a whole number above 0. ValueError: it is not."""
    with open(path, encoding="utf-8") as f:
        try:
            hparams = json.load(f)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: expected a JSON object, found {e}; {DOWNLOAD_AGAIN}") from e
    for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        value = hparams.get(name) if isinstance(hparams, dict) else None
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ValueError(
                f"{path}: {name} is {reprlib.repr(value)}, expected a whole number above 0; {DOWNLOAD_AGAIN}"
            )
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(
            f"{path}: n_embd {hparams['n_embd']} is no multiple of n_head {hparams['n_head']}; {DOWNLOAD_AGAIN}"
        )
    return hparams


def kind_of(path: str) -> str | None:
    """Whose files a folder holds: openai, huggingface or nanogpt; None where it holds no model."""
    if any(os.path.exists(os.path.join(path, name)) for name in MODEL_FILES):
        return "openai"
    if os.path.exists(os.path.join(path, "config.json")):
        return "huggingface"
    return "nanogpt" if path.endswith(".pt") or os.path.exists(os.path.join(path, NANOGPT)) else None


def models_in(models_dir: str) -> list[str]:
    """The folders of `models_dir` that hold a model."""
    if not os.path.isdir(models_dir):
        return []
    kinds = {name: kind_of(os.path.join(models_dir, name)) for name in sorted(os.listdir(models_dir))}
    return [
        name
        for name, kind in kinds.items()
        if kind and (kind != "openai" or os.path.exists(os.path.join(models_dir, name, INDEX)))
    ]


def need_crc32c(model_size: str) -> None:
    if not importlib.util.find_spec("google_crc32c"):
        raise ValueError(f"verifying the weights of {model_size} needs google-crc32c; pip install google-crc32c")


def files_of(folder: str) -> list[str]:
    """The files of a model, there or not. Its weights may lie in several shards."""
    shards = glob.glob(data_path(CHECKPOINT, "?" * 5, "?" * 5), root_dir=folder)
    return [name for name in MODEL_FILES if name != DATA] + (sorted(shards) or [DATA])


def missing_files(folder: str) -> list[str]:
    return [name for name in files_of(folder) if not os.path.exists(os.path.join(folder, name))]


def download_model(model_size: str, models_dir: str) -> None:
    """Fetch the files of an OpenAI model that are missing, each verified before it gets its name."""
    from checkpoints import download, lock  # and with it requests and tqdm, which only downloads need

    if f"{model_size}/{DATA}" not in SHA256:
        need_crc32c(model_size)  # before the download, not after it
    folder = os.path.join(models_dir, model_size)
    base_url = (os.environ.get("GPT2_BASE_URL") or OPENAI_URL).rstrip("/")
    lock_path = os.path.join(models_dir, f".{model_size}.lock")  # not in the folder, which may be deleted meanwhile
    with download.local_errors(folder):
        os.makedirs(folder, exist_ok=True)
        with lock.lock(lock_path, folder) as is_locked:
            for name in missing_files(folder):  # there may be fewer now
                check = functools.partial(check_file, model_size, name, folder=folder)
                url, path = f"{base_url}/{model_size}/{name}", os.path.join(folder, name)
                try:
                    download.download(url, path, check, is_locked)
                except ConnectionError as e:
                    raise ConnectionError(f"{e}; {OFFLINE_HINT}") from e
                except ValueError:
                    if name == DATA and f"{model_size}/{INDEX}" not in SHA256:
                        with contextlib.suppress(FileNotFoundError):
                            os.remove(os.path.join(folder, INDEX))  # it may be the one that is of another version
                    raise


def find_model(model_size: str, models_dir: str) -> str:
    """The folder of a model, or a .pt file, after fetching what is missing. ValueError: there is no such model."""
    if model_size.startswith("hf:"):
        from checkpoints import hub  # and with it a library that others do not need

        return hub.fetch(model_size)
    folder = os.path.join(models_dir, model_size)
    if os.sep in model_size and not os.path.exists(folder):
        folder = model_size  # a path from where one is
    missing = missing_files(folder)
    kind = kind_of(folder) if model_size else None
    if model_size in OPENAI_SIZES and kind in ("openai", None) and missing:
        download_model(model_size, models_dir)
    elif kind is None:
        here = ", ".join(name for name in models_in(models_dir) if name not in OPENAI_SIZES) or "none"
        raise ValueError(
            f"no model {model_size!r}: OpenAI's sizes are {', '.join(OPENAI_SIZES)}; others in {models_dir}: {here}; "
            "a path and hf:OWNER/MODEL are names too"
        )
    elif kind == "openai" and missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; copy the whole model there")
    return folder


def check_encoder(encoder: Encoder, hparams: dict, folder: str) -> Encoder:
    """ValueError: tokens that the model has not, or ids without a token."""
    if max(encoder.tokens) >= hparams["n_vocab"]:
        raise ValueError(
            f"{folder}: its vocabulary has ids up to {max(encoder.tokens)}, its hyper-parameters say "
            f"{hparams['n_vocab']} tokens; the files must belong to one model"
        )
    if holes := set(range(max(encoder.tokens))) - encoder.tokens.keys():
        raise ValueError(
            f"{folder}: its vocabulary has no token for id {min(holes)}, which the model could choose; "
            "the files must belong to one model"
        )
    return encoder


def only_tokens(encoder: Encoder, hparams: dict[str, int], params: dict) -> tuple[dict[str, int], dict]:
    """The model without the last rows of wte where those have no token, as in a padded vocabulary: never chosen."""
    n_vocab = max(encoder.tokens) + 1
    if n_vocab == hparams["n_vocab"]:
        return hparams, params
    output = {"lm_head": params["lm_head"][:, :n_vocab]} if "lm_head" in params else {}
    return hparams | {"n_vocab": n_vocab}, params | {"wte": params["wte"][:n_vocab]} | output


def read_openai(folder: str) -> tuple[Encoder, dict, dict]:
    check_files(folder)
    hparams = read_hparams(os.path.join(folder, HPARAMS))
    models_dir, name = os.path.split(folder)
    encoder = check_encoder(get_encoder(name, models_dir), hparams, folder)
    return encoder, hparams, read_checkpoint(os.path.join(folder, CHECKPOINT))


def read_huggingface(folder: str) -> tuple[Encoder, dict, dict]:
    from checkpoints import huggingface, vocabulary  # which OpenAI's models do not need

    hparams, config, variables = huggingface.read_huggingface(folder)
    eot_ids, start_id = huggingface.special_ids(folder, config, hparams["n_vocab"])
    found = vocabulary.read_vocabulary(folder).within(hparams["n_vocab"])
    token_ids = check_token_ids(found.token_ids, found.path, found.added)
    ranks = rank_merges(found.merges, token_ids, found.path)
    encoder = Encoder(token_ids, ranks, found.added, found.patterns, eot_ids, start_id, found.adds_space)
    return encoder, hparams, variables


READERS = {"openai": read_openai, "huggingface": read_huggingface}


def load_encoder_hparams_and_params(model_size: str, models_dir: str | None = None) -> tuple[Encoder, dict, dict]:
    """(encoder, hparams, params) of a model; an OpenAI size is downloaded first if need be.

    `model_size` is a folder of `models_dir` (the folder beside the programs unless given), a path, or hf:OWNER/MODEL.

    The weights are float32 views of the mapped files, nested as in picoGPT: params["wte"],
    params["blocks"][i]["attn"]["c_attn"]["w"] ...

    ValueError: no such model, or a damaged one. ConnectionError: it could not be fetched.
    """
    folder = find_model(model_size, MODELS_DIR if models_dir is None else models_dir)
    encoder, hparams, variables = READERS[kind_of(folder)](folder)
    return encoder, *only_tokens(encoder, hparams, nest_params(variables, hparams, folder))


# ----------------------------------------------------------------------------------------------------------------------
# Verifying what is on disk
# ----------------------------------------------------------------------------------------------------------------------


def check_heads(model_size: str, path: str) -> None:
    """ValueError: another n_head than OpenAI's, which no checksum shows where none is published."""
    hparams = read_hparams(path)
    if model_size in OPENAI_SIZES and hparams["n_embd"] != D_HEAD * hparams["n_head"]:
        heads = f"n_embd {hparams['n_embd']} and n_head {hparams['n_head']}"
        raise ValueError(f"{path}: {heads}, expected heads of {D_HEAD} as in all OpenAI sizes; {DOWNLOAD_AGAIN}")


def find_problems(model_size: str, models_dir: str) -> list[str]:
    """What is wrong with a model on disk. Later checks are made too if an earlier one fails."""
    folder = os.path.join(models_dir, model_size)
    hparams_path, prefix = os.path.join(folder, HPARAMS), os.path.join(folder, CHECKPOINT)
    checks: list[Callable[[], object]] = [
        lambda: check_files(folder),
        *(functools.partial(check_file, model_size, name, os.path.join(folder, name), folder) for name in MODEL_FILES),
        lambda: check_heads(model_size, hparams_path),
        lambda: get_encoder(model_size, models_dir),
        lambda: check_encoder(get_encoder(model_size, models_dir), read_hparams(hparams_path), folder),
        lambda: nest_params(read_checkpoint(prefix), read_hparams(hparams_path), prefix),
        lambda: check_finite(read_checkpoint(prefix), prefix),
    ]
    # A set in order: some checks find the same.
    problems: dict[str, None] = {f"{os.path.join(folder, name)} is missing": None for name in missing_files(folder)}
    for check in checks:
        try:
            check()
        except FileNotFoundError as e:
            problems[f"{e.filename} is missing"] = None
        except ValueError as e:
            problems[str(e)] = None
    return list(problems)


def verify(model_size: str, *, models_dir: str = MODELS_DIR):
    """Check a model on disk: python utils.py verify MODEL_SIZE [flags]

    MODEL_SIZE           124M, 355M, 774M or 1558M, or a folder of models_dir
    --models_dir models  where the models are, beside the programs unless given

    Reads every byte: published checksums, hparams.json, the vocabulary, the checkpoint's index, whether the shapes
    are the model's, the checksum of each tensor, and whether all weights are finite. Status 1: something is wrong.
    """
    folder = os.path.join(models_dir, model_size)
    if not model_size or not os.path.isdir(folder):
        here = ", ".join(models_in(models_dir)) or "none"
        raise ValueError(f"no model {model_size!r} in {models_dir}; there: {here}; gpt2.py downloads OpenAI's sizes")
    need_crc32c(model_size)
    problems = find_problems(model_size, models_dir)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise ValueError(f"{folder}: problems found: {len(problems)}; replace what they name")
    hparams = read_hparams(os.path.join(folder, HPARAMS))
    checked = "every published checksum" if model_size in OPENAI_SIZES else f"the checksums of {DATA} and {INDEX}"
    n_weights = sum(math.prod(shape) for _, shape in expected_shapes(hparams))
    print(
        f"{folder}: OK: {n_weights} finite weights in {hparams['n_layer']} layers, {hparams['n_vocab']} tokens, "
        f"{checked} right" + ("" if model_size in OPENAI_SIZES else f"; {HPARAMS} and the vocabulary have none"),
        file=sys.stderr,
    )


def convert(model_size: str, out: str, *, format: str = "", models_dir: str = MODELS_DIR):
    """Write a model to a folder of another form: python utils.py convert MODEL_SIZE OUT --format FORMAT [flags]

    MODEL_SIZE            any model, downloaded if need be; OUT is the folder to write, new or empty
    --format huggingface  as transformers saves it: model.safetensors, config.json, tokenizer.json and others
    --format openai       as OpenAI's files; what they cannot express, such as another activation, is refused
    --models_dir models   where the models are, beside the programs unless given

    Every bit of the weights is kept. All files get their names when all are complete; none is overwritten.
    """
    from checkpoints.convert import convert_model  # which loading a model does not need

    convert_model(load_encoder_hparams_and_params, model_size, models_dir, out, format)


if __name__ == "__main__":
    from console import command  # the others who read models have their own command line

    command.run({"verify": verify, "convert": convert})
