"""hf:OWNER/MODEL: the programs with the hub's library, against a hub of this machine."""

import http.server
import json
import os
import threading

import pytest
import relatives
from helpers import read_bytes, run

pytest.importorskip("huggingface_hub")
REVISION = "a" * 40
FLAGS = ["gpt2.py", "O Romeo", "--n_tokens_to_generate", 8]


class Hub(http.server.ThreadingHTTPServer):
    """What of the hub's interface fetching a model takes. `asked`: the paths, `tokens`: what came with them."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.tokens = folder, [], set()


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"X-Repo-Commit": REVISION, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path, folder = self.path.partition("?")[0], self.server.folder
        self.server.asked.append(path)
        self.server.tokens.add(self.headers.get("authorization"))
        if path.startswith("/api/models/me/mini/"):
            if path.rpartition("/")[2] not in ("main", REVISION):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            names = sorted(os.listdir(folder))
            if path.startswith("/api/models/me/mini/tree/"):  # which newer versions ask for
                sizes = {name: os.path.getsize(folder / name) for name in names}
                tree = [{"type": "file", "path": name, "oid": "0" * 40, "size": sizes[name]} for name in names]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            files = [{"rfilename": name} for name in names]
            return self.answer(200, json.dumps({"sha": REVISION, "id": "me/mini", "siblings": files}).encode())
        if path.startswith("/me/mini/resolve/"):
            content = read_bytes(folder / path.rpartition("/")[2])
            return self.answer(200, content, ETag=f'"{hash(content) % 2**63}"')
        if path.startswith("/api/models/me/gated"):
            return self.answer(403, b"{}", X_Error_Code="GatedRepo")
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    relatives.write_folder(folder := tmp_path / "model", {})
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    with Hub(folder) as hub:
        threading.Thread(target=hub.serve_forever, args=[0.01], daemon=True).start()
        hub.env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "cache")}
        hub.env |= {"HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        yield hub
        hub.shutdown()


def test_a_model_is_fetched_once_and_then_used_offline(hub):
    expected = run(*FLAGS, "--model_size", str(hub.folder)).stdout
    first = run(*FLAGS, "--model_size", "hf:me/mini", env=hub.env)
    assert first.returncode == 0 and first.stdout == expected and expected
    assert not [path for path in hub.asked if path.endswith(".bin")]
    assert "Bearer hf_secret" in hub.tokens
    n_asked = len(hub.asked)
    offline = run(*FLAGS, "--model_size", "hf:me/mini@main", env=hub.env | {"HF_HUB_OFFLINE": "1"})
    assert (offline.returncode, offline.stdout) == (0, expected) and len(hub.asked) == n_asked


@pytest.mark.parametrize(
    "name, env, message",
    [
        ("hf:me/none", {}, "the hub has no such model, or a private one"),
        ("hf:me/gated", {}, "access has to be asked for"),
        ("hf:me/mini@other", {}, "has no revision 'other'"),
        ("hf:/", {}, "is no name of a model; expected hf:OWNER/MODEL"),
        ("hf:me/mini", {"HF_HUB_OFFLINE": "1"}, "the hub cannot be reached, and the model is not in the cache"),
        ("hf:me/mini", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached, and the model is not in"),
    ],
)
def test_what_goes_wrong_is_one_line(name, env, message, hub):
    done = run(*FLAGS, "--model_size", name, env=hub.env | env)
    assert done.returncode == 1 and not done.stdout
    assert message in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
