import inspect
import json
import os
import pty
import select
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from conftest import MODELS, ROOT, random_model, run

import speculative
from adaptive import Adaptive
from gpt2 import Model, generate
from sampling import greedy, make_sampler
from speculative import DraftModel, FirstOf, PromptLookup, greedy_speculative_decoding

TARGET = random_model(n_ctx=40)
DRAFT = random_model(n_ctx=40, n_layer=1, seed=0)  # shares the first layer's weights: right now and then


def scripted(kind, text, n_prompt, n_draft, n_vocab):
    """A drafter that knows `text` and is right, wrong, silent or either at random."""
    rng = np.random.default_rng(len(text) + n_draft)

    def draft(tokens, n_max):
        truth = text[len(tokens) : len(tokens) + min(n_max, n_draft)]
        wrong = [(i + 1) % n_vocab for i in truth]
        if kind == "right":
            return truth
        if kind == "wrong":
            return wrong
        if kind == "silent":
            return []
        n = rng.integers(len(truth) + 1)
        return [a if rng.random() < 0.7 else b for a, b in zip(truth[:n], wrong[:n], strict=True)]

    return draft


KINDS = ("right", "wrong", "silent", "random")


def drafters(draft, n_draft, sample, text, n_prompt):
    n_vocab = draft.hparams["n_vocab"]
    yield from (scripted(kind, text, n_prompt, n_draft, n_vocab) for kind in KINDS)
    yield DraftModel(draft, n_draft, sample)
    yield DraftModel(draft, n_draft, sample, min_confidence=0.3)
    yield PromptLookup(n_draft, 1 + n_draft % 4)
    yield FirstOf(PromptLookup(n_draft), DraftModel(draft, n_draft, sample))
    yield Adaptive(DraftModel(draft, n_draft, sample), n_draft)
    yield Adaptive(FirstOf(PromptLookup(n_draft), DraftModel(draft, n_draft, sample)), n_draft)


def limited(drafter):
    """The drafter, checked: never more guesses than asked for, and the text is not touched."""

    def draft(tokens, n_max):
        before = list(tokens)
        guesses = drafter(tokens, n_max)
        assert len(guesses) <= n_max and tokens == before
        return guesses

    return draft


def samplers(seed):
    return (
        greedy,
        make_sampler(0.8, seed=seed),
        make_sampler(1.3, top_k=20, top_p=0.9, seed=seed),
        make_sampler(0, repetition_penalty=1.3),
        make_sampler(0.9, min_p=0.02, repetition_penalty=1.2, seed=seed),
    )


@pytest.mark.parametrize("n_draft", range(13))
def test_every_drafter_gives_plain_text_on_random_models(n_draft):
    rng = np.random.default_rng(n_draft)
    for sample in samplers(n_draft):
        prompt = rng.integers(61, size=rng.integers(1, 12)).tolist()
        n_tokens = 41 - len(prompt)  # to the very edge of the context
        plain = list(generate(TARGET, prompt, n_tokens, sample))
        for drafter in drafters(DRAFT, n_draft, sample, prompt + plain, len(prompt)):
            assert list(generate(TARGET, prompt, n_tokens, sample, limited(drafter))) == plain


class Unrepeated:
    """A sampler that depends on the text: greedy among the ids that are not in it."""

    def __init__(self, tokens=None):
        self.tokens = tokens

    def for_text(self, tokens):
        return Unrepeated(tokens)

    def scores(self, logits, position):
        assert len(self.tokens) == position
        scores = logits.copy()
        scores[[i for i in self.tokens if i < logits.size]] = -np.inf
        return scores

    def __call__(self, logits, position):
        return int(self.scores(logits, position).argmax())


@pytest.mark.parametrize("n_draft", [1, 4, 9])
def test_a_sampler_may_read_the_text(n_draft):
    prompt, sample = [3, 1, 4], Unrepeated()
    plain = list(generate(TARGET, prompt, 38, sample))
    assert len(set(prompt + plain)) == 41
    for drafter in drafters(DRAFT, n_draft, sample, prompt + plain, len(prompt)):
        assert list(generate(TARGET, prompt, 38, sample, drafter)) == plain
    assert list(generate(TARGET, prompt, 38, speculative.MarginRecorder(sample))) == plain


PROMPT_TEXT = inspect.cleandoc("""
    Before we proceed any further, hear me speak. ROMEO: O, what light? The king himself has said so, my good lord,
    and all the people of the city know that he will come to Rome at night with fire and sword; JULIET: nay, then
    farewell, sweet father, for I must away. First Citizen: We are accounted poor citizens, the patricians good.
    KING RICHARD: Now is the winter! What news? GLOUCESTER: none good, my liege, to please you with the hearing
""")


