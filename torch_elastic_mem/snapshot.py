"""What an arena says about itself: values taken at one moment, detached from it."""

from __future__ import annotations

import msgspec


class AccountSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """An account at one moment. Sizes are in bytes.

    Attributes:
        name: the account's name.
        priority: the name of its priority class.
        value: the value of its class; higher wins.
        held: what it is charged for.
        lease: what a broker has granted to it; None for an arena that stands alone.
        idle: the part of `held` that nothing lives in, given back on the first demand.
        min: never reclaimed.
        low: reclaimed only when nothing else is left.
        high: above it the account trims itself; None for no such point.
        max: its own out-of-memory; None for no limit.
        weight: its share of what is left, against accounts of the same value.
        given: yielded to other accounts since it was opened.
        taken: received from other accounts' yields since it was opened.
        yields: how often it gave some.
        denied: how many of its own demands were refused.
    """

    name: str
    priority: str
    value: int
    held: int
    lease: int | None
    idle: int
    min: int
    low: int
    high: int | None
    max: int | None
    weight: float
    given: int
    taken: int
    yields: int
    denied: int


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """An arena at one moment. Sizes are in bytes.

    Attributes:
        device: the device as torch names it: "cpu" on the host backend, else "cuda:0".
        uuid: the device's UUID, the same in every process.
        broker: the socket of the broker that shares out the device; None for an arena that stands alone.
        capacity: what accounts may hold together, reserve included.
        leased: what the ledger has granted.
        free: what it could still grant.
        reserve_low: the watermark below which the reserve is refilled.
        reserve_high: the watermark up to which it is refilled.
        spare: extents created and mapped nowhere.
        limbo: extents waiting for the fence of their release.
        created: physical memory held, mapped or not.
        lost: physical memory that the driver refused to take back.
        faults: driver calls that failed while memory was given back; it is tried again.
        last_fault: what the last of them said.
        accounts: the open accounts, in order of opening.
    """

    device: str
    uuid: str
    broker: str | None
    capacity: int
    leased: int
    free: int
    reserve_low: int
    reserve_high: int
    spare: int
    limbo: int
    created: int
    lost: int
    faults: int
    last_fault: str
    accounts: list[AccountSnapshot]


class YieldRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One account giving memory to another.

    Attributes:
        seq: number of the record, from 1, without gaps.
        start_ns: when it was asked for, by CLOCK_MONOTONIC, in nanoseconds.
        duration_ns: how long the demander waited for it, in nanoseconds.
        demander: the account that needed the memory.
        victim: the account that gave it.
        rung: how: "trim", "evict", "spill", "shrink" or "pause".
        asked: bytes asked of the victim.
        given: bytes it gave.
    """

    seq: int
    start_ns: int
    duration_ns: int
    demander: str
    victim: str
    rung: str
    asked: int
    given: int
