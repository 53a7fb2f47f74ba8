"""Continuous batching: every text is what it is alone, whatever comes, goes and is shared beside it."""

from functools import partial

import numpy as np
import pytest
from helpers import Spied, random_model, shared_out

import gpt2
from batch import Request, complete_many, rows
from decoding.sampling import log_softmax, make_sampler
from decoding.scoring import score
from decoding.stopping import text_until_end


def mixed(encoder, n, n_ctx, seed=0, n_new=24):
    """Requests of 1 to n_ctx - 112 prompt tokens: greedy and sampled, with stops, several samples, mistakes."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(encoder.n_vocab, size=2 * n_ctx).tolist()
    words = encoder.encode("ROMEO:\nO that I were the king of all of you, my lord!\nAnd so say I.\n\nJULIET:\n" * 20)
    for i in range(n):
        n_prompt, source = int(rng.integers(1, n_ctx - 111)), (ids, words)[i % 4 > 0]
        start = int(rng.integers(len(source) - n_prompt))
        request = Request([source[start : start + n_prompt]], id=i, n_tokens_to_generate=int(rng.integers(1, n_new)))
        request = request._replace(seed=int(rng.integers(1 << 40)), temperature=(0, 0.8)[i % 2])
        request = request._replace(
            stop=[[], ["\n"], ["the", " a"]][i % 3], ignore_eot=i % 5 == 0, n_samples=1 + (i % 50 == 7)
        )
        if i % 25 == 3:
            request = request._replace(n_tokens_to_generate=n_ctx + 1)
        yield request


def alone(model, encoder, request):
    """The texts of a request, as gpt2.py writes each."""
    for prompt in request.prompts:
        ids = encoder.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        for n in range(request.n_samples):
            sample = make_sampler(
                request.temperature, request.top_k, request.top_p, request.min_p, request.repetition_penalty,
                request.seed + n,
            )  # fmt: skip
            new = gpt2.generate(model, ids, request.n_tokens_to_generate, sample)
            yield "".join(text_until_end(encoder, new, request.stop, request.ignore_eot))


def check_all(model, encoder, requests, n_errors, **options):
    results = {result.request.id: result for result in complete_many(model, encoder, requests, **options)}
    assert sorted(results) == sorted(request.id for request in requests)
    assert sum(bool(result.error) for result in results.values()) == n_errors
    for request in requests:
        if not results[request.id].error:
            assert [c.text for c in results[request.id].choices] == list(alone(model, encoder, request)), request


def test_500_mixed_prompts_are_what_they_are_alone(nano):
    encoder, model = nano
    requests = list(mixed(encoder, 500, 512, n_new=16))
    check_all(model, encoder, requests, n_errors=20)


@pytest.mark.parametrize("max_rows", [1, 3, 8])
def test_few_rows_in_little_memory(nano, max_rows):
    """Rows that are moved often, and memory that grows with the prompts, or has room for one text only."""
    encoder, model = nano
    requests = list(mixed(encoder, 25, 512, seed=max_rows))
    for n_mb in (0.001, 12):
        check_all(model, encoder, requests, n_errors=1, max_rows=max_rows, max_bytes=n_mb * 1e6)


def test_memory_for_keys_and_values_is_kept_to(nano, monkeypatch):
    encoder, model = nano
    sizes = []
    monkeypatch.setattr(rows, "zeros", lambda shape: sizes.append(4 * np.prod(shape)) or np.zeros(shape, np.float32))
    requests = list(mixed(encoder, 40, 512, seed=4))
    assert len(list(complete_many(model, encoder, requests, max_bytes=8e6))) == 40
    assert sizes and max(sizes) <= 8e6


def test_memory_that_holds_anything_before(nano, monkeypatch):
    """As that which a process has used before: rows are padded with it."""
    encoder, model = nano
    monkeypatch.setattr("gpt2.room", lambda shape: np.full(shape, np.nan, np.float32))
    monkeypatch.setattr(
        np, "empty", lambda shape, dtype=float: np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 0, dtype)
    )
    check_all(model, encoder, list(mixed(encoder, 25, 512, seed=5)), n_errors=1, max_rows=6)


def test_rows_of_a_large_model(nano):
    """Those that share out layers among threads and read packed weights."""
    encoder, model = nano
    model = shared_out(model)
    requests = [request for request in mixed(encoder, 12, 160, seed=1, n_new=12) if len(request.prompts[0]) > 3]
    check_all(model, encoder, requests, n_errors=0, max_rows=8)


def test_samplers_of_every_kind(nano):
    encoder, model = nano
    kinds = [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"repetition_penalty": 1.4}, {"seed": 2**64 - 2}]
    asked = [(kind, temperature) for kind in kinds for temperature in (0, 1.2)]
    requests = [Request(["My lord,"], id=i, temperature=t, **kind) for i, (kind, t) in enumerate(asked)]
    check_all(model, encoder, requests, n_errors=0, max_rows=4)


def fed(model):
    return sum(np.prod(shape) for shape in model.shapes)


def test_a_common_beginning_is_computed_once(nano):
    encoder, model = nano
    begin = encoder.encode("You are a good king, and you answer what the people of Rome ask you.\n" * 8)
    requests = [
        Request([begin + encoder.encode(f"Citizen {i}: what?" * (1 + i % 3))], id=i, n_tokens_to_generate=4)
        for i in range(30)
    ]
    spied = Spied(model)
    check_all(spied, encoder, requests, n_errors=0, max_rows=6)
    spied.shapes.clear()
    list(complete_many(spied, encoder, requests, max_rows=6))
    assert len(begin) > 140 and fed(spied) < 2 * len(begin) + 30 * (40 + 4)


def test_beginnings_are_kept_in_their_share_of_memory(nano):
    _, model = nano
    n_bytes = model.new_cache(n_seq=64).kv.nbytes
    beginnings = rows.Beginnings(model, 2.5 * n_bytes)
    texts = [[i] * 64 for i in range(1, 5)]
    for ids in texts:
        beginnings.keep(ids)
        assert beginnings.find([*ids, 0])[0] == 64
    assert [beginnings.find([*ids, 0])[0] for ids in texts] == [0, 0, 64, 64]
    beginnings.keep(texts[3] + [0] * 200)  # too large
    assert [beginnings.find([*ids, 0])[0] for ids in texts] == [0, 0, 64, 64]


def test_samples_of_one_prompt_feed_it_once(nano):
    encoder, model = nano
    spied = Spied(model)
    request = Request(["To be, or not to be, that is the question:\n" * 9], n_samples=20, n_tokens_to_generate=3)
    (result,) = complete_many(spied, encoder, [request._replace(temperature=1.0)])
    assert len(result.choices) == 20 and len({choice.text for choice in result.choices}) > 5
    assert fed(spied) < 2 * result.n_prompt


def test_a_text_that_ends_gives_its_row_away():
    """Rows are as full as they can be: with as many steps as the tokens need."""
    spied = Spied(random_model(n_ctx=200))
    lengths = [3, 60, 9, 12, 30, 18, 24, 6, 12, 20]
    seqs = [gpt2.Seq([i + 1], n, gpt2.greedy) for i, n in enumerate(lengths)]
    together = rows.Rows(spied, 1e9, 4)
    waiting, n_steps = list(seqs), 0
    while waiting or together.seqs:
        n = together.n_joining(waiting)
        if n:
            together.join(waiting[:n], [0] * n)
            waiting = waiting[n:]
        together.step()
        n_steps += 1
    assert n_steps == 60  # of the longest text, beside which the others take turns: 134 / 3 are less
    assert [seq.ids[1:] for seq in seqs] == [list(gpt2.generate(spied, [i + 1], n)) for i, n in enumerate(lengths)]


def test_long_texts_are_not_left_to_the_end(nano):
    encoder, model = nano
    lengths = [4, 4, 4, 4, 4, 40, 20]  # in this order 48 steps of two rows or one
    requests = [Request([[i + 1]], n_tokens_to_generate=n, ignore_eot=True) for i, n in enumerate(lengths)]
    spied = Spied(model)
    assert len(list(complete_many(spied, encoder, requests, max_rows=2))) == 7
    assert len(spied.shapes) <= 45  # 40 steps, and passes that settle near ties


def test_texts_of_about_the_same_length_are_side_by_side(monkeypatch):
    """So that the padding which neighbours share is not attended to."""
    monkeypatch.setattr(rows, "N_TEXTS", 3)
    model = random_model(n_ctx=100)
    together = rows.Rows(model, 1e9, 8)
    lengths = [5, 30, 8, 22, 40, 3, 16]
    seqs = [gpt2.Seq(range(1, 1 + n), 10, gpt2.greedy) for n in lengths]
    for some in (seqs[:4], seqs[4:]):
        together.join(some, [0] * len(some))
        together.step()
    side_by_side = [sorted(seq.n_prompt for seq in together.seqs[i : i + 3]) for i in (0, 3, 6)]
    assert side_by_side == [[22, 30, 40], [5, 8, 16], [3]]
    while together.seqs:
        together.step()
    assert [seq.ids[n:] for seq, n in zip(seqs, lengths, strict=True)] == [
        list(gpt2.generate(model, list(range(1, 1 + n)), 10)) for n in lengths
    ]


def test_requests_are_read_when_they_are_needed(nano):
    encoder, model = nano
    n_read = 0

    def requests():
        nonlocal n_read
        for i in range(1000):
            n_read += 1
            yield Request(["x"], id=i, n_tokens_to_generate=2)

    results = complete_many(model, encoder, requests(), max_rows=4)
    assert next(results).n_prompt == 1 and n_read <= 16
    assert len(list(results)) == 999


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request(["x"], n_tokens_to_generate=0), "0 tokens to generate, expected"),
        (Request(["x"], n_samples=0), "n_samples is 0"),
        (Request([[1, 10**6]]), "token id 1000000 is outside the vocabulary"),
        (Request(["x" * 3000]), "exceed the context of 512"),
        (Request(["x"], top_p=0), "top_p is 0"),
    ],
)
def test_what_cannot_be_done_is_an_error_among_results(nano, request_, error):
    encoder, model = nano
    first, second = sorted(complete_many(model, encoder, [request_, Request(["x"])]), key=lambda r: not r.error)
    assert error in first.error and first.choices == [] and second.error == "" and second.choices


def test_logprobs_are_those_of_scoring(nano):
    encoder, model = nano
    requests = [
        Request(["The king"], id=0, logprobs=2, echo=True, n_tokens_to_generate=12, temperature=0.9, seed=3),
        Request(["The king"], id=1, logprobs=0, n_tokens_to_generate=12, temperature=0.9, seed=3),
        Request(["The king is dead"], id=2, logprobs=1, echo=True, n_tokens_to_generate=0),
        Request(["The king"], id=3, logprobs=1, stop=["i"], n_tokens_to_generate=30),
    ]
    results = {r.request.id: r for r in complete_many(model, encoder, requests)}
    both, new, prompt, stopped = (results[i].choices[0] for i in range(4))
    ids = encoder.encode(both.text)
    expected = [None, *score(model, ids)]
    assert both.logprobs["tokens"] == [encoder.decode([i]) for i in ids] and both.text.startswith("The king")
    assert both.logprobs["token_logprobs"][0] is None
    np.testing.assert_allclose(both.logprobs["token_logprobs"][1:], expected[1:], atol=1e-3)
    logits = model.forward([ids], model.new_cache(), n_last=len(ids))[0]
    best = log_softmax(logits[-2].astype(np.float64))
    top = both.logprobs["top_logprobs"][-1]
    assert len(top) == 2 and abs(max(top.values()) - best.max()) < 1e-3
    assert new.logprobs["token_logprobs"] == both.logprobs["token_logprobs"][-12:]
    assert new.logprobs["text_offset"][0] == 0 and both.logprobs["text_offset"][-12] == len("The king")
    for token, offset in zip(both.logprobs["tokens"], both.logprobs["text_offset"], strict=True):
        assert both.text[offset : offset + len(token)] == token
    assert (prompt.text, prompt.n_tokens, prompt.finish_reason) == ("The king is dead", 0, "length")
    assert len(prompt.logprobs["tokens"]) == len(encoder.encode("The king is dead"))
    assert stopped.finish_reason == "stop" and "i" not in stopped.text
    assert "".join(stopped.logprobs["tokens"]).startswith(stopped.text)
    assert all(offset < len(stopped.text) for offset in stopped.logprobs["text_offset"])


def test_tokens_that_are_no_text_are_shown_by_their_bytes(nano):
    encoder, model = nano
    ids = encoder.encode("é😀")
    (result,) = complete_many(model, encoder, [Request([ids], logprobs=0, echo=True, n_tokens_to_generate=0)])
    logprobs = result.choices[0].logprobs
    assert result.choices[0].text == "é😀" and "bytes:\\xf0" in "".join(logprobs["tokens"])
    assert logprobs["text_offset"][0] == 0 and max(logprobs["text_offset"]) < 2


def test_a_run_that_is_left_in_the_middle_begins_anew(nano):
    encoder, model = nano
    requests = list(mixed(encoder, 30, 512, seed=9))
    results = complete_many(model, encoder, requests, max_rows=4)
    for _ in range(5):
        next(results)
    results.close()
    check = partial(check_all, model, encoder, requests, max_rows=4)
    check(n_errors=2)
