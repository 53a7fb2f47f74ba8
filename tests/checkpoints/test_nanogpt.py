"""nanoGPT's ckpt.pt: the logits and tokens that PyTorch gives, and weights that stay in the file."""

import json
import mmap
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
from helpers import ROOT, run, shared_out, write_bytes
from torchfiles import HPARAMS, archive, checkpoint, model_args, nanogpt_weights, records_of

from checkpoints import nanogpt
from checkpoints.nanogpt import nanogpt_name, read_nanogpt, verify_nanogpt
from checkpoints.weights import expected_shapes, nest_params
from gpt2 import Model, generate

GOLDENS = os.path.join(ROOT, "tests", "goldens")
with open(os.path.join(GOLDENS, "nanogpt.json"), encoding="utf-8") as f:
    CASES = json.load(f)["cases"]
ARGS = model_args(HPARAMS)


@pytest.fixture
def read(tmp_path):
    """Reads a file, given as bytes: (hparams, variables)."""

    def read_file(content, **settings):
        write_bytes(tmp_path / "ckpt.pt", content)
        return read_nanogpt(str(tmp_path / "ckpt.pt"), **settings)

    return read_file


def same(variables, weights):
    """Whether the variables are these weights of nanoGPT, biases that it has not 0."""
    for name, array in variables.items():
        expected = weights.get(nanogpt_name(name.removeprefix("model/")), np.float32(0))
        if not (array == (expected.T if array.ndim == 2 and name.endswith("/w") else expected)).all():
            return False
    return True


@pytest.mark.parametrize("golden", CASES, ids=lambda golden: golden["name"])
def test_logits_and_tokens_equal_pytorchs(read, golden):
    hparams, bias = golden["hparams"], golden["bias"]
    weights = nanogpt_weights(hparams, bias)
    is_tied = golden.get("is_tied", True)
    if not is_tied:
        weights["lm_head.weight"] = np.ascontiguousarray(weights["transformer.wte.weight"][::-1])
    content = archive(records_of(weights, model_args(hparams, bias), is_tied, golden.get("prefix", "")))
    found, variables = read(content, gelu=golden["gelu"])
    assert found == hparams | {"activation": {"erf": "gelu", "tanh": "gelu_new"}[golden["gelu"]]}
    assert ("model/lm_head" in variables) is not is_tied
    model = Model(found, nest_params(variables, found, "x"))
    cache, prompt = model.new_cache(), golden["prompt"]
    logits = model.forward([prompt], cache, n_last=len(prompt))[0]
    np.testing.assert_allclose(logits[[0, -1]], golden["logits"], rtol=0, atol=2e-5)
    assert list(generate(model, prompt, len(golden["ids"]))) == golden["ids"]
    model = shared_out(model)  # as a large one, whose weights are packed
    assert list(generate(model, prompt, len(golden["ids"]))) == golden["ids"]
    logits = model.forward([prompt], model.new_cache(), n_last=len(prompt))[0]
    np.testing.assert_allclose(logits[[0, -1]], golden["logits"], rtol=0, atol=2e-5)


def test_the_two_gelus_differ_in_what_they_are_for(read):
    by_name = {golden["name"]: golden for golden in CASES}
    difference = np.abs(np.subtract(by_name["biases"]["logits"], by_name["tanh"]["logits"])).max()
    assert difference > 5e-4  # so the goldens tell which was computed
    assert read(checkpoint(HPARAMS))[0]["activation"] == "gelu"
    with pytest.raises(ValueError, match="gelu is 'relu', expected erf or tanh"):
        read(checkpoint(HPARAMS), gelu="relu")


def test_a_file_that_torch_has_written(tmp_path):
    """With the optimizer's state, and a best_val_loss that is a tensor."""
    path = os.path.join(GOLDENS, "ckpt.pt")
    hparams, variables = read_nanogpt(path)
    verify_nanogpt(path)
    assert hparams == HPARAMS | {"activation": "gelu"}
    names = [name for name, _ in expected_shapes(HPARAMS) if not name.endswith("/b")]
    order = ["wte", "wpe", *(f"h0/{part}" for part in ("ln_1/g", "attn/c_attn/w", "attn/c_proj/w", "ln_2/g"))]
    order += ["h0/mlp/c_fc/w", "h0/mlp/c_proj/w", "ln_f/g"]
    assert sorted(order) == sorted(names)
    with zipfile.ZipFile(path) as whole:
        for i, name in enumerate(order):
            array = variables[f"model/{name}"]
            stored = array.T if name.endswith("/w") else array
            assert stored.tobytes() == whole.read(f"ckpt/data/{i}"), name
    assert all(not array.any() for name, array in variables.items() if name.endswith("/b"))
    nest_params(variables, hparams, path)


