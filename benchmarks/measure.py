"""What all tables share: models with random weights, times taken in turn, files and plots."""

import csv
import datetime
import os
import platform
import time
from collections.abc import Callable

import numpy as np

import gpt2
from checkpoints.weights import expected_shapes, nest_params
from fast.threads import count_threads
from fast.weights import PRODUCTS, output_matrix

FOLDER = os.path.join("benchmarks", "results")
SETTLE_S = 0.12  # after a product, BLAS's own threads spin for up to 0.1 s and occupy the cores
SHAPES = {"124M": (768, 12, 12), "355M": (1024, 16, 24), "774M": (1280, 20, 36), "1558M": (1600, 25, 48)}


def load_or_random(model_size: str, models_dir: str | None = None) -> gpt2.Model:
    """A model by its name, or for random:SIZE one with random weights of the shapes of an OpenAI size.

    ValueError: there is no such size, or what gpt2.load_model refuses.
    """
    kind, _, size = model_size.partition(":")
    if kind != "random":
        return gpt2.load_model(model_size, models_dir)[1]
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
    """Seconds of each action by its name: n_times all of them in turn, after one turn that is not counted.

    An action that times only a part of its work returns the seconds, a float. Before each timed call there is one that
    is not timed, unless `is_warm`: for actions so long that reading the weights into caches does not matter.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(n_times + 1):
        for name, action in actions.items():
            time.sleep(SETTLE_S if len(actions) > 1 else 0)  # or the threads of one disturb the next
            if not is_warm:
                action()
            started = time.perf_counter()
            seconds = action()
            if turn:
                times[name].append(seconds if isinstance(seconds, float) else time.perf_counter() - started)
    return {name: np.array(values) for name, values in times.items()}


def milliseconds(times: np.ndarray) -> dict[str, float]:
    low, median, high = np.percentile(times, [25, 50, 75]) * 1e3
    return {"ms": round(median, 3), "ms_low": round(low, 3), "ms_high": round(high, 3)}


def stream(model: gpt2.Model, n_times: int = 1) -> Callable[[], None]:
    """A function that multiplies one row with every matrix of the model, n_times: what reading the weights takes."""
    blocks = model.params["blocks"]
    weights = [block[part][name]["w"] for block in blocks for part, name in PRODUCTS] + [output_matrix(model.params)]
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
    """Write FOLDER/name.csv, .png and .md, and print the table. draw(axes) draws the plot."""
    import matplotlib  # only plots need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    os.makedirs(FOLDER, exist_ok=True)
    path, facts = os.path.join(FOLDER, name), machine()
    with open(f"{path}.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0, -0.04, "  ".join(facts.values()), fontsize=7, color="gray")
    figure.savefig(f"{path}.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    text = f"### {name}\n\n{as_markdown(rows)}\n\n{', '.join(f'{k} {v}' for k, v in facts.items())}\n"
    with open(f"{path}.md", "w", encoding="utf-8") as f:
        f.write(text)
    print(text)


def draw_bars(rows: list[dict], label: str, title: str, axes, unit: str = "ms") -> None:
    names, values = [str(row[label]) for row in rows], [row["ms"] for row in rows]
    bars = axes.barh(names[::-1], values[::-1], color="#4878a8")
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.set(xlabel=unit, title=title)
