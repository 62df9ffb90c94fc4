"""What the broker says about itself: values taken at one moment, detached from it. Sizes are in bytes."""

from __future__ import annotations

import msgspec


class BlocksState(msgspec.Struct, frozen=True):
    """An engine's blocks, as it last reported; together they are all of them.

    Attributes:
        in_use: requests hold them. cached: no request does, and a prefix is kept in them.
        free: they have memory, and nothing is in them. parked: they have no memory.
    """

    in_use: int
    cached: int
    free: int
    parked: int


class AccountState(msgspec.Struct, frozen=True, kw_only=True):
    """An account of a process.

    Attributes:
        pid: its process. uid: that process's user.
        process: what the process calls itself. name: the account's name within it.
        priority: the name of its class. value: the class's value; higher wins.
        lease: bytes granted to it. held: those of them in use, as it last reported. idle: the part of `held`
            that nothing lives in, likewise.
        min: never reclaimed. low: reclaimed last. high: above it, it trims itself.
        max: its own out-of-memory. weight: its share of its class.
        state: "ok", "asked" (an answer is due), "debtor" (the answer is late), "lost" (the connection is
            gone, the process lives), "dying" (the process is gone, its memory not yet seen free).
        owed: bytes that a debtor was asked for and has not answered.
        waiting: bytes of its demands that are queued.
        given: yielded since it was opened. taken: granted since then. denied: demands refused.
        recent_yields: times it gave in the last minute. slowest_yield: seconds, of those.
        blocks: of an engine; None of anybody else.
    """

    pid: int
    uid: int
    process: str
    name: str
    priority: str
    value: int
    lease: int
    held: int
    idle: int
    min: int
    low: int
    high: int | None
    max: int | None
    weight: float
    state: str
    owed: int
    waiting: int
    given: int
    taken: int
    denied: int
    recent_yields: int
    slowest_yield: float
    blocks: BlocksState | None = None


class SharerState(msgspec.Struct, frozen=True, kw_only=True):
    """A process that has shared memory mapped.

    Attributes:
        pid: its number. uid: its user. process: what it calls itself.
        share: the part of the bytes that it counts for; the shares of all add up to them.
    """

    pid: int
    uid: int
    process: str
    share: int


class SharedState(msgspec.Struct, frozen=True, kw_only=True):
    """Memory that several processes have mapped, charged once.

    Attributes:
        name: by which others attach. uid: the user whose processes may.
        bytes: its size. members: who has it, in order of arrival.
    """

    name: str
    uid: int
    bytes: int
    members: list[SharerState]


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """A device that a process has connected for, or that is configured.

    Attributes:
        uuid: as the driver has it; "HOST" for memory of the machine. label: its name for people.
        backend: "cuda" or "host".
        total: what the device has. capacity: what the ledger shares out, reserve included.
        outside: what others hold outside of the system, as the device shows.
        reserve_low: never leased. reserve_high: what the background reclaim keeps free for higher classes.
        leased: granted. free: what could still be granted. queued: bytes of demands that wait.
        pressure: by class, the part of the last 10 s in which a demand of it waited, 0 to 1.
        accounts: in order of value, highest first. What is shared is in one of them, or in "share NAME".
        shared: memory that several processes have mapped.
    """

    uuid: str
    label: str
    backend: str
    total: int
    capacity: int
    outside: int
    reserve_low: int
    reserve_high: int
    leased: int
    free: int
    queued: int
    pressure: dict[str, float]
    accounts: list[AccountState]
    shared: list[SharedState] = []


class MachineState(msgspec.Struct, frozen=True, kw_only=True):
    """A broker at one moment.

    Attributes:
        version: of the package. pid: the broker's. epoch: its own number, another for each start.
        uptime: seconds. clients: connections of tenants.
        grants: demands granted since its start. denials: refused. asks: sent to victims.
        devices: in order of their first connection.
    """

    version: str
    pid: int
    epoch: int
    uptime: float
    clients: int
    grants: int
    denials: int
    asks: int
    devices: list[DeviceState]


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that moved memory.

    Attributes:
        seq: from 1, without gaps; the broker keeps the last 65,536.
        start_ns: CLOCK_MONOTONIC, nanoseconds. duration_ns: how long it took.
        kind: "grant", "deny", "yield", "join", "leave", "dead", "limit".
        device: its UUID.
        pid: of the process that gained, gave or joined. account: its account.
        bytes: granted, given, or leased at the end.
        asked: for "yield": what was asked of it. rung: and how.
        demander: for "yield": "account/pid" of who needed it, "reserve" or "operator".
    """

    seq: int
    start_ns: int
    duration_ns: int
    kind: str
    device: str
    pid: int
    account: str
    bytes: int = 0
    asked: int = 0
    rung: str = ""
    demander: str = ""
