"""What a pass costs: one token, a prompt, several rows, several texts; where it can be, beside other programs."""

import time
from functools import partial

import numpy as np

import gpt2
from benchmarks.measure import draw_bars, in_turn, load_or_random, milliseconds, random_ids, report, stream
from benchmarks.peers import N_STEPS, installed_peers
from console.stats import n_bytes
from fast import Passes

THIS, STREAM = "this program", "stream of the weights"


def largest_difference(logits: dict[str, np.ndarray], name: str) -> str:
    return f"{np.abs(logits[name] - logits[THIS]).max():.1e}"


# ----------------------------------------------------------------------------------------------------------------------
# Beside the peers
# ----------------------------------------------------------------------------------------------------------------------


def time_steps(model: gpt2.Model, peers: list, position: int, n_times: int) -> tuple[dict, dict]:
    """Seconds a token from `position` on, and the logits of the first, each by the program."""
    ids = random_ids(model, model.hparams["n_ctx"])
    cache, logits = model.new_cache(), {}
    model.forward([ids[:position]], cache)

    def steps():
        cache.length = position
        rows = [model.forward([[i]], cache)[0, 0] for i in ids[position : position + N_STEPS]]
        logits[THIS] = rows[0]

    def steps_of(peer):
        logits[peer.name] = peer.decode(ids[: position + peer.n_steps])

    actions = {STREAM: stream(model, N_STEPS), THIS: steps}
    for peer in peers:
        peer.prefill(ids[:position])
        actions[peer.name] = partial(steps_of, peer)
    n_steps = dict.fromkeys(actions, N_STEPS) | {peer.name: peer.n_steps for peer in peers}
    times = in_turn(actions, n_times)
    return {name: seconds / n_steps[name] for name, seconds in times.items()}, logits


