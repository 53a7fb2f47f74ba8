"""OpenAI's TensorFlow checkpoints, mapped into memory without TensorFlow.

A checkpoint ("tensor bundle") is two files. PREFIX.index is a small LevelDB table from variable names to
BundleEntryProto messages: dtype, shape, offset, size and checksum. PREFIX.data-00000-of-00001 is the tensors
themselves, one after another. The data file is mapped and each variable is a view of it, so opening costs no more
than reading the index, and the pages of weights are read when they are first used.

Follows tensorflow/core/protobuf/tensor_bundle.proto and tensorflow/core/lib/io/table_format.txt. What cannot be
mapped (several shards, dtypes other than float32) is left to TensorFlow itself.
"""

import math
import mmap
import os
from dataclasses import dataclass

import numpy as np

from checkpoints import DOWNLOAD_AGAIN

BUNDLE_KEY = b""  # the table's first key holds the BundleHeaderProto
DT_FLOAT, DT_STRING, LITTLE_ENDIAN = 1, 7, 0
# Bytes of one number by dtype (tensorflow/core/framework/types.proto): the floats, integers and booleans.
ITEM_SIZES = {DT_FLOAT: 4, 2: 8, 3: 4, 4: 1, 5: 2, 6: 1, 9: 8, 10: 1, 14: 2, 17: 2, 19: 2, 22: 4, 23: 8}
# What a file that means harm could ask for without end. 1558M's index has 20 kB, names of 25 bytes, 1 to 3 dimensions.
MAX_INDEX_SIZE, MAX_NAME, MAX_DIMS = 1 << 20, 512, 8

# ----------------------------------------------------------------------------------------------------------------------
# crc32c, as TensorFlow stores it
# ----------------------------------------------------------------------------------------------------------------------


def crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(c >> 1) ^ (0x82F63B78 if c & 1 else 0) for c in table]  # Castagnoli's polynomial, bits reversed
    return table


CRC32C_TABLE = crc32c_table()


def crc32c(data: bytes) -> int:
    """The checksum of a few kilobytes of index. Tensors go through google-crc32c, which reading does not need."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = CRC32C_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def mask_crc32c(crc: int) -> int:
    """Checksums are stored rotated by 15 bits plus a constant (tensorflow/core/lib/hash/crc32c.h)."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


# ----------------------------------------------------------------------------------------------------------------------
# The index: a LevelDB table of protocol buffers
# ----------------------------------------------------------------------------------------------------------------------

TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_SIZE = 48
BLOCK_TRAILER_SIZE = 5  # compression type and masked crc32c


class Damaged(Exception):
    """Bytes that are not what the format says; callers add the file's name."""


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """(value, position after it) of a base-128 number of at most 64 bits."""
    value = shift = 0
    while at < len(data) and shift < 64:
        value |= (data[at] & 0x7F) << shift
        shift += 7
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise Damaged(f"a number that does not end at byte {at}")


def take(data: bytes, at: int, size: int) -> tuple[bytes, int]:
    if at + size > len(data):
        raise Damaged(f"{size} bytes wanted at byte {at} of {len(data)}")
    return data[at : at + size], at + size


def read_block(table: bytes, handle: bytes, start: int = 0) -> tuple[bytes, int]:
    """(entries, end) of the block that `handle` (offset, size) points to, from `start` on, its checksum verified."""
    offset, at = read_varint(handle, 0)
    size, _ = read_varint(handle, at)
    if offset < start:
        raise Damaged(f"block at byte {offset} begins within the one before, which ends at {start}")
    block, at = take(table, offset, size)
    trailer, _ = take(table, at, BLOCK_TRAILER_SIZE)
    expected, found = int.from_bytes(trailer[1:], "little"), mask_crc32c(crc32c(block + trailer[:1]))
    if expected != found:
        raise Damaged(f"block at byte {offset} has checksum {found:#010x}, expected {expected:#010x}")
    if trailer[0] != 0:
        raise Damaged(f"block at byte {offset} is compressed (type {trailer[0]}), which no TensorFlow checkpoint is")
    n_restarts = int.from_bytes(block[-4:], "little")
    entries_size = len(block) - 4 - 4 * n_restarts
    if entries_size < 0:
        raise Damaged(f"block at byte {offset} has {n_restarts} restart points in {len(block)} bytes")
    return block[:entries_size], at + BLOCK_TRAILER_SIZE


def block_entries(block: bytes):
    """Yield (key, value); each key leaves out what it shares with the one before."""
    at, key = 0, b""
    while at < len(block):
        n_shared, at = read_varint(block, at)
        n_key, at = read_varint(block, at)
        n_value, at = read_varint(block, at)
        if n_shared > len(key):
            raise Damaged(f"a key shares {n_shared} bytes with one of {len(key)}")
        if n_shared + n_key > MAX_NAME:
            raise Damaged(f"a key of {n_shared + n_key} bytes, expected {MAX_NAME} at most")
        suffix, at = take(block, at, n_key)
        value, at = take(block, at, n_value)
        key = key[:n_shared] + suffix
        yield key, value


