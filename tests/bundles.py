"""TensorFlow checkpoints written byte by byte, so that any of the bytes can be wrong while the checksums are right."""

from itertools import islice

from checkpoints import write_openai
from checkpoints.table import FOOTER_SIZE, TABLE_MAGIC, Damaged, block_entries, crc32c, read_varint
from checkpoints.tensorflow import data_path, read_index
from checkpoints.write_openai import data_pieces, masked, table_entry, varint

HPARAMS = {"n_vocab": 3, "n_ctx": 2, "n_embd": 2, "n_head": 1, "n_layer": 1}
MAGIC = TABLE_MAGIC.to_bytes(8, "little")


def slice_message(part):
    extents = [b"\x08" + varint(start) + (b"\x10" + varint(n) if n >= 0 else b"") for start, n in part.extents]
    return b"".join(b"\x0a" + varint(len(extent)) + extent for extent in extents)


def entry_message(entry):
    """A BundleEntryProto, with the slices that a variable may be in."""
    slices = b"".join(b"\x3a" + varint(len(part)) + part for part in map(slice_message, entry.slices))
    return write_openai.entry_message(entry) + slices


def index_of(entries):
    """The index file of variables, `entries` by name as read_index gives them."""
    messages = {name.encode("utf-8", "surrogateescape"): entry_message(entry) for name, entry in entries.items()}
    return write_openai.index_of(messages)


def table(data_blocks, handles=None):
    """An index file of these blocks of entries; `handles` (offset, size) instead of the true ones."""
    blocks, true_handles = b"", []
    for entries in data_blocks:
        data_block = write_openai.block(entries)
        true_handles.append((len(blocks), len(data_block) - 5))
        blocks += data_block
    handles = true_handles if handles is None else handles
    return write_openai.table(blocks, b"".join(table_entry(b"z", varint(at) + varint(size)) for at, size in handles))


def write_bundle(prefix, variables):
    """A checkpoint of float32 arrays by name."""
    entries = {}
    with open(data_path(prefix), "wb") as f:
        f.writelines(data_pieces(variables, entries))
    with open(prefix + ".index", "wb") as f:
        f.write(index_of(entries))


def with_right_checksums(index):
    """The index with the checksum of every block that it points to made right, as far as it can be followed."""
    content = bytearray(index)

    def mend(handle):
        offset, at = read_varint(handle, 0)
        size, at = read_varint(handle, at)
        end = offset + size + 1  # a byte for the kind of compression
        if end + 4 <= len(content):
            content[end : end + 4] = masked(crc32c(bytes(content[offset:end])))
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
