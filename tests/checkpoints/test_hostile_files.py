"""Model files made to do harm: each must end in one ValueError that names the file, soon and within its own size."""

import os
import shutil

import numpy as np
import pytest
from bundles import HPARAMS, entry_message, index_of, table, with_right_checksums, write_bundle
from helpers import MODELS, random_variables, read_bytes, run_here, within, write_bytes

from checkpoints import openai
from checkpoints.openai import MODEL_FILES
from checkpoints.tensorflow import (
    MAX_INDEX_SIZE,
    Entry,
    Slice,
    data_path,
    read_checkpoint,
    read_index,
    verify_checkpoint,
)
from checkpoints.weights import nest_params
from checkpoints.write_openai import HEADER, table_entry, varint
from utils import load_encoder_hparams_and_params

NANO = os.path.join(MODELS, "nano")


@pytest.fixture
def prefix(tmp_path):
    """A whole model of 352 bytes."""
    write_bundle(str(tmp_path / "model.ckpt"), random_variables(HPARAMS))
    return str(tmp_path / "model.ckpt")


@pytest.fixture
def nano_copy(tmp_path):
    shutil.copytree(NANO, tmp_path / "models" / "nano")
    return tmp_path / "models" / "nano"


@pytest.fixture
def modest():
    """Ends within 20 s of processor time and 100 MB, where the slips this guards against took minutes or gigabytes."""
    with within(seconds=20, n_bytes=100e6):
        yield


def fault_of(prefix, match=None):
    with pytest.raises(ValueError, match=match) as e:
        nest_params(read_checkpoint(prefix), HPARAMS, prefix)
    assert prefix in str(e.value)
    return str(e.value)


# ----------------------------------------------------------------------------------------------------------------------
# Damage
# ----------------------------------------------------------------------------------------------------------------------


def test_the_model_is_whole_until_it_is_damaged(prefix):
    verify_checkpoint(prefix)
    nest_params(read_checkpoint(prefix), HPARAMS, prefix)
    index = read_bytes(prefix + ".index")
    assert with_right_checksums(index) == index


def test_an_index_cut_at_every_length(prefix):
    index = read_bytes(prefix + ".index")
    for size in range(len(index)):
        write_bytes(prefix + ".index", index[:size])
        fault_of(prefix, r"model\.ckpt\.index is damaged or no TensorFlow index")


def test_a_data_file_cut_at_every_length(prefix):
    data = read_bytes(data_path(prefix))
    for size in [*range(len(data)), len(data) + 1]:
        write_bytes(data_path(prefix), (data + b"\0")[:size])
        assert data_path(prefix) in fault_of(prefix, f"has {size} bytes, expected {len(data)}")


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_every_byte_of_the_index_flipped_with_its_checksum_made_right(prefix, flip):
    """A checksum finds accidents, not intent: here the format's own checks are all there is."""
    index = read_bytes(prefix + ".index")
    n_refused = 0
    for at in range(len(index)):
        flipped = index[:at] + bytes([index[at] ^ flip]) + index[at + 1 :]
        write_bytes(prefix + ".index", with_right_checksums(flipped))
        try:
            arrays = read_checkpoint(prefix)
            assert sum(array.nbytes for array in arrays.values()) == 352
            nest_params(arrays, HPARAMS, prefix)
        except ValueError as e:
            assert prefix in str(e)
            n_refused += 1
    # The rest says nothing: stored checksums, restart points, version numbers, the footer's padding.
    assert n_refused > len(index) / 2


# ----------------------------------------------------------------------------------------------------------------------
# Intent: right checksums, and a structure that no writer makes
# ----------------------------------------------------------------------------------------------------------------------


def float_entry(i):
    return Entry(dtype=1, shape=(), shard=0, offset=4 * i, size=4, masked_crc32c=0)


def test_thousands_of_entries_are_read(prefix, modest):
    entries = {f"v{i:05}": float_entry(i) for i in range(5000)}
    write_bytes(prefix + ".index", index_of(entries))
    write_bytes(data_path(prefix), np.arange(5000, dtype="<f4").tobytes())
    arrays = read_checkpoint(prefix)
    assert len(arrays) == 5000 and arrays["v04999"] == 4999


def test_as_many_entries_as_an_index_can_hold(prefix, modest):
    variables = b"".join(table_entry(i.to_bytes(3, "big"), b"") for i in range(0x10000, 0x10000 + 40_000))
    write_bytes(prefix + ".index", table([table_entry(b"", HEADER) + variables]))
    fault_of(prefix)


