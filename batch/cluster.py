"""The same on several processes, of this machine or of many, with Dask distributed: https://distributed.dask.org.

A task is a chunk of prompts. Only the client reads and writes; workers keep nothing but the model, which each maps on
its first task, so the processes of a host share it in the page cache. A chunk whose worker dies is run again elsewhere
by the scheduler. One that is said to kill workers is cut in halves until the prompt is found that does it.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from urllib.parse import urlsplit

from batch.records import GO_ON, model_digest
from batch.requests import Request
from batch.schedule import Result, complete_many
from fast.memory import available_bytes
from fast.threads import share_cores
from gpt2 import load_model

N_CHUNK = 64  # prompts of a task: enough to keep a worker's rows full, few enough to lose
N_KILLS = 3  # workers that a chunk may kill before it is cut
CONNECT_S, POLL_S = 15, 1

# ----------------------------------------------------------------------------------------------------------------------
# In a worker
# ----------------------------------------------------------------------------------------------------------------------

turns = threading.Lock()  # a worker with several threads computes one chunk at a time
models: dict[tuple, tuple] = {}  # encoder and model by their names


def place_on_host() -> int:
    """A number that no other worker of this host has as long as this process lives, from 0 on."""
    try:
        import fcntl  # not on Windows
    except ImportError:
        return 0
    for i in range(1024):
        path = os.path.join(tempfile.gettempdir(), f"gpt2-worker-{os.getuid()}-{i}.lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return i  # the file stays open, and so locked
        except OSError:
            os.close(fd)
    return 0


def load_checked(model_size: str, models_dir: str | None, gelu: str | None, vocabulary: str | None, digest: str):
    """(encoder, model). ValueError: it is another than the client's."""
    encoder, model = load_model(model_size, models_dir, gelu=gelu, vocabulary=vocabulary)
    if model_digest(encoder, model) != digest:
        raise ValueError(f"a worker has another model under the name {model_size}; copy the same files to all hosts")
    return encoder, model


def complete_chunk(
    requests: list[Request], load: Callable[..., tuple], names: tuple, hosts: Counter, max_bytes: float | None = None
) -> list[Result]:
    """The results of a chunk, by the model of load(*names), which is loaded on the first call and kept.

    `hosts` counts the workers of each host, which share its cores and memory.
    """
    from distributed import get_worker  # in a worker it is there

    n_on_host = max(1, hosts[host_of(get_worker().address)])
    with turns:
        if not models:
            share_cores(place_on_host(), n_on_host)
        if names not in models:
            models[names] = load(*names)
        encoder, model = models[names]
        max_bytes = available_bytes() / 2 / n_on_host if max_bytes is None else max_bytes
        return list(complete_many(model, encoder, requests, max_bytes))


def host_of(address: str) -> str:
    return urlsplit(address).hostname or address


# ----------------------------------------------------------------------------------------------------------------------
# In the client
# ----------------------------------------------------------------------------------------------------------------------


def import_dask():
    """ValueError: it is not installed."""
    try:
        import dask
        import distributed
    except ImportError as e:
        raise ValueError(f"--workers and --scheduler need Dask; pip install distributed ({e.name} is missing)") from e
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] in ("distributed", "tornado")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters is said below, in one line
    return dask, distributed


def ignore_interrupts(distributed, client) -> None:
    """Ctrl-C in a terminal reaches the workers too, now and after a restart. The client ends them."""

    class Ignoring(distributed.WorkerPlugin):
        def setup(self, worker):  # in the worker's main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    client.register_plugin(Ignoring())


