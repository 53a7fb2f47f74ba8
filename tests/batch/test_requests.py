"""What lines ask for: three forms, defaults, mistakes of a line and mistakes of a file."""

import io
import json

import pytest

from batch import requests
from batch.requests import Request, count_requests, derived_seed, read_requests

DEFAULTS = {"n_tokens_to_generate": 7, "temperature": 0.5, "stop": []}


def read(*lines, form="auto", seed=0):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return list(read_requests(io.BytesIO(text.encode()), DEFAULTS, seed, form))


def test_openai_lines():
    body = {"model": "gpt-2", "prompt": "To be", "max_tokens": 9, "top_p": 0.5, "seed": 3, "stop": "\n", "n": 2}
    body |= {"logprobs": 1, "echo": True, "stream": False, "suffix": None, "presence_penalty": 0, "temperature": None}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    (request,) = read(line)
    assert (request.form, request.id, request.prompts, request.key) == ("openai", "a", ["To be"], '"a"')
    assert (request.n_tokens_to_generate, request.n_samples, request.stop, request.seed) == (9, 2, ["\n"], 3)
    assert (request.logprobs, request.echo, request.top_p, request.temperature) == (1, True, 0.5, 0.5)
    assert not request.error


@pytest.mark.parametrize("prompt", ["To be", [1, 2, 3], ["To be", "or"], [[1, 2], [3]], ["To be", [3]]])
def test_a_prompt_is_text_or_ids_or_several(prompt):
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    assert read({"id": 1, "prompt": prompt})[0].prompts == ([prompt] if is_one else prompt)


def test_short_lines_and_defaults():
    first, second, third = read({"id": "a", "prompt": "x", "min_p": 0.1}, "", {"prompt": "y"}, {"id": 9, "prompt": ""})
    assert (first.form, first.id, first.min_p, first.n_tokens_to_generate) == ("short", "a", 0.1, 7)
    assert (second.id, second.line, third.key) == (3, 3, "9")
    assert first.seed == derived_seed(0, '"a"') != second.seed


def test_seeds_depend_on_the_id_and_the_flag_alone():
    line = {"id": "a", "prompt": "x"}
    (one,), (_, other), (another,) = (
        read(line),
        read({"id": "b", "prompt": "y"}, line | {"prompt": "z"}),
        read(line, seed=1),
    )
    assert one.seed == other.seed != another.seed and 0 <= one.seed < 1 << 63
    assert (one.digest, another.digest) != (other.digest, one.digest)


def test_plain_text():
    first, second = read("\ufeffTo be\r", "", '{"or": "not"}')
    assert (first.prompts, first.id, second.prompts, second.id) == (["To be"], 1, ['{"or": "not"}'], 3)
    (request,) = read('{"id": 1, "prompt": "x"}', form="text")
    assert request.prompts == ['{"id": 1, "prompt": "x"}'] and request.form == "text"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("nonsense", "no JSON: Expecting value"),
        ('{"id": "a", "prompt": NaN}', "no JSON: NaN"),
        ("[" * 100_000, "no JSON: maximum recursion"),
        ("[1]", "no JSON: the line is 'list', expected a JSON object"),
        ('{"id": 1, "prompt": "x", "seed": ' + "9" * 5000 + "}", "no JSON: Exceeds the limit"),
        ({"id": "a"}, "prompt is None, expected a text"),
        ({"id": "a", "prompt": []}, "prompt is 'list', expected"),
        ({"id": "a", "prompt": [1, "x"]}, "prompt is 'list', expected"),
        ({"id": "a", "prompt": {"x": 1}}, "prompt is 'dict', expected"),
        ({"id": [], "prompt": "x"}, r"id is \[\], expected a text or a whole number"),
        ({"id": True, "prompt": "x"}, "id is True"),
        ({"id": "a", "prompt": "x", "temperature": "hot"}, "temperature is 'hot'"),
        ({"id": "a", "prompt": "x", "n_tokens_to_generate": 1.5}, "1.5 tokens to generate"),
        ({"id": "a", "prompt": "x", "n_samples": 1000}, "n_samples is 1000, expected from 1 to 128"),
        ({"id": "a", "prompt": "x", "stop": [1]}, r"stop is \[1\]"),
        ({"id": "a", "prompt": "x", "stop": ""}, "stop is ''"),
        ({"id": "a", "prompt": "x", "seed": -1}, "seed is -1"),
        ({"id": "a", "prompt": "x", "echo": 1}, "echo is 1"),
        ({"id": "a", "prompt": "x", "logprobs": True}, "logprobs is True"),
        ({"custom_id": "a", "body": {"prompt": "x"}, "url": "/v1/chat/completions"}, "url is '/v1/chat/completions'"),
        ({"custom_id": "a", "body": {"prompt": "x"}, "method": "GET"}, "method is 'GET'"),
        ({"custom_id": "a", "body": "x"}, "body is 'x'"),
        ({"custom_id": 1, "body": {"prompt": "x"}}, "custom_id is 1"),
        ({"body": {"prompt": "x"}}, "id is None"),
        ({"custom_id": "a", "body": {"prompt": "x", "logit_bias": {"1": 2}}}, "logit_bias is {'1': 2}"),
        ({"custom_id": "a", "body": {"prompt": "x", "best_of": 3}}, "best_of is 3"),
    ],
)
def test_a_line_that_cannot_be_done_is_an_error_of_its_own(line, error):
    before, wrong, after = read({"id": "b", "prompt": "x"}, line, {"id": "c", "prompt": "x"})
    assert not before.error and not after.error
    with pytest.raises(ValueError, match=f"^{error}"):
        raise ValueError(wrong.error)
    assert wrong.line == 2 and wrong.key in ('"a"', "line 2", "1")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ({"id": "a", "prompt": "x", "temprature": 1}, "line 2: unknown key 'temprature', did you mean 'temperature'"),
        ({"custom_id": "a", "body": {"messages": []}}, "line 2: unknown key 'messages', expected some of best_of"),
        ({"custom_id": "a", "bdoy": {}}, "line 2: unknown key 'bdoy', did you mean 'body'"),
        ({"id": "b", "prompt": "other"}, 'line 2: the id "b" is that of line 1 too'),
    ],
)
def test_mistakes_of_the_file_are_errors_at_once(line, error):
    with pytest.raises(ValueError, match=error):
        count_requests(iter(read({"id": "b", "prompt": "x"}, line)), {}, "out")


def test_a_line_without_an_end_is_an_error_at_once(monkeypatch):
    monkeypatch.setattr(requests, "MAX_PROMPT", 2_000_000)
    with pytest.raises(ValueError, match="line 2 has more than 2 MB, which is the most"):
        read({"id": "b", "prompt": "x"}, "x" * 2_000_001)


def test_a_file_that_is_gone_on_with():
    asked = read({"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"})
    assert count_requests(iter(asked), {'"b"': asked[1].digest}, "out") == (2, 1)
    for done, error in (
        ({'"b"': asked[0].digest}, 'out has a record of "b" from other flags or another prompt than line 2'),
        ({'"c"': asked[0].digest}, 'out has a record of "c", which is not among the prompts'),
    ):
        with pytest.raises(ValueError, match=error):
            count_requests(iter(asked), done, "out")


def test_every_flag_of_a_line_is_one_of_the_command():
    from batch.run import BATCH  # the flags of the command

    flags = {name for section in BATCH.values() for name in section}
    assert set(requests.FLAGS) <= flags and Request._fields[2:14] == requests.FLAGS
