"""The picture of `tem top`."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from torch_elastic_mem.broker.state import DeviceState, MachineState, SharedState
from torch_elastic_mem.screen.bar import bar, class_style, legend
from torch_elastic_mem.screen.cells import COLUMNS, RIGHT, account_cells, blocks, headline, printable, title
from torch_elastic_mem.units import format_bytes

_STATE_STYLES = {"ok": "green", "asked": "yellow", "debtor": "bold red", "lost": "red", "dying": "red"}
# Frame and padding of a panel.
_AROUND_BAR = 6
# What a terminal that is narrower than this does without.
_CUT = {"PROCESS", "LIMITS", "SLOWEST"}
_NARROW = 110


def picture(state: MachineState, width: int) -> RenderableType:
    """The whole screen.

    Args:
        state: what to show.
        width: of the terminal, in characters.
    """
    shown: list[RenderableType] = [Text(headline(state), style="bold")]
    shown += [device_panel(device, width) for device in state.devices]
    if not state.devices:
        shown.append(Text("No process has connected yet: `tem run -- COMMAND` starts one that does.", "dim"))
    return Group(*shown)


def device_panel(device: DeviceState, width: int) -> Panel:
    """A device: its bar, what waits, and a row for each account."""
    shown: list[RenderableType] = [bar(device, max(10, width - _AROUND_BAR)), legend(device)]
    if waiting := _waiting(device):
        shown.append(Text(waiting, style="yellow"))
    shown += [Text(_shared(each), style="dim") for each in device.shared]
    if device.accounts:
        shown += ["", accounts_table(device, width)]
        if said := [line for line in map(blocks, device.accounts) if line]:
            shown += ["", *(Text(line, style="dim") for line in said)]
    return Panel(Group(*shown), title=Text(title(device)), padding=(0, 2))


def accounts_table(device: DeviceState, width: int) -> Table:
    """A row for each account, in the order of the bar."""
    columns = [name for name in COLUMNS if width >= _NARROW or name not in _CUT]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        table.add_column(
            name,
            justify="right" if name in RIGHT else "left",
            overflow="ellipsis",
            no_wrap=name != "STATE",
        )
    for account in device.accounts:
        row = []
        for name, cell in zip(COLUMNS, account_cells(account), strict=True):
            style = {
                "ACCOUNT": class_style(account.priority),
                "STATE": _STATE_STYLES.get(account.state, ""),
            }.get(name, "")
            if name in columns:
                row.append(Text(cell, style=style))
        table.add_row(*row)
    return table


def _shared(shared: SharedState) -> str:
    """What several processes have mapped, and the part that each counts for."""
    members = (f"{printable(each.process)}/{each.pid} {format_bytes(each.share)}" for each in shared.members)
    return f"shared '{printable(shared.name)}', {format_bytes(shared.bytes)} once: {', '.join(members)}"


def _waiting(device: DeviceState) -> str:
    """What is queued, and which classes had to wait lately; empty where nothing is."""
    said = [f"{format_bytes(device.queued)} queued"] if device.queued else []
    said += [
        f"{printable(name)} waited {share:.0%} of the last 10 s"
        for name, share in device.pressure.items()
        if round(share, 2)
    ]
    return ", ".join(said)