def decode(model_size: str = "random:124M", models_dir: str | None = None, *, n_times=11):
    """A token from positions 10 and 900 on: this program, the stream of its weights, the peers."""
    model = load_or_random(model_size, models_dir)
    n_ctx, n_embd, n_layer = (model.hparams[name] for name in ("n_ctx", "n_embd", "n_layer"))
    peers, weight_bytes = installed_peers(model), n_bytes(model.params)
    table = []
    for position in (10, n_ctx * 900 // 1024):
        times, logits = time_steps(model, peers, position, n_times)
        kv_bytes = int(2 * (position + N_STEPS / 2) * n_embd * n_layer * 4)
        for name, seconds in times.items():
            row = {"position": position, "program": name} | milliseconds(seconds)
            n_read = weight_bytes + kv_bytes * (name == THIS)
            row["gb_per_s"] = round(n_read / np.median(seconds) / 1e9, 1)
            row["of_stream"] = round(n_read / weight_bytes * np.median(times[STREAM] / seconds), 3)
            if name in logits:
                row["largest_difference"] = largest_difference(logits, name)
            table.append(row)
    first = [row for row in table if row["position"] == 10]
    report("decode", table, partial(draw_bars, first, "program", f"{model_size}: a token from position 10 on"))


def prefill(model_size: str = "random:124M", models_dir: str | None = None, *, n_tokens=1000, n_times=5):
    """A prompt of n_tokens, logits of its last row: this program and the peers."""
    model = load_or_random(model_size, models_dir)
    ids = random_ids(model, min(n_tokens, model.hparams["n_ctx"]))
    logits = {}

    def feed():
        logits[THIS] = model.forward([ids], model.new_cache())[0, -1]

    def feed_to(peer):
        logits[peer.name] = peer.prefill(ids)

    peers = {peer.name: partial(feed_to, peer) for peer in installed_peers(model)}
    times = in_turn({THIS: feed} | peers, n_times)
    table = []
    for name, seconds in times.items():
        row = {"tokens": len(ids), "program": name} | milliseconds(seconds)
        row["times_this"] = round(float(np.median(seconds / times[THIS])), 2)
        table.append(row | {"largest_difference": largest_difference(logits, name)})
    report("prefill", table, partial(draw_bars, table, "program", f"{model_size}: a prompt of {len(ids)} tokens"))


# ----------------------------------------------------------------------------------------------------------------------
# Several rows
# ----------------------------------------------------------------------------------------------------------------------

COUNTS = ((1, 2, 3, 4, 5, 6, 8), (16, 32, 64))  # weights are packed for the first of them, then for the others
N_DRAFTED = 4  # steps of a draft before a check


def row_actions(model: gpt2.Model, draft: gpt2.Model, position: int, counts: tuple) -> dict:
    """For in_turn, by (number of rows, kind): step, after_draft and plain. The weights are packed for these before."""
    ids = random_ids(model, position + max(counts))
    cache, draft_cache = model.new_cache(), draft.new_cache()
    model.forward([ids[:position]], cache)
    draft.forward([ids[:1]], draft_cache)
    model.passes = Passes(model.params)
    model.passes.pack(counts[-1])

    def step(n, forward=model.forward):
        cache.length = position
        forward(np.array([ids[position : position + n]]), cache, n_last=n)

    def after_draft(n):  # -> seconds of the step alone
        for i in ids[:N_DRAFTED]:
            draft_cache.length = 1
            draft.forward([[i]], draft_cache)
        started = time.perf_counter()
        step(n)
        return time.perf_counter() - started

    def plain(n):
        step(n, partial(model.gpt2, **model.params))

    return {
        (n, kind.__name__): partial(kind, n) for n in dict.fromkeys((1, *counts)) for kind in (step, after_draft, plain)
    }


def draw_rows(table: list[dict], title: str, axes) -> None:
    for column, style, label in (
        ("ratio", "o-", "this program"),
        ("after_draft_ratio", "x:", "after steps of a draft"),
        ("plain_ratio", "s--", "x @ w"),
    ):
        axes.plot(
            *zip(*((row["rows"], row[column]) for row in table if column in row), strict=True), style, label=label
        )
    axes.set(xlabel="rows", ylabel="times one row", ylim=0, title=title)
    axes.legend(frameon=False)


def rows(
    model_size: str = "random:124M",
    models_dir: str | None = None,
    *,
    draft_model_size: str = "random:124M",
    position=10,
    n_times=9,
):
    """A step of 1 to 64 rows: with packed weights, the same after steps of a draft, and with plain products.

    All ratios are to one row with packed weights.
    """
    model = load_or_random(model_size, models_dir)
    draft = model if draft_model_size == model_size else load_or_random(draft_model_size, models_dir)
    table = []
    for counts in COUNTS:
        actions = {"stream": stream(model)} | row_actions(model, draft, position, counts)
        times, ways = in_turn(actions, n_times), model.passes.weights.ways
        for n in counts:
            row = {"rows": n} | milliseconds(times[n, "step"])
            for column, kind in (("ratio", "step"), ("after_draft_ratio", "after_draft"), ("plain_ratio", "plain")):
                row[column] = round(np.median(times[n, kind]) / np.median(times[1, "step"]), 2)
            table.append(row | {"way": ways[n].__name__ if n in ways else "x @ w"})
    table.append({"rows": "stream, 1"} | milliseconds(times["stream"]))
    report("rows", table, partial(draw_rows, table, f"{model_size}: a step of several rows"))


# ----------------------------------------------------------------------------------------------------------------------
# Several texts
# ----------------------------------------------------------------------------------------------------------------------

PROMPT_COUNTS = (1, 2, 4, 8, 16, 32, 64)
N_ALONE = 4  # prompts continued one after another, for comparison


def draw_batch(table: list[dict], title: str, axes) -> None:
    axes.plot(PROMPT_COUNTS, [row["tokens_per_s"] for row in table[1:]], "o-")
    axes.set(xlabel="prompts at once", ylabel="tokens/s", ylim=0, title=title)


def batch(model_size: str = "random:124M", models_dir: str | None = None, *, n_tokens=100, n_times=3):
    """Tokens a second of 1 to 64 prompts of different lengths at once, and of one after another.

    Batches use packed weights; texts one after another use plain products, as plain decoding does.
    """
    model = load_or_random(model_size, models_dir)
    few, many = (gpt2.Model(model.hparams, model.params) for _ in COUNTS)
    for each, counts in zip((few, many), COUNTS, strict=True):
        each.passes.pack(counts[-1])
    ids = random_ids(model, 20 * max(PROMPT_COUNTS))
    prompts = [ids[20 * i : 20 * i + 5 + 7 * i % 16] for i in range(max(PROMPT_COUNTS))]
    texts = {}

    def together(n):
        texts[n] = gpt2.generate_batch(few if n in COUNTS[0] else many, prompts[:n], n_tokens)

    def one_by_one():
        texts["alone"] = [list(gpt2.generate(model, prompt, n_tokens)) for prompt in prompts[:N_ALONE]]

    actions = {"alone": one_by_one} | {n: partial(together, n) for n in PROMPT_COUNTS}
    times = in_turn(actions, n_times, is_warm=True)
    alone = N_ALONE * n_tokens / times["alone"]
    table = [{"prompts": "one by one", "tokens_per_s": round(float(np.median(alone)), 1), "times_one_by_one": 1.0}]
    for n in PROMPT_COUNTS:
        rate = n * n_tokens / times[n]
        row = {"prompts": n, "tokens_per_s": round(float(np.median(rate)), 1)}
        row["times_one_by_one"] = round(float(np.median(rate / alone)), 2)
        table.append(row | {"identical": texts[n][:N_ALONE] == texts["alone"][:n]})
    report("batch", table, partial(draw_batch, table, f"{model_size}: many prompts"))
