import os
import threading

import matmul as mm
import numpy as np
import pytest
from conftest import random_model, run
from threads import Team

SHAPES = [
    (768, 2304),
    (768, 768),
    (3072, 768),
    (1600, 6400),
    (1600, 50),
    (128, 512),
    (64, 192),
    (97, 101),
    (1, 7),
    (7, 1),
]
ROWS = [1, 2, 5, 8, 16]


@pytest.fixture(params=[1, 3])
def team(request, monkeypatch):
    monkeypatch.setattr(mm, "team", Team(request.param))


def arrays(n_rows, n_in, n_out):
    rng = np.random.default_rng(n_rows + n_in + n_out)
    return rng.standard_normal((n_rows, n_in), np.float32), rng.standard_normal((n_in, n_out), np.float32)


def error(y, x, w):
    """Largest error against float64, in units of the largest output."""
    exact = x.astype(np.float64) @ w.astype(np.float64)
    return np.abs(y - exact).max() / np.abs(exact).max()


@pytest.mark.parametrize("way", mm.WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_is_as_close_as_the_plain_product(team, way, shape):
    for n_rows in ROWS:
        x, w = arrays(n_rows, *shape)
        y = mm.WAYS[way](x, w)
        assert y.dtype == np.float32 and y.shape == (n_rows, shape[1])
        assert error(y, x, w) <= max(2 * error(x @ w, x, w), 2e-6)


@pytest.mark.parametrize("way", mm.WAYS)
@pytest.mark.parametrize("shape", [(50257, 64), (2048, 768), (101, 97), (5, 3), (1, 1)], ids=str)
def test_every_way_multiplies_with_a_transpose(team, way, shape):
    """The output product: wte lies as [n_vocab, n_embd] and is not copied."""
    for n_rows in ROWS:
        x, wt = arrays(n_rows, shape[1], shape[0])
        w = np.ascontiguousarray(wt.T).T
        y = mm.WAYS[way](x, w)
        assert y.dtype == np.float32 and error(y, x, w) <= max(2 * error(x @ w, x, w), 2e-6)


@pytest.mark.parametrize("n_rows", ROWS)
def test_slabs_divide_the_matrix_and_fit(n_rows):
    for n_in, n_out in SHAPES:
        for limit in mm.SLAB_LIMITS:
            depth, width = mm.slab_shape(n_rows, n_in, n_out, limit)
            assert n_in % depth == 0 and n_out % width == 0
            assert depth == 1 or n_rows * depth * width <= limit


@pytest.mark.parametrize("n", [1, 2, 3, 5, 100])
def test_shares_cover_everything_once(team, n):
    shares = mm.shares(n, 1000)
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(n))
    assert 1 <= len(shares) <= mm.team.n_threads


def test_matmul_keeps_leading_axes_and_takes_views():
    x, w = arrays(6, 12, 20)
    y = mm.matmul(x.reshape(2, 3, 12)[:, ::2], w)
    np.testing.assert_allclose(y, x.reshape(2, 3, 12)[:, ::2] @ w, rtol=1e-5, atol=1e-5)
    assert y.shape == (2, 2, 20)


@pytest.mark.parametrize("way", mm.WAYS)
@pytest.mark.parametrize("n_new", [2, 3, 5, 8, 16])
def test_the_model_gives_the_same_logits_whichever_way(monkeypatch, way, n_new):
    model = random_model(n_embd=24, n_ctx=40)
    ids = np.random.default_rng(0).integers(61, size=(1, 20 + n_new))
    expected = model.forward(ids, model.new_cache(), n_last=n_new)
    used = []
    monkeypatch.setattr(mm, "fastest_way", lambda n_rows, weights: used.append(n_rows) or way)
    cache = model.new_cache()
    model.forward(ids[:, :20], cache)
    np.testing.assert_allclose(model.forward(ids[:, 20:], cache, n_last=n_new), expected, rtol=0, atol=1e-4)
    assert used == [20, n_new]


