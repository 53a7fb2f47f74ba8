"""Long prompts whose rows are shared out: the numbers of the whole, and errors that stop every thread."""

import gc
import weakref

import numpy as np
import pytest
from helpers import random_model, shared_out

import fast
import gpt2
from decoding.prefill import left_padded
from fast import prompts
from fast.prompts import equal_work
from fast.threads import blas

pytestmark = pytest.mark.skipif(not fast.find(), reason="this BLAS has no threads that can be used")
IDS = np.random.default_rng(1).integers(61, size=(2, 130))


@pytest.fixture(autouse=True)
def cut(monkeypatch):
    """The numbers of rows of the parts that were made. A part may be short."""
    sizes = []

    def noted(*args):
        slices = equal_work(*args)
        sizes.append([rows.stop - rows.start for rows in slices])
        return slices

    monkeypatch.setattr(prompts, "MIN_ROWS", 1)
    monkeypatch.setattr(prompts, "MIN_ROWS_EACH", 9)
    monkeypatch.setattr(prompts, "equal_work", noted)
    return sizes


@pytest.mark.parametrize("n_threads", [2, 3])
@pytest.mark.parametrize("n_batch", [1, 2])
@pytest.mark.parametrize("n_last", [1, 17, 90])
def test_rows_give_the_logits_of_the_whole(cut, n_threads, n_batch, n_last):
    whole = random_model(n_ctx=130)
    model = shared_out(whole, n_threads)
    caches = [each.new_cache(n_batch) for each in (whole, model)]
    for start, stop in ((0, 100), (100, 130)):
        n_rows = min(n_last, stop - start)
        expected, got = (
            each.forward(IDS[:n_batch, start:stop], cache, n_rows)
            for each, cache in zip((whole, model), caches, strict=True)
        )
        assert got.shape == expected.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert [sum(sizes) for sizes in cut] == [100, 30] and {len(sizes) for sizes in cut} == {n_threads}
    np.testing.assert_allclose(caches[0].kv, caches[1].kv, rtol=0, atol=1e-4)


def test_padded_prompts_and_what_follows_them(cut):
    whole = random_model(n_ctx=130)
    model, texts = shared_out(whole, 2), [IDS[0, :110].tolist(), IDS[1, :70].tolist(), IDS[1, 70:].tolist()]
    found = model.forward([left_padded(text, 110) for text in texts], model.new_cache(3, 110, [0, 40, 50]))[:, 0]
    expected = [whole.forward([text], whole.new_cache())[0, 0] for text in texts]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert gpt2.generate_batch(model, texts, 20) == [list(gpt2.generate(whole, text, 20)) for text in texts]
    assert len(cut) == 2


def test_few_rows_one_thread_or_another_blas_leave_the_whole(cut, monkeypatch):
    small = random_model(n_ctx=130)
    shared_out(small, 2).forward(IDS[:, :17], small.new_cache(2))
    shared_out(small, 1).forward(IDS, small.new_cache(2))
    small.forward(IDS, small.new_cache(2))
    monkeypatch.setattr(fast, "find", lambda: None)
    shared_out(small, 2).forward(IDS, small.new_cache(2))
    assert not cut


@pytest.mark.parametrize("n_past", [0, 100, 900])
@pytest.mark.parametrize("n_parts", [1, 2, 7])
def test_parts_cover_every_row_once_and_later_ones_are_shorter(n_past, n_parts):
    slices = equal_work(500, n_past, 64, n_parts)
    assert [i for rows in slices for i in range(rows.start, rows.stop)] == list(range(500))
    sizes = [rows.stop - rows.start for rows in slices]
    assert len(sizes) == n_parts and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_part_that_fails_stops_the_others_and_its_error_arrives(cut, monkeypatch, failing, error):
    model, store = shared_out(random_model(n_ctx=130)), gpt2.KVCache.append
    cache = model.new_cache()
    model.forward([[1, 2, 3]], cache)

    def fail(self, layer, kv):
        if layer == 1 and self.length == 3 + sum(cut[-1][:failing]):
            raise error
        return store(self, layer, kv)

    monkeypatch.setattr(gpt2.KVCache, "append", fail)
    with pytest.raises(error):
        model.forward(IDS[:1, :90], cache)
    assert cache.length == 3 and not blas.holders
    monkeypatch.setattr(gpt2.KVCache, "append", store)
    model.forward(IDS[:1, :90], cache)
    assert cache.length == 93


def test_memory_of_a_cache_is_free_when_the_cache_is(cut):
    model = shared_out(random_model(n_ctx=130))
    gc.disable()
    try:
        cache = model.new_cache()
        model.forward(IDS[:1], cache)
        kv = weakref.ref(cache.kv)
        del cache
        assert cut and kv() is None
    finally:
        gc.enable()
