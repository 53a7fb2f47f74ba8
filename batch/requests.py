"""Prompts come in: OpenAI's batch form, a short form, or plain text, a line each.

OpenAI's: {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "To be", "max_tokens": 9}}.
Short: {"id": "a", "prompt": "To be", "n_tokens_to_generate": 9}, with the names of the flags. Empty lines count for
nothing. What a line leaves out is as the flags say. Left out: chats, and what the sampler has not, such as logit_bias.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from console.flags import sampler_of
from console.streams import MAX_PROMPT
from decoding.requests import check_n_tokens
from decoding.sampling import check, is_whole
from decoding.stopping import check_stops

VERSION = "1"  # of the forms and of how seeds are derived: records of another one are not gone on with
MAX_SAMPLES, MAX_LOGPROBS = 128, 20
URL = "/v1/completions"

# ----------------------------------------------------------------------------------------------------------------------
# A request
# ----------------------------------------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What to do with one line. `prompts`: texts or lists of token ids, most often one. Other names are the flags'.

    `seed` is that of the first text, the others have the next ones. `error` says why there is nothing to do.
    """

    prompts: list
    id: object = None
    n_tokens_to_generate: int = 40
    temperature: float = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: list[str] = []  # noqa: RUF012  # never changed
    ignore_eot: bool = False
    n_samples: int = 1
    logprobs: int | None = None
    echo: bool = False
    form: str = "short"
    line: int = 0
    digest: str = ""
    error: str = ""

    @property
    def key(self) -> str:
        """What tells requests of a file apart: the id as JSON, or the line where a line has none that can be used."""
        return key_of(self.id, self.line)


def key_of(id, line: int) -> str:
    return f"line {line}" if id is None else json.dumps(id)


