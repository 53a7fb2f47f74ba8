"""Many prompts of different lengths: batch/ with so many rows or worker processes, beside others' batches."""

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from itertools import product

import numpy as np

import gpt2
from batch import Request, complete_many
from batch.cluster import complete_chunk, complete_on_cluster, local_cluster
from benchmarks.measure import in_turn, load_or_random, report
from benchmarks.peers import PlainNumPy, installed_peers

LENGTHS = {"20 to 200": (20, 200), "20": (20, 20), "200": (200, 200)}  # of prompts, in tokens
N_NEW = (20, 200)  # tokens
ROWS, PEER_ROWS = (8, 16, 32, 64, 128), (8, 16, 32, 64)
N_TRIED = 64  # requests by which a peer's best way is found
N_ALONE = 8  # prompts continued one after another, for comparison
ALONE = "one after another"


class Ids:
    """An encoder of random models: a text is its ids."""

    eot_ids = ()

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]):
        return (f"{i} " for i in ids)


def random_requests(model: gpt2.Model, n: int, lengths: tuple[int, int]) -> list[Request]:
    rng, n_ctx = np.random.default_rng(2), model.hparams["n_ctx"]
    requests = []
    for i in range(n):
        sizes = [min(int(rng.integers(low, high + 1)), n_ctx // 2) for low, high in (lengths, N_NEW)]
        ids = rng.integers(model.hparams["n_vocab"], size=sizes[0]).tolist()
        requests.append(Request([ids], id=i, n_tokens_to_generate=sizes[1]))
    return requests


def n_tokens(requests: list[Request]) -> int:
    return sum(map(n_new, requests))


def load(model_size: str, models_dir: str | None) -> tuple:
    return Ids(), load_or_random(model_size, models_dir)


def texts_of(results: Iterable) -> dict[int, str]:
    return {result.request.id: result.choices[0].text for result in results}


def n_prompt(request: Request) -> int:
    return len(request.prompts[0])


def n_new(request: Request) -> int:
    return request.n_tokens_to_generate


def by_peer(peer, n_rows: int, order: Callable[[Request], int], requests: list[Request]) -> dict[int, str]:
    """Batches of n_rows requests that are alike in what `order` says, each as long as its longest."""
    texts, ordered = {}, sorted(requests, key=order)
    for start in range(0, len(ordered), n_rows):
        some = ordered[start : start + n_rows]
        new = peer.complete([request.prompts[0] for request in some], max(map(n_new, some)))
        for request, ids in zip(some, new, strict=True):
            texts[request.id] = Ids().decode(ids[: n_new(request)])
    return texts


def best_way(peer, requests: list[Request]) -> tuple[int, Callable]:
    """The number of rows and the order with which a peer takes least time for these requests."""
    seconds = {}
    for way in product(PEER_ROWS, (n_prompt, n_new)):
        started = time.perf_counter()
        by_peer(peer, *way, requests)
        seconds[way] = time.perf_counter() - started
    return min(seconds, key=seconds.get)


def actions_of(
    model: gpt2.Model, peers: list, clients: dict, requests: list[Request], names: tuple
) -> dict[str, Callable]:
    """What is compared on the same requests, by its name: functions that return texts."""
    plain = gpt2.Model(model.hparams, model.params)  # whose weights are not packed

    def alone():
        some = requests[:N_ALONE]
        new = [gpt2.generate(plain, request.prompts[0], request.n_tokens_to_generate) for request in some]
        return {request.id: Ids().decode(ids) for request, ids in zip(some, new, strict=True)}

    actions = {ALONE: alone}
    for n_rows in ROWS:
        actions[f"{n_rows} rows"] = lambda n=n_rows: texts_of(complete_many(model, Ids(), requests, max_rows=n))
    for n_workers, client in clients.items():
        task = partial(complete_chunk, load=load, names=names)
        actions[f"{n_workers} workers"] = lambda c=client, t=task: texts_of(complete_on_cluster(c, requests, t))
    for peer in peers:
        way = best_way(peer, requests[:N_TRIED])
        actions[f"{peer.name}, {way[0]} rows"] = partial(by_peer, peer, *way, requests)
    return actions


def compared(actions: dict[str, Callable], requests: list[Request], n_times: int) -> list[dict]:
    """A row for each action: tokens/s, times one after another, and how many texts are those of one after another."""
    texts: dict[str, dict] = {}

    def noted(name):
        started = time.perf_counter()
        texts[name] = actions[name]()
        return time.perf_counter() - started

    times = in_turn({name: partial(noted, name) for name in actions}, n_times, is_warm=True)
    rates = {name: n_tokens(requests) / seconds for name, seconds in times.items()}
    rates[ALONE] = n_tokens(requests[:N_ALONE]) / times[ALONE]
    rows = []
    for name, rate in rates.items():
        row = {"how": name, "tokens_per_s": round(float(np.median(rate)), 1)}
        row["times_one_by_one"] = round(float(np.median(rate / rates[ALONE])), 2)
        n_same = sum(texts[name][i] == text for i, text in texts[ALONE].items())
        rows.append(row | {"identical": f"{n_same} of {len(texts[ALONE])}"})
    return rows


def draw_runs(table: list[dict], title: str, axes) -> None:
    rows = [row for row in table if row["prompt_tokens"] == "20 to 200"][::-1]
    bars = axes.barh([row["how"] for row in rows], [row["tokens_per_s"] for row in rows], color="#4878a8")
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.set(xlabel="tokens/s", title=title)


def runs(
    model_size: str = "random:124M", models_dir: str | None = None, *, n_prompts=200, n_times=3, workers=2, peers=True
):
    """Tokens a second of n_prompts prompts with 20 to 200 new tokens each: rows, worker processes, other programs.

    Other programs get batches of the size that is fastest for each, of prompts alike in length or in the number
    of new tokens, whichever is faster.
    """
    model = load_or_random(model_size, models_dir)
    model.passes.pack(32)  # rows, the default of python -m batch
    others = [peer for peer in installed_peers(model) if not isinstance(peer, PlainNumPy)] if peers else []
    table = []
    with ExitStack() as stack:
        counts = [n for n in (1, workers) if 0 < n <= workers]
        clients = {n: stack.enter_context(local_cluster(n)) for n in dict.fromkeys(counts)}
        for name, lengths in LENGTHS.items():
            requests = random_requests(model, n_prompts, lengths)
            actions = actions_of(model, others, clients, requests, (model_size, models_dir))
            table += [{"prompt_tokens": name} | row for row in compared(actions, requests, n_times)]
    report("runs", table, partial(draw_runs, table, f"{model_size}: {n_prompts} prompts of 20 to 200 tokens"))