@pytest.mark.parametrize("part", range(5))
def test_every_drafter_gives_plain_text_on_the_embedded_pair(tiny, nano, part):
    """50 prompts of 100 tokens, ten drafters each: 50,000 tokens compared."""
    encoder, target = tiny
    _, draft = nano
    ids = encoder.encode(PROMPT_TEXT)
    for i in range(part, 50, 5):
        prompt = ids[i * 2 : i * 2 + 1 + i % 9]
        sample = samplers(i)[i // 5 % 5]
        plain = list(generate(target, prompt, 100, sample))
        for drafter in drafters(draft, i % 13, sample, prompt + plain, len(prompt)):
            assert list(generate(target, prompt, 100, sample, drafter)) == plain


def test_the_plain_entry():
    prompt = [3, 1, 4, 1, 5]
    plain = list(generate(TARGET, prompt, 30))
    for n_draft in range(8):
        assert greedy_speculative_decoding(TARGET, DRAFT, prompt, 30, n_draft) == plain
    assert greedy_speculative_decoding(TARGET, TARGET, prompt, 30) == plain
    assert prompt == [3, 1, 4, 1, 5]


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="the target has 61 ids and the draft 60; they need the same vocabulary"):
        greedy_speculative_decoding(TARGET, random_model(n_vocab=60), [1, 2], 5)


def test_the_context_limit_holds():
    with pytest.raises(ValueError, match="exceed the context of 40"):
        greedy_speculative_decoding(TARGET, DRAFT, [1] * 20, 22)


@pytest.mark.parametrize("n_ctx", [2, 7, 20, 39])
def test_a_draft_with_a_smaller_context_falls_silent(n_ctx):
    draft = random_model(n_ctx=n_ctx, n_layer=1)
    plain = list(generate(TARGET, [5, 6, 7], 38))
    assert greedy_speculative_decoding(TARGET, draft, [5, 6, 7], 38, 5) == plain


def test_caches_after_a_run_equal_fresh_ones():
    caches = []

    class Spied(Model):
        def new_cache(self, n_batch=1, n_seq=None):
            caches.append(super().new_cache(n_batch, n_seq))
            return caches[-1]

    target = Spied(TARGET.hparams, TARGET.params)
    drafter = DraftModel(DRAFT, 4)
    prompt = [9, 8, 7]
    text = prompt + list(generate(target, prompt, 30, draft=drafter))
    (cache,) = caches
    assert cache.length == len(text) - 1
    for model, kept, tokens in ((TARGET, cache, text[:-1]), (DRAFT, drafter.cache, drafter.fed)):
        fresh = model.new_cache()
        model.forward([tokens[: kept.length]], fresh)
        n = kept.length
        np.testing.assert_allclose(kept.kv[..., :n, :], fresh.kv[..., :n, :], rtol=0, atol=1e-5)


def test_a_drafter_can_be_used_for_another_text():
    for drafter in (DraftModel(DRAFT, 4), PromptLookup(4), Adaptive(DraftModel(DRAFT, 4))):
        for prompt in ([1, 2, 3], [1, 2, 3, 4, 5], [7], [1, 2, 3]):
            plain = list(generate(TARGET, prompt, 30))
            assert list(generate(TARGET, prompt, 30, draft=drafter)) == plain


class LongText(list):
    """A text of which only windows may be read: reading all of it takes longer with every token."""

    def __getitem__(self, key):
        part = super().__getitem__(key)
        assert not isinstance(key, slice) or len(part) < 300
        return part

    def __iter__(self):
        pytest.fail("read as a whole")


@pytest.mark.parametrize(
    "drafter",
    [DraftModel(DRAFT, 4), Adaptive(DraftModel(DRAFT, 4)), PromptLookup(4)],
    ids=["model", "adaptive", "lookup"],
)
def test_a_round_takes_as_long_in_a_long_text(drafter):
    text = LongText([1, 2, 3])
    n_guesses = 0
    for i in range(3, 1000):
        guesses = drafter(text, 4)
        n_guesses += len(guesses)
        text.append(guesses[0] if guesses and i % 3 else i % 61)
    assert n_guesses > 5  # the adaptive one has found out that they are wrong


def test_lookup_goes_on_as_before():
    lookup = PromptLookup(3, 3)
    assert lookup([1, 2, 3, 4, 5, 1, 2, 3], 9) == [4, 5, 1]
    assert lookup([1, 2, 3, 4, 5, 1, 2, 3], 2) == [4, 5]
    assert lookup([1, 2, 3, 4, 5, 1, 2, 3, 9, 2, 3], 9) == [9, 2, 3]  # the latest occurrence, of the longest n-gram
    assert lookup([5, 6, 7], 9) == []
    assert lookup([4, 4, 4, 4], 9) == [4]


