"""Hugging Face's form: the weights bit by bit, the vocabulary text by text, and what the libraries make of them."""

import filecmp
import os

import numpy as np
import pytest
from forms import UNLIKE, expected_tensors, grown_encoder, read_json, read_safetensors, small_encoder, small_model
from helpers import MODELS

import utils
from checkpoints.convert import write_model
from checkpoints.writing import variables_of
from encoder import END_OF_TEXT, Encoder


@pytest.mark.parametrize("settings", [{}, UNLIKE | {"is_tied": False}, {"order": "F", "is_tied": False}])
def test_weights_have_hugging_faces_names_order_and_bits(settings, tmp_path):
    encoder = small_encoder()
    model = small_model(encoder, **settings)
    write_model(encoder, model.hparams, model.params, str(tmp_path), "huggingface")
    metadata, arrays = read_safetensors(tmp_path / "model.safetensors")
    expected = expected_tensors(model.params)
    assert metadata == {"format": "pt"} and list(arrays) == sorted(expected)
    for name, array in arrays.items():
        assert array.shape == expected[name].shape and array.tobytes() == expected[name].tobytes(), name
    config = read_json(tmp_path / "config.json")
    assert config["tie_word_embeddings"] is settings.get("is_tied", True)
    assert config["n_inner"] == settings.get("n_inner")
    assert config["activation_function"] == settings.get("activation", "gelu_new")
    assert config["layer_norm_epsilon"] == settings.get("layer_norm_epsilon", 1e-5)
    assert config["vocab_size"] == encoder.n_vocab and config["eos_token_id"] == encoder.eot_id


EVIL = [
    "ROMEO: the the\n\n\n  the",
    " " * 9 + "x\t\r\n ",
    "I'm you're THEY'LL don't ''s 12345 ²½",
    "日本語 🏳️‍🌈 e\u0301 \u3000\xa0\u2028\x85\x00\x7f\xad\ufeff",
    "<|endoftext|>the<|endoftext|> the<|endoftext",
    "<|user|>  the né àok ok? aok\n<|user|>\n",
    "",
]


ENCODERS = [small_encoder(), small_encoder(()), grown_encoder()]


@pytest.mark.parametrize("encoder", ENCODERS, ids=["plain", "no end", "grown"])
def test_the_tokenizers_library_gives_the_same_ids(encoder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    model = small_model(encoder)
    write_model(encoder, model.hparams, model.params, str(tmp_path), "huggingface")
    whole = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert whole.get_vocab_size() == encoder.n_vocab
    for text in EVIL:
        ids = whole.encode(text).ids
        assert ids == encoder.encode(text, allow_special=True)
        assert whole.decode(ids, skip_special_tokens=False) == encoder.decode(ids)


@pytest.mark.parametrize("settings", [{}, UNLIKE | {"is_tied": False}])
@pytest.mark.parametrize(
    ("encoder", "is_old"),
    [*((encoder, False) for encoder in ENCODERS), (ENCODERS[0], True), (ENCODERS[2], True)],
    ids=["plain", "no end", "grown", "plain, without tokenizer.json", "grown, without tokenizer.json"],
)
def test_it_is_the_model_when_it_is_read_again(encoder, is_old, settings, tmp_path):
    model = small_model(encoder, **settings)
    write_model(encoder, model.hparams, model.params, str(tmp_path / "out"), "huggingface")
    if is_old:
        os.remove(tmp_path / "out" / "tokenizer.json")
    read, hparams, params = utils.load_encoder_hparams_and_params("out", str(tmp_path))
    assert hparams == {"activation": "gelu_new", "layer_norm_epsilon": 1e-5} | model.hparams
    for name in ("tokens", "merge_ranks", "added", "eot_ids", "start_id", "adds_space"):
        assert getattr(read, name) == getattr(encoder, name), name
    assert all(read.encode(text, allow_special=True) == encoder.encode(text, allow_special=True) for text in EVIL)
    arrays, expected = dict(variables_of(params)), dict(variables_of(model.params))
    assert arrays.keys() == expected.keys()
    assert all(arrays[name].tobytes() == expected[name].tobytes() for name in arrays)


@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_embedded_models_go_there_and_back_byte_for_byte(name, tmp_path):
    utils.convert(name, str(tmp_path / "there"), format="huggingface", models_dir=MODELS)
    utils.convert("there", str(tmp_path / "back"), format="openai", models_dir=str(tmp_path))
    files = utils.MODEL_FILES
    same, _, _ = filecmp.cmpfiles(os.path.join(MODELS, name), tmp_path / "back", files, shallow=False)
    assert sorted(same) == sorted(files)


def test_a_token_that_is_found_in_another_way_is_named(tmp_path):
    small = small_encoder()
    model = small_model(small)
    encoder = Encoder(small.token_ids, small.merge_ranks, patterns={END_OF_TEXT: "<.*>"})
    with pytest.raises(ValueError, match="cannot express how '<.endoftext.>' is found, by '<.\\*>'"):
        write_model(encoder, model.hparams, model.params, str(tmp_path / "out"), "huggingface")
    assert os.listdir(tmp_path) == []


def test_the_safetensors_library_reads_it(tmp_path):
    numpy_files = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    utils.convert("nano", str(tmp_path / "out"), format="huggingface", models_dir=MODELS)
    _, _, params = utils.load_encoder_hparams_and_params("nano", MODELS)
    tensors, expected = numpy_files.load_file(tmp_path / "out" / "model.safetensors"), expected_tensors(params)
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].tobytes() == expected[name].tobytes() for name in tensors)


@pytest.mark.xdist_group("matplotlib")  # where the other tests that import transformers are
def test_transformers_reads_it_and_saves_the_same(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    every = ({}, UNLIKE | {"is_tied": False}, {"activation": "gelu", "order": "F"})
    for number, (settings, encoder) in enumerate(zip(every, ENCODERS, strict=True)):
        model, out = small_model(encoder, **settings), tmp_path / str(number)
        write_model(encoder, model.hparams, model.params, str(out), "huggingface")
        theirs, info = transformers.GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())
        ids = np.random.default_rng(0).integers(encoder.n_vocab, size=24).tolist()
        with torch.no_grad():
            logits = theirs.eval()(torch.tensor([ids])).logits.numpy()
        ours = model.forward([ids], model.new_cache(), n_last=24)
        np.testing.assert_allclose(ours, logits, rtol=0, atol=2e-4)
        theirs.save_pretrained(out / "saved")
        assert filecmp.cmp(out / "saved" / "model.safetensors", out / "model.safetensors", shallow=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        assert len(tokenizer) == encoder.n_vocab and tokenizer.eos_token_id == encoder.eot_id
        for text in EVIL:
            ids = encoder.encode(text, allow_special=True)
            assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == encoder.decode(ids)
