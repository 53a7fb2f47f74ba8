import os
import shutil

import numpy as np
import pytest
from bundles import entry_message, hostile_index
from bundles import table as bundle_table
from helpers import MODELS, write_bytes

from checkpoints import table
from checkpoints.tensorflow import Entry, data_path, read_checkpoint, read_index, verify_checkpoint
from checkpoints.write_openai import table_entry

pytestmark = pytest.mark.xdist_group("tensorflow")
NANO = os.path.join(MODELS, "nano", "model.ckpt")


@pytest.fixture
def nano_copy(tmp_path):
    for path in (NANO + ".index", data_path(NANO)):
        shutil.copy(path, tmp_path)
    return str(tmp_path / "model.ckpt")


def tensorflow_or_skip():
    return pytest.importorskip("tensorflow", reason="TensorFlow is not installed; it has no wheel for this Python yet")


def write_bundle(prefix, tensors):
    tf = tensorflow_or_skip()
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=[tf.constant(t) for t in tensors.values()],
    )


def test_tensorflows_own_files_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {f"model/h{i}/attn/c_attn/w": rng.normal(size=(1, 5, 3 + i)).astype(np.float32) for i in range(200)}
    tensors["scalar"] = np.float32(3.5)
    tensors["specials"] = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45], np.float32)
    prefix = str(tmp_path / "model.ckpt")
    write_bundle(prefix, tensors)
    arrays = read_checkpoint(prefix)
    assert arrays.keys() == tensors.keys()
    for name, array in arrays.items():
        assert array.dtype == np.float32 and array.shape == tensors[name].shape
        assert array.tobytes() == tensors[name].tobytes()
    verify_checkpoint(prefix)


def test_arrays_are_readonly_views_of_the_file():
    arrays = read_checkpoint(NANO)
    assert not any(array.flags.writeable or array.flags.owndata for array in arrays.values())
    with pytest.raises(ValueError):
        arrays["model/wte"][0, 0] = 1


def test_openais_real_index():
    path = os.path.join(os.environ.get("GPT2_MODELS_DIR", MODELS), "124M", "model.ckpt.index")
    if not os.path.exists(path):
        pytest.skip("OpenAI's 124M index is not here; GPT2_MODELS_DIR says where it is")
    n_shards, byte_order, entries = read_index(path)
    assert (n_shards, byte_order, len(entries)) == (1, "<", 148)
    assert list(entries) == sorted(entries)
    assert entries["model/wte"].shape == (50257, 768) and entries["model/h11/mlp/c_fc/w"].shape == (1, 768, 3072)
    assert sum(entry.size for entry in entries.values()) == 497759232
    assert all(entry.offset % 64 == 0 for entry in entries.values())


def test_crc32c_known_answers():
    # RFC 3720, B.4
    assert table.crc32c(bytes(32)) == 0x8A9136AA
    assert table.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert table.crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("size", [0, 1, 47, 48, 100, -1, -8, -48])
def test_a_cut_index_is_named(nano_copy, size):
    path = nano_copy + ".index"
    os.truncate(path, size if size >= 0 else os.path.getsize(path) + size)
    with pytest.raises(ValueError, match="damaged or no TensorFlow index") as e:
        read_checkpoint(nano_copy)
    assert path in str(e.value) and "run again to download" in str(e.value)


def test_every_flipped_byte_of_the_index_is_found_or_harmless(nano_copy):
    good = {name: array.tobytes() for name, array in read_checkpoint(nano_copy).items()}
    path = nano_copy + ".index"
    with open(path, "rb") as f:
        content = f.read()
    n_found = 0
    for at in range(len(content)):
        with open(path, "wb") as f:
            f.write(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            arrays = read_checkpoint(nano_copy)
        except ValueError as e:
            assert nano_copy in str(e)
            n_found += 1
        else:  # the footer's padding is never read
            assert at >= len(content) - table.FOOTER_SIZE
            assert {name: array.tobytes() for name, array in arrays.items()} == good
    assert n_found >= len(content) - table.FOOTER_SIZE


@pytest.mark.parametrize("change", [-1, -4, -100_000, 4])
def test_a_data_file_of_another_size_is_found_at_open(nano_copy, change):
    path = data_path(nano_copy)
    size = os.path.getsize(path)
    os.truncate(path, size + change)
    with pytest.raises(ValueError, match=f"has {size + change} bytes, expected {size}") as e:
        read_checkpoint(nano_copy)
    assert path in str(e.value)


def test_an_empty_data_file_is_named(nano_copy):
    os.truncate(data_path(nano_copy), 0)
    with pytest.raises(ValueError, match="has 0 bytes, expected"):
        read_checkpoint(nano_copy)


@pytest.mark.parametrize(
    "content", [b"<html>Not found</html>" * 10, b"\x7fELF" + bytes(500), b"PK\x03\x04" + bytes(90)]
)
def test_a_foreign_index_is_named(nano_copy, content):
    with open(nano_copy + ".index", "wb") as f:
        f.write(content)
    with pytest.raises(ValueError, match="expected a TensorFlow index"):
        read_checkpoint(nano_copy)


def test_verify_finds_one_flipped_bit(nano_copy, capsys):
    verify_checkpoint(nano_copy)
    entry = read_index(nano_copy + ".index")[2]["model/wte"]
    with open(data_path(nano_copy), "r+b") as f:
        f.seek(entry.offset + 1000)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match="model/wte has checksum 0x.*expected 0x.*download"):
        verify_checkpoint(nano_copy)
    assert capsys.readouterr().out == ""


def test_a_rewritten_index_reads_the_same(nano_copy):
    before = read_checkpoint(nano_copy)
    hostile_index(nano_copy, {})
    for name, array in read_checkpoint(nano_copy).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 1 << 40},
        {"offset": (1 << 64) - 4},
        {"offset": 0},
        {"size": 1 << 62},
        {"size": 0, "shape": (0, 7)},
        {"shape": (1 << 33, 1 << 33)},
        {"shape": (1 << 32, 1 << 32, 2048, 64)},
        {"shape": (2048, 32)},
        {"shape": (1,) * 100 + (2048, 64)},
        {"shape": ((1 << 64) - 1, 64)},
        {"shard": 3},
    ],
    ids=str,
)
def test_entries_that_cannot_be_are_refused(nano_copy, change):
    hostile_index(nano_copy, {"model/wte": change})
    with pytest.raises(ValueError, match=r"model\.ckpt.*(expected|begins)"):
        read_checkpoint(nano_copy)


def test_big_endian_numbers_are_read(tmp_path):
    """As a machine writes them whose byte order is the other one."""
    values = np.float32([[1.5, -2], [3, 1e30]])
    prefix, content = str(tmp_path / "model.ckpt"), values.astype(">f4").tobytes()
    entry = Entry(1, values.shape, 0, 0, len(content), table.mask_crc32c(table.crc32c(content)))
    header = table_entry(b"", b"\x08\x01\x10\x01")
    write_bytes(prefix + ".index", bundle_table([header + table_entry(b"a", entry_message(entry))]))
    write_bytes(data_path(prefix), content)
    array = read_checkpoint(prefix)["a"]
    assert array.dtype == np.float32 and array.tolist() == values.tolist()
    verify_checkpoint(prefix)
    write_bytes(prefix + ".index", bundle_table([table_entry(b"", b"\x08\x01\x10\x02")]))
    with pytest.raises(ValueError, match="index is damaged .*byte order 2"):
        read_checkpoint(prefix)
