"""Hugging Face's safetensors files, mapped into memory.

A file is eight bytes with the length of a JSON header, the header, from names to dtype, shape and offsets, and then the
tensors themselves, one after another. They are mapped: float32 is used as it lies, where it lies at a multiple of four
bytes, which the format does not promise; the rest is converted once. The library of this name copies every tensor.

Follows the README of safetensors and the checks of its src/tensor.rs. Left out: numbers of less than a byte.
"""

import json
import math
import mmap
import os
import reprlib
from typing import NamedTuple

import numpy as np

from checkpoints import COPY_AGAIN, Damaged
from checkpoints.weights import widened

MAX_HEADER, MAX_DIMS = 100_000_000, 32  # the format's bytes, and NumPy's dimensions with room to spare
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}
SIZES |= {"I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
SIZES |= {"F64": 8, "I64": 8, "U64": 8, "C64": 8}


class Tensor(NamedTuple):
    """Where a tensor lies: `start` and `stop` count bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def distinct(pairs: list[tuple]) -> dict:
    if len(found := dict(pairs)) < len(pairs):
        raise Damaged("a header that has a name twice")
    return found


def is_size(n) -> bool:
    return type(n) is int and 0 <= n < 1 << 63


def parse_tensor(name: str, entry, start: int) -> Tensor:
    """An entry of the header; offsets count from `start`, the end of the header."""
    fields = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    is_shape = isinstance(shape, list) and len(shape) <= MAX_DIMS and all(map(is_size, shape))
    is_place = isinstance(offsets, list) and len(offsets) == 2 and all(map(is_size, offsets))
    if not (is_shape and is_place and isinstance(dtype, str)) or len(fields) != 3:
        raise Damaged(f"{reprlib.repr(name)} has {reprlib.repr(entry)}, expected dtype, shape and two data_offsets")
    if dtype not in SIZES:
        raise Damaged(f"{reprlib.repr(name)} has the unknown dtype {reprlib.repr(dtype)}")
    if offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
        raise Damaged(f"{reprlib.repr(name)} has {offsets[1] - offsets[0]} bytes, expected those of {dtype}{shape}")
    return Tensor(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def parse_header(header: bytes, size: int) -> dict[str, Tensor]:
    """The tensors of a file of `size` bytes by name: side by side, without holes, up to its end."""
    if header[:1] != b"{":
        raise Damaged("a header that does not begin with {")
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=distinct)
    except (ValueError, RecursionError) as e:
        raise Damaged(f"a header that is no JSON: {e}") from e
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Damaged("metadata that are no strings")
    start = end = 8 + len(header)
    tensors = {name: parse_tensor(name, entry, start) for name, entry in entries.items()}
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.start != end:
            raise Damaged(f"{reprlib.repr(name)} begins at byte {tensor.start}, expected {end}")
        end = tensor.stop
    if end != size:
        raise Damaged(f"{size} bytes, expected {end} as its header says")
    return tensors


def read_header(path: str) -> dict[str, Tensor]:
    """The tensors of a file by name. ValueError: it is damaged, or no safetensors file."""
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        try:
            n_header = int.from_bytes(f.read(8), "little")
            if not 2 <= n_header <= min(MAX_HEADER, size - 8):
                raise Damaged(f"{size} bytes, {n_header} of them a header, expected at most {MAX_HEADER}")
            return parse_header(f.read(n_header), size)
        except Damaged as e:
            raise ValueError(f"{path} is damaged or no safetensors file: {e}; {COPY_AGAIN}") from e


def as_float32(buffer, dtype: str, n: int, offset: int) -> np.ndarray:  # -> float32[n]
    """Numbers of the mapped file, or a copy of what is not float32 at a multiple of four bytes."""
    if dtype == "BF16":
        return widened(np.frombuffer(buffer, "<u2", n, offset))
    numbers = np.frombuffer(buffer, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype], n, offset)
    with np.errstate(over="ignore"):  # infinity is found where all weights are checked
        return numbers.astype(np.float32, copy=not numbers.flags.aligned)


def read_safetensors(path: str, tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """float32[shape] of some tensors of a file, as read_header gives them; read-only where they are not converted.

    ValueError: one has another dtype than F16, BF16, F32 or F64.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in ("F16", "BF16", "F32", "F64"):
            raise ValueError(
                f"{path}: {name} has dtype {tensor.dtype}, expected F32, F16, BF16 or F64; quantised weights are not "
                "read, convert the model to float32"
            )
    with open(path, "rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    return {
        name: as_float32(mapped, t.dtype, math.prod(t.shape), t.start).reshape(t.shape) for name, t in tensors.items()
    }
