"""Pickles read as data: an interpreter of the opcodes that dicts, lists, tuples, numbers, text and tensors need.

A pickle is a program for a small stack machine. Python's own reader calls whatever functions the program names, sets
aside as much memory as it asks for, and follows nested values without end. Here a name leads to one of our own
functions or is refused, every number is checked, and nothing that a file holds is called, compared, hashed or walked.

Follows CPython's Lib/pickletools.py, protocols 2 to 5. Left out: the opcodes of protocols 0 and 1, bytes, sets,
objects (NEWOBJ, INST, OBJ), the extension registry, and numbers of more than 255 bytes.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from checkpoints import Damaged

# 1558M with its optimizer has 80,000 opcodes. Each can make an object, so this bounds memory: 50 MB at worst.
MAX_OPCODES = 1 << 18
MAX_GLOBAL, MAX_KEY = 256, 1 << 31
U1, U2, U4, U8, I4, F8 = map(struct.Struct, ("<B", "<H", "<I", "<Q", "<i", ">d"))


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class that a pickle names. `build`, of our own, makes from a tuple what a call stands for."""

    name: str
    build: Callable[[tuple], object] | None = None


class Machine:
    """How far a pickle is read: its stack, the stacks below the marks, and the memo."""

    def __init__(self, data: bytes, known: Mapping[str, Global], persistent: Callable[[object], object] | None):
        self.data, self.at = data, 0
        self.stack: list = []
        self.below: list[list] = []
        self.memo: dict[int, object] = {}
        self.known, self.persistent = known, persistent

    def number(self, layout: struct.Struct):
        (value,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return value

    def take(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self.data):
            raise Damaged("the pickle is cut short")
        return self.data[self.at - size : self.at]

    def text(self, layout: struct.Struct) -> str:
        return self.take(self.number(layout)).decode()

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + MAX_GLOBAL)
        if end < 0:
            raise Damaged(f"a name of more than {MAX_GLOBAL} bytes")
        line = self.data[self.at : end].decode()
        self.at = end + 1
        return line

    def top(self, kind: type):
        """The uppermost value, which is changed where it is."""
        if type(self.stack[-1]) is not kind:
            raise Damaged(f"a {type(self.stack[-1]).__name__} in the pickle is changed like a {kind.__name__}")
        return self.stack[-1]

    def popped(self, n: int) -> list:
        if len(self.stack) < n:
            raise Damaged("the pickle takes more values than it makes")
        values = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return values

    def since_mark(self) -> list:
        values, self.stack = self.stack, self.below.pop()
        return values

    def find(self, module: object, name: object) -> Global:
        name = f"{module}.{name}" if type(module) is type(name) is str else "a name that is no text"
        if name not in self.known:
            raise Damaged(f"its pickle would call {name[:80]!r}, and nothing from a file is called here")
        return self.known[name]

    def refer(self, reference: object):
        if self.persistent is None:
            raise Damaged("its pickle refers to other files")
        return self.persistent(reference)

    def call(self, function: object, args: object):
        if type(function) is not Global or function.build is None or type(args) is not tuple:
            name = function.name if type(function) is Global else type(function).__name__
            raise Damaged(f"its pickle calls a {name}, which is no function")
        return function.build(args)

    def append(self, items: list) -> None:
        self.top(list).extend(items)

    def set_items(self, items: list) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise Damaged("a key in its pickle has no value")
        for key in items[::2]:
            # To hash a nested tuple takes for ever, and large numbers can be chosen that all hash alike.
            if type(key) is not str and not (type(key) is int and -MAX_KEY < key < MAX_KEY):
                raise Damaged(f"a key in its pickle is of type {type(key).__name__}, expected text or a small number")
        target.update(zip(items[::2], items[1::2], strict=True))

    def build(self) -> None:
        self.stack.pop()  # the attributes of an OrderedDict, such as a state dict's _metadata
        self.top(dict)

    def start(self) -> None:
        version = self.number(U1)
        if not 2 <= version <= 5:
            raise Damaged(f"a pickle of protocol {version}, expected 2 to 5")


PUSHES: dict[str, Callable[[Machine], object]] = {  # opcode -> the value that it puts on the stack
    "N": lambda m: None,
    "\x88": lambda m: True,
    "\x89": lambda m: False,
    "K": lambda m: m.number(U1),
    "M": lambda m: m.number(U2),
    "J": lambda m: m.number(I4),
    "\x8a": lambda m: int.from_bytes(m.take(m.number(U1)), "little", signed=True),
    "G": lambda m: m.number(F8),
    "X": lambda m: m.text(U4),
    "\x8c": lambda m: m.text(U1),
    "}": lambda m: {},
    "]": lambda m: [],
    ")": lambda m: (),
    "\x85": lambda m: tuple(m.popped(1)),
    "\x86": lambda m: tuple(m.popped(2)),
    "\x87": lambda m: tuple(m.popped(3)),
    "t": lambda m: tuple(m.since_mark()),
    "h": lambda m: m.memo[m.number(U1)],
    "j": lambda m: m.memo[m.number(U4)],
    "c": lambda m: m.find(m.line(), m.line()),
    "\x93": lambda m: m.find(*m.popped(2)),
    "Q": lambda m: m.refer(m.stack.pop()),
    "R": lambda m: m.call(*m.popped(2)),
}


def mark(m: Machine) -> None:
    m.below.append(m.stack)
    m.stack = []


def put(m: Machine, i: int) -> None:
    m.memo[i] = m.stack[-1]


CHANGES: dict[str, Callable[[Machine], object]] = {  # opcode -> what else it does
    "\x80": Machine.start,
    "\x95": lambda m: m.number(U8),  # a frame: how many bytes to read ahead
    "(": mark,
    "q": lambda m: put(m, m.number(U1)),
    "r": lambda m: put(m, m.number(U4)),
    "\x94": lambda m: put(m, len(m.memo)),
    "a": lambda m: m.append(m.popped(1)),
    "e": lambda m: m.append(m.since_mark()),
    "s": lambda m: m.set_items(m.popped(2)),
    "u": lambda m: m.set_items(m.since_mark()),
    "b": Machine.build,
}
ACTIONS = {ord(code): action for code, action in CHANGES.items()}
VALUES = {ord(code): value for code, value in PUSHES.items()}
STOP = ord(".")


def run(m: Machine) -> object:
    for _ in range(MAX_OPCODES):
        code = m.data[m.at]
        m.at += 1
        if value := VALUES.get(code):
            value = value(m)  # may replace the stack
            m.stack.append(value)
        elif action := ACTIONS.get(code):
            action(m)
        elif code == STOP and not m.below and len(m.stack) == 1 and m.at == len(m.data):
            return m.stack[0]
        elif code == STOP:
            raise Damaged("the pickle ends in the middle, or goes on after its end")
        else:
            raise Damaged(f"its pickle has the opcode {chr(code)!r}, which plain data does not need")
    raise Damaged(f"its pickle has more than {MAX_OPCODES} opcodes")


def read_pickle(
    data: bytes, known: Mapping[str, Global] | None = None, persistent: Callable[[object], object] | None = None
) -> object:
    """What a pickle holds: None, bool, int, float, str, tuple, list and dict, and what `known` and `persistent` make.

    `known` has the only names that it may call or mention, `persistent` makes something of a reference to a file.
    Values may be nested thousands deep and lie in each other, so do not compare, print or walk them; keys of dicts
    are text or small numbers. Damaged: anything else.
    """
    try:
        return run(Machine(data, known or {}, persistent))
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as e:  # nothing there to take, or no UTF-8
        raise Damaged("the pickle is cut short, or takes what it has not made") from e
