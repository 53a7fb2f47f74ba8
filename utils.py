"""A model by its name: fetch what is missing, read what is there, check that it fits together.

Files are fetched as NAME.part and bear their own name only after their size and checksum have been verified, so
a half-finished download is never taken for a model.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator

import numpy as np

from checkpoint import data_path, read_checkpoint, read_index, verify_checkpoint
from encoder import Encoder, get_encoder

OPENAI_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
OPENAI_SIZES = ("124M", "355M", "774M", "1558M")
HPARAMS, TOKEN_IDS, MERGES = "hparams.json", "encoder.json", "vocab.bpe"
CHECKPOINT = "model.ckpt"
INDEX, DATA = CHECKPOINT + ".index", data_path(CHECKPOINT)
MODEL_FILES = (HPARAMS, TOKEN_IDS, MERGES, INDEX, DATA)  # the order matters: each is checked with the ones before it
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
# Download
# ----------------------------------------------------------------------------------------------------------------------

N_ATTEMPTS = 5  # in a row without a byte more; each that makes progress starts the count again
TIMEOUT_S = (10, 60)  # to connect, and between two chunks
CHUNK_SIZE = 1 << 16  # what a broken connection may cost


def sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(CHUNK_SIZE):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(model_size: str, name: str, path: str, folder: str) -> None:
    """ValueError unless `path` holds the model's file `name`, whole and undamaged; `folder` has the ones before it."""
    expected = SHA256.get(f"{model_size}/{name}") or SHA256.get(name)
    if expected:
        found = sha256_of(path)
        if found != expected:
            raise ValueError(f"sha256 {found}, expected {expected}{looks_like(path)}")
    elif name == HPARAMS:
        read_hparams(path)
    elif name == INDEX:
        read_index(path)
    elif name == DATA:
        verify_checkpoint(os.path.join(folder, CHECKPOINT), path)


def looks_like(path: str) -> str:
    """A hint for the commonest wrong content: a page from a proxy or a storage server's error."""
    with open(path, "rb") as f:
        return " (it is a web page or an XML error)" if f.read(512).lstrip().startswith(b"<") else ""


def fetch_part(url: str, part: str, label: str) -> None:
    """One attempt to bring `part` from the bytes it has to the whole file, with a progress bar."""
    import requests  # only downloads need these two
    from tqdm import tqdm

    n_have = os.path.getsize(part) if os.path.exists(part) else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={n_have}-"} if n_have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        if response.status_code == 416 and response.headers.get("Content-Range") == f"bytes */{n_have}":
            return  # nothing was left to send
        if response.status_code == 416:
            os.remove(part)
            raise requests.ConnectionError(f"{label} has another size now")
        response.raise_for_status()
        if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {n_have}-"):
            n_have = 0  # the server sends the file from its beginning
        n_expected = n_have + int(response.headers["Content-Length"]) if "Content-Length" in response.headers else None
        bar = tqdm(desc=label, total=n_expected, initial=n_have, unit="B", unit_scale=True)
        with bar, open(part, "r+b" if n_have else "wb") as f:
            f.seek(n_have)
            for chunk in response.iter_content(CHUNK_SIZE):
                f.write(chunk)
                bar.update(len(chunk))
    if n_expected is not None and os.path.getsize(part) != n_expected:
        raise requests.ConnectionError(f"{os.path.getsize(part)} bytes of {n_expected} came")


def fetch(url: str, part: str, label: str) -> None:
    """Bring `part` to the whole file, going on where an attempt broke off. ConnectionError: it cannot be had now."""
    import requests

    n_failed = 0
    while True:
        n_before = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            return fetch_part(url, part, label)
        except requests.RequestException as e:
            n_now = os.path.getsize(part) if os.path.exists(part) else 0
            n_failed = 1 if n_now > n_before else n_failed + 1
            refused = isinstance(e, requests.HTTPError) and e.response.status_code < 500
            # Without a byte so far there is most likely no network: no use in waiting.
            if refused or n_before == n_now == 0 or n_failed == N_ATTEMPTS:
                kept = f"; {n_now} bytes are kept, the next run goes on from there" if n_now else ""
                raise ConnectionError(f"cannot fetch {url} ({reason(e)}){kept}; {OFFLINE_HINT}") from e
            time.sleep(2 ** (n_failed - 1))


