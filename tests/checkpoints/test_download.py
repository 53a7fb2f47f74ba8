"""Downloads by one process: what servers, proxies and networks do to them."""

import os
import shutil

import pytest
from download_server import CONTENT, DATA, NANO, assert_whole, files, load, part
from helpers import MODELS

from checkpoints import download
from checkpoints.openai import MODEL_FILES
from utils import load_encoder_hparams_and_params

# Where the pauses between attempts are not made.
pytestmark = pytest.mark.usefixtures("pauses")


def test_download_and_load(server, tmp_path, capsys):
    _, hparams, params = load(tmp_path)
    assert_whole(tmp_path)
    assert hparams["n_layer"] == len(params["blocks"]) == 2
    load(tmp_path)
    assert [name for name, _ in server.requests] == list(MODEL_FILES)  # each once
    captured = capsys.readouterr()
    assert captured.out == "" and "355M/model.ckpt.data" in captured.err


def test_only_the_missing_file_is_fetched(server, tmp_path):
    shutil.copytree(NANO, tmp_path / "355M")
    os.remove(tmp_path / "355M" / "vocab.bpe")
    load(tmp_path)
    assert server.requests == [("vocab.bpe", None)]


def test_a_whole_model_is_not_locked(tmp_path):
    shutil.copytree(NANO, tmp_path / "124M")
    load_encoder_hparams_and_params("124M", str(tmp_path))
    assert os.listdir(tmp_path) == ["124M"]


# ----------------------------------------------------------------------------------------------------------------------
# Resuming
# ----------------------------------------------------------------------------------------------------------------------


def test_a_cut_connection_is_resumed(server, tmp_path, pauses, capsys):
    server.faults[DATA] = "cuts"
    load(tmp_path)
    assert len(server.ranges()) == 4 and server.ranges()[0] is None and all(server.ranges()[1:])
    assert_whole(tmp_path)
    assert pauses == [1, 1, 1]  # each attempt brought bytes
    assert f"{DATA}: the connection broke off; trying again in 1 s" in capsys.readouterr().err


def test_a_part_of_an_earlier_run_is_resumed(server, tmp_path):
    part(tmp_path, CONTENT[DATA][:500_000])
    load(tmp_path)
    assert server.ranges() == ["bytes=500000-"]


def test_a_whole_part_is_not_fetched_again(server, tmp_path):
    part(tmp_path, CONTENT[DATA])
    load(tmp_path)
    assert_whole(tmp_path)
    assert len(server.ranges()) == 1


def test_a_part_longer_than_the_file_starts_again(server, tmp_path):
    part(tmp_path, bytes(10**6), "vocab.bpe")
    load(tmp_path)
    assert_whole(tmp_path)


def test_a_server_that_ignores_range_starts_again(server, tmp_path):
    server.faults["vocab.bpe"] = "ignores range"
    part(tmp_path, b"the first bytes of another file", "vocab.bpe")
    load(tmp_path)
    assert server.ranges("vocab.bpe") == ["bytes=31-"]
    assert_whole(tmp_path)


@pytest.mark.parametrize("fault", ["none", "ignores if-range"])
@pytest.mark.parametrize("weak", ["", "W/"])
def test_a_file_that_changed_between_runs_starts_again(etag_server, tmp_path, fault, weak):
    """The part is of an older version, and of the same length as the new one's beginning."""
    strong = etag_server.etag
    etag_server.etag = lambda content: weak + strong(content)
    etag_server.faults[DATA] = fault
    part(tmp_path, bytes(500_000), etag=weak + '"old"')
    load(tmp_path)
    assert etag_server.ranges()[0] == "bytes=500000-"
    assert_whole(tmp_path)


def test_a_file_that_changes_while_it_comes_starts_again(etag_server, tmp_path):
    new = CONTENT[DATA]
    etag_server.content[DATA] = bytes(len(new))
    etag_server.faults[DATA] = "cuts"
    etag_server.at_half[DATA] = lambda: etag_server.content.update({DATA: new})
    load(tmp_path)
    assert etag_server.ranges()[1] not in (None, "bytes=0-")
    assert_whole(tmp_path)


def test_an_unchanged_file_with_an_etag_is_resumed(etag_server, tmp_path):
    part(tmp_path, CONTENT[DATA][:500_000], etag=etag_server.etag(CONTENT[DATA]))
    etag_server.faults[DATA] = "cuts"
    load(tmp_path)
    assert set(etag_server.if_ranges[4:]) == {etag_server.etag(CONTENT[DATA])}
    assert etag_server.ranges()[0] == "bytes=500000-"
    assert etag_server.n_sent < sum(map(len, CONTENT.values())) - 400_000
    assert_whole(tmp_path)


