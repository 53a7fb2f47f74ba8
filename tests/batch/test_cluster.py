"""A Dask scheduler and two workers as processes of this machine: what they compute, and what dies in the middle."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from helpers import ROOT, run, run_here
from processes import finish, start

from batch.cluster import host_of

distributed = pytest.importorskip("distributed", reason="Dask is not installed (pip install distributed)")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
FLAGS = ["--model_size=nano", "--n_tokens_to_generate=8"]
# Loaded by the workers: prompts that kill the worker, always or once, or wait for a file.
PRELOAD = """if True:
    import os, signal, time
    from batch import cluster, complete_many

    def complete_some(model, encoder, requests, max_bytes):
        text = str([request.prompts for request in requests])
        if "KILL ONCE" in text and not os.path.exists(FOLDER + "/killed"):
            open(FOLDER + "/killed", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if "KILL ALWAYS" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        while "WAIT" in text:
            time.sleep(0.05)
        return complete_many(model, encoder, requests, max_bytes)

    cluster.complete_many = complete_some
"""


def dask(folder, command, *flags, path=ROOT):
    """A scheduler or a worker, on ports that the system chooses."""
    env = os.environ | {"PYTHONPATH": path, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}
    flags = ["--host", "127.0.0.1", *flags]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.dask_{command}", *map(str, flags)],
            cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def address_in(file, scheduler):
    """Of a scheduler that has just been started, which first creates the file and then writes it."""
    while True:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return json.loads(file.read_text())["address"]
        assert scheduler.poll() is None, (file.parent / "log").read_text()
        time.sleep(0.05)


@contextlib.contextmanager
def cluster(folder, n_workers=2, scheduler_path=ROOT):
    """(the address, the scheduler's process) of a scheduler with its workers, which all end with it."""
    (folder / "preload.py").write_text(f"FOLDER = {str(folder)!r}\n{PRELOAD}")
    file = folder / "scheduler.json"
    flags = ["--port", 0, "--no-dashboard", "--scheduler-file", file]
    processes = [scheduler := dask(folder, "scheduler", *flags, path=scheduler_path)]
    flags = ["--nthreads", 1, "--memory-limit", 0, "--no-dashboard", "--preload", folder / "preload.py"]
    try:
        address = address_in(file, scheduler)
        processes += [dask(folder, "worker", address, *flags, "--death-timeout", 60) for _ in range(n_workers)]
        yield address, scheduler
    finally:
        for process in processes:  # at once: a nanny that is asked to end waits for a worker that waits for it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def lines_of(path):
    return sorted(path.read_bytes().splitlines())


def test_a_cluster_whose_workers_and_scheduler_die(tmp_path):
    prompts, waiting = tmp_path / "prompts", tmp_path / "waiting"
    texts = [f"{('ROMEO:', 'The king', 'KILL ONCE')[i % 3 if i < 3 else i % 2]} {i}" for i in range(64)]
    texts += ["KILL ALWAYS", "My lord"]
    prompts.write_text("\n".join(texts))
    waiting.write_text("\n".join([*texts[:64], "WAIT"]))
    for path in (prompts, waiting):
        assert run_here("-m", "batch", path, f"--output={path}.alone", *FLAGS).returncode == 0
    with cluster(tmp_path) as (address, scheduler):
        flags = [*FLAGS, f"--scheduler={address}"]
        done = run("-m", "batch", prompts, f"--output={tmp_path / 'out'}", *flags)
        assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr
        assert done.stderr.splitlines()[-1].startswith("65 prompts done, 1 error, ")
        found = {record["id"]: record for record in map(json.loads, lines_of(tmp_path / "out"))}
        expected = {record["id"]: record for record in map(json.loads, lines_of(tmp_path / "prompts.alone"))}
        killer = found.pop(65)
        assert killer["error"] == {"code": "worker_killed", "line": 65,
                                   "message": "line 65: it killed every worker that tried it"}  # fmt: skip
        assert expected.pop(65)["text"] and found == expected

        process = start("-m", "batch", str(waiting), f"--output={tmp_path / 'other'}", *flags)
        while not (tmp_path / "other").exists() or not (tmp_path / "other").stat().st_size:
            assert process.poll() is None
            time.sleep(0.05)
        scheduler.kill()
        status, out, err = finish(process)
    assert (status, out) == (1, b"") and b"Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: lost the scheduler at {address}".encode())
    assert 0 < len(lines_of(tmp_path / "other")) < 65
    assert run_here("-m", "batch", waiting, f"--output={tmp_path / 'other'}", *FLAGS).returncode == 0
    assert lines_of(tmp_path / "other") == lines_of(tmp_path / "waiting.alone")


def test_a_scheduler_outside_the_projects_folder(tmp_path):
    """It reads what is sent to the workers, so it needs the program too."""
    (tmp_path / "prompts").write_text("x")
    with cluster(tmp_path, n_workers=1, scheduler_path="") as (address, _):
        flags = [f"--output={tmp_path / 'out'}", f"--scheduler={address}", *FLAGS]
        done = run("-m", "batch", tmp_path / "prompts", *flags)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        1,
        "error: the scheduler or a worker cannot import batch; start all of them in the project's folder, with "
        "PYTHONPATH=.",
    )


