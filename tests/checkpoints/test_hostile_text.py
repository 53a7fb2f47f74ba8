"""Hyper-parameters and vocabularies that are damaged, or mean harm: one ValueError that names the file."""

import ast
import glob
import json
import os

import pytest
from bundles import HPARAMS
from helpers import MODELS, ROOT, read_bytes, write_bytes

from checkpoints.openai import read_hparams
from encoder import read_merge_ranks, read_token_ids

NANO = os.path.join(MODELS, "nano")


NESTED = "[" * 900 + "]" * 900


@pytest.mark.parametrize("name", HPARAMS)
@pytest.mark.parametrize(
    "value", ["null", "true", '"12"', "[12]", "{}", "1.0", "NaN", "1e400", "0", "-1", str(1 << 31), "9" * 4000, NESTED]
)
def test_every_hyperparameter_of_every_wrong_kind(tmp_path, name, value):
    path = tmp_path / "hparams.json"
    path.write_text(json.dumps(HPARAMS | {name: "here"}).replace('"here"', value))
    with pytest.raises(ValueError, match=f"{name} is .*, expected a whole number above 0") as e:
        read_hparams(str(path))
    assert str(path) in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize("name", HPARAMS)
def test_every_missing_hyperparameter(tmp_path, name):
    path = tmp_path / "hparams.json"
    path.write_text(json.dumps({key: value for key, value in HPARAMS.items() if key != name}))
    with pytest.raises(ValueError, match=f"{path}: {name} is None"):
        read_hparams(str(path))


@pytest.mark.parametrize("name", ["hparams.json", "encoder.json", "vocab.bpe"])
def test_a_text_file_cut_at_every_length(tmp_path, name):
    """Every length of hparams.json, some of the larger ones; a vocab.bpe that ends with a line is a smaller one."""
    token_ids = read_token_ids(os.path.join(NANO, "encoder.json"))
    read = {
        "hparams.json": read_hparams,
        "encoder.json": read_token_ids,
        "vocab.bpe": lambda path: read_merge_ranks(path, token_ids),
    }[name]
    content = read_bytes(os.path.join(NANO, name))
    step = len(content) // 80
    for size in range(0, len(content) - 1, step):
        write_bytes(tmp_path / name, content[:size])
        try:
            n_read = len(read(str(tmp_path / name)))
        except ValueError as e:
            assert name in str(e)
        else:
            assert name == "vocab.bpe" and n_read <= content[:size].count(b"\n")


@pytest.mark.parametrize("merge", ["t h", "h", "t h e", "th", "q zzz", "日 本", "t\u00a0h"])
def test_a_malformed_merge_is_named(tmp_path, merge):
    path = tmp_path / "vocab.bpe"
    path.write_text(f"#version: 0.2\nt h\n{merge}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="vocab.bpe, line 3: expected two pieces"):
        read_merge_ranks(str(path), read_token_ids(os.path.join(NANO, "encoder.json")))


def test_nothing_that_reads_files_can_run_them():
    """No pickle, no eval, no np.load: a file is numbers and text, whatever it holds."""
    for name in glob.glob("**/*.py", root_dir=ROOT, recursive=True):
        if name.startswith(("tests", "tools", "benchmarks", ".")):
            continue
        for node in ast.walk(ast.parse(read_bytes(os.path.join(ROOT, name)))):
            words = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            words += [node.id] if isinstance(node, ast.Name) else []
            words += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            assert not {"pickle", "marshal", "shelve", "eval", "exec", "np.load", "yaml"} & set(words), name
