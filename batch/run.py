"""The command: what the flags ask for, checked, then read, computed and written."""

import contextlib
import os
import stat
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO

from batch.progress import Progress
from batch.records import Output, check_paths, in_order, line_of, model_digest
from batch.requests import FLAGS, Request, checked, count_requests, lines, read_requests
from batch.schedule import complete_many
from console import flags
from console.flags import Flag
from decoding.sampling import check, is_number, is_whole
from gpt2 import load_model

MAX_WORKERS = 1024
BATCH = {
    "": {
        "prompts": Flag(
            None,
            'the file of prompts, - for stdin: OpenAI\'s batch form or {"id": ..., "prompt": ...} a line,\n'
            "or a prompt a line",
            str,
        ),
        "output": Flag(None, "the file of records, gone on with if it is there; - for stdout", str, "FILE"),
        "form": Flag("auto", "json or text; auto: json if the first line begins with {", str),
        "model_size": flags.GPT2[""]["model_size"],
    }
    | flags.MODELS_DIR
    | flags.NANOGPT,
    "What lines leave out:": flags.LENGTH
    | flags.SAMPLING
    | {
        "seed": Flag(0, "lines without a seed get one from this and their id"),
        "n_samples": Flag(1, "so many texts a prompt, with the seeds N, N + 1, ..."),
        "logprobs": Flag(None, "log-probabilities of each token and of the so many likeliest", shown="N"),
        "echo": Flag(False, "begin each text with its prompt", bool),
        "stop": flags.ENDING["stop"],
        "ignore_eot": flags.ENDING["ignore_eot"],
    },
    "Running:": {
        "ordered": Flag(False, "write in the order of the prompts, not as the texts end", bool),
        "max_memory": Flag(None, "GB for keys and values, half of what is available unless given", shown="N"),
        "workers": Flag(None, "so many processes of this machine, which share its cores (with Dask)", shown="N"),
        "scheduler": Flag(None, "a running Dask cluster, as tcp://host:8786", str, "ADDRESS"),
    },
}


def defaults_of(options) -> dict:
    """What lines leave out, by the names of the flags. ValueError: a flag outside its range."""
    defaults = {name: getattr(options, name) for name in FLAGS if name != "seed"}
    defaults["stop"] = list(defaults["stop"])
    checked(Request([""], seed=options.seed, **defaults))
    return defaults


def check_options(options) -> dict:
    """The defaults of lines. ValueError: flags that are wrong or do not go together."""
    for name in ("prompts", "output"):
        if getattr(options, name) is None:
            raise ValueError(f"no {name}: python -m batch prompts.jsonl --output out.jsonl; - is stdin or stdout")
    check("form", options.form, options.form in ("auto", "json", "text"), "auto, json or text")
    n_gb = options.max_memory
    check("max_memory", n_gb, n_gb is None or (is_number(n_gb) and n_gb > 0), "a number of GB above 0")
    n_workers = options.workers
    is_count = n_workers is None or (is_whole(n_workers) and 1 <= n_workers <= MAX_WORKERS)
    check("workers", n_workers, is_count, f"a whole number from 1 to {MAX_WORKERS}")
    flags.check_together(workers=n_workers is not None, scheduler=options.scheduler is not None)
    check("seed", options.seed, options.seed is not None, "a whole number from 0 to 2^64 - 1")
    check_paths(options.prompts, options.output)
    return defaults_of(options)


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """A file that can be read twice: what comes through a pipe is copied to the disk first."""
    if path == "-" and sys.stdin is None:
        raise ValueError("stdin is closed; give a file instead of -")
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as f:
        if stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            yield f
            return
        with tempfile.TemporaryFile() as copy:
            copy.writelines(lines(f))
            yield copy


def noting_lines(requests: Iterator[Request], taken: deque[int]) -> Iterator[Request]:
    for request in requests:
        taken.append(request.line)
        yield request


@contextlib.contextmanager
def completing(options, model, encoder, digest: str) -> Iterator:
    """A function from requests to results: in this process, or on the workers that the flags ask for."""
    max_bytes = None if options.max_memory is None else options.max_memory * 1e9
    if options.workers is None and options.scheduler is None:
        yield partial(complete_many, model, encoder, max_bytes=max_bytes)
        return
    from batch import cluster  # and with it Dask, which takes a second

    connect = (
        partial(cluster.local_cluster, options.workers)
        if options.workers
        else partial(cluster.connected, options.scheduler)
    )
    with connect() as client:
        print(f"dashboard: {client.dashboard_link}", file=sys.stderr)
        names = options.model_size, options.models_dir, *flags.nanogpt_of(options).values(), digest
        task = partial(cluster.complete_chunk, load=cluster.load_checked, names=names, max_bytes=max_bytes)
        yield lambda requests: cluster.complete_on_cluster(client, requests, task)


def complete_file(options, stream: BinaryIO, output: Output, defaults: dict) -> None:
    """Append a record for each line of `stream` that has none."""
    read = partial(read_requests, stream, defaults, options.seed, options.form)
    done, models = output.done()
    n_all, n_done = count_requests(read(), done, output.name)
    encoder, model = load_model(options.model_size, options.models_dir, **flags.nanogpt_of(options))
    of_model = model_digest(encoder, model)
    if models - {of_model}:
        raise ValueError(f"{output.name} has records of another model than {options.model_size}; choose another output")
    taken: deque[int] = deque()
    missing = noting_lines((request for request in read() if request.key not in done), taken)
    progress = Progress(n_all, n_done)
    with contextlib.ExitStack() as stack:
        stack.callback(progress.end)
        complete = stack.enter_context(completing(options, model, encoder, of_model))
        results = progress.watch(complete(missing))
        for result in in_order(results, taken) if options.ordered else results:
            output.write(line_of(result, options.model_size, of_model))


@flags.with_flags("Continue many prompts: python -m batch prompts.jsonl --output out.jsonl [flags]", BATCH)
def main(options):
    defaults = check_options(options)
    with opened(options.prompts) as stream, contextlib.closing(Output(options.output)) as output:
        output.lock()
        complete_file(options, stream, output, defaults)