def table_entries(table: bytes):
    """Yield (key, value) of a whole LevelDB table."""
    if len(table) < FOOTER_SIZE:
        raise Damaged(f"{len(table)} bytes, expected a TensorFlow index of {FOOTER_SIZE} or more")
    footer = table[-FOOTER_SIZE:]
    magic = int.from_bytes(footer[-8:], "little")
    if magic != TABLE_MAGIC:
        raise Damaged(f"ends in {magic:#018x}, expected a TensorFlow index, which ends in {TABLE_MAGIC:#018x}")
    read_block(table, footer)  # the meta-index, empty in a bundle
    _, at = read_varint(footer, 0)
    _, at = read_varint(footer, at)
    index, _ = read_block(table, footer[at:])
    end = 0
    for _, handle in block_entries(index):
        block, end = read_block(table, handle, end)  # each after the last: read again and again, one could take hours
        yield from block_entries(block)


def message_fields(message: bytes) -> dict[int, list]:
    """Field number -> values of a protocol buffer message: int for numbers, bytes for the rest, undecoded."""
    fields: dict[int, list] = {}
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        wire_type = tag & 7
        if wire_type == 0:
            value, at = read_varint(message, at)
        elif wire_type == 2:
            size, at = read_varint(message, at)
            value, at = take(message, at, size)
        elif wire_type in (1, 5):
            raw, at = take(message, at, 8 if wire_type == 1 else 4)
            value = int.from_bytes(raw, "little")
        else:
            raise Damaged(f"a message field of unknown wire type {wire_type}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def single(fields: dict[int, list], number: int, kind: type):
    """The last value of a field, as protocol buffers have it; 0 or b"" where it is absent."""
    value = fields.get(number, [kind()])[-1]
    if not isinstance(value, kind):
        raise Damaged(f"message field {number} is no {kind.__name__}")
    return value


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

    def is_as_large_as_its_shape(self) -> bool:
        if len(self.shape) > MAX_DIMS or not self.size:  # the product of a million dimensions takes minutes
            return False
        if self.dtype == DT_STRING:  # a byte or more each
            return math.prod(self.shape) <= self.size
        return self.size == ITEM_SIZES.get(self.dtype, 0) * math.prod(self.shape)


def read_index(path: str) -> tuple[int, int, dict[str, Entry]]:
    """(number of shards, byte order, entries by variable name) of an index file. ValueError: it is damaged."""
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
            name = key.decode("utf-8")
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
    if not entries:
        raise ValueError(f"{index_path} names no variables, expected a model's; {DOWNLOAD_AGAIN}")
    ends: dict[int, int] = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].size)):
        if not entry.is_as_large_as_its_shape() or entry.shard >= n_shards:
            raise ValueError(
                f"{index_path}: {name} has {entry.size} bytes in shard {entry.shard}, expected those of shape "
                f"{list(entry.shape[:MAX_DIMS])} and dtype {entry.dtype} in one of {n_shards}; {DOWNLOAD_AGAIN}"
            )
        end = ends.get(entry.shard, 0)
        if entry.offset < end:
            raise ValueError(
                f"{index_path}: {name} begins at byte {entry.offset}, expected {end} or later; {DOWNLOAD_AGAIN}"
            )
        ends[entry.shard] = entry.offset + entry.size
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
        numbers = [name for name, entry in entries.items() if entry.dtype != DT_STRING]
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


def verify_checkpoint(prefix: str, path: str | None = None) -> None:
    """Compare every tensor's checksum with the index, with a progress bar on stderr.

    `path` is the data file where it does not bear its final name yet. ValueError: the first tensor that differs, or
    a checkpoint of several shards or other dtypes.
    """
    import google_crc32c  # a C library at the speed of memory; reading does not need it
    from tqdm import tqdm

    path = path or data_path(prefix)
    n_shards, byte_order, entries = read_index(prefix + ".index")
    if reason := why_not_mappable(n_shards, byte_order, entries):
        raise ValueError(f"{prefix}.index has {reason}: its checksums cannot be compared; convert it to float32")
    check_layout(prefix, n_shards, entries, path)
    total = sum(entry.size for entry in entries.values())
    with open(path, "rb") as f, tqdm(total=total, unit="B", unit_scale=True, desc="verify", leave=False) as bar:
        for name, entry in sorted(entries.items(), key=lambda item: item[1].offset):
            f.seek(entry.offset)
            crc, n_left = 0, entry.size
            while n_left and (chunk := f.read(min(n_left, 1 << 20))):
                crc = google_crc32c.extend(crc, chunk)
                n_left -= len(chunk)
                bar.update(len(chunk))
            if mask_crc32c(crc) != entry.masked_crc32c:
                raise ValueError(
                    f"{path}: {name} has checksum {mask_crc32c(crc):#010x}, "
                    f"expected {entry.masked_crc32c:#010x}; {DOWNLOAD_AGAIN}"
                )
