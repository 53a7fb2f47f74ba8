"""Hugging Face's folders: every kind of GPT-2 against what transformers says, and what is refused."""

import json
import os

import numpy as np
import pytest
import relatives
from helpers import MODELS, read_bytes, write_bytes

import gpt2
import utils
from checkpoints import huggingface

with open(os.path.join(os.path.dirname(relatives.__file__), "goldens", "huggingface.json")) as f:
    GOLDENS = json.load(f)
PROMPT = [32, 7, 1999, 512, 512, 40, 3, 1]  # of tools/make_huggingface_goldens.py


def load(folder):
    encoder, hparams, params = utils.load_encoder_hparams_and_params(str(folder))
    return encoder, gpt2.Model(hparams, params)


@pytest.mark.parametrize("name", relatives.CASES)
def test_every_kind_equals_transformers(name, tmp_path):
    relatives.write_folder(tmp_path, relatives.CASES[name])
    _, model = load(tmp_path)
    logits = model.forward([PROMPT], model.new_cache(), n_last=len(PROMPT))[0]
    expected = np.array(GOLDENS[name]["logits"])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[:, : expected.shape[1]], expected, rtol=0, atol=2e-4)
    assert list(gpt2.generate(model, PROMPT, 50)) == GOLDENS[name]["ids"]


def test_the_kinds_differ():
    texts = {str(golden["ids"]) for name, golden in GOLDENS.items()}
    assert len(texts) >= 10 and GOLDENS.keys() == relatives.CASES.keys()


def test_float32_is_used_where_it_lies(tmp_path):
    relatives.write_folder(tmp_path, {})
    _, model = load(tmp_path)
    arrays = [model.params["wte"], model.params["blocks"][1]["mlp"]["c_fc"]["w"], model.params["ln_f"]["g"]]
    assert not any(array.flags.owndata or array.flags.writeable for array in arrays)
    relatives.write_folder(tmp_path, {"pad": 1})  # at odd places: copied, so that products are as fast as elsewhere
    _, model = load(tmp_path)
    assert model.params["wte"].flags.aligned


def test_a_folder_of_models_dir_and_a_path_are_names(tmp_path, monkeypatch):
    relatives.write_folder(tmp_path / "mine", {})
    expected = utils.load_encoder_hparams_and_params("mine", str(tmp_path))[2]["wte"]
    for name in (str(tmp_path / "mine"), os.path.join(".", "mine"), os.path.join("..", tmp_path.name, "mine")):
        monkeypatch.chdir(tmp_path)
        np.testing.assert_array_equal(utils.load_encoder_hparams_and_params(name)[2]["wte"], expected)
    with pytest.raises(ValueError, match="no model 'other'.* others in .*: mine; a path and hf:OWNER/MODEL"):
        utils.load_encoder_hparams_and_params("other", str(tmp_path))


def test_ids_outside_the_vocabulary_end_no_text(tmp_path, capsys):
    relatives.write_folder(tmp_path, {"config": {"eos_token_id": 50256, "bos_token_id": 50256}})
    encoder, _ = load(tmp_path)
    assert encoder.eot_ids == () and encoder.encode_prompt("") == []
    assert "eos_token_id is 50256, the vocabulary has 2048 ids; no token ends a text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "eos, bos, ends, start", [(5, 6, (5,), 6), ([7, 9], None, (7, 9), 7), (None, None, (2047,), 2047), ([], 3, (), 3)]
)
def test_generation_config_says_what_ends_a_text(eos, bos, ends, start, tmp_path, capsys):
    relatives.write_folder(tmp_path, {})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "bos_token_id": bos}))
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"bos_token_id": 2047', f'"bos_token_id": {json.dumps(bos)}')
    )
    encoder, _ = load(tmp_path)
    assert encoder.eot_ids == ends and encoder.encode_prompt("") == [start]
    assert not capsys.readouterr().err


