"""The program: what it writes, and that nothing is lost or written twice, whatever ends it."""

import contextlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections import deque

import pytest
from helpers import run, run_here
from processes import finish, start

import gpt2
from batch.records import Output, in_order
from batch.requests import Request
from batch.schedule import Result

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and descriptors of POSIX")
FLAGS = ["--model_size=nano"]
PROMPTS = ["ROMEO:", "The king", "My lord, what", "", "JULIET:\nO", "Once"]


def lines():
    """120 lines: short ones, OpenAI's, and two that cannot be done."""
    for i in range(120):
        body = {"prompt": PROMPTS[i % 6] * (1 + i % 4), "temperature": (0, 0.9)[i % 2]}
        if i == 30:
            yield json.dumps({"id": 30, "prompt": "x " * 2000})
        elif i % 3:
            body["max_tokens"] = 1 + 7 * i % 80
            yield json.dumps({"custom_id": f"o{i}", "url": "/v1/completions", "body": body})
        else:
            yield json.dumps({"id": i, "n_tokens_to_generate": 1 + 5 * i % 70} | body)
        if i == 59:
            yield "nonsense\n"


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines()))
    return path


def batch(prompts, output, *flags):
    return ["-m", "batch", str(prompts), f"--output={output}", *FLAGS, *flags]


