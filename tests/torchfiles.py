"""Files as torch.save and pickle.dump write them, made byte by byte without either, so that any of it can be wrong."""

import os
import struct
import zlib

import numpy as np

from checkpoints.nanogpt import nanogpt_name
from checkpoints.pytorch import TorchFile
from checkpoints.weights import expected_shapes

HPARAMS = {"n_vocab": 3, "n_ctx": 2, "n_embd": 2, "n_head": 1, "n_layer": 1}
KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "uint16": "BFloat16Storage", "int64": "LongStorage"}

# ----------------------------------------------------------------------------------------------------------------------
# Pickles of protocol 2
# ----------------------------------------------------------------------------------------------------------------------


class Raw(bytes):
    """Opcodes that leave one value on the stack."""


def name_of(module, name):
    return Raw(f"c{module}\n{name}\n".encode())


def called(function, *args):
    return Raw(function + opcodes(args) + b"R")


def opcodes(value):
    """The opcodes that make a value, without memo."""
    match value:
        case Raw():
            return bytes(value)
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int() if -(1 << 31) <= value < 1 << 31:
            return b"J" + struct.pack("<i", value)
        case int():
            return b"\x8a\xff" + value.to_bytes(255, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(opcodes, value)) + b"t"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case dict():
            return b"}(" + b"".join(opcodes(part) for item in value.items() for part in item) + b"u"
    raise TypeError(value)


def pickled(value):
    return b"\x80\x02" + opcodes(value) + b"."


def state_dict(items):
    """An OrderedDict with attributes, as torch.nn.Module.state_dict gives it."""
    made = called(name_of("collections", "OrderedDict"))
    body = b"".join(opcodes(part) for item in items.items() for part in item)
    return Raw(made + b"(" + body + b"u" + opcodes({"_metadata": {"": {"version": 1}}}) + b"b")


def tensor(kind, key, n_numbers, shape, strides, offset=0):
    storage = Raw(opcodes(("storage", name_of("torch", kind), key, "cpu", n_numbers)) + b"Q")
    hooks = called(name_of("collections", "OrderedDict"))
    return called(name_of("torch._utils", "_rebuild_tensor_v2"), storage, offset, shape, strides, False, hooks)


# ----------------------------------------------------------------------------------------------------------------------
# Zip archives as torch.save writes them: sizes and checksums after the data, which begins at multiples of 64
# ----------------------------------------------------------------------------------------------------------------------


def local_header(name, at, alignment):
    n_padding = -(at + 30 + len(name) + 4) % alignment
    padding = b"FB" + struct.pack("<H", n_padding) + b"Z" * n_padding
    return struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0x808, 0, 0, 0, 0, 0, 0, len(name), len(padding)) + name + padding


def entry(name, crc32, packed, size, header, flags=0x808, method=0, extra=b""):
    numbers = (0, 0, flags, method, 0, 0, crc32, packed, size, len(name), len(extra), 0, 0, 0, 0, header)
    return struct.pack("<4s6H3L5H2L", b"PK\1\2", *numbers) + name + extra


def end_of(n_files, size, start):
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 30, 45, 0, 0, n_files, n_files, size, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + size, 1)
    return end64 + locator + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, n_files, n_files, size, start, 0)


def archive(records, folder="ckpt", alignment=64, **changes):
    """The file of these records (name -> bytes). `changes` to what the directory says of the records named."""
    content, directory = b"", b""
    for name, data in records.items():
        header, path, crc32 = len(content), f"{folder}/{name}".encode(), zlib.crc32(data)
        content += local_header(path, header, alignment) + data
        content += struct.pack("<4s3L", b"PK\7\x08", crc32, len(data), len(data))
        said = {"name": path, "crc32": crc32, "packed": len(data), "size": len(data), "header": header}
        directory += entry(**(said | changes.get(name, {})))
    return content + directory + end_of(len(records), len(directory), len(content))


NUMBERS = np.arange(1, 13, dtype=np.float32)
WHOLE = ("FloatStorage", "0", 12, (3, 4), (4, 1))


def with_right_end(content):
    """The archive with an end that fits its directory, from the first entry to the first end that there is."""
    start = content.find(b"PK\1\2")
    end = min((at for at in map(content.find, (b"PK\6\6", b"PK\5\6")) if at >= 0), default=len(content))
    n_files = content.count(b"PK\1\2", start, end)
    return content[:end] + end_of(n_files, end - start, start) if 0 <= start <= end else content


def one_tensor(*args, numbers=NUMBERS, offset=0, **others):
    """An archive's records: one storage, one tensor, which is what data.pkl holds."""
    return {"data.pkl": pickled(tensor(*(args or WHOLE), offset=offset)), "data/0": numbers.tobytes(), **others}


def opened(folder, content):
    """The TorchFile of an archive, given as bytes."""
    path = os.path.join(folder, "x.pt")
    with open(path, "wb") as f:
        f.write(content)
    return TorchFile(path)


def array_of(folder, content):
    file = opened(folder, content)
    return file.array(file.content)


# ----------------------------------------------------------------------------------------------------------------------
# nanoGPT's checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def model_args(hparams, bias=True):
    sizes = {name: hparams[name] for name in ("n_layer", "n_head", "n_embd")}
    return sizes | {"block_size": hparams["n_ctx"], "bias": bias, "vocab_size": hparams["n_vocab"], "dropout": 0.0}


def nanogpt_weights(hparams, bias=True, seed=0):
    """The weights by nanoGPT's names, in its order of dimensions, large enough that the logits differ clearly."""
    rng = np.random.RandomState(seed)  # whose numbers NumPy promises never to change
    weights = {}
    for name, shape in expected_shapes(hparams):
        if name.endswith("/b") and not bias:
            continue
        shape = shape[:0:-1] if name.endswith("/w") else shape
        scale = 0.3 if "/" in name else 0.5
        array = rng.normal(scale=scale * 4 / shape[-1] ** 0.5 if name.endswith("/w") else scale, size=shape)
        weights[nanogpt_name(name)] = np.float32(array + name.endswith("/g"))
    return weights


def records_of(weights, args, is_tied=True, prefix="", **others):
    """data.pkl and the storages of a checkpoint, record name -> bytes. One array twice shares its storage."""
    records, tensors, keys = {"data.pkl": b"", "byteorder": b"little"}, {}, {}
    for name, array in weights.items():
        key = keys.setdefault(id(array), str(len(keys)))
        records[f"data/{key}"] = array.tobytes()
        strides = tuple(stride // array.itemsize for stride in array.strides)
        tensors[prefix + name] = tensor(KINDS[str(array.dtype)], key, array.size, array.shape, strides)
    if is_tied:
        tensors[prefix + "lm_head.weight"] = tensors[prefix + "transformer.wte.weight"]
    records["data.pkl"] = pickled({"model": state_dict(tensors), "model_args": args, **others})
    return records | {"version": b"3\n"}


def checkpoint(hparams, bias=True, seed=0, **others):
    return archive(records_of(nanogpt_weights(hparams, bias, seed), model_args(hparams, bias), **others))
