"""One file by its URL: resumed after whatever happens, and under its own name only when it has been verified.

A file is written as NAME.part by the process that holds the folder's lock; NAME.part.etag says which version of it
the server sent. To be verified it becomes NAME.HOST-PID-RANDOM.part, which no other process opens, and then NAME.

Only bandwidth depends on the lock. A process without one (filelock is not installed, the file system cannot lock, the
holder does nothing any more) writes a part of its own from the start, and whoever finds that its part was taken away
leaves it alone and begins another. What a killed process left is taken up by the next.
"""

import contextlib
import errno
import itertools
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

import requests
import urllib3
from tqdm import tqdm

from checkpoints import DOWNLOAD_AGAIN
from checkpoints.https import Session

N_ATTEMPTS = 5  # in a row without a byte more; each that makes progress starts the count again
TIMEOUT_S = (10, 60)  # to connect, and between two chunks
CHUNK_SIZE = 1 << 16  # what a broken connection may cost
STALE_S = 600  # no process is silent for longer: its attempts take six minutes, verifying 6 GB two
WEB_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<error")  # what proxies and storage servers answer instead of a file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# ----------------------------------------------------------------------------------------------------------------------
# Parts
# ----------------------------------------------------------------------------------------------------------------------


def size_of(path: str) -> int:
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def remove(part: str) -> None:
    for path in (part, part + ".etag"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def move(part: str, to: str) -> bool:
    """Rename a part, and the version it is of. False: another process took it."""
    remove(to)
    try:
        os.replace(part, to)
        with contextlib.suppress(FileNotFoundError):
            os.replace(part + ".etag", to + ".etag")
        return True
    except FileNotFoundError:
        return False


def parts_of(path: str) -> list[str]:
    """All parts of a file, whoever writes them, also where a kill left only the version."""
    folder, name = os.path.split(path)
    names = {f.removesuffix(".etag") for f in os.listdir(folder)}
    return [os.path.join(folder, f) for f in names if f.startswith(name + ".") and f.endswith(".part")]


def private_part(path: str) -> str:
    return f"{path}.{platform.node()}-{os.getpid()}-{os.urandom(4).hex()}.part"


def is_orphan(path: str, part: str) -> bool:
    """Whether the process that wrote a private part is gone. If it only seems so, that costs bandwidth."""
    try:
        host, pid, _ = part[len(path) + 1 :].rsplit("-", 2)
        if time.time() - os.path.getmtime(part) > STALE_S:
            return True
        if host == platform.node():
            os.kill(int(pid), 0)  # does nothing if there is such a process
    except (ProcessLookupError, FileNotFoundError, ValueError, OverflowError):
        return True
    except PermissionError:
        pass  # it is there, and somebody else's
    return False


def adopt(path: str, part: str) -> None:
    """Make `part` of the largest one that nobody writes to any more."""
    common = path + ".part"
    largest = max((p for p in parts_of(path) if p == common or is_orphan(path, p)), key=size_of, default=part)
    if size_of(largest) > size_of(part):
        move(largest, part)


def validator_of(response: requests.Response) -> str:
    """What tells one version of a file from another; empty where the server does not say."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified", "")


def read_validator(part: str) -> str:
    try:
        with open(part + ".etag", encoding="latin-1") as f:
            return f.read()
    except FileNotFoundError:
        return ""


def taken(part: str) -> requests.ConnectionError:
    return requests.ConnectionError(f"another process took {os.path.basename(part)}")


def begin(part: str, validator: str) -> BinaryIO:
    """An empty part of one version of a file. Never shortened in place: another process may be writing to the old."""
    remove(part)
    try:
        f = open(part, "xb")  # noqa: SIM115  # the caller closes it
    except FileExistsError:
        raise taken(part) from None
    if validator:
        with open(part + ".etag", "w", encoding="latin-1") as version:
            version.write(validator)
    return f


def go_on(part: str, n_have: int) -> BinaryIO:
    """A part that has n_have bytes, or more by now from another process, which are written again."""
    try:
        f = open(part, "r+b")  # noqa: SIM115  # the caller closes it
    except FileNotFoundError:
        raise taken(part) from None
    if f.seek(0, os.SEEK_END) < n_have:
        f.close()
        raise taken(part)
    f.seek(n_have)
    return f


def append(f: BinaryIO, part: str, chunks: Iterator[bytes], bar: tqdm) -> None:
    """Write `chunks` to the open part `f`, as long as it has its name: else another process took it."""
    for chunk in chunks:
        try:
            is_mine = os.path.samestat(os.fstat(f.fileno()), os.stat(part))
        except FileNotFoundError:
            is_mine = False
        if not is_mine:
            raise taken(part)
        f.write(chunk)
        bar.update(len(chunk))
    f.flush()
    os.fsync(f.fileno())  # or after a power cut the name may be there and the bytes not


# ----------------------------------------------------------------------------------------------------------------------
# One attempt
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def get(url: str, n_have: int, validator: str) -> Iterator[requests.Response]:
    """What the server answers when asked for the bytes from n_have on, or for all if the version is another by now."""
    headers = {"Accept-Encoding": "identity"}
    if n_have:
        headers["Range"] = f"bytes={n_have}-"
        if validator and not validator.startswith("W/"):  # weak ones are not allowed there
            headers["If-Range"] = validator
    with Session() as session, session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        yield response


def check_space(part: str, n_left: int | None) -> None:
    free = shutil.disk_usage(os.path.dirname(part)).free
    if n_left is not None and n_left > free:
        raise OSError(errno.ENOSPC, f"{n_left / 1e6:,.1f} MB are to come, {free / 1e6:,.1f} MB are free", part)


def whole_size(response: requests.Response, n_have: int) -> int | None:
    """The file's bytes, as far as the answer says: a part may be shorter than what was asked for (RFC 9110, 15.3.7)."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return None  # its length is that of the encoded bytes
    total = response.headers.get("Content-Range", "").rpartition("/")[2] if response.status_code == 206 else ""
    n_left = response.headers.get("Content-Length", "")
    if is_size(total):
        return int(total)
    return n_have + int(n_left) if is_size(n_left) else None


def is_size(text: str) -> bool:
    return text.isdecimal() and len(text) < 20


def fetch_part(url: str, part: str, size: int | None) -> None:
    """One attempt to bring `part` from the bytes it has to the whole file, with a progress bar.

    `size`: the file's, if that is known; a server that does not say it may break off without a sign.
    """
    n_have, validator = size_of(part), read_validator(part)
    with get(url, n_have, validator) as response:
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        changed = "" not in (validator, validator_of(response)) and validator != validator_of(response)
        if status == 416 and content_range == f"bytes */{n_have}" and not changed:
            return  # nothing was left to send
        if status == 416 or (status == 206 and (changed or not content_range.startswith(f"bytes {n_have}-"))):
            remove(part)
            raise requests.ConnectionError("the file has changed at the server")
        response.raise_for_status()
        chunks = response.iter_content(CHUNK_SIZE)
        first = next(chunks, b"")
        if status != 206 or not n_have:  # the server sends the file from its beginning
            if first.lstrip().lower().startswith(WEB_PAGES):
                raise ValueError(
                    f"{url} is not the file it should be: a web page or an XML error came, as from a proxy or a login "
                    "page; nothing of it was kept: open it in a browser, or try another HTTPS_PROXY or GPT2_BASE_URL"
                )
            n_have = 0
        with go_on(part, n_have) if n_have else begin(part, validator_of(response)) as f:
            n_expected = whole_size(response, n_have) or size
            check_space(part, n_expected and n_expected - n_have)
            label = "/".join(url.split("/")[-2:])
            with tqdm(desc=label, total=n_expected, initial=n_have, unit="B", unit_scale=True) as bar:
                append(f, part, itertools.chain([first], chunks), bar)
    if n_expected is not None and size_of(part) != n_expected:
        raise requests.ConnectionError(f"{size_of(part)} bytes of {n_expected} came")


# ----------------------------------------------------------------------------------------------------------------------
# The whole file
# ----------------------------------------------------------------------------------------------------------------------


def reason(error: Exception) -> str:
    """A network error in a few words: those of requests hold whole objects."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP status {response.status_code}"
    if isinstance(error, requests.exceptions.SSLError):
        return "the server's certificate is not trusted; behind a proxy, REQUESTS_CA_BUNDLE names the file of its own"
    if "Max retries" in str(error):
        return "no connection"
    if "timed out" in str(error):
        return f"nothing came for {TIMEOUT_S[1]} s"
    return "the connection broke off" if "(" in str(error) else str(error)


def is_final(error: Exception, n_have: int) -> bool:
    """Whether trying again would give the same."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code < 500 and response.status_code not in (408, 429)
    if isinstance(error, (ValueError, requests.TooManyRedirects, requests.exceptions.SSLError)):
        return True  # the ValueErrors are about the URL
    return n_have == 0 and "Max retries" in str(error)  # there is most likely no network: no use in waiting


def fetch(url: str, path: str, part: str, size: int | None) -> None:
    """Bring `part` to the whole file, or another process the file itself. ConnectionError: it cannot be had now."""
    n_failed = 0
    while not os.path.exists(path):
        n_before = size_of(part)
        try:
            return fetch_part(url, part, size)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as e:  # requests lets some of the latter out
            n_now = size_of(part)
            n_failed = 1 if n_now > n_before else n_failed + 1
            if is_final(e, n_now) or n_failed == N_ATTEMPTS:
                kept = f"; {n_now} bytes are kept, the next run goes on from there" if n_now else ""
                raise ConnectionError(f"cannot fetch {url} ({reason(e)}){kept}") from e
            pause = 2 ** (n_failed - 1)
            print(f"{os.path.basename(path)}: {reason(e)}; trying again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def download(url: str, path: str, check: Callable[[str], None], is_locked: bool, size: int | None = None) -> None:
    """Fetch a file, unless another process does so first; `check` raises a ValueError if its argument is not the file.

    `size` is the file's, where it is known before.

    ValueError: the server has something else. ConnectionError: it cannot be had now. OSError: it cannot be written.
    """
    common, private = path + ".part", private_part(path)
    part = common if is_locked else private
    adopt(path, part)
    try:
        while not os.path.exists(path):
            fetch(url, path, part, size)
            # What is checked is out of the others' reach.
            if os.path.exists(path) or (part != private and not move(part, private)):
                continue
            try:
                check(private)
                os.replace(private, path)
            except FileNotFoundError:
                if os.path.exists(private):  # else another process was faster, and threw it away
                    raise
            except ValueError as e:
                remove(private)
                problem = str(e).replace(private, os.path.basename(path)).removesuffix(f"; {DOWNLOAD_AGAIN}")
                raise ValueError(
                    f"{url} is not the file it should be: {problem}; "
                    "nothing was kept: try again, or another GPT2_BASE_URL"
                ) from e
        for leftover in parts_of(path):
            remove(leftover)
    finally:
        if size_of(private) > size_of(common):  # interrupted, or the disk is full
            move(private, common)


@contextlib.contextmanager
def local_errors(folder: str) -> Iterator[None]:
    """Add the way out to what the file system says."""
    try:
        yield
    except ConnectionError:
        raise
    except OSError as e:
        way_out = "choose a folder that you may write to with --models_dir"
        if e.errno in FULL:
            way_out = "free some space or choose another --models_dir; the next run goes on with the bytes that came"
        raise OSError(e.errno, f"{e.strerror or e}; {way_out}", e.filename or folder) from e
