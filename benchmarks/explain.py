"""Why the program is as fast as it is: what the cache saves, where a step's time goes, what each measure gains."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from functools import partial

import numpy as np

import gpt2
from benchmarks.measure import draw_bars, in_turn, load_or_random, milliseconds, random_ids, report
from benchmarks.peers import plain_forward
from encoder import MODELS_DIR


@contextlib.contextmanager
def replaced(functions: dict[str, Callable]) -> Iterator[None]:
    """gpt2.py with these functions in the place of its own of the same name."""
    originals = {name: getattr(gpt2, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(gpt2, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(gpt2, name, function)


# ----------------------------------------------------------------------------------------------------------------------
# The cache
# ----------------------------------------------------------------------------------------------------------------------


def draw_cache(table: list[dict], title: str, axes) -> None:
    positions = [row["position"] for row in table]
    x = np.linspace(0, max(positions), 100)
    for column, degree, fitted, color in (("without", 2, "quadratic", "#c44e52"), ("with", 1, "linear", "#4878a8")):
        y = [row[f"{column}_ms"] for row in table]
        axes.plot(positions, y, "o", color=color, markersize=4, label=f"{column} cache")
        fit = np.polynomial.Polynomial.fit(positions, y, degree)
        axes.plot(x, fit(x), color=color, linewidth=1, label=f"{fitted} fit")
    axes.set(xlabel="position", ylabel="ms a token", ylim=0, title=title)
    axes.legend(frameon=False)


def cache(model_size: str = "tiny", models_dir: str | None = None, *, n_points=24):
    """The time of a step at every position with the KV cache, and without."""
    model = load_or_random(model_size, models_dir)
    n_ctx = model.hparams["n_ctx"]
    ids, kv_cache = random_ids(model, n_ctx), model.new_cache()

    def with_cache(n):
        kv_cache.length = n - 1
        model.forward([ids[n - 1 : n]], kv_cache)

    def without_cache(n):
        model.forward([ids[:n]], model.new_cache())

    table = []
    for n in np.unique(np.linspace(2, n_ctx, n_points).astype(int)).tolist():
        model.forward([ids[kv_cache.length : n]], kv_cache)
        times = in_turn({"with": partial(with_cache, n), "without": partial(without_cache, n)}, 3)
        table.append({"position": n} | {f"{k}_ms": round(np.median(v) * 1e3, 3) for k, v in times.items()})
    report("cache", table, partial(draw_cache, table, f"{model_size}: why the KV cache exists"))


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a step
# ----------------------------------------------------------------------------------------------------------------------

IN_MLP = "in MLP"  # time that the MLP's own has in it already
REST = "sums, cache"
PARTS = ("embedding", "layer norm", "QKV product", "attention", "projection", "MLP", "output product", REST)


def timed_layers(spent: dict[str, float], n_embd: int, n_vocab: int) -> dict[str, Callable]:
    """Functions of gpt2.py that also add the seconds they take to `spent`, by part."""

    def timed(function, part_of):
        def run(*args, **kwargs):
            started = time.perf_counter()
            result = function(*args, **kwargs)
            part = part_of(*args)
            spent[part] = spent.get(part, 0) + time.perf_counter() - started
            return result

        return run

    products = {3 * n_embd: "QKV product", n_embd: "projection", n_vocab: "output product"}

    def product(x, w):  # the MLP's have n_embd columns too, or another number of rows
        return products.get(w.shape[1], IN_MLP) if x.shape[-1] == n_embd else IN_MLP

    parts = {"embed": "embedding", "layer_norm": "layer norm", "attend": "attention", "feed_forward": "MLP"}
    layers = {name: timed(getattr(gpt2, name), lambda *_, part=part: part) for name, part in parts.items()}
    return layers | {"matmul": timed(gpt2.matmul, product)}


def time_parts(model: gpt2.Model, ids: list[int], spent: dict[str, float], n_times: int) -> dict[str, float]:
    """Milliseconds by part, medians, of a step with the last of `ids`. `spent` is what timed_layers add to."""
    kv_cache, samples = model.new_cache(), []
    model.forward([ids[:-1]], kv_cache)
    for _ in range(n_times):
        kv_cache.length = len(ids) - 1
        spent.clear()
        started = time.perf_counter()
        model.forward([ids[-1:]], kv_cache)
        total = time.perf_counter() - started
        spent[REST] = total - sum(seconds for part, seconds in spent.items() if part != IN_MLP)
        samples.append([spent.get(part, 0) * 1e3 for part in PARTS])
    return dict(zip(PARTS, np.median(samples, axis=0).round(3).tolist(), strict=True))


def draw_components(table: list[dict], title: str, axes) -> None:
    bottom = np.zeros(len(table))
    for part in PARTS:
        values = np.array([row[part] for row in table])
        axes.bar([str(row["position"]) for row in table], values, bottom=bottom, label=part)
        bottom += values
    axes.set(xlabel="position", ylabel="ms a token", title=title)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def components(model_size: str = "random:124M", models_dir: str | None = None, *, n_times=9):
    """Where a step's time goes, by position."""
    model = load_or_random(model_size, models_dir)
    n_ctx, n_embd, n_vocab = (model.hparams[name] for name in ("n_ctx", "n_embd", "n_vocab"))
    ids, spent = random_ids(model, n_ctx), {}
    with replaced(timed_layers(spent, n_embd, n_vocab)):
        table = [
            {"position": position} | time_parts(model, ids[: position + 1], spent, n_times)
            for position in [max(1, n_ctx * i // 1024) for i in (1, 128, 256, 512, 768, 1000)]
        ]
    report("components", table, partial(draw_components, table, f"{model_size}: where a step's time goes"))


# ----------------------------------------------------------------------------------------------------------------------
# What each measure gains
# ----------------------------------------------------------------------------------------------------------------------


def with_dtype(tree, dtype):
    if isinstance(tree, dict):
        return {name: with_dtype(value, dtype) for name, value in tree.items()}
    if isinstance(tree, list):
        return [with_dtype(value, dtype) for value in tree]
    return tree.astype(dtype)


def recompute(fed, n_prompt, params, n_head, every_row):  # -> [n_vocab]
    """A pass over the whole text for each token; the logits after the last of the ids in `fed`, as below."""
    for n in range(n_prompt, len(fed) + 1):
        logits = plain_forward(fed[:n], params, n_head, every_row=every_row)[-1]
    return logits


def with_growing_cache(fed, n_prompt, params, n_head):  # -> [n_vocab]
    past = []
    logits = plain_forward(fed[:n_prompt], params, n_head, past, every_row=False)[-1]
    for i in fed[n_prompt:]:
        logits = plain_forward([i], params, n_head, past, every_row=False)[-1]
    return logits


def with_this_program(fed, n_prompt, model, n_rows=1):  # -> [n_vocab]
    """Passes of n_rows after the prompt's, as if each had n_rows - 1 guesses and all were right."""
    kv_cache = model.new_cache()
    logits = model.forward([fed[:n_prompt]], kv_cache)
    for n in range(n_prompt, len(fed), n_rows):
        new = fed[n : n + n_rows]
        logits = model.forward([new], kv_cache, n_last=len(new))
    return logits[0, -1]


def table_gelu() -> Callable:
    """GELU looked up by float16 value: all 65,536 of them."""
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        table = gpt2.gelu(np.nan_to_num(values))
    return lambda x: table[x.astype(np.float16).view(np.uint16)]


def with_activation(model: gpt2.Model, activation: Callable) -> gpt2.Model:
    """The same model, packed weights included, with another activation."""
    model = copy(model)
    model.gpt2 = partial(model.gpt2, activation=activation)
    return model


def ablation(model_size: str = "random:124M", models_dir: str | None = None, *, n_prompt=96, n_tokens=26):
    """ms a token, prompt included, as the measures that make the program fast are switched on one by one."""
    model = load_or_random(model_size, models_dir)
    n_head, exact = model.hparams["n_head"], with_dtype(model.params, np.float64)
    fed = random_ids(model, n_prompt + n_tokens - 1)  # nothing follows the last token
    stages = (
        ("recompute everything, float64", 1, partial(recompute, params=exact, n_head=n_head, every_row=True)),
        ("+ last row only for the vocabulary", 1, partial(recompute, params=exact, n_head=n_head, every_row=False)),
        ("+ KV cache", 3, partial(with_growing_cache, params=exact, n_head=n_head)),
        ("+ float32", 3, partial(with_growing_cache, params=model.params, n_head=n_head)),
        ("+ cache in place, fewer passes", 3, partial(with_this_program, model=model)),
        ("+ few-row products, 5 guesses all right", 3, partial(with_this_program, model=model, n_rows=5)),
        (
            "(GELU from a table of float16 values)",
            3,
            partial(with_this_program, model=with_activation(model, table_gelu()), n_rows=5),
        ),
    )
    reference = plain_forward(fed, exact, n_head, every_row=False)[-1]
    table, logits = [], {}
    for name, n_times, stage in stages:

        def keep_logits(name=name, stage=stage):
            logits[name] = stage(fed, n_prompt)

        row = {"stage": name} | milliseconds(in_turn({name: keep_logits}, n_times)[name] / n_tokens)
        table.append(row | {"largest_error": f"{np.abs(logits[name] - reference).max():.0e}"})
    title = f"{model_size}: {n_prompt} tokens in, {n_tokens} out"
    report("ablation", table, partial(draw_bars, table, "stage", title, unit="ms a token"))


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


def time_processes(code: str, n_times: int) -> dict[str, float]:
    """Milliseconds and peak memory of processes that run `code`. CalledProcessError: one fails."""
    times, peaks = [], []
    for _ in range(n_times):
        started = time.perf_counter()
        peak = subprocess.run(
            [sys.executable, "-c", f"{code}; from console import stats; print(stats.peak_memory_gb())"],
            capture_output=True,
            text=True,
            check=True,
        )
        times.append(time.perf_counter() - started)
        peaks.append(float(peak.stdout))
    return milliseconds(np.array(times)) | {"peak_gb": round(np.median(peaks), 3)}


def load(model_size: str = "tiny", models_dir: str | None = None, *, n_times=5):
    """Time and memory of a process to its first token, and of one that reads the checkpoint with TensorFlow."""
    prefix = os.path.join(models_dir or MODELS_DIR, model_size, "model.ckpt")
    first_token = f"import gpt2; _, model = gpt2.load_model({model_size!r}, {models_dir!r}); "
    first_token += "next(gpt2.generate(model, [0], 1))"
    tensorflow = f"import tensorflow as tf; r = tf.train.load_checkpoint({prefix!r}); "
    tensorflow += "{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()}"
    programs = {
        "import numpy alone": "import numpy",
        "this program, to its first token": first_token,
        "TensorFlow, reading the weights": tensorflow,
    }
    table = []
    for name, code in programs.items():
        try:
            table.append({"program": name} | time_processes(code, n_times))
        except subprocess.CalledProcessError as e:
            print(f"{name}: {e.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    report("load", table, partial(draw_bars, table, "program", f"{model_size}: the whole process"))