def test_a_model_that_torch_saves_now(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(os.path.join(ROOT, "tools"))
    import make_nanogpt_golden

    path = str(tmp_path / "x.pt")
    content = make_nanogpt_golden.save_trained(path)
    _, variables = read_nanogpt(path)
    assert same(variables, {name: array.numpy() for name, array in content["model"].items()})
    content["model"] = {name: array.bfloat16() for name, array in content["model"].items()}
    torch.save(content, path)  # each tensor has a storage of its own now, with equal numbers
    _, variables = read_nanogpt(path)
    assert same(variables, {name: array.float().numpy() for name, array in content["model"].items()})
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch.save before PyTorch 1.6"):
        read_nanogpt(path)
    torch.save(content["model"], path)
    with pytest.raises(ValueError, match="it has no 'model'"):
        read_nanogpt(path)


def test_a_models_numbers_stay_in_the_file(read):
    """No memory but the map's: 13 MB of weights are opened in 0.5 MB."""
    hparams = {"n_vocab": 500, "n_ctx": 64, "n_embd": 256, "n_head": 4, "n_layer": 4}
    content = checkpoint(hparams)
    read(content)
    tracemalloc.start()
    _, variables = read(content)
    assert tracemalloc.get_traced_memory()[1] < 500_000 < 12e6 < sum(a.nbytes for a in variables.values())
    tracemalloc.stop()
    for name, array in variables.items():
        assert not array.flags.writeable and array.flags.aligned, name
        while isinstance(array, np.ndarray):
            array = array.base
        assert isinstance(array.obj if isinstance(array, memoryview) else array, mmap.mmap), name


@pytest.mark.parametrize("dtype", ["float16", "uint16"])
def test_half_precision_is_converted(read, dtype):
    weights = nanogpt_weights(HPARAMS)
    if dtype == "float16":
        weights = {name: array.astype(np.float16) for name, array in weights.items()}
        expected = {name: array.astype(np.float32) for name, array in weights.items()}
    else:  # bfloat16: the upper half of a float32
        weights = {name: (array.view(np.uint32) >> 16).astype(np.uint16) for name, array in weights.items()}
        expected = {name: (array.astype(np.uint32) << 16).view(np.float32) for name, array in weights.items()}
    hparams, variables = read(archive(records_of(weights, ARGS)))
    assert {array.dtype for array in variables.values()} == {np.dtype(np.float32)} and same(variables, expected)
    nest_params(variables, hparams, "x")


def test_prefixes_masks_and_other_things_of_a_checkpoint(read):
    weights = nanogpt_weights(HPARAMS)
    masked = weights | {"transformer.h.0.attn.bias": np.ones((1, 1, 2, 2), np.float32)}
    others = {"optimizer": {"state": {0: {}}}, "iter_num": 5, "best_val_loss": 1.5, "config": {"compile": True}}
    old = {name: value for name, value in ARGS.items() if name not in ("bias", "dropout")}
    for content in (
        records_of(masked, ARGS),
        records_of(weights, ARGS, prefix="_orig_mod."),
        records_of(masked, ARGS, prefix="_orig_mod.", **others),
        records_of(weights, old),
        records_of(weights, ARGS, is_tied=False),  # the output matrix is not named
    ):
        hparams, variables = read(archive(content))
        assert same(variables, weights) and "model/lm_head" not in variables
        assert hparams == HPARAMS | {"activation": "gelu"}


def test_an_output_matrix_is_compared_only_where_it_may_differ(read, monkeypatch):
    weights = nanogpt_weights(HPARAMS)
    wte = weights["transformer.wte.weight"]
    _, variables = read(archive(records_of(weights | {"lm_head.weight": wte.copy()}, ARGS, is_tied=False)))
    assert "model/lm_head" not in variables
    _, variables = read(archive(records_of(weights | {"lm_head.weight": wte + 1}, ARGS, is_tied=False)))
    assert (variables["model/lm_head"] == wte + 1).all()
    monkeypatch.setattr(nanogpt.np, "array_equal", None)
    read(checkpoint(HPARAMS))


def test_a_padded_vocabulary_stays_as_it_is(read):
    hparams, variables = read(checkpoint(HPARAMS | {"n_vocab": 64}))
    assert hparams["n_vocab"] == 64 and variables["model/wte"].shape == (64, 2)


def test_reading_needs_no_torch():
    code = f"""
import sys
from checkpoints.nanogpt import read_nanogpt
read_nanogpt({os.path.join(GOLDENS, "ckpt.pt")!r})
print([name for name in ("torch", "zipfile") if name in sys.modules])
"""
    assert run("-c", code).stdout.strip() == "[]"