@pytest.mark.parametrize("target", ["data", "index"])
def test_a_block_cannot_be_read_again_and_again(prefix, modest, target):
    """10,000 handles to one block of 120 kB are 1.2 GB of work; to the index itself, a cycle."""
    filler = table_entry(b"", HEADER) + b"".join(table_entry(varint(i), b"") for i in range(1, 20_000))
    handle = (0, len(filler) + 8) if target == "data" else (len(filler) + 13, 8)
    write_bytes(prefix + ".index", table([filler], [handle] * 10_000))
    fault_of(prefix, "damaged")


def test_keys_cannot_grow_out_of_what_they_share(prefix, modest):
    """100 kB of key, and 50,000 that share all of it, are 5 GB."""
    key = b"k" * 100_000
    entries = table_entry(b"", HEADER) + table_entry(key, b"") + table_entry(b"x", b"", len(key)) * 50_000
    write_bytes(prefix + ".index", table([entries]))
    fault_of(prefix, "a key of 100000 bytes, expected 512 at most")


def test_a_shape_of_twenty_thousand_dimensions(prefix, modest):
    entry = Entry(1, ((1 << 64) - 1,) * 20_000, 0, 0, 352, 0)
    write_bytes(prefix + ".index", index_of({"model/wte": entry}))
    assert len(fault_of(prefix, "model/wte has 352 bytes")) < 1000


def test_a_shape_nested_in_itself(prefix, modest):
    """Messages are read to the depth that the format has, whatever they hold."""
    message = b""
    while len(message) < 100_000:
        message = b"\x12" + varint(len(message)) + message
    write_bytes(prefix + ".index", table([table_entry(b"", HEADER) + table_entry(b"model/wte", message)]))
    fault_of(prefix, "damaged|model/wte has 0 bytes")


