"""What the README claims about speed, measured: one subcommand a table, each as CSV and PNG in benchmarks/.

    python benchmark.py rows --model_size random:124M
    python benchmark.py all

Ratios are of one run: what is compared is measured in turn, turn by turn where a table has ratios to one program, and
medians are quoted with their spread (the quartiles).
random:124M has random weights of the real shapes. Peers that happen to be installed get the same weights and tokens.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np

import cli
import gpt2
import speculative
from adaptive import Adaptive
from endurance import endurance
from measure import FOLDER, draw_bars, in_turn, load_model, milliseconds, random_ids, report, stream
from peers import N_STEPS, PEERS, plain_forward
from sampling import make_sampler
from speculative import DraftModel, FirstOf, PromptLookup
from stats import n_bytes
from utils import load_encoder_hparams_and_params

# ----------------------------------------------------------------------------------------------------------------------
# Beside the peers
# ----------------------------------------------------------------------------------------------------------------------


def installed_peers(model: gpt2.Model) -> dict:
    peers = {}
    for peer in PEERS:
        try:
            peers[peer.name] = peer(model)
        except ImportError as e:
            print(f"{peer.name}: not installed ({e.name})", file=sys.stderr)
    return peers


def decode(model_size: str = "random:124M", models_dir: str = "models", *, n_times=11):
    """A token from positions 10 and 900 on: this program, the stream of its weights, the peers."""
    model = load_model(model_size, models_dir)
    peers = installed_peers(model)
    n_steps = {name: peer.n_steps for name, peer in peers.items()}
    weight_bytes = n_bytes(model.params)
    ids = random_ids(model, model.hparams["n_ctx"])
    rows = []
    for position in (10, model.hparams["n_ctx"] * 900 // 1024):
        cache = model.new_cache()
        model.forward([ids[:position]], cache)
        logits = {}

        def steps(position=position, cache=cache, logits=logits):
            cache.length = position
            new = [model.forward([[i]], cache)[0, 0] for i in ids[position : position + N_STEPS]]
            logits["this program"] = new[0]

        actions = {"stream of the weights": stream(model, N_STEPS), "this program": steps}
        for name, peer in peers.items():
            peer.prefill(ids[:position])
            fed = ids[: position + peer.n_steps]
            actions[name] = lambda name=name, peer=peer, fed=fed, logits=logits: logits.update({name: peer.decode(fed)})
        times = {name: t / n_steps.get(name, N_STEPS) for name, t in in_turn(actions, n_times).items()}
        kv_bytes = int(2 * (position + N_STEPS / 2) * model.hparams["n_embd"] * model.hparams["n_layer"] * 4)
        for name, values in times.items():
            row = {"position": position, "program": name} | milliseconds(values)
            n_read = weight_bytes + kv_bytes * (name == "this program")
            row["gb_per_s"] = round(n_read / np.median(values) / 1e9, 1)
            in_pairs = times["stream of the weights"] / values
            row["of_stream"] = round(n_read / weight_bytes * np.median(in_pairs), 3)
            if name in logits:
                row["largest_difference"] = f"{np.abs(logits[name] - logits['this program']).max():.1e}"
            rows.append(row)
    first = [row for row in rows if row["position"] == 10]
    report("decode", rows, draw_bars(first, "program", f"{model_size}: a token from position 10 on"))


def prefill(model_size: str = "random:124M", models_dir: str = "models", *, n_tokens=1000, n_times=5):
    """A prompt of n_tokens, logits of its last row: this program and the peers."""
    model = load_model(model_size, models_dir)
    ids = random_ids(model, min(n_tokens, model.hparams["n_ctx"]))
    logits = {}
    actions = {"this program": lambda: logits.update({"this program": model.forward([ids], model.new_cache())[0, -1]})}
    for name, peer in installed_peers(model).items():
        actions[name] = lambda name=name, peer=peer: logits.update({name: peer.prefill(ids)})
    rows = []
    times = in_turn(actions, n_times)
    for name, values in times.items():
        row = {"tokens": len(ids), "program": name} | milliseconds(values)
        row["times_this"] = round(float(np.median(values / times["this program"])), 2)
        row["largest_difference"] = f"{np.abs(logits[name] - logits['this program']).max():.1e}"
        rows.append(row)
    report("prefill", rows, draw_bars(rows, "program", f"{model_size}: a prompt of {len(ids)} tokens"))


# ----------------------------------------------------------------------------------------------------------------------
# This program alone
# ----------------------------------------------------------------------------------------------------------------------


COUNTS = (1, 2, 3, 4, 5, 6, 8, 16, 32, 64)
N_DRAFTED = 4  # steps of a draft before a check


def rows(
    model_size: str = "random:124M",
    models_dir: str = "models",
    *,
    draft_model_size: str = "random:124M",
    position=10,
    n_times=9,
):
    """A step of 1 to 64 rows: again and again, after steps of a draft, and with plain products."""
    model = load_model(model_size, models_dir)
    draft = model if draft_model_size == model_size else load_model(draft_model_size, models_dir)
    ids = random_ids(model, position + max(COUNTS))
    kept, drafted = model.new_cache(), draft.new_cache()
    model.forward([ids[:position]], kept)
    draft.forward([ids[:1]], drafted)
    for each in (model, draft):
        each.passes.shares.pack()

    def step(n, forward=model.forward):
        kept.length = position
        forward(np.array([ids[position : position + n]]), kept, n_last=n)

    def after_draft(n):
        for i in ids[:N_DRAFTED]:
            drafted.length = 1
            draft.forward([[i]], drafted)
        started = time.perf_counter()
        step(n)
        return time.perf_counter() - started

    plain = partial(step, forward=partial(gpt2.gpt2, **model.params))
    actions = {"stream": stream(model)}
    for n in COUNTS:
        actions |= {(n, kind.__name__): partial(kind, n) for kind in (step, after_draft)} | {
            (n, "plain"): partial(plain, n)
        }
    times = in_turn(actions, n_times)
    base, ways = np.median(times[1, "step"]), model.passes.shares.ways
    table = []
    for n in COUNTS:
        row = {"rows": n} | milliseconds(times[n, "step"])
        for column, kind in (("ratio", "step"), ("after_draft_ratio", "after_draft"), ("plain_ratio", "plain")):
            row[column] = round(np.median(times[n, kind]) / base, 2)
        table.append(row | {"way": ways[n].__name__ if n in ways else "x @ w"})
    table.append({"rows": "stream, 1"} | milliseconds(times["stream"]))

    def draw(axes):
        for column, style, label in (
            ("ratio", "o-", "this program"),
            ("after_draft_ratio", "x:", "after steps of a draft"),
            ("plain_ratio", "s--", "x @ w"),
        ):
            axes.plot(COUNTS, [row[column] for row in table[:-1]], style, label=label)
        axes.set(xlabel="rows", ylabel="times one row", ylim=0, title=f"{model_size}: a step of several rows")
        axes.legend(frameon=False)

    report("rows", table, draw)


def batch(model_size: str = "random:124M", models_dir: str = "models", *, n_tokens=100, n_times=3):
    """Tokens a second of 1 to 64 prompts of different lengths at once, and of one after another."""
    model = load_model(model_size, models_dir)
    model.passes.shares.pack()
    counts = (1, 2, 4, 8, 16, 32, 64)
    ids = random_ids(model, 20 * max(counts))
    prompts = [ids[20 * i : 20 * i + 5 + 7 * i % 16] for i in range(max(counts))]
    texts = {}

    def together(n):
        texts[n] = gpt2.generate_batch(model, prompts[:n], n_tokens)

    def one_by_one():
        texts["alone"] = [list(gpt2.generate(model, prompt, n_tokens)) for prompt in prompts[:4]]

    times = in_turn({"alone": one_by_one} | {n: partial(together, n) for n in counts}, n_times, is_warm=True)
    alone = 4 * n_tokens / times["alone"]
    table = [{"prompts": "one by one", "tokens_per_s": round(float(np.median(alone)), 1), "times_one_by_one": 1.0}]
    for n in counts:
        rate = n * n_tokens / times[n]
        row = {"prompts": n, "tokens_per_s": round(float(np.median(rate)), 1)}
        row["times_one_by_one"] = round(float(np.median(rate / alone)), 2)
        table.append(row | {"identical": texts[n][:4] == texts["alone"][:n]})

    def draw(axes):
        axes.plot(counts, [row["tokens_per_s"] for row in table[1:]], "o-")
        axes.set(xlabel="prompts at once", ylabel="tokens/s", ylim=0, title=f"{model_size}: many prompts")

    report("batch", table, draw)


def cache(model_size: str = "tiny", models_dir: str = "models", *, n_points=24):
    """The time of a step at every position with the KV cache, and without."""
    model = load_model(model_size, models_dir)
    n_ctx = model.hparams["n_ctx"]
    ids = random_ids(model, n_ctx)
    positions = np.unique(np.linspace(2, n_ctx, n_points).astype(int))
    kept = model.new_cache()
    table = []
    for n in positions:
        model.forward([ids[kept.length : n]], kept)

        def with_cache(n=n):
            kept.length = n - 1
            model.forward([ids[n - 1 : n]], kept)

        times = in_turn({"with": with_cache, "without": lambda n=n: model.forward([ids[:n]], model.new_cache())}, 3)
        table.append({"position": int(n)} | {f"{k}_ms": round(np.median(v) * 1e3, 3) for k, v in times.items()})

    def draw(axes):
        x = np.linspace(0, n_ctx, 100)
        for column, degree, color in (("without", 2, "#c44e52"), ("with", 1, "#4878a8")):
            y = [row[f"{column}_ms"] for row in table]
            axes.plot(positions, y, "o", color=color, markersize=4, label=f"{column} cache")
            fit = np.polynomial.Polynomial.fit(positions, y, degree)
            axes.plot(x, fit(x), color=color, linewidth=1, label=f"{'linear' if degree == 1 else 'quadratic'} fit")
        axes.set(xlabel="position", ylabel="ms a token", ylim=0, title=f"{model_size}: why the KV cache exists")
        axes.legend(frameon=False)

    report("cache", table, draw)


PARTS = (
    "embedding",
    "layer norm",
    "QKV product",
    "attention",
    "projection",
    "MLP",
    "output product",
    "sums, cache",  # the rest
)


def components(model_size: str = "random:124M", models_dir: str = "models", *, n_times=9):
    """Where a step's time goes, by position."""
    model = load_model(model_size, models_dir)
    n_embd, n_ctx = model.hparams["n_embd"], model.hparams["n_ctx"]
    ids = random_ids(model, n_ctx)
    spent: dict[str, float] = {}

    def timed(name_of: Callable, function: Callable) -> Callable:
        def run(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name_of(*args)] = spent.get(name_of(*args), 0) + time.perf_counter() - started
            return result

        return run

    originals = {name: getattr(gpt2, name) for name in ("embed", "layer_norm", "attend", "feed_forward", "matmul")}
    products = {3 * n_embd: "QKV product", n_embd: "projection", model.hparams["n_vocab"]: "output product"}
    table = []
    try:
        gpt2.embed = timed(lambda *_: "embedding", gpt2.embed)
        gpt2.layer_norm = timed(lambda *_: "layer norm", gpt2.layer_norm)
        gpt2.attend = timed(lambda *_: "attention", gpt2.attend)
        gpt2.feed_forward = timed(lambda *_: "MLP", gpt2.feed_forward)
        gpt2.matmul = timed(
            lambda x, w: products.get(w.shape[1], "in MLP") if x.shape[-1] == n_embd else "in MLP", gpt2.matmul
        )
        for position in [max(1, n_ctx * i // 1024) for i in (1, 128, 256, 512, 768, 1000)]:
            kept = model.new_cache()
            model.forward([ids[:position]], kept)
            samples = []
            for _ in range(n_times):
                spent.clear()
                started = time.perf_counter()
                model.forward([ids[position : position + 1]], kept)
                total = time.perf_counter() - started
                kept.length = position
                spent[PARTS[-1]] = total - sum(value for name, value in spent.items() if name != "in MLP")
                samples.append({name: spent.get(name, 0) * 1e3 for name in PARTS})
            table.append(
                {"position": position} | {p: round(float(np.median([s[p] for s in samples])), 3) for p in PARTS}
            )
    finally:
        for name, function in originals.items():
            setattr(gpt2, name, function)

    def draw(axes):
        bottom = np.zeros(len(table))
        for part in PARTS:
            values = np.array([row[part] for row in table])
            axes.bar([str(row["position"]) for row in table], values, bottom=bottom, label=part)
            bottom += values
        axes.set(xlabel="position", ylabel="ms a token", title=f"{model_size}: where a step's time goes")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

    report("components", table, draw)


def with_dtype(tree, dtype):
    if isinstance(tree, dict):
        return {name: with_dtype(value, dtype) for name, value in tree.items()}
    if isinstance(tree, list):
        return [with_dtype(value, dtype) for value in tree]
    return tree.astype(dtype)


def table_gelu() -> Callable:
    """GELU looked up by float16 value: all 65,536 of them."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        table = gpt2.gelu(np.nan_to_num(values))
    return lambda x: table[x.astype(np.float16).view(np.uint16)]


def ablation(model_size: str = "random:124M", models_dir: str = "models", *, n_prompt=96, n_tokens=26):
    """ms a token, prompt included, as what makes the program fast is switched on step by step."""
    model = load_model(model_size, models_dir)
    n_head = model.hparams["n_head"]
    ids = random_ids(model, n_prompt + n_tokens)
    exact = with_dtype(model.params, np.float64)
    last = {}

    def recompute(params, every_row):
        for n in range(n_prompt, len(ids)):
            last["logits"] = plain_forward(ids[:n], params, n_head, every_row=every_row)[-1]

    def cached(params):
        past = []
        for n in range(n_prompt, len(ids)):
            last["logits"] = plain_forward(ids[len(past) and n - 1 : n], params, n_head, past, every_row=False)[-1]

    def this_program(n_rows=1):
        kept = model.new_cache()
        model.forward([ids[:n_prompt]], kept)
        for n in range(n_prompt, len(ids) - 1, n_rows):
            last["logits"] = model.forward([ids[n : n + n_rows]], kept, n_last=min(n_rows, len(ids) - n))[0, -1]

    def looked_up():
        gelu, gpt2.gelu = gpt2.gelu, table_gelu()
        try:
            this_program(5)
        finally:
            gpt2.gelu = gelu

    stages = {
        "recompute everything, float64": lambda: recompute(exact, True),
        "+ last row only for the vocabulary": lambda: recompute(exact, False),
        "+ KV cache": lambda: cached(exact),
        "+ float32": lambda: cached(model.params),
        "+ cache in place, fewer passes": this_program,
        "+ few-row products, 5 guesses all right": lambda: this_program(5),
        "(GELU from a table of float16 values)": looked_up,
    }
    table = []
    for name, stage in stages.items():
        times = in_turn({name: stage}, 1 if "float64" in name or "vocabulary" in name else 3)[name] / n_tokens
        table.append({"stage": name} | milliseconds(times) | {"logits": last["logits"].astype(np.float64)})
    reference = plain_forward(ids[:-1], exact, n_head, every_row=False)[-1]
    for row in table:
        row["largest_error"] = f"{np.abs(row.pop('logits') - reference).max():.0e}"
    report(
        "ablation",
        table,
        draw_bars(table, "stage", f"{model_size}: {n_prompt} tokens in, {n_tokens} out", "ms a token"),
    )


def load(model_size: str = "tiny", models_dir: str = "models", *, n_times=5):
    """Time and memory of a process to its first token, and of one that reads the checkpoint with TensorFlow."""
    prefix = os.path.join(models_dir, model_size, "model.ckpt")
    first_token = (
        f"import gpt2, stats, utils; e, h, p = utils.load_encoder_hparams_and_params({model_size!r}, {models_dir!r}); "
    )
    first_token += "next(gpt2.generate(gpt2.Model(h, p), [0], 1)); print(stats.peak_memory_gb())"
    tensorflow = f"import stats, tensorflow as tf; r = tf.train.load_checkpoint({prefix!r}); "
    tensorflow += "{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()}; print(stats.peak_memory_gb())"
    programs = {
        "import numpy alone": "import numpy, stats; print(stats.peak_memory_gb())",
        "this program, to its first token": first_token,
        "TensorFlow, reading the weights": tensorflow,
    }
    table = []
    for name, code in programs.items():
        times, peaks = [], []
        for _ in range(n_times):
            started = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            times.append(time.perf_counter() - started)
            if done.returncode:
                break
            peaks.append(float(done.stdout))
        if peaks:
            table.append({"program": name} | milliseconds(np.array(times)) | {"peak_gb": round(np.median(peaks), 3)})
        else:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    report("load", table, draw_bars(table, "program", f"{model_size}: the whole process"))


# ----------------------------------------------------------------------------------------------------------------------
# Speculation
# ----------------------------------------------------------------------------------------------------------------------

PUBLISHED_ACCEPTANCE = 0.73  # of 124M's guesses for 1558M: 40 tokens in about 13.6 passes at 4 guesses
LENGTHS = (1, 2, 3, 4, 5, 6, 10)


def drafters(
    model_size: str = "tiny", models_dir: str = "models", *, draft_model_size: str = "nano", n_tokens=200, n_times=5
):
    """Wall time of texts of the embedded target, plain and with each drafter; the texts are compared."""
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    target, draft = gpt2.Model(hparams, params), load_model(draft_model_size, models_dir)
    table = []
    for name, prompt, temperature in (
        ("greedy, repeats itself", "ROMEO:", 0),
        ("temperature 0.5", "ROMEO:", 0.5),
        ("temperature 0.8", "ROMEO:", 0.8),
    ):
        sample, ids = make_sampler(temperature, seed=1), encoder.encode(prompt)
        model = partial(DraftModel, draft, speculative.MAX_DRAFT, sample, speculative.MIN_CONFIDENCE)
        makers = {
            "plain": lambda: None,
            "draft model": lambda model=model: Adaptive(model()),
            "prompt lookup": lambda: Adaptive(PromptLookup(speculative.MAX_DRAFT)),
            "both": lambda model=model: Adaptive(FirstOf(PromptLookup(speculative.MAX_DRAFT), model())),
        }
        texts = {}

        def write(name, make, sample=sample, ids=ids, texts=texts):
            texts[name] = list(gpt2.generate(target, ids, n_tokens, sample, make()))

        actions = {key: partial(write, key, make) for key, make in makers.items()}
        times = in_turn(actions, n_times)
        for key, values in times.items():
            row = {"text": name, "drafter": key} | milliseconds(values)
            row["speedup"] = round(float(np.median(times["plain"] / values)), 2)
            table.append(row | {"identical": texts[key] == texts["plain"]})
    labelled = [row | {"label": f"{row['text']}: {row['drafter']}"} for row in table]
    report("drafters", table, draw_bars(labelled, "label", f"{model_size} with {draft_model_size}: {n_tokens} tokens"))


def expected_tokens(n):  # of a round with n guesses, each right with the published probability
    return (1 - PUBLISHED_ACCEPTANCE ** (n + 1)) / (1 - PUBLISHED_ACCEPTANCE)


class Simulation:
    """Real passes of a target and a draft with random weights; guesses are right with the published probability."""

    def __init__(self, target, draft, n_tokens):
        self.target, self.draft = target, draft
        self.prompt = random_ids(target, 10)
        self.plain_ids, _ = self.timed(n_tokens)

    def timed(self, n_tokens, drafter=None):
        """(ids, seconds after the first, for which both ways take a pass over the prompt)"""
        started, ids = 0.0, []
        for i in gpt2.generate(self.target, self.prompt, n_tokens, draft=drafter):
            started = started or time.perf_counter()
            ids.append(i)
        return ids, time.perf_counter() - started

    def drafter(self, n, seed):
        rng, text = np.random.default_rng(seed), self.prompt + self.plain_ids

        def guess(logits, position):
            right = text[position] if position < len(text) else 0
            return right if rng.random() < PUBLISHED_ACCEPTANCE else (right + 1) % self.target.hparams["n_vocab"]

        return DraftModel(self.draft, n, guess)

    def rounds(self, n_tokens, drafter):
        """(seconds of each round after the first, its guesses, whether the text is the plain one)"""
        recorder = speculative.Recorder(drafter)
        ticks = []

        def ticking(tokens, n_max):
            ticks.append(time.perf_counter())
            return recorder(tokens, n_max)

        ids, _ = self.timed(n_tokens, ticking)
        seconds = np.diff([*ticks, time.perf_counter()])[1:]
        guesses = np.array([len(guesses) for _, guesses in recorder.rounds[1:]])
        return seconds, guesses, ids == self.plain_ids[:n_tokens]

    def forget_panels(self):
        for model in (self.target, self.draft):
            model.passes = type(model.passes)(model.hparams, model.params)


def acceptance(
    target_size: str = "random:1558M",
    draft_size: str = "random:124M",
    models_dir: str = "models",
    *,
    n_tokens=200,
    n_short=40,
    n_times=5,
):
    """Speed-up at the published acceptance by draft length, and of whole texts with packing; real passes."""
    simulation = Simulation(load_model(target_size, models_dir), load_model(draft_size, models_dir), n_tokens)
    for model in (simulation.target, simulation.draft):
        model.passes.shares.pack()
    plain_steps, rounds, whole, adaptive = [], {n: [] for n in LENGTHS}, {n_short: [], n_tokens: []}, []
    identical = []
    for turn in range(n_times + 1):  # the first brings memory and threads, and is not counted
        plain_steps.append(simulation.timed(n_short)[1] / (n_short - 1))
        for n in LENGTHS:
            seconds, guesses, same = simulation.rounds(n_short, simulation.drafter(n, 100 * turn + n))
            rounds[n].append(float(np.median(seconds[guesses == n])))
            identical.append(same)
        drafter = Adaptive(simulation.drafter(speculative.MAX_DRAFT, turn), speculative.MAX_DRAFT)
        seconds, guesses, same = simulation.rounds(n_tokens, drafter)
        late = slice(len(seconds) // 2, None)
        adaptive.append((seconds[late].sum(), expected_tokens(guesses[late]).sum(), guesses[late].mean()))
        identical.append(same)
        for n, times in whole.items():
            simulation.forget_panels()
            pays = simulation.target.checks_pay
            drafter = Adaptive(simulation.drafter(speculative.MAX_DRAFT, turn), speculative.MAX_DRAFT, pays)
            ids, seconds = simulation.timed(n, drafter)
            times.append(seconds / (n - 1))
            identical.append(ids == simulation.plain_ids[:n])
        print(f"turn {turn} of {n_times}: {simulation.target.passes.shares.report}", file=sys.stderr)
    steps = np.array(plain_steps[1:])
    table = [{"guesses": 0, "speedup": 1.0, "seconds_a_round": round(float(np.median(steps)), 4)}]
    cost = {}

    def add(name, tokens, seconds):
        speedup = np.array(tokens) * steps / np.array(seconds)
        row = {"guesses": name, "speedup": round(float(np.median(speedup)), 2)}
        table.append(row | {"low": round(speedup.min(), 2), "high": round(speedup.max(), 2)})

    for n in LENGTHS:
        add(n, expected_tokens(n), rounds[n][1:])
        table[-1]["seconds_a_round"] = round(float(np.median(rounds[n][1:])), 4)
        cost[n] = float(np.median(rounds[n][1:] / steps))
    late_seconds, late_tokens, late_guesses = (np.array(column)[1:] for column in zip(*adaptive, strict=True))
    add(
        f"adaptive, {np.median(late_guesses):.1f} late in {n_tokens} tokens",
        late_tokens / late_seconds,
        np.ones(n_times),
    )
    for n, times in whole.items():
        add(f"a text of {n} tokens, packing included", 1, times[1:])
    for row in table:
        row["identical"] = all(identical)

    def draw(axes):
        shares = np.linspace(0.5, 0.95, 46)
        powers = np.array(LENGTHS)[:, None] + 1
        speedups = (1 - shares**powers) / (1 - shares) / np.array(list(cost.values()))[:, None]
        image = axes.imshow(speedups, aspect="auto", origin="lower", cmap="RdYlGn", vmin=0.3, vmax=3)
        axes.set_yticks(range(len(LENGTHS)), LENGTHS)
        axes.set_xticks(range(0, 46, 5), [f"{share:.2f}" for share in shares[::5]])
        axes.axvline((PUBLISHED_ACCEPTANCE - 0.5) / 0.01, color="black", linestyle="--", linewidth=1)
        best = axes.twinx()
        best.plot(range(46), speedups.max(axis=0), color="black", label="at the best length")
        best.set(ylabel="times plain decoding", ylim=(0, 6))
        best.legend(frameon=False, loc="upper left")
        axes.set(xlabel="acceptance (dashed: published, 0.73)", ylabel="guesses a round")
        axes.set_title(f"{draft_size} for {target_size}: measured rounds, tokens by acceptance")
        axes.figure.colorbar(image, pad=0.1)

    report("acceptance", table, draw)


def speculation(models_dir: str = "models"):
    """Both tables on speculation: the embedded pair with each drafter, and the real shapes by acceptance."""
    drafters(models_dir=models_dir)
    acceptance(models_dir=models_dir)


def all_tables(model_size: str = "random:124M", models_dir: str = "models"):
    """Every table, and one Markdown file of them all."""
    for table in (decode, prefill, rows, batch, components, ablation):
        table(model_size, models_dir)
    for table in (cache, load):
        table("tiny", models_dir)
    speculation(models_dir)
    names = ("decode", "prefill", "rows", "batch", "components", "ablation", "cache", "load", "drafters", "acceptance")
    with open(os.path.join(FOLDER, "all.md"), "w", encoding="utf-8") as f:
        for name in names:
            with open(os.path.join(FOLDER, f"{name}.md"), encoding="utf-8") as part:
                f.write(part.read() + "\n")


COMMANDS = {
    table.__name__: table
    for table in (decode, prefill, rows, batch, cache, components, ablation, load, drafters, acceptance)
}
COMMANDS |= {"speculative": speculation, "endurance": endurance, "all": all_tables}

if __name__ == "__main__":
    cli.run(COMMANDS)