def derived_seed(seed: int, key: str) -> int:
    """For a line without a seed: 63 bits of the SHA-256 of --seed and the line's id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {key}".encode()).digest()[:8], "big") >> 1


FLAGS = tuple(name for name in Request._fields[2:14])  # those that a line may set
SHORT_KEYS = {"id", "prompt", *FLAGS}
OPENAI_KEYS = {"custom_id", "method", "url", "body"}
OPENAI_NAMES = {"max_tokens": "n_tokens_to_generate", "n": "n_samples"}  # of the body
BODY_KEYS = {"prompt", *OPENAI_NAMES, *FLAGS} - {*OPENAI_NAMES.values()}
UNUSED_KEYS = {"model", "user", "metadata"}
NEUTRAL = {  # keys of a body for what is not done here, and the values that ask for nothing
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "suffix": ("",),
    "stream": (False,),
}

# ----------------------------------------------------------------------------------------------------------------------
# From a line to a request
# ----------------------------------------------------------------------------------------------------------------------


def check_keys(found: dict, known: set[str], where: str) -> None:
    import difflib  # for this mistake only

    for name in sorted(found.keys() - known):
        like = difflib.get_close_matches(name, sorted(known), n=1)
        meant = f"did you mean {like[0]!r}?" if like else f"expected some of {', '.join(sorted(known))}"
        raise ValueError(f"{where}: unknown key {name!r}, {meant}")


def is_ids(prompt) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(is_whole(i) for i in prompt)


def prompts_of(prompt) -> list:
    """A text, a list of ids, or a list of several of these. ValueError: anything else."""
    several = prompt if isinstance(prompt, list) and not is_ids(prompt) else [prompt]
    is_right = bool(several) and all(isinstance(one, str) or is_ids(one) for one in several)
    check("prompt", prompt if prompt is None or isinstance(prompt, (int, float)) else type(prompt).__name__, is_right,
          "a text, or a list of token ids, or a list of these")  # fmt: skip
    return several


def checked(request: Request) -> Request:
    """The request, or a ValueError for what no model could do."""
    n_tokens, n_samples, logprobs = request.n_tokens_to_generate, request.n_samples, request.logprobs
    if not (n_tokens == 0 and is_whole(n_tokens) and request.echo is True):  # which only looks at the prompt
        check_n_tokens(n_tokens)
    check("n_samples", n_samples, is_whole(n_samples) and 1 <= n_samples <= MAX_SAMPLES, f"from 1 to {MAX_SAMPLES}")
    is_count = logprobs is None or (is_whole(logprobs) and 0 <= logprobs <= MAX_LOGPROBS)
    check("logprobs", logprobs, is_count, f"a whole number from 0 to {MAX_LOGPROBS}, or none")
    for name in ("echo", "ignore_eot"):
        check(name, getattr(request, name), isinstance(getattr(request, name), bool), "true or false")
    stops = request.stop
    check(
        "stop", stops, isinstance(stops, list) and all(isinstance(s, str) for s in stops), "a text or a list of texts"
    )
    check_stops(stops)
    sampler_of(request, request.seed)
    return request


def fields_of(line: dict, where: str) -> tuple[str, object, dict]:
    """(form, id, the other keys by the flags' names) of a line. ValueError: unknown keys."""
    if not OPENAI_KEYS & line.keys():
        check_keys(line, SHORT_KEYS, where)
        return "short", line.get("id"), line
    check_keys(line, OPENAI_KEYS, where)
    body = line.get("body")
    if isinstance(body, dict):
        check_keys(body, BODY_KEYS | UNUSED_KEYS | NEUTRAL.keys(), where)
        body = {OPENAI_NAMES.get(name, name): value for name, value in body.items()}
    return "openai", line.get("custom_id"), {"body": body} | {name: line.get(name) for name in ("method", "url")}


def with_fields(request: Request, fields: dict, seed: int) -> Request:
    """The request with what the line says. ValueError: it cannot be done."""
    if request.form == "openai":
        check("custom_id", request.id, isinstance(request.id, str), "a text")
        check("method", fields["method"], fields["method"] in (None, "POST"), "POST")
        check("url", fields["url"], fields["url"] in (None, URL), f"{URL}, which is what GPT-2 can do")
        check("body", fields["body"], isinstance(fields["body"], dict), "an object")
        fields = fields["body"]
        for name, values in NEUTRAL.items():
            value = fields.get(name)
            check(name, value, value is None or value in values, f"{values[0]!r} or none: it is not done here")
    given = {name: fields[name] for name in FLAGS if fields.get(name) is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    given.setdefault("seed", derived_seed(seed, request.key))
    return checked(request._replace(prompts=prompts_of(fields.get("prompt")), **given))


def refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def request_of(content: bytes, number: int, form: str, defaults: dict, seed: int, seal: bytes) -> Request:
    """The request of a line. ValueError: its keys are not known, as in a file that is meant for something else.

    `form` is that of the line before, which a line has that cannot be read; a text has its own.
    """
    where = f"line {number}"
    digest = hashlib.sha256(seal + content).hexdigest()[:16]
    request = Request([], line=number, digest=digest, form=form, **defaults)
    try:
        if form == "text":
            id, fields = number, {"prompt": content.decode("utf-8", "replace")}
        else:
            line = json.loads(content.decode("utf-8"), parse_constant=refuse_constant)
            check("the line", type(line).__name__, isinstance(line, dict), "a JSON object")
    except (ValueError, RecursionError) as e:
        return request._replace(error=f"no JSON: {e}")
    if form != "text":
        form, id, fields = fields_of(line, where)
    id = number if id is None and form == "short" else id
    is_id = isinstance(id, str) or is_whole(id)
    request = request._replace(form=form, id=id if is_id else None)
    try:
        check("id", id, is_id, "a text or a whole number")
        return with_fields(request, fields, seed)
    except ValueError as e:
        return request._replace(error=str(e))


# ----------------------------------------------------------------------------------------------------------------------
# From a file to requests
# ----------------------------------------------------------------------------------------------------------------------


def lines(stream: BinaryIO) -> Iterator[bytes]:
    """ValueError: one is too long for a prompt, as that of /dev/zero, which has no end."""
    number = 0
    while line := stream.readline(MAX_PROMPT + 1):
        number += 1
        if len(line) > MAX_PROMPT:
            raise ValueError(f"line {number} has more than {MAX_PROMPT / 1e6:.0f} MB, which is the most; cut it")
        yield line


def read_requests(stream: BinaryIO, defaults: dict, seed: int = 0, form: str = "auto") -> Iterator[Request]:
    """The requests of a file from its beginning. `form`: json, text or auto, which looks for a { in the first line.

    `defaults` are values by the names of the flags, what lines leave out. ValueError: an unknown key.
    """
    stream.seek(0)
    seal = f"{VERSION} {seed} {json.dumps(defaults, sort_keys=True)} ".encode()
    for number, line in enumerate(lines(stream), start=1):
        content = line.rstrip(b"\r\n")
        if number == 1:
            content = content.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
        if not content.strip():
            continue
        if form == "auto":
            form = "json" if content.lstrip().startswith(b"{") else "text"
        request = request_of(content, number, "short" if form == "json" else form, defaults, seed, seal)
        form = request.form
        yield request


def count_requests(requests: Iterator[Request], done: dict[str, str], output: str) -> tuple[int, int]:
    """(how many there are, how many of them are done). ValueError: an id comes twice, or a record is of another line.

    `done` has the digests of the records in the output by their keys.
    """
    seen: dict[str, int] = {}
    n_done = 0
    for request in requests:
        if first := seen.get(request.key):
            raise ValueError(f"line {request.line}: the id {request.key} is that of line {first} too; ids must differ")
        seen[request.key] = request.line
        if (digest := done.get(request.key)) is not None:
            n_done += 1
            if digest != request.digest:
                raise ValueError(
                    f"{output} has a record of {request.key} from other flags or another prompt than line "
                    f"{request.line}; choose another output, or give the flags and prompts of that run"
                )
    if n_done < len(done):
        alien = next(key for key in done if key not in seen)
        raise ValueError(f"{output} has a record of {alien}, which is not among the prompts; choose another output")
    return len(seen), n_done
