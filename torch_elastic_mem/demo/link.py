"""What the process that directs the demo and the process of a tenant say to each other."""

from __future__ import annotations

from multiprocessing.connection import Connection

import msgspec

from torch_elastic_mem.demo.worker import Progress


class Message(msgspec.Struct, frozen=True, tag=True):
    """One of those below."""


class Found(Message, frozen=True, tag=True):
    """A tenant's first: the device as a broker calls it and as torch does, and the bytes free there."""

    uuid: str
    device: str
    free: int


class Open(Message, frozen=True, tag=True):
    """To a tenant: open an arena under the broker at a socket. It answers Opened."""

    broker: str
    capacity: int
    seconds: float


class Opened(Message, frozen=True, tag=True):
    """A tenant's: it may play."""


class Play(Message, frozen=True, tag=True):
    """To a tenant: as `Side.play`. It answers Ended, and so to Prove."""


class Prove(Message, frozen=True, tag=True):
    """To a tenant: as `Side.prove`."""


class Finish(Message, frozen=True, tag=True):
    """To a tenant: as `Side.finish`."""


class Cancel(Message, frozen=True, tag=True):
    """To a tenant: end at once."""


class Close(Message, frozen=True, tag=True):
    """To a tenant: close account and arena, and end. It answers Closed."""


class Look(Message, frozen=True, tag=True):
    """A tenant's, twenty times a second: the side's moment, and its progress."""

    moment: msgspec.Raw
    progress: list[Progress]


class Ended(Message, frozen=True, tag=True):
    """A tenant's: an act is over, with that outcome or proof."""

    value: msgspec.Raw


class Closed(Message, frozen=True, tag=True):
    """A tenant's last: what had not come back to the arena."""

    leaked: int


AnyMessage = Found | Open | Opened | Play | Prove | Finish | Cancel | Close | Look | Ended | Closed
_decode = msgspec.msgpack.Decoder(AnyMessage).decode


class Link:
    """One end. One thread sends and one receives.

    Args:
        descriptor: Of a stream socket, which the link owns.
    """

    def __init__(self, descriptor: int) -> None:
        self._connection = Connection(descriptor)

    def send(self, message: Message) -> None:
        """Raises OSError if the other side is gone."""
        self._connection.send_bytes(msgspec.msgpack.encode(message))

    def waits(self, seconds: float) -> bool:
        """Whether a message, or the end, is there within `seconds`."""
        return self._connection.poll(seconds)

    def receive(self) -> AnyMessage:
        """Raises EOFError or OSError if the other side is gone."""
        message: AnyMessage = _decode(self._connection.recv_bytes())
        return message

    def close(self) -> None:
        self._connection.close()
