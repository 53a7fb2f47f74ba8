"""What torch.save writes, mapped into memory without PyTorch.

The file is a zip archive of one folder: data.pkl, a pickle of everything but the numbers, and data/0, data/1 ..., the
bytes of each storage, which tensors are views of. Records are stored uncompressed, each at a multiple of 64 bytes, so
the file is mapped and each tensor is a view of it.

Follows caffe2/serialize/inline_container.cc, torch/serialization.py and PKWARE's APPNOTE.TXT. Left out: files of
torch.save before PyTorch 1.6, which are no archives, and TorchScript.
"""

import math
import mmap
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from checkpoints.pickles import Damaged, Global, read_pickle
from checkpoints.safetensors import SIZES, as_float32

MAX_PICKLE, MAX_DIRECTORY, MAX_DIMS = 1 << 24, 1 << 21, 8
LEGACY_MAGIC = bytes.fromhex("8002 8a0a 6cfc9c46f9206aa85019 2e")  # a pickle of torch.serialization.MAGIC_NUMBER
# The records of a zip archive that matter: the end, its large form and where that is, a file in the directory, a file.
END, END64, END64_AT = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
ENTRY, LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
IS_ENCRYPTED, IS_LARGE_32, IS_LARGE_16 = 1, 0xFFFFFFFF, 0xFFFF

# ----------------------------------------------------------------------------------------------------------------------
# The archive
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Record:
    """A file of the archive: where its header begins, where the next one does, its bytes and their checksum."""

    name: str
    header: int
    size: int
    crc32: int
    limit: int = 0


def unpack(layout: struct.Struct, data, at: int, magic: bytes) -> tuple:
    """The fields after the magic number. Damaged: it is not there."""
    if at < 0 or at + layout.size > len(data) or data[at : at + 4] != magic:
        raise Damaged(f"no {magic[:2].decode()}{magic[2]}{magic[3]} of a zip archive at byte {at}")
    return layout.unpack_from(data, at)[1:]


def directory_of(mapped: mmap.mmap) -> tuple[int, int, int]:
    """(where the archive's directory begins, where it ends, how many files it has)."""
    end = len(mapped) - END.size
    disk, first_disk, n_here, n_files, size, start, n_comment = unpack(END, mapped, end, b"PK\5\6")
    if mapped[max(0, end - END64_AT.size) : end][:4] == b"PK\6\7":
        _, end64, _ = unpack(END64_AT, mapped, end - END64_AT.size, b"PK\6\7")
        small = (n_files, size, start)
        _, _, _, disk, first_disk, n_here, n_files, size, start = unpack(END64, mapped, end64, b"PK\6\6")
        for short, long, most in zip(small, (n_files, size, start), (IS_LARGE_16, *[IS_LARGE_32] * 2), strict=True):
            if short not in (long, most):
                raise Damaged("the two ends of the zip archive differ")
        end = end64
    if disk or first_disk or n_here != n_files or n_comment or start + size != end or size > MAX_DIRECTORY:
        raise Damaged("the end of the zip archive does not fit its directory")
    return start, end, n_files