def test_a_mixed_part_is_thrown_away(server, tmp_path):
    """The first half is of another file, and no ETag says so: only the checksum can tell."""
    part(tmp_path, bytes(5000), "vocab.bpe")
    with pytest.raises(ValueError, match="sha256"):
        load(tmp_path)
    load(tmp_path)


def test_an_index_of_another_version_is_fetched_again(server, tmp_path):
    """The server's model changed after the index came: the weights do not fit, and next time both come anew."""
    good = CONTENT["model.ckpt.index"]
    with open(os.path.join(MODELS, "tiny", "model.ckpt.index"), "rb") as f:
        server.content["model.ckpt.index"] = f.read()
    server.at_half[DATA] = lambda: server.content.update({"model.ckpt.index": good})
    with pytest.raises(ValueError, match="not the file it should be.*expected.*try again"):
        load(tmp_path)
    load(tmp_path)
    assert_whole(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Servers, proxies, networks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["xml", "html"])
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_web_page_with_status_200_is_no_model(server, tmp_path, name, fault):
    server.faults[name] = fault
    with pytest.raises(ValueError, match=f"{name} is not the file it should be: a web page.*another HTTPS_PROXY"):
        load(tmp_path)
    assert not any(f.startswith(name) for f in files(tmp_path))
    server.faults.clear()
    load(tmp_path)


def test_a_web_page_does_not_cost_the_part(server, tmp_path):
    part(tmp_path, CONTENT[DATA][:500_000])
    server.faults[DATA] = "html"
    with pytest.raises(ValueError, match="a web page"):
        load(tmp_path)
    server.faults.clear()
    load(tmp_path)
    assert server.ranges() == ["bytes=500000-"] * 2


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe", "model.ckpt.index", DATA])
def test_one_flipped_bit_is_no_model(server, tmp_path, name):
    server.faults[name] = "flips a bit"
    with pytest.raises(ValueError, match="is not the file it should be: .*expected.*; nothing was kept") as e:
        load(tmp_path)
    assert "delete the file" not in str(e.value)  # it is not there
    assert not any(f.startswith(name) for f in files(tmp_path))


def test_404_says_what_could_not_be_fetched(server, tmp_path, pauses):
    server.faults["model.ckpt.index"] = 404
    with pytest.raises(ConnectionError, match=r"cannot fetch http.*model\.ckpt\.index \(HTTP status 404\); .*offline"):
        load(tmp_path)
    assert server.ranges("model.ckpt.index") == [None] and pauses == []  # not asked again


def test_no_server_says_what_works_offline(tmp_path, monkeypatch, pauses):
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9/355M/hparams\.json \(no connection\); .*tiny works"):
        load(tmp_path)
    assert files(tmp_path) == [] and pauses == []


@pytest.mark.parametrize("fault", [503, 429, "drops"])
def test_a_busy_server_is_asked_again_after_growing_pauses(server, tmp_path, pauses, fault):
    server.faults["hparams.json"] = [fault] * 4
    load(tmp_path)
    assert pauses == [1, 2, 4, 8]
    assert_whole(tmp_path)


def test_a_server_that_stays_busy_is_given_up_and_the_bytes_kept(server, tmp_path, pauses):
    server.faults[DATA] = ["cuts", *[503] * 5]
    with pytest.raises(ConnectionError, match=r"HTTP status 503\); (\d+) bytes are kept, the next run goes on"):
        load(tmp_path)
    assert DATA + ".part" in files(tmp_path) and DATA not in files(tmp_path)
    load(tmp_path)
    assert server.ranges()[-1] == server.ranges()[1] is not None
    assert_whole(tmp_path)


