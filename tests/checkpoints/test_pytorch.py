"""Archives of torch.save: tensors as they lie in the file."""

import io
import mmap
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from helpers import ROOT
from torchfiles import NUMBERS, archive, array_of, entry, local_header, one_tensor, opened

from checkpoints.pickles import Damaged
from checkpoints.pytorch import TorchFile

GOLDEN = os.path.join(ROOT, "tests", "goldens", "ckpt.pt")


def owner(array):
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def test_tensors_are_views_of_the_mapped_file(tmp_path):
    file = opened(tmp_path, archive(one_tensor()))
    array = file.array(file.content)
    assert array.dtype == np.float32 and (array == NUMBERS.reshape(3, 4)).all()
    assert isinstance(owner(array), mmap.mmap) and not array.flags.writeable
    file.verify()


def test_a_file_of_torch_itself():
    """Its records as Python's zipfile finds them; the state dict and the optimizer's are in the order of parameters."""
    file = TorchFile(GOLDEN)
    file.verify()
    with zipfile.ZipFile(GOLDEN) as expected:
        assert {f"ckpt/{name}" for name in file.records} == set(expected.namelist())
        assert len(file.records) > 40
        for i, (name, found) in enumerate(list(file.content["model"].items())[:-1]):
            assert found.storage.key == str(i), name
            assert file.array(found).tobytes() == expected.read(f"ckpt/data/{i}")
    assert file.content["iter_num"] == 250 and file.content["config"]["compile"] is True
    assert file.content["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert file.array(file.content["best_val_loss"]).shape == ()


@pytest.mark.parametrize("pickle_protocol", [2, 4, 5])
@pytest.mark.parametrize("has_sums", [True, False])
def test_what_torch_saves_now(tmp_path, pickle_protocol, has_sums):
    torch = pytest.importorskip("torch")
    whole = torch.arange(24.0).reshape(4, 6)
    content = {
        "whole": whole,
        "cut": whole[1:3],
        "turned": whole.T,
        "column": whole[:, 2],
        "half": whole.half() / 7,
        "short": whole.bfloat16() / 7,
        "parameter": torch.nn.Parameter(whole + 1),
        "number": torch.tensor(2.5),
        "list": [1, -5, 1 << 40, None, True, (1.5, "日")],
    }
    torch.serialization.set_crc32_options(has_sums)
    try:
        torch.save(content, tmp_path / "x.pt", pickle_protocol=pickle_protocol)
    finally:
        torch.serialization.set_crc32_options(True)
    file = TorchFile(str(tmp_path / "x.pt"))
    file.verify()
    assert file.content.pop("list") == content.pop("list")
    for name, found in file.content.items():
        assert (file.array(found) == content[name].detach().float().numpy()).all(), name


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "expected"),
    [
        ((4, 3), (1, 4), 0, NUMBERS.reshape(3, 4).T),
        ((2, 4), (4, 1), 4, NUMBERS.reshape(3, 4)[1:]),
        ((3,), (4,), 1, NUMBERS.reshape(3, 4)[:, 1]),
        ((2, 3, 2), (6, 2, 1), 0, NUMBERS.reshape(2, 3, 2)),
        ((2, 2, 3), (6, 1, 2), 0, NUMBERS.reshape(2, 3, 2).swapaxes(1, 2)),
        ((), (), 11, NUMBERS[11]),
        ((1, 12, 1), (999, 1, 0), 0, NUMBERS.reshape(1, 12, 1)),
    ],
)
def test_strides_and_offsets(tmp_path, shape, strides, offset, expected):
    found = array_of(tmp_path, archive(one_tensor("FloatStorage", "0", 12, shape, strides, offset=offset)))
    assert found.shape == expected.shape and (found == expected).all()


@pytest.mark.parametrize("alignment", [1, 2, 7])
def test_odd_offsets_are_copied_into_order(tmp_path, alignment):
    for n_bytes in range(4):
        found = array_of(tmp_path, archive({"pad": bytes(n_bytes), **one_tensor()}, alignment=alignment))
        assert found.flags.aligned and (found == NUMBERS.reshape(3, 4)).all()


def test_halves_become_float32(tmp_path):
    bits = np.arange(0, 1 << 16, 7, dtype=np.uint16)
    halves = array_of(tmp_path, archive(one_tensor("HalfStorage", "0", bits.size, bits.shape, (1,), numbers=bits)))
    assert halves.dtype == np.float32
    np.testing.assert_array_equal(halves, bits.view(np.float16).astype(np.float32))
    shorts = array_of(tmp_path, archive(one_tensor("BFloat16Storage", "0", bits.size, bits.shape, (1,), numbers=bits)))
    assert shorts.dtype == np.float32 and (shorts.view(np.uint32) == bits.astype(np.uint32) << 16).all()


def test_an_archive_without_its_large_end(tmp_path):
    content = archive(one_tensor())
    assert (array_of(tmp_path, content[:-98] + content[-22:]) == NUMBERS.reshape(3, 4)).all()


def test_an_archive_as_zipfile_writes_it(tmp_path):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as made:
        for name, content in one_tensor().items():
            made.writestr(f"archive/{name}", content)
    assert (array_of(tmp_path, stream.getvalue()) == NUMBERS.reshape(3, 4)).all()


def write_large(path, **changes):
    """A file whose numbers lie beyond 5 GB of nothing, where 32 bits do not lead."""
    content, directory, at = one_tensor(), b"", 0
    with open(path, "wb") as f:
        for name, data in content.items():
            full, crc32 = f"ckpt/{name}".encode(), zlib.crc32(data)
            f.seek(at)
            f.write(local_header(full, at, 64) + data)
            large = {"size": len(data), "packed": len(data), "header": at} | changes
            extra = b"FB\2\0ZZ" + struct.pack("<2H3Q", 1, 24, *large.values())
            directory += entry(full, crc32, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, extra=extra)
            at = 5 << 30
        f.seek(at + 4096)
        start = f.tell()
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 30, 45, 0, 0, 2, 2, len(directory), start)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(directory), 1)
        small = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 2, 2, len(directory), 0xFFFFFFFF, 0)
        f.write(directory + end64 + locator + small)


def test_an_archive_beyond_four_gigabytes(tmp_path):
    write_large(tmp_path / "x.pt")
    file = TorchFile(str(tmp_path / "x.pt"))
    assert (file.array(file.content) == NUMBERS.reshape(3, 4)).all()
    for changes in ({"size": 1 << 63}, {"header": 1 << 63}, {"header": (1 << 64) - 1}, {"size": 9, "packed": 9}):
        write_large(tmp_path / "x.pt", **changes)
        with pytest.raises(Damaged):
            TorchFile(str(tmp_path / "x.pt"))
