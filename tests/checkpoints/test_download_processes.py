"""Downloads by real processes: killed, interrupted, two at once, out of space, in folders that cannot be written."""

import collections
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from download_server import CONTENT, DATA, HASHES, NANO, assert_whole, files, load, part
from helpers import ROOT
from tqdm import tqdm

from checkpoints import download
from checkpoints.openai import MODEL_FILES
from utils import load_encoder_hparams_and_params

N_BYTES = sum(map(len, CONTENT.values()))
# What a process may find instead of a lock that works.
LOCKS = {
    "lock": "",
    "no filelock": "sys.modules['filelock'] = None",
    "flock fails": "import fcntl, errno\ndef no(*_): raise OSError(errno.ENOLCK, 'no locks')\nfcntl.flock = no",
    "flock is missing": "import fcntl, errno\ndef no(*_): raise OSError(errno.ENOSYS, 'no locks')\nfcntl.flock = no",
    "flock does nothing": "import fcntl\nfcntl.flock = lambda *_: None",
}


def start(server, models_dir, before=""):
    """A process that loads, and so downloads, 355M."""
    code = f"import sys\n{before}\nimport utils\nfrom checkpoints import openai\nfrom console import command\n"
    code += f"openai.SHA256 = {HASHES}\n"
    code += f"command.run(lambda: utils.load_encoder_hparams_and_params('355M', {str(models_dir)!r}) and None)"
    env = os.environ | {"GPT2_BASE_URL": server.url, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def finish(process):
    """(status, what it said) of a process."""
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def n_bytes_of_parts(models_dir):
    return sum(path.stat().st_size for path in (models_dir / "355M").glob(DATA + ".*part"))


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_when_held(server, process, how=signal.SIGKILL, when=lambda: True):
    assert server.held.wait(60)
    wait_until(when)
    process.send_signal(how)
    status, err = finish(process)
    server.hold_after = None
    server.released.set()
    return status, err


# ----------------------------------------------------------------------------------------------------------------------
# One process
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", ["lock", "no filelock"])
def test_killed_at_random_bytes_it_resumes(etag_server, tmp_path, lock):
    rng = random.Random(lock)
    n_sent = 0
    for _ in range(5):
        etag_server.hold(rng.randrange(250_000))
        assert kill_when_held(etag_server, start(etag_server, tmp_path, LOCKS[lock]))[0] == -signal.SIGKILL
        n_sent += etag_server.n_sent
        for name in {*files(tmp_path)} & {*MODEL_FILES}:
            assert (tmp_path / "355M" / name).read_bytes() == CONTENT[name]
    etag_server.n_sent = 0
    assert finish(start(etag_server, tmp_path, LOCKS[lock]))[0] == 0
    assert_whole(tmp_path)
    # Each time at most a chunk and what lay between the two processes is lost.
    assert n_sent + etag_server.n_sent < N_BYTES + 5 * 200_000


@pytest.mark.parametrize("lock", ["lock", "no filelock"])
def test_interrupted_it_resumes(server, tmp_path, lock):
    server.hold(600_000)
    heed = "\nimport signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's & has it ignored
    process = start(server, tmp_path, LOCKS[lock] + heed)
    status, err = kill_when_held(server, process, signal.SIGINT, lambda: n_bytes_of_parts(tmp_path) > 400_000)
    assert status == 130 and "Traceback" not in err
    size = (tmp_path / "355M" / (DATA + ".part")).stat().st_size
    assert size > 400_000
    load(tmp_path)
    assert server.requests[-1] == (DATA, f"bytes={size}-")
    assert_whole(tmp_path)


def test_killed_while_it_verifies_nothing_is_fetched_again(server, tmp_path):
    before = "import os, signal\nfrom checkpoints import openai\n"
    before += "openai.verify_checkpoint = lambda *_: os.kill(os.getpid(), 9)"
    assert finish(start(server, tmp_path, before))[0] == -signal.SIGKILL
    assert DATA not in files(tmp_path)
    load(tmp_path)
    assert server.ranges() == [None, f"bytes={len(CONTENT[DATA])}-"]
    assert_whole(tmp_path)


def test_too_little_space_is_said_before_a_byte_is_written(server, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(500_000))
    part(tmp_path, CONTENT[DATA][:10_000])
    with pytest.raises(OSError, match=r"1\.0 MB are to come, 0\.5 MB are free; free some space or .*--models_dir"):
        load(tmp_path)
    assert (tmp_path / "355M" / (DATA + ".part")).read_bytes() == CONTENT[DATA][:10_000]
    monkeypatch.undo()


@pytest.mark.parametrize("lock", ["lock", "no filelock"])
def test_a_full_disk_keeps_what_came(server, tmp_path, lock):
    """A limit on the size of files ends the same write with the same kind of error, at the same byte."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))"
    status, err = finish(start(server, tmp_path, LOCKS[lock] + "\n" + limit))
    last = err.splitlines()[-1]
    assert status == 1 and "Traceback" not in err
    assert last.startswith("error: ") and "355M: File too large; free some space or choose another --models_dir" in last
    assert (tmp_path / "355M" / (DATA + ".part")).stat().st_size == 400_000
    load(tmp_path)
    assert server.requests[-1] == (DATA, "bytes=400000-")
    assert_whole(tmp_path)


def test_a_models_dir_that_is_a_file_says_the_way_out(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"choose a folder that you may write to with --models_dir"):
        load(tmp_path / "file")
    assert server.requests == []


def test_a_readonly_models_dir_says_the_way_out(server, tmp_path):
    tmp_path.chmod(0o555)
    become = "import os, requests, tqdm, filelock, fire, google_crc32c, utils\nfrom checkpoints import download\n"
    become += "if os.getuid() == 0: os.setegid(65534), os.seteuid(65534)"  # root may write everywhere
    status, err = finish(start(server, tmp_path, become))
    assert status == 1 and err.count("\n") == 1
    assert "Permission denied; choose a folder that you may write to with --models_dir" in err
    assert server.requests == [] and os.listdir(tmp_path) == []


def test_a_model_in_a_readonly_folder_is_read(tmp_path):
    shutil.copytree(NANO, tmp_path / "124M")
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    load_encoder_hparams_and_params("124M", str(tmp_path))
    assert before == {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}  # nothing was written


# ----------------------------------------------------------------------------------------------------------------------
# Several
# ----------------------------------------------------------------------------------------------------------------------


def waiting(process):
    """Read what a process says until it waits for another."""
    line = process.stderr.readline()
    assert "355M: another process is downloading it; waiting for that" in line
    return process


@pytest.mark.parametrize("killed", [False, True], ids=["finished", "killed"])
def test_the_second_waits_and_uses_the_result(server, tmp_path, killed):
    server.hold(600_000)
    first = start(server, tmp_path)
    assert server.held.wait(60)
    second = waiting(start(server, tmp_path))
    if killed:
        kill_when_held(server, first, when=lambda: n_bytes_of_parts(tmp_path) > 400_000)
    server.hold_after = None
    server.released.set()
    assert finish(second)[0] == 0
    assert killed or finish(first)[0] == 0
    assert_whole(tmp_path)
    assert [name for name, _ in server.requests] == [*MODEL_FILES, *[DATA] * killed]  # each once, and the rest
    assert not killed or int(server.requests[-1][1][6:-1]) > 400_000


def test_a_lock_whose_holder_does_nothing_is_passed_by(server, tmp_path, monkeypatch):
    """The holder stops, as a hung computer of a cluster does, with its part half written; then it wakes up."""
    server.hold(600_000)
    first = start(server, tmp_path)
    assert server.held.wait(60)
    first.send_signal(signal.SIGSTOP)
    server.hold_after = None
    second = start(server, tmp_path, "from checkpoints import download, lock\ndownload.STALE_S = lock.STALE_S = 0.5")
    status, err = finish(second)
    assert status == 0 and "no progress for 0.5 s; going on without waiting" in err
    assert_whole(tmp_path)
    server.released.set()
    first.send_signal(signal.SIGCONT)
    assert finish(first)[0] == 0
    assert_whole(tmp_path)


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock != "lock"])
@pytest.mark.parametrize("begun", [False, True], ids=["from the start", "from a part"])
def test_without_a_lock_two_only_cost_bandwidth(etag_server, tmp_path, lock, begun):
    if begun:
        part(tmp_path, CONTENT[DATA][:300_000], etag=etag_server.etag(CONTENT[DATA]))
    both = threading.Barrier(2, etag_server.at_half.clear)
    etag_server.at_half[DATA] = lambda: both.wait(20)  # both are in the middle of the weights
    processes = [start(etag_server, tmp_path, LOCKS[lock]) for _ in range(2)]
    for process in processes:
        status, err = finish(process)
        assert status == 0, err
    assert len(etag_server.ranges()) >= 2 and not both.broken
    assert_whole(tmp_path)


def test_a_part_that_another_process_took_is_left_alone(etag_server, tmp_path):
    """Another process, with a lock that does not work, throws the part away and begins its own."""
    path = tmp_path / "355M" / (DATA + ".part")

    def meddle():
        etag_server.at_half.clear()
        wait_until(path.exists)  # what was sent may still be on its way
        path.rename(tmp_path / "taken")
        path.write_bytes(CONTENT[DATA][:1000])

    etag_server.at_half[DATA] = meddle
    load(tmp_path)
    assert_whole(tmp_path)
    assert etag_server.ranges() == [None, "bytes=1000-"]
    assert (tmp_path / "taken").stat().st_size < len(CONTENT[DATA])  # nothing more was written there


def test_a_part_that_is_taken_before_its_first_byte_is_left_alone(etag_server, tmp_path, monkeypatch):
    path = tmp_path / "355M" / (DATA + ".part")

    def meddle(*args, desc=None, **kwargs):  # the bar is made between the empty part and its first byte
        if desc and DATA in desc and not (tmp_path / "taken").exists():
            path.rename(tmp_path / "taken")
            path.write_bytes(CONTENT[DATA][:1000])
        return tqdm(*args, desc=desc, **kwargs)

    monkeypatch.setattr("checkpoints.download.tqdm", meddle)
    load(tmp_path)
    assert_whole(tmp_path)
    assert etag_server.ranges() == [None, "bytes=1000-"] and (tmp_path / "taken").stat().st_size == 0


def test_a_version_that_a_kill_left_without_its_part_is_thrown_away(etag_server, tmp_path):
    (tmp_path / "355M").mkdir()
    for name in (f"{DATA}.part", f"{DATA}.{platform.node()}-{2**22 + 1}-0a1b2c3d.part"):
        (tmp_path / "355M" / f"{name}.etag").write_text('"old"')
    load(tmp_path)
    assert_whole(tmp_path)


def test_a_file_that_another_process_finished_is_used(server, tmp_path):
    server.at_half[DATA] = lambda: shutil.copy(os.path.join(NANO, DATA), tmp_path / "355M")
    server.faults[DATA] = "cuts"
    load(tmp_path)
    assert server.ranges() == [None]
    assert_whole(tmp_path)
