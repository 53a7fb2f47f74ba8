"""What --stats reads of the system."""

import builtins
import sys

import pytest

from console import stats


@pytest.mark.skipif(sys.platform == "win32", reason="Windows says nothing")
def test_memory_is_known_without_proc_too(monkeypatch):
    usual = stats.peak_memory_gb(), stats.resident_memory_gb()
    assert 0.01 < usual[1] <= 1.1 * usual[0] < 1000

    def refuse(path, *args, **kwargs):
        raise FileNotFoundError(path)

    monkeypatch.setattr(builtins, "open", refuse)
    found = stats.peak_memory_gb(), stats.resident_memory_gb()
    monkeypatch.undo()
    assert found[0] == pytest.approx(usual[0], rel=0.5) and found[1] == pytest.approx(found[0], rel=0.5)
