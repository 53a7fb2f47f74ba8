"""What benchmark.py stands on: models with random weights, times taken in turn, tables and pictures."""

import csv
import datetime
import os
import platform
import time
from collections.abc import Callable

import numpy as np

import gpt2
from fast.shares import PRODUCTS
from fast.threads import count_threads
from utils import expected_shapes, load_encoder_hparams_and_params, nest_params

FOLDER = "benchmarks"
SETTLE_S = 0.12  # for so long after a product BLAS's own threads go on spinning, and take the cores
SHAPES = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}


def load_model(model_size: str, models_dir: str = "models") -> gpt2.Model:
    """A model by its name, or random:SIZE, random weights of the shapes of an OpenAI size."""
    kind, _, size = model_size.partition(":")
    if kind != "random":
        _, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
        return gpt2.Model(hparams, params)
    if size not in SHAPES:
        raise ValueError(f"no shapes for {model_size!r}, expected random: and one of {', '.join(SHAPES)}")
    n_embd, n_head, n_layer = SHAPES[size]
    hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_head": n_head, "n_layer": n_layer}
    rng = np.random.default_rng(0)
    variables = {}
    for name, shape in expected_shapes(hparams):
        array = rng.standard_normal(shape, np.float32)
        array *= np.float32(0.02)
        variables[f"model/{name}"] = array + 1 if name.endswith("/g") else array
    return gpt2.Model(hparams, nest_params(variables, hparams, model_size))


def random_ids(model: gpt2.Model, n: int) -> list[int]:
    return np.random.default_rng(1).integers(model.hparams["n_vocab"], size=n).tolist()


def in_turn(actions: dict, n_times: int, is_warm: bool = False) -> dict[str, np.ndarray]:
    """Seconds of each action by its name, all of them in turn n_times, after one turn that is not counted.

    An action that times only a part of what it does returns the seconds, a float. `is_warm`: each is long enough to
    bring its weights and threads back by itself.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(n_times + 1):
        for name, action in actions.items():
            time.sleep(SETTLE_S if len(actions) > 1 else 0)  # or the threads of one disturb the next
            if not is_warm:
                action()  # brings its weights and threads back
            started = time.perf_counter()
            seconds = action()
            if turn:
                times[name].append(seconds if isinstance(seconds, float) else time.perf_counter() - started)
    return {name: np.array(values) for name, values in times.items()}


def milliseconds(times: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(times, [25, 50, 75]) * 1e3
    return {"ms": round(median, 3), "ms_low": round(low, 3), "ms_high": round(high, 3)}


def stream(model: gpt2.Model, n_times: int = 1) -> Callable[[], None]:
    """One-row `x @ w` with every matrix that a step reads, n_times: what streaming the weights takes at least."""
    blocks = model.params["blocks"]
    weights = [block[part][name]["w"] for block in blocks for part, name in PRODUCTS] + [model.params["wte"].T]
    pairs = [(np.ones((1, w.shape[0]), np.float32), w) for w in weights]

    def run():
        for _ in range(n_times):
            for x, w in pairs:
                x @ w

    return run


def machine() -> dict[str, str]:
    """The processor, the BLAS and its kernels, the versions, the date."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            processor = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), processor)
    facts = {"processor": processor, "threads": str(count_threads())}
    try:
        import threadpoolctl  # says which kernels OpenBLAS took; nothing else here needs it

        for blas in threadpoolctl.threadpool_info():
            if blas["user_api"] == "blas" and "numpy" in blas["filepath"]:
                facts["blas"] = f"{blas['internal_api']} {blas['version']}, {blas['num_threads']} threads"
                facts["kernels"] = blas.get("architecture", "unknown")
    except ImportError:
        facts["blas"] = "unknown (pip install threadpoolctl)"
    return facts | {"python": platform.python_version(), "numpy": np.__version__, "date": str(datetime.date.today())}


def as_markdown(rows: list[dict]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def report(name: str, rows: list[dict], draw: Callable) -> None:
    """Write FOLDER/name.csv, .png and .md, and print the table."""
    import matplotlib  # only plots need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    os.makedirs(FOLDER, exist_ok=True)
    facts = machine()
    with open(os.path.join(FOLDER, f"{name}.csv"), "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0, -0.04, "  ".join(facts.values()), fontsize=7, color="gray")
    figure.savefig(os.path.join(FOLDER, f"{name}.png"), dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    text = f"### {name}\n\n{as_markdown(rows)}\n\n{', '.join(f'{k} {v}' for k, v in facts.items())}\n"
    with open(os.path.join(FOLDER, f"{name}.md"), "w", encoding="utf-8") as f:
        f.write(text)
    print(text)


def draw_bars(rows: list[dict], label: str, title: str, unit: str = "ms") -> Callable:
    def draw(axes):
        names, values = [str(row[label]) for row in rows], [row["ms"] for row in rows]
        bars = axes.barh(names[::-1], values[::-1], color="#4878a8")
        axes.bar_label(bars, fmt="%.4g", padding=3)
        axes.set(xlabel=unit, title=title)

    return draw
