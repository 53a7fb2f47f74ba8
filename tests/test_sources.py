"""Models of every source by their names: the programs, verify and convert on Hugging Face's and nanoGPT's."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import relatives
from helpers import MODELS, read_bytes, run_here, write_bytes
from torchfiles import checkpoint

import gpt2
import utils

CHARACTERS = {c: i for i, c in enumerate("\n abcdefghijklmnopqrstuvwxyz")}
HPARAMS = {"n_vocab": 28, "n_ctx": 32, "n_embd": 8, "n_head": 2, "n_layer": 2}
PADDED = HPARAMS | {"n_vocab": 2112}  # nano's 2048 tokens, rounded up


@pytest.fixture
def characters(tmp_path):
    """A folder with a ckpt.pt and a meta.pkl."""
    write_bytes(tmp_path / "ckpt.pt", checkpoint(HPARAMS))
    meta = {"vocab_size": 28, "itos": {i: c for c, i in CHARACTERS.items()}, "stoi": CHARACTERS}
    write_bytes(tmp_path / "meta.pkl", pickle.dumps(meta))
    return tmp_path


@pytest.fixture
def padded(tmp_path):
    """A folder with a ckpt.pt that has nano's vocabulary."""
    write_bytes(tmp_path / "ckpt.pt", checkpoint(PADDED, bias=False))
    return tmp_path


def test_a_model_of_characters_continues_text(characters):
    done = run_here("gpt2.py", "to be", "--model_size", characters, "--n_tokens_to_generate", 9)
    assert done.returncode == 0 and len(done.stdout) == 9 and set(done.stdout) <= CHARACTERS.keys()
    assert "GELU by its formula; --gelu tanh is for models trained before June 2023" in done.stderr
    by_file = run_here("gpt2.py", "to be", "--model_size", characters / "ckpt.pt", "--n_tokens_to_generate", 9)
    assert by_file.stdout == done.stdout
    said = run_here("gpt2.py", "to be", "--model_size", characters, "--gelu", "erf", "--n_tokens_to_generate", 9)
    assert (said.stdout, said.stderr) == (done.stdout, "")
    done = run_here("gpt2.py", "TO BE", "--model_size", characters)
    assert done.returncode == 1 and "characters ['B', 'E', 'O', 'T'] are not among the 28" in done.stderr
    done = run_here("gpt2.py", "", "--model_size", characters, "--n_tokens_to_generate", 3)
    assert done.returncode == 0 and len(done.stdout) == 3  # after a line end, as nanoGPT begins


def test_the_gelu_of_older_models_can_be_said(characters):
    logits = []
    for gelu in ("erf", "tanh"):
        _, model = gpt2.load_model(str(characters), gelu=gelu)
        logits.append(model.forward([[5, 6, 7]], model.new_cache()))
    assert 0 < abs(logits[0] - logits[1]).max() < 0.1
    done = run_here("gpt2.py", "to", "--model_size", characters, "--gelu", "relu")
    assert done.returncode == 1 and "gelu is 'relu', expected erf or tanh" in done.stderr


def test_a_vocabulary_can_be_named_and_padding_is_never_chosen(padded):
    done = run_here("gpt2.py", "O", "--model_size", padded, "--models_dir", padded)
    assert done.returncode == 1 and "has no meta.pkl beside it, and" in done.stderr
    assert "--vocabulary names a model whose tokens it has" in done.stderr
    encoder, model = gpt2.load_model(str(padded), MODELS, vocabulary="nano")
    assert model.hparams["n_vocab"] == 2048 == model.forward([[1]], model.new_cache()).shape[-1]
    relatives.write_folder(padded / "theirs", {})
    other, _ = gpt2.load_model(str(padded), str(padded), vocabulary="theirs")
    assert other.encode("O Romeo") == encoder.encode("O Romeo")
    flags = ["--vocabulary", "nano", "--temperature", 50, "--seed", 1, "--n_tokens_to_generate", 20]
    text = run_here("gpt2.py", "O", "--model_size", padded, *flags)
    assert text.returncode == 0 and text.stdout


def test_a_model_too_small_for_the_vocabulary_is_refused(characters):
    os.remove(characters / "meta.pkl")
    with pytest.raises(ValueError, match="its vocabulary has ids up to 2047, its hyper-parameters say 28 tokens"):
        gpt2.load_model(str(characters), MODELS, vocabulary="nano")


