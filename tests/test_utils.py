import hashlib
import json
import os
import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from bundles import hostile_index
from helpers import MODELS, random_variables, run, run_here

import gpt2
from checkpoints import openai
from checkpoints.openai import read_hparams
from checkpoints.table import mask_crc32c
from checkpoints.tensorflow import data_path, read_index
from checkpoints.weights import nest_params
from decoding.sampling import make_sampler
from utils import load_encoder_hparams_and_params

NANO = os.path.join(MODELS, "nano")


def test_published_hashes_are_sha256():
    assert all(len(value) == 64 and int(value, 16) for value in openai.SHA256.values())
    path = os.path.join(os.environ.get("GPT2_MODELS_DIR", MODELS), "124M")
    for name in ("encoder.json", "vocab.bpe", "hparams.json", "model.ckpt.index"):
        if not os.path.exists(os.path.join(path, name)):
            pytest.skip("OpenAI's 124M files are not here; GPT2_MODELS_DIR says where they are")
        with open(os.path.join(path, name), "rb") as f:
            found = hashlib.sha256(f.read()).hexdigest()
        assert found == (openai.SHA256.get(f"124M/{name}") or openai.SHA256[name])


# ----------------------------------------------------------------------------------------------------------------------
# Names, hparams, shapes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["125M", "", "..", "medium"])
def test_an_unknown_size_lists_what_exists(size):
    with pytest.raises(ValueError, match="no model .*124M, 355M, 774M, 1558M.*: nano, tiny"):
        load_encoder_hparams_and_params(size, MODELS)


def test_an_incomplete_folder_names_what_it_lacks(tmp_path):
    shutil.copytree(NANO, tmp_path / "mine")
    os.remove(tmp_path / "mine" / "encoder.json")
    with pytest.raises(ValueError, match="mine lacks encoder.json"):
        load_encoder_hparams_and_params("mine", str(tmp_path))


def test_a_path_object_is_a_name_too():
    _, hparams, _ = load_encoder_hparams_and_params(Path(MODELS, "nano"))
    assert hparams["n_layer"] == 2


def test_params_are_nested_as_in_picogpt():
    _, hparams, params = load_encoder_hparams_and_params("nano", MODELS)
    n_embd = hparams["n_embd"]
    assert set(params) == {"wte", "wpe", "blocks", "ln_f"}
    assert set(params["blocks"][1]) == {"ln_1", "attn", "ln_2", "mlp"}
    assert params["blocks"][1]["attn"]["c_attn"]["w"].shape == (n_embd, 3 * n_embd)
    assert params["blocks"][1]["mlp"]["c_proj"]["b"].shape == (n_embd,)
    assert params["wte"].shape == (2048, n_embd) and not params["wte"].flags.writeable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a JSON object"),
        ("[]", "n_vocab is None"),
        ('{"n_vocab": 1}', "n_ctx is None"),
        ('{"n_vocab": "9", "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 1}', "n_vocab is '9'"),
        ('{"n_vocab": 9, "n_ctx": 0, "n_embd": 8, "n_head": 2, "n_layer": 1}', "n_ctx is 0"),
        ('{"n_vocab": 9, "n_ctx": -4, "n_embd": 8, "n_head": 2, "n_layer": 1}', "n_ctx is -4"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": 8.0, "n_head": 2, "n_layer": 1}', "n_embd is 8.0"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": true, "n_head": 2, "n_layer": 1}', "n_embd is True"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": 8, "n_head": 3, "n_layer": 1}', "n_embd 8 is no multiple of n_head 3"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 1e99}', "n_layer is 1e"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 99999999999}', "n_layer is 99999999999"),
    ],
)
def test_bad_hparams_are_named(tmp_path, content, message):
    path = tmp_path / "hparams.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as e:
        read_hparams(str(path))
    assert str(path) in str(e.value)


