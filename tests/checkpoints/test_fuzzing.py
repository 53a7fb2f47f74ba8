"""What the fuzzer kept, and what guides it."""

import glob
import importlib.util
import os

from helpers import ROOT, read_bytes

CORPUS = sorted(glob.glob(os.path.join(ROOT, "tests", "fuzz", "corpus", "*")))


def fuzz_target():
    spec = importlib.util.spec_from_file_location("fuzz_files", os.path.join(ROOT, "tests", "fuzz", "fuzz_files.py"))
    fuzz_files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz_files)
    return fuzz_files


def test_fuzzing_is_guided_by_what_reads_files():
    fuzz_files = fuzz_target()
    readers = fuzz_files.encoder, fuzz_files.openai, fuzz_files.tensorflow
    assert set(fuzz_files.READING) == {module.__name__.split(".")[0] for module in readers}


def test_the_kept_corpus_ends_in_readings_and_named_faults():
    """tests/fuzz/fuzz_files.py, one input after the other: `check` asserts what must hold."""
    fuzz_files = fuzz_target()
    messages = [fuzz_files.check(read_bytes(path)) for path in CORPUS]
    assert len(CORPUS) > 20 and sum(map(os.path.getsize, CORPUS)) < 300_000
    assert {read_bytes(path)[:1] for path in CORPUS} >= fuzz_files.READERS.keys()
    assert "" in messages and len({message.split(": ")[-1] for message in messages}) > 20  # many kinds of fault
