"""speculative.py from the command line: what it verifies, reports and colours."""

import json
import os
import pty
import select
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from drafting import PAIR
from helpers import MODELS, ROOT, run_here

from console import rounds
from console.rounds import Recorder, compare_with_plain
from decoding.sampling import greedy, make_sampler
from gpt2 import generate


@pytest.mark.parametrize("drafter", ["model", "lookup", "both"])
@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.9", "--top_k", "50", "--top_p", "0.95", "--seed", "4"]])
def test_verify_reports_identical_text(tiny, drafter, sampling):
    encoder, target = tiny
    done = run_here(*PAIR, "ROMEO:", "--drafter", drafter, "--verify", *sampling)
    assert done.returncode == 0 and "verified: 60 tokens identical" in done.stderr and "margin" in done.stderr
    sample = make_sampler(0.9, 50, 0.95, seed=4) if sampling else greedy
    assert done.stdout == encoder.decode(generate(target, encoder.encode("ROMEO:"), 60, sample))


def test_min_p_and_the_repetition_penalty_are_flags(tiny):
    encoder, target = tiny
    done = run_here(
        *PAIR, "ROMEO:", "--verify", "--temperature=1", "--min_p=0.1", "--repetition_penalty=1.3", "--seed=2"
    )
    assert done.returncode == 0 and "verified: 60 tokens identical" in done.stderr
    sample = make_sampler(1, min_p=0.1, repetition_penalty=1.3, seed=2)
    assert done.stdout == encoder.decode(generate(target, encoder.encode("ROMEO:"), 60, sample))


def test_verify_exits_with_1_at_a_difference(monkeypatch, tiny, capsys):
    encoder, target = tiny
    prompt = encoder.encode("ROMEO:")
    ids = list(generate(target, prompt, 10))
    ids[7] += 1
    with pytest.raises(SystemExit) as e:
        compare_with_plain(partial(generate, target, prompt), greedy, ids, 1.0)
    assert e.value.code == 1 and "the texts differ at token 7" in capsys.readouterr().err


def test_a_slow_reader_of_the_text_does_not_slow_it_down(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def generated():
        for i in range(5):
            now[0] += 1
            yield i

    recorder = Recorder(lambda tokens, n_max: [])
    for _ in recorder.watch([7], generated()):
        now[0] += 10
    assert recorder.seconds == 5 and recorder.ids == [7, 0, 1, 2, 3, 4]
    assert recorder.ticks == [0, 1, 2, 3, 4, 5]  # which --stats reads


def test_json_is_one_object_on_stderr():
    done = run_here(*PAIR, "ROMEO:", "--json", "--n_draft", "4")
    summary = json.loads(done.stderr)
    assert summary["tokens"] == 60 and summary["rounds"] < 60
    # A round makes its accepted guesses and one token more, but the last may end with an accepted guess.
    assert summary["accepted"] - (60 - summary["rounds"]) in (0, 1)
    assert 0 < summary["acceptance_rate"] <= 1 and summary["tokens_per_target_pass"] == round(60 / summary["rounds"], 3)


def test_stats_name_every_figure():
    done = run_here(*PAIR, "ROMEO:", "--stats")
    for name in (
        "rounds",
        "accepted_per_round",
        "acceptance_rate",
        "tokens_per_target_pass",
        "draft_seconds",
        "speedup",
    ):
        assert name in done.stderr


def test_lookup_needs_no_draft_model():
    done = run_here(*PAIR, "ROMEO:", "--drafter", "lookup", "--draft_model_size", "nowhere")
    assert done.returncode == 0


def test_a_draft_with_another_vocabulary_is_one_line(tmp_path):
    for name in ("tiny", "nano"):
        shutil.copytree(os.path.join(MODELS, name), tmp_path / name)
    path = tmp_path / "nano" / "vocab.bpe"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[1], lines[2] = lines[2], lines[1]
    path.write_text("\n".join(lines), encoding="utf-8")
    done = run_here(*PAIR, "x", "--models_dir", tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and "nano has another vocabulary" in done.stderr


def in_a_terminal(env):
    """stdout of a run whose stdout is a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *PAIR, "ROMEO:", "--show", "--n_draft", "4"],  # not adaptive: what is guessed varies then
        stdout=follower,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    os.close(follower)
    output = b""
    try:
        while select.select([leader], [], [], 60)[0] and (chunk := os.read(leader, 1 << 16)):
            output += chunk
    except OSError:  # Linux's way to say that the terminal has no writer any more
        pass
    assert process.wait(60) == 0
    os.close(leader)
    return output.decode()


def test_show_colours_only_a_terminal():
    coloured = in_a_terminal({"NO_COLOR": ""})
    assert "\033[32m" in coloured and "\033[33m" in coloured
    assert "\033[" not in in_a_terminal({"NO_COLOR": "1"})
    assert "\033[" not in run_here(*PAIR, "ROMEO:", "--show").stdout


def test_a_speedup_is_told_where_there_is_a_step_to_compare_with():
    """All of a short text may come with the pass over the prompt: it seemed hundreds of times as fast."""
    for n_tokens, is_told in ((4, False), (20, True)):
        flags = ("--draft_model_size=tiny", "--n_draft=6", f"--n_tokens_to_generate={n_tokens}", "--json")
        summary = json.loads(run_here(*PAIR, "ROMEO:", *flags).stderr)
        assert (summary["rounds"] > 1) == is_told == ("speedup_over_plain_steps" in summary)