def records(path):
    """The lines of a file of records, sorted. Each is a whole record."""
    lines = path.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") and json.loads(line) for line in lines)
    return sorted(lines)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The records of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "prompts").write_text("\n".join(lines()))
    done = run_here(*batch(folder / "prompts", folder / "out"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (0, "", 1)
    assert done.stderr.startswith("119 prompts done, 2 errors, ") and "to do" not in done.stderr
    found = records(folder / "out")
    assert len(set(found)) == 121
    return found


def test_records_say_what_gpt2_says(prompts, undisturbed, nano):
    by_id = {record.get("custom_id", record.get("id")): record for record in map(json.loads, undisturbed)}
    encoder, model = nano
    first = by_id["o2"]["response"]
    ids = list(gpt2.generate(model, encoder.encode("My lord, what" * 3), 15))
    assert first["status_code"] == 200 and first["body"]["choices"][0]["text"] == encoder.decode(ids)
    assert first["body"]["usage"]["completion_tokens"] == 15 and first["body"]["object"] == "text_completion"
    seeded = by_id[3]  # its prompt is ""
    done = run_here("gpt2.py", "", *FLAGS, "--temperature=0.9", f"--seed={seeded['seed']}", "--n_tokens_to_generate=16")
    assert done.stdout == seeded["text"] and seeded["finish_reason"] in ("length", "stop")
    assert by_id[30]["error"]["line"] == 31 and "exceed the context" in by_id[30]["error"]["message"]
    assert by_id[None]["error"]["message"].startswith("line 61: no JSON")


def test_the_same_command_again_has_nothing_to_do(prompts, undisturbed, tmp_path):
    (tmp_path / "out").write_bytes(b"".join(undisturbed))
    done = run_here(*batch(prompts, tmp_path / "out"))
    assert done.returncode == 0 and done.stderr.startswith("0 prompts done, 0 errors, 121 done before")
    assert records(tmp_path / "out") == undisturbed


def test_ordered_is_in_the_order_of_the_prompts(prompts, undisturbed, tmp_path):
    assert run_here(*batch(prompts, tmp_path / "out", "--ordered")).returncode == 0
    lines = (tmp_path / "out").read_bytes().splitlines(keepends=True)
    assert sorted(lines) == undisturbed
    ids = [record.get("custom_id", record.get("id")) for record in map(json.loads, lines)]
    asked = [f"o{i}" if i % 3 else i for i in range(120)]
    assert ids == [*asked[:60], None, *asked[60:]]


def test_results_are_held_until_their_turn():
    results = [Result(Request([], line=line), []) for line in (3, 1, 2, 5, 4)]
    taken = deque([1, 2, 3, 4, 5])
    assert [result.request.line for result in in_order(iter(results), taken)] == [1, 2, 3, 4, 5] and not taken


def killed_at_random(prompts, output, rng, seconds, signal_number=signal.SIGKILL):
    process = start(*batch(prompts, output), stdout=subprocess.DEVNULL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(rng.uniform(*seconds))
    process.send_signal(signal_number)
    return finish(process)


N_KILLS = int(os.environ.get("N_KILLS", "4"))


def test_killed_at_random_moments_and_gone_on_with(prompts, undisturbed, tmp_path):
    rng, output = random.Random(N_KILLS), tmp_path / "out"
    for _ in range(N_KILLS):
        killed_at_random(prompts, output, rng, (0.2, 1.2))
        if output.exists() and rng.random() < 0.5:  # as after a loss of power
            os.truncate(output, max(0, output.stat().st_size - rng.randrange(1, 40)))
    done = run_here(*batch(prompts, output))
    assert done.returncode == 0, done.stderr
    assert records(output) == undisturbed


def test_interrupted_and_gone_on_with(prompts, undisturbed, tmp_path):
    output = tmp_path / "out"
    process = start(*batch(prompts, output))
    while not output.exists() or not output.stat().st_size:
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    if status != 0:  # it was not done yet
        assert (status, out, err.count(b"\n")) == (130, b"", 1) and b"the same command goes on" in err, err
    assert run_here(*batch(prompts, output)).returncode == 0
    assert records(output) == undisturbed


def test_a_file_that_may_not_grow(prompts, undisturbed, tmp_path):
    import resource

    output = tmp_path / "out"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # noqa: E731
    status, out, err = finish(start(*batch(prompts, output), preexec_fn=limit))
    assert (status, out) == (1, b"")
    assert err.splitlines()[-1].startswith(b"error: ") and err.endswith(
        b"File too large; the same command goes on where it stopped\n"
    )
    assert 0 < len(records(output)) < 121 and output.stat().st_size <= 5000
    assert run_here(*batch(prompts, output)).returncode == 0
    assert records(output) == undisturbed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk(prompts):
    done = run_here(*batch(prompts, "/dev/full"))
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: /dev/full: No space left on device")


def test_a_pipe_that_is_closed_in_the_middle(prompts, undisturbed, tmp_path):
    process = start(*batch(prompts, "-"))
    got = b"".join(process.stdout.readline() for _ in range(10))
    process.stdout.close()
    process.stdout = None
    status, _, err = finish(process)
    assert status in (0, 128 + signal.SIGPIPE) and err.count(b"\n") == 1
    assert status == 0 or b"the same command goes on" in err
    (tmp_path / "out").write_bytes(got)  # records are all that is needed to go on
    done = run_here(*batch(prompts, tmp_path / "out"))
    assert ", 10 done before" in done.stderr
    assert records(tmp_path / "out") == undisturbed


def test_a_broken_stderr_stops_nothing(prompts, undisturbed, tmp_path):
    read, write = os.pipe()
    os.close(read)
    status, _, _ = finish(start(*batch(prompts, tmp_path / "out"), stderr=write))
    os.close(write)
    assert status == 128 + signal.SIGPIPE and records(tmp_path / "out") == undisturbed


def test_prompts_from_a_pipe_and_records_to_one(tmp_path):
    text = "ROMEO:\n\nThe king\n"
    done = run("-m", "batch", "-", "--output=-", *FLAGS, "--n_tokens_to_generate=5", stdin=text)
    assert done.returncode == 0 and [json.loads(line)["id"] for line in done.stdout.splitlines()] == [1, 3]


def test_mistakes_are_one_line_before_a_model_is_loaded(prompts, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.write_text('{"id": 1, "text": "of another program"}\n')
    no_model = "--model_size=none"
    for flags, error in (
        ([f"--output={prompts}", no_model], f"{prompts} is the input"),
        ([no_model], "no output: python -m batch"),
        ([f"--output={other}", no_model], f"{other}, line 1: not a record of this program"),
        ([f"--output={tmp_path}", no_model], f"{tmp_path}: Is a directory"),
        ([f"--output={out}", "--form=xml", no_model], "form is 'xml', expected auto, json or text"),
        ([f"--output={out}", "--max_memory=0", no_model], "max_memory is 0, expected"),
        ([f"--output={out}", "--temperature=-1", no_model], "temperature is -1"),
        ([f"--output={out}", "--n_samples=0", no_model], "n_samples is 0"),
        ([f"--output={out}", no_model], "no model 'none'"),
    ):
        done = run_here("-m", "batch", prompts, *flags)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        assert done.stderr.startswith(f"error: {error}"), done.stderr
    done = run_here("-m", "batch", "/dev/zero", "--output=-", no_model)
    assert done.returncode == 1 and "line 1 has more than 17 MB" in done.stderr


def test_records_of_other_flags_or_another_model_are_not_gone_on_with(prompts, undisturbed, tmp_path):
    output = tmp_path / "out"
    output.write_bytes(b"".join(undisturbed))
    for flags, error in (
        (["--top_k=3"], "from other flags or another prompt than line 1"),
        (["--seed=3"], "from other flags or another prompt than line 1"),
        (["--model_size=tiny"], "has records of another model than tiny"),
    ):
        done = run_here(*batch(prompts, output, *flags))
        assert (done.returncode, done.stderr.count("\n")) == (1, 1) and error in done.stderr
    prompts.write_text(prompts.read_text().replace("ROMEO", "TYBALT", 1))
    done = run_here(*batch(prompts, output))
    assert done.returncode == 1 and "from other flags or another prompt than line 1" in done.stderr
    assert records(output) == undisturbed


@pytest.mark.parametrize("content", ["hello", "hello\n", '{"id": 1, "prompt": "x"}', '{"id": 1}\n{"id"', "[]", "\n"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    (tmp_path / "out").write_text(content)
    with contextlib.closing(Output(str(tmp_path / "out"))) as output, pytest.raises(ValueError, match="not a record"):
        output.done()
    assert (tmp_path / "out").read_text() == content


def test_a_torn_record_is_taken_away(tmp_path, undisturbed):
    whole = undisturbed[0] + undisturbed[1]
    for n in range(1, len(whole) + 1, 7):
        (tmp_path / "out").write_bytes(whole[:n])
        if n >= 7:
            with contextlib.closing(Output(str(tmp_path / "out"))) as output:
                assert len(output.done()[0]) == whole[:n].count(b"\n")
            assert (tmp_path / "out").read_bytes() == whole[: whole.rfind(b"\n", 0, n) + 1]


def test_one_process_writes_an_output(tmp_path):
    path = str(tmp_path / "out")
    with contextlib.closing(Output(path)) as output:
        output.lock()
        with (
            contextlib.closing(Output(path)) as second,
            pytest.raises(ValueError, match="another process is writing it"),
        ):
            second.lock()
    with contextlib.closing(Output(path)) as third:
        third.lock()


def test_records_are_synced_within_a_second(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    output = Output(str(tmp_path / "out"))
    output.write(b"first\n")
    while not synced:
        time.sleep(0.001)
    output.write(b"second\n")
    written = time.monotonic()
    while synced[-1] < 13:
        time.sleep(0.001)
        assert time.monotonic() < written + 30
    output.close()
    assert synced[-1] == 13


def test_what_cannot_be_synced_is_said(tmp_path, monkeypatch):
    def broken(fd):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    output = Output(str(tmp_path / "out"))
    output.write(b"first\n")
    with pytest.raises(OSError, match="Input/output error; the same command goes on"):
        output.close()
    assert stat.S_ISREG(os.stat(tmp_path / "out").st_mode)
