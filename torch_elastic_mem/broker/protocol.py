"""The messages of docs/protocol.md as values, and as bytes."""

from __future__ import annotations

import struct
from typing import Any, ClassVar, NamedTuple

import msgspec

from torch_elastic_mem.broker.descriptor import Descriptor
from torch_elastic_mem.errors import TemError

VERSION = 1
MAX_MESSAGE = 4096
UNLIMITED = 2**64 - 1
HOST = "HOST"

RUNGS = ("trim", "evict", "spill", "shrink", "pause")
TRIM, EVICT, PAUSE = 0, 1, 4
FREE_ONLY = 255
LAST = 1
PASS_ON = 1

INVALID, ADMISSION, OUT_OF_MEMORY, WRONG_VERSION, NOT_PERMITTED, CLOSED, IN_USE = range(1, 8)


class ProtocolError(TemError, ValueError):
    """Bytes from a socket that are no message. Whoever sent them is not listened to any more.

    Attributes:
        wrong_version: it may be a message, of a version that is not spoken here.
    """

    def __init__(self, message: str = "", *, wrong_version: bool = False) -> None:
        super().__init__(message)
        self.wrong_version = wrong_version


class Limits(NamedTuple):
    """Of an account, in bytes; UNLIMITED for no `high` or `max`. See `PriorityClass`."""

    value: int
    min: int = 0
    low: int = 0
    high: int = UNLIMITED
    max: int = UNLIMITED
    weight: float = 1.0


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message, without its header. Subclasses have their fields in the order of the wire.

    WIRE spells the body: letters, `64s` for a text of that size, `_` for a pad, `limits`, and `...`
    for a text to the end of the message; the letters are those of `struct`. Fields that it does not spell
    are none of the bytes.
    """

    TYPE: ClassVar[int]
    WIRE: ClassVar[str]


class Hello(Message, frozen=True, gc=False):
    """A process and the device of its arena."""

    TYPE, WIRE = 1, "64s 16s 64s 64s Q Q"
    device: str
    backend: str
    label: str
    process: str
    total: int
    granularity: int


class Open(Message, frozen=True, gc=False):
    """A new account; `lease` is what the process holds of it from before."""

    TYPE, WIRE = 2, "64s 32s limits Q"
    name: str
    priority: str
    limits: Limits
    lease: int


class Close(Message, frozen=True, gc=False):
    """The end of an account."""

    TYPE, WIRE = 3, "I _"
    account: int


class SetLimits(Message, frozen=True, gc=False):
    """LIMITS: what a process wants of its account."""

    TYPE, WIRE = 4, "I _ limits"
    account: int
    limits: Limits


class Demand(Message, frozen=True, gc=False):
    """Asks for `bytes` to `want` bytes within `timeout` microseconds."""

    TYPE, WIRE = 5, "I I Q Q Q 64s I _ Q"
    account: int
    rung: int
    bytes: int
    want: int
    timeout: int
    group: str = ""
    members: int = 0
    round: int = 0


class Withdraw(Message, frozen=True, gc=False):
    """Takes a demand back that has the same number."""

    TYPE, WIRE = 6, ""


class Return(Message, frozen=True, gc=False):
    """Lease that is given back."""

    TYPE, WIRE = 7, "I _ Q"
    account: int
    bytes: int


class Gave(Message, frozen=True, gc=False):
    """Lease that is given back for an ASK; `coming` more waits for fences."""

    TYPE, WIRE = 8, "I I Q Q"
    account: int
    flags: int
    bytes: int
    coming: int


class Bye(Message, frozen=True, gc=False):
    """Nothing is held any more."""

    TYPE, WIRE = 9, ""


class Report(Message, frozen=True, gc=False):
    """What an account has in use, and the rungs that it has reclaimers for, a bit each.

    Of an engine also its blocks by what is in them; zeros of anybody else.
    """

    TYPE, WIRE = 10, "I I Q Q I I I I"
    account: int
    rungs: int
    held: int
    idle: int
    in_use: int = 0
    cached: int = 0
    free: int = 0
    parked: int = 0


class Pass(Message, frozen=True, gc=False):
    """Memory to be passed on with what the GAVE of its number returns: `count` extents of `bytes` each.

    Their descriptors travel beside the message.
    """

    TYPE, WIRE = 11, "I I Q"
    account: int
    count: int
    bytes: int
    descriptors: tuple[Descriptor, ...] = ()


class Welcome(Message, frozen=True, gc=False):
    """The broker's number, and what the device's ledger shares out."""

    TYPE, WIRE = 32, "Q Q"
    epoch: int
    capacity: int


class Refused(Message, frozen=True, gc=False):
    """No, and why."""

    TYPE, WIRE = 33, "I _ ..."
    kind: int
    reason: str


class Opened(Message, frozen=True, gc=False):
    """An account's number and the limits in force."""

    TYPE, WIRE = 34, "I _ limits"
    account: int
    limits: Limits


class Done(Message, frozen=True, gc=False):
    """Yes."""

    TYPE, WIRE = 35, ""


class Grant(Message, frozen=True, gc=False):
    """Bytes leased."""

    TYPE, WIRE = 36, "I _ Q"
    account: int
    bytes: int


