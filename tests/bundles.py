"""TensorFlow checkpoints written byte by byte, so that any of the bytes can be wrong while the checksums are right."""

from itertools import islice

from checkpoints.table import FOOTER_SIZE, TABLE_MAGIC, Damaged, block_entries, crc32c, mask_crc32c, read_varint
from checkpoints.tensorflow import Entry, data_path, read_index

HEADER = b"\x08\x01\x1a\x02\x08\x01"  # one shard, little-endian, version 1
HPARAMS = {"n_vocab": 3, "n_ctx": 2, "n_embd": 2, "n_head": 1, "n_layer": 1}
MAGIC = TABLE_MAGIC.to_bytes(8, "little")


def varint(value):
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def checksum(block):
    return mask_crc32c(crc32c(block)).to_bytes(4, "little")


def block(entries):
    content = entries + bytes(4) + (1).to_bytes(4, "little") + b"\0"
    return content + checksum(content)


def table_entry(key, value, n_shared=0):
    return varint(n_shared) + varint(len(key)) + varint(len(value)) + key + value


def slice_message(part):
    extents = [b"\x08" + varint(start) + (b"\x10" + varint(n) if n >= 0 else b"") for start, n in part.extents]
    return b"".join(b"\x0a" + varint(len(extent)) + extent for extent in extents)


def entry_message(entry):
    shape = b"".join(b"\x12" + varint(len(b"\x08" + varint(n))) + b"\x08" + varint(n) for n in entry.shape)
    message = b"\x08" + varint(entry.dtype) + b"\x12" + varint(len(shape)) + shape
    message += b"\x18" + varint(entry.shard) + b"\x20" + varint(entry.offset) + b"\x28" + varint(entry.size)
    message += b"\x35" + entry.masked_crc32c.to_bytes(4, "little")
    return message + b"".join(b"\x3a" + varint(len(part)) + part for part in map(slice_message, entry.slices))


def table(data_blocks, handles=None):
    """An index file of these blocks of entries; `handles` (offset, size) instead of the true ones."""
    content, true_handles = b"", []
    for entries in data_blocks:
        data_block = block(entries)
        true_handles.append((len(content), len(data_block) - 5))
        content += data_block
    handles = true_handles if handles is None else handles
    index = block(b"".join(table_entry(b"z", varint(offset) + varint(size)) for offset, size in handles))
    meta_at = len(content) + len(index)
    footer = varint(meta_at) + varint(8) + varint(len(content)) + varint(len(index) - 5)
    return content + index + block(b"") + footer.ljust(40, b"\0") + MAGIC


def index_of(entries):
    """The index file of variables, `entries` by name as read_index gives them."""
    variables = [
        table_entry(name.encode("utf-8", "surrogateescape"), entry_message(entry)) for name, entry in entries.items()
    ]
    return table([table_entry(b"", HEADER) + b"".join(variables)])


def write_bundle(prefix, variables):
    """A checkpoint of float32 arrays by name."""
    entries, data = {}, b""
    for name, array in sorted(variables.items()):
        content = array.tobytes()
        masked = int.from_bytes(checksum(content), "little")
        entries[name] = Entry(1, array.shape, 0, len(data), len(content), masked)
        data += content
    with open(prefix + ".index", "wb") as f:
        f.write(index_of(entries))
    with open(data_path(prefix), "wb") as f:
        f.write(data)


def with_right_checksums(index):
    """The index with the checksum of every block that it points to made right, as far as it can be followed."""
    content = bytearray(index)

    def mend(handle):
        offset, at = read_varint(handle, 0)
        size, at = read_varint(handle, at)
        end = offset + size + 1  # a byte for the kind of compression
        if end + 4 <= len(content):
            content[end : end + 4] = checksum(bytes(content[offset:end]))
        return bytes(content[offset : offset + size]), at

    try:
        footer = bytes(content[-FOOTER_SIZE:])
        _, at = mend(footer)
        entries, _ = mend(footer[at:])
        n_restarts = int.from_bytes(entries[-4:], "little")
        for _, handle in islice(block_entries(entries[: len(entries) - 4 - 4 * n_restarts]), 100):
            mend(handle)
    except Damaged:
        pass
    return bytes(content)


def hostile_index(prefix, changes):
    """Rewrite the index with some entries changed, its checksum right."""
    _, _, entries = read_index(prefix + ".index")
    for name, change in changes.items():
        for field, value in change.items():
            setattr(entries[name], field, value)
    with open(prefix + ".index", "wb") as f:
        f.write(index_of(entries))
