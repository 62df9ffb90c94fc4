"""A member's connection to the broker that keeps what is shared."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from pathlib import Path

import msgspec

from torch_elastic_mem import _C
from torch_elastic_mem.broker import paths
from torch_elastic_mem.broker.share_messages import (
    BATCH,
    MAX_MESSAGE,
    Answer,
    Attach,
    Extents,
    Fetch,
    Leave,
    Publish,
    Request,
    decode_answer,
    encode,
    raise_refusal,
)
from torch_elastic_mem.errors import BrokerError, DriverError

# Seconds for an answer, and between two tries where too much is on its way.
_PATIENCE = 10.0
_AGAIN = 0.001


def shares_socket(broker: str) -> Path:
    """The socket beside the tenants' one.

    Args:
        broker: the path of the tenants' socket; "auto" as for an `Arena`.

    Raises:
        BrokerError: there is to be none.
    """
    if broker != "auto":
        return Path(broker).with_name("shares.sock")
    tenants = paths.tenants_socket(os.environ)
    if tenants is None:
        raise BrokerError(f"{paths.BROKER} says that there is no broker, and memory is shared through one")
    return tenants.with_name("shares.sock")


def process_name() -> str:
    """What this process calls itself."""
    return os.environ.get("TEM_NAME") or Path(sys.argv[0] if sys.argv else "").name or "python"


class ShareLink:
    """One connection, for one share. Not thread-safe.

    Args:
        path: of the shares' socket.

    Raises:
        BrokerError: nobody answers there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._deadline = 0.0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_PATIENCE)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            raise BrokerError(
                f"no broker keeps shared memory at {path} ({error.strerror or error}): start one with "
                f"`tem serve`, or say where it is by {paths.BROKER}"
            ) from None

    def publish(self, memory: _C.BlockRange, name: str, account: str, device: str, header: int) -> None:
        """Gives all extents of a range to the broker. This process is a member then.

        Args:
            memory: fully held.
            name: of the share.
            account: whose the memory is.
            device: its UUID, or HOST.
            header: a descriptor.

        Raises:
            TemError: the broker says no; nothing is shared.
        """
        extents = memory.extents()
        wanted = Publish(name, device, account, process_name(), sum(extents), len(extents))
        self._ask(wanted, [header])
        for first in range(0, len(extents), BATCH):
            self._begin()
            while code := memory.send_extents(self._socket.fileno(), encode(Extents()), first, BATCH):
                if code not in (errno.EAGAIN, errno.ETOOMANYREFS):
                    raise BrokerError(f"{self._path}: the broker is gone: {os.strerror(code)}")
                self._pause()
            self._answer()

    def attach(self, name: str, device: str) -> tuple[int, int]:
        """Becomes a member.

        Returns:
            A descriptor of the header, the caller's to close, and how many extents there are.

        Raises:
            TemError: the broker says no.
        """
        answer, fds = self._ask(Attach(name, device, process_name()), [])
        if len(fds) != 1:
            for each in fds:
                os.close(each)
            raise BrokerError(f"{self._path}: it sent {len(fds)} headers for '{name}'")
        return fds[0], answer.extents

    def fetch(self, memory: _C.Attached, count: int) -> None:
        """Maps all extents of the share.

        Raises:
            TemError: the broker says no, is gone, or the driver refuses.
        """
        self._begin()
        while memory.mapped < count:
            self._send(Fetch(memory.mapped), [])
            before = memory.mapped
            answer = self._decoded(memory.receive(self._socket.fileno(), self._left()))
            if answer.later:
                self._pause()
            elif memory.mapped == before:
                raise DriverError(f"{self._path}: no extent came, of {count - before} that are missing", 0)
            else:
                self._begin()

    def hand_over(self, memory: _C.Attached) -> None:
        """From now on the membership ends when the memory is unmapped."""
        memory.farewell(self._socket.fileno(), encode(Leave()))
        self._socket.close()

    def leave(self) -> None:
        """Ends the membership: nothing is mapped."""
        # A broker that is gone keeps nothing.
        with contextlib.suppress(OSError):
            self._socket.send(encode(Leave()))
        self._socket.close()

    def _begin(self) -> None:
        self._deadline = time.monotonic() + _PATIENCE

    def _left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _pause(self) -> None:
        if not self._left():
            raise BrokerError(
                f"{self._path}: the broker has not taken or sent extents for {_PATIENCE:g} seconds"
            )
        time.sleep(_AGAIN)

    def _send(self, request: Request, fds: list[int]) -> None:
        try:
            if fds:
                socket.send_fds(self._socket, [encode(request)], fds)
            else:
                self._socket.send(encode(request))
        except OSError as error:
            # It may have said why before it hung up.
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise BrokerError(f"{self._path}: {error}") from None

    def _answer(self) -> tuple[Answer, list[int]]:
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, MAX_MESSAGE, 1, socket.MSG_CMSG_CLOEXEC)
        except OSError as error:
            raise BrokerError(f"{self._path}: the broker does not answer: {error}") from None
        return self._decoded(data), fds

    def _ask(self, request: Request, fds: list[int]) -> tuple[Answer, list[int]]:
        self._send(request, fds)
        return self._answer()

    def _decoded(self, data: bytes) -> Answer:
        if not data:
            raise BrokerError(f"{self._path}: the broker is gone, or does not answer")
        try:
            answer = decode_answer(data)
        except msgspec.DecodeError as error:
            raise BrokerError(f"{self._path}: the broker's answer makes no sense: {error}") from None
        raise_refusal(answer)
        return answer
