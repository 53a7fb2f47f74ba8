"""The house: which modules there are, what each room may import, and how long a module or a function may be."""

import ast
import glob
import os
import subprocess

import pytest
from helpers import ROOT

PROGRAMS = {"gpt2", "speculative", "encoder", "utils"}
ROOMS = {"analysis", "batch", "benchmarks", "checkpoints", "console", "decoding", "fast"}
MAY_IMPORT = {
    "gpt2": {"checkpoints", "console", "decoding", "fast", "utils"},
    "speculative": {"console", "decoding", "gpt2"},
    "encoder": {"checkpoints"},
    "utils": {"checkpoints", "console", "encoder"},
    "fast": set(),
    "decoding": {"fast"},
    "checkpoints": set(),
    "console": {"checkpoints", "decoding"},
    "analysis": {"console", "decoding", "gpt2"},
    "batch": {"console", "decoding", "fast", "gpt2"},
    "benchmarks": PROGRAMS | ROOMS,
}
FILES = sorted(
    path.replace(os.sep, "/")
    for path in glob.glob("**/*.py", root_dir=ROOT, recursive=True)
    if path.split(os.sep)[0] in ROOMS | {"tests", "tools", *(f"{name}.py" for name in PROGRAMS)}
)


def parsed(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        return ast.parse(f.read())


def imported(path):
    """The rooms and programs that a file imports, anywhere in it."""
    for node in ast.walk(parsed(path)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
        yield from {name.split(".")[0] for name in names} & (PROGRAMS | ROOMS)


def room(path):
    return path.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", [path for path in FILES if room(path) in MAY_IMPORT])
def test_a_room_imports_what_it_may(path):
    assert set(imported(path)) <= MAY_IMPORT[room(path)] | {room(path)}


def test_no_room_imports_one_that_imports_it():
    order = []  # those that import nothing first
    while len(order) < len(MAY_IMPORT):
        ready = [name for name in MAY_IMPORT if name not in order and MAY_IMPORT[name] - {name} <= set(order)]
        assert ready, f"a circle among {set(MAY_IMPORT) - set(order)}"
        order += ready


def test_the_root_shows_the_programs_and_nothing_else():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    entries = {path.split("/")[0] for path in done.stdout.splitlines()}
    shown = {f"{name}.py" for name in PROGRAMS} | ROOMS | {"tests", "tools", "models", "docs"}
    texts = {"README.md", "LICENSE", "pyproject.toml", "requirements.txt", "requirements-generate.txt"}
    assert {entry for entry in entries if not entry.startswith(".")} == shown | texts


@pytest.mark.parametrize("path", FILES)
def test_modules_and_functions_are_short(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        assert len(f.readlines()) <= 350
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(parsed(path))
        if isinstance(node, functions) and node.end_lineno - node.lineno >= 50
    }
    assert not long
