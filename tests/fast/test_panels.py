from functools import cache

import numpy as np
import pytest

from fast import kernel, times_transposed
from fast.panels import SMALL, WIDTHS, Matrix, as_it_lies, n_pieces, panels_shape, streamed, ways
from gpt2 import matmul

SHAPES = [  # n_groups, n_in, n_columns
    (3, 768, 384),
    (1, 3072, 768),
    (1, 1600, 100),
    (3, 64, 24),
    (1, 97, 101),
    (2, 1, 7),
    (1, 7, 1),
]
ROWS = [1, 2, 3, 5, 8, 16, 33, 64]
USABLE = [width for way, width in WIDTHS.items() if way is not streamed or kernel.find()]
WAYS = [pytest.param(way, width, id=f"{way.__name__}-{width}") for width in USABLE for way in ways(width)]


@cache
def weights(n_groups, n_in, n_columns):
    w = np.random.default_rng(n_in + n_columns).standard_normal((n_in, 2 * n_groups * n_columns), np.float32)
    return w.reshape(n_in, n_groups, 2 * n_columns).swapaxes(0, 1)[..., n_columns:]  # every other part is a share


def arrays(n_rows, *shape):
    return np.random.default_rng(n_rows).standard_normal((n_rows, shape[1]), np.float32), weights(*shape)


def packed(w, width, way):
    matrix = Matrix(w, dict.fromkeys(range(1, 65), way), np.full(panels_shape(w, width), np.nan, np.float32))
    matrix.fill()
    return matrix


def product(x, w):
    return np.concatenate(x @ w, axis=-1)


def exactly(x, w):
    return product(x.astype(np.float64), w.astype(np.float64))


def error(y, exact):
    """Largest error against float64, in units of the largest output."""
    return np.abs(y - exact).max() / np.abs(exact).max()


@cache
def expected(n_rows, *shape):
    """(the exact product, the error of the plain one) of these arrays: the same whatever the way."""
    x, w = arrays(n_rows, *shape)
    exact = exactly(x, w)
    return exact, error(product(x, w), exact)


@pytest.mark.parametrize(("way", "width"), WAYS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_way_is_as_close_as_the_plain_product(way, width, shape):
    matrix = packed(weights(*shape), width, way)
    for n_rows in ROWS:
        y = arrays(n_rows, *shape)[0] @ matrix
        assert y.dtype == np.float32 and y.shape == (n_rows, shape[0] * shape[2]) and y.flags.c_contiguous
        exact, of_plain = expected(n_rows, *shape)
        assert error(y, exact) <= max(2 * of_plain, 2e-6)


@pytest.mark.parametrize(("way", "width"), WAYS)
@pytest.mark.parametrize("shape", [(1, 64, 1000), (1, 64, 33), (1, 3, 5)], ids=str)
def test_the_parts_of_a_matrix_are_all_of_its_columns(shape, way, width):
    x, w = arrays(2, *shape)
    matrix = packed(w, width, way)
    n_parts = min(8, matrix.panels.shape[2])
    parts = [matrix.part(i, 8) for i in range(3, 3 + n_parts)]  # they begin anew after the last
    y = np.concatenate([way(x, part) for part in parts[-3 % n_parts :] + parts[: -3 % n_parts]], axis=-1)
    assert error(y, exactly(x, w)) <= 2e-6


@pytest.mark.parametrize(("way", "width"), WAYS)
@pytest.mark.parametrize("shape", [(50257, 64), (101, 97), (5, 3), (1, 1)], ids=str)
def test_every_way_multiplies_with_a_transpose(way, width, shape):
    """The output product: wte lies as [n_vocab, n_embd]."""
    for n_rows in (1, 2, 5):
        x, wte = arrays(n_rows, 1, *shape[::-1])[0], np.random.default_rng(0).standard_normal(shape, np.float32)
        y = x @ packed(wte.T[None], width, way)
        assert y.shape == (n_rows, shape[0]) and error(y, exactly(x, wte.T[None])) <= 2e-6


def test_leading_axes_stay_and_views_are_taken():
    x, w = arrays(6, 3, 12, 20)
    x = x.reshape(2, 3, 12)[:, ::2]
    y = matmul(x, packed(w, 32, as_it_lies))
    assert y.shape == (2, 2, 60)
    np.testing.assert_allclose(y, np.concatenate(x[None] @ w[:, None], axis=-1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_rows", ROWS)
def test_pieces_divide_the_depth_and_are_small(n_rows):
    for n_in in (768, 3072, 1600, 6400, 97):
        for width in (32, 64):
            n = n_pieces(n_rows, n_in, width)
            assert n_in % n == 0 and n_rows * n_in // n * width <= SMALL
            assert n == 1 or any(n_rows * n_in // d * width > SMALL for d in range(1, n) if n_in % d == 0)


def test_few_rows_times_transposed_are_as_many():
    rng = np.random.default_rng(0)
    for n_rows in (1, 2, 8, 9):
        q, k = (rng.standard_normal((2, 3, n, 8), np.float32) for n in (n_rows, 50))
        np.testing.assert_allclose(times_transposed(q, k), q @ k.swapaxes(-1, -2), rtol=0, atol=1e-5)
