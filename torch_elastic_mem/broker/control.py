"""What operators say to a broker, and a client that says it: `docs/protocol.md`, "The control socket"."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import msgspec

from torch_elastic_mem.broker.state import Event, MachineState
from torch_elastic_mem.errors import AdmissionError, BrokerError, InvalidArgument, OutOfMemory, TemError

# A request is a line of at most this many bytes; an answer is a line of any length.
LARGEST_REQUEST = 64 << 10
# Events of one answer: about a megabyte, which no reader waits long for.
EVENTS_A_PAGE = 4096

_ANSWER_SECONDS = 10.0
_BROKE_OFF = "the broker at {path} closed the connection before it answered; what was asked may have happened"


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", forbid_unknown_fields=True):
    """A line to the broker."""


class StateRequest(Request, frozen=True, kw_only=True, tag="state"):
    """Asks for the whole state; answered by a `MachineState`."""


class EventsRequest(Request, frozen=True, kw_only=True, tag="events"):
    """Asks for events after number `since`; answered by a list of at most `EVENTS_A_PAGE`, oldest first."""

    since: int = 0


class LimitsRequest(Request, frozen=True, kw_only=True, tag="limits"):
    """Sets the limits given, in bytes, of accounts by name; answered by how many those are.

    `name` is an account's, "name/pid" or a class. `device` is a UUID or a label; without it, on every device.
    None for `high` or `max` is no limit; a field that is not there stays as it is.
    """

    name: str
    device: str | None = None
    min: int | msgspec.UnsetType = msgspec.UNSET
    low: int | msgspec.UnsetType = msgspec.UNSET
    high: int | msgspec.UnsetType | None = msgspec.UNSET
    max: int | msgspec.UnsetType | None = msgspec.UNSET
    weight: float | msgspec.UnsetType = msgspec.UNSET

    def limits(self) -> dict[str, int | float | None]:
        """Those that were given, by name."""
        given = {field: getattr(self, field) for field in ("min", "low", "high", "max", "weight")}
        return {field: value for field, value in given.items() if value is not msgspec.UNSET}


class PriorityRequest(Request, frozen=True, kw_only=True, tag="priority"):
    """Puts accounts into a class; answered by how many those are."""

    name: str
    priority: str


class ReclaimRequest(Request, frozen=True, kw_only=True, tag="reclaim"):
    """Asks accounts for bytes, within seconds; answered by the bytes that came."""

    name: str
    bytes: int
    timeout: float


AnyRequest = StateRequest | EventsRequest | LimitsRequest | PriorityRequest | ReclaimRequest


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line from the broker: `ok`, or `error` with one of the kinds below."""

    ok: msgspec.Raw = msgspec.Raw()
    error: str = ""
    kind: str = ""


# An error goes over the wire as the most derived of these that it is.
ERROR_KINDS: dict[str, type[TemError]] = {
    "admission": AdmissionError,
    "invalid": InvalidArgument,
    "memory": OutOfMemory,
    "refused": BrokerError,
}

_T = TypeVar("_T")


class ControlClient:
    """A connection to the broker of this machine. For one thread at a time; a context manager.

    Args:
        path: of the broker's `control.sock`.

    Raises:
        BrokerError: nobody listens there, or it may not be spoken to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(_ANSWER_SECONDS)
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise BrokerError(_no_broker(path, error)) from None
        self._lines = self._socket.makefile("rb")

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; more than once does nothing."""
        self._lines.close()
        self._socket.close()

    def state(self) -> MachineState:
        """The broker at this moment.

        Raises:
            BrokerError: it broke off, or answers what this version cannot read.
        """
        return self._ask(StateRequest(), MachineState)

    def events(self, since: int = 0) -> Iterator[Event]:
        """What has happened after event number `since`, oldest first, as far as the broker still knows it.

        Raises:
            BrokerError: as for `state`.
        """
        while page := self._ask(EventsRequest(since=since), list[Event]):
            yield from page
            since = page[-1].seq

    def set_limits(self, name: str, limits: dict[str, int | float | None], device: str | None = None) -> int:
        """Changes limits of accounts. They bring themselves under them.

        Args:
            name: of the accounts, "name/pid" for those of one process, or the name of a class.
            limits: of "min", "low", "high", "max" (bytes) and "weight" those to be changed; None is no limit.
            device: its UUID or label; every device without it.

        Returns:
            How many accounts were changed.

        Raises:
            InvalidArgument: there is no such account or device, or the limits can never be right.
            AdmissionError: a `min` that does not fit; no limit was changed.
            BrokerError: this user may not, or as for `state`.
        """
        fields = {"op": "limits", "name": name, "device": device, **limits}
        try:
            request = msgspec.convert(fields, LimitsRequest)
        except msgspec.ValidationError as error:
            raise InvalidArgument(f"limits of {name!r}: {error}") from None
        return self._ask(request, int)

    def set_priority(self, name: str, priority: str) -> int:
        """Puts accounts into another class; returns how many were changed.

        Raises:
            InvalidArgument: there is no such account or class.
            BrokerError: this user may not, or as for `state`.
        """
        return self._ask(PriorityRequest(name=name, priority=priority), int)

    def reclaim(self, name: str, count: int, timeout: float) -> int:
        """Has accounts give memory back, up every rung that they have.

        Args:
            name: as for `set_limits`.
            count: bytes, in all.
            timeout: seconds that they have for it.

        Returns:
            Bytes that came, at most rounded up to whole extents; fewer than `count` where no more could go.

        Raises:
            InvalidArgument: there is no such account.
            BrokerError: this user may not, or as for `state`.
        """
        self._socket.settimeout(timeout + _ANSWER_SECONDS)
        try:
            return self._ask(ReclaimRequest(name=name, bytes=count, timeout=timeout), int)
        finally:
            self._socket.settimeout(_ANSWER_SECONDS)

    def _ask(self, request: Request, kind: type[_T]) -> _T:
        try:
            self._socket.sendall(msgspec.json.encode(request) + b"\n")
            line = self._lines.readline()
        except TimeoutError:
            seconds = self._socket.gettimeout()
            raise BrokerError(f"the broker at {self._path} did not answer within {seconds:g} s") from None
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise BrokerError(_BROKE_OFF.format(path=self._path))
        try:
            answer = msgspec.json.decode(line, type=Answer)
            if answer.error:
                raise ERROR_KINDS.get(answer.kind, BrokerError)(answer.error)
            return msgspec.json.decode(answer.ok, type=kind)
        except msgspec.DecodeError as error:
            raise BrokerError(
                f"the broker at {self._path} answered what this version of tem cannot read ({error}); "
                "`tem doctor` shows both versions"
            ) from None


def _no_broker(path: Path, error: OSError) -> str:
    if isinstance(error, PermissionError):
        return (
            f"the broker's control socket {path} may not be opened by this user: be of its group, or run as "
            "the user of the broker"
        )
    why = "no such socket" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    mend = "start one by `tem serve`, or name its folder by TEM_RUNTIME_DIR"
    return f"no broker listens at {path} ({why}): {mend}"
