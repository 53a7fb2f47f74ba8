"""Pickles as data: plain values come out as Python's own reader gives them, and nothing else comes out at all."""

import functools
import os
import pickle
import pickletools

import pytest
from helpers import within
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.pickles import CHANGES, MAX_OPCODES, PUSHES, Damaged, Global, read_pickle

KNOWN = {"collections.OrderedDict": Global("collections.OrderedDict", lambda args: {}), "torch.X": Global("torch.X")}
ORDERED_DICT = b"ccollections\nOrderedDict\n"
texts = st.text(st.characters(exclude_categories=["Cs"]))
keys = texts | st.integers(-(1 << 31) + 1, (1 << 31) - 1)
scalars = st.none() | st.booleans() | st.integers(-(1 << 2000), 1 << 2000) | st.floats(allow_nan=False) | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@pytest.fixture
def modest():
    """Ends within 10 s of processor time and 150 MB, where the slips this guards against took minutes or gigabytes."""
    with within(seconds=10, n_bytes=150e6):
        yield


def fault_of(data, match=None):
    with pytest.raises(Damaged, match=match) as e:
        read_pickle(data, KNOWN)
    assert len(str(e.value)) < 300
    return str(e.value)


@settings(max_examples=60)
@given(values, st.sampled_from([2, 3, 4, 5]))
def test_plain_values_come_out_as_from_pythons_reader(value, protocol):
    found = read_pickle(pickle.dumps(value, protocol))
    assert found == value and repr(found) == repr(value)  # True is not 1 and -0.0 not 0.0


def test_values_that_lie_in_each_other():
    shared = ["shared"]
    loop = {"a": shared, "b": shared}
    loop["self"] = loop
    for protocol in (2, 5):
        found = read_pickle(pickle.dumps(loop, protocol))
        assert found["self"] is found and found["a"] is found["b"] == shared


@settings(max_examples=60)
@given(values, st.data())
def test_a_pickle_cut_or_changed_anywhere_is_a_value_or_a_fault(value, data):
    content = bytearray(pickle.dumps(value, data.draw(st.sampled_from([2, 4]))))
    at = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(Damaged):
        read_pickle(bytes(content[:at]), KNOWN)
    content[at] ^= data.draw(st.integers(1, 255))
    try:
        read_pickle(bytes(content), KNOWN)
    except Damaged as e:
        assert str(e)


# ----------------------------------------------------------------------------------------------------------------------
# Pickles that call something
# ----------------------------------------------------------------------------------------------------------------------


class Calling:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_a_pickle_would_call_is_named_and_not_called(tmp_path, protocol):
    made = str(tmp_path / "made")
    touch = f"open({made!r}, 'w').close()"
    nested = Calling(functools.reduce, Calling(getattr, Calling(__import__, "os"), "system"), [f"touch {made}"])
    names = {
        "system": Calling(os.system, f"touch {made}"),
        "eval": Calling(eval, touch),
        "exec": Calling(exec, touch),
        "mkdir": Calling(os.mkdir, made),
        "reduce": nested,
        "__import__": Calling(__import__, "antigravity"),
    }
    for name, value in names.items():
        for content in (value, {"model": [1, (value,)]}, {"x": 1, "y": {"z": value}}):
            assert f"{name}'" in fault_of(pickle.dumps(content, protocol), "would call")
    assert not os.path.exists(made)
    for content in names.values():  # as text opcodes
        fault_of(pickle.dumps(content, 0), "protocol|would call|opcode")
    assert not os.path.exists(made)


