"""The programs as running processes, to send signals to and to read from."""

import signal
import subprocess
import sys

from helpers import ROOT

GPT2 = ["gpt2.py", "ROMEO:", "--model_size=tiny", "--overflow=slide", "--n_tokens_to_generate=100000"]
SPECULATIVE = ["speculative.py", "ROMEO:", "--target_model_size=tiny", "--draft_model_size=nano", *GPT2[3:]]
SHORT = ["gpt2.py", "x", "--model_size=nano", "--n_tokens_to_generate=5"]
FROM_STDIN = [SHORT[0], *SHORT[2:]]
SHORT_SPECULATIVE = ["speculative.py", "x", "--target_model_size=nano", "--draft_model_size=nano", SHORT[-1]]


def restore_sigint():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & and nohup pass it on ignored


def start(*args, preexec_fn=restore_sigint, **streams):
    """The process. Its pipes have no buffer, where bytes would lie that `finish` does not see."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | streams
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, preexec_fn=preexec_fn, bufsize=0, **pipes)


def read(process, n: int) -> bytes:
    """The next n bytes of its stdout; fewer where it ends."""
    out = b""
    while len(out) < n and (more := process.stdout.read(n - len(out))):
        out += more
    return out


def finish(process):
    """(status, stdout, stderr); TimeoutExpired: it hangs."""
    with process:
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    return process.returncode, out, err