def test_a_stall_is_noticed_and_resumed(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "TIMEOUT_S", (10, 0.3))
    server.faults[DATA] = ["stalls"]
    load(tmp_path)
    assert len(server.ranges()) == 2 and server.ranges()[1]
    assert "nothing came for 0.3 s; trying again" in capsys.readouterr().err
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        ("{0}", ConnectionError, "the connection broke off"),
        ("{1}", ValueError, "not the file it should be"),
        ("{0}, {1}", ConnectionError, "cannot fetch"),
    ],
    ids=["too long", "too short", "two"],
)
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_wrong_content_length_is_no_model(server, tmp_path, name, length, error, message):
    if name == "hparams.json" and length == "{1}":
        length = "10"  # of 85
    server.faults[name] = "length " + length
    with pytest.raises(error, match=message):
        load(tmp_path)
    assert name not in files(tmp_path)
    server.faults.clear()
    load(tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("length", ["many", "-5"])
def test_a_content_length_that_is_no_number_is_ignored(server, tmp_path, length):
    server.faults["vocab.bpe"] = "length " + length
    load(tmp_path)
    assert_whole(tmp_path)


def test_redirects_are_followed(server, tmp_path):
    server.faults["vocab.bpe"] = [f"redirects http://localhost:{server.server_port}/x/vocab.bpe"]
    load(tmp_path)
    assert_whole(tmp_path)


# 127.1 is this server too, but by no name that is exempt from https: what is not refused arrives.
@pytest.mark.parametrize("host", ["127.1", "localhost@127.1", "127.0.0.1.", "example.com"])
def test_a_redirect_to_plain_http_is_refused_before_it_is_followed(server, tmp_path, host):
    server.faults["hparams.json"] = [f"redirects http://{host}:{server.server_port}/x/elsewhere"]
    with pytest.raises(ValueError, match=r"/elsewhere is not fetched: only https is, .*GPT2_BASE_URL"):
        load(tmp_path)
    assert server.requests == [("hparams.json", None)] and files(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("http://127.1:{}", ValueError, "only https is"),
        ("ftp://127.0.0.1:{}", ConnectionError, "No connection adapters"),
        ("file:///etc/{}", ConnectionError, "No connection adapters"),
        ("127.0.0.1:{}", ConnectionError, "cannot fetch"),
    ],
)
def test_other_addresses_are_refused(server, tmp_path, monkeypatch, pauses, url, error, message):
    monkeypatch.setenv("GPT2_BASE_URL", url.format(server.server_port))
    with pytest.raises(error, match=message):
        load(tmp_path)
    assert server.requests == [] and files(tmp_path) == [] and pauses == []


def test_a_redirect_loop_ends(server, tmp_path, pauses):
    server.faults["hparams.json"] = f"redirects {server.url}/hparams.json"
    with pytest.raises(ConnectionError, match="cannot fetch"):
        load(tmp_path)
    assert pauses == [] and files(tmp_path) == []


@pytest.mark.parametrize("url", ["http://[bad", "https://[::1", "//[x", "http://user:pa[ss@127.0.0.1/"])
def test_a_redirect_to_no_address_is_named(server, tmp_path, pauses, url):
    server.faults["hparams.json"] = f"redirects {url}"
    with pytest.raises(ConnectionError, match=r"hparams\.json \(it redirects to '.*', which is no address"):
        load(tmp_path)
    assert server.ranges("hparams.json") == [None] and pauses == []


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy"])
def test_a_proxy_is_not_asked_for_this_machine(server, tmp_path, monkeypatch, variable):
    """It could not reach it, and plain http would leave the machine."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:9")
    load(tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read: No such file"), (b"", "has no cert"), (b"\xff\n", "has no cert")]
)
def test_certificates_that_are_none_are_named(tmp_path, monkeypatch, variable, content, message):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(path))
    monkeypatch.setenv("GPT2_BASE_URL", "https://127.0.0.1:9")
    with pytest.raises(ValueError, match=f"ca.pem, which {variable} names, {message}.*or unset it"):
        load(tmp_path)


def test_a_file_that_comes_in_pieces_is_put_together(server, pauses, tmp_path):
    """Status 206 with less than was asked for, also where no range was: each piece goes on where the last ended."""
    server.faults[DATA] = "answers in pieces"
    load(tmp_path)
    assert_whole(tmp_path)
    n_pieces = -(-len(CONTENT[DATA]) // 300_000)
    assert n_pieces > 3 and server.ranges() == [None, *(f"bytes={300_000 * i}-" for i in range(1, n_pieces))]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_file_that_comes_zipped_though_not_asked_for_is_taken(server, pauses, tmp_path, name):
    server.faults[name] = "zips"
    load(tmp_path)
    assert_whole(tmp_path)


def test_weights_that_are_cut_without_a_length_go_on(server, pauses, tmp_path):
    """Nothing in the answers says that there is more: the index does."""
    server.faults[DATA] = "cuts without a length"
    load(tmp_path)
    assert_whole(tmp_path)
    assert len(server.ranges()) > 3 and all(server.ranges()[1:])


def test_a_length_of_thousands_of_digits_is_ignored(server, pauses, tmp_path):
    server.faults["hparams.json"] = "length " + "9" * 5000
    load(tmp_path)
    assert_whole(tmp_path)


def test_an_empty_address_is_none(server, monkeypatch, tmp_path):
    monkeypatch.setattr("checkpoints.openai.OPENAI_URL", server.url)
    monkeypatch.setenv("GPT2_BASE_URL", "")
    load(tmp_path)
    assert_whole(tmp_path)
