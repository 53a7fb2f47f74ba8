import io
import platform
import subprocess
import sys

import pytest
from helpers import ROOT, outcome, random_model

from console import command
from fast import memory

WINDOWS = """if True:
    import resource
    import gpt2
    from utils import load_encoder_hparams_and_params

    def page_faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    _, hparams, params = load_encoder_hparams_and_params("tiny")
    model, before = gpt2.Model(hparams, params), page_faults()
    for _ in gpt2.generate(model, [1] * 510, 520, slide_by=256):  # which feeds three times 257 tokens anew
        pass
    print(page_faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the limits are glibc's")
def test_prompts_find_their_memory_again():
    """1,300 page faults where freed memory is kept, 8,000 where it is not, fewer if the system gives large pages."""
    done = subprocess.run([sys.executable, "-c", WINDOWS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3000


def test_available_memory_is_what_the_system_and_the_container_leave(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  7000 kB\n"}
    monkeypatch.setattr(memory, "open", lambda path: io.StringIO(files[path]), raising=False)

    def available(**group):
        for name, text in group.items():
            files[f"/sys/fs/cgroup/memory.{name}"] = text
        return memory.available_bytes()

    assert available(max="max\n", current="5000\n", stat="anon 1\nfile 2000\n") == 7000 * 1024
    assert available(max="6000\n") == 6000 - 5000 + 2000
    files.clear()
    monkeypatch.setattr(memory, "open", open)
    assert 1e6 < memory.available_bytes() < 1e15


def test_a_system_that_says_nothing_has_half_of_its_memory_available(monkeypatch):
    def refuse(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(memory, "open", refuse, raising=False)
    assert 1e6 < memory.available_bytes() < 1e15


def test_more_keys_and_values_than_memory_are_refused(monkeypatch):
    model = random_model()
    monkeypatch.setattr(memory, "available_bytes", lambda: 20e9)
    with pytest.raises(
        MemoryError, match="48.4 GB are needed for keys and values, 20.0 GB are available; compute fewer"
    ):
        model.new_cache(n_batch=3_500_000)


def test_memory_that_is_not_there_is_one_line(monkeypatch):
    def ask():
        raise MemoryError("48.4 GB are needed")

    monkeypatch.setattr(sys, "argv", ["gpt2.py"])
    assert outcome(lambda: command.run(ask)) == (1, "", "error: 48.4 GB are needed\n")
