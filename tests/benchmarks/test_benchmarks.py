"""Each table comes out, with figures that hold together; how fast the machine is, is no test."""

import csv
import sys
from functools import partial

import numpy as np
import pytest
from helpers import MODELS, ROOT, random_model, run_here
from reference import reference_logits

import gpt2
from benchmarks import __main__ as program
from benchmarks.explain import PARTS, replaced
from benchmarks.measure import FOLDER, draw_bars, load_or_random, report
from benchmarks.peers import PEERS, PlainNumPy, installed_peers, plain_forward
from benchmarks.simulation import LENGTHS, N_STEPS, Simulation

pytest.importorskip("matplotlib", reason="matplotlib is not installed; the tables need it for their pictures")
pytestmark = pytest.mark.xdist_group("matplotlib")


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    """Without the pauses that keep timings apart, which are not tested."""
    monkeypatch.setattr("benchmarks.measure.SETTLE_S", 0)


def table(tmp_path, *args):
    """The rows of the table that a run in an empty folder writes."""
    environment = {"PYTHONPATH": ROOT}  # of the processes that tables start
    done = run_here("-m", "benchmarks", *args, "--models_dir", MODELS, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / FOLDER
    assert (folder / f"{args[0]}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / f"{args[0]}.md").read_text(encoding="utf-8") in done.stdout
    assert f"### {args[0]}" in done.stdout and "kernels" in done.stdout
    with open(folder / f"{args[0]}.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_decode_compares_outputs_with_the_peers(tmp_path):
    rows = table(tmp_path, "decode", "--model_size", "nano", "--n_times", "1")
    compared = [row for row in rows if row["largest_difference"]]
    assert {row["program"] for row in compared} >= {"this program", PlainNumPy.name}
    assert len(compared) % 2 == 0 and all(float(row["largest_difference"]) < 1e-4 for row in compared)


def test_rows_names_the_way_of_each(tmp_path):
    rows = table(tmp_path, "rows", "--model_size", "nano", "--draft_model_size", "nano", "--n_times", "1")
    assert [row["rows"] for row in rows] == ["1", "2", "3", "4", "5", "6", "8", "16", "32", "64", "stream, 1"]
    assert rows[3]["way"] == "x @ w" and float(rows[3]["after_draft_ratio"]) > 0  # nano is small


def test_batches_write_the_texts_of_one_by_one(tmp_path):
    rows = table(tmp_path, "batch", "--model_size", "nano", "--n_tokens", "5", "--n_times", "1")
    assert [row["prompts"] for row in rows] == ["one by one", "1", "2", "4", "8", "16", "32", "64"]
    assert all(row["identical"] == "True" and float(row["tokens_per_s"]) > 0 for row in rows[1:])


def test_runs_compares_numbers_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.runs.N_NEW", (5, 30))  # tokens; up to 200 take long
    args = ("--model_size", "nano", "--n_prompts", "9", "--n_times", "1", "--workers", "0", "--peers=false")
    rows = table(tmp_path, "runs", *args)
    assert {row["prompt_tokens"] for row in rows} == {"20 to 200", "20", "200"}
    assert [row["how"] for row in rows[:6]] == ["one after another", *(f"{n} rows" for n in (8, 16, 32, 64, 128))]
    assert all(row["identical"] == "8 of 8" and float(row["tokens_per_s"]) > 0 for row in rows)


def test_acceptance_tries_each_length_and_whole_texts(tmp_path):
    args = ("--target_size=tiny", "--draft_size=nano", "--n_tokens=30", "--n_short=12", "--n_times=1")
    rows = table(tmp_path, "acceptance", *args)
    assert [row["guesses"] for row in rows[:8]] == ["0", "1", "2", "3", "4", "5", "6", "10"]
    assert rows[8]["guesses"].startswith("adaptive") and "40" not in rows[9]["guesses"]
    assert all(row["identical"] == "True" and float(row["speedup"]) > 0 for row in rows)


def test_acceptance_is_relative_to_plain_steps_just_before(monkeypatch):
    simulation = Simulation(random_model(n_ctx=64), random_model(n_ctx=64), 40)
    drafted, starts, timed = [], [], simulation.timed

    def noted(n_tokens, drafter=None, n_before=0):
        drafted.append((drafter is not None, simulation.target.passes.weights.is_packed))
        starts.append(n_before)
        return timed(n_tokens, drafter, n_before)

    monkeypatch.setattr(simulation, "timed", noted)
    turn = simulation.turn(30, 1)
    assert all(measured.is_identical for measured in turn.values())
    assert [is_drafted for is_drafted, _ in drafted] == [False] + [False, True] * (len(turn) - 1)
    assert [is_packed for is_drafted, is_packed in drafted if is_drafted] == [True] * (len(turn) - 3) + [False] * 2
    assert starts[1:-4:2] == [15 - N_STEPS // 2] * len(LENGTHS) + [30 - N_STEPS // 2]  # halfway, of 30 and late in 40


def test_cache_has_every_point(tmp_path):
    rows = table(tmp_path, "cache", "--model_size", "nano", "--n_points", "4")
    assert [int(row["position"]) for row in rows] == [2, 172, 342, 512]
    assert float(rows[-1]["without_ms"]) > float(rows[-1]["with_ms"]) > 0


def test_components_add_up(tmp_path):
    rows = table(tmp_path, "components", "--model_size", "nano", "--n_times", "2")
    assert len(rows) == 6 and list(rows[0]) == ["position", *PARTS] and PARTS[0] == "embedding"
    assert all(float(row[part]) > 0 for row in rows for part in PARTS)  # none has gone by without being timed


def test_components_put_back_what_they_time():
    attend = gpt2.attend
    with pytest.raises(KeyError), replaced({"attend": max}):
        assert gpt2.attend is max
        raise KeyError
    assert gpt2.attend is attend


def test_ablation_gives_the_same_logits_by_every_stage(tmp_path):
    rows = table(tmp_path, "ablation", "--model_size", "nano", "--n_prompt", "8", "--n_tokens", "9")
    assert len(rows) == 7 and rows[0]["stage"] == "recompute everything, float64"
    assert all(float(row["largest_error"]) < 1e-4 for row in rows[:-1])
    assert 1e-5 < float(rows[-1]["largest_error"]) < 1e-1  # float16 values


def test_prefill_compares_outputs_with_the_peers(tmp_path):
    rows = table(tmp_path, "prefill", "--model_size", "nano", "--n_tokens", "20", "--n_times", "1")
    assert {row["program"] for row in rows} >= {"this program", PlainNumPy.name}
    assert all(float(row["largest_difference"]) < 1e-4 for row in rows)


def test_load_times_whole_processes(tmp_path):
    rows = table(tmp_path, "load", "--model_size", "nano", "--n_times", "1")
    assert [row["program"] for row in rows[:2]] == ["import numpy alone", "this program, to its first token"]
    assert all(float(row["ms"]) > 0 and float(row["peak_gb"]) > 0 for row in rows)


def test_drafters_write_the_same_text(tmp_path):
    rows = table(tmp_path, "drafters", "--model_size", "nano", "--n_tokens", "40", "--n_times", "1")
    assert len(rows) == 12 and all(row["identical"] == "True" for row in rows)


def test_endurance_takes_every_tenth_of_a_long_text(tmp_path):
    rows = table(tmp_path, "endurance", "--model_size", "nano", "--n_tokens", "2000")
    assert [int(row["up_to_token"]) for row in rows] == [*range(200, 2001, 200), *range(20, 201, 20)]
    assert [row["decoding"] for row in rows] == ["nano"] * 10 + ["with nano"] * 10
    assert all(0 < float(row["ms_least"]) <= float(row["ms"]) and float(row["ms_mean"]) > 0 for row in rows)
    sizes = [float(row["resident_mb"]) for row in rows]
    assert sizes[9] < sizes[3] + 8  # MB; by then the cache has been used to its end


def test_all_joins_the_tables(tmp_path, monkeypatch, capsys):
    def first(model_size, models_dir):
        report(
            "first", [{"model": model_size, "ms": 1}], partial(draw_bars, [{"model": "a", "ms": 1}], "model", "title")
        )

    def second(models_dir):
        report("second", [{"ms": 2}], lambda axes: None)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(program, "OF_ANY_MODEL", (first,))
    monkeypatch.setattr(program, "OF_CERTAIN_MODELS", (second,))
    program.all_tables("nano", MODELS)
    text = (tmp_path / FOLDER / "all.md").read_text(encoding="utf-8")
    assert text.startswith("### first\n\n| model | ms |\n|---|---|\n| nano | 1 |\n") and "\n### second\n" in text
    assert text.split() == capsys.readouterr().out.split()


def test_an_unknown_command_lists_the_known():
    done = run_here("-m", "benchmarks", "speed")
    assert done.returncode == 2 and "no command 'speed', expected one of decode, prefill" in done.stderr


def test_help_names_every_command():
    done = run_here("-m", "benchmarks", "--help")
    assert done.returncode == 0
    for name in program.COMMANDS:
        assert f"\n{name} " in "\n" + done.stdout
    done = run_here("-m", "benchmarks", "rows", "--help")
    assert "--model_size random:124M  --models_dir" in done.stdout


def test_random_shapes_are_named():
    with pytest.raises(ValueError, match="no shapes for 'random:9B', expected random: and one of 124M"):
        load_or_random("random:9B")


def test_the_plain_forward_is_the_reference():
    model = random_model()
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = reference_logits(model, ids)
    np.testing.assert_allclose(plain_forward(ids, model.params, 3), expected, rtol=0, atol=1e-4)
    past = []
    cached = [plain_forward(ids[i : i + 2], model.params, 3, past, every_row=False)[-1] for i in range(0, 8, 2)]
    np.testing.assert_allclose(cached, expected[1::2], rtol=0, atol=1e-4)


def fed_by(peer):
    """A random model and a peer that has its weights."""
    model = random_model(n_vocab=131, n_ctx=64)
    try:
        return model, peer(model)
    except ImportError as e:
        pytest.skip(f"{e.name} is not installed")


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.__name__)
def test_a_peer_gives_the_logits_of_the_reference(peer):
    model, fed = fed_by(peer)
    for prompt in ([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 0, 130]):
        ids = prompt + [5, 9] * (fed.n_steps // 2) + [7] * (fed.n_steps % 2)
        expected = reference_logits(model, ids)
        np.testing.assert_allclose(fed.prefill(prompt), expected[len(prompt) - 1], rtol=0, atol=1e-4)
        for _ in range(2):
            np.testing.assert_allclose(fed.decode(ids), expected[len(prompt)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("peer", PEERS[1:], ids=lambda peer: peer.__name__)
def test_a_peer_completes_batches(peer):
    model, fed = fed_by(peer)
    prompts = [[3, 1, 4, 1, 5], [9], [2, 6, 5]]
    assert fed.complete(prompts, 7) == [list(gpt2.generate(model, prompt, 7)) for prompt in prompts]


def test_peers_that_are_not_installed_are_named_and_left_out(monkeypatch, capsys):
    for name in ("torch", "transformers", "ctranslate2"):
        monkeypatch.setitem(sys.modules, name, None)
    assert [peer.name for peer in installed_peers(random_model())] == [PlainNumPy.name]
    assert "CTranslate2 float32: not installed (ctranslate2)" in capsys.readouterr().err
