"""OpenBLAS's kernel: found where NumPy has it, and left alone where anything about it is not as expected."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_model, shared_out

from fast import kernel
from fast.panels import Matrix, panels_shape, streamed
from fast.threads import blas

pytest.importorskip("threadpoolctl", reason="without threadpoolctl NumPy's BLAS is not looked for")
LIBRARY = getattr(blas.controller, "filepath", "")
IS_WHEEL = sys.platform == "linux" and "scipy_openblas" in LIBRARY
NAMES = ("scipy_cblas_sgemm64_", "cblas_sgemm64_", "cblas_sgemm")
found_only = pytest.mark.skipif(not kernel.find(), reason="this BLAS has no such kernel")


def found_in(monkeypatch, path, core="Haswell"):
    monkeypatch.setattr(
        kernel, "blas", SimpleNamespace(controller=SimpleNamespace(filepath=str(path), architecture=core))
    )
    return kernel.find.__wrapped__()


@pytest.mark.skipif(not IS_WHEEL, reason="only NumPy's own packages for Linux are sure to have it")
def test_the_wheels_of_numpy_have_the_kernel():
    assert (kernel.find() is not None) == (blas.controller.architecture.lower() in kernel.CORES)


@pytest.mark.skipif(not IS_WHEEL, reason="an ELF file is needed")
def test_a_function_is_where_the_linker_says():
    library = ctypes.CDLL(LIBRARY)
    name = next(name for name in NAMES if hasattr(library, name))
    assert kernel.address(name, LIBRARY) == ctypes.cast(getattr(library, name), ctypes.c_void_p).value


@found_only
@pytest.mark.parametrize("n_rows", [8, 16, 24, 32])
@pytest.mark.parametrize("n_columns", [4, 8, 12, 20, 60])
@pytest.mark.parametrize("depth", [1, 7, 8, 64, 769])
def test_it_adds_the_product_and_touches_nothing_else(n_rows, n_columns, depth):
    rng = np.random.default_rng(depth)
    x, w = rng.standard_normal((n_rows, depth), np.float32), rng.standard_normal((depth, n_columns), np.float32)
    panels = np.ascontiguousarray(w.reshape(depth, -1, kernel.WIDTH).swapaxes(0, 1))
    packed = np.ascontiguousarray(x.reshape(-1, kernel.N_ROWS, depth).swapaxes(1, 2))
    around = np.full((n_columns + 20, n_rows), 5, np.float32)
    y = around[10:-10]
    kernel.find()(n_rows, n_columns, depth, 1, *map(ctypes.c_float.from_buffer, (packed, panels, y)), n_rows)
    assert (around[:10] == 5).all() and (around[-10:] == 5).all()
    np.testing.assert_allclose(y.T, x @ w + 5, rtol=0, atol=1e-5 * depth**0.5 + 1e-5)


@found_only
def test_numbers_that_are_not_finite_stay_in_their_row_and_column():
    x, w = np.ones((3, 8), np.float32), np.ones((8, 8), np.float32)
    x[1, 2], w[5, 7] = np.inf, np.nan
    matrix = Matrix(w, {}, 1)
    matrix.use(np.empty(panels_shape(w), np.float32))
    matrix.fill(matrix.parts[0])
    y = streamed(x, matrix)
    assert np.isinf(y[1, :7]).all() and np.isnan(y[:, 7]).all() and (y[::2, :7] == 8).all()


@found_only
def test_a_kernel_that_computes_something_else_is_not_used():
    right = kernel.find()
    assert kernel.is_right(right)
    assert not kernel.is_right(lambda *args: None)
    assert not kernel.is_right(lambda m, n, k, alpha, *rest: right(m, n, k, 2.0, *rest))
    assert not kernel.is_right(lambda m, n, k, *rest: right(m, n, k - 1, *rest))


def test_no_library_or_one_without_it_is_no_error(tmp_path, monkeypatch):
    whole = b""
    if IS_WHEEL:
        with open(LIBRARY, "rb") as f:
            whole = f.read()
    for i, content in enumerate(
        [b"", b"MZ", b"\x7fELF" + bytes(100), whole[:5000], whole[:-300], whole[: len(whole) // 2]]
    ):
        (tmp_path / str(i)).write_bytes(content)
        assert found_in(monkeypatch, tmp_path / str(i)) is None  # the whole one is not loaded from there either
    assert found_in(monkeypatch, tmp_path / "missing") is None
    monkeypatch.setattr(kernel, "NAME", "sgemm_kernel_OF_THE_FUTURE")
    assert found_in(monkeypatch, LIBRARY) is None
    monkeypatch.setattr(kernel, "blas", SimpleNamespace(controller=None))
    assert kernel.find.__wrapped__() is None


@pytest.mark.parametrize("core", ["Prescott", "Nehalem", "Sandybridge", "neoversen1", "unknown"])
def test_processors_without_avx2_never_run_it(core, monkeypatch):
    monkeypatch.setattr(kernel, "address", None)  # not even looked up
    assert found_in(monkeypatch, LIBRARY, core) is None


def test_without_the_kernel_other_panels_are_used(monkeypatch):
    monkeypatch.setattr(kernel, "find", lambda: None)
    whole = random_model(n_ctx=40)
    model, ids = shared_out(whole), [list(range(9))]
    assert all(part.panels.shape[3] != kernel.WIDTH for part in model.passes.weights.matrices[0].parts)
    expected = whole.forward(ids, whole.new_cache(), n_last=9)
    np.testing.assert_allclose(model.forward(ids, model.new_cache(), n_last=9), expected, rtol=0, atol=1e-4)
