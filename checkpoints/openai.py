"""OpenAI's models: which files they have, what makes these right, and their download.

checkpoints/tensorflow.py reads the weights, checkpoints/download.py fetches a file.
"""

import contextlib
import functools
import glob
import importlib.util
import json
import os
import reprlib

from checkpoints import DOWNLOAD_AGAIN, OPENAI_SIZES
from checkpoints.tensorflow import data_path, data_size, read_index, verify_checkpoint

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
D_HEAD = 64  # in all OpenAI sizes
HPARAMS, TOKEN_IDS, MERGES = "hparams.json", "encoder.json", "vocab.bpe"
CHECKPOINT = "model.ckpt"
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
    import hashlib  # and with it OpenSSL, which reading a model does not need

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


def check_heads(model_size: str, path: str) -> None:
    """ValueError: another n_head than OpenAI's, which no checksum shows where none is published."""
    hparams = read_hparams(path)
    if model_size in OPENAI_SIZES and hparams["n_embd"] != D_HEAD * hparams["n_head"]:
        heads = f"n_embd {hparams['n_embd']} and n_head {hparams['n_head']}"
        raise ValueError(f"{path}: {heads}, expected heads of {D_HEAD} as in all OpenAI sizes; {DOWNLOAD_AGAIN}")


# ----------------------------------------------------------------------------------------------------------------------
# Fetching them
# ----------------------------------------------------------------------------------------------------------------------


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
                    size = data_size(os.path.join(folder, CHECKPOINT)) if name == DATA else None
                    download.download(url, path, check, is_locked, size)
                except ConnectionError as e:
                    raise ConnectionError(f"{e}; {OFFLINE_HINT}") from e
                except ValueError:
                    if name == DATA and f"{model_size}/{INDEX}" not in SHA256:
                        with contextlib.suppress(FileNotFoundError):
                            os.remove(os.path.join(folder, INDEX))  # it may be the one that is of another version
                    raise