class NoisyTarget(Model):
    """A target whose rows round much differently when computed together, as they do a little in any BLAS."""

    def forward(self, tokens, cache, n_last=1, plainly=False):
        logits = super().forward(tokens, cache, n_last, plainly)
        if n_last > 1:
            noise = np.random.default_rng(cache.length).uniform(-8e-6, 8e-6, logits.shape) * np.abs(logits).max()
            logits += noise.astype(np.float32)
        return logits


def tied_target():
    """Every id has a twin with nearly the same output row: half of all choices are near ties."""
    model = random_model(n_vocab=60, n_ctx=40)
    wte = model.params["wte"].copy()
    wte[30:] = wte[:30] * np.float32(1 + 1e-6)
    return NoisyTarget(model.hparams, model.params | {"wte": wte})


@pytest.mark.parametrize("settled", [True, False])
def test_near_ties_are_settled_alone(monkeypatch, settled):
    target = tied_target()
    if not settled:
        monkeypatch.setattr("sampling.NEAR_TIE", 0.0)
    same = []
    for seed in range(8):
        prompt = np.random.default_rng(seed).integers(60, size=4).tolist()
        plain = list(generate(target, prompt, 36))
        same.append(list(generate(target, prompt, 36, draft=scripted("right", prompt + plain, 4, 5, 60))) == plain)
    assert all(same) == settled  # without the second look, the noise does change texts


def test_the_distribution_is_the_targets():
    """The second token of 30,000 sampled texts, all made with a draft: total variation below 1 %."""
    target = random_model(n_vocab=7, n_ctx=4, n_embd=8, n_head=2, n_layer=1)
    draft = random_model(n_vocab=7, n_ctx=4, n_embd=8, n_head=2, n_layer=1, seed=5)

    def probabilities(ids):
        logits = target.forward([ids], target.new_cache())[0, 0].astype(np.float64)
        p = np.exp(logits - logits.max())
        return p / p.sum()

    first = probabilities([3])
    expected = sum(first[i] * probabilities([3, i]) for i in range(7))
    counts = np.zeros(7)
    for seed in range(30_000):
        sample = make_sampler(1.0, seed=seed)
        counts[list(generate(target, [3], 2, sample, DraftModel(draft, 2, sample)))[1]] += 1
    assert np.abs(counts / counts.sum() - expected).sum() / 2 < 0.01


# ----------------------------------------------------------------------------------------------------------------------
# Adaptive length
# ----------------------------------------------------------------------------------------------------------------------


def simulate(p, draft_cost, pass_cost, n_rounds=200):
    """The lengths asked for when guesses are right with probability p, on a clock of its own."""
    now, rng, asked = [0.0], np.random.default_rng(0), []

    def drafter(tokens, n_max):
        now[0] += draft_cost * n_max
        asked[-1] = n_max
        return [1] * n_max

    adaptive = Adaptive(drafter, 10, clock=lambda: now[0])
    tokens = [0] * 5
    for _ in range(n_rounds):
        asked.append(0)
        guesses = adaptive(tokens, 10)
        now[0] += pass_cost(len(guesses))
        n_right = next((i for i in range(len(guesses)) if rng.random() >= p), len(guesses))
        tokens = tokens + [1] * n_right + [2]
    return asked


def test_length_grows_when_guesses_are_right_and_cheap():
    asked = simulate(0.98, 0.01, lambda n: 1 + 0.02 * n)
    assert np.mean(asked[50:]) > 8


def test_length_shrinks_when_guesses_are_wrong():
    asked = simulate(0.4, 0.05, lambda n: 1 + 0.1 * n)
    assert 0.5 < np.mean(asked[50:]) < 3


def test_speculation_switches_itself_off_when_it_loses():
    for p, draft_cost, slope in ((0.1, 0.5, 0.3), (0.7, 1.0, 0.5), (0.9, 0.01, 3.0)):
        asked = simulate(p, draft_cost, lambda n, slope=slope: 1 + slope * n)
        assert np.mean(np.array(asked[50:]) == 0) > 0.85
        assert max(asked[50:]) <= 2  # tried again now and then


def test_what_slows_a_round_down_once_does_not_switch_speculation_off():
    seen = set()

    def pass_cost(n):
        is_first = n not in seen
        seen.add(n)
        return 1 + 0.1 * n + 50 * (is_first and n > 0)  # which chooses how to multiply n + 1 rows

    assert np.mean(simulate(0.8, 0.02, pass_cost, n_rounds=60)[20:]) > 3


# ----------------------------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------------------------

PAIR = ("speculative.py", "--target_model_size=tiny", "--draft_model_size=nano", "--n_tokens_to_generate=60")


