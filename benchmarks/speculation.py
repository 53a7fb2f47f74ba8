"""What speculation gains: with the embedded models, and with the real shapes at the published acceptance."""

import sys
from collections.abc import Callable
from functools import partial

import numpy as np

import gpt2
from benchmarks.measure import draw_bars, in_turn, load_or_random, milliseconds, report
from benchmarks.simulation import LENGTHS, PUBLISHED_ACCEPTANCE, Measured, Simulation, expected_tokens
from decoding.draft_length import Adaptive
from decoding.sampling import Sampler, make_sampler
from speculative import MAX_DRAFT, MIN_CONFIDENCE, DraftModel, FirstOf, PromptLookup

# ----------------------------------------------------------------------------------------------------------------------
# The embedded models
# ----------------------------------------------------------------------------------------------------------------------

PROMPT = "ROMEO:"
TEMPERATURES = {"greedy, repeats itself": 0, "temperature 0.5": 0.5, "temperature 0.8": 0.8}


def drafter_makers(draft: gpt2.Model, sample: Sampler) -> dict[str, Callable]:
    """Functions that make a new drafter for a text, by its name in the table."""
    model = partial(DraftModel, draft, MAX_DRAFT, sample, MIN_CONFIDENCE)
    lookup = partial(PromptLookup, MAX_DRAFT)
    return {
        "plain": lambda: None,
        "draft model": lambda: Adaptive(model()),
        "prompt lookup": lambda: Adaptive(lookup()),
        "both": lambda: Adaptive(FirstOf(lookup(), model())),
    }


def drafters(
    model_size: str = "tiny", models_dir: str | None = None, *, draft_model_size: str = "nano", n_tokens=200, n_times=5
):
    """Wall time of texts of the embedded target, plain and with each drafter; the texts are compared."""
    encoder, target = gpt2.load_model(model_size, models_dir)
    draft, ids = load_or_random(draft_model_size, models_dir), encoder.encode(PROMPT)
    table = []
    for text, temperature in TEMPERATURES.items():
        sample, written = make_sampler(temperature, seed=1), {}

        def write(name, make, sample=sample, written=written):
            written[name] = list(gpt2.generate(target, ids, n_tokens, sample, make()))

        makers = drafter_makers(draft, sample)
        times = in_turn({name: partial(write, name, make) for name, make in makers.items()}, n_times)
        for name, seconds in times.items():
            row = {"text": text, "drafter": name} | milliseconds(seconds)
            row["speedup"] = round(float(np.median(times["plain"] / seconds)), 2)
            table.append(row | {"identical": written[name] == written["plain"]})
    labelled = [row | {"label": f"{row['text']}: {row['drafter']}"} for row in table]
    title = f"{model_size} with {draft_model_size}: {n_tokens} tokens"
    report("drafters", table, partial(draw_bars, labelled, "label", title))


# ----------------------------------------------------------------------------------------------------------------------
# The real shapes
# ----------------------------------------------------------------------------------------------------------------------


def acceptance_row(key: int | str, measured: list[Measured], n_tokens: int) -> dict:
    """A row of the table, of all turns' measurements of one kind."""
    if key == "adaptive":
        key = f"adaptive, {np.median([m.n_guesses for m in measured]):.1f} late in {n_tokens} tokens"
    speedups = [m.speedup for m in measured]
    row = {"guesses": key, "speedup": round(float(np.median(speedups)), 2)}
    if isinstance(key, int):
        row["seconds_a_round"] = round(float(np.median([m.seconds for m in measured])), 4)
    row["identical"] = all(m.is_identical for m in measured)
    return row if key == 0 else row | {"low": round(min(speedups), 2), "high": round(max(speedups), 2)}


def draw_acceptance(cost: list[float], title: str, axes) -> None:
    """Speed-up by acceptance and draft length. `cost`: of a round of each of LENGTHS, in plain steps."""
    shares = np.linspace(0.5, 0.95, 46)
    powers = np.array(LENGTHS)[:, None] + 1
    speedups = (1 - shares**powers) / (1 - shares) / np.array(cost)[:, None]
    image = axes.imshow(speedups, aspect="auto", origin="lower", cmap="RdYlGn", vmin=0.3, vmax=3)
    axes.set_yticks(range(len(LENGTHS)), LENGTHS)
    axes.set_xticks(range(0, 46, 5), [f"{share:.2f}" for share in shares[::5]])
    axes.axvline((PUBLISHED_ACCEPTANCE - 0.5) / 0.01, color="black", linestyle="--", linewidth=1)
    best = axes.twinx()
    best.plot(range(46), speedups.max(axis=0), color="black", label="at the best length")
    best.set(ylabel="times plain decoding", ylim=(0, 6))
    best.legend(frameon=False, loc="upper left")
    axes.set(xlabel=f"acceptance (dashed: published, {PUBLISHED_ACCEPTANCE})", ylabel="guesses a round", title=title)
    axes.figure.colorbar(image, pad=0.1)


def acceptance(
    target_size: str = "random:1558M",
    draft_size: str = "random:124M",
    models_dir: str | None = None,
    *,
    n_tokens=200,
    n_short=40,
    n_times=5,
):
    """Speed-up by draft length at the published acceptance, and of whole texts with packing; passes are real."""
    target, draft = load_or_random(target_size, models_dir), load_or_random(draft_size, models_dir)
    simulation, turns = Simulation(target, draft, n_tokens), []
    for number in range(n_times + 1):
        turns.append(simulation.turn(n_short, number))
        print(f"turn {number} of {n_times}: {target.passes.weights.report}", file=sys.stderr)
    del turns[0]  # which brings memory and threads
    table = [acceptance_row(key, [turn[key] for turn in turns], n_tokens) for key in turns[0]]
    cost = [float(np.median([expected_tokens(n) / turn[n].speedup for turn in turns])) for n in LENGTHS]
    title = f"{draft_size} for {target_size}: measured rounds, tokens by acceptance"
    report("acceptance", table, partial(draw_acceptance, cost, title))
