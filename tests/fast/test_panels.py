from functools import cache

import numpy as np
import pytest

from fast import times_transposed
from fast.panels import Matrix, as_it_lies, panels_shape, streamed, unpacked
from fast.server import find
from gpt2 import matmul

SHAPES = [(768, 1152), (3072, 768), (1600, 100), (64, 72), (97, 101), (1, 14), (7, 1)]  # n_in, n_out
ROWS = [1, 2, 3, 5, 8, 16, 33, 64]
KERNELS = list(find().kernels) if find() else []
WAYS = [(streamed, kernel) for kernel in KERNELS]
WAYS += [(way, kernel) for way in (as_it_lies, unpacked) for kernel in KERNELS[:1]]
pytestmark = pytest.mark.skipif(not find(), reason="this BLAS has no kernel that can be used")


@cache
def weights(n_in, n_out):
    return np.random.default_rng(n_in + n_out).standard_normal((n_in, n_out), np.float32)


def arrays(n_rows, n_in, n_out):
    return np.random.default_rng(n_rows).standard_normal((n_rows, n_in), np.float32), weights(n_in, n_out)


def packed(w, way, kernel, n_threads):
    matrix = Matrix(w, dict.fromkeys(range(1, 65), way))
    panels = np.full(panels_shape(w, kernel), np.nan, np.float32)
    matrix.use(kernel, panels, min(n_threads, find().n_threads))
    for part in matrix.parts:
        matrix.fill(part)
    return matrix


def exactly(x, w):
    return x.astype(np.float64) @ w.astype(np.float64)


def error(y, exact):
    """Largest error against float64, in units of the largest output."""
    return np.abs(y - exact).max() / np.abs(exact).max()


@cache
def expected(n_rows, *shape):
    """(the exact product, the error of the plain one) of these arrays: the same whatever the way."""
    x, w = arrays(n_rows, *shape)
    exact = exactly(x, w)
    return exact, error(x @ w, exact)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (1600, 640), (6400, 320)], ids=str)
def test_panels_are_no_deeper_than_plain_products_are_exact(kernel, shape):
    x, w = arrays(8, *shape)

    def deviation(y):
        return np.sqrt(np.mean((y - exactly(x, w)) ** 2))

    assert deviation(x @ packed(w, streamed, kernel, 1)) < 1.1 * deviation(x @ w)  # 2.1 if 800 deep


@pytest.mark.parametrize(("way", "kernel"), WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_every_way_is_as_close_as_the_plain_product(way, kernel, shape, n_threads):
    matrix = packed(weights(*shape), way, kernel, n_threads)
    for n_rows in ROWS:
        y = arrays(n_rows, *shape)[0] @ matrix
        assert y.dtype == np.float32 and y.shape == (n_rows, shape[1]) and y.flags.c_contiguous
        exact, of_plain = expected(n_rows, *shape)
        assert error(y, exact) <= max(2 * of_plain, 2e-6)


@pytest.mark.parametrize(("way", "kernel"), WAYS)
@pytest.mark.parametrize("shape", [(50257, 64), (101, 97), (5, 3), (1, 1)], ids=str)
def test_every_way_multiplies_with_a_transpose(way, kernel, shape):
    """The output product: wte lies as [n_vocab, n_embd]."""
    wte = np.random.default_rng(0).standard_normal(shape, np.float32)
    matrix = packed(wte.T, way, kernel, 2)
    for n_rows in (1, 2, 5):
        x = arrays(n_rows, *shape[::-1])[0]
        y = x @ matrix
        assert y.shape == (n_rows, shape[0]) and error(y, exactly(x, wte.T)) <= 2e-6


def test_leading_axes_stay_and_views_are_taken():
    x, w = arrays(6, 12, 60)
    x = x.reshape(2, 3, 12)[:, ::2]
    for texts in (x, x[:1], x[:, :1]):
        y = matmul(texts, packed(w, as_it_lies, KERNELS[0], 2))
        assert y.shape == (*texts.shape[:2], 60)
        np.testing.assert_allclose(y, texts @ w, rtol=0, atol=1e-4)


def test_few_rows_times_transposed_are_as_many():
    rng = np.random.default_rng(0)
    for n_rows in (1, 2, 8, 9):
        q, k = (rng.standard_normal((2, 3, n, 8), np.float32) for n in (n_rows, 50))
        np.testing.assert_allclose(times_transposed(q, k), q @ k.swapaxes(-1, -2), rtol=0, atol=1e-5)