@pytest.mark.parametrize("opcode", [o for o in pickletools.opcodes if o.code not in {*PUSHES, *CHANGES, "."}])
def test_opcodes_that_data_does_not_need_are_refused(opcode):
    for stack in (b"", b"K\1", ORDERED_DICT, ORDERED_DICT + b")", b"(", b"(" + ORDERED_DICT):
        assert repr(opcode.code) in fault_of(stack + opcode.code.encode("latin-1") + bytes(16) + b"\n\n.")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cos\nsystem\n.", "would call 'os.system'"),
        (b"X\2\0\0\0osX\6\0\0\0system\x93.", "would call 'os.system'"),
        (b"K\1K\2\x93.", "a name that is no text"),
        (b"cos\nsys\x1b[2J\n.", r"would call 'os.sys\\x1b"),
        (b"c" + b"a" * 500 + b"\n\n.", "a name of more than"),
        (b"ccollections\nOrderedDict", "more than|cut short"),
        (b"ctorch\nX\n)R.", "calls a torch.X, which is no function"),
        (ORDERED_DICT + b")R)R.", "calls a dict, which is no function"),
        (b"X\4\0\0\0eval)R.", "calls a str"),
        (ORDERED_DICT + b"]R.", "calls a collections.OrderedDict, which is no function"),
        (b"K\1}b.", "a int in the pickle is changed like a dict"),
        (ORDERED_DICT + b"}b.", "a Global in the pickle is changed like a dict"),
        (ORDERED_DICT + b"X\1\0\0\0aNs.", "a Global in the pickle is changed"),
        (b")(K\1e.", "a tuple in the pickle is changed like a list"),
        (b"]X\1\0\0\0aNs.", "a list in the pickle is changed like a dict"),
        (b"}(K\1u.", "has no value"),
        (b"})Ns.", "of type tuple"),
        (b"}G" + bytes(8) + b"Ns.", "of type float"),
        (b"}\x88Ns.", "of type bool"),
        (b"}NNs.", "of type NoneType"),
        (b"}\x8a\x04" + b"\0\0\0\x80Ns.", None),
        (b"}\x8a\x05" + b"\0\0\0\x80\0Ns.", "of type int"),
        (b"K\1Q.", "refers to other files"),
        (b"\x80\x06N.", "protocol 6"),
        (b"\x80\x01N.", "protocol 1"),
        (b"h\0.", "takes what it has not made"),
        (b"j\xff\xff\xff\xff.", "takes what it has not made"),
        (b"q\0.", "takes what it has not made"),
        (b"X\xff\xff\xff\xffa.", "cut short"),
        (b"X\1\0\0\0\xff.", "cut short"),
        (b"\x8c\2\xc3", "cut short"),
        (b"\x86.", "takes more values than it makes"),
        (b"(N\x86.", "takes more values than it makes"),
        (b"t.", "takes what it has not made"),
        (b"R.", "takes more values"),
        (b"NN.", "ends in the middle"),
        (b"(N.", "ends in the middle"),
        (b".", "ends in the middle"),
        (b"N.N", "goes on after its end"),
        (b"", "cut short"),
        (b"N", "cut short"),
    ],
)
def test_pickles_that_no_writer_makes(data, message):
    if message:
        fault_of(data, message)
    else:
        with pytest.raises(Damaged):
            read_pickle(data)


def test_what_known_names_stand_for_is_ours():
    calls = []
    known = {"os.system": Global("os.system", calls.append), "torch.X": Global("torch.X")}
    assert read_pickle(b"cos\nsystem\nX\2\0\0\0ls\x85R.", known) is None and calls == [("ls",)]
    assert read_pickle(b"ctorch\nX\n.", known) is known["torch.X"]
    assert read_pickle(b"K\7Q.", persistent=lambda reference: [reference]) == [7]


# ----------------------------------------------------------------------------------------------------------------------
# Pickles that grow
# ----------------------------------------------------------------------------------------------------------------------

DOUBLED = b"q\0]h\0ah\0a"  # a list, then one that has it twice


def test_a_value_of_a_trillion_trillion_parts_is_not_walked(modest):
    lists = read_pickle(b"(]" + DOUBLED * 80 + b"t.")
    assert len(lists) == 81 and lists[80][0] is lists[80][1] is lists[79]
    tuples = b"N" + b"q\0h\0\x86" * 80
    assert read_pickle(tuples + b".")[0] is not None
    fault_of(b"}" + tuples + b"Ns.", "of type tuple")  # to hash it would take for ever
    fault_of(tuples + b")R.", "calls a tuple")
    fault_of(tuples + tuples + b"\x93.", "no text")


@pytest.mark.parametrize("unit", [b"(", b"]\x94"])
def test_sixteen_megabytes_of_opcodes(modest, unit):
    fault_of(unit * ((1 << 24) // len(unit)), f"more than {MAX_OPCODES} opcodes")


@pytest.mark.parametrize("unit", [b"]", b"\x85", b"K\1\x86"])
def test_values_nested_as_deep_as_can_be(modest, unit):
    n = 20_000
    data = b"]" * n + b"a" * (n - 1) if unit == b"]" else b"N" + unit * n
    read_pickle(data + b".")


def test_the_largest_memo_index_takes_no_room(modest):
    assert read_pickle(b"Nr\xff\xff\xff\xffj\xff\xff\xff\xff\x86.") == (None, None)


def test_numbers_that_hash_alike_are_no_keys(modest):
    key = b"\x8a\x0a" + ((1 << 61) - 1 << 8).to_bytes(10, "little")
    fault_of(b"}(" + key + b"Nu.", "of type int")
