"""Passes by a team of threads: the same numbers, and when weights are packed for them."""

import gc
import math
import re
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_model, shared_out

import fast.weights
import gpt2
from console.stats import n_bytes
from fast import server
from fast.panels import as_it_lies, streamed
from fast.threads import blas
from fast.weights import DRAFT_GAIN, MIN_GAIN, TYPICAL_STEPS, Weights

pytestmark = pytest.mark.skipif(not server.find(), reason="this BLAS has no threads that can be used")
IDS = np.random.default_rng(0).integers(61, size=(3, 40))


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("n_batch", [1, 3])
def test_a_team_gives_what_one_thread_gives(n_threads, n_batch):
    """Also with more threads than heads, a vocabulary of 61 and hidden units that no width divides."""
    whole = random_model(n_embd=30, n_head=3, n_ctx=40)
    model = shared_out(whole, n_threads)
    caches = [each.new_cache(n_batch) for each in (whole, model)]
    for start, stop, n_last in ((0, 5, 1), (5, 6, 1), (6, 14, 8), (14, 30, 2), (30, 33, 3)):
        expected, got = (
            each.forward(IDS[:n_batch, start:stop], cache, n_last)
            for each, cache in zip((whole, model), caches, strict=True)
        )
        assert got.shape == expected.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(caches[0].kv[..., :33, :], caches[1].kv[..., :33, :], rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_batch", [1, 2])
@pytest.mark.parametrize("n_last", [1, 17, 90])
def test_long_prompts_are_shared_out_too(n_batch, n_last):
    whole = random_model(n_ctx=130)
    model, ids = shared_out(whole, 2, is_packed=False), np.random.default_rng(1).integers(61, size=(n_batch, 130))
    caches = [each.new_cache(n_batch) for each in (whole, model)]
    for tokens in (ids[:, :100], ids[:, 100:]):
        n_rows = min(n_last, tokens.shape[1])
        expected, got = (each.forward(tokens, c, n_rows) for each, c in zip((whole, model), caches, strict=True))
        assert got.shape == expected.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_new", [3, 30])
def test_memory_of_a_cache_is_free_when_the_cache_is(n_new):
    """Without the garbage collector: nothing that a pass made refers to itself."""
    model = shared_out(random_model(n_ctx=40))
    gc.disable()
    try:
        cache = model.new_cache()
        model.forward([list(range(n_new))], cache)
        kv = weakref.ref(cache.kv)
        del cache
        assert kv() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("way", [streamed, as_it_lies], ids=lambda way: way.__name__)
@pytest.mark.parametrize("n_new", [2, 3, 5, 8, 16])
def test_the_model_gives_the_same_logits_whichever_way(way, n_new):
    whole = random_model(n_ctx=40)
    model = shared_out(whole, 2, way)
    expected = whole.forward(IDS[:1, : 10 + n_new], whole.new_cache(), n_last=n_new)
    cache = model.new_cache()
    model.forward(IDS[:1, :10], cache)
    np.testing.assert_allclose(model.forward(IDS[:1, 10 : 10 + n_new], cache, n_new), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("are_panels_faster", [False, True])
def test_many_rows_have_the_way_that_is_faster_and_few_have_panels(monkeypatch, are_panels_faster):
    model, n_timed = shared_out(random_model(n_ctx=200), 2), []

    def seconds(way, n_rows, matrices):
        n_timed.append(n_rows)
        return float((way is as_it_lies) == are_panels_faster)

    monkeypatch.setattr(fast.weights, "seconds", seconds)
    cache = model.new_cache()
    for n_new in (5, 5, 8, 9, 16, 33, 40, 48, 47):
        model.forward(IDS.reshape(1, -1)[:, :n_new], cache, n_last=n_new)
        expected = streamed if n_new <= 8 or are_panels_faster else as_it_lies
        assert model.passes.weights.ways[n_new] is expected
        cache.length = 0
    assert n_timed == [16, 16, 16, 16, 40, 40, 40, 40, 48, 48, 48, 48]  # each way, once a pass
    for _ in range(fast.weights.N_TIMINGS):
        cache.length = 0
        model.forward(IDS.reshape(1, -1)[:, :16], cache, n_last=16)
    assert n_timed.count(16) == 2 * fast.weights.N_TIMINGS


def test_a_busy_moment_does_not_decide_how_rows_are_multiplied(monkeypatch):
    model, times = shared_out(random_model(n_ctx=100)), iter([9.0, 9.0, 1.0, 1.0, 1.0])
    monkeypatch.setattr(fast.weights, "seconds", lambda way, *_: next(times) if way is streamed else 2.0)
    cache = model.new_cache()
    for expected in [as_it_lies] * 4 + [streamed] * 2:
        model.forward([list(range(16))], cache, n_last=16)
        assert model.passes.weights.ways[16] is expected


def test_loading_a_model_does_not_look_for_the_kernel(monkeypatch):
    """That reads NumPy's library; a model is ready in milliseconds."""
    for module in (fast, server):
        monkeypatch.setattr(module, "find", None)
    model = shared_out(random_model(n_ctx=40), is_packed=False)
    model.forward([[1]], model.new_cache())


def test_single_rows_never_use_panels(monkeypatch):
    """They round alike whatever is packed: no near tie of theirs has to be settled."""
    whole, model = random_model(n_ctx=40), shared_out(random_model(n_ctx=40))
    monkeypatch.setattr(Weights, "prepare", None)
    expected = whole.forward([[7]], whole.new_cache())
    assert np.array_equal(model.forward([[7]], model.new_cache()), expected)
    assert model.passes.are_plain(1) and not model.passes.are_plain(2)


# ----------------------------------------------------------------------------------------------------------------------
# When to pack
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def large():
    """A model that counts as large, with nothing packed yet."""
    return shared_out(random_model(n_ctx=200), is_packed=False)


@pytest.fixture
def cheap(monkeypatch):
    """Packing takes as long as two steps."""
    times = {fast.weights.seconds_to_fill: 2.0, fast.weights.seconds: 1.0}
    for function, seconds in times.items():
        monkeypatch.setattr(
            fast.weights, function.__name__, lambda *args, f=function, seconds=seconds: (f(*args), seconds)[1]
        )


def is_packed(model):
    return model.passes.weights.is_packed


@pytest.mark.parametrize("n_layer", [1, 3])
@pytest.mark.parametrize("best", list(server.find().kernels) if server.find() else [])
def test_weights_are_packed_for_the_kernel_that_is_fastest(best, n_layer, monkeypatch):
    """Whichever it is, no logit changes by more than rounding."""
    model, ids, timed = shared_out(random_model(n_layer=n_layer), is_packed=False), [list(range(10))], []

    def seconds(way, n_rows, matrices):
        timed.append(n_rows)
        way(np.ones((n_rows, matrices[0].shape[0]), np.float32), matrices[0])
        return 1 + (matrices[0].kernel != best)

    before = model.forward(ids, model.new_cache(), 10)
    monkeypatch.setattr(fast.weights, "seconds", seconds)
    model.passes.pack(10)
    assert {matrix.kernel for matrix in model.passes.weights.matrices} == {best} and set(timed[1:]) == {16}
    np.testing.assert_allclose(model.forward(ids, model.new_cache(), 10), before, rtol=0, atol=1e-4)


def test_the_first_tokens_do_not_wait_for_packing(large, cheap):
    cache = large.new_cache()
    large.forward([[1, 2, 3]], cache)
    assert not is_packed(large) and "no steps of several rows" in large.passes.weights.report
    large.forward([[1, 2]], cache)
    assert is_packed(large) and re.fullmatch(r"0\.000 GB, packed in \d\.\d{3} s", large.passes.weights.report)
    large.forward([[1]], large.new_cache())


def test_the_clock_stands_still_while_weights_are_packed(large, cheap, monkeypatch):
    now, pack = [5.0], large.passes.weights.pack

    def slow_pack(*args):
        now[0] += 100
        pack(*args)

    monkeypatch.setattr(fast.weights, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(fast.weights, "clock", fast.weights.Clock())
    monkeypatch.setattr(large.passes.weights, "pack", slow_pack)
    cache = large.new_cache()
    large.forward([[1, 2, 3]], cache)
    now[0] += 1
    large.forward([[1, 2]], cache)
    assert now[0] == 106 and fast.weights.clock() == 6


def test_the_clock_of_a_thread_goes_on_while_another_packs():
    clock = fast.weights.Clock()

    def pack():
        with clock.stopped():
            clock.seconds_stopped += 1000

    before, thread = clock(), threading.Thread(target=pack)
    thread.start()
    thread.join()
    assert clock() >= before and clock.seconds_stopped == 0


def test_plain_decoding_packs_nothing(large, cheap):
    list(gpt2.generate(large, [1, 2, 3], 150))
    assert not is_packed(large)


@pytest.mark.parametrize(("n_batch", "n_new", "gain"), [(1, 2, DRAFT_GAIN), (1, 3, MIN_GAIN), (2, 1, MIN_GAIN)])
def test_a_text_that_is_too_short_packs_nothing(large, cheap, n_batch, n_new, gain):
    n_least = math.ceil(TYPICAL_STEPS / gain)
    cache = large.new_cache(n_batch, n_seq=3 + n_least)
    large.forward([[1, 2, 3, 4]] * n_batch, cache)
    large.forward([[1, 2, 3][:n_new]] * n_batch, cache)
    assert not is_packed(large)
    cache.length = 3
    large.forward([[1, 2, 3][:n_new]] * n_batch, cache)
    assert is_packed(large)


def test_guesses_pay_where_packing_does(large, cheap):
    n_least = int(TYPICAL_STEPS / MIN_GAIN)
    assert not large.passes.few_rows_pay(n_least - 1) and large.passes.few_rows_pay(n_least)
    large.passes.pack()
    assert large.passes.few_rows_pay(1)


def test_packing_is_given_up_where_it_takes_too_long(large, monkeypatch):
    monkeypatch.setattr(fast.weights, "seconds_to_fill", lambda matrices, i: 60.0)
    monkeypatch.setattr(fast.weights, "seconds", lambda way, n_rows, matrices: 1.0)
    cache = large.new_cache(n_seq=103)
    for _ in range(2):
        large.forward([[1, 2, 3]], cache)
    assert not is_packed(large) and "take 60 steps to pack and would have saved 40" in large.passes.weights.report
    assert all(matrix.panels is None for matrix in large.passes.weights.matrices)  # nothing keeps their memory
    assert not large.passes.few_rows_pay(149) and large.passes.few_rows_pay(150)


@pytest.mark.parametrize("is_refused", [False, True])
def test_panels_that_do_not_fit_are_left_out(large, cheap, monkeypatch, is_refused):
    expected = random_model(n_ctx=200).forward([[1, 2]], random_model(n_ctx=200).new_cache())
    if is_refused:
        monkeypatch.setattr(fast.weights, "available_bytes", lambda: 1e30)
        memory_for = large.passes.weights.memory_for
        monkeypatch.setattr(large.passes.weights, "memory_for", lambda n: memory_for(1 << 60))
    else:
        monkeypatch.setattr(fast.weights, "available_bytes", lambda: n_bytes(large.params))
    cache = large.new_cache()
    for _ in range(2):
        cache.length = 0
        large.forward([[1, 2, 3]], cache)
        large.forward([[1, 2]], cache)
    assert not is_packed(large) and "do not fit in" in large.passes.weights.report
    assert large.passes.few_rows_pay(1)  # as far as that is known; what pays is measured then
    np.testing.assert_allclose(large.forward([[1, 2]], large.new_cache()), expected, atol=1e-4)


def test_without_threadpoolctl_products_are_plain(cheap, monkeypatch):
    model = random_model(n_ctx=40)
    monkeypatch.setattr(fast, "find", server.find.__wrapped__)
    monkeypatch.setattr(blas, "controller", None)
    large = shared_out(model, is_packed=False)
    cache = large.new_cache()
    large.forward([[1, 2, 3]], cache)
    large.forward([[4, 5]], cache)
    large.forward([[6]], cache)
    assert not is_packed(large)
    expected = model.forward([[1, 2, 3, 4, 5, 6, 7]], model.new_cache())
    np.testing.assert_allclose(large.forward([[7]], cache), expected, rtol=0, atol=1e-4)


def test_a_cache_that_looks_sees_the_same():
    from analysis.inside import look_inside

    model = random_model(n_ctx=40)
    for expected, got in zip(look_inside(model, [1, 2, 3]), look_inside(shared_out(model), [1, 2, 3]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_the_cache_as_it_was(monkeypatch, error):
    model, store = shared_out(random_model(n_ctx=40)), gpt2.KVCache.append
    cache = model.new_cache()
    model.forward([[1, 2, 3]], cache)

    def fail(self, layer, kv):
        if layer == 1:
            raise error
        return store(self, layer, kv)

    monkeypatch.setattr(gpt2.KVCache, "append", fail)
    with pytest.raises(error):
        model.forward([[4, 5]], cache)
    assert cache.length == 3 and not blas.holders
    monkeypatch.setattr(gpt2.KVCache, "append", store)
    model.forward([[4, 5]], cache)
    assert cache.length == 5


def test_a_whole_model_is_packed_into_one_piece_of_memory(large):
    large.passes.pack()
    bases = {id(matrix.panels.base) for matrix in large.passes.weights.matrices}
    assert len(bases) == 1
