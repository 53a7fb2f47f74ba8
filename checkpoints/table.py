"""LevelDB tables of protocol buffer messages, as TensorFlow's indexes are: keys to values, the values undecoded.

Follows tensorflow/core/lib/io/table_format.txt. Left out: compressed blocks, looking up one key.
"""

from checkpoints import Damaged

MAX_NAME = 512  # bytes of a key; without a limit, keys that share most of others could ask for gigabytes

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
# The table
# ----------------------------------------------------------------------------------------------------------------------

TABLE_MAGIC = 0xDB4775248B80FB57
FOOTER_SIZE = 48
BLOCK_TRAILER_SIZE = 5  # compression type and masked crc32c


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


# ----------------------------------------------------------------------------------------------------------------------
# Messages
# ----------------------------------------------------------------------------------------------------------------------


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


def of_kind(value, kind: type):
    if not isinstance(value, kind):
        raise Damaged(f"a message field is no {kind.__name__}")
    return value


def single(fields: dict[int, list], number: int, kind: type):
    """The last value of a field, as protocol buffers have it; 0 or b"" where it is absent."""
    return of_kind(fields.get(number, [kind()])[-1], kind)
