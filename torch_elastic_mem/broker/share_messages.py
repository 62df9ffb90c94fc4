"""What crosses the shares' socket, beside descriptors: one JSON object a message. See docs/protocol.md."""

from __future__ import annotations

from typing import Annotated

import msgspec

from torch_elastic_mem.errors import BrokerError, InUseError, InvalidArgument, TemError

MAX_MESSAGE = 4096
# A message takes at most 253 descriptors (SCM_MAX_FD), and the kernel bounds those of a user that are on
# their way by how many files a process may open.
BATCH = 128

_Count = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]

# Kinds of refusals on the wire, the most special first.
KINDS: tuple[tuple[str, type[TemError]], ...] = (
    ("in use", InUseError),
    ("invalid", InvalidArgument),
    ("refused", BrokerError),
)


class Request(msgspec.Struct, frozen=True, tag_field="op", tag=str.lower, forbid_unknown_fields=True):
    """What a process says."""


class Publish(Request, frozen=True):
    """Begins to share what an account of the process holds. One descriptor comes along: the header's.

    Attributes:
        name: of the share. device: UUID, or HOST. account: its name. process: what the process calls itself.
        bytes: the size. extents: how many there are.
    """

    name: str
    device: str
    account: str
    process: str
    bytes: _Count
    extents: _Count


class Extents(Request, frozen=True):
    """Descriptors of the next extents come along."""


class Attach(Request, frozen=True):
    """Makes the process a member.

    Attributes:
        name: of the share. device: UUID, or HOST. process: what the process calls itself.
    """

    name: str
    device: str
    process: str


class Fetch(Request, frozen=True):
    """Asks for descriptors of the extents from number `first` on."""

    first: _Number


class Leave(Request, frozen=True):
    """Nothing of the share is mapped any more."""


AnyRequest = Publish | Extents | Attach | Fetch | Leave


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the broker answers.

    Attributes:
        bytes: the size of the share. extents: how many it has; to EXTENTS: how many have come.
        given: descriptors that come with it. later: too many are on their way; ask again.
        error: why not. kind: of the error, a name of KINDS.
    """

    bytes: int = 0
    extents: int = 0
    given: int = 0
    later: bool = False
    error: str = ""
    kind: str = ""


encode = msgspec.json.Encoder().encode
decode_request = msgspec.json.Decoder(AnyRequest).decode
decode_answer = msgspec.json.Decoder(Answer).decode


def refusal(error: TemError) -> Answer:
    """An error as an answer; a long text is cut, so that it fits."""
    kind = next((name for name, kind in KINDS if isinstance(error, kind)), "refused")
    return Answer(error=str(error)[:1000], kind=kind)


def raise_refusal(answer: Answer) -> None:
    """An answer as the error that it is.

    Raises:
        TemError: as the broker's; nothing if it is none.
    """
    if answer.error:
        raise dict(KINDS).get(answer.kind, BrokerError)(answer.error)
