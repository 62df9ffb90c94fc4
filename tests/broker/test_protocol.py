"""Messages as docs/protocol.md has them: sizes, strictness, and bytes of any kind."""

from __future__ import annotations

import contextlib
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_elastic_mem.broker.protocol import (
    MAX_MESSAGE,
    VERSION,
    Demand,
    Denied,
    Gave,
    Hello,
    Limits,
    Message,
    Open,
    ProtocolError,
    Refused,
    SetLimits,
    decode,
    encode,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"
U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
# Of at most four bytes a character, so that it fits the smallest field.
TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=3)
LIMITS = st.builds(Limits, st.integers(-(2**63), 2**63 - 1), U64, U64, U64, U64, st.floats(allow_nan=False))
FIELDS = {
    "I": U32,
    "Q": U64,
    "limits": LIMITS,
    "...": st.text(st.characters(blacklist_categories=("Cs",)), max_size=99),
}
KINDS = Message.__subclasses__()


def messages() -> st.SearchStrategy[Message]:
    def of(kind: type[Message]) -> st.SearchStrategy[Message]:
        tokens = [token for token in kind.WIRE.split() if token != "_"]
        return st.builds(kind, *(FIELDS.get(token, TEXT) for token in tokens))

    return st.one_of([of(kind) for kind in KINDS])


@given(request=U64, message=messages())
def test_a_message_comes_back_as_it_was_sent(request: int, message: Message) -> None:
    data = encode(request, message)
    assert len(data) <= MAX_MESSAGE
    assert decode(data) == (request, message)


def test_the_layout_is_that_of_the_page() -> None:
    """Every row of the page's tables, by type and name, is as long as ours."""
    sizes = {"u32": 4, "u64": 8, "i64": 8, "f64": 8}
    names = {SetLimits: "LIMITS"}
    rows = re.findall(r"^\| (\d+) \| ([A-Z]+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    ours = {kind.TYPE: kind for kind in KINDS}
    assert sorted(int(number) for number, _, _ in rows) == sorted(ours)
    for number, name, body in rows:
        kind = ours[int(number)]
        assert names.get(kind, kind.__name__.upper()) == name
        fixed = re.sub(r"then .*", "", body).replace("limits", "u64 " * 6)
        length = 16 + sum(sizes[each] for each in re.findall(r"\b[uif](?:32|64)\b", fixed))
        length += sum(int(each) for each in re.findall(r"text (\d+)", fixed))
        tokens = [token for token in kind.WIRE.split() if token != "_"]
        blank = {"I": 0, "Q": 0, "limits": Limits(0)}
        assert len(encode(1, kind(*(blank.get(token, "") for token in tokens)))) == length, name


def test_a_demand_is_these_bytes() -> None:
    data = encode(7, Demand(1, 2, 3, 4, 5, "g", 6, 8))
    header = struct.pack("<HHIQ", 1, 5, 128, 7)
    assert data == header + struct.pack("<IIQQQ", 1, 2, 3, 4, 5) + b"g".ljust(64, b"\0") + struct.pack(
        "<IIQ", 6, 0, 8
    )


def test_texts_are_cut_to_fit_and_between_characters() -> None:
    _, hello = decode(encode(1, Hello("d", "host", "ä" * 64, "p", 1, 1)))
    assert isinstance(hello, Hello) and hello.label == "ä" * 31
    _, refused = decode(encode(1, Refused(1, "ü" * 4000)))
    assert isinstance(refused, Refused) and len(refused.reason) > 2000 and set(refused.reason) == {"ü"}


def damaged(at: int, value: bytes, message: Message | None = None) -> bytes:
    data = bytearray(encode(1, message or Open("a", "c", Limits(1), 2)))
    data[at : at + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes are no message"),
        (b"x" * 15, "15 bytes are no message"),
        (damaged(0, b"\2"), "version 2; this side speaks version 1"),
        (damaged(2, b"\77"), "unknown type 63"),
        (damaged(4, b"\1"), "that says it has"),
        (encode(1, Gave(1, 0, 2, 3)) + b"x", "that says it has"),
        (damaged(16, b"a" * 64), "does not end within its field"),
        (damaged(16, b"a\0b"), "something after its end"),
        (damaged(16, b"\xff\xff"), "not UTF-8"),
        (damaged(20, b"\1", Denied(1, "x")), "pad that is not zero"),
        (struct.pack("<HHIQ", VERSION, 9, 17, 1) + b"\0", r"type 9 \(BYE\) of 17 bytes, not 16"),
        (struct.pack("<HHIQ", VERSION, 33, 5000, 1) + b"\0" * 4984, "5000 bytes"),
    ],
)
def test_what_is_no_message_is_refused_in_words(data: bytes, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        decode(data)


def test_only_another_version_is_said_to_be_one() -> None:
    for data, wrong in ((damaged(0, b"\2"), True), (damaged(2, b"\77"), False)):
        with pytest.raises(ProtocolError) as caught:
            decode(data)
        assert caught.value.wrong_version is wrong


@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(data)


@given(
    message=messages(),
    at=st.integers(0, 4095),
    value=st.binary(min_size=1, max_size=9),
    cut=st.integers(0, 4096),
)
def test_damaged_messages_are_messages_or_refused(message: Message, at: int, value: bytes, cut: int) -> None:
    data = bytearray(encode(1, message))
    at %= len(data)
    data[at : at + len(value)] = value
    try:
        number, found = decode(bytes(data[:cut]))
    except ProtocolError:
        return
    assert encode(number, found) == bytes(data[:cut])
