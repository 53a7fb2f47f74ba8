"""The files of a model on disk: of which kind they must be, and JSON."""

import json
import os
import reprlib
import stat
from collections.abc import Iterable

from checkpoints import COPY_AGAIN


def check_files(folder: str, names: Iterable[str], max_sizes: dict[str, int], way_out: str) -> None:
    """ValueError unless each of a model's files is a file of this folder, and not larger than it can be.

    A pipe would be waited for and a device be read without end, and a link could pass off any file of this machine as
    the model's. A link to the whole folder is the user's own.
    """
    home = os.path.realpath(folder)
    if os.path.basename(os.path.dirname(home)) == "snapshots":  # of the hub's cache: links to the files beside it
        home = os.path.dirname(os.path.dirname(home))
    for name in names:
        path = os.path.join(folder, name)
        real = os.path.realpath(path)
        status = os.stat(path)
        if os.path.commonpath([home, real]) != home:
            raise ValueError(f"{path} is a link to {real}, out of its folder; copy the file, or link the whole folder")
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path} is a folder, a pipe or a device, expected a file; put the model's file there")
        if status.st_size > (limit := max_sizes.get(name, status.st_size)):
            raise ValueError(f"{path} has {status.st_size} bytes, expected {limit} at most; {way_out}")


def present(folder: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if os.path.exists(os.path.join(folder, name))]


def read_json(path: str) -> dict:
    """A file that holds a JSON object. ValueError: it does not."""
    with open(path, encoding="utf-8") as f:
        try:
            content = json.load(f)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path}: expected a JSON object, found {e}; {COPY_AGAIN}") from e
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {reprlib.repr(content)}; {COPY_AGAIN}")
    return content
