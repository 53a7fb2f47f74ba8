"""A server on this machine that does what servers, proxies and networks do to downloads."""

import contextlib
import gzip
import hashlib
import http.server
import os
import threading

from helpers import MODELS

from checkpoints.openai import MODEL_FILES
from utils import load_encoder_hparams_and_params

NANO = os.path.join(MODELS, "nano")
DATA = "model.ckpt.data-00000-of-00001"
CONTENT = {name: open(os.path.join(NANO, name), "rb").read() for name in MODEL_FILES}  # noqa: SIM115
# 124M's published hashes are of OpenAI's files; the server has nano's.
HASHES = {name: hashlib.sha256(CONTENT[name]).hexdigest() for name in ("encoder.json", "vocab.bpe")}


class Server(http.server.ThreadingHTTPServer):
    """Serves models/nano under any size's name; `faults` maps a file's name to what goes wrong with it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = dict(CONTENT)
        self.faults = {}
        self.at_half = {}  # what happens when half of a file is sent
        self.etag = None  # a function of the content
        self.requests = []  # (name, Range) of each
        self.if_ranges = []
        self.hold_after = None  # after so many bytes nothing is sent until `released`
        self.n_sent = 0
        self.held, self.released = threading.Event(), threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def hold(self, n):
        self.hold_after, self.n_sent = n, 0
        self.held.clear()
        self.released.clear()

    def ranges(self, name=DATA):
        return [wanted for file, wanted in self.requests if file == name]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        wanted = self.headers.get("Range")
        self.server.requests.append((name, wanted))
        self.server.if_ranges.append(self.headers.get("If-Range"))
        fault = self.server.faults.get(name, "none")
        if isinstance(fault, list):
            fault = fault.pop(0) if fault else "none"
        if isinstance(fault, int):
            return self.answer(fault, b"<?xml version='1.0'?><Error>BlobNotFound</Error>")
        if fault.startswith("redirects"):
            return self.answer(302, b"", {"Location": fault.split()[1]})
        if fault == "drops":
            return None
        if fault in ("xml", "html"):
            return self.answer(200, b"<?xml version='1.0'?><E>Busy</E>" if fault == "xml" else b"\n<!DOCTYPE HTML><p>")
        content = self.server.content[name]
        etag = self.server.etag and self.server.etag(content)
        headers = {"ETag": etag} if etag else {}
        if fault == "ignores range" or (fault != "ignores if-range" and self.headers.get("If-Range", etag) != etag):
            wanted = None
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if start >= len(content) and start:
            return self.answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault == "flips a bit":
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault.startswith("length"):
            headers["Content-Length"] = fault.split(maxsplit=1)[1].format(len(body) + 100, len(body) - 100)
        if fault == "answers in pieces":
            stop = min(len(content), start + 300_000)
            body, headers["Content-Range"] = content[start:stop], f"bytes {start}-{stop - 1}/{len(content)}"
            return self.answer(206, body, headers)
        if fault == "cuts without a length":
            headers["Content-Length"] = ""
            body = body[: max(len(body) // 2, 10_000)]
        if fault == "zips":
            body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
        self.answer(206 if start else 200, body, headers, fault)

    def answer(self, status, body, headers=(), fault="none"):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | dict(headers)).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        n_sent = len(body) // 2 if fault in ("cuts", "stalls") and len(body) > 200_000 else len(body)
        with contextlib.suppress(ConnectionError):
            self.send(body[:n_sent], self.server.at_half.get(self.path.rsplit("/", 1)[-1]))
            if n_sent < len(body) and fault == "stalls":
                self.rfile.read(1)  # until the other side hangs up
        self.close_connection = True

    def send(self, body, at_half):
        for at in range(0, len(body), 10_000):
            if at_half and at > len(body) // 2:
                at_half()
                at_half = None
            if self.server.hold_after is not None and self.server.n_sent >= self.server.hold_after:
                self.server.held.set()
                self.server.released.wait(60)
            self.wfile.write(body[at : at + 10_000])
            self.server.n_sent += len(body[at : at + 10_000])

    def log_message(self, *args):
        pass


def load(tmp_path):
    return load_encoder_hparams_and_params("355M", str(tmp_path))


def files(tmp_path):
    return sorted(os.listdir(tmp_path / "355M"))


def assert_whole(tmp_path, content=CONTENT):
    assert files(tmp_path) == sorted(MODEL_FILES)
    for name in MODEL_FILES:
        assert (tmp_path / "355M" / name).read_bytes() == content[name]


def part(tmp_path, content, name=DATA, etag=None):
    (tmp_path / "355M").mkdir(exist_ok=True)
    (tmp_path / "355M" / (name + ".part")).write_bytes(content)
    if etag:
        (tmp_path / "355M" / (name + ".part.etag")).write_text(etag)