HPARAMS = {"n_vocab": 9, "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_vocab": 10}, r"model/wte is float32\[9, 8\], expected float32\[10, 8\]"),
        ({"n_layer": 3}, "model/h2/ln_1/g is nothing"),
        ({"n_layer": 2**31 - 1}, "model/h2/ln_1/g is nothing"),
        ({"n_layer": 1}, "more layers than the 1"),
        ({"n_embd": 16}, "model/wte is float32"),
    ],
)
def test_weights_that_do_not_fit_hparams_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        nest_params(random_variables(HPARAMS), HPARAMS | change, "model.ckpt")


def test_integer_weights_are_refused():
    variables = random_variables(HPARAMS)
    variables["model/wte"] = variables["model/wte"].astype(np.int64)
    with pytest.raises(ValueError, match="model/wte is int64"):
        nest_params(variables, HPARAMS, "model.ckpt")


# ----------------------------------------------------------------------------------------------------------------------
# Verifying
# ----------------------------------------------------------------------------------------------------------------------


def verify(models_dir, model_size="mine"):
    done = run_here("utils.py", "verify", model_size, "--models_dir", models_dir)
    assert done.stdout == "" and "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.fixture
def mine(tmp_path):
    """A copy of nano, to be damaged."""
    shutil.copytree(NANO, tmp_path / "mine")
    return tmp_path / "mine"


def test_verify_sums_up_what_is_right(mine):
    status, err = verify(mine.parent)
    assert status == 0
    assert "mine: OK: 263936 finite weights in 2 layers, 2048 tokens, the checksums of model.ckpt.data-" in err


def other_model(mine):
    shutil.copy(os.path.join(MODELS, "tiny", "model.ckpt.index"), mine)


def no_numbers(mine):
    """NaN and infinity, with checksums that are right."""
    prefix = str(mine / "model.ckpt")
    entries = read_index(prefix + ".index")[2]
    with open(data_path(prefix), "r+b") as f:
        for name, value in (("model/wte", np.nan), ("model/h1/ln_2/b", -np.inf)):
            f.seek(entries[name].offset)
            f.write(np.float32(value).tobytes())
            f.seek(entries[name].offset)
            entries[name].masked_crc32c = mask_crc32c(google_crc32c.value(f.read(entries[name].size)))
    hostile_index(prefix, {name: {"masked_crc32c": entries[name].masked_crc32c} for name in entries})


def flipped_bit(mine):
    path = data_path(str(mine / "model.ckpt"))
    with open(path, "r+b") as f:
        f.seek(500_000)
        byte = f.read(1)[0]
        f.seek(500_000)
        f.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (lambda mine: (mine / "hparams.json").write_text("{"), ["hparams.json: expected a JSON object"]),
        (lambda mine: (mine / "hparams.json").unlink(), ["mine/hparams.json is missing"]),
        (lambda mine: (mine / "encoder.json").write_text("[]"), ["encoder.json: expected a JSON object"]),
        (lambda mine: (mine / "vocab.bpe").write_text("<html>"), ["vocab.bpe: expected '#version' in line 1"]),
        (
            lambda mine: (mine / "model.ckpt.index").write_bytes(b"x" * 99),
            ["index is damaged or no TensorFlow"],
        ),
        (lambda mine: os.truncate(data_path(str(mine / "model.ckpt")), 9), ["has 9 bytes, expected 1055744"]),
        (lambda mine: os.remove(data_path(str(mine / "model.ckpt"))), ["data-00000-of-00001 is missing"]),
        (other_model, ["has 1055744 bytes, expected 10828800"]),
        (flipped_bit, ["has checksum 0x"]),
        (no_numbers, ["NaN or infinite: model/h1/ln_2/b has 1 of 64, model/wte has 1 of 131072"]),
        (
            lambda mine: [
                (mine / "vocab.bpe").write_text(""),
                (mine / "hparams.json").write_text(""),
                no_numbers(mine),
            ],
            ["vocab.bpe: expected '#version'", "hparams.json: expected a JSON object", "NaN or infinite"],
        ),
    ],
)
def test_verify_names_what_is_wrong(mine, damage, messages):
    damage(mine)
    status, err = verify(mine.parent)
    assert status == 1
    assert all(message in err for message in messages)
    assert f"mine: problems found: {len(messages)}; replace" in err  # each once, and no others
    assert " OK" not in err


