from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torch_elastic_mem as tem


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("4096", 4096),
        ("17B", 17),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("3MB", 3_000_000),
        ("2MiB", 2 << 20),
        ("40GiB", 40 << 30),
        ("40 gib", 40 << 30),
        (" 1.5 GB ", 1_500_000_000),
        ("1.5GiB", 3 << 29),
        ("0.1KiB", 102),
        ("2TB", 2 * 10**12),
        ("1TiB", 1 << 40),
        (0, 0),
        (1 << 62, 1 << 62),
    ],
)
def test_sizes_are_read(text: int | str, count: int) -> None:
    assert tem.parse_bytes(text) == count


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "GiB",
        "-1",
        "-1GiB",
        "1,5GB",
        "1e9",
        "4 GiB GiB",
        "4PiB",
        "4G",
        "0x10",
        "1.GiB",
        "٤GiB",
        "nan",
        "9" * 5000,
        "9000000TiB",
        -1,
        2**63,
        True,
        1.5,
        None,
        b"4GiB",
    ],
)
def test_what_is_no_size_is_refused(bad: object) -> None:
    with pytest.raises(tem.InvalidArgument, match="is not a size") as raised:
        tem.parse_bytes(bad)  # type: ignore[arg-type]
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (17, "17 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (3 << 19, "1.50 MiB"),
        (40 << 30, "40 GiB"),
        (1 << 40, "1 TiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_are_written(count: int, text: str) -> None:
    assert tem.format_bytes(count) == text


def test_a_negative_size_is_not_written() -> None:
    with pytest.raises(tem.InvalidArgument, match="negative"):
        tem.format_bytes(-1)


@given(st.integers(0, 2**62))
def test_what_is_written_reads_back_to_two_decimals(count: int) -> None:
    assert abs(tem.parse_bytes(tem.format_bytes(count)) - count) <= count * 0.005 + 1


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_an_invalid_argument(text: str) -> None:
    with contextlib.suppress(tem.InvalidArgument):
        assert tem.parse_bytes(text) >= 0
