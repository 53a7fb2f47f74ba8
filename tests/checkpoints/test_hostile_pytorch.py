"""Archives that torch.save does not write, and tensors that do not fit their bytes: refused."""

import os
import shutil
import struct
import time
import tracemalloc

import pytest
from helpers import ROOT
from torchfiles import WHOLE, archive, array_of, name_of, one_tensor, opcodes, opened, pickled, tensor

from checkpoints.pickles import Damaged
from checkpoints.pytorch import MAX_DIRECTORY, MAX_PICKLE, TorchFile

GOLDEN = os.path.join(ROOT, "tests", "goldens", "ckpt.pt")


def test_a_file_cut_at_every_length(tmp_path):
    path = shutil.copy(GOLDEN, tmp_path)
    for size in range(os.path.getsize(GOLDEN) - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(Damaged, match=r"no zip archive|no PK\d\d of a zip archive"):
            TorchFile(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive(one_tensor()) + b"\0", "no PK56 of a zip archive"),
        (b"\0" + archive(one_tensor()), "no zip archive"),
        (b"PK\3\4" + archive(one_tensor()), "no PK66 of a zip archive"),
        (archive(one_tensor())[:-2] + b"\1\0", "does not fit its directory"),
        (archive(one_tensor())[:-22] + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 3, 3, 1, 1, 0), "the two ends"),
        (bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"...", "torch.save before PyTorch 1.6"),
        (b"", "no zip archive"),
        (archive({}), "no zip archive"),
        (archive({"x": b""}), "lacks 'data.pkl'"),
        (archive({"x/data.pkl": b"N."}, "a"), "lacks 'data.pkl'"),
        (archive(one_tensor(byteorder=b"big")), "big-endian"),
        (archive(one_tensor(), **{"data.pkl": {"crc32": 1}}), "the checksum of data.pkl is wrong"),
        (archive(one_tensor(), **{"data/0": {"method": 8}}), "'ckpt/data/0' is compressed or encrypted"),
        (archive(one_tensor(), **{"data/0": {"flags": 0x809}}), "'ckpt/data/0' is compressed or encrypted"),
        (archive(one_tensor(), **{"data/0": {"packed": 47}}), "'ckpt/data/0' is compressed or encrypted"),
        (archive(one_tensor(), **{"data/0": {"name": b"ckpt/data.pkl"}}), "'ckpt/data.pkl' lies in another .* twice"),
        (archive(one_tensor(), **{"data/0": {"header": 0}}), "lies in another file"),
        (archive(one_tensor(), **{"data/0": {"header": 64}}), "lies in another file"),
        (archive(one_tensor(), **{"data/0": {"header": 1 << 31}}), "lies in another file"),
        (archive(one_tensor(), **{"data.pkl": {"size": 1 << 31, "packed": 1 << 31}}), "lies in another file"),
        (archive(one_tensor(), **{"data.pkl": {"name": b"ckpt/data.pk\xff"}}), "lacks 'data.pkl'"),
        (archive({"data.pkl": bytes(MAX_PICKLE + 1)}), f"data.pkl has {MAX_PICKLE + 1} bytes"),
        (archive({"data.pkl": b"cos\nsystem\n."}), "would call 'os.system'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_archives_that_torch_does_not_write(tmp_path, content, message):
    with pytest.raises(Damaged, match=message):
        opened(tmp_path, content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": 1 << 8}, "no PK34 of a zip archive|lies in another|is not where"),
        ({"name": b"ckpt/data/1"}, "lacks 'data/0'"),
        ({"size": 44, "packed": 44}, "has 44 bytes, expected 12 numbers"),
        ({"size": 60, "packed": 60}, "has 60 bytes, expected 12 numbers"),
    ],
)
def test_numbers_that_are_not_where_the_directory_says(tmp_path, change, message):
    with pytest.raises(Damaged, match=message):
        array_of(tmp_path, archive(one_tensor(), **{"data/0": change}))


@pytest.mark.parametrize("extra", [b"\1\0\x18\0" + bytes(8), b"\1\0\0\0", b"\1\0\3\0abc", b"\1\0\xff\xff", b"\1"])
def test_large_values_that_are_cut_short(tmp_path, extra):
    with pytest.raises(Damaged):
        opened(
            tmp_path,
            archive(
                one_tensor(),
                **{"data/0": {"extra": extra, "packed": 0xFFFFFFFF, "size": 0xFFFFFFFF, "header": 0xFFFFFFFF}},
            ),
        )


def test_a_header_that_disagrees_with_the_directory(tmp_path):
    content = archive(one_tensor())
    at = content.index(b"ckpt/data/0")
    for changed in (
        content[:at] + b"ckpt/data/9" + content[at + 11 :],
        content[: at - 4] + struct.pack("<H", 12) + content[at - 2 :],
        content[: at - 2] + struct.pack("<H", 60000) + content[at:],
    ):
        with pytest.raises(Damaged, match="'ckpt/data/0' is not where the directory says"):
            array_of(tmp_path, changed)