@contextlib.contextmanager
def local_cluster(n_workers: int) -> Iterator:
    """A client of n_workers processes of this machine, which end with it."""
    dask, distributed = import_dask()
    config = {
        "distributed.scheduler.allowed-failures": N_KILLS - 1,
        # Dask's own would have freed memory given back at once, and each large array page faults of its own.
        "distributed.nanny.pre-spawn-environ": {},
    }
    with (
        dask.config.set(config),
        distributed.LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=None,  # mapped weights would count
            silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        ignore_interrupts(distributed, client)
        yield client


@contextlib.contextmanager
def connected(address: str) -> Iterator:
    """A client of a running scheduler. ConnectionError: there is none."""
    _, distributed = import_dask()
    try:
        client = distributed.Client(address, timeout=CONNECT_S)
    except (OSError, ValueError) as e:
        raise ConnectionError(f"no Dask scheduler at {address}: {e}") from e
    try:
        yield client
    finally:
        with contextlib.suppress(Exception):  # a scheduler that died cannot be left politely
            client.close(timeout=POLL_S)


def workers_of(client) -> Counter:
    """How many workers each host has, once there is one."""
    is_told = False
    while not (workers := client.nthreads()):
        if not is_told:
            print(f"waiting for workers at {client.scheduler.address}", file=sys.stderr)
        is_told = True
        time.sleep(POLL_S)
    return Counter(map(host_of, workers))


class Chunks:
    """Chunks of requests on their way: those in flight, those that are cut, and suspects, which are run alone."""

    def __init__(self, client, requests: Iterable[Request], complete):
        self.client, self.requests, self.complete = client, iter(requests), complete
        self.in_flight: dict = {}  # chunks by their futures
        self.cut: deque[list[Request]] = deque()
        self.suspects: deque[Request] = deque()

    def submit(self, chunk: list[Request], hosts: Counter) -> None:
        future = self.client.submit(self.complete, chunk, hosts=hosts, pure=False)
        self.in_flight[future] = chunk

    def send(self) -> None:
        """As many chunks as there are workers. A suspect has all of them to itself, so that no other is blamed."""
        if self.suspects:
            if not self.in_flight:
                self.submit([self.suspects[0]], workers_of(self.client))
            return
        hosts = workers_of(self.client)
        while len(self.in_flight) < hosts.total():
            chunk = self.cut.popleft() if self.cut else list(islice(self.requests, N_CHUNK))
            if not chunk:
                return
            self.submit(chunk, hosts)

    def results_of(self, future) -> Iterator[Result]:
        """Of a future that is done. What a task raises is raised here; a chunk that kills workers is cut."""
        from distributed import KilledWorker

        chunk = self.in_flight.pop(future)
        is_alone = bool(self.suspects) and chunk[0] is self.suspects[0]
        try:
            results = future.result()  # lost with its worker, it is computed anew, and may kill workers only then
        except KilledWorker:
            if is_alone:
                message = f"line {chunk[0].line}: it killed every worker that tried it"
                yield Result(self.suspects.popleft(), [], error=message, code="worker_killed")
            elif len(chunk) == 1:
                self.suspects += chunk
            else:
                self.cut += chunk[: len(chunk) // 2], chunk[len(chunk) // 2 :]
            return
        except (ImportError, RuntimeError) as e:
            cause = e if isinstance(e, ImportError) else e.__cause__  # the scheduler reads tasks as well
            if not isinstance(cause, ImportError):
                raise
            raise ValueError(
                f"the scheduler or a worker cannot import {cause.name}; start all of them in the project's folder, "
                "with PYTHONPATH=."
            ) from e
        if is_alone:
            self.suspects.popleft()
        yield from results


def complete_on_cluster(client, requests: Iterable[Request], task: Callable[..., list[Result]]) -> Iterator[Result]:
    """What complete_many yields, computed by the workers of `client`; texts of a chunk come together.

    task(chunk, hosts=...) gives the results of a chunk. ConnectionError: the scheduler is gone. ValueError: it or a
    worker cannot import this program, or what a task raises.
    """
    import distributed

    chunks, address = Chunks(client, requests, task), client.scheduler.address
    try:
        while True:
            chunks.send()
            if not chunks.in_flight:
                return
            try:
                done = distributed.wait(list(chunks.in_flight), POLL_S, "FIRST_COMPLETED").done
            except (TimeoutError, distributed.TimeoutError):
                continue
            for future in done:
                yield from chunks.results_of(future)
    except (OSError, distributed.CancelledError) as e:
        raise ConnectionError(f"lost the scheduler at {address} ({type(e).__name__}); {GO_ON}") from e