def test_each_of_several_ids_ends_a_text(tmp_path):
    relatives.write_folder(tmp_path, {"config": {"eos_token_id": [GOLDENS["gpt2"]["ids"][4], 2047], "n_ctx": 64}})
    encoder, _ = load(tmp_path)
    from decoding.stopping import has_ended, text_until_end

    ids = GOLDENS["gpt2"]["ids"]
    n = ids.index(ids[4])
    assert "".join(text_until_end(encoder, ids, (), False)) == encoder.decode(ids[:n])
    assert has_ended(encoder, [ids[4]], (), False) and not has_ended(encoder, [ids[4]], (), True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt_neo"}, "the model is a 'gpt_neo'.* computes gpt2 only"),
        ({"architectures": ["GPTNeoForCausalLM"]}, "GPTNeo.* computes gpt2 only"),
        ({"architectures": 7}, "computes gpt2 only"),
        ({"add_cross_attention": True}, "add_cross_attention is set"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"activation_function": "mish"}, "activation_function is 'mish', expected one of"),
        ({"activation_function": ["gelu"]}, "activation_function is .'gelu'., expected one of"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon is -1, expected a number from 0 to 1"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
        ({"n_head": 5}, "n_embd 16 is no multiple of n_head 5"),
        ({"n_layer": 0}, "n_layer is 0, expected a whole number above 0"),
        ({"n_layer": 3}, "model/h2/ln_1/g is nothing"),
        ({"n_layer": 1}, "more layers than the 1"),
        ({"n_embd": 8, "n_head": 2}, r"model/wte is float32\[2048, 16\], expected float32\[2048, 8\]"),
        ({"n_inner": 65}, r"model/h0/mlp/c_fc/w is float32\[16, 64\], expected float32\[16, 65\]"),
        ({"vocab_size": 2047}, "ids up to 2047, its hyper-parameters say 2047 tokens"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is false, and lm_head.weight is missing"),
    ],
)
def test_settings_that_are_not_computed_are_refused_by_name(change, message, tmp_path):
    relatives.write_folder(tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message) as e:
        load(tmp_path)
    assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, message",
    [
        ("transformer.h.0.crossattention.c_attn.weight", "is no tensor of GPT-2"),
        ("transformer.h.0.attn.c_attn.qweight", "is no tensor of GPT-2"),
        ("h.0.ln_1.weight", "is there twice"),
        ("transformer.lm_head.weight", "is there twice"),
    ],
)
def test_tensors_that_are_not_computed_are_refused_by_name(name, message, tmp_path):
    case = {"head": "another", "config": {"tie_word_embeddings": False}}
    relatives.write_folder(tmp_path, case)
    tensors = relatives.tensors_of(case)
    tensors[name] = tensors["transformer.h.0.ln_1.weight"]
    write_bytes(tmp_path / "model.safetensors", relatives.safetensors_bytes(tensors))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_heads_of_other_tasks_are_left_out_aloud(tmp_path, capsys):
    relatives.write_folder(tmp_path, {})
    tensors = relatives.tensors_of({}) | {"v_head.summary.weight": ("BOOL", np.zeros(3))}
    write_bytes(tmp_path / "model.safetensors", relatives.safetensors_bytes(tensors))
    load(tmp_path)
    assert "left out, not of the language model: ['v_head.summary.weight']" in capsys.readouterr().err


def test_weights_of_other_types_are_refused(tmp_path):
    relatives.write_folder(tmp_path, {})
    tensors = relatives.tensors_of({})
    tensors["transformer.wte.weight"] = "U8", tensors["transformer.wte.weight"][1]
    write_bytes(tmp_path / "model.safetensors", relatives.safetensors_bytes(tensors))
    with pytest.raises(ValueError, match=r"transformer.wte.weight has dtype U8, expected F32.* quantised"):
        load(tmp_path)


def test_pickled_weights_alone_are_refused(tmp_path):
    relatives.write_folder(tmp_path, {})
    os.rename(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no model.safetensors, and only pytorch_model.bin, .*save_pretrained"):
        load(tmp_path)
    os.remove(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no other weights either"):
        load(tmp_path)


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "../model.safetensors"}, "expected .safetensors files of this folder"),
        ({"a": "model.bin"}, "expected .safetensors files of this folder"),
        ({"a": 3}, "expected names of tensors and files"),
        ([], "expected names of tensors and files"),
        ({"no such": "model-00001-of-00001.safetensors"}, "'no such' is not in model-00001-of-00001.safetensors"),
    ],
)
def test_an_index_of_shards_names_files_of_its_folder(weight_map, message, tmp_path):
    relatives.write_folder(tmp_path, {"n_shards": 1})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    relatives.write_folder(tmp_path, {"n_shards": 2})
    os.remove(tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b'{"n_layer": ' + b"9" * 5000 + b"}"])
def test_a_damaged_config_is_one_line(content, tmp_path):
    relatives.write_folder(tmp_path, {})
    write_bytes(tmp_path / "config.json", content)
    with pytest.raises(ValueError, match="config.json") as e:
        load(tmp_path)
    assert "\n" not in str(e.value)


def test_a_pair_may_mix_sources(tmp_path):
    """The same vocabulary in OpenAI's files and in Hugging Face's."""
    relatives.write_folder(tmp_path, {})
    theirs, _ = load(tmp_path)
    ours, _ = gpt2.load_model("nano", MODELS)
    assert theirs.tokens == ours.tokens and theirs.merge_ranks == ours.merge_ranks
    text = "JULIET: O Romeo<|endoftext|>, Romeo!\n\n  \u00e9\U0001f600"
    assert theirs.encode(text, allow_special=True) == ours.encode(text, allow_special=True)


def test_config_names_of_other_models_are_taken(tmp_path):
    relatives.write_folder(tmp_path, {})
    config = json.loads((tmp_path / "config.json").read_text())
    config["hidden_size"], config["num_hidden_layers"] = config.pop("n_embd"), config.pop("n_layer")
    (tmp_path / "config.json").write_text(json.dumps(config))
    hparams, _ = huggingface.read_config(str(tmp_path / "config.json"))
    assert (hparams["n_embd"], hparams["n_layer"], hparams["n_head"]) == (16, 2, 4)
    assert read_bytes(tmp_path / "config.json")