@pytest.mark.parametrize(
    ("args", "offset", "message"),
    [
        (("FloatStorage", "0", 11, (11,), (1,)), 0, "has 48 bytes, expected 11 numbers"),
        (("FloatStorage", "0", 1 << 61, (3, 4), (4, 1)), 0, "has 48 bytes"),
        (("HalfStorage", "0", 12, (3, 4), (4, 1)), 0, "has 48 bytes, expected 12 numbers"),
        (("FloatStorage", "0", -12, (3, 4), (4, 1)), 0, "no storage of a tensor"),
        (("FloatStorage", "0", 12.0, (3, 4), (4, 1)), 0, "no storage of a tensor"),
        (("FloatStorage", 0, 12, (3, 4), (4, 1)), 0, "no storage of a tensor"),
        (("FloatStorage", "1", 12, (3, 4), (4, 1)), 0, "lacks 'data/1'"),
        (("FloatStorage", "../0", 12, (3, 4), (4, 1)), 0, "lacks 'data/../0'"),
        (("DoubleStorage", "0", 6, (6,), (1,)), 0, "numbers of torch.DoubleStorage"),
        (("LongStorage", "0", 6, (6,), (1,)), 0, "numbers of torch.LongStorage"),
        (("QInt8Storage", "0", 48, (48,), (1,)), 0, "would call 'torch.QInt8Storage'"),
        (("FloatStorage", "0", 12, (3, 4), (4, 1)), 1, "holds a part"),
        (("FloatStorage", "0", 12, (3, 4), (4, 1)), 1 << 62, "holds a part"),
        (("FloatStorage", "0", 12, (3, 4), (4, 1)), -1, "cannot be"),
        (("FloatStorage", "0", 12, (3, 4), (5, 1)), 0, "holds a part"),
        (("FloatStorage", "0", 12, (3, 4), (4, 0)), 0, "overlap"),
        (("FloatStorage", "0", 12, (3, 4), (1, 1)), 0, "overlap"),
        (("FloatStorage", "0", 12, (3, 4), (2, 1)), 0, "overlap"),
        (("FloatStorage", "0", 12, (3, 4), (4, -1)), 0, "cannot be"),
        (("FloatStorage", "0", 12, (3, -4), (4, 1)), 0, "cannot be"),
        (("FloatStorage", "0", 12, (0, 4), (4, 1)), 0, "holds a part"),
        (("FloatStorage", "0", 12, (1 << 40,), (0,)), 0, "overlap"),
        (("FloatStorage", "0", 12, (1 << 40, 1 << 40), (1 << 40, 1)), 0, "holds a part"),
        (("FloatStorage", "0", 12, (2, 2), (1 << 62, 1)), 0, "holds a part"),
        (("FloatStorage", "0", 12, (1 << 2000,), (1,)), 0, "holds a part"),
        (("FloatStorage", "0", 12, (3, 4), (4,)), 0, "cannot be"),
        (("FloatStorage", "0", 12, (1,) * 9, (1,) * 9), 0, "cannot be"),
        (("FloatStorage", "0", 12, [3, 4], (4, 1)), 0, "cannot be"),
        (("FloatStorage", "0", 12, (3, True), (4, 1)), 0, "cannot be"),
        (("FloatStorage", "0", 12, (3, "4"), (4, 1)), 0, "cannot be"),
    ],
    ids=str,
)
def test_tensors_that_do_not_fit_their_bytes(tmp_path, args, offset, message):
    with pytest.raises(Damaged, match=message) as e:
        array_of(tmp_path, archive(one_tensor(*args, offset=offset)))
    assert len(str(e.value)) < 1000


REBUILD, PARAMETER = name_of("torch._utils", "_rebuild_tensor_v2"), name_of("torch._utils", "_rebuild_parameter")


@pytest.mark.parametrize(
    "content",
    [
        bytes(REBUILD) + b")R.",
        bytes(REBUILD) + b"(NK\0)))NtR.",
        bytes(REBUILD) + b"(ctorch\nFloatStorage\nK\0))\x89NtR.",
        bytes(PARAMETER) + b")R.",
        bytes(PARAMETER) + b"NNN\x87R.",
        tensor(*WHOLE)[:-2] + opcodes({"neg": True}) + b"tR.",  # numbers to be negated when they are read
        b"ccollections\nOrderedDict\n](]K\1\x86etR.",
        b"ctorch\nFloatStorage\n)R.",
        pickled(("storage", name_of("torch", "FloatStorage"), "0", "cpu", 12))[:-1] + b"\x85Q.",
        pickled(("module", name_of("torch", "FloatStorage"), "0", "cpu", 12))[:-1] + b"Q.",
        pickled(("storage", "FloatStorage", "0", "cpu", 12))[:-1] + b"Q.",
        pickled("0")[:-1] + b"Q.",
    ],
)
def test_calls_with_other_arguments_than_torch_gives(tmp_path, content):
    with pytest.raises(Damaged):
        opened(tmp_path, archive(one_tensor() | {"data.pkl": content}))


def test_a_directory_of_many_files_and_a_larger_one(tmp_path):
    tracemalloc.start()
    started = time.process_time()
    assert len(opened(tmp_path, archive(one_tensor() | {f"data/{i}": b"" for i in range(1, 3000)})).records) == 3001
    names = [f"data/{i}" for i in range(1 + (MAX_DIRECTORY >> 15))]
    large = archive(dict.fromkeys(names, b""), **{name: {"extra": bytes(1 << 15)} for name in names})
    with pytest.raises(Damaged, match="does not fit its directory"):
        opened(tmp_path, large)
    assert time.process_time() - started < 10 and tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_wrong_number_of_files(tmp_path):
    content = archive(one_tensor())
    for n in (0, 1, 3, 0xFFFF):
        changed = bytearray(content)
        changed[-98 + 24 : -98 + 40] = struct.pack("<2Q", n, n)
        changed[-14:-10] = struct.pack("<2H", n, n)
        with pytest.raises(Damaged, match="its directory has 2 files"):
            opened(tmp_path, bytes(changed))
