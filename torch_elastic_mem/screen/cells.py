"""An account in words, a cell a fact: the rows of `tem top` and `tem ls`."""

from __future__ import annotations

from torch_elastic_mem.broker.state import AccountState, DeviceState, MachineState
from torch_elastic_mem.units import format_bytes

COLUMNS = ("PID", "PROCESS", "ACCOUNT", "CLASS", "HELD", "LEASE", "LIMITS", "YIELDS/MIN", "SLOWEST", "STATE")
# Columns of numbers, which line up at their right.
RIGHT = frozenset({"PID", "HELD", "LEASE", "YIELDS/MIN", "SLOWEST"})


def account_cells(account: AccountState) -> tuple[str, ...]:
    """A text for each of `COLUMNS`."""
    return (
        str(account.pid),
        printable(account.process),
        printable(account.name),
        printable(account.priority),
        format_bytes(account.held),
        format_bytes(account.lease),
        limits(account),
        str(account.recent_yields or "-"),
        milliseconds(account.slowest_yield) if account.recent_yields else "-",
        condition(account),
    )


def blocks(account: AccountState) -> str:
    """An engine's blocks in a line; empty for anybody else."""
    of = account.blocks
    if of is None:
        return ""
    whole = of.in_use + of.cached + of.free + of.parked
    return (
        f"{printable(account.name)}/{account.pid}, {whole:,} blocks: {of.in_use:,} in use, "
        f"{of.cached:,} cached, {of.free:,} free, {of.parked:,} parked"
    )


def limits(account: AccountState) -> str:
    """The limits that say something: those that are not where they are by default."""
    said = [("min", account.min or None), ("low", account.low or None)]
    said += [("high", account.high), ("max", account.max)]
    given = [f"{name} {format_bytes(value)}" for name, value in said if value is not None]
    if account.weight != 1:
        given.append(f"weight {account.weight:g}")
    return ", ".join(given) or "-"


def condition(account: AccountState) -> str:
    """Its state, and what it waits for or owes."""
    owed = f", owes {format_bytes(account.owed)}" if account.owed else ""
    waiting = f", waits for {format_bytes(account.waiting)}" if account.waiting else ""
    return f"{printable(account.state)}{owed}{waiting}"


def milliseconds(seconds: float) -> str:
    """A time that is mostly short: "0.4 ms", "12 ms", "3.1 s"."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"


def headline(state: MachineState) -> str:
    """The broker in a line."""
    return (
        f"broker {state.version}, pid {state.pid}, up {duration(state.uptime)}: "
        f"{count(state.clients, 'client')}, {state.grants} granted, {state.denials} denied, "
        f"{count(state.asks, 'ask')}"
    )


def title(device: DeviceState) -> str:
    """A device's label, and its UUID where that says more."""
    return printable(" ".join(dict.fromkeys(filter(None, (device.label, device.uuid)))))


def count(number: int, noun: str) -> str:
    """A number and its noun, which takes an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """The two largest units of a time: "3 d 4 h", "2 min 5 s"."""
    left, parts = int(seconds), []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        whole, left = divmod(left, size)
        if whole or unit == "s":
            parts.append(f"{whole} {unit}")
    return " ".join(parts[:2])


def printable(text: str) -> str:
    """A text of another process without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """`COLUMNS` and rows as lines of text."""
    table = [COLUMNS, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if name in RIGHT else cell.ljust(width)
            for name, cell, width in zip(COLUMNS, row, widths, strict=True)
        ).rstrip()
        for row in table
    ]
