"""Fixtures: the embedded models, and a server to download from."""

import hashlib
import os
import signal
import threading

# Threads of OpenBLAS that have nothing to do sleep soon (2^4 cycles, not 2^26), as several processes share the cores.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import pytest
from helpers import MODELS
from hypothesis import settings

from gpt2 import load_model

# A shell's & and nohup pass on SIGINT ignored, and the programs that are tested would then ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples in every run, however slow the machine, and no folder of them.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny():
    """(encoder, Model) of the embedded target."""
    return load_model("tiny", MODELS)


@pytest.fixture(scope="session")
def nano():
    """(encoder, Model) of the embedded draft."""
    return load_model("nano", MODELS)


@pytest.fixture
def pauses(monkeypatch):
    """The pauses between attempts to download, which are not made."""
    pauses = []
    monkeypatch.setattr("checkpoints.download.time.sleep", pauses.append)
    return pauses


@pytest.fixture
def server(monkeypatch):
    """A running Server, where downloads go."""
    import download_server  # it needs this file

    with download_server.Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        monkeypatch.setenv("GPT2_BASE_URL", server.url)
        monkeypatch.setattr("checkpoints.openai.SHA256", download_server.HASHES)
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def etag_server(server):
    server.etag = lambda content: f'"{hashlib.md5(content).hexdigest()}"'
    return server
