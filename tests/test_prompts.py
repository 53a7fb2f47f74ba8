import gc
import weakref

import numpy as np
import pytest
from conftest import random_model, shared_out

import gpt2
from fast import prompts
from fast.threads import blas, crews

pytest.importorskip("threadpoolctl", reason="without threadpoolctl prompts are computed whole")


def cut(n_threads, **shape):
    """(a model, the same with prompts of 4 tokens a thread computed in parts, the parts that it used)"""
    model = random_model(n_ctx=40, **shape)
    return model, shared_out(model, n_threads, is_packed=False)


@pytest.fixture
def used_parts(monkeypatch):
    used, equal_work = [], prompts.equal_work

    def noted(*args):
        parts = equal_work(*args)
        used.extend(parts)
        return parts

    monkeypatch.setattr(prompts, "equal_work", noted)
    return used


@pytest.mark.parametrize("n_last", [1, 3, 17, 30])
@pytest.mark.parametrize("n_batch", [1, 2])
def test_parts_give_the_logits_of_the_whole(used_parts, n_batch, n_last):
    ids = np.random.default_rng(0).integers(61, size=(n_batch, 40))
    for n_threads in (2, 3):
        whole, in_parts = cut(n_threads)
        caches = whole.new_cache(n_batch), in_parts.new_cache(n_batch)
        for rows, n in ((ids[:, :26], min(n_last, 26)), (ids[:, 26:], 10)):
            expected = whole.forward(rows, caches[0], n)
            got = in_parts.forward(rows, caches[1], n)
            assert got.shape == expected.shape and got.dtype == np.float32
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
        assert len(used_parts) == 2 * n_threads
        used_parts.clear()


@pytest.mark.parametrize("n_new", [3, 30])
def test_memory_of_a_cache_is_free_when_the_cache_is(n_new):
    """Without the garbage collector."""
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


def test_one_thread_or_a_small_model_or_no_threadpoolctl_keeps_the_whole(used_parts, monkeypatch):
    ids = [list(range(30))]
    cut(1)[1].forward(ids, cut(1)[1].new_cache())
    small, large = cut(3)
    small.forward(ids, small.new_cache())
    large.forward([ids[0][:11]], large.new_cache())
    monkeypatch.setattr(blas, "controller", None)
    large.forward(ids, large.new_cache())
    assert not used_parts


@pytest.mark.parametrize("n_past", [0, 100, 900])
@pytest.mark.parametrize("n_parts", [1, 2, 7])
def test_parts_cover_every_row_once_and_later_ones_are_shorter(n_past, n_parts):
    parts = prompts.equal_work(500, n_past, 64, n_parts)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(500))
    sizes = [part.stop - part.start for part in parts]
    assert len(sizes) == n_parts and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_part_that_fails_stops_the_others_and_its_error_arrives(used_parts, monkeypatch, failing, error):
    _, model = cut(3)
    cache, store = model.new_cache(), gpt2.KVCache.append

    def fail(self, layer, qkv):
        if layer == 1 and self.length == used_parts[failing].start:
            raise error
        return store(self, layer, qkv)

    monkeypatch.setattr(gpt2.KVCache, "append", fail)
    with pytest.raises(error):
        model.forward([list(range(36))], cache)
    assert cache.length == 0 and not blas.holders and not crews
    monkeypatch.setattr(gpt2.KVCache, "append", store)
    model.forward([list(range(36))], cache)  # on new threads
    assert cache.length == 36