@pytest.mark.parametrize("source", ["huggingface", "nanogpt"])
def test_speculation_mixes_sources(source, tmp_path):
    """A target of one source with a draft of another: the same text as without."""
    if source == "huggingface":
        relatives.write_folder(tmp_path, {})
    else:
        write_bytes(tmp_path / "ckpt.pt", checkpoint(PADDED))
    flags = ["--target_model_size", tmp_path, "--draft_model_size", "nano", "--vocabulary", "nano", "--verify"]
    done = run_here("speculative.py", "O", *flags, "--n_tokens_to_generate", 20, "--n_draft", 3)
    assert done.returncode == 0 and "verified: 20 tokens identical" in done.stderr


@pytest.mark.parametrize("kind", ["huggingface", "shards", "nanogpt"])
def test_verify_reads_every_source(kind, characters, tmp_path):
    path = characters
    if kind != "nanogpt":
        relatives.write_folder(path := tmp_path / "theirs", relatives.CASES["gpt2" if kind == "huggingface" else kind])
    done = run_here("utils.py", "verify", path)
    assert done.returncode == 0 and f"{path}: OK: " in done.stderr and " finite weights in 2 layers" in done.stderr
    has_checksums = "checksums of its records right" if kind == "nanogpt" else "the format has no checksums"
    assert has_checksums in done.stderr


def test_verify_names_what_is_wrong_with_other_sources(characters, tmp_path):
    relatives.write_folder(path := tmp_path / "theirs", {})
    tensors = relatives.tensors_of({})
    tensors["transformer.ln_f.bias"][1][3] = np.nan
    write_bytes(path / "model.safetensors", relatives.safetensors_bytes(tensors))
    os.remove(path / "merges.txt")
    done = run_here("utils.py", "verify", path)
    assert done.returncode == 1 and "lacks merges.txt" in done.stderr and "problems found" in done.stderr
    relatives.write_tokenizer(str(path))
    done = run_here("utils.py", "verify", path)
    assert done.returncode == 1 and "model/ln_f/b has 1 of 16" in done.stderr
    content = bytearray(read_bytes(characters / "ckpt.pt"))
    content[len(content) // 2] ^= 1  # a weight
    write_bytes(characters / "ckpt.pt", bytes(content))
    done = run_here("utils.py", "verify", characters)
    assert done.returncode == 1 and "ckpt.pt" in done.stderr


def test_score_is_of_every_source(characters, tmp_path):
    (tmp_path / "text").write_text("to be or not to be that is the question " * 3)
    done = run_here("gpt2.py", "--score", tmp_path / "text", "--model_size", characters, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] == 119


def test_models_that_are_there_are_listed(tmp_path):
    shutil.copytree(os.path.join(MODELS, "nano"), tmp_path / "nano")
    relatives.write_folder(tmp_path / "theirs", {})
    (tmp_path / "mine").mkdir()
    write_bytes(tmp_path / "mine" / "ckpt.pt", checkpoint(HPARAMS))
    (tmp_path / "nothing").mkdir()
    assert utils.models_in(str(tmp_path)) == ["mine", "nano", "theirs"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_links_out_of_the_folder_and_pipes_are_refused(name, tmp_path):
    relatives.write_folder(folder := tmp_path / "theirs", {})
    os.rename(folder / name, tmp_path / name)
    os.symlink(tmp_path / name, folder / name)
    with pytest.raises(ValueError, match="is a link to .*, out of its folder"):
        gpt2.load_model(str(folder))
    os.remove(folder / name)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="is a folder, a pipe or a device, expected a file"):
        gpt2.load_model(str(folder))


def test_the_hubs_cache_is_made_of_links(tmp_path):
    relatives.write_folder(blobs := tmp_path / "models--me--mini" / "blobs", {})
    (snapshot := tmp_path / "models--me--mini" / "snapshots" / "abc").mkdir(parents=True)
    for name in os.listdir(blobs):
        os.symlink(os.path.join("..", "..", "blobs", name), snapshot / name)
    assert gpt2.load_model(str(snapshot))[1].hparams["n_layer"] == 2


def test_nanogpts_model_converts_to_huggingfaces(padded, tmp_path):
    done = run_here(
        "utils.py", "convert", padded, tmp_path / "out", "--format", "huggingface", "--models_dir", MODELS,
        "--gelu", "tanh", "--vocabulary", "nano",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    _, ours = gpt2.load_model(str(padded), MODELS, gelu="tanh", vocabulary="nano")
    _, theirs = gpt2.load_model(str(tmp_path / "out"))
    ids = [[1, 2, 3, 2000]]
    expected, found = (model.forward(ids, model.new_cache(), n_last=4) for model in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
