"""OpenAI's TensorFlow checkpoints, mapped into memory without TensorFlow.

A checkpoint ("tensor bundle") is two files. PREFIX.index is a small table (table.py) from variable names to
BundleEntryProto messages: dtype, shape, offset, size and checksum. PREFIX.data-00000-of-00001 is the tensors
themselves, one after another. The data file is mapped and each variable is a view of it, so opening costs no more
than reading the index, and the pages of weights are read when they are first used.

Follows tensorflow/core/protobuf/tensor_bundle.proto. What cannot be mapped (several shards, variables in slices, dtypes
other than float32) is left to TensorFlow itself.
"""

import math
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from checkpoints import DOWNLOAD_AGAIN
from checkpoints.table import Damaged, mask_crc32c, message_fields, single, table_entries

BUNDLE_KEY = b""  # the table's first key holds the BundleHeaderProto
SLICE_KEY = b"\0"  # begins the key of a slice: this, the variable's name, SLICE_NAME_END, and which part it is
SLICE_NAME_END = "\0\1"
DT_FLOAT, DT_STRING, DT_VARIANT, LITTLE_ENDIAN = 1, 7, 21, 0
DTYPES_OF_SIZE = {  # by the bytes of one number (tensorflow/core/framework/types.proto)
    1: (4, 6, 10, 11, 12, *range(24, 34)),
    2: (5, 14, 15, 16, 17, 19),
    4: (DT_FLOAT, 3, 13, 22),
    8: (2, 8, 9, 23),
    16: (18,),
}
ITEM_SIZES = {dtype: size for size, dtypes in DTYPES_OF_SIZE.items() for dtype in dtypes}
# What a file that means harm could ask for without end. 1558M's index has 20 kB and 1 to 3 dimensions.
MAX_INDEX_SIZE, MAX_DIMS = 1 << 20, 8

# ----------------------------------------------------------------------------------------------------------------------
# The index
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Entry:
    """Where one variable lies: BundleEntryProto."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    masked_crc32c: int
    is_sliced: bool

    @staticmethod
    def parse(message: bytes) -> "Entry":
        fields = message_fields(message)
        shape = []
        for dim in message_fields(single(fields, 2, bytes)).get(2, []):
            if not isinstance(dim, bytes):
                raise Damaged("a shape whose dimension is no message")
            shape.append(single(message_fields(dim), 1, int))
        dtype, shard, offset, size, crc = (single(fields, number, int) for number in (1, 3, 4, 5, 6))
        return Entry(dtype, tuple(shape), shard, offset, size, crc, is_sliced=7 in fields)

    def is_of_numbers(self) -> bool:
        return self.dtype in ITEM_SIZES

    def fits(self, size: int) -> bool:
        """Whether so many bytes hold this shape and dtype."""
        if len(self.shape) > MAX_DIMS:  # the product of a million dimensions takes minutes
            return False
        if self.dtype in (DT_STRING, DT_VARIANT):  # a byte or more each
            return math.prod(self.shape) <= size
        return self.is_of_numbers() and size == ITEM_SIZES[self.dtype] * math.prod(self.shape)


def read_index(path: str) -> tuple[int, int, dict[str, Entry]]:
    """(number of shards, byte order, entries by name) of an index file. ValueError: it is damaged.

    The entries are those of the variables, and of the slices of those that were saved in parts: see `is_slice`.
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
            name = key.decode("utf-8", "surrogateescape" if key.startswith(SLICE_KEY) else "strict")
            if name in entries:
                raise Damaged(f"two entries named {name}")
            entries[name] = Entry.parse(value)
        return single(fields, 1, int), single(fields, 2, int), entries
    except (Damaged, UnicodeDecodeError) as e:
        raise ValueError(f"{path} is damaged or no TensorFlow index: {e}; {DOWNLOAD_AGAIN}") from e


# ----------------------------------------------------------------------------------------------------------------------
# The data
# ----------------------------------------------------------------------------------------------------------------------


def data_path(prefix: str, shard: int = 0, n_shards: int = 1) -> str:
    return f"{prefix}.data-{shard:05}-of-{n_shards:05}"


def is_slice(name: str) -> bool:
    return name.startswith(SLICE_KEY.decode())