def reason(error: Exception) -> str:
    """A network error in a few words: those of requests hold whole objects."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP status {response.status_code}"
    if "Max retries" in str(error):
        return "no connection"
    return "the connection broke off" if "(" in str(error) else str(error)


def download_file(model_size: str, name: str, folder: str) -> None:
    """Fetch one file of an OpenAI model into `folder`, verified."""
    base_url = os.environ.get("GPT2_BASE_URL", OPENAI_URL).rstrip("/")
    url = f"{base_url}/{model_size}/{name}"
    path = os.path.join(folder, name)
    part = path + ".part"
    fetch(url, part, f"{model_size}/{name}")
    try:
        check_file(model_size, name, part, folder)
    except ValueError as e:
        os.remove(part)
        raise ValueError(
            f"{url} is not the file it should be: {e}; nothing was kept: try again, or another GPT2_BASE_URL"
        ) from e
    os.replace(part, path)


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_hparams(path: str) -> dict[str, int]:
    """hparams.json, every value a whole number above 0. ValueError: it is not."""
    with open(path, encoding="utf-8") as f:
        try:
            hparams = json.load(f)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: expected a JSON object, found {e}; download the file again") from e
    for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        value = hparams.get(name) if isinstance(hparams, dict) else None
        if type(value) is not int or not 0 < value < 1 << 31:
            raise ValueError(f"{path}: {name} is {value!r}, expected a whole number above 0; download the file again")
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(
            f"{path}: n_embd {hparams['n_embd']} is no multiple of n_head {hparams['n_head']}; download the file again"
        )
    return hparams


def expected_shapes(hparams: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each variable of a GPT-2, as the checkpoint has them."""
    n_embd = hparams["n_embd"]
    yield "wte", (hparams["n_vocab"], n_embd)
    yield "wpe", (hparams["n_ctx"], n_embd)
    for i in range(hparams["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            yield f"h{i}/{norm}/g", (n_embd,)
            yield f"h{i}/{norm}/b", (n_embd,)
        for linear, n_in, n_out in (
            ("attn/c_attn", n_embd, 3 * n_embd),
            ("attn/c_proj", n_embd, n_embd),
            ("mlp/c_fc", n_embd, 4 * n_embd),
            ("mlp/c_proj", 4 * n_embd, n_embd),
        ):
            yield f"h{i}/{linear}/w", (1, n_in, n_out)
            yield f"h{i}/{linear}/b", (n_out,)
    yield "ln_f/g", (n_embd,)
    yield "ln_f/b", (n_embd,)


def nest_params(variables: dict[str, np.ndarray], hparams: dict[str, int], source: str) -> dict:
    """The variables model/h0/attn/c_attn/w ... as picoGPT nests them: blocks[0]["attn"]["c_attn"]["w"] ..., views all.

    ValueError: one is missing or has another shape than `hparams` says. Others (an optimizer's) are left out.
    """
    if f"model/h{hparams['n_layer']}/ln_1/g" in variables:
        raise ValueError(f"{source}: more layers than the {hparams['n_layer']} of hparams.json; the files differ")
    params: dict = {"blocks": []}
    for name, shape in expected_shapes(hparams):
        array = variables.get(f"model/{name}")
        if array is None or array.shape != shape or array.dtype != np.float32:
            found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
            raise ValueError(
                f"{source}: model/{name} is {found}, expected float32{list(shape)} as hparams.json says; "
                "the files must belong to one model"
            )
        *path, leaf = name.split("/")
        node = params
        if path and path[0].startswith("h"):
            i = int(path.pop(0)[1:])
            if i == len(params["blocks"]):
                params["blocks"].append({})
            node = params["blocks"][i]
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = array[0] if len(shape) == 3 else array
    return params


def models_in(models_dir: str) -> list[str]:
    """The folders of `models_dir` that hold a model."""
    if not os.path.isdir(models_dir):
        return []
    folders = sorted(os.listdir(models_dir))
    return [name for name in folders if os.path.exists(os.path.join(models_dir, name, DATA))]


def find_model(model_size: str, models_dir: str) -> str:
    """The folder of a model, after fetching what is missing. ValueError: there is no such model."""
    folder = os.path.join(models_dir, model_size)
    missing = [name for name in MODEL_FILES if not os.path.exists(os.path.join(folder, name))]
    if model_size in OPENAI_SIZES:
        os.makedirs(folder, exist_ok=True)
        for name in missing:
            download_file(model_size, name, folder)
    elif not model_size or len(missing) == len(MODEL_FILES):
        here = ", ".join(name for name in models_in(models_dir) if name not in OPENAI_SIZES) or "none"
        raise ValueError(
            f"no model {model_size!r}: OpenAI's sizes are {', '.join(OPENAI_SIZES)}; others in {models_dir}: {here}"
        )
    elif missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; copy the whole model there")
    return folder


def load_encoder_hparams_and_params(model_size: str, models_dir: str = "models") -> tuple[Encoder, dict, dict]:
    """(encoder, hparams, params) of `models_dir/model_size`; an OpenAI size is downloaded first if need be.

    The weights are float32 views of the mapped checkpoint, nested as in picoGPT: params["wte"],
    params["blocks"][i]["attn"]["c_attn"]["w"] ...

    ValueError: no such model, or a damaged one. ConnectionError: it could not be fetched.
    """
    folder = find_model(model_size, models_dir)
    hparams = read_hparams(os.path.join(folder, HPARAMS))
    encoder = get_encoder(model_size, models_dir)
    if max(encoder.tokens) >= hparams["n_vocab"]:
        raise ValueError(
            f"{folder}: {TOKEN_IDS} has ids up to {max(encoder.tokens)}, {HPARAMS} a vocabulary of "
            f"{hparams['n_vocab']}; the files must belong to one model"
        )
    prefix = os.path.join(folder, CHECKPOINT)
    return encoder, hparams, nest_params(read_checkpoint(prefix), hparams, prefix)
