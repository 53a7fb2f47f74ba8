"""A loaded model written to a folder in one of two forms, all of it or nothing.

Each file is written under a name of its own beside its final one, and all get their names when all are complete, the
weights last. What a killed process left behind is removed by the next one that writes there.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable

from tqdm import tqdm

from checkpoints import write_huggingface, write_openai
from checkpoints.download import FULL, is_orphan, parts_of, private_part
from checkpoints.weights import n_weights
from checkpoints.writing import check_vocabulary

FORMATS = {"huggingface": write_huggingface, "openai": write_openai}


def check_target(out: str, form: str, source: str | None = None) -> None:
    """ValueError: there is no such form, or `out` is the model's own folder `source`, a file, or has files in it."""
    if form not in FORMATS:
        raise ValueError(f"format {form!r} is not known, expected --format {' or --format '.join(FORMATS)}")
    if not out:
        raise ValueError("no folder to write to, expected one after the model; name one that is new or empty")
    if not os.path.lexists(out):
        return
    if not os.path.isdir(out):
        raise ValueError(f"{out} is no folder; name one that is new or empty")
    if source and os.path.isdir(source) and os.path.samefile(source, out):
        raise ValueError(f"{out} is the model itself; name a folder that is new or empty")
    others = sorted(name for name in os.listdir(out) if not name.endswith(".part"))
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ValueError(
            f"{out} has files in it, {', '.join(others[:3])}{more}, and none is overwritten; "
            "name a folder that is new or empty"
        )


def write_part(path: str, pieces: Iterable[bytes], bar: tqdm) -> None:
    with open(path, "xb") as f:
        for piece in pieces:
            f.write(piece)
            bar.update(len(piece))
        f.flush()
        os.fsync(f.fileno())  # or after a power cut the name may be there and the bytes not


def write_parts(files, out: str, parts: dict[str, str], bar: tqdm) -> None:
    """Write each of `files`; `parts` takes up the final name of each by its present one, before it is there."""
    for name, pieces in files:
        path = os.path.join(out, name)
        for left in parts_of(path):
            if is_orphan(path, left):
                os.remove(left)
        part = private_part(path)
        parts[part] = path
        write_part(part, pieces, bar)


def check_space(out: str, n_bytes: int) -> None:
    free = shutil.disk_usage(out).free
    if n_bytes > free:
        raise OSError(errno.ENOSPC, f"{n_bytes / 1e6:,.1f} MB are to be written, {free / 1e6:,.1f} MB are free", out)


def write_model(encoder, hparams: dict, params: dict, out: str, form: str) -> str:
    """Write a model to the folder `out`, which is made if need be; return how much it is, in words.

    ValueError, before anything is written: what check_target refuses, or a model that the form cannot express.
    OSError: the disk is full, or may not be written to. Then, and after Ctrl-C, nothing is left.
    """
    check_target(out, form)
    check_vocabulary(encoder)
    FORMATS[form].check(encoder, hparams, params)
    files = FORMATS[form].files(encoder, hparams, params)
    is_new = not os.path.isdir(out)
    parts: dict[str, str] = {}
    try:
        os.makedirs(out, exist_ok=True)
        n_bytes = 4 * n_weights(params)
        check_space(out, n_bytes)
        with tqdm(total=n_bytes, unit="B", unit_scale=True, desc="convert", leave=False, disable=None) as bar:
            write_parts(files, out, parts, bar)
        n_bytes = sum(map(os.path.getsize, parts))
        check_target(out, form)  # another process may have been faster
        for part, path in parts.items():
            os.replace(part, path)
        return f"{len(parts)} files, {n_bytes:,} bytes"
    except OSError as e:
        way_out = "free some space or name another folder" if e.errno in FULL else "name a folder that you may write to"
        raise OSError(e.errno, f"{e.strerror}; nothing was written: {way_out}", e.filename or out) from e
    finally:
        for part in parts:
            with contextlib.suppress(FileNotFoundError):
                os.remove(part)
        if is_new:
            with contextlib.suppress(OSError):  # it has the model in it, or was not made
                os.rmdir(out)