def slice_sizes(entries: dict[str, Entry]) -> dict[str, int]:
    """The bytes of each variable that was saved in slices, all of them together."""
    sizes = {name: 0 for name, entry in entries.items() if entry.is_sliced}
    for key, entry in entries.items():
        name = key[1:].partition(SLICE_NAME_END)[0]
        if is_slice(key) and name in sizes:
            sizes[name] += entry.size
    return sizes


def why_not_mappable(n_shards: int, byte_order: int, entries: dict[str, Entry]) -> str | None:
    """What only TensorFlow can read, in words; None for OpenAI's files."""
    if n_shards != 1:
        return f"{n_shards} shards"
    if byte_order != LITTLE_ENDIAN:
        return "big-endian numbers"
    for name, entry in entries.items():
        if entry.dtype != DT_FLOAT or entry.is_sliced:
            return f"{name} as {'slices' if entry.is_sliced else f'dtype {entry.dtype}'}, not float32"
    return None


def check_layout(prefix: str, n_shards: int, entries: dict[str, Entry], path: str | None = None) -> None:
    """ValueError unless the entries lie side by side in their shard's file, each as large as its shape, and fill it.

    `path` is the one data file where it does not bear its final name yet.
    """
    index_path = prefix + ".index"
    sizes, ends = slice_sizes(entries), {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        size = sizes.get(name, entry.size)
        if not entry.fits(size) or entry.shard >= n_shards:
            raise ValueError(
                f"{index_path}: {name} has {size} bytes in shard {entry.shard}, expected those of shape "
                f"{list(entry.shape[:MAX_DIMS])} and dtype {entry.dtype} in one of {n_shards}; {DOWNLOAD_AGAIN}"
            )
        if entry.is_sliced:
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


def read_checkpoint(prefix: str) -> dict[str, np.ndarray]:
    """The variables of PREFIX.index and PREFIX.data-00000-of-00001 by name, float32[shape] each.

    They are read-only views of the mapped file, which must not be changed while they are in use. A checkpoint that
    cannot be mapped is read through TensorFlow, into memory, where that is installed.

    FileNotFoundError: a file is missing. ValueError: one is damaged, or needs TensorFlow.
    """
    n_shards, byte_order, entries = read_index(prefix + ".index")
    check_layout(prefix, n_shards, entries)
    if reason := why_not_mappable(n_shards, byte_order, entries):
        numbers = [name for name, entry in entries.items() if entry.is_of_numbers() and not is_slice(name)]
        return read_with_tensorflow(prefix, numbers, reason)
    with open(data_path(prefix), "rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: np.frombuffer(mapped, "<f4", math.prod(entry.shape), entry.offset).reshape(entry.shape)
        for name, entry in entries.items()
    }


def read_with_tensorflow(prefix: str, names: list[str], reason: str) -> dict[str, np.ndarray]:
    """Variables of any checkpoint that TensorFlow can read; floating-point ones become float32."""
    try:
        import tensorflow as tf  # needed for foreign checkpoints only, and takes seconds to import
    except ImportError as e:
        raise ValueError(
            f"{prefix}.index has {reason}: it cannot be mapped, and reading it needs TensorFlow; pip install tensorflow"
        ) from e
    try:
        reader = tf.train.load_checkpoint(prefix)
        arrays = {name: reader.get_tensor(name) for name in names}
    except (tf.errors.OpError, ValueError, RuntimeError) as e:
        raise ValueError(f"{prefix}: TensorFlow cannot read it: {str(e).splitlines()[0]}; {DOWNLOAD_AGAIN}") from e
    floats = {name for name, dtype in reader.get_variable_to_dtype_map().items() if dtype.is_floating}
    return {name: array.astype(np.float32) if name in floats else array for name, array in arrays.items()}


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
    stored = [item for item in entries.items() if item[1].is_of_numbers() and not item[1].is_sliced]
    total = sum(entry.size for _, entry in stored)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", leave=False) as bar:
        for name, entry in sorted(stored, key=lambda item: (item[1].shard, item[1].offset)):
            shard_path, crc = path or data_path(prefix, entry.shard, n_shards), 0
            for chunk in chunks_of(shard_path, entry.offset, entry.size):
                crc = google_crc32c.extend(crc, chunk)
                bar.update(len(chunk))
            if mask_crc32c(crc) != entry.masked_crc32c:
                raise ValueError(
                    f"{shard_path}: {name} has checksum {mask_crc32c(crc):#010x}, "
                    f"expected {entry.masked_crc32c:#010x}; {DOWNLOAD_AGAIN}"
                )
