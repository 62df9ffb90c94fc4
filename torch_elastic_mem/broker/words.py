"""Why a demand was denied: what was asked, what was free, who holds the rest, what to do."""

from __future__ import annotations

from torch_elastic_mem.broker.accounts import Accounts
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.need import Queued
from torch_elastic_mem.broker.protocol import RUNGS
from torch_elastic_mem.units import format_bytes


def wish(holder: Holder, bytes: int) -> str:
    """What was asked."""
    return f"account '{holder.title}' asks for {format_bytes(bytes)}"


def above_max(holder: Holder, bytes: int) -> str:
    """It is more than the account may have."""
    return (
        f"{wish(holder, bytes)}; it holds {format_bytes(holder.lease)} of its max "
        f"{format_bytes(holder.limits.max)}; free some of its own, or raise its max"
    )


def above_capacity(holder: Holder, bytes: int, most: int, device: str, accounts: Accounts) -> str:
    """It is more than the device can ever give it."""
    return (
        f"{wish(holder, bytes)} and holds {format_bytes(holder.lease)}; an account of its class can have "
        f"{format_bytes(max(0, most))} of {device} ({accounts.ledger.holders()}); ask for less"
    )


def in_debt(holder: Holder, bytes: int, owed: int) -> str:
    """Its process is late with an answer."""
    return (
        f"{wish(holder, bytes)}, but its process was asked for {format_bytes(owed)} and has not answered in "
        f"time; it is granted nothing until it has: `tem top` shows whether it does, and else end it"
    )


def too_late(queued: Queued, device: str, accounts: Accounts, now: float) -> str:
    """The memory has not come in time."""
    ledger = accounts.ledger
    tried = "only free memory counted" if queued.top < 0 else f"others were asked up to '{RUNGS[queued.top]}'"
    free = f"{format_bytes(ledger.free)} of {format_bytes(ledger.leasable)} on {device} is free"
    return (
        f"{wish(queued.holder, queued.bytes)}; {free} after {max(0.0, now - queued.start):.3g} s, {tried} "
        f"({ledger.holders()}); wait longer, allow a dearer rung, or lower what another account may hold"
    )
