"""Texts go out: a record a line, appended as each text ends, and gone on with after whatever stopped a run.

A record says what it was made from: 8 hexadecimal digits for the model and 16 for the line and the flags. OpenAI's form
has them in "id" and "system_fingerprint", the short form in "fingerprint". So a file of records is all that is needed
to go on, and records of another model, other flags or another line are noticed.

Nothing in a record depends on the time or on how often a run was stopped: "created" is always 0.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator

import numpy as np

from batch.requests import key_of
from batch.schedule import Result
from gpt2 import Model

N_LOOKED_AT = 16
BEGINNING = b'{"id": '  # of each record
SYNC_S = 1.0  # the longest time between a record and its being synced
GO_ON = "the same command goes on where it stopped"

# ----------------------------------------------------------------------------------------------------------------------
# Records
# ----------------------------------------------------------------------------------------------------------------------


def arrays_of(params) -> Iterator[np.ndarray]:
    if isinstance(params, np.ndarray):
        yield params
        return
    for part in params.values() if isinstance(params, dict) else params:
        yield from arrays_of(part)


def model_digest(encoder, model: Model) -> str:
    """What tells one model from another: hyper-parameters, vocabulary, and N_LOOKED_AT weights of each array.

    So it is the same for the same model in files of another kind, and reads next to nothing of them.
    """
    digest = hashlib.sha256(repr((sorted(model.hparams.items()), sorted(encoder.tokens.items()))).encode())
    for array in arrays_of(model.params):
        at = tuple(np.linspace(0, n - 1, N_LOOKED_AT, dtype=int) for n in array.shape)
        digest.update(np.ascontiguousarray(array[at], np.float32).tobytes())
    return digest.hexdigest()[:8]


def choice_of(index: int, choice) -> dict:
    return {"text": choice.text, "index": index, "finish_reason": choice.finish_reason, "logprobs": choice.logprobs}


def usage_of(result: Result) -> dict:
    n_new = sum(choice.n_tokens for choice in result.choices)
    return {"prompt_tokens": result.n_prompt, "completion_tokens": n_new, "total_tokens": result.n_prompt + n_new}


def openai_record(result: Result, model_size: str, model_digest: str) -> dict:
    request, name = result.request, model_digest + result.request.digest
    response, error = {"status_code": 200, "request_id": f"req_{name}"}, None
    if result.error:
        code = result.code
        error = {"code": code, "message": result.error, "line": request.line}
        response["status_code"] = 400 if code == "invalid_request" else 500
        kind = "invalid_request_error" if code == "invalid_request" else "server_error"
        response["body"] = {"error": {"message": result.error, "type": kind, "param": None, "code": code}}
    else:
        response["body"] = {
            "id": f"cmpl-{name}",
            "object": "text_completion",
            "created": 0,
            "model": model_size,
            "system_fingerprint": f"fp_{model_digest}",
            "choices": [choice_of(i, choice) for i, choice in enumerate(result.choices)],
            "usage": usage_of(result),
        }
    return {"id": f"batch_req_{name}", "custom_id": request.id, "response": response, "error": error}


def short_record(result: Result, model_size: str, model_digest: str) -> dict:
    request = result.request
    record: dict = {"id": request.id}
    if result.error:
        record["error"] = {"code": result.code, "message": result.error, "line": request.line}
    else:
        choices = [{"text": choice.text, "finish_reason": choice.finish_reason} for choice in result.choices]
        for shown, choice in zip(choices, result.choices, strict=True):
            shown.update({"logprobs": choice.logprobs} if choice.logprobs else {})
        record |= choices[0] if len(choices) == 1 else {"choices": choices}
        record |= {"seed": request.seed} if request.temperature else {}
        record["usage"] = usage_of(result)
    return record | {"fingerprint": model_digest + request.digest}


def line_of(result: Result, model_size: str, model_digest: str) -> bytes:
    form = openai_record if result.request.form == "openai" else short_record
    record = form(result, model_size, model_digest)
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # an id with half of a character, which JSON can hold and UTF-8 cannot
        return json.dumps(record).encode() + b"\n"


def name_of(record: dict) -> tuple[str, str, str]:
    """(the request's key, the model's digest, the request's digest) of a record. ValueError: it is none."""
    try:
        id = record["custom_id"] if "custom_id" in record else record["id"]
        line = 0 if id is not None else record["error"]["line"]
        name = record["id"].removeprefix("batch_req_") if "custom_id" in record else record["fingerprint"]
        if len(name) == 24:
            return key_of(id, line), name[:8], name[8:]
    except (KeyError, TypeError, AttributeError):
        pass
    raise ValueError("not a record of this program")


# ----------------------------------------------------------------------------------------------------------------------
# The output
# ----------------------------------------------------------------------------------------------------------------------


def is_torn(line: bytes) -> bool:
    """Whether the end is missing, the line end at least. A whole object is looked at as if it had one."""
    try:
        return not line.endswith(b"\n") and not isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return not line.endswith(b"\n")


def write_to_stdout(text: str) -> None:
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        sys.stdout.write(json.dumps(json.loads(text)) + "\n")
    sys.stdout.flush()


class Output:
    """The file of records, of which one process is the only writer. "-" is stdout, which has no records yet.

    ValueError: another process writes it, or it has lines that are no records.
    """

    def __init__(self, path: str):
        self.path, self.name = path, "stdout" if path == "-" else path
        self.fd = None if path == "-" else os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.is_file = self.fd is not None and stat.S_ISREG(os.fstat(self.fd).st_mode)
        self.size = self.n_synced = 0  # bytes of whole records
        self.is_closed = False
        self.sync_error: OSError | None = None
        if self.is_file:
            threading.Thread(target=self.keep_synced, daemon=True).start()

    def lock(self) -> None:
        """Until the file is closed. Systems and file systems that lock nothing go without."""
        try:
            import fcntl  # not on Windows
        except ImportError:
            return
        if not self.is_file:
            return
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ValueError(f"{self.name}: another process is writing it; wait, or choose another output") from e
        except OSError:
            pass

    def records(self) -> Iterator[dict]:
        """Those that are there. A last line without its end was being written when the run was stopped: it goes."""
        with open(os.dup(self.fd), "rb") as f:
            f.seek(0)
            for number, line in enumerate(f, start=1):
                if is_torn(line) and (self.size or line.startswith(BEGINNING)):
                    break
                try:
                    record = json.loads(line)
                    name_of(record)
                except (ValueError, RecursionError) as e:
                    raise ValueError(
                        f"{self.name}, line {number}: not a record of this program; choose another output"
                    ) from e
                if not line.endswith(b"\n"):  # only the line end is missing: it is written anew
                    break
                self.size += len(line)
                yield record
        self.n_synced = self.size
        if self.size < os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, self.size)

    def done(self) -> tuple[dict[str, str], set[str]]:
        """(the requests' digests by their keys, the models' digests) of the records that are there."""
        done: dict[str, str] = {}
        models = set()
        for record in self.records() if self.is_file else ():
            key, of_model, digest = name_of(record)
            if key in done:
                raise ValueError(f"{self.name} has two records of {key}; choose another output")
            done[key] = digest
            models.add(of_model)
        return done, models

    def write(self, line: bytes) -> None:
        """Append a record. OSError: it cannot be written, and nothing of it is left in the file."""
        if self.fd is None:
            return write_to_stdout(line.decode())
        if self.sync_error:
            raise self.sync_error
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self.fd, rest) :]
        except BrokenPipeError:
            raise
        except OSError as e:
            if self.is_file:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.fd, self.size)
            raise self.failed(e) from e
        self.size += len(line)

    def failed(self, e: OSError) -> OSError:
        return OSError(e.errno, f"{os.strerror(e.errno)}; {GO_ON}", self.name)

    def keep_synced(self) -> None:
        """On a thread, since a disk may take longer than a step. Without a lock, which Ctrl-C could leave locked."""
        while not self.is_closed:
            self.sync()
            time.sleep(SYNC_S / 2)

    def sync(self) -> None:
        size = self.size
        if size == self.n_synced:
            return
        try:
            os.fsync(self.fd)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # what cannot be synced need not be
                self.sync_error = self.failed(e)
        self.n_synced = size

    def close(self) -> None:
        """OSError: what was written last may not be on the disk."""
        self.is_closed = True
        if self.is_file:
            self.sync()
        if self.fd is not None:
            os.close(self.fd)
        if self.sync_error:
            raise self.sync_error


def check_paths(source: str, output: str) -> None:
    """ValueError: the output is the input."""
    if "-" in (source, output) or not os.path.exists(output) or not os.path.exists(source):
        return
    if os.path.samefile(source, output) and stat.S_ISREG(os.stat(output).st_mode):
        raise ValueError(f"{output} is the input; choose another output")


def in_order(results: Iterator[Result], lines: deque[int]) -> Iterator[Result]:
    """The results in the order of `lines`, the numbers of those requests that were taken up so far."""
    held: dict[int, Result] = {}
    for result in results:
        held[result.request.line] = result
        while lines and lines[0] in held:
            yield held.pop(lines.popleft())
