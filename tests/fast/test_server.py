"""OpenBLAS's threads and kernel: found where NumPy has them, left alone where anything is not as expected."""

import ctypes
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import random_model, run, shared_out

import fast
from fast import kernels, server
from fast.panels import Matrix, panels_shape, streamed
from fast.symbols import addresses
from fast.threads import blas

pytest.importorskip("threadpoolctl", reason="without threadpoolctl NumPy's BLAS is not looked for")
LIBRARY = getattr(blas.controller, "filepath", "")
IS_WHEEL = sys.platform == "linux" and "scipy_openblas" in LIBRARY
NAMES = ("scipy_cblas_sgemm64_", "cblas_sgemm64_", "cblas_sgemm")
found_only = pytest.mark.skipif(not server.find(), reason="this BLAS has no such kernel")


def found_in(monkeypatch, path, core="Haswell", layer="pthreads"):
    library = SimpleNamespace(filepath=str(path), architecture=core, threading_layer=layer)
    monkeypatch.setattr(server, "blas", SimpleNamespace(controller=library))
    return server.find.__wrapped__()


@pytest.mark.skipif(not IS_WHEEL, reason="only NumPy's own packages for Linux are sure to have it")
def test_the_wheels_of_numpy_have_all_that_is_needed():
    assert (server.find() is not None) == (blas.controller.architecture.lower() in kernels.KERNELS)


@pytest.mark.skipif(not IS_WHEEL, reason="an ELF file is needed")
def test_a_function_is_where_the_linker_says():
    library = ctypes.CDLL(LIBRARY)
    name = next(name for name in NAMES if hasattr(library, name))
    assert addresses([name], LIBRARY) == [ctypes.cast(getattr(library, name), ctypes.c_void_p).value]


# ----------------------------------------------------------------------------------------------------------------------
# The kernel
# ----------------------------------------------------------------------------------------------------------------------


IDS = {
    kernels.LEFT: "left",
    kernels.LEFT_DEEP: "left, deep",
    kernels.RIGHT: "right",
    kernels.RIGHT_512: "right, AVX-512",
}
each_kernel = pytest.mark.parametrize("kernel", IDS, ids=IDS.get)


def server_with(kernel):
    """What hands it to OpenBLAS's threads, whether or not OpenBLAS would choose it for this processor."""
    with open("/proc/cpuinfo") as f:
        if kernel == kernels.RIGHT_512 and " avx512f " not in f.read():
            pytest.skip("this processor has no AVX-512")
    routine, *others = addresses([kernel.name, *server.OTHERS], LIBRARY)
    return server.Server({kernel: routine}, server.find().layout, *others)


@found_only
@each_kernel
@pytest.mark.parametrize("n_rows", [1, 2, 3, 4, 8, 9, 16, 24, 32, 48])
@pytest.mark.parametrize("n_panels", [1, 2, 3, 5, 15])
@pytest.mark.parametrize("depth", [1, 7, 8, 64, 769])
def test_it_adds_the_product_and_touches_nothing_else(n_rows, n_panels, depth, kernel):
    rng, n_columns = np.random.default_rng(depth), n_panels * kernel.width
    x, w = rng.standard_normal((n_rows, depth), np.float32), rng.standard_normal((depth, n_columns), np.float32)
    panels = np.array(w.reshape(1, depth, n_panels, kernel.width).swapaxes(1, 2), order="C")
    blocks = kernels.side_by_side(x, kernel, 1)
    n_rows = blocks.size // depth  # with those of zeros
    around = np.full(2000 + n_rows * n_columns, 5, np.float32)
    y = around[1000:-1000].reshape((n_rows, n_columns) if kernel.is_left else (n_columns, n_rows))
    jobs = kernels.jobs_of(kernel, panels, [slice(0, n_panels)])
    server_with(kernel).multiply(kernel, blocks.ctypes.data, n_rows, y.ctypes.data, jobs)
    assert (around[:1000] == 5).all() and (around[-1000:] == 5).all()
    y = (y if kernel.is_left else y.T)[: len(x)]
    np.testing.assert_allclose(y, x @ w + 5, rtol=0, atol=1e-5 * depth**0.5 + 1e-5)


@found_only
@pytest.mark.parametrize("kernel", server.find().kernels if server.find() else ())
def test_numbers_that_are_not_finite_stay_in_their_row_and_column(kernel):
    x, w = np.ones((3, 8), np.float32), np.ones((8, 8), np.float32)
    x[1, 2], w[5, 7] = np.inf, np.nan
    matrix = Matrix(w, {})
    matrix.use(kernel, np.empty(panels_shape(w, kernel), np.float32), 1)
    matrix.fill(matrix.parts[0])
    y = streamed(x, matrix)
    assert np.isinf(y[1, :7]).all() and np.isnan(y[:, 7]).all() and (y[::2, :7] == 8).all()


# ----------------------------------------------------------------------------------------------------------------------
# What is not as expected
# ----------------------------------------------------------------------------------------------------------------------


