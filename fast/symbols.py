"""Where the functions of a loaded library lie that it does not export: its symbol tables say so (ELF)."""

import mmap
import struct

import numpy as np

SYMBOL_TABLES = (2, 11)  # types of sections (ELF-64 Object File Format 1.5, table 8)
SECTION = np.dtype("u4, u4, u8, u8, u8, u8, u4, u4, u8, u8").newbyteorder("<")
SECTION.names = "name", "type", "flags", "address", "offset", "size", "link", "info", "align", "entry_size"
SYMBOL = np.dtype("u4, u1, u1, u2, u8, u8").newbyteorder("<")
SYMBOL.names = "name", "info", "other", "section", "value", "size"


def ends_with(name: str, library, start: int, stop: int) -> list[int]:
    """Where names lie that end with this one: linkers let a name be the end of another."""
    found, wanted = [], name.encode() + b"\0"
    while (start := library.find(wanted, start, stop)) >= 0:
        found.append(start)
        start += 1
    return found


def symbol_value(name: str, library) -> int:
    """Where a name lies in the bytes of a shared library.

    LookupError, ValueError, struct.error: it has none of that name, or is no 64-bit ELF file.
    """
    (offset,), (n_sections,) = struct.unpack_from("<Q", library, 0x28), struct.unpack_from("<H", library, 0x3C)
    sections = np.frombuffer(library, SECTION, n_sections, offset)
    for table in sections[np.isin(sections["type"], SYMBOL_TABLES)]:
        start, size = (int(sections[table["link"]][field]) for field in ("offset", "size"))  # of all names
        symbols = np.frombuffer(library, SYMBOL, table["size"] // SYMBOL.itemsize, table["offset"])
        named = np.isin(symbols["name"], [i - start for i in ends_with(name, library, start, start + size)])
        values = symbols["value"][named & (symbols["section"] > 0)]  # in a section: not another library's
        if len(values):
            return int(values[0])
    raise KeyError(name)


def addresses(names: list[str], path: str) -> list[int]:
    """Where they lie in a library that this process has loaded. Errors as above, or OSError: nowhere."""
    with open("/proc/self/maps") as f:
        base = min(int(line.split("-")[0], 16) for line in f if line.rstrip().endswith(path))
    with open(path, "rb") as f:
        library = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)  # a tenth of the time that reading it takes
    return [base + symbol_value(name, library) for name in names]
