from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from tests.broker.machine import GiB, account, device, machine, serving
from torch_elastic_mem.broker.state import AccountState, DeviceState, SharedState, SharerState
from torch_elastic_mem.screen.bar import bar, parts
from torch_elastic_mem.screen.cells import (
    COLUMNS,
    account_cells,
    aligned,
    duration,
    limits,
    milliseconds,
    title,
)
from torch_elastic_mem.screen.top import picture

SIZES = st.integers(0, 100 * GiB)


def drawn(shown: RenderableType, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(of: AccountState) -> dict[str, str]:
    return dict(zip(COLUMNS, account_cells(of), strict=True))


def test_a_row_says_who_holds_what_and_how_it_yields() -> None:
    assert cells(account(high=50 * GiB, weight=2.0, state="debtor", owed=GiB)) == {
        "PID": "4711",
        "PROCESS": "train.py",
        "ACCOUNT": "fine-tune",
        "CLASS": "training",
        "HELD": "38 GiB",
        "LEASE": "40 GiB",
        "LIMITS": "min 4 GiB, high 50 GiB, weight 2",
        "YIELDS/MIN": "3",
        "SLOWEST": "12 ms",
        "STATE": "debtor, owes 1 GiB",
    }


def test_a_row_without_limits_and_yields_is_quiet() -> None:
    quiet = cells(account(min=0, recent_yields=0))
    assert (quiet["LIMITS"], quiet["YIELDS/MIN"], quiet["SLOWEST"], quiet["STATE"]) == ("-", "-", "-", "ok")


def test_a_max_of_nothing_is_a_limit() -> None:
    assert limits(account(min=0, max=0)) == "max 0 B"


def test_the_picture_has_every_fact_at_full_width() -> None:
    shown = drawn(picture(machine(device(serving(waiting=GiB), account(), queued=GiB)), 160))
    for fact in (
        "broker 0.1.0, pid 99, up 1 h 1 min: 2 clients, 17 granted, 1 denied, 4 asks",
        "NVIDIA H100 80GB HBM3",
        "GPU-6e1b3a0c-0000-4000-8000-0123456789ab",
        "chat\N{NO-BREAK SPACE}20",
        "1 GiB queued, serving waited 25% of the last 10 s",
        "ok, waits for 1 GiB",
        "min 4 GiB, max 60 GiB",
        "train.py",
        "chat/4712, 10,239 blocks: 500 in use, 1,500 cached, 48 free, 8,191 parked",
    ):
        assert fact in shown, shown


@pytest.mark.parametrize("width", [20, 40, 80, 109, 110, 300])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    for line in drawn(picture(machine(), width), width).splitlines():
        assert len(line) <= width


def test_a_machine_without_processes_says_how_one_comes() -> None:
    assert "tem run" in drawn(picture(machine(devices=[]), 100))


def test_names_of_other_processes_do_nothing_to_the_terminal_or_the_picture() -> None:
    hostile = account("[red]x[/red]\x1b[2J\n\x07", process="\x1b]0;title\x07", priority="\x9b31m")
    shown = drawn(picture(machine(device(hostile, label="\x1b[31mGPU")), 200), 200)
    assert "[red]x[/red]?[2J??" in shown
    assert all(letter.isprintable() or letter in "\n\xa0" for letter in shown)
    assert all(letter.isprintable() for line in aligned([account_cells(hostile)]) for letter in line)


@given(
    leases=st.lists(SIZES, max_size=6),
    free=SIZES,
    outside=SIZES,
    reserve=SIZES,
    width=st.integers(1, 300),
)
def test_a_bar_is_as_long_as_asked_and_its_parts_add_up(
    leases: list[int], free: int, outside: int, reserve: int, width: int
) -> None:
    of = device(
        *(account(lease=lease) for lease in leases),
        free=free,
        outside=outside,
        reserve_low=reserve,
    )
    whole = sum(part.bytes for part in parts(of))
    assert whole == sum(leases) + free + reserve + outside
    assert all(part.bytes > 0 for part in parts(of))
    assert len(bar(of, width)) == (width if whole else 0)


def test_a_device_is_named_once() -> None:
    assert title(device(uuid="HOST", label="HOST")) == title(device(uuid="HOST", label="")) == "HOST"
    assert title(device(uuid="GPU-1", label="H100")) == "H100 GPU-1"


def test_a_device_without_accounts_has_a_bar_and_no_table() -> None:
    shown = drawn(picture(machine(device()), 100), 100)
    assert "PID" not in shown and "78\N{NO-BREAK SPACE}GiB\N{NO-BREAK SPACE}shared" in shown


def test_neighbours_differ_without_colours() -> None:
    of: DeviceState = device(account("a"), account("b"))
    first, second, *_ = parts(of)
    assert first.style == second.style
    assert first.glyph != second.glyph


def test_columns_of_a_list_line_up() -> None:
    header, *rows = aligned([account_cells(account()), account_cells(serving(pid=1))])
    at = header.index("ACCOUNT")
    assert [row[at : at + 4] for row in rows] == ["fine", "chat"]
    assert rows[1].startswith("   1  serve.py")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 s"), (59.9, "59 s"), (60, "1 min 0 s"), (3671, "1 h 1 min"), (90000, "1 d 1 h")],
)
def test_a_time_is_told_by_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.00042, "0.4 ms"), (0.0123, "12 ms"), (0.999, "999 ms"), (3.14, "3.1 s")]
)
def test_a_yield_is_told_in_milliseconds(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_what_is_shared_is_shown_with_the_part_of_each_member() -> None:
    members = [
        SharerState(pid=pid, uid=1000, process=name, share=7 * GiB)
        for pid, name in ((11, "chat"), (12, "lora\x1b"))
    ]
    shared = SharedState(name="base", uid=1000, bytes=14 * GiB, members=members)
    said = drawn(picture(machine(device(account(), shared=[shared])), 160))
    assert "shared 'base', 14 GiB once: chat/11 7 GiB, lora" in said and "\x1b" not in said