class Denied(Message, frozen=True, gc=False):
    """No bytes, and why."""

    TYPE, WIRE = 37, "I _ ..."
    kind: int
    reason: str


class Ask(Message, frozen=True, gc=False):
    """Asks for `bytes` of an account's lease within `timeout` microseconds, no dearer than `rung`."""

    TYPE, WIRE = 38, "I I Q Q 64s I _"
    account: int
    rung: int
    bytes: int
    timeout: int
    demander: str
    flags: int = 0


class Set(Message, frozen=True, gc=False):
    """Limits that the operator has changed."""

    TYPE, WIRE = 39, "I _ 32s limits"
    account: int
    priority: str
    limits: Limits


class Passed(Message, frozen=True, gc=False):
    """Memory that the next GRANT comes with, as PASS has it."""

    TYPE, WIRE = 40, "I I Q"
    account: int
    count: int
    bytes: int
    descriptors: tuple[Descriptor, ...] = ()


def encode(request: int, message: Message) -> bytes:
    """A message as bytes. A text too long for its field is cut between characters.

    Raises:
        struct.error: a number does not fit its field.
    """
    return _CODECS[message.TYPE].encode(request, message)


def decode(data: bytes) -> tuple[int, Message]:
    """The request number and the message that the bytes are.

    Raises:
        ProtocolError: they are none.
    """
    size = len(data)
    if size < _HEADER.size:
        raise ProtocolError(f"{size} bytes are no message: the header alone has {_HEADER.size}")
    version, number, length, _ = _HEADER.unpack_from(data)
    if version != VERSION:
        raise ProtocolError(
            f"a message of version {version}; this side speaks version {VERSION}", wrong_version=True
        )
    if length != size or size > MAX_MESSAGE:
        raise ProtocolError(f"a message of {size} bytes that says it has {length}, of at most {MAX_MESSAGE}")
    codec = _CODECS.get(number)
    if codec is None:
        raise ProtocolError(f"a message of the unknown type {number}")
    return codec.decode(data)


_HEADER = struct.Struct("<HHIQ")
_PLAIN, _TEXT, _LIMITS = range(3)
_ZERO = bytes(4)


class _Codec:
    """One message's layout, compiled. Messages of numbers alone, pads aside, take the short way."""

    def __init__(self, kind: type[Message]) -> None:
        self._kind = kind
        tokens = kind.WIRE.split()
        self._open_end = tokens[-1:] == ["..."]
        letters, self._parts, self._pads = ["<HHIQ"], [], []
        for token in tokens[: -1 if self._open_end else None]:
            if token == "_":
                self._pads.append(struct.calcsize("".join(letters)))
            else:
                part = _LIMITS if token == "limits" else _TEXT if token.endswith("s") else _PLAIN
                self._parts.append((part, int(token[:-1]) if part == _TEXT else 0))
            letters.append({"limits": "q4Qd", "_": "4x"}.get(token, token))
        self._struct = struct.Struct("".join(letters))
        self._flat = not self._open_end and all(part == _PLAIN for part, _ in self._parts)
        self._names = kind.__struct_fields__[: len(self._parts) + self._open_end]

    def encode(self, request: int, message: Message) -> bytes:
        whole = self._struct.size
        if self._flat:
            fields = [getattr(message, name) for name in self._names]
            return self._struct.pack(VERSION, message.TYPE, whole, request, *fields)
        values: list[Any] = []
        left = iter([getattr(message, name) for name in self._names])
        for part, room in self._parts:
            if part == _LIMITS:
                values.extend(next(left))
            elif part == _TEXT:
                values.append(_cut(next(left), room - 1))
            else:
                values.append(next(left))
        tail = _cut(next(left), MAX_MESSAGE - whole) if self._open_end else b""
        return self._struct.pack(VERSION, message.TYPE, whole + len(tail), request, *values) + tail

    def decode(self, data: bytes) -> tuple[int, Message]:
        size = self._struct.size
        if len(data) != size and not (self._open_end and len(data) > size):
            name = self._kind.__name__.upper()
            raise ProtocolError(
                f"a message of type {self._kind.TYPE} ({name}) of {len(data)} bytes, not {size}"
            )
        for at in self._pads:
            if data[at : at + 4] != _ZERO:
                raise ProtocolError("a pad that is not zero")
        values = self._struct.unpack_from(data)
        if self._flat:
            return values[3], self._kind(*values[4:])
        fields: list[Any] = []
        at = 4
        for part, _ in self._parts:
            if part == _LIMITS:
                fields.append(Limits._make(values[at : at + 6]))
                at += 6
                continue
            fields.append(_text(values[at]) if part == _TEXT else values[at])
            at += 1
        if self._open_end:
            fields.append(_utf8(data[size:]))
        return values[3], self._kind(*fields)


def _cut(text: str, room: int) -> bytes:
    data = text.encode(errors="replace")
    return data if len(data) <= room else data[:room].decode(errors="ignore").encode()


def _text(field: bytes) -> str:
    text = field.rstrip(b"\0")
    if len(text) == len(field) or b"\0" in text:
        raise ProtocolError("a text that does not end within its field, or has something after its end")
    return _utf8(text)


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(f"a text that is not UTF-8: {error}") from None


_CODECS = {kind.TYPE: _Codec(kind) for kind in Message.__subclasses__()}
