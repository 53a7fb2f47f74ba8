#!/usr/bin/env python
"""A coverage-guided fuzz target for everything that reads a model's files, run by hand:

    pip install atheris
    mkdir -p found && python tests/fuzz/fuzz_files.py found tests/fuzz/corpus -max_total_time=1800

What it finds new goes to the first folder. An input that fails is kept as crash-*; given alone, it runs again. To take
new inputs over, minimised: tests/fuzz/fuzz_files.py -set_cover_merge=1 tests/fuzz/corpus found

An input's first byte says which file it is: c a checkpoint (the index up to its magic number, then the data), C the
same with its checksums made right, h hparams.json, e encoder.json, m vocab.bpe, n nanoGPT's ckpt.pt, N the data.pkl of
one, a an archive of torch.save with its end made right, k nanoGPT's meta.pkl, s model.safetensors, j config.json, t
tokenizer.json. Only a ValueError that names the file may come out, within MAX_SECONDS and MAX_GROWTH of memory.
tests/checkpoints/test_fuzzing.py replays the kept inputs through `check`, without atheris.
"""

import os
import resource
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
READING = ["checkpoints", "encoder"]  # the modules whose coverage guides the search

if __name__ == "__main__":
    import atheris  # only a run by hand needs it

    os.environ["TQDM_DISABLE"] = "1"  # the progress bar of a file of a hundred bytes
    with atheris.instrument_imports(include=READING):
        import encoder
        from checkpoints import huggingface, nanogpt, openai, safetensors, tensorflow, vocabulary, weights
else:
    import encoder
    from checkpoints import huggingface, nanogpt, openai, safetensors, tensorflow, vocabulary, weights

import torchfiles  # noqa: E402
from bundles import MAGIC, with_right_checksums  # noqa: E402

MAX_SIZE = 8192  # bytes of an input
MAX_SECONDS = 2  # of processor time
MAX_GROWTH = 64 << 20  # bytes of memory
HPARAMS = {"n_vocab": 3, "n_ctx": 2, "n_embd": 2, "n_head": 1, "n_layer": 1}
LETTERS = {c: b for b, c in encoder.BYTE_TO_CHAR.items()}
TOKEN_IDS = LETTERS | {piece: 256 + i for i, piece in enumerate(["th", "the", "Ġa", "Ġthe", "ing", "in", "aa", "aaaa"])}
NANOGPT = torchfiles.records_of(torchfiles.nanogpt_weights(HPARAMS, bias=False), torchfiles.model_args(HPARAMS, False))
FOLDER = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


def put(name: str, content: bytes) -> str:
    path = os.path.join(FOLDER.name, name)
    with open(path, "wb") as f:
        f.write(content)
    return path


def read_model(content: bytes, mended: bool) -> None:
    at = content.rfind(MAGIC)
    end = len(content) if at < 0 else at + len(MAGIC)
    index, data = content[:end], content[end:]
    put(openai.INDEX, with_right_checksums(index) if mended else index)
    put(openai.DATA, data)
    prefix = os.path.join(FOLDER.name, openai.CHECKPOINT)
    try:
        tensorflow.verify_checkpoint(prefix)
    except ValueError as e:
        assert FOLDER.name + os.sep in str(e)
    arrays = tensorflow.read_checkpoint(prefix)
    assert sum(array.nbytes for array in arrays.values()) <= 2 * len(data)  # halves become float32
    for array in arrays.values():
        array.tobytes()  # every byte can be read
    weights.nest_params(arrays, HPARAMS, prefix)


def read_hparams(content: bytes) -> None:
    hparams = openai.read_hparams(put(openai.HPARAMS, content))
    assert all(0 < hparams[name] < 1 << 31 for name in HPARAMS) and hparams["n_embd"] % hparams["n_head"] == 0


def check_round_trip(token_ids: dict, merge_ranks: dict) -> None:
    text = "the thing in a aaaaaaaaa 日🙂\n"
    vocabulary = encoder.Encoder(token_ids, merge_ranks)
    assert vocabulary.decode(vocabulary.encode(text)) == text