def large_values(extra: bytes, values: list[int]) -> list[int]:
    """Sizes and offsets, those that do not fit into 32 bits from an entry's extra field."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        at += 4 + size
        if kind == 1:
            longs = extra[at - size : at]
            longs = [int.from_bytes(longs[i : i + 8], "little") for i in range(0, size, 8)][::-1]
            values = [longs.pop() if longs and value == IS_LARGE_32 else value for value in values]
    return values


def read_entry(mapped: mmap.mmap, at: int) -> tuple[Record, int]:
    """A file of the directory, and where the next one begins."""
    fields = unpack(ENTRY, mapped, at, b"PK\1\2")
    _, _, flags, method, _, _, crc32, packed, size, n_name, n_extra, n_comment, _, _, _, header = fields
    end = at + ENTRY.size + n_name
    name = mapped[at + ENTRY.size : end].decode(errors="replace")
    size, packed, header = large_values(mapped[end : end + n_extra], [size, packed, header])
    if flags & IS_ENCRYPTED or method or packed != size:
        raise Damaged(f"{name[:80]!r} is compressed or encrypted, expected it as torch.save stores it")
    return Record(name, header, size, crc32), end + n_extra + n_comment


def read_directory(mapped: mmap.mmap) -> dict[str, Record]:
    """The records of the archive by name, without the folder that all are in."""
    at, end, n_files = directory_of(mapped)
    records = []
    start = at
    while at < end:
        record, at = read_entry(mapped, at)
        records.append(record)
    if at != end or len(records) != n_files or not records:
        raise Damaged(f"its directory has {len(records)} files, expected {n_files}")
    records.sort(key=lambda record: record.header)
    limits = [record.header for record in records[1:]] + [start]
    folder = records[0].name.partition("/")[0] + "/"
    by_name = {}
    for record, record.limit in zip(records, limits, strict=True):
        name = record.name.removeprefix(folder)
        if record.header + LOCAL.size + len(record.name) + record.size > record.limit or name in by_name:
            raise Damaged(f"{record.name[:80]!r} lies in another file of the archive, or is there twice")
        by_name[name] = record
    return by_name


def data_offset(mapped: mmap.mmap, record: Record) -> int:
    """Where the bytes of a record begin: its header has a name and padding of its own."""
    fields = unpack(LOCAL, mapped, record.header, b"PK\3\4")
    name_at = record.header + LOCAL.size
    start = name_at + fields[-2] + fields[-1]
    if mapped[name_at : name_at + fields[-2]] != record.name.encode() or start + record.size > record.limit:
        raise Damaged(f"{record.name[:80]!r} is not where the directory says")
    return start


# ----------------------------------------------------------------------------------------------------------------------
# What data.pkl says of tensors
# ----------------------------------------------------------------------------------------------------------------------

# As safetensors has them; those that are no weights are known by name only.
DTYPES = {"torch.FloatStorage": "F32", "torch.HalfStorage": "F16", "torch.BFloat16Storage": "BF16"}
OTHERS = "Double Long Int Short Char Byte Bool ComplexFloat ComplexDouble"


@dataclass(frozen=True, slots=True)
class Storage:
    """So many numbers of one kind in the record data/KEY."""

    kind: str
    key: str
    n_numbers: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage, in numbers, not in bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def are_counts(values: object) -> bool:
    return type(values) is tuple and len(values) <= MAX_DIMS and all(type(n) is int and n >= 0 for n in values)


def storage_of(reference: object) -> Storage:
    """What a persistent id stands for: ("storage", class, key, device, how many numbers)."""
    if type(reference) is tuple and len(reference) == 5:
        word, kind, key, _, n_numbers = reference
        if (type(word), type(kind), type(key)) == (str, Global, str) and word == "storage" and are_counts((n_numbers,)):
            return Storage(kind.name, key, n_numbers)
    raise Damaged("its pickle refers to something that is no storage of a tensor")


def rebuild_tensor(args: tuple) -> Tensor:
    """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)"""
    if len(args) == 6 and type(args[0]) is Storage and are_counts((args[1],)):
        storage, offset, shape, strides = args[:4]
        if are_counts(shape) and are_counts(strides) and len(shape) == len(strides):
            return Tensor(storage, offset, shape, strides)
    raise Damaged("a tensor whose storage, shape or strides cannot be")


def rebuild_parameter(args: tuple) -> Tensor:
    """_rebuild_parameter(tensor, requires_grad, hooks)"""
    if len(args) == 3 and type(args[0]) is Tensor:
        return args[0]
    raise Damaged("a parameter that is no tensor")


def ordered_dict(args: tuple) -> dict:
    if args:
        raise Damaged("an OrderedDict made of something else")
    return {}


BUILDERS = {
    "collections.OrderedDict": ordered_dict,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch.storage.UntypedStorage": None,
    **dict.fromkeys([*DTYPES, *(f"torch.{name}Storage" for name in OTHERS.split())]),
}
KNOWN = {name: Global(name, build) for name, build in BUILDERS.items()}

# ----------------------------------------------------------------------------------------------------------------------
# The file
# ----------------------------------------------------------------------------------------------------------------------


class TorchFile:
    """A mapped file of torch.save: `content`, with a Tensor for each tensor, and `array` to see one's numbers."""

    def __init__(self, path: str):
        """Damaged: it is none, or holds more than data. OSError: it cannot be read."""
        with open(path, "rb") as f:
            start = f.read(len(LEGACY_MAGIC))
            if start == LEGACY_MAGIC:
                raise Damaged("a file of torch.save before PyTorch 1.6, or with _use_new_zipfile_serialization=False")
            if start[:4] != b"PK\3\4":
                raise Damaged("no zip archive")
            self.mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        self.n_left = len(self.mapped)  # of the bytes that tensors may be made of
        self.records = read_directory(self.mapped)
        if self.bytes_of("byteorder", b"little") != b"little":
            raise Damaged("its numbers are big-endian")
        self.content = read_pickle(self.bytes_of("data.pkl"), KNOWN, storage_of)

    def record(self, name: str) -> Record:
        if name not in self.records:
            raise Damaged(f"the archive lacks {name[:80]!r}")
        return self.records[name]

    def bytes_of(self, name: str, default: bytes | None = None) -> bytes:
        if name not in self.records and default is not None:
            return default
        record = self.record(name)
        if record.size > MAX_PICKLE:
            raise Damaged(f"{name} has {record.size} bytes, expected {MAX_PICKLE} at most")
        start = data_offset(self.mapped, record)
        content = self.mapped[start : start + record.size]
        if record.crc32 not in (0, zlib.crc32(content)):  # 0 where torch.save was told to compute none
            raise Damaged(f"the checksum of {name} is wrong")
        return content

    def array(self, tensor: Tensor) -> np.ndarray:
        """float32[shape], a read-only view; float16 and bfloat16 are converted, as is what lies at odd offsets.

        Damaged: it does not fit its bytes, or it and those before it share theirs, and would grow beyond the file.
        """
        storage = tensor.storage
        if storage.kind not in DTYPES:
            raise Damaged(f"numbers of {storage.kind}, expected float32, float16 or bfloat16")
        dtype, record = DTYPES[storage.kind], self.record(f"data/{storage.key}")
        if record.size != storage.n_numbers * SIZES[dtype]:
            raise Damaged(f"{record.name[:80]!r} has {record.size} bytes, expected {storage.n_numbers} numbers")
        n_spanned = 1  # numbers from the first to the last, dimension by dimension from the densest on
        for stride, n in sorted(zip(tensor.strides, tensor.shape, strict=True)):
            if n > 1 and stride < n_spanned:
                raise Damaged(f"a tensor of strides {list(tensor.strides)}, whose numbers overlap")
            n_spanned += stride * (n - 1) if n else 0
        if not math.prod(tensor.shape) or tensor.offset + n_spanned > storage.n_numbers:
            raise Damaged(f"a tensor of shape {list(tensor.shape)}, of which {record.name[:80]!r} holds a part")
        self.n_left -= n_spanned * SIZES[dtype]
        if self.n_left < 0:
            raise Damaged("its tensors share their numbers, and are more than the file")
        start = data_offset(self.mapped, record) + tensor.offset * SIZES[dtype]
        numbers = as_float32(self.mapped, dtype, n_spanned, start)
        strides = [4 * stride if n > 1 else 4 for n, stride in zip(tensor.shape, tensor.strides, strict=True)]
        return np.ndarray(tensor.shape, np.float32, numbers, 0, strides)

    def verify(self) -> None:
        """Damaged: a record's checksum is wrong, the first of them. Those that torch.save did not compute are 0."""
        for name, record in self.records.items():
            start, crc32 = data_offset(self.mapped, record), 0
            for at in range(start, start + record.size, 1 << 20):
                crc32 = zlib.crc32(self.mapped[at : min(at + (1 << 20), start + record.size)], crc32)
            if record.crc32 not in (0, crc32):
                raise Damaged(f"{name[:80]!r} has checksum {crc32:#010x}, expected {record.crc32:#010x}")