def test_workers_of_this_machine(tmp_path):
    (tmp_path / "prompts").write_text("ROMEO:\nThe king\n" * 40)
    flags = [tmp_path / "prompts", *FLAGS, "--temperature=0.8"]
    assert run_here("-m", "batch", *flags, f"--output={tmp_path / 'alone'}").returncode == 0
    done = run("-m", "batch", *flags, f"--output={tmp_path / 'out'}", "--workers=2", "--ordered")
    assert done.returncode == 0 and done.stderr.startswith("dashboard: http://127.0.0.1:"), done.stderr
    assert done.stderr.splitlines()[-1].startswith("80 prompts done, 0 errors, ") and done.stderr.count("\n") == 2
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "alone")
    ids = [json.loads(line)["id"] for line in (tmp_path / "out").read_bytes().splitlines()]
    assert ids == list(range(1, 81))


def test_no_scheduler_is_one_line(tmp_path):
    (tmp_path / "prompts").write_text("x")
    flags = [f"--output={tmp_path / 'out'}", "--model_size=nano", "--scheduler=tcp://127.0.0.1:9"]
    done = run("-c", "from batch import cluster, run; from console import command\n"
               "cluster.CONNECT_S = 0.5; command.run(run.main)", tmp_path / "prompts", *flags)  # fmt: skip
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: no Dask scheduler at tcp://127.0.0.1:9"
    )


def test_dask_that_is_not_installed_is_said(tmp_path):
    (tmp_path / "prompts").write_text("x")
    hidden = "import sys; sys.modules['distributed'] = None\nfrom batch import run; from console import command\n"
    flags = [f"--output={tmp_path / 'out'}", "--model_size=nano", "--workers=2"]
    done = run("-c", hidden + "command.run(run.main)", tmp_path / "prompts", *flags)
    assert done.returncode == 1
    assert "error: --workers and --scheduler need Dask; pip install distributed (distributed is missing)" in done.stderr


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--workers=0"], "workers is 0, expected a whole number from 1 to 1024"),
        (["--workers=2", "--scheduler=tcp://x"], "--workers and --scheduler do not go together"),
    ],
)
def test_mistakes(tmp_path, flags, error):
    (tmp_path / "prompts").write_text("x")
    done = run_here("-m", "batch", tmp_path / "prompts", f"--output={tmp_path / 'out'}", *flags)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and error in done.stderr


def test_the_host_of_a_worker():
    addresses = ["tcp://10.0.0.1:4000", "tcp://10.0.0.1:4001", "tls://[::1]:80", "inproc://10.0.0.9/1/2"]
    assert Counter(map(host_of, addresses)) == {"10.0.0.1": 2, "::1": 1, "10.0.0.9": 1}


@pytest.mark.parametrize(("n_cores", "n"), [(8, 3), (2, 2), (1, 2)])
def test_workers_of_a_host_share_its_cores(n_cores, n):
    code = (
        "import os; from fast import threads\n"
        f"threads.CORES[:] = [{{i}} for i in range({n_cores})]; threads.share_cores(int(os.environ['I']), {n})\n"
        "print([min(core) for core in threads.CORES], threads.count_threads())"
    )
    seen = []
    for i in range(n):
        cores, n_threads = run("-c", code, env={"I": str(i), "OMP_NUM_THREADS": "1"}).stdout.rsplit(maxsplit=1)
        assert int(n_threads) == len(json.loads(cores)) > 0
        seen += json.loads(cores)
    assert set(seen) == set(range(n_cores)) and (len(seen) == n_cores or n > n_cores)
