"""Logits and greedy texts that transformers gives for the models of tests/relatives.py.

    python tools/make_huggingface_goldens.py          compare with tests/goldens/huggingface.json
    python tools/make_huggingface_goldens.py --write  write that file

Needs transformers and torch, which the tests do not. Each model is also saved by transformers itself, in one file and
in shards, and what this program then reads is compared with what it read before.
"""

import json
import os
import sys
import tempfile

import fire
import numpy as np
import torch
import transformers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))  # run as a script from anywhere
sys.path.insert(1, os.path.join(sys.path[0], "tests"))
import relatives

from gpt2 import load_model

PROMPT, N_TOKENS = [32, 7, 1999, 512, 512, 40, 3, 1], 50
N_SHOWN = 24  # logits of each row that are kept
PATH = os.path.join(os.path.dirname(relatives.__file__), "goldens", "huggingface.json")


def golden_of(model) -> dict:
    """What the tests compare: some logits of each row, and the greedy ids after the prompt."""
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT])).logits[0, :, :N_SHOWN].numpy()
        ids = list(PROMPT)
        for _ in range(N_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return {"logits": np.round(logits.astype(float), 5).tolist(), "ids": ids[len(PROMPT) :]}


def check_saved(model, folder: str) -> None:
    """What this program reads of a model that transformers saved is what it read of the test's file."""
    _, expected = load_model(folder)
    logits = expected.forward([PROMPT], expected.new_cache(), n_last=len(PROMPT))
    for size in ("5GB", "100KB"):  # one file, and several
        saved = f"{folder} {size}"
        model.save_pretrained(saved, max_shard_size=size)
        relatives.write_tokenizer(saved)
        _, found = load_model(saved)
        np.testing.assert_array_equal(found.forward([PROMPT], found.new_cache(), n_last=len(PROMPT)), logits)


def make() -> dict:
    goldens = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, case in relatives.CASES.items():
            path = os.path.join(folder, name)
            relatives.write_folder(path, case)
            model = transformers.GPT2LMHeadModel.from_pretrained(path, dtype=torch.float32).eval()
            goldens[name] = golden_of(model)
            check_saved(model, path)
            print(name, file=sys.stderr)
    return goldens


def main(write: bool = False):
    """Compare what transformers gives with tests/goldens/huggingface.json, or write that file."""
    goldens = make()
    if write:
        with open(PATH, "w") as f:
            f.write("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in goldens.items()) + "\n}\n")
        return
    with open(PATH) as f:
        expected = json.load(f)
    assert goldens.keys() == expected.keys()
    for name, golden in goldens.items():
        np.testing.assert_allclose(golden["logits"], expected[name]["logits"], rtol=0, atol=1e-4, err_msg=name)
        assert golden["ids"] == expected[name]["ids"], name
    print(f"{len(goldens)} models as before", file=sys.stderr)


if __name__ == "__main__":
    fire.Fire(main)
