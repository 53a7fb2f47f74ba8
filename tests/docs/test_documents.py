"""What the documents show is what the program has and does."""

import os
import re
import shlex

import pytest
from helpers import ROOT, run_here


def text_of(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        return f.read()


def code_blocks(name):
    """(the file that the text before says it is from, or None; the code) of each Python block."""
    for before, code in re.findall(r"([^\n]*)\n\n```python\n(.*?)```", text_of(name), flags=re.S):
        source = re.search(r"From `([\w/]+\.py)`:$", before)
        yield source and source.group(1), code


def test_the_tour_quotes_lines_that_are_there():
    quotes = [(source, code) for source, code in code_blocks("docs/tour.md") if source]
    assert len(quotes) == 4
    for source, code in quotes:
        assert code in text_of(source), f"{source} has not: {code}"


@pytest.mark.parametrize(("name", "n_least"), [("docs/tour.md", 8), ("README.md", 1)])
def test_snippets_run(name, n_least, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    snippets = [code for source, code in code_blocks(name) if not source]
    assert len(snippets) >= n_least
    exec("".join(snippets), {})
    assert len(capsys.readouterr().out) > 20


def test_links_lead_somewhere():
    for name in (
        "README.md",
        "docs/tour.md",
        "docs/performance.md",
        "docs/scaling.md",
        "docs/reliability.md",
        "models/README.md",
    ):
        for link in re.findall(r"\]\(([^)#]+)", text_of(name)):
            if not link.startswith("http"):
                assert os.path.exists(os.path.join(ROOT, os.path.dirname(name), link)), f"{name}: {link}"


def test_commands_of_reliability_select_tests():
    commands = set(re.findall(r"`python -m pytest (.*?)`", text_of("docs/reliability.md")))
    assert len(commands) > 20
    paths = {path for command in commands for path in shlex.split(command) if path.endswith(".py")}
    assert not [path for path in paths if not os.path.exists(os.path.join(ROOT, path))]
    names = " ".join(re.findall(r"def (test_\w+)", "".join(map(text_of, paths))))
    for command in commands:
        for word in re.findall(r"\b\w+\b", " ".join(shlex.split(command.partition(" -k ")[2]))):
            assert word in names or word in ("or", "and", "not"), command


def test_console_blocks_of_the_readme_are_what_the_program_prints():
    """Those that do not print times."""
    shown = re.findall(r"```console\n\$ (python .*?)\n(.*?)```", text_of("README.md"), flags=re.S)
    compared = 0
    for command, output in shown:
        if any(word in command for word in ("--stats", "--verify", "--interactive", "held_out")):
            continue
        args = shlex.split(command.replace("$'\\n\\n'", "'\n\n'").partition(" > ")[0])[1:]
        done = run_here(*args)
        assert done.returncode == 0
        printed = done.stderr if "> /dev/null" in command else done.stdout
        assert printed.split() == output.split(), command
        compared += 1
    assert compared >= 2