@pytest.mark.parametrize("drafter", ["model", "lookup", "both"])
@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.9", "--top_k", "50", "--top_p", "0.95", "--seed", "4"]])
def test_verify_reports_identical_text(tiny, drafter, sampling):
    encoder, target = tiny
    done = run(*PAIR, "ROMEO:", "--drafter", drafter, "--verify", *sampling)
    assert done.returncode == 0 and "verified: 60 tokens identical" in done.stderr and "margin" in done.stderr
    sample = make_sampler(0.9, 50, 0.95, seed=4) if sampling else greedy
    assert done.stdout == encoder.decode(generate(target, encoder.encode("ROMEO:"), 60, sample))


def test_min_p_and_the_repetition_penalty_are_flags(tiny):
    encoder, target = tiny
    done = run(*PAIR, "ROMEO:", "--verify", "--temperature=1", "--min_p=0.1", "--repetition_penalty=1.3", "--seed=2")
    assert done.returncode == 0 and "verified: 60 tokens identical" in done.stderr
    sample = make_sampler(1, min_p=0.1, repetition_penalty=1.3, seed=2)
    assert done.stdout == encoder.decode(generate(target, encoder.encode("ROMEO:"), 60, sample))


def test_verify_exits_with_1_at_a_difference(monkeypatch, tiny, capsys):
    encoder, target = tiny
    prompt = encoder.encode("ROMEO:")
    ids = list(generate(target, prompt, 10))
    ids[7] += 1
    with pytest.raises(SystemExit) as e:
        speculative.compare_with_plain(partial(generate, target, prompt), greedy, ids, 1.0)
    assert e.value.code == 1 and "the texts differ at token 7" in capsys.readouterr().err


def test_json_is_one_object_on_stderr():
    done = run(*PAIR, "ROMEO:", "--json", "--n_draft", "4")
    summary = json.loads(done.stderr)
    assert summary["tokens"] == 60 and summary["rounds"] < 60
    # A round makes its accepted guesses and one token more, but the last may end with an accepted guess.
    assert summary["accepted"] - (60 - summary["rounds"]) in (0, 1)
    assert 0 < summary["acceptance_rate"] <= 1 and summary["tokens_per_target_pass"] == round(60 / summary["rounds"], 3)


def test_stats_name_every_figure():
    done = run(*PAIR, "ROMEO:", "--stats")
    for name in (
        "rounds",
        "accepted_per_round",
        "acceptance_rate",
        "tokens_per_target_pass",
        "draft_seconds",
        "speedup",
    ):
        assert name in done.stderr


def test_lookup_needs_no_draft_model():
    done = run(*PAIR, "ROMEO:", "--drafter", "lookup", "--draft_model_size", "nowhere")
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--n_draft", "-1"], "n_draft is -1, expected a whole number of 0 or more"),
        (["--n_draft", "x"], "n_draft is 'x'"),
        (["--n_gram", "0"], "n_gram is 0, expected a whole number of 1 or more"),
        (["--drafter", "oracle"], "drafter is 'oracle', expected model, lookup or both"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--top_p", "2"], "top_p is 2"),
        (["--min_p", "2"], "min_p is 2"),
        (["--repetition_penalty", "0"], "repetition_penalty is 0"),
        (["--seed", "1.5"], "seed is 1.5"),
        (["--n_tokens_to_generate", "0"], "0 tokens to generate"),
        (["--n_tokens_to_generate", "600"], "exceed the context of 512"),
        (["--draft_model_size", "125M"], "no model '125M'"),
    ],
)
def test_a_mistake_is_one_line(args, message):
    done = run(*PAIR, "x", *args)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_a_draft_with_another_vocabulary_is_one_line(tmp_path):
    for name in ("tiny", "nano"):
        shutil.copytree(os.path.join(MODELS, name), tmp_path / name)
    path = tmp_path / "nano" / "vocab.bpe"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[1], lines[2] = lines[2], lines[1]
    path.write_text("\n".join(lines), encoding="utf-8")
    done = run(*PAIR, "x", "--models_dir", tmp_path)
    assert (done.returncode, done.stdout) == (1, "") and "nano has another vocabulary" in done.stderr


def in_a_terminal(env):
    """stdout of a run whose stdout is a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *PAIR, "ROMEO:", "--show", "--n_draft", "4"],  # not adaptive: what is guessed varies then
        stdout=follower,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **env},
    )
    os.close(follower)
    output = b""
    try:
        while select.select([leader], [], [], 60)[0] and (chunk := os.read(leader, 1 << 16)):
            output += chunk
    except OSError:  # Linux's way to say that the terminal has no writer any more
        pass
    assert process.wait(60) == 0
    os.close(leader)
    return output.decode()


def test_show_colours_only_a_terminal():
    coloured = in_a_terminal({"NO_COLOR": ""})
    assert "\033[32m" in coloured and "\033[33m" in coloured
    assert "\033[" not in in_a_terminal({"NO_COLOR": "1"})
    assert "\033[" not in run(*PAIR, "ROMEO:", "--show").stdout
