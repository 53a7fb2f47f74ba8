"""Models written to a folder: in any form, in little memory, all of a model or nothing."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torchfiles
from bundles import write_bundle
from forms import read_json, read_safetensors, small_encoder, small_model
from helpers import MODELS, ROOT, random_model, random_variables, run, run_here

import utils
from checkpoints import convert, writing
from checkpoints.convert import FORMATS, write_model
from checkpoints.download import private_part
from checkpoints.writing import variables_of
from encoder import CharacterEncoder


@pytest.mark.parametrize("form", FORMATS)
def test_a_padded_vocabulary_is_written_as_it_was_read(form, tmp_path):
    """Rows without a token are never chosen, so they are left out, and what is written is of one size."""
    shutil.copytree(os.path.join(MODELS, "nano"), tmp_path / "padded")
    hparams = read_json(tmp_path / "padded" / "hparams.json") | {"n_vocab": 2052}
    (tmp_path / "padded" / "hparams.json").write_text(json.dumps(hparams))
    write_bundle(str(tmp_path / "padded" / "model.ckpt"), random_variables(hparams))
    utils.convert("padded", str(tmp_path / "out"), format=form, models_dir=str(tmp_path))
    _, read, params = utils.load_encoder_hparams_and_params("padded", str(tmp_path))
    assert read["n_vocab"] == 2048
    if form == "huggingface":
        _, arrays = read_safetensors(tmp_path / "out" / "model.safetensors")
        config, wte = read_json(tmp_path / "out" / "config.json"), arrays["transformer.wte.weight"]
        assert config["vocab_size"] == 2048 == len(read_json(tmp_path / "out" / "vocab.json"))
    else:
        _, again, params_again = utils.load_encoder_hparams_and_params("out", str(tmp_path))
        assert again == read_json(tmp_path / "out" / "hparams.json") == read
        wte = params_again["wte"]
    assert wte.shape == (2048, 64) and wte.tobytes() == params["wte"].tobytes()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("has_biases", [False, True])
def test_nanogpts_transposed_weights_are_written_in_order(form, has_biases, tmp_path):
    shutil.copytree(os.path.join(MODELS, "nano"), tmp_path / "nano")
    hparams = random_model(n_vocab=2112, n_embd=8, n_head=2).hparams
    os.mkdir(tmp_path / "mine")
    (tmp_path / "mine" / "ckpt.pt").write_bytes(torchfiles.checkpoint(hparams, has_biases))
    settings = {"gelu": "tanh", "vocabulary": "nano"}
    utils.convert("mine", str(tmp_path / "out"), format=form, models_dir=str(tmp_path), **settings)
    encoder, hparams, params = utils.load_encoder_hparams_and_params("mine", str(tmp_path), **settings)
    read_encoder, read_hparams, read_params = utils.load_encoder_hparams_and_params("out", str(tmp_path))
    assert hparams["n_vocab"] == read_hparams["n_vocab"] == 2048 and read_encoder.tokens == encoder.tokens
    expected = dict(variables_of(params))
    for name, array in variables_of(read_params):
        np.testing.assert_array_equal(array, expected[name], strict=True)
    assert not params["blocks"][0]["attn"]["c_attn"]["w"].flags.c_contiguous


def test_nanogpts_own_gelu_is_no_openais(tmp_path):
    hparams = random_model(n_vocab=2048, n_embd=8, n_head=2).hparams
    path = tmp_path / "ckpt.pt"
    path.write_bytes(torchfiles.checkpoint(hparams))
    with pytest.raises(ValueError, match="activation gelu, there it is gelu_new"):
        utils.convert(str(path), str(tmp_path / "out"), format="openai", models_dir=MODELS, vocabulary="nano")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_holds_pieces_only(form, order, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "PIECE_SIZE", 1 << 16)
    encoder = small_encoder()
    model = small_model(encoder, n_embd=256, n_layer=2, order=order)
    write_model(encoder, model.hparams, model.params, str(tmp_path / "warm"), form)
    tracemalloc.start()
    written = write_model(encoder, model.hparams, model.params, str(tmp_path / "out"), form)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [os.path.getsize(tmp_path / "out" / name) for name in os.listdir(tmp_path / "out")]
    assert written == f"{len(sizes)} files, {sum(sizes):,} bytes"
    assert sum(sizes) > 6e6 and peak < 1e6


def test_the_program_says_what_it_wrote(tmp_path):
    done = run_here(
        "utils.py", "convert", "nano", tmp_path / "new" / "out", "--format", "huggingface", "--models_dir", MODELS
    )
    assert (done.returncode, done.stdout) == (0, "")
    n_bytes = sum(os.path.getsize(path) for path in (tmp_path / "new" / "out").iterdir())
    assert done.stderr == f"{tmp_path}/new/out: nano as huggingface: 7 files, {n_bytes:,} bytes\n"


@pytest.mark.parametrize(
    ("model", "out", "form", "message"),
    [
        ("nano", "new", "gguf", "format 'gguf' is not known, expected --format huggingface or --format openai"),
        ("nano", "new", "", "format '' is not known"),
        ("nano", "", "openai", "no folder to write to"),
        ("nano", "full", "openai", "full has files in it, a, and none is overwritten; name a folder that is new"),
        ("nano", "full/a", "openai", "a is no folder"),
        ("nano", "models/nano", "openai", "models/nano is the model itself"),
        ("nano", "link", "huggingface", "link is the model itself"),
        ("nano", "dangling", "huggingface", "dangling is no folder"),
        ("mano", "new", "openai", "no model 'mano'"),
    ],
)
def test_what_is_not_written(model, out, form, message, tmp_path):
    shutil.copytree(os.path.join(MODELS, "nano"), tmp_path / "models" / "nano")
    os.makedirs(tmp_path / "full")
    (tmp_path / "full" / "a").write_text("mine")
    os.symlink(tmp_path / "models" / "nano", tmp_path / "link")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        utils.convert(model, out and str(tmp_path / out), format=form, models_dir=str(tmp_path / "models"))
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "full" / "a").read_text() == "mine"


@pytest.mark.parametrize("form", FORMATS)
def test_a_vocabulary_of_characters_is_refused(form, tmp_path):
    encoder = CharacterEncoder({chr(i + 60): i for i in range(65)})
    model = random_model(n_vocab=65)
    with pytest.raises(ValueError, match="a vocabulary of 65 characters cannot be written"):
        write_model(encoder, model.hparams, model.params, str(tmp_path / "out"), form)
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------------------------------------------
# All of a model or nothing
# ----------------------------------------------------------------------------------------------------------------------


class Interrupting:
    """pieces_of, but for what happens before the third piece."""

    def __init__(self, happens):
        self.happens, self.n_pieces = happens, 0

    def __call__(self, array):
        self.n_pieces += 1
        if self.n_pieces == 3:
            self.happens()
        yield array.tobytes()


def broken_off(monkeypatch, form, out, happens):
    monkeypatch.setattr(FORMATS[form], "pieces_of", Interrupting(happens))
    encoder = small_encoder()
    model = small_model(encoder)
    return write_model(encoder, model.hparams, model.params, str(out), form)


def raising(error):
    def happens():
        raise error

    return happens


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_when_it_breaks_off(form, is_there, error, tmp_path, monkeypatch):
    if is_there:
        os.mkdir(tmp_path / "out")
    with pytest.raises(type(error)) as e:
        broken_off(monkeypatch, form, tmp_path / "out", raising(error))
    if isinstance(error, OSError):
        assert "No space left on device; nothing was written: free some space" in str(e.value)
        assert e.value.filename == str(tmp_path / "out")
    assert list(tmp_path.rglob("*")) == ([tmp_path / "out"] if is_there else [])


def test_a_disk_without_room_is_seen_before(tmp_path, monkeypatch):
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(OSError, match="1.1 MB are to be written, 1.0 MB are free; nothing was written: free some"):
        utils.convert("nano", str(tmp_path / "out"), format="openai", models_dir=MODELS)
    assert os.listdir(tmp_path) == []


def test_a_limit_on_files_is_one_line(tmp_path):
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
sys.argv = ["utils.py", "convert", "nano", {str(tmp_path / "out")!r}, "--format=openai", "--models_dir", {MODELS!r}]
import runpy
runpy.run_path("utils.py", run_name="__main__")
"""
    done = run("-c", code)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path}/out: File too large; nothing was written")
    assert os.listdir(tmp_path) == []


def test_files_that_come_meanwhile_are_left_alone(tmp_path, monkeypatch):
    def happens():
        (tmp_path / "vocab.json").write_text("another's")

    with pytest.raises(ValueError, match="has files in it, vocab.json, and none is overwritten"):
        broken_off(monkeypatch, "huggingface", tmp_path, happens)
    assert os.listdir(tmp_path) == ["vocab.json"] and (tmp_path / "vocab.json").read_text() == "another's"


KILLED = """
import os, signal, sys
from checkpoints import convert, write_openai
import utils

def pieces_of(array):
    yield array.tobytes()
    os.kill(os.getpid(), signal.SIGKILL)

write_openai.pieces_of = pieces_of
utils.convert("nano", sys.argv[1], format="openai", models_dir=sys.argv[2])
"""


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, out, MODELS], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    left = os.listdir(out)
    assert len(left) == 5 and all(name.endswith(".part") for name in left)
    alive = private_part(str(out / "hparams.json"))  # of this process
    with open(alive, "wb"):
        pass
    utils.convert("nano", str(out), format="openai", models_dir=MODELS)
    assert set(os.listdir(out)) == {*utils.MODEL_FILES, "checkpoint", os.path.basename(alive)}