@pytest.fixture
def untimed(monkeypatch):
    """Choices are made at once, also for small matrices."""
    monkeypatch.setattr(mm, "fastest", {})
    monkeypatch.setattr(mm, "MIN_SIZE", 1)
    monkeypatch.setattr(mm, "SETTLE_S", 0)


def test_the_choice_is_timed_once_and_remembered(untimed, monkeypatch):
    timed = []
    last_is_fastest = {way: seconds for seconds, way in enumerate(reversed(list(mm.WAYS)), start=1)}
    monkeypatch.setattr(mm, "seconds", lambda way, pairs: timed.append(way) or last_is_fastest[way])
    weights = [arrays(1, 8, 16)[1], arrays(1, 8, 8)[1]]
    assert mm.fastest_way(5, weights) == list(mm.WAYS)[-1]
    assert set(timed) == set(mm.WAYS)
    timed.clear()
    assert mm.fastest_way(5, weights) == list(mm.WAYS)[-1]
    assert mm.fastest_way(1, weights) == mm.fastest_way(17, weights) == mm.PLAIN
    assert not timed


def test_plain_products_win_ties(untimed, monkeypatch):
    monkeypatch.setattr(mm, "seconds", lambda way, pairs: 1.0 if way == mm.PLAIN else 0.97)
    assert mm.fastest_way(5, [arrays(1, 8, 16)[1]]) == mm.PLAIN


def test_small_models_stay_plain_untimed(monkeypatch):
    monkeypatch.setattr(mm, "seconds", lambda way, pairs: pytest.fail("timed"))
    assert mm.fastest_way(5, [arrays(1, 128, 512)[1]]) == mm.PLAIN


@pytest.mark.parametrize("few", mm.WAYS)
def test_a_drafts_single_rows_follow_its_few_rows_into_slabs(untimed, monkeypatch, few):
    weights = [arrays(1, 8, 16)[1]]
    monkeypatch.setattr(mm, "seconds", lambda way, pairs: 0.5 if way == few else 1.0)
    for is_draft, expected in ((True, few if few in mm.SLABS else mm.PLAIN), (False, mm.PLAIN)):
        with mm.products_for(1, weights, is_draft):
            assert mm.step.way == expected
        assert mm.step.way == mm.PLAIN


def test_products_from_several_threads_are_right():
    x, w = arrays(5, 768, 768)
    expected, wrong = x @ w, []

    def multiply():
        for _ in range(50):
            if not np.allclose(mm.split_k(x, w, mm.SINGLE_THREAD), expected, atol=1e-3):
                wrong.append(1)

    threads = [threading.Thread(target=multiply) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own():
    code = """if True:
        import os, sys, numpy as np, matmul as mm
        x, w = np.ones((5, 768), np.float32), np.ones((768, 768), np.float32)
        mm.split_k(x, w, mm.SINGLE_THREAD)
        child = os.fork()
        assert (mm.split_k(x, w, mm.SINGLE_THREAD) == 768).all()
        if child:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = run("-W", "ignore::DeprecationWarning", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_sandbox_that_binds_no_threads_is_no_error():
    code = """if True:
        import os, numpy as np
        def refuse(*args):
            raise PermissionError
        os.sched_setaffinity = refuse
        import matmul as mm
        x, w = np.ones((5, 768), np.float32), np.ones((768, 768), np.float32)
        with mm.team.one_core_each():
            assert (mm.split_k(x, w, mm.SINGLE_THREAD) == 768).all()
    """
    done = run("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_heads_with_few_rows_are_multiplied_by_rows():
    rng = np.random.default_rng(0)
    for n_rows in (1, 2, 16, 17):
        a = rng.standard_normal((2, 3, n_rows, 8), np.float32)
        b = rng.standard_normal((2, 3, 8, 50), np.float32)
        np.testing.assert_allclose(mm.matmul_heads(a, b), a @ b, rtol=0, atol=1e-5)
