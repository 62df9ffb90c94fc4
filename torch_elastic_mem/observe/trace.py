"""Events as a trace in Chrome's JSON format, which ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch_elastic_mem.broker.state import Event, MachineState

# What takes time, and so is a slice; the rest are moments.
_SLICES = {"grant": "granted", "deny": "denied", "yield": "gave"}

_Owner = tuple[str, int, str]


def chrome_trace(events: Iterable[Event], state: MachineState) -> dict[str, Any]:
    """A trace of what moved memory.

    A process of the trace is a process of the machine, and a track is an account: slices for grants, denials
    and yields, marks for what takes no time, an arrow from each yield to the grant or denial of who needed
    it. A counter for each account follows its lease by grants and yields. What an account returns unasked is
    no event: only the last point, which is the state's, is sure to be the lease itself.

    Args:
        events: oldest first.
        state: of the same broker, taken after the last event.

    Returns:
        What is to be written as JSON. Times are microseconds of CLOCK_MONOTONIC.
    """
    happened = list(events)
    tracks = _Tracks(state)
    made: list[dict[str, Any]] = []
    places: dict[int, tuple[int, int]] = {}
    for event in happened:
        places[event.seq] = tracks.place(event)
        made.append(_shown(event, *places[event.seq]))
    made += _arrows(happened, places)
    made += _counters(happened, state)
    return {"displayTimeUnit": "ms", "traceEvents": [*tracks.names(), *made]}


class _Tracks:
    """Gives each account a track, and another one beside it where two of its slices overlap."""

    def __init__(self, state: MachineState) -> None:
        self._processes = {
            account.pid: account.process for device in state.devices for account in device.accounts
        }
        self._labels = {device.uuid: device.label for device in state.devices}
        self._ends: dict[tuple[_Owner, int], tuple[int, int]] = {}

    def place(self, event: Event) -> tuple[int, int]:
        """The process and the track of an event."""
        owner, lane = (event.device, event.pid, event.account), 0
        while True:
            # A track that is not there yet has ended before everything.
            track, end = self._ends.get((owner, lane), (len(self._ends) + 1, 0))
            if end <= event.start_ns or event.kind not in _SLICES:
                break
            lane += 1
        if event.kind in _SLICES:
            end = event.start_ns + event.duration_ns
        self._ends[owner, lane] = track, end
        return event.pid, track

    def names(self) -> list[dict[str, Any]]:
        """Names of the processes and tracks that were given out."""
        made = [
            _named("process_name", pid, 0, self._processes.get(pid) or f"process {pid}")
            for pid in sorted({owner[1] for owner, _ in self._ends})
        ]
        for ((device, pid, account), lane), (track, _) in self._ends.items():
            again = f" ({lane + 1})" if lane else ""
            label = self._labels.get(device) or device
            made.append(_named("thread_name", pid, track, f"{account} on {label}{again}"))
        return made


def _named(what: str, pid: int, track: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": track, "args": {"name": name}}


def _shown(event: Event, pid: int, track: int) -> dict[str, Any]:
    details = {"seq": event.seq, "device": event.device, "bytes": event.bytes}
    if event.kind == "yield":
        details |= {"asked": event.asked, "rung": event.rung, "demander": event.demander}
    shown: dict[str, Any] = {
        "name": _SLICES.get(event.kind, event.kind),
        "cat": event.kind,
        "pid": pid,
        "tid": track,
        "ts": event.start_ns / 1e3,
        "args": details,
    }
    if event.kind in _SLICES:
        return shown | {"ph": "X", "dur": event.duration_ns / 1e3}
    return shown | {"ph": "i", "s": "t"}


def _arrows(events: list[Event], places: dict[int, tuple[int, int]]) -> list[dict[str, Any]]:
    """From the end of each yield into what came of the demand that it was for."""
    made: list[dict[str, Any]] = []
    # Backwards, so that what is known of a demander is what came of its next demand.
    outcomes: dict[tuple[str, str], Event] = {}
    for event in reversed(events):
        if event.kind in ("grant", "deny"):
            outcomes[event.device, f"{event.account}/{event.pid}"] = event
        outcome = outcomes.get((event.device, event.demander)) if event.kind == "yield" else None
        if outcome:
            given = event.start_ns + event.duration_ns
            used = min(max(given, outcome.start_ns), outcome.start_ns + outcome.duration_ns)
            arrow = {"name": "demand", "cat": "flow", "id": event.seq}
            (pid, track), (to_pid, to_track) = places[event.seq], places[outcome.seq]
            made.append({**arrow, "ph": "s", "pid": pid, "tid": track, "ts": given / 1e3})
            made.append({**arrow, "ph": "f", "bp": "e", "pid": to_pid, "tid": to_track, "ts": used / 1e3})
    return made


def _counters(events: list[Event], state: MachineState) -> list[dict[str, Any]]:
    leases: dict[_Owner, int] = {}
    made: list[dict[str, Any]] = []
    now = 0
    for event in events:
        owner, now = (event.device, event.pid, event.account), event.start_ns + event.duration_ns
        lease = leases.get(owner, 0)
        if event.kind in ("leave", "dead"):
            lease = 0
        elif event.kind in ("grant", "yield"):
            lease = max(0, lease + (event.bytes if event.kind == "grant" else -event.bytes))
        else:
            continue
        leases[owner] = lease
        made.append(_counter(owner, now, lease))
    for device in state.devices:
        for account in device.accounts:
            owner = device.uuid, account.pid, account.name
            if owner in leases:
                made.append(_counter(owner, now, account.lease))
    return made


def _counter(owner: _Owner, at: int, lease: int) -> dict[str, Any]:
    device, pid, account = owner
    return {
        "ph": "C",
        "name": f"lease of {account} on {device}",
        "pid": pid,
        "ts": at / 1e3,
        "args": {"bytes": lease},
    }