@found_only
@each_kernel
@pytest.mark.parametrize("argument", [kernels.A, kernels.C, kernels.M, kernels.N, kernels.K, kernels.B])
def test_a_kernel_that_computes_something_else_is_not_used(argument, kernel, monkeypatch):
    right, jobs_of = server_with(kernel), server.jobs_of
    assert server.is_right(right, kernel)

    def other_jobs(*args):
        jobs = jobs_of(*args)
        is_address = argument in (kernels.A, kernels.C, kernels.B)
        jobs[-1, -1, argument, 0] += 4 if is_address else -1  # the next number, or one less
        return jobs

    monkeypatch.setattr(server, "jobs_of", other_jobs)
    assert not server.is_right(right, kernel)


@found_only
@pytest.mark.parametrize("layout", [(8, 20), (9, 21), (8, 21), (9, 20), (10, 22), (11, 12)])
def test_jobs_arrive_with_the_layout_of_this_library_alone(layout):
    right = server.find()
    pointers = [server.address_of(function) for function in (right.execute, right.start, right.wait)]
    other = server.Server(right.kernels, layout, *pointers, ctypes.addressof(right.n_started))
    assert server.arrive(other) == (layout == right.layout)


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
    unknown = {"haswell": [kernels.LEFT._replace(name="sgemm_kernel_OF_THE_FUTURE")]}
    for name, value in (("KERNELS", unknown), ("LAYOUTS", [(10, 22)])):
        with monkeypatch.context() as patched:
            patched.setattr(server, name, value)
            assert found_in(patched, LIBRARY) is None
    monkeypatch.setattr(server, "blas", SimpleNamespace(controller=None))
    assert server.find.__wrapped__() is None


@found_only
def test_a_kernel_that_is_missing_or_wrong_leaves_the_others(monkeypatch):
    ours = [kernels.RIGHT._replace(name="sgemm_kernel_OF_THE_FUTURE"), kernels.RIGHT, kernels.LEFT]
    monkeypatch.setattr(server, "KERNELS", {"haswell": ours})
    assert list(found_in(monkeypatch, LIBRARY).kernels) == [kernels.RIGHT, kernels.LEFT]
    monkeypatch.setattr(server, "is_right", lambda _, kernel: kernel == kernels.LEFT)
    assert list(found_in(monkeypatch, LIBRARY).kernels) == [kernels.LEFT]
    monkeypatch.setattr(server, "is_right", lambda *_: False)
    assert found_in(monkeypatch, LIBRARY) is None


@found_only
def test_without_the_loop_of_numpy_nothing_is_handed_over(monkeypatch):
    monkeypatch.setattr(server, "pythonapi", SimpleNamespace())  # as where Python is another one
    assert found_in(monkeypatch, LIBRARY, blas.controller.architecture) is None


@pytest.mark.parametrize(
    ("core", "layer"),
    [("Prescott", "pthreads"), ("Nehalem", "pthreads"), ("neoversen1", "pthreads"), ("Haswell", "openmp")],
)
def test_other_processors_and_other_threads_are_not_even_looked_at(core, layer, monkeypatch):
    monkeypatch.setattr(server, "addresses", None)
    assert found_in(monkeypatch, LIBRARY, core, layer) is None


def test_without_it_products_are_plain(monkeypatch):
    monkeypatch.setattr(fast, "find", lambda: None)
    whole = random_model(n_ctx=40)
    model, ids = shared_out(whole), [list(range(9))]
    assert not model.passes.weights.is_packed and model.passes.few_rows_pay(1)
    assert model.passes.weights.report == "none, NumPy's BLAS has no kernel for them here"
    expected = whole.forward(ids, whole.new_cache(), n_last=9)
    np.testing.assert_allclose(model.forward(ids, model.new_cache(), n_last=9), expected, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Beside other threads of a program
# ----------------------------------------------------------------------------------------------------------------------


@found_only
def test_a_number_of_threads_set_meanwhile_leaves_no_product_waiting():
    """A product on a thread in use wants threads of BLAS then, of which none would be idle."""
    code = """if True:
        import sys, threading
        sys.path.insert(0, "tests")
        import numpy as np
        from fast.threads import blas, team
        ended = threading.Event()

        def meddle():
            while not ended.is_set():
                blas.set(2)

        meddling = threading.Thread(target=meddle, daemon=True)
        meddling.start()
        x = np.ones((200, 200), np.float32)
        with team.of(2):
            for _ in range(200):
                assert all((y == 200).all() for y in team.run([lambda: x @ x] * 2))
        ended.set()
        meddling.join()
    """
    assert run("-c", code, env={"OPENBLAS_NUM_THREADS": "2"}).stderr == ""


@found_only
def test_passes_of_several_threads_share_blas_threads():
    model, ids = shared_out(random_model(n_ctx=130)), [list(range(40))]
    expected, found = model.forward(ids, model.new_cache(), 40), []

    def feed():
        for n in (3, 40, 9) * 5:
            logits = model.forward([ids[0][:n]], model.new_cache(), n)
            found.append(np.abs(logits - expected[:, :n]).max())

    feeders = [threading.Thread(target=feed, daemon=True) for _ in range(4)]
    for feeder in feeders:
        feeder.start()
    for feeder in feeders:
        feeder.join(60)
    assert len(found) == 60 and max(found) < 1e-4 and not server.calls
