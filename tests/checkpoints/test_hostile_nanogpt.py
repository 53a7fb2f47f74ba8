"""Files that are not nanoGPT's, or mean harm: one ValueError that names the file, and nothing runs."""

import os
import pickle
import tracemalloc

import numpy as np
import pytest
from helpers import write_bytes
from torchfiles import HPARAMS, archive, called, model_args, name_of, nanogpt_weights, pickled, records_of, tensor

from checkpoints.nanogpt import SIZES, read_meta, read_nanogpt, verify_nanogpt
from checkpoints.weights import nest_params

ARGS = model_args(HPARAMS)


@pytest.fixture
def fault_of(tmp_path):
    path = str(tmp_path / "ckpt.pt")

    def fault(content, match):
        write_bytes(path, content)
        with pytest.raises(ValueError, match=match) as e:
            read_nanogpt(path)
        message = str(e.value)
        assert message.startswith(path) and len(message) < 700 and "\n" not in message
        assert message.endswith("with 'model' and 'model_args' alone")

    return fault


# ----------------------------------------------------------------------------------------------------------------------
# What is no model of nanoGPT
# ----------------------------------------------------------------------------------------------------------------------

FLAT = nanogpt_weights(HPARAMS)
FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        *(({name: n}, f"{name} in model_args is") for name in SIZES.values() for n in (0, -1, 1 << 31)),
        ({"n_layer": None}, "n_layer in model_args is NoneType"),
        ({"n_layer": True}, "n_layer in model_args is bool"),
        ({"n_embd": 2.0}, "n_embd in model_args is float"),
        ({"block_size": "2"}, "block_size in model_args is str"),
        ({"n_layer": 1 << 2000}, r"n_layer in model_args is \d+\.\.\.\d+, expected"),
        ({"n_head": 3}, "n_embd 2 in model_args is no multiple of n_head 3"),
        ({"bias": 1}, "bias in model_args is of type int"),
        ({"use_rmsnorm": False}, "model_args has 'use_rmsnorm', which GPT-2 does not know"),
        ({5: 5}, "model_args has 5, which"),
        ({"n_layer": 2}, r"the model lacks 'transformer.h.1.ln_1.weight', expected its shape to be \[2\]"),
        ({"n_layer": (1 << 31) - 1}, r"the model lacks 'transformer.h.1.ln_1.weight'"),
        ({"vocab_size": 4}, r"'transformer.wte.weight' has shape \[3, 2\], expected \[4, 2\] as model_args says"),
        ({"block_size": 1}, r"'transformer.wpe.weight' has shape \[2, 2\], expected \[1, 2\]"),
        ({"n_embd": 4}, r"'transformer.wte.weight' has shape \[3, 2\]"),
        ({"bias": False}, "the model has 'transformer.h.0.ln_1.bias', which a GPT-2 of these model_args has not"),
    ],
    ids=str,
)
def test_model_args_that_are_not_the_models(fault_of, args, message):
    fault_of(archive(records_of(FLAT, ARGS | args)), message)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({FC: FLAT[FC].T.copy()}, r"c_fc.weight' has shape \[2, 8\], expected \[8, 2\]"),
        ({FC: FLAT[FC].view(np.int64)}, r"c_fc.weight' has shape \[8, 1\]"),
        ({FC: np.zeros((8, 2), np.int64)}, "'transformer.h.0.mlp.c_fc.weight': numbers of torch.LongStorage"),
        ({"transformer.h.0.mlp.gate.weight": FLAT[FC]}, "the model has 'transformer.h.0.mlp.gate.weight', which a"),
        ({"transformer.h.1.ln_1.weight": FLAT[FC]}, "the model has 'transformer.h.1.ln_1.weight', which a"),
        ({"lm_head.bias": FLAT[FC]}, "the model has 'lm_head.bias', which a"),
        ({"_orig_mod." + FC: FLAT[FC]}, "the model has weights twice"),
        ({"lm_head.weight": FLAT[FC]}, r"'lm_head.weight' has shape \[8, 2\], expected \[3, 2\]"),
        ({"x\n\x1b[2J" + "y" * 500: FLAT[FC]}, r"the model has 'x\\n\\x1b\[2Jyyy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_are_no_gpt2(fault_of, weights, message):
    fault_of(archive(records_of(FLAT | weights, ARGS, is_tied=False)), message)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_layers_of_the_same_bytes_do_not_grow_beyond_the_file(fault_of, dtype):
    """40 layers of one layer's bytes: as float32 they would be 40 times the file, or 80."""
    hparams = HPARAMS | {"n_embd": 64}
    weights = {name: array.astype(dtype) for name, array in nanogpt_weights(hparams).items()}
    for i in range(1, 40):
        weights |= {name.replace("h.0", f"h.{i}"): array for name, array in weights.items() if "h.0." in name}
    args = model_args(hparams | {"n_layer": 40})
    tracemalloc.start()
    fault_of(archive(records_of(weights, args)), "'transformer.h.1.*its tensors share their numbers")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


@pytest.mark.parametrize("name", FLAT)
def test_a_weight_that_is_missing(fault_of, name):
    weights = {other: array for other, array in FLAT.items() if other != name}
    fault_of(archive(records_of(weights, ARGS, is_tied=False)), f"the model lacks '{name}', expected its shape")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_args": ARGS}, "it has no 'model', expected a dict of 'model', the weights, and"),
        ({"model": {}}, "it has no 'model_args'"),
        ({"model": {}, "model_args": ARGS}, "the model lacks 'transformer.wte.weight'"),
        ({"model": [], "model_args": ARGS}, "it has no 'model'"),
        ({"model": {"transformer.wte.weight": 5}, "model_args": ARGS}, "wte.weight' has a int, expected"),
        ({"model": {5: 5}, "model_args": ARGS}, "the model lacks"),
        ({"transformer.wte.weight": tensor("FloatStorage", "0", 6, (3, 2), (2, 1))}, "it has no 'model'"),
        ([], "it has no 'model'"),
        (None, "it has no 'model'"),
        (name_of("torch", "FloatStorage"), "it has no 'model'"),
        (called(name_of("posix", "system"), "touch made"), "would call 'posix.system', and nothing from a file is"),
        ({"model": called(name_of("builtins", "eval"), "1")}, "would call 'builtins.eval'"),
        ({"model": called(name_of("__main__", "GPT"))}, "would call '__main__.GPT'"),
        ({"config": called(name_of("numpy.core.multiarray", "scalar"))}, "would call 'numpy.core.multiarray.scalar'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_pickles_that_are_no_checkpoint(fault_of, content, message):
    fault_of(archive({"data.pkl": pickled(content), "data/0": bytes(24)}), message)


def test_every_byte_flipped(tmp_path):
    """The checksum of data.pkl is compared when it is read; those of the weights are when they are verified."""
    content = archive(records_of(nanogpt_weights(HPARAMS, bias=False), model_args(HPARAMS, False)), alignment=1)
    path = str(tmp_path / "ckpt.pt")
    write_bytes(path, content)
    hparams, variables = read_nanogpt(path)
    whole = {name: array.tobytes() for name, array in variables.items()}
    n_read = n_changed = 0
    with open(path, "r+b") as f:
        for at in range(len(content)):
            os.pwrite(f.fileno(), bytes([content[at] ^ 0xFF]), at)
            try:
                found, variables = read_nanogpt(path)
                assert found == hparams and variables.keys() == whole.keys()
                if {name: array.tobytes() for name, array in variables.items()} != whole:
                    n_changed += 1
                    with pytest.raises(ValueError, match=r"ckpt.pt is .*: 'data/\d' has checksum"):
                        verify_nanogpt(path)
                n_read += 1
            except ValueError as e:
                assert str(e).startswith(path)
            os.pwrite(f.fileno(), content[at : at + 1], at)
    assert n_changed == sum(len(array) for name, array in whole.items() if not name.endswith("/b"))
    assert n_changed < n_read < len(content) * 0.7  # the rest are dates, versions and checksums after the data


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_every_byte_of_the_pickle_flipped_without_a_checksum(tmp_path, flip):
    records = records_of(nanogpt_weights(HPARAMS, bias=False), model_args(HPARAMS, False))
    original, path = records["data.pkl"], str(tmp_path / "ckpt.pt")
    content = archive(records, alignment=1, **{"data.pkl": {"crc32": 0}})  # as torch.save writes on request
    start = content.index(original)
    write_bytes(path, content)
    n_refused = 0
    with open(path, "r+b") as f:
        for at, byte in enumerate(original, start):
            os.pwrite(f.fileno(), bytes([byte ^ flip]), at)
            try:
                hparams, variables = read_nanogpt(path)
                nest_params(variables, hparams, path)
                assert sum(array.nbytes for array in variables.values()) < 400
            except ValueError as e:
                assert str(e).startswith(path)
                n_refused += 1
            os.pwrite(f.fileno(), bytes([byte]), at)
    assert n_refused > len(original) / 2


# ----------------------------------------------------------------------------------------------------------------------
# meta.pkl
# ----------------------------------------------------------------------------------------------------------------------

CHARACTERS = "\n !'abcé日🙂"
META = {
    "vocab_size": len(CHARACTERS),
    "itos": dict(enumerate(CHARACTERS)),
    "stoi": {c: i for i, c in enumerate(CHARACTERS)},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_vocabulary_of_characters(tmp_path, protocol):
    write_bytes(tmp_path / "meta.pkl", pickle.dumps(META, protocol))
    assert read_meta(str(tmp_path / "meta.pkl")) == META["stoi"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stoi": {}}, "no 'stoi'"),
        ({"stoi": None}, "no 'stoi'"),
        ({"stoi": META["stoi"] | {"ab": 10}}, "no 'stoi'"),
        ({"stoi": META["stoi"] | {10: 10}}, "no 'stoi'"),
        ({"stoi": META["stoi"] | {"x": 11}}, "not 0 to 10, each once"),
        ({"stoi": META["stoi"] | {"x": 3}}, "not 0 to 10, each once"),
        ({"stoi": META["stoi"] | {"x": -1}}, "not 0 to 10, each once"),
        ({"stoi": META["stoi"] | {"\n": False}}, "not 0 to 9, each once"),
        ({"stoi": META["stoi"] | {"\n": "0"}}, "not 0 to 9, each once"),
        ({"stoi": META["stoi"] | {"x": 10}}, "'itos' is not 'stoi' the other way round"),
        ({"itos": META["itos"] | {3: "c"}}, "'itos' is not"),
        ({"itos": META["itos"] | {10: "c"}}, "'itos' is not"),
        ({"itos": list(CHARACTERS)}, "'itos' is not"),
        ({"vocab_size": 11}, "vocab_size is not 10"),
        ({"vocab_size": None}, "vocab_size is not 10"),
        ({"vocab_size": os.system}, "would call 'posix.system'|would call 'nt.system'"),
        ({"extra": {1, 2}}, "opcode|would call"),
    ],
    ids=str,
)
def test_vocabularies_that_are_none(tmp_path, change, message):
    path = str(tmp_path / "meta.pkl")
    for protocol in (2, 4):
        write_bytes(path, pickle.dumps(META | change, protocol))
        with pytest.raises(ValueError, match=message) as e:
            read_meta(path)
        assert str(e.value).startswith(f"{path} is damaged or not nanoGPT's: ") and "prepare.py again" in str(e.value)


@pytest.mark.parametrize("content", [b"", b"N.", pickle.dumps([META]), pickle.dumps("日"), b"{}", b"PK\3\4"])
def test_files_that_are_no_vocabulary(tmp_path, content):
    write_bytes(tmp_path / "meta.pkl", content)
    with pytest.raises(ValueError, match=r"meta.pkl is damaged or not nanoGPT's"):
        read_meta(str(tmp_path / "meta.pkl"))


def test_a_vocabulary_of_a_terabyte_is_not_read(tmp_path):
    write_bytes(tmp_path / "meta.pkl", b"")
    os.truncate(tmp_path / "meta.pkl", 1 << 40)
    with pytest.raises(ValueError, match=f"{1 << 40} bytes, expected"):
        read_meta(str(tmp_path / "meta.pkl"))


def test_a_vocabulary_cut_and_flipped_anywhere(tmp_path):
    path, content = str(tmp_path / "meta.pkl"), pickle.dumps(META, 4)
    for at in range(len(content)):
        write_bytes(path, content[:at])
        with pytest.raises(ValueError, match="meta.pkl is damaged"):
            read_meta(path)
        write_bytes(path, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            ids = read_meta(path)
            assert sorted(ids.values()) == list(range(len(ids)))
        except ValueError as e:
            assert str(e).startswith(path)
