import hashlib
import os
import shutil

import numpy as np
import pytest
from conftest import MODELS, random_variables, run

import utils
from utils import load_encoder_hparams_and_params, nest_params, read_hparams

NANO = os.path.join(MODELS, "nano")


def test_published_hashes_are_sha256():
    assert all(len(value) == 64 and int(value, 16) for value in utils.SHA256.values())
    path = os.path.join(os.environ.get("GPT2_MODELS_DIR", MODELS), "124M")
    for name in ("encoder.json", "vocab.bpe", "hparams.json", "model.ckpt.index"):
        if not os.path.exists(os.path.join(path, name)):
            pytest.skip("OpenAI's 124M files are not here; GPT2_MODELS_DIR says where they are")
        with open(os.path.join(path, name), "rb") as f:
            found = hashlib.sha256(f.read()).hexdigest()
        assert found == (utils.SHA256.get(f"124M/{name}") or utils.SHA256[name])


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


def test_other_sizes_say_early_that_google_crc32c_is_needed(tmp_path):
    before = "import sys; sys.modules['google_crc32c'] = None; import cli, utils; "
    load = f"utils.load_encoder_hparams_and_params('355M', {str(tmp_path)!r})"
    for command in (load,):
        done = run("-c", before + f"cli.run(lambda: {command} and None)", env={"GPT2_BASE_URL": "http://127.0.0.1:9"})
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "needs google-crc32c; pip install google-crc32c" in done.stderr
