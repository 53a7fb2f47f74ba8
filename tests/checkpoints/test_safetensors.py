"""The safetensors format: what is read, and that damage is one line with the file's name."""

import json

import numpy as np
import pytest
from helpers import read_bytes, write_bytes
from relatives import safetensors_bytes

from checkpoints.safetensors import MAX_HEADER, read_header, read_safetensors

RNG = np.random.default_rng(0)
ARRAYS = {
    "b": ("F32", RNG.normal(size=(3, 2)).astype(np.float32)),
    "a": ("F16", RNG.normal(size=5).astype(np.float16)),
    "empty": ("F32", np.zeros((0, 3), np.float32)),
    "mask": ("BOOL", np.ones(3, bool)),
    "c": ("BF16", RNG.normal(size=(2, 1, 2)).astype(np.float32)),
    "scalar": ("F64", np.array(2.5)),
}
CONTENT = safetensors_bytes(ARRAYS)


def read(path):
    tensors = read_header(str(path))
    return read_safetensors(str(path), {name: t for name, t in tensors.items() if t.dtype != "BOOL"})


@pytest.mark.parametrize("pad", range(8))
def test_numbers_are_read_wherever_they_lie(pad, tmp_path):
    write_bytes(path := tmp_path / "model.safetensors", safetensors_bytes(ARRAYS, pad))
    found = read(path)
    assert {*found} == {*ARRAYS} - {"mask"}
    for name, array in found.items():
        assert array.dtype == np.float32 and array.shape == ARRAYS[name][1].shape and array.flags.aligned
        tolerance = 1 / 128 if name == "c" else 0  # two bytes less
        np.testing.assert_allclose(array, ARRAYS[name][1].astype(np.float32), rtol=tolerance)
    assert not found["b"].flags.owndata or pad % 4 != -len(CONTENT) % 4


def test_the_library_of_this_name_reads_the_same(tmp_path):
    numpy = pytest.importorskip("safetensors.numpy")
    write_bytes(
        path := tmp_path / "model.safetensors", safetensors_bytes({k: v for k, v in ARRAYS.items() if k != "c"})
    )
    theirs, ours = numpy.load_file(path), read(path)
    assert theirs.keys() - {"mask"} == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name].astype(np.float32))
    numpy.save_file({name: array for name, (_, array) in ARRAYS.items()}, path)
    for name, array in read(path).items():
        np.testing.assert_array_equal(array, ARRAYS[name][1].astype(np.float32))


def test_a_file_cut_at_any_length_is_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    for n in range(len(CONTENT)):
        write_bytes(path, CONTENT[:n])
        with pytest.raises(ValueError, match="model.safetensors is damaged or no safetensors file: ") as e:
            read(path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("bits", [1, 0x10, 0xFF])
def test_any_byte_changed_is_one_line_or_other_numbers(bits, tmp_path):
    path, n_right = tmp_path / "model.safetensors", 0
    for i in range(len(CONTENT)):
        content = bytearray(CONTENT)
        content[i] ^= bits
        write_bytes(path, bytes(content))
        try:
            assert {array.dtype for array in read(path).values()} <= {np.dtype(np.float32)}
            n_right += 1
        except ValueError as e:
            assert "model.safetensors" in str(e) and "\n" not in str(e)
    assert n_right >= sum(array.nbytes for _, array in ARRAYS.values()) - 16  # of numbers, and little else


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "no object": [],
    "a hole": {"a": entry(), "b": entry(offsets=(12, 20))},
    "an overlap": {"a": entry(), "b": entry(offsets=(4, 12))},
    "the same place": {"a": entry(), "b": entry()},
    "behind the end": {"a": entry(shape=[3], offsets=(0, 12))},
    "not up to the end": {"a": entry(shape=[1], offsets=(0, 4))},
    "no tensors for the bytes": {},
    "backwards": {"a": entry(offsets=(8, 0))},
    "another size than the shape": {"a": entry(shape=[3])},
    "a product of many": {"a": entry(shape=[2**40, 2**40])},
    "many dimensions": {"a": entry(shape=[1] * 1000 + [2])},
    "negative": {"a": entry(shape=[-1, -2])},
    "a fraction": {"a": entry(shape=[2.0])},
    "a truth value": {"a": entry(shape=[True, 2])},
    "an unknown dtype": {"a": entry("F7")},
    "a dtype that is no text": {"a": entry([])},
    "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 8]}},
    "one offset": {"a": entry(offsets=[0])},
    "more fields": {"a": entry() | {"more": 1}},
    "no entry": {"a": 3},
    "metadata that are no texts": {"a": entry(), "__metadata__": {"a": 1}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_headers_that_break_the_format_are_refused(header, tmp_path):
    text = json.dumps(header).encode()
    write_bytes(path := tmp_path / "model.safetensors", len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        read_header(str(path))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "a": 2}',
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b' {"a": 1}',
        b"{" * 100_000,
        b'{"a":' * 100_000,
        b'{"\xff": 1}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"{}}",
    ],
    ids=["a name twice", "a field twice", "a space before", "braces", "deep", "no UTF-8", "digits", "more"],
)
def test_headers_that_are_no_json_are_refused(text, tmp_path):
    write_bytes(path := tmp_path / "model.safetensors", len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(ValueError, match="is damaged or no safetensors file") as e:
        read_header(str(path))
    assert len(str(e.value)) < 500


def test_an_empty_model_and_trailing_spaces_are_right(tmp_path):
    write_bytes(path := tmp_path / "model.safetensors", (10).to_bytes(8, "little") + b"{}        ")
    assert read_header(str(path)) == {}


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as f:
        f.write((MAX_HEADER + 1).to_bytes(8, "little"))
        f.truncate(MAX_HEADER + 100)  # a file with a hole, which takes no space
    with pytest.raises(ValueError, match=f"expected at most {MAX_HEADER}"):
        read_header(str(path))
    assert read_bytes(path)[:1] == b"\x01"