@pytest.mark.parametrize("name", [".index", ".data-00000-of-00001"])
def test_a_file_of_a_terabyte_is_not_read(prefix, modest, name):
    os.truncate(prefix + name, 1 << 40)  # holes, no blocks
    fault_of(prefix, f"more than {MAX_INDEX_SIZE} bytes|has {1 << 40} bytes, expected 352")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 2, "size": 16, "shape": (1 << 40,)}, "expected those of shape"),
        ({"dtype": 2, "size": 16, "shape": (1 << 32, 1 << 32)}, "expected those of shape"),
        ({"dtype": 7, "size": 4, "shape": (1 << 40,)}, "expected those of shape"),
        ({"dtype": 20, "size": 4, "shape": ()}, "dtype 20"),
        ({"dtype": (1 << 64) - 1}, "expected those of shape"),
        ({"dtype": 19, "shape": (2,), "offset": 1 << 50}, "expected 1125899906842628"),
        ({"dtype": 19, "shape": (2,), "offset": 2}, "has 4 bytes, expected 6"),
        (
            {"dtype": 19, "shape": (2,), "slices": [Slice([(0, 2)])]},
            "a has 0 bytes in shard 0, expected those of shape",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_not_set_aside(prefix, modest, changes, message):
    entry = float_entry(0)
    for field, value in changes.items():
        setattr(entry, field, value)
    write_bytes(prefix + ".index", index_of({"a": entry}))
    write_bytes(data_path(prefix), bytes(4))
    fault_of(prefix, message)


WHOLE, FIRST, REST = [(0, -1), (0, 2)], [(0, 1), (0, 2)], [(1, 2), (0, 2)]  # of a variable of shape [3, 2]


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([FIRST, REST], None),
        ([WHOLE], None),
        ([FIRST], "a has 8 bytes"),
        ([FIRST, FIRST], "a has 8 bytes"),
        ([FIRST, FIRST, [(1, 1), (0, 2)], [(0, 1), (0, -1)]], "not all of it"),
        ([FIRST, [(2, 2), (0, 2)]], "not all of it"),
        ([FIRST, [(1 << 63, 2), (0, 2)]], "not all of it"),
        ([FIRST, [(1, 2)]], "not all of it"),
        ([FIRST, [*REST, (0, 1)]], "not all of it"),
        ([FIRST, [*REST, *[(0, 1)] * 300]], "a slice of 302 dimensions"),
    ],
)
def test_slices_are_all_of_their_variable_or_refused(prefix, modest, slices, message):
    """Without bytes of their own, variables could ask for any room, and gaps be filled with anything."""
    parts = [Slice(extents) for extents in slices]
    entries, n_read = {"a": Entry(1, (3, 2), 0, 0, 0, 0, parts)}, 0
    for part in parts:
        n_rows = 3 if part.extents == WHOLE else part.extents[0][1]
        key = part.key("a") if len(part.extents) < 256 else "b"
        if key not in entries:
            entries[key] = Entry(1, (n_rows, 2), 0, n_read, 8 * n_rows, 0)
            n_read += 8 * n_rows
    write_bytes(prefix + ".index", index_of(entries))
    write_bytes(data_path(prefix), np.arange(n_read // 4, dtype="<f4").tobytes())
    if message:
        fault_of(prefix, message)
    else:
        arrays = read_checkpoint(prefix)
        assert arrays.keys() == {"a"} and arrays["a"].tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("n_shards", [0, 2, 1 << 31, (1 << 64) - 1])
def test_shards_that_are_not_there(prefix, modest, n_shards):
    header = b"\x08" + varint(n_shards)
    entry = table_entry(b"a", entry_message(float_entry(0)))
    write_bytes(prefix + ".index", table([table_entry(b"", header) + entry]))
    fault_of(prefix, "data-00000-of-.* is missing|in one of 0")


def test_an_index_without_variables_is_not_verified_either(prefix):
    write_bytes(prefix + ".index", index_of({}))
    write_bytes(data_path(prefix), b"")
    fault_of(prefix, "names no variables")
    with pytest.raises(ValueError, match="names no variables"):
        verify_checkpoint(prefix)


# ----------------------------------------------------------------------------------------------------------------------
# Files that are none
# ----------------------------------------------------------------------------------------------------------------------


def load(folder):
    return load_encoder_hparams_and_params(folder.name, str(folder.parent))


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_link_out_of_the_folder_is_refused(nano_copy, name):
    outside = nano_copy.parent.parent / "outside"
    shutil.move(nano_copy / name, outside)
    (nano_copy / name).symlink_to("../../outside")
    with pytest.raises(ValueError, match=f"{name} is a link to .*outside, out of its folder"):
        load(nano_copy)


def test_links_within_the_folder_and_to_the_folder_are_the_users(nano_copy):
    for name in MODEL_FILES:
        (nano_copy / f"my-{name}").symlink_to(name)
        os.replace(nano_copy / name, nano_copy / f"its-{name}")
        (nano_copy / name).symlink_to(f"its-{name}")
    (nano_copy.parent / "linked").symlink_to(nano_copy)
    load(nano_copy.parent / "linked")


@pytest.mark.parametrize("target", ["nowhere", "model.ckpt.index"])
def test_a_link_to_nothing_or_to_itself_is_missing(nano_copy, target):
    os.remove(nano_copy / "model.ckpt.index")
    (nano_copy / "model.ckpt.index").symlink_to(target)
    with pytest.raises(ValueError, match="nano lacks model.ckpt.index"):
        load(nano_copy)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_pipe_is_not_waited_for_and_a_folder_is_no_file(nano_copy, name, make):
    os.remove(nano_copy / name)
    make(nano_copy / name)
    with pytest.raises(ValueError, match=f"{name} is a folder, a pipe or a device"):
        load(nano_copy)


def test_shards_are_files_of_the_folder_too(nano_copy):
    """Also where there is no data file of the common name."""
    first, second = (data_path(str(nano_copy / "model.ckpt"), i, 2) for i in range(2))
    os.rename(nano_copy / "model.ckpt.data-00000-of-00001", first)
    os.mkfifo(second)
    with pytest.raises(ValueError, match="data-00001-of-00002 is a folder, a pipe or a device"):
        load(nano_copy)
    os.remove(second)
    write_bytes(nano_copy.parent / "outside", b"")
    os.symlink(nano_copy.parent / "outside", second)
    with pytest.raises(ValueError, match="data-00001-of-00002 is a link to .*outside, out of its folder"):
        load(nano_copy)


@pytest.mark.parametrize("name", sorted(openai.MAX_SIZES))
def test_a_text_file_of_a_terabyte_is_not_read(nano_copy, modest, name):
    os.truncate(nano_copy / name, 1 << 40)
    with pytest.raises(ValueError, match=f"{name} has {1 << 40} bytes, expected .* at most"):
        load(nano_copy)


def test_a_hostile_name_stays_on_one_line(nano_copy):
    index = read_index(str(nano_copy / "model.ckpt.index"))[2]
    index["a\n\x1b[2Jb"] = float_entry(1 << 40)
    write_bytes(nano_copy / "model.ckpt.index", index_of(index | {"a\n\x1b[2Jb": Entry(1, (), 9, 0, 4, 0)}))
    done = run_here("gpt2.py", "x", "--model_size", "nano", "--models_dir", nano_copy.parent)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and r"a\n\x1b[2Jb has 4 bytes in shard 9" in done.stderr
