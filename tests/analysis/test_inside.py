"""Hidden states, attention weights and their picture."""

import os
import sys
import warnings

import numpy as np
import pytest
from helpers import MODELS, outcome, random_model, run, run_here
from reference import reference_inside, reference_logits

from analysis import inside
from analysis.inside import Trace, look_inside
from console import command

pytestmark = pytest.mark.xdist_group("matplotlib")
MODEL = random_model()
IDS = np.random.default_rng(0).integers(61, size=20).tolist()


def test_hidden_states_and_weights_equal_the_float64_reference():
    hidden, weights = look_inside(MODEL, IDS)
    expected = reference_inside(MODEL, IDS)
    assert hidden.shape == (4, 20, 24) and weights.shape == (3, 3, 20, 20)
    assert hidden.dtype == weights.dtype == np.float32
    np.testing.assert_allclose(hidden, expected[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(weights, expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 20, 24])
def test_each_row_of_weights_is_a_distribution_over_what_came_before(n):
    _, weights = look_inside(MODEL, (IDS * 2)[:n])
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=0, atol=1e-5)
    assert (weights >= 0).all() and not np.triu(weights, 1).any()


@pytest.mark.parametrize("n_last", [1, 7, 20])
def test_looking_changes_nothing(n_last):
    plain, trace = MODEL.new_cache(), Trace(MODEL.new_cache())
    np.testing.assert_array_equal(MODEL.forward([IDS], trace, n_last), MODEL.forward([IDS], plain, n_last))
    np.testing.assert_array_equal(trace.kv[..., :20, :], plain.kv[..., :20, :])
    assert trace.length == 20
    assert [x.shape[1] for x in trace.hidden] == [20, 20, 20, n_last]
    assert [w.shape[2:] for w in trace.weights] == [(20, 20), (20, 20), (n_last, 20)]


def test_later_tokens_see_those_in_the_cache():
    _, whole = look_inside(MODEL, IDS)
    cache = MODEL.new_cache()
    MODEL.forward([IDS[:15]], cache)
    trace = Trace(cache)
    MODEL.forward([IDS[15:]], trace, n_last=5)
    np.testing.assert_allclose(np.concatenate(trace.weights), whole[:, :, 15:], rtol=0, atol=1e-5)


def test_padding_has_no_weight():
    cache = MODEL.new_cache(2, n_pad=[0, 4])
    trace = Trace(cache)
    MODEL.forward([IDS[:12], [0] * 4 + IDS[:8]], trace, n_last=12)
    weights = np.stack([layer[1] for layer in trace.weights])[:, :, 4:]
    assert not weights[..., :4].any()
    np.testing.assert_allclose(weights[..., 4:], look_inside(MODEL, IDS[:8])[1], rtol=0, atol=1e-5)


def test_the_logits_come_of_the_last_hidden_state():
    hidden, _ = look_inside(MODEL, IDS)
    x = hidden[-1].astype(np.float64)
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
    logits = (x * MODEL.params["ln_f"]["g"] + MODEL.params["ln_f"]["b"]) @ MODEL.params["wte"].T
    np.testing.assert_allclose(logits, reference_logits(MODEL, IDS), rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------

INSIDE = ("-m", "analysis", "--model_size=nano")


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "seen.png"
    done = run_here(*INSIDE, "The $king$ and\nhis 日", "--layer", 1, "--path", path, "--models_dir", MODELS)
    assert (done.returncode, done.stdout) == (0, "")
    content = path.read_bytes()
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and min(width, height) > 300


@pytest.mark.parametrize(("n_heads", "name"), [(1, "a.png"), (3, ".png")])
def test_any_number_of_heads_is_drawn(tmp_path, n_heads, name):
    pytest.importorskip("matplotlib")
    inside.draw_attention(np.ones((n_heads, 1, 1), np.float32), ["a"], "one token", str(tmp_path / name))
    assert (tmp_path / name).stat().st_size > 1000


def test_characters_without_a_picture_are_boxes_without_a_word(tmp_path):
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inside.draw_attention(np.ones((1, 2, 2), np.float32), ["🙂", "日"], "$\\no$ 🙂", str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_names_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    path.symlink_to("/dev/full")
    argv = ["analysis", "x", "--model_size=nano", "--models_dir", MODELS, "--path", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    found = outcome(lambda: command.run(inside.main))
    assert found == (1, "", f"error: {path}: No space left on device\n")


@pytest.mark.parametrize(
    ("args", "message", "status"),
    [
        (["x", "--layer", "2"], "layer is 2, expected a whole number from 0 to 1", 1),
        (["x", "--layer", "-1"], "layer is -1, expected a whole number of 0 or more", 1),
        (["x", "--layer", "top"], "layer is 'top'", 1),
        (["x", "--path", "seen.svg"], "path is 'seen.svg', expected a name that ends in .png", 1),
        (["x", "--path", "/nowhere/seen.png"], "/nowhere/seen.png", 1),
        (["x", "--model_size", "125M"], "no model '125M'", 1),
        (["x", "--models_dir", "/nowhere"], "no model 'nano'", 1),
        (["the " * 70], "pictures of more than 64 cannot be read", 1),
        ([], "prompt", 2),
    ],
)
def test_a_mistake_is_one_line(args, message, status):
    if "/nowhere/seen.png" in args:
        pytest.importorskip("matplotlib")
    done = run_here(*INSIDE, *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (status, "", 1)
    assert message in done.stderr


def test_without_matplotlib_it_says_what_to_install():
    code = "import sys; sys.modules['matplotlib'] = None\n"
    code += "from analysis import inside; from console import command; command.run(inside.main)"
    done = run("-c", code, "x", "--model_size=nano")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install matplotlib" in done.stderr
