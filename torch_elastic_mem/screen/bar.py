"""A device's memory as one bar: who holds how much of it, what is free, what is nobody's to take."""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from torch_elastic_mem.broker.state import DeviceState
from torch_elastic_mem.screen.cells import printable
from torch_elastic_mem.units import format_bytes

_CLASS_STYLES = {"idle": "cyan", "training": "blue", "serving": "yellow", "critical": "red"}


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the bar.

    Attributes:
        label: what it is.
        bytes: how large.
        style: of rich.
        glyph: one character; neighbours of one class differ in it, for those who see no colours.
    """

    label: str
    bytes: int
    style: str
    glyph: str


def class_style(priority: str) -> str:
    """The colour of a class; those that an operator has named share one."""
    return _CLASS_STYLES.get(priority, "magenta")


def parts(device: DeviceState) -> list[Part]:
    """The bar from left to right: accounts, highest class first, free, reserve, and what others have."""
    accounts = [
        Part(printable(each.name), each.lease, class_style(each.priority), "█▓"[position % 2])
        for position, each in enumerate(device.accounts)
    ]
    others = [
        Part("free", device.free, "green", "░"),
        Part("reserve", device.reserve_low, "bright_black", "▒"),
        Part("outside", device.outside, "white", "▚"),
    ]
    return [part for part in accounts + others if part.bytes]


def bar(device: DeviceState, width: int) -> Text:
    """The bar, `width` characters long."""
    found = parts(device)
    whole = max(1, sum(part.bytes for part in found))
    text, reached, drawn = Text(no_wrap=True), 0, 0
    for part in found:
        reached += part.bytes
        # By where a part ends and not by its size: rounding then never moves the right edge.
        end = round(width * reached / whole)
        text.append(part.glyph * (end - drawn), style=part.style)
        drawn = end
    return text


def legend(device: DeviceState) -> Text:
    """The parts of the bar by name and size, as it shows them."""
    text = Text()
    for part in parts(device):
        words = f"{part.glyph} {part.label} {format_bytes(part.bytes)}"
        # Lines break between parts, not within.
        text.append(words.replace(" ", "\N{NO-BREAK SPACE}"), style=part.style)
        text.append("   ")
    shared = f"of {format_bytes(device.capacity)} shared"
    if device.total != device.capacity:
        shared += f", {format_bytes(device.total)} in all"
    text.append(shared.replace(" ", "\N{NO-BREAK SPACE}"), style="dim")
    return text
