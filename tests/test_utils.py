import hashlib
import http.server
import os
import shutil
import threading

import numpy as np
import pytest
import requests
from conftest import MODELS, random_variables

import utils
from utils import MODEL_FILES, load_encoder_hparams_and_params, nest_params, read_hparams

NANO = os.path.join(MODELS, "nano")


class Server(http.server.ThreadingHTTPServer):
    """Serves models/nano under any size's name; `faults` maps a file's name to what goes wrong with it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults = {}
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1]
        wanted = self.headers.get("Range")
        self.server.requests.append((name, wanted))
        fault = self.server.faults.get(name, "none")
        if fault == "404":
            return self.answer(404, b"<?xml version='1.0'?><Error>BlobNotFound</Error>")
        if fault == "xml":
            return self.answer(200, b"<?xml version='1.0'?><Error>ServerBusy</Error>")
        with open(os.path.join(NANO, name), "rb") as f:
            content = f.read()
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and fault != "ignores range" else 0
        if start >= len(content) and start:
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        body = content[start:]
        if fault == "flips a bit":
            body = body[:-1] + bytes([body[-1] ^ 1])
        range_header = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        n_sent = len(body) // 2 if fault == "cuts" and len(body) > 200_000 else len(body)
        self.answer(206 if start else 200, body, range_header, n_sent)

    def answer(self, status, body, headers=(), n_sent=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:n_sent])
        self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("GPT2_BASE_URL", server.url)
        monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)
        # 124M's published hashes are of OpenAI's files; the server has nano's.
        hashes = {name: utils.sha256_of(os.path.join(NANO, name)) for name in ("encoder.json", "vocab.bpe")}
        monkeypatch.setattr(utils, "SHA256", hashes)
        yield server
        server.shutdown()
        thread.join()


def load(tmp_path):
    return load_encoder_hparams_and_params("355M", str(tmp_path))


def files(tmp_path):
    return sorted(os.listdir(tmp_path / "355M"))


def test_download_and_load(server, tmp_path, capsys):
    _, hparams, params = load(tmp_path)
    assert files(tmp_path) == sorted(MODEL_FILES)
    assert hparams["n_layer"] == len(params["blocks"]) == 2
    for name in MODEL_FILES:
        with open(os.path.join(NANO, name), "rb") as expected, open(tmp_path / "355M" / name, "rb") as found:
            assert found.read() == expected.read()
    load(tmp_path)
    assert [name for name, _ in server.requests] == list(MODEL_FILES)  # each once
    captured = capsys.readouterr()
    assert captured.out == "" and "355M/model.ckpt.data" in captured.err


def test_only_the_missing_file_is_fetched(server, tmp_path):
    shutil.copytree(NANO, tmp_path / "355M")
    os.remove(tmp_path / "355M" / "vocab.bpe")
    load(tmp_path)
    assert server.requests == [("vocab.bpe", None)]


def test_a_cut_connection_is_resumed(server, tmp_path):
    server.faults["model.ckpt.data-00000-of-00001"] = "cuts"
    load(tmp_path)
    ranges = [wanted for name, wanted in server.requests if "data" in name]
    assert len(ranges) == 4 and ranges[0] is None and all(ranges[1:])
    assert files(tmp_path) == sorted(MODEL_FILES)


def test_a_part_of_an_earlier_run_is_resumed(server, tmp_path):
    (tmp_path / "355M").mkdir()
    with open(os.path.join(NANO, "model.ckpt.data-00000-of-00001"), "rb") as f:
        (tmp_path / "355M" / "model.ckpt.data-00000-of-00001.part").write_bytes(f.read(500_000))
    load(tmp_path)
    assert server.requests[-1] == ("model.ckpt.data-00000-of-00001", "bytes=500000-")


def test_a_whole_part_is_not_fetched_again(server, tmp_path):
    (tmp_path / "355M").mkdir()
    shutil.copy(
        os.path.join(NANO, "model.ckpt.data-00000-of-00001"),
        tmp_path / "355M" / "model.ckpt.data-00000-of-00001.part",
    )
    load(tmp_path)
    assert files(tmp_path) == sorted(MODEL_FILES)


def test_a_part_longer_than_the_file_starts_again(server, tmp_path):
    (tmp_path / "355M").mkdir()
    (tmp_path / "355M" / "vocab.bpe.part").write_bytes(bytes(10**6))
    load(tmp_path)
    assert files(tmp_path) == sorted(MODEL_FILES)


def test_a_server_that_ignores_range_starts_again(server, tmp_path):
    server.faults["vocab.bpe"] = "ignores range"
    (tmp_path / "355M").mkdir()
    (tmp_path / "355M" / "vocab.bpe.part").write_bytes(b"the first bytes of another file")
    load(tmp_path)
    assert ("vocab.bpe", "bytes=31-") in server.requests


@pytest.mark.parametrize("name", MODEL_FILES)
def test_an_xml_error_with_status_200_is_no_model(server, tmp_path, name):
    server.faults[name] = "xml"
    with pytest.raises(ValueError, match=f"{name} is not the file it should be.*nothing was kept"):
        load(tmp_path)
    assert not any(f.startswith(name) for f in files(tmp_path))
    server.faults.clear()
    load(tmp_path)


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe", "model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_one_flipped_bit_is_no_model(server, tmp_path, name):
    server.faults[name] = "flips a bit"
    with pytest.raises(ValueError, match="is not the file it should be: .*expected"):
        load(tmp_path)
    assert not any(f.startswith(name) for f in files(tmp_path))


def test_a_mixed_part_is_thrown_away(server, tmp_path):
    """The first half is of another file: only the checksum can tell."""
    (tmp_path / "355M").mkdir()
    (tmp_path / "355M" / "vocab.bpe.part").write_bytes(bytes(5000))
    with pytest.raises(ValueError, match="sha256"):
        load(tmp_path)
    load(tmp_path)


def test_404_says_what_could_not_be_fetched(server, tmp_path):
    server.faults["model.ckpt.index"] = "404"
    with pytest.raises(ConnectionError, match=r"cannot fetch http.*model\.ckpt\.index \(HTTP status 404\); .*offline"):
        load(tmp_path)
    assert [name for name, _ in server.requests][-1] == "model.ckpt.index"  # not asked again


def test_no_server_says_what_works_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/355M/hparams\.json \(no connection\); .*tiny works"):
        load(tmp_path)
    assert files(tmp_path) == []


def test_a_server_that_stops_halfway_keeps_the_bytes(server, tmp_path, monkeypatch):
    server.faults["model.ckpt.data-00000-of-00001"] = "cuts"
    n_chunks = 0

    def fetch_part(*args, fetch_part=utils.fetch_part):
        nonlocal n_chunks
        n_chunks += "data" in args[2]
        if n_chunks > 2:
            raise requests.ConnectionError("gone")
        fetch_part(*args)

    monkeypatch.setattr(utils, "fetch_part", fetch_part)
    with pytest.raises(ConnectionError, match=r"(\d+) bytes are kept"):
        load(tmp_path)
    assert "model.ckpt.data-00000-of-00001.part" in files(tmp_path)
    assert "model.ckpt.data-00000-of-00001" not in files(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("GPT2_BASE_URL", server.url)
    monkeypatch.setattr(utils, "SHA256", {})
    server.faults.clear()
    load(tmp_path)
    assert server.requests[-1][1] not in (None, "bytes=0-")


def test_published_hashes_are_sha256():
    assert all(len(value) == 64 and int(value, 16) for value in utils.SHA256.values())
    path = os.path.join(os.environ.get("GPT2_MODELS_DIR", MODELS), "124M")
    for name in ("encoder.json", "vocab.bpe", "hparams.json", "model.ckpt.index"):
        if not os.path.exists(os.path.join(path, name)):
            pytest.skip("OpenAI's 124M files are not here; GPT2_MODELS_DIR says where they are")
        with open(os.path.join(path, name), "rb") as f:
            found = hashlib.sha256(f.read()).hexdigest()
        assert found == (utils.SHA256.get(f"124M/{name}") or utils.SHA256[name])


# ----------------------------------------------------------------------------------------------------------------------
# Names, hparams, shapes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["125M", "", "..", "medium"])
def test_an_unknown_size_lists_what_exists(size):
    with pytest.raises(ValueError, match="no model .*124M, 355M, 774M, 1558M.*: nano, tiny"):
        load_encoder_hparams_and_params(size, MODELS)


def test_an_incomplete_folder_names_what_it_lacks(tmp_path):
    shutil.copytree(NANO, tmp_path / "mine")
    os.remove(tmp_path / "mine" / "encoder.json")
    with pytest.raises(ValueError, match="mine lacks encoder.json"):
        load_encoder_hparams_and_params("mine", str(tmp_path))


def test_params_are_nested_as_in_picogpt():
    _, hparams, params = load_encoder_hparams_and_params("nano", MODELS)
    n_embd = hparams["n_embd"]
    assert set(params) == {"wte", "wpe", "blocks", "ln_f"}
    assert set(params["blocks"][1]) == {"ln_1", "attn", "ln_2", "mlp"}
    assert params["blocks"][1]["attn"]["c_attn"]["w"].shape == (n_embd, 3 * n_embd)
    assert params["blocks"][1]["mlp"]["c_proj"]["b"].shape == (n_embd,)
    assert params["wte"].shape == (2048, n_embd) and not params["wte"].flags.writeable


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a JSON object"),
        ("[]", "n_vocab is None"),
        ('{"n_vocab": 1}', "n_ctx is None"),
        ('{"n_vocab": "9", "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 1}', "n_vocab is '9'"),
        ('{"n_vocab": 9, "n_ctx": 0, "n_embd": 8, "n_head": 2, "n_layer": 1}', "n_ctx is 0"),
        ('{"n_vocab": 9, "n_ctx": -4, "n_embd": 8, "n_head": 2, "n_layer": 1}', "n_ctx is -4"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": 8.0, "n_head": 2, "n_layer": 1}', "n_embd is 8.0"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": true, "n_head": 2, "n_layer": 1}', "n_embd is True"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": 8, "n_head": 3, "n_layer": 1}', "n_embd 8 is no multiple of n_head 3"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 1e99}', "n_layer is 1e"),
        ('{"n_vocab": 9, "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 99999999999}', "n_layer is 99999999999"),
    ],
)
def test_bad_hparams_are_named(tmp_path, content, message):
    path = tmp_path / "hparams.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as e:
        read_hparams(str(path))
    assert str(path) in str(e.value)


HPARAMS = {"n_vocab": 9, "n_ctx": 4, "n_embd": 8, "n_head": 2, "n_layer": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_vocab": 10}, r"model/wte is float32\[9, 8\], expected float32\[10, 8\]"),
        ({"n_layer": 3}, "model/h2/ln_1/g is nothing"),
        ({"n_layer": 2**31 - 1}, "model/h2/ln_1/g is nothing"),
        ({"n_layer": 1}, "more layers than the 1"),
        ({"n_embd": 16}, "model/wte is float32"),
    ],
)
def test_weights_that_do_not_fit_hparams_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        nest_params(random_variables(HPARAMS), HPARAMS | change, "model.ckpt")


def test_integer_weights_are_refused():
    variables = random_variables(HPARAMS)
    variables["model/wte"] = variables["model/wte"].astype(np.int64)
    with pytest.raises(ValueError, match="model/wte is int64"):
        nest_params(variables, HPARAMS, "model.ckpt")