def read_token_ids(content: bytes) -> None:
    token_ids = encoder.read_token_ids(put(openai.TOKEN_IDS, content))
    check_round_trip(token_ids, {("t", "h"): 0} if "th" in token_ids else {})


def read_merges(content: bytes) -> None:
    check_round_trip(TOKEN_IDS, encoder.read_merge_ranks(put(openai.MERGES, content), TOKEN_IDS))


def read_nanogpt(content: bytes) -> None:
    path = put("ckpt.pt", content)
    hparams, variables = nanogpt.read_nanogpt(path)
    assert all(variable.tobytes() for variable in variables.values())  # every byte can be read
    weights.nest_params(variables, hparams, path)
    nanogpt.verify_nanogpt(path)


def read_pickle(content: bytes) -> None:
    storages = {name: array for name, array in NANOGPT.items() if name != "data.pkl"}
    read_nanogpt(torchfiles.archive({"data.pkl": content, **storages}))


def read_archive(content: bytes) -> None:
    path = put("ckpt.pt", torchfiles.with_right_end(content))
    with nanogpt.faults_named(path, "copy it again"):
        file = nanogpt.TorchFile(path)
        if hasattr(file.content, "shape"):
            assert file.array(file.content).tobytes()  # every byte can be read
        file.verify()


def read_meta(content: bytes) -> None:
    ids = nanogpt.read_meta(put("meta.pkl", content))
    text = "".join(ids)
    characters = encoder.CharacterEncoder(ids)
    assert characters.decode(characters.encode(text)) == text


def read_safetensors(content: bytes) -> None:
    path = put("model.safetensors", content)
    for array in safetensors.read_safetensors(path, safetensors.read_header(path)).values():
        assert array.dtype == "float32" and array.nbytes <= 4 * len(content)
        array.tobytes()  # every byte can be read


def read_config(content: bytes) -> None:
    hparams, config = huggingface.read_config(put("config.json", content))
    assert hparams["activation"] in ("gelu_new", "gelu", "relu", "silu") and hparams["n_embd"] % hparams["n_head"] == 0
    eot_ids, _ = huggingface.special_ids(FOLDER.name, config, hparams["n_vocab"])
    assert all(0 <= i < hparams["n_vocab"] for i in eot_ids)


def read_tokenizer(content: bytes) -> None:
    path = put("tokenizer.json", content)
    found = vocabulary.read_tokenizer(path).within(1 << 20)
    token_ids = encoder.check_token_ids(found.token_ids, path, found.added)
    ranks = encoder.rank_merges(found.merges, token_ids, path)
    mine = encoder.Encoder(token_ids, ranks, found.added, found.patterns, (), None, found.adds_space)
    text = "the thing in a aaaaaaaaa 日🙂\n"
    assert mine.decode(mine.encode(text)).strip() == text.strip()
    mine.encode(text + "".join(found.added), allow_special=True)


READERS = {
    b"c": lambda content: read_model(content, mended=False),
    b"C": lambda content: read_model(content, mended=True),
    b"h": read_hparams,
    b"e": read_token_ids,
    b"m": read_merges,
    b"n": read_nanogpt,
    b"N": read_pickle,
    b"a": read_archive,
    b"k": read_meta,
    b"s": read_safetensors,
    b"j": read_config,
    b"t": read_tokenizer,
}


def check(content: bytes) -> str:
    """Read one input: what the reader had against it, "" if nothing. AssertionError and all others: a fault of ours."""
    reader = READERS.get(content[:1])
    if reader is None:
        return "of no kind"
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = ""
    try:
        reader(content[1 : MAX_SIZE + 1])
    except ValueError as e:
        message = str(e)
        assert FOLDER.name + os.sep in message, f"names no file: {message}"
    assert time.process_time() - started < MAX_SECONDS
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth * (1 if sys.platform == "darwin" else 1024) < MAX_GROWTH  # kilobytes on Linux
    return message


if __name__ == "__main__":
    # atheris itself grows with the runs; -timeout counts time in which the process is stopped, too.
    defaults = [f"-max_len={MAX_SIZE}", "-timeout=100", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *defaults, *sys.argv[1:]], check)
    atheris.Fuzz()
