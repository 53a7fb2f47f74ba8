"""OpenBLAS's inner kernel for AVX2, called directly on weights that lie as it reads them.

Before BLAS calls this kernel, it copies ("packs") both matrices of a product, and while it packs it computes nothing:
for few rows that takes longer than the product. NumPy has no way to keep the packed copy. But the kernel is a function
of NumPy's own library, so it is looked up there, and called on a copy of the weights that was made once: they stream
from memory through the kernel, and 8 rows take as long as one (docs/performance.md).

Its interface is that of kernel/x86_64/sgemm_kernel_8x4_haswell_2.c in OpenBLAS. It reads and writes nothing but the
three matrices. Where it is not found, or a product with it is wrong, `find` returns None, and panels.py has other ways.
"""

import struct
from ctypes import CFUNCTYPE, POINTER, c_float, c_int, c_int64
from functools import lru_cache, partial

import numpy as np

from fast.threads import blas

NAME = "sgemm_kernel_HASWELL"
CORES = {"haswell", "zen", "skylakex", "cooperlake", "sapphirerapids"}  # OpenBLAS's names of those that have AVX2
MAX_DEPTH = 1600  # rows of w in a panel
N_ROWS, WIDTH = 8, 4  # rows of x and columns of w that lie side by side
SYMBOL_TABLES, FUNCTION = (2, 11), 2  # types of sections and of symbols (ELF-64 Object File Format 1.5, tables 8, 16)
SECTION = np.dtype("u4, u4, u8, u8, u8, u8, u4, u4, u8, u8").newbyteorder("<")
SECTION.names = "name", "type", "flags", "address", "offset", "size", "link", "info", "align", "entry_size"
SYMBOL = np.dtype("u4, u1, u1, u2, u8, u8").newbyteorder("<")
SYMBOL.names = "name", "info", "other", "section", "value", "size"


def symbol_value(name: str, library: bytes) -> int:
    """Where a function begins in a shared library, from its symbol tables.

    LookupError, ValueError, struct.error: it has none of that name, or is no 64-bit ELF file.
    """
    (offset,), (n_sections,) = struct.unpack_from("<Q", library, 0x28), struct.unpack_from("<H", library, 0x3C)
    sections = np.frombuffer(library, SECTION, n_sections, offset)
    for table in sections[np.isin(sections["type"], SYMBOL_TABLES)]:
        start, size = (int(sections[table["link"]][field]) for field in ("offset", "size"))  # of all names
        at = library.find(b"\0" + name.encode() + b"\0", start, start + size) + 1
        symbols = np.frombuffer(library, SYMBOL, table["size"] // SYMBOL.itemsize, table["offset"])
        is_ours = (symbols["section"] > 0) & (symbols["info"] % 16 == FUNCTION)  # in a section: not another library's
        values = symbols["value"][is_ours & (symbols["name"] == max(0, at - start))]
        if at and len(values):
            return int(values[0])
    raise KeyError(name)


def address(name: str, path: str) -> int:
    """Where a function of a library lies that this process has loaded. Errors as above, or OSError: nowhere."""
    with open(path, "rb") as f:
        value = symbol_value(name, f.read())
    with open("/proc/self/maps") as f:
        return value + min(int(line.split("-")[0], 16) for line in f if line.rstrip().endswith(path))


def n_deep(n_in: int) -> int:
    """Into how many pieces panels are cut: the kernel rounds after each product, so errors grow with the depth.

    Less than 600 deep, panels take longer: each is a new run for the processor to fetch ahead.
    """
    return next((n for n in range(1, 17) if n_in % n == 0 and n_in // n <= MAX_DEPTH), 1)


def side_by_side(x, n_deep):  # [n_rows, n_in] -> [n_deep, n_blocks, n_in / n_deep, 1, 2, 4 or 8]: rows, then zeros
    n_lanes = min(N_ROWS, 1 << (len(x) - 1).bit_length())
    if n_more := -len(x) % n_lanes:
        x = np.concatenate([x, np.zeros((n_more, x.shape[1]), x.dtype)])
    return np.array(x.reshape(-1, n_lanes, n_deep, x.shape[1] // n_deep).transpose(2, 0, 3, 1), order="C")


def pointers(pieces) -> list:  # contiguous arrays
    return [c_float.from_buffer(piece) for piece in pieces]  # a pointer of x.ctypes.data takes twice as long


def products(kernel, depth, x, panels, y):
    # pointers to [n_blocks, depth, n_lanes] and [n_panels, depth, WIDTH], n_deep each; [n_columns, n_blocks * n_lanes]
    """What to call so that the products of x and the panels are added to y."""
    n_rows, n_columns, [total] = y.shape[1], len(y), pointers([y])
    return [partial(kernel, n_rows, n_columns, depth, 1, *pair, total, n_rows) for pair in zip(x, panels, strict=True)]


def is_right(kernel) -> bool:
    rng = np.random.default_rng(0)
    for n_rows, n_deep, n_panels, depth in ((8, 1, 7, 40), (24, 2, 6, 33), (16, 1, 1, 100)):
        x = rng.standard_normal((n_rows, n_deep * depth), np.float32)
        panels = rng.standard_normal((n_deep, n_panels, depth, WIDTH), np.float32)
        w = panels.swapaxes(1, 2).reshape(n_deep * depth, n_panels * WIDTH)
        y = np.zeros((n_panels * WIDTH, n_rows), np.float32)
        for product in products(kernel, depth, pointers(side_by_side(x, n_deep)), pointers(panels), y):
            product()
        if not np.allclose(y.T, x @ w, rtol=0, atol=1e-4):
            return False
    return True


@lru_cache(maxsize=1)
def find():
    """The kernel, or None."""
    library = blas.controller
    if getattr(library, "architecture", "").lower() not in CORES:
        return None
    interface = CFUNCTYPE(c_int, *[c_int64] * 3, c_float, *[POINTER(c_float)] * 3, c_int64)
    try:
        kernel = interface(address(NAME, library.filepath))
    except (OSError, LookupError, ValueError, struct.error):
        return None
    return kernel if is_right(kernel) else None
