"""OpenAI's TensorFlow checkpoints, mapped into memory without TensorFlow.

A checkpoint ("tensor bundle") is two files. PREFIX.index is a small table (table.py) from variable names to
BundleEntryProto messages: dtype, shape, offset, size and checksum. PREFIX.data-00000-of-00001 is the tensors
themselves, one after another. The data file is mapped and each variable is a view of it, so opening costs no more
than reading the index, and the pages of weights are read when they are first used.

Follows tensorflow/core/protobuf/tensor_bundle.proto. Other checkpoints of TensorFlow are read too: several data files
(shards), variables saved in slices, other numbers, which become float32 where they are floats. Left out: strings.
"""

import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from checkpoints import DOWNLOAD_AGAIN
from checkpoints.table import Damaged, mask_crc32c, message_fields, of_kind, single, table_entries
from checkpoints.weights import widened

BUNDLE_KEY = b""  # the table's first key holds the BundleHeaderProto
BYTE_ORDERS = "<>"  # by its number in the header
# What the numbers are by dtype (tensorflow/core/framework/types.proto). Quantised ones are integers; 24 to 33, of 8
# bits and less, are bytes here: NumPy has none of them.
BFLOAT16, DT_STRING, DT_VARIANT = 14, 7, 21
DTYPES = {1: "f4", 2: "f8", 3: "i4", 4: "u1", 5: "i2", 6: "i1", 8: "c8", 9: "i8", 10: "?", 11: "i1", 12: "u1", 13: "i4"}
DTYPES |= {BFLOAT16: "u2", 15: "i2", 16: "u2", 17: "u2", 18: "c16", 19: "f2", 22: "u4", 23: "u8"}
DTYPES |= dict.fromkeys(range(24, 34), "u1")
# What a file that means harm could ask for without end. 1558M's index has 20 kB and 1 to 3 dimensions.
MAX_INDEX_SIZE, MAX_DIMS = 1 << 20, 8

# ----------------------------------------------------------------------------------------------------------------------
# The index
# ----------------------------------------------------------------------------------------------------------------------


def ordered(number: int) -> bytes:
    """A signed number in a slice's key: bytes that sort as the numbers do (WriteSignedNumIncreasing)."""
    n = next(n for n in range(1, 11) if -1 << (7 * n - 1) <= number < 1 << (7 * n - 1))
    return ((((1 << n) - 1) << (7 * n)) ^ (number % (1 << (8 * n)))).to_bytes(n, "big")


@dataclass(slots=True)
class Slice:
    """A part of a variable, TensorSliceProto: where it starts and how long it is in each dimension, -1 to the end."""

    extents: list[tuple[int, int]]

    @staticmethod
    def parse(message: bytes) -> "Slice":
        extents = [message_fields(of_kind(extent, bytes)) for extent in message_fields(message).get(1, [])]
        if len(extents) > MAX_DIMS:
            raise Damaged(f"a slice of {len(extents)} dimensions, expected {MAX_DIMS} at most")
        return Slice([(single(e, 1, int), single(e, 2, int) if 2 in e else -1) for e in extents])

    def region(self) -> tuple[slice, ...]:
        return tuple(slice(start, None if length < 0 else start + length) for start, length in self.extents)

    def key(self, name: str) -> str:
        """Under which the index has the slice's own entry (tensorflow/core/util/saved_tensor_slice_util.cc)."""
        numbers = b"".join(ordered(n) for extent in self.extents for n in extent)
        escaped = name.encode().replace(b"\0", b"\0\xff")
        return key_name(b"\0" + escaped + b"\0\1" + b"\1" + bytes([len(self.extents)]) + numbers)


