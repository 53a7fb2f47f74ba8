"""A model as OpenAI's files, byte for byte as TensorFlow writes them.

The data file is the variables in the order of their names, one after another. The index is a LevelDB table of one
block (tensorflow/core/lib/io/table_builder.cc): a key leaves out what it shares with the one before, except every
sixteenth, where a search may begin. checkpoints/tensorflow.py reads both, and says where the format is described.

Left out: model.ckpt.meta, the graph of the program that trained a model. Whoever reads variables by their names, as
OpenAI's own src/sample.py and tf.train.load_checkpoint do, builds a graph of its own or none.
"""

from collections.abc import Iterator

import numpy as np

from checkpoints.table import TABLE_MAGIC, crc32c, mask_crc32c
from checkpoints.tensorflow import Entry, data_path
from checkpoints.vocabulary import END_OF_TEXT, pattern_of
from checkpoints.writing import as_json, merges_text, pieces_of, token_ids_text, variables_of

HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
CHECKPOINT = "model.ckpt"
HEADER = b"\x08\x01\x1a\x02\x08\x01"  # BundleHeaderProto: one shard, little-endian, version 1
DT_FLOAT = 1
RESTART_INTERVAL = 16
UNCOMPRESSED = b"\0"

# ----------------------------------------------------------------------------------------------------------------------
# The index
# ----------------------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def masked(crc: int) -> bytes:
    return mask_crc32c(crc).to_bytes(4, "little")


def table_entry(key: bytes, value: bytes, n_shared: int = 0) -> bytes:
    """An entry of a block; `key` without the n_shared bytes that the one before begins with too."""
    return varint(n_shared) + varint(len(key)) + varint(len(value)) + key + value


def block(entries: bytes, restarts: tuple[int, ...] = (0,)) -> bytes:
    """A block with its trailer; `restarts` are where entries begin whose keys are whole."""
    content = entries + b"".join(n.to_bytes(4, "little") for n in (*restarts, len(restarts))) + UNCOMPRESSED
    return content + masked(crc32c(content))


def n_common(a: bytes, b: bytes) -> int:
    """How many bytes both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def block_of(values: dict[bytes, bytes]) -> bytes:
    """The block of these values by key, in order."""
    entries, restarts, before = b"", [], b""
    for number, (key, value) in enumerate(values.items()):
        n_shared = n_common(key, before)
        if number % RESTART_INTERVAL == 0:
            restarts.append(len(entries))
            n_shared = 0
        entries += table_entry(key[n_shared:], value, n_shared)
        before = key
    return block(entries, tuple(restarts))


def table(blocks: bytes, handles: bytes) -> bytes:
    """A table file: blocks of entries, and the block that names them, whose entries are `handles`."""
    meta, index = block(b""), block(handles)
    footer = varint(len(blocks)) + varint(len(meta) - 5) + varint(len(blocks) + len(meta)) + varint(len(index) - 5)
    return blocks + meta + index + footer.ljust(40, b"\0") + TABLE_MAGIC.to_bytes(8, "little")


def entry_message(entry: Entry) -> bytes:
    """A BundleEntryProto. Fields that are 0 are left out, as protocol buffers have it."""
    shape = b"".join(b"\x12" + varint(len(dim)) + dim for dim in (b"\x08" + varint(n) for n in entry.shape))
    message = b"\x08" + varint(entry.dtype) + b"\x12" + varint(len(shape)) + shape
    for tag, value in ((b"\x18", entry.shard), (b"\x20", entry.offset), (b"\x28", entry.size)):
        message += tag + varint(value) if value else b""
    return message + b"\x35" + entry.masked_crc32c.to_bytes(4, "little")


def index_of(messages: dict[bytes, bytes]) -> bytes:
    """The index file of variables: their BundleEntryProtos by name."""
    data_block = block_of({b"": HEADER} | messages)
    first = max(messages, default=b"")[:1] or b"\0"
    after = bytes([first[0] + 1])  # the shortest key behind all others; a name's first byte is no 0xff
    return table(data_block, table_entry(after, varint(0) + varint(len(data_block) - 5)))


# ----------------------------------------------------------------------------------------------------------------------
# The files
# ----------------------------------------------------------------------------------------------------------------------


def unknown_to_openai(encoder, hparams: dict, params: dict) -> Iterator[str]:
    """What OpenAI's form has no way to say of a model, in words."""
    defaults = {"activation": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": 4 * hparams["n_embd"]}
    for name, default in defaults.items():
        if (value := hparams.get(name)) not in (None, default):
            yield f"{name} {value}, there it is {default}"
    if "lm_head" in params:
        yield "an output matrix other than wte"
    if encoder.adds_space:
        yield "a vocabulary that puts a space before each text"
    plain = {END_OF_TEXT: pattern_of({"content": END_OF_TEXT})} if END_OF_TEXT in encoder.tokens.values() else {}
    if encoder.added.keys() != plain.keys() or (encoder.patterns or plain) != plain:
        yield f"added tokens other than {END_OF_TEXT} as it is, here {', '.join(encoder.added) or 'none'}"
    ends = [encoder.added[END_OF_TEXT]] if END_OF_TEXT in encoder.added else []
    if [*encoder.eot_ids] != ends or encoder.start_id != next(iter(ends), None):
        yield f"another beginning or end of a text than {END_OF_TEXT}"


def check(encoder, hparams: dict, params: dict) -> None:
    """ValueError: OpenAI's form has no way to say what this model is, or its checksums cannot be computed."""
    if unknown := "; ".join(unknown_to_openai(encoder, hparams, params)):
        raise ValueError(f"OpenAI's form cannot express this model: {unknown}; choose --format huggingface")
    try:
        import google_crc32c  # noqa: F401  # at the speed of memory; reading a model does not need it
    except ImportError as e:
        raise ValueError("the checksums of OpenAI's form need google-crc32c; pip install google-crc32c") from e


def data_pieces(variables: dict[str, np.ndarray], entries: dict[str, Entry]) -> Iterator[bytes]:
    """The bytes of the data file; what they are is added to `entries` meanwhile."""
    import google_crc32c

    offset = 0
    for name, array in sorted(variables.items()):
        crc = 0
        for piece in pieces_of(array):
            crc = google_crc32c.extend(crc, piece)
            yield piece
        entries[name] = Entry(DT_FLOAT, array.shape, 0, offset, array.nbytes, mask_crc32c(crc))
        offset += array.nbytes


def files(encoder, hparams: dict, params: dict) -> Iterator[tuple[str, Iterator[bytes]]]:
    """(name, content in pieces) of each file, to be taken in this order: the index knows the checksums of the data."""
    variables = {f"model/{name}": array[None] if name.endswith("/w") else array for name, array in variables_of(params)}
    paths = f'model_checkpoint_path: "{CHECKPOINT}"\nall_model_checkpoint_paths: "{CHECKPOINT}"\n'
    entries: dict[str, Entry] = {}
    yield "hparams.json", iter([as_json({name: hparams[name] for name in HPARAMS})])
    yield "encoder.json", iter([token_ids_text(encoder)])
    yield "vocab.bpe", iter([merges_text(encoder)])
    yield "checkpoint", iter([paths.encode()])
    yield data_path(CHECKPOINT), data_pieces(variables, entries)
    messages = {name.encode(): entry_message(entry) for name, entry in entries.items()}  # which is complete by now
    yield CHECKPOINT + ".index", iter([index_of(messages)])