def test_verify_compares_hparams_with_the_weights(mine):
    hparams = read_hparams(str(mine / "hparams.json"))
    (mine / "hparams.json").write_text(json.dumps(hparams | {"n_layer": 1}))
    assert verify(mine.parent)[0] == 1 and "more layers than the 1" in verify(mine.parent)[1]
    (mine / "hparams.json").write_text(json.dumps(hparams | {"n_vocab": 2047}))
    status, err = verify(mine.parent)
    assert status == 1 and "ids up to 2047, its hyper-parameters say 2047 tokens" in err
    assert "model/wte is float32[2048, 64], expected float32[2047, 64]" in err


def test_verify_compares_published_checksums(mine):
    """Another model under the name of one of OpenAI's."""
    status, err = verify(shutil.move(mine, mine.parent / "124M").parent, "124M")
    assert status == 1
    assert err.count("has sha256") == 5 and "problems found: 6;" in err and "expected heads of 64" in err


def test_verify_names_all_that_is_missing(mine):
    names = ("hparams.json", "vocab.bpe", "encoder.json")
    for name in names:
        os.remove(mine / name)
    status, err = verify(mine.parent, "mine")
    assert status == 1 and all(f"{mine / name} is missing" in err for name in names)


def test_verify_knows_how_wide_the_heads_of_openai_are(mine):
    """Another divisor of n_embd fits all shapes, and gives other texts."""
    hparams = json.loads((mine / "hparams.json").read_text())
    (mine / "hparams.json").write_text(json.dumps(hparams | {"n_head": 2}))
    status, err = verify(mine.parent, "mine")
    assert status == 0 and "hparams.json and the vocabulary have none" in err  # nothing could tell
    status, err = verify(shutil.move(mine, mine.parent / "355M").parent, "355M")
    assert status == 1 and "n_embd 64 and n_head 2, expected heads of 64 as in all OpenAI sizes" in err


def test_ids_without_a_token_are_never_chosen(mine):
    """A vocabulary of 2000 for 2048 rows, as padded ones have; and one with a hole, which is refused."""
    tokens = json.loads((mine / "encoder.json").read_text(encoding="utf-8"))
    merges = (mine / "vocab.bpe").read_text(encoding="utf-8").split("\n")
    kept = {token: i for token, i in tokens.items() if i < 2000}
    merges = [merges[0], *(line for line in merges[1:] if "".join(line.split()) in kept)]
    (mine / "vocab.bpe").write_text("\n".join(merges), encoding="utf-8")
    (mine / "encoder.json").write_text(json.dumps(kept), encoding="utf-8")
    encoder, hparams, params = load_encoder_hparams_and_params("mine", str(mine.parent))
    assert hparams["n_vocab"] == len(params["wte"]) == 2000
    model = gpt2.Model(hparams, params)
    assert max(gpt2.generate(model, encoder.encode("a"), 200, make_sampler(100.0, seed=0))) < 2000
    (mine / "encoder.json").write_text(json.dumps(kept | {"Romeo and Juliet".replace(" ", ""): 2005}), encoding="utf-8")
    with pytest.raises(ValueError, match="its vocabulary has no token for id 2000, which the model could choose"):
        load_encoder_hparams_and_params("mine", str(mine.parent))


def test_verify_downloads_nothing(mine):
    for name in ("124M", ""):
        status, err = verify(mine.parent, name)
        assert status == 1 and "there: mine; gpt2.py downloads" in err
    assert os.listdir(mine.parent) == ["mine"]


def test_other_sizes_say_early_that_google_crc32c_is_needed(tmp_path):
    before = "import sys; sys.modules['google_crc32c'] = None; import utils; from console import command; "
    load = f"utils.load_encoder_hparams_and_params('355M', {str(tmp_path)!r})"
    for call in (load, f"utils.verify('tiny', models_dir={MODELS!r})"):
        done = run("-c", before + f"command.run(lambda: {call} and None)", env={"GPT2_BASE_URL": "http://127.0.0.1:9"})
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "needs google-crc32c; pip install google-crc32c" in done.stderr