@dataclass(slots=True)
class Entry:
    """Where one variable, or a slice of one, lies: BundleEntryProto. A variable in slices has no bytes of its own."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    masked_crc32c: int
    slices: list[Slice] = field(default_factory=list)

    @staticmethod
    def parse(message: bytes) -> "Entry":
        fields = message_fields(message)
        dims = [message_fields(of_kind(dim, bytes)) for dim in message_fields(single(fields, 2, bytes)).get(2, [])]
        slices = [Slice.parse(of_kind(part, bytes)) for part in fields.get(7, [])]
        dtype, shard, offset, size, crc = (single(fields, number, int) for number in (1, 3, 4, 5, 6))
        return Entry(dtype, tuple(single(dim, 1, int) for dim in dims), shard, offset, size, crc, slices)

    def is_stored(self) -> bool:
        """Whether it is numbers in one piece."""
        return self.dtype in DTYPES and not self.slices

    def fits(self, size: int) -> bool:
        """Whether so many bytes hold this shape and dtype."""
        if len(self.shape) > MAX_DIMS:  # the product of a million dimensions takes minutes
            return False
        if self.dtype in (DT_STRING, DT_VARIANT):  # a byte or more each
            return math.prod(self.shape) <= size
        return self.dtype in DTYPES and size == np.dtype(DTYPES[self.dtype]).itemsize * math.prod(self.shape)


def key_name(key: bytes) -> str:
    """A key as text; those of slices begin with NUL and are none."""
    return key.decode("utf-8", "surrogateescape" if key.startswith(b"\0") else "strict")


def is_slice(name: str) -> bool:
    return name.startswith("\0")


def read_index(path: str) -> tuple[int, str, dict[str, Entry]]:
    """(number of shards, "<" or ">" for the byte order, entries by name) of an index file. ValueError: it is damaged.

    Among the names are those of slices, see `is_slice`.
    """
    with open(path, "rb") as f:
        table = f.read(MAX_INDEX_SIZE + 1)
    try:
        if len(table) > MAX_INDEX_SIZE:
            raise Damaged(f"more than {MAX_INDEX_SIZE} bytes")
        variables = table_entries(table)
        key, header = next(variables, (None, b""))
        if key != BUNDLE_KEY:
            raise Damaged("no bundle header, expected it as the first entry")
        fields = message_fields(header)
        entries: dict[str, Entry] = {}
        for key, value in variables:
            name = key_name(key)
            if name in entries:
                raise Damaged(f"two entries named {name}")
            entries[name] = Entry.parse(value)
        order = single(fields, 2, int)
        if order >= len(BYTE_ORDERS):
            raise Damaged(f"byte order {order}")
        return single(fields, 1, int), BYTE_ORDERS[order], entries
    except (Damaged, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged or no TensorFlow index: {e}; {DOWNLOAD_AGAIN}") from e


# ----------------------------------------------------------------------------------------------------------------------
# The data
# ----------------------------------------------------------------------------------------------------------------------


def data_path(prefix: str, shard: int = 0, n_shards: int = 1) -> str:
    return f"{prefix}.data-{shard:05}-of-{n_shards:05}"


def size_of(name: str, entry: Entry, entries: dict[str, Entry]) -> int:
    """The bytes of a variable, or of all its slices together."""
    keys = {part.key(name) for part in entry.slices}
    return sum(entries[key].size for key in keys if key in entries) if keys else entry.size


def check_layout(prefix: str, n_shards: int, entries: dict[str, Entry], path: str | None = None) -> None:
    """ValueError unless the entries lie side by side in their shard's file, each as large as its shape, and fill it.

    `path` is the one data file where it does not bear its final name yet.
    """
    index_path = prefix + ".index"
    ends: dict[int, int] = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        size = size_of(name, entry, entries)
        if not entry.fits(size) or entry.shard >= n_shards:
            raise ValueError(
                f"{index_path}: {name} has {size} bytes in shard {entry.shard}, expected those of shape "
                f"{list(entry.shape[:MAX_DIMS])} and dtype {entry.dtype} in one of {n_shards}; {DOWNLOAD_AGAIN}"
            )
        if entry.slices:
            continue
        end = ends.get(entry.shard, 0)
        if entry.offset < end:
            raise ValueError(
                f"{index_path}: {name} begins at byte {entry.offset}, expected {end} or later; {DOWNLOAD_AGAIN}"
            )
        ends[entry.shard] = entry.offset + entry.size
    if not any(ends.values()):
        raise ValueError(f"{index_path} names no variables that hold a number, expected a model's; {DOWNLOAD_AGAIN}")
    for shard, end in ends.items():
        shard_path = path or data_path(prefix, shard, n_shards)
        if n_shards > 1 and not os.path.exists(shard_path):
            raise ValueError(f"{shard_path} is missing, {index_path} has {n_shards} shards; copy it there")
        size = os.path.getsize(shard_path)
        if size != end:
            raise ValueError(f"{shard_path} has {size} bytes, expected {end} as its index says; {DOWNLOAD_AGAIN}")


def data_size(prefix: str) -> int:
    """The bytes of the data file, as the index has them."""
    return max((entry.offset + entry.size for entry in read_index(prefix + ".index")[2].values()), default=0)


def mapped(path: str) -> mmap.mmap | bytes:
    with open(path, "rb") as f:
        is_empty = not os.fstat(f.fileno()).st_size
        return b"" if is_empty else mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)


def kind_read(dtype: int) -> np.dtype:
    """What numbers of a dtype are once they are read: floats are float32."""
    return np.dtype("f4" if dtype == BFLOAT16 or DTYPES[dtype].startswith("f") else DTYPES[dtype])


def stored(entry: Entry, data: mmap.mmap | bytes, order: str) -> np.ndarray:
    """The numbers of an entry: a view of the file if they are float32 already."""
    kind = order + DTYPES[entry.dtype]
    array = np.frombuffer(data, kind, math.prod(entry.shape), entry.offset) if entry.size else np.empty(0, kind)
    if entry.dtype == BFLOAT16:
        array = widened(array)
    with np.errstate(over="ignore"):  # an infinite number is reported when it is used
        array = array.astype(kind_read(entry.dtype), copy=not array.flags.aligned)
    return array.reshape(entry.shape)


def joined(name: str, entry: Entry, arrays: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    """A variable of its slices, which are in `arrays` too. ValueError: they are not all of it."""
    whole, is_filled = np.zeros(entry.shape, kind_read(entry.dtype)), np.zeros(entry.shape, bool)
    for part in entry.slices:
        region, array = part.region(), arrays.get(part.key(name))
        if (
            array is None
            or len(region) != whole.ndim
            or (whole[region].shape, whole.dtype) != (array.shape, array.dtype)
        ):
            break
        whole[region], is_filled[region] = array, True
    if not is_filled.all():
        raise ValueError(f"{prefix}.index: the slices of {name} are not all of it; {DOWNLOAD_AGAIN}")
    return whole


def read_checkpoint(prefix: str) -> dict[str, np.ndarray]:
    """The variables of PREFIX.index and PREFIX.data-00000-of-00001 by name, float32[shape] each.

    They are read-only views of the mapped file, which must not be changed while they are in use. Of other checkpoints
    what is no float32, or in slices, is copied into memory; integers and complex numbers stay what they are.

    FileNotFoundError: a file is missing. ValueError: one is damaged.
    """
    n_shards, order, entries = read_index(prefix + ".index")
    check_layout(prefix, n_shards, entries)
    files: dict[int, mmap.mmap | bytes] = {}
    arrays = {}
    for name, entry in entries.items():
        if entry.is_stored():
            if entry.shard not in files:
                files[entry.shard] = mapped(data_path(prefix, entry.shard, n_shards))
            arrays[name] = stored(entry, files[entry.shard], order)
    for name, entry in entries.items():
        if entry.slices and entry.dtype in DTYPES:
            arrays[name] = joined(name, entry, arrays, prefix)
    return {name: array for name, array in arrays.items() if not is_slice(name)}


def chunks_of(path: str, offset: int, size: int) -> Iterator[bytes]:
    with open(path, "rb") as f:
        f.seek(offset)
        while size and (chunk := f.read(min(size, 1 << 20))):
            size -= len(chunk)
            yield chunk


def verify_checkpoint(prefix: str, path: str | None = None) -> None:
    """Compare every tensor's checksum with the index, with a progress bar on stderr; those of strings are left out.

    `path` is the one data file where it does not bear its final name yet. ValueError: the first tensor that differs.
    """
    import google_crc32c  # a C library at the speed of memory; reading does not need it
    from tqdm import tqdm

    n_shards, _, entries = read_index(prefix + ".index")
    if path and n_shards != 1:
        raise ValueError(f"{prefix}.index has {n_shards} shards, expected one; {DOWNLOAD_AGAIN}")
    check_layout(prefix, n_shards, entries, path)
    tensors = [item for item in entries.items() if item[1].is_stored()]
    total = sum(entry.size for _, entry in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", leave=False) as bar:
        for name, entry in sorted(tensors, key=lambda item: (item[1].shard, item[1].offset)):
            shard_path, crc = path or data_path(prefix, entry.shard, n_shards), 0
            for chunk in chunks_of(shard_path, entry.offset, entry.size):
                crc = google_crc32c.extend(crc, chunk)
                bar.update(len(chunk))
            if mask_crc32c(crc) != entry.masked_crc32c:
                raise ValueError(
                    f"{shard_path}: {name} has checksum {mask_crc32c(crc):#010x}, "
                    f"expected {entry.masked_crc32c:#010x}; {DOWNLOAD_AGAIN}"
                )
