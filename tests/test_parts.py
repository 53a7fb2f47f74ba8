import numpy as np
import parts
import pytest
from conftest import random_model
from threads import Team

import gpt2


@pytest.fixture(params=[1, 2, 3])
def in_parts(request, monkeypatch):
    """Every prompt is cut, and the team has so many threads."""
    monkeypatch.setattr(parts, "team", Team(request.param))
    monkeypatch.setattr(parts, "MIN_PART", 6)
    monkeypatch.setattr(parts, "is_large", lambda weights: True)
    return request.param


def used_parts(monkeypatch) -> list[slice]:
    used, equal_work = [], parts.equal_work

    def noted(*args):
        shares = equal_work(*args)
        used.extend(shares)
        return shares

    monkeypatch.setattr(parts, "equal_work", noted)
    return used


@pytest.mark.parametrize("n_last", [1, 3, 17, 30])
@pytest.mark.parametrize("n_batch", [1, 2])
def test_parts_give_the_logits_of_the_whole(monkeypatch, n_batch, n_last):
    model = random_model(n_embd=24, n_ctx=40)
    ids = np.random.default_rng(0).integers(61, size=(n_batch, 40))
    cache = model.new_cache(n_batch)
    whole = [model.forward(ids[:, :30], cache, n_last), model.forward(ids[:, 30:], cache, 10)]
    for n_threads in (2, 3):
        monkeypatch.setattr(parts, "team", Team(n_threads))
        monkeypatch.setattr(parts, "MIN_PART", 3)
        monkeypatch.setattr(parts, "is_large", lambda weights: True)
        used = used_parts(monkeypatch)
        cache = model.new_cache(n_batch)
        cut = [model.forward(ids[:, :30], cache, n_last), model.forward(ids[:, 30:], cache, 10)]
        assert len(used) == 2 * n_threads and cache.length == 40
        for got, expected in zip(cut, whole, strict=True):
            assert got.shape == expected.shape and got.dtype == np.float32
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_one_thread_or_a_small_model_or_no_threadpoolctl_keeps_the_whole(monkeypatch):
    model, used = random_model(n_ctx=40), used_parts(monkeypatch)
    monkeypatch.setattr(parts, "MIN_PART", 6)
    for n_threads, large, controller in ((1, True, True), (2, False, True), (2, True, None)):
        monkeypatch.setattr(parts, "team", Team(n_threads))
        monkeypatch.setattr(parts, "is_large", lambda weights, large=large: large)
        monkeypatch.setattr(parts, "blas_controller", lambda controller=controller: controller)
        model.forward([list(range(30))], model.new_cache())
    assert not used


@pytest.mark.parametrize("n_past", [0, 100, 900])
@pytest.mark.parametrize("n_parts", [1, 2, 7])
def test_parts_cover_every_row_once_and_later_ones_are_shorter(n_past, n_parts):
    shares = parts.equal_work(500, n_past, 64, n_parts)
    assert [i for share in shares for i in range(share.start, share.stop)] == list(range(500))
    sizes = [share.stop - share.start for share in shares]
    assert len(sizes) == n_parts and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_part_that_fails_stops_the_others_and_its_error_arrives(in_parts, monkeypatch, failing, error):
    model = random_model(n_ctx=40)
    if failing >= in_parts > 1 or in_parts == 1:
        failing = 0
    cache, store = model.new_cache(), gpt2.KVCache.append

    def fail(self, layer, qkv):
        if layer == 1 and failing == (self.before is not None) + (getattr(self.before, "before", None) is not None):
            raise error
        return store(self, layer, qkv)

    monkeypatch.setattr(gpt2.KVCache, "append", fail)
    monkeypatch.setattr(gpt2.KVCache, "before", None, raising=False)
    with pytest.raises(error):
        model.forward([list(range(36))], cache)
    assert cache.length == 0
    monkeypatch.setattr(gpt2.KVCache, "append", store)
    model.forward([list(range(36))], cache)  # and the threads are there for the next
    assert cache.length == 36
