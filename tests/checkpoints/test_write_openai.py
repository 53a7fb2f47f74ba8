"""OpenAI's form: every byte as TensorFlow writes it, and what it cannot express is refused."""

import filecmp
import os
import re
import sys

import pytest
from bundles import index_of
from forms import SMALL, UNLIKE, read_json, small_encoder, small_model
from helpers import MODELS, random_model, read_bytes

import utils
from checkpoints.convert import write_model
from checkpoints.tensorflow import read_index
from checkpoints.writing import variables_of
from encoder import END_OF_TEXT, Encoder

OPENAI_DIR = os.environ.get("GPT2_MODELS_DIR", MODELS)


@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_openais_form_is_what_tensorflow_wrote_byte_for_byte(name, tmp_path):
    """TensorFlow wrote the embedded checkpoints: the order, the blocks, the shared keys, the checksums."""
    utils.convert(name, str(tmp_path / "out"), format="openai", models_dir=MODELS)
    files = os.listdir(os.path.join(MODELS, name))
    same, different, missing = filecmp.cmpfiles(os.path.join(MODELS, name), tmp_path / "out", files, shallow=False)
    assert (sorted(same), different, missing) == (sorted(utils.MODEL_FILES), [], [])
    assert utils.find_problems("out", str(tmp_path)) == []


def test_openais_index_and_vocabulary_come_out_as_they_are(tmp_path):
    folder = os.path.join(OPENAI_DIR, "124M")
    names = ("model.ckpt.index", "encoder.json", "vocab.bpe", "checkpoint")
    if not all(os.path.exists(os.path.join(folder, name)) for name in names):
        pytest.skip(f"OpenAI's 124M is not in {OPENAI_DIR}; GPT2_MODELS_DIR says where it is")
    _, _, entries = read_index(os.path.join(folder, "model.ckpt.index"))
    assert index_of(entries) == read_bytes(os.path.join(folder, "model.ckpt.index"))
    encoder = utils.get_encoder("124M", OPENAI_DIR)
    model = random_model(n_vocab=encoder.n_vocab, n_layer=1)
    write_model(encoder, model.hparams, model.params, str(tmp_path), "openai")
    assert all(filecmp.cmp(os.path.join(folder, name), tmp_path / name, shallow=False) for name in names[1:])


@pytest.mark.xdist_group("tensorflow")
def test_tensorflow_finds_and_reads_it(tmp_path):
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed; it has no wheel for this Python yet")
    encoder = small_encoder()
    model = small_model(encoder, order="F")
    write_model(encoder, model.hparams, model.params, str(tmp_path), "openai")
    reader = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(tmp_path)))
    shapes = reader.get_variable_to_shape_map()
    assert len(shapes) == 4 + 12 * SMALL["n_layer"] and shapes["model/h10/mlp/c_fc/w"] == [1, 8, 32]
    for name, array in variables_of(model.params):
        assert reader.get_tensor(f"model/{name}").reshape(array.shape).tobytes() == array.tobytes()


@pytest.mark.parametrize("special", [(END_OF_TEXT,), ()])
def test_openais_form_read_again_is_the_model(special, tmp_path):
    encoder = small_encoder(special)
    model = small_model(encoder, order="F")
    write_model(encoder, model.hparams, model.params, str(tmp_path / "out"), "openai")
    read_encoder, hparams, params = utils.load_encoder_hparams_and_params("out", str(tmp_path))
    assert hparams == model.hparams and read_encoder.eot_id == encoder.eot_id
    assert (read_encoder.token_ids, read_encoder.merge_ranks) == (encoder.token_ids, encoder.merge_ranks)
    for (name, array), (_, expected) in zip(variables_of(params), variables_of(model.params), strict=True):
        assert array.tobytes() == expected.tobytes(), name


UNKNOWN = "OpenAI's form cannot express this model: "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "gelu"}, UNKNOWN + "activation gelu, there it is gelu_new; choose --format huggingface"),
        ({"layer_norm_epsilon": 1e-6}, UNKNOWN + "layer_norm_epsilon 1e-06, there it is 1e-05"),
        ({"n_inner": 20}, UNKNOWN + "n_inner 20, there it is 32"),
        ({"is_tied": False}, UNKNOWN + "an output matrix other than wte"),
        (UNLIKE, UNKNOWN + "activation relu, .*; layer_norm_epsilon 0.001, .*; n_inner 20, "),
    ],
)
def test_what_openais_form_cannot_express_is_named(settings, message, tmp_path):
    encoder = small_encoder()
    model = small_model(encoder, **settings)
    with pytest.raises(ValueError, match=message):
        write_model(encoder, model.hparams, model.params, str(tmp_path / "out"), "openai")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"added": {}},
            "added tokens other than <|endoftext|> as it is, here none; choose --format huggingface",
        ),
        (
            {"added": {END_OF_TEXT: 259, "Ġthe": 258}},
            "added tokens other than <|endoftext|> as it is, here <|endoftext|>, Ġthe",
        ),
        ({"patterns": {END_OF_TEXT: r"<\|endoftext\|>\s*"}}, "added tokens other than <|endoftext|> as it is"),
        ({"eot_ids": (258,)}, "another beginning or end of a text than <|endoftext|>"),
        ({"start_id": 0}, "another beginning or end of a text than <|endoftext|>"),
        ({"adds_space": True}, "a vocabulary that puts a space before each text"),
    ],
)
def test_what_openais_vocabulary_cannot_express_is_named(settings, message, tmp_path):
    small = small_encoder()
    model = small_model(small)
    encoder = Encoder(small.token_ids, small.merge_ranks, **settings)
    with pytest.raises(ValueError, match=re.escape(UNKNOWN + message)):
        write_model(encoder, model.hparams, model.params, str(tmp_path), "openai")


def test_gpt2s_own_settings_may_be_spelled_out(tmp_path):
    encoder = small_encoder()
    model = small_model(encoder, activation="gelu_new", layer_norm_epsilon=1e-5, n_inner=32)
    write_model(encoder, model.hparams, model.params, str(tmp_path), "openai")
    assert list(read_json(tmp_path / "hparams.json")) == ["n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"]


def test_checksums_need_google_crc32c(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    with pytest.raises(ValueError, match="pip install google-crc32c"):
        utils.convert("nano", str(tmp_path / "out"), format="openai", models_dir=MODELS)
    assert os.listdir(tmp_path) == []
    utils.convert("nano", str(tmp_path / "out"), format="huggingface", models_dir=MODELS)
