"""A long run: whether time a token and memory stay the same over hours.

python -m benchmarks endurance --n_tokens 200000
"""

import sys
import time
from collections.abc import Iterator
from functools import partial

import numpy as np

import gpt2
from benchmarks.measure import load_or_random, milliseconds, random_ids, report
from console.stats import resident_memory_gb
from decoding.sampling import check, is_whole, make_sampler
from speculative import DraftModel

TEMPERATURE, SEED = 0.8, 1  # greedy text would only repeat itself
N_DRAFT = 4
N_PARTS = 10


def tenths(ids: Iterator[int], n_tokens: int, n_block: int) -> Iterator[dict]:
    """Time and memory of each tenth of `ids`. Times are of blocks of `n_block` tokens, so that each has one slide.

    Ids and times within blocks are not kept: the memory is to be the program's alone.
    """
    n_tenth = n_tokens // N_PARTS
    n_block = max(1, min(n_block, n_tenth // N_PARTS))
    ticks = [time.perf_counter()]
    for n, _ in enumerate(ids, start=1):
        if n % n_tenth % n_block == 0 or n % n_tenth == 0:
            ticks.append(time.perf_counter())
        if n % n_tenth == 0:
            n_last = n_tenth % n_block or n_block
            sizes = np.array([n_block] * (len(ticks) - 2) + [n_last])
            times = np.diff(ticks) / sizes
            row = {"up_to_token": n} | milliseconds(times)
            row["ms_least"] = round(times.min() * 1e3, 3)
            row["ms_mean"] = round((ticks[-1] - ticks[0]) / n_tenth * 1e3, 3)
            row["resident_mb"] = round((resident_memory_gb() or 0) * 1e3, 1)
            print(row, file=sys.stderr)
            yield row
            ticks = [time.perf_counter()]


def draw_endurance(table: list[dict], title: str, axes) -> None:
    memory = axes.twinx()
    names = dict.fromkeys(row["decoding"] for row in table)
    for name, color in zip(names, ("#4878a8", "#c44e52"), strict=True):
        rows = [row for row in table if row["decoding"] == name]
        shares = np.arange(1, N_PARTS + 1) / N_PARTS * 100
        label = f"{name}, {rows[-1]['up_to_token']} tokens"
        axes.plot(shares, [row["ms"] for row in rows], "o-", color=color, label=label)
        memory.plot(shares, [row["resident_mb"] for row in rows], "--", color=color, linewidth=1)
    axes.set(xlabel="% of the run", ylabel="ms a token, median", ylim=0, title=title)
    memory.set(ylabel="MB resident (dashed)", ylim=0)
    axes.legend(frameon=False, loc="lower left")


def endurance(
    model_size: str = "tiny", models_dir: str | None = None, *, draft_model_size: str = "nano", n_tokens=200_000
):
    """Time and memory by tenths of a text of n_tokens that slides, and of one a tenth as long with a draft."""
    is_enough = is_whole(n_tokens) and n_tokens >= N_PARTS**2
    check("n_tokens", n_tokens, is_enough, f"a whole number of {N_PARTS**2} or more")
    model, draft = load_or_random(model_size, models_dir), load_or_random(draft_model_size, models_dir)
    n_slide = model.hparams["n_ctx"] // 2
    sample, prompt = make_sampler(TEMPERATURE, seed=SEED), random_ids(model, 10)
    drafter = DraftModel(draft, N_DRAFT, sample)
    table = []
    for name, n, guess in ((model_size, n_tokens, None), (f"with {draft_model_size}", n_tokens // N_PARTS, drafter)):
        n -= n % N_PARTS
        ids = gpt2.generate(model, prompt, n, sample, guess, slide_by=n_slide)
        table += [{"decoding": name} | row for row in tenths(ids, n, n_slide)]
    report("endurance", table, partial(draw_endurance, table, f"{model_size}: a long run"))
