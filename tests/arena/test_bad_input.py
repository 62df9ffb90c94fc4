"""Bad input to arenas and accounts: one clear exception of the package's own, and nothing changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import torch_elastic_mem as tem
from tests.arena.watch import MiB, books, filled
from tests.rungs import FakeRung, Rung
from torch_elastic_mem.errors import (
    AdmissionError,
    DriverMissing,
    InvalidArgument,
    OutOfMemory,
    TemError,
)

ROOT = Path(__file__).resolve().parents[2]
HUGE = 2**63 - 1


@pytest.mark.parametrize("capacity", [0, -1, 1, 2**20, HUGE, 2**64, "0", "-4GiB", "lots", "", 1.5, True, []])
def test_a_capacity_that_cannot_be_right(rung: Rung, capacity: object) -> None:
    with pytest.raises(InvalidArgument) as refused:
        rung.arena(capacity)  # type: ignore[arg-type]
    assert isinstance(refused.value, TemError | ValueError)
    rung.arena(8 * MiB)


@pytest.mark.rungs("fake")
def test_a_capacity_larger_than_the_device_says_what_there_is(rung: FakeRung) -> None:
    with pytest.raises(InvalidArgument) as refused:
        rung.arena("2GiB")
    for word in ("capacity 2 GiB", "Fake CUDA Device 0 has 1 GiB", "1 GiB of it free"):
        assert word in str(refused.value)


def test_a_host_needs_a_capacity_and_not_more_than_it_has() -> None:
    with pytest.raises(InvalidArgument, match="needs a capacity"):
        tem.Arena("host")
    with pytest.raises(InvalidArgument, match="this machine has"):
        tem.Arena("host", capacity="4096TiB")


@pytest.mark.parametrize("device", ["", "tpu", "cuda:", "cuda:-1", "cuda:one", "CUDA", "host:1", "cuda:0:0"])
def test_an_unknown_device_names_the_known_ones(device: str) -> None:
    with pytest.raises(InvalidArgument, match="use 'host', 'cuda' or 'cuda:N'"):
        tem.Arena(device, capacity=8 * MiB)


@pytest.mark.parametrize("device", [None, 0, b"host", "cuda:99999999999999999999"])
def test_a_device_that_is_no_name_of_one(device: object) -> None:
    with pytest.raises(InvalidArgument):
        tem.Arena(device, capacity=8 * MiB)  # type: ignore[arg-type]


@pytest.mark.rungs("fake")
def test_a_device_that_is_not_there_says_how_many_are(rung: FakeRung) -> None:
    with pytest.raises(DriverMissing, match="no CUDA device 7: the driver shows 2"):
        rung.arena(device="cuda:7")


@pytest.mark.parametrize("timeout", [-1, -0.5, float("nan"), float("-inf"), "1", None, True])
def test_a_timeout_that_cannot_be_right(rung: Rung, timeout: object) -> None:
    with pytest.raises(InvalidArgument, match="seconds"):
        rung.arena(yield_timeout=timeout)  # type: ignore[arg-type]
    arena = rung.arena()
    account = arena.account("a")
    memory = account.range(4 * MiB)
    before = books(rung, arena)
    uses: list[Callable[[], object]] = [lambda: account.wait(0, timeout)]  # type: ignore[arg-type]
    if timeout is not None:
        uses += [
            lambda: memory.grow(2 * MiB, timeout=timeout),  # type: ignore[arg-type]
            lambda: account.set_limits(max=4 * MiB, timeout=timeout),  # type: ignore[arg-type]
            lambda: arena.set_capacity(8 * MiB, timeout=timeout),  # type: ignore[arg-type]
        ]
        for use in uses:
            with pytest.raises(InvalidArgument, match="seconds"):
                use()
    assert books(rung, arena) == before
    assert account.limits.max is None


@pytest.mark.parametrize("timeout", [0, 1e300, float("inf"), 10**15])
def test_a_timeout_may_be_nothing_or_for_ever(rung: Rung, timeout: float) -> None:
    arena = rung.arena(yield_timeout=timeout)
    memory = arena.account("a").range(4 * MiB)
    memory.grow(2 * MiB)
    memory.grow(2 * MiB, timeout=timeout)
    assert memory.mapped == 4 * MiB


@pytest.mark.parametrize("nbytes", [0, -1, 2**64, 2**63, "0", "-1GiB", "x", 2.5, None, True])
def test_a_growth_or_shrink_that_cannot_be_right(rung: Rung, nbytes: object) -> None:
    arena = rung.arena()
    account = arena.account("a")
    memory = filled(account, 4 * MiB)
    before = books(rung, arena)
    for use in (memory.grow, memory.shrink, account.range):
        with pytest.raises(InvalidArgument):
            use(nbytes)  # type: ignore[arg-type]
    assert (books(rung, arena), memory.mapped) == (before, 4 * MiB)


def test_more_than_a_range_has(rung: Rung) -> None:
    arena = rung.arena()
    memory = arena.account("a").range(8 * MiB)
    memory.grow(4 * MiB)
    for use, word in ((memory.grow, "4 MiB of its addresses are left"), (memory.shrink, "4 MiB is mapped")):
        with pytest.raises(InvalidArgument, match=word):
            use(6 * MiB)
        with pytest.raises(InvalidArgument):
            use(HUGE)
    assert memory.mapped == 4 * MiB


@pytest.mark.parametrize("nbytes", [HUGE, 2**47 + 1, "128TiB"], ids=str)
def test_more_addresses_than_there_are(rung: Rung, nbytes: int | str) -> None:
    arena = rung.arena()
    account = arena.account("a")
    before = books(rung, arena)
    # What no process can address is a mistake; what this one has no room for is the driver's to refuse.
    with pytest.raises(TemError if nbytes == "128TiB" else InvalidArgument):
        account.range(nbytes)
    assert books(rung, arena) == before


@pytest.mark.parametrize("extent", [3 * MiB, MiB, 128 * MiB, 1])
def test_an_extent_of_a_size_there_is_not(rung: Rung, extent: int) -> None:
    account = rung.arena().account("a")
    with pytest.raises(InvalidArgument, match="power of two from 2 MiB to 64 MiB"):
        account.range(8 * MiB, extent=extent)
    assert account.held == 0


def test_a_name_in_use_and_names_that_are_none(rung: Rung) -> None:
    arena = rung.arena()
    arena.account("a", "serving")
    with pytest.raises(InvalidArgument, match="'a' exists already"):
        arena.account("a", "idle")
    for name in ("", None, 3):
        with pytest.raises(InvalidArgument, match="needs a name"):
            arena.account(name)  # type: ignore[arg-type]
    assert [(a.name, a.priority) for a in arena.snapshot().accounts] == [("a", "serving")]


@pytest.mark.parametrize("priority", ["best", "", None, 100, tem.priority])
def test_an_unknown_class_names_the_known_ones(rung: Rung, priority: object) -> None:
    arena = rung.arena()
    with pytest.raises(InvalidArgument, match="priority"):
        arena.account("a", priority)  # type: ignore[arg-type]
    assert arena.snapshot().accounts == []


def test_a_min_larger_than_the_arena(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    with pytest.raises(AdmissionError, match="16 MiB of 16 MiB is not promised yet") as refused:
        arena.account("a", min=HUGE)
    assert "no account is open" in str(refused.value)
    arena.account("a", min=16 * MiB)
    with pytest.raises(AdmissionError, match=r"0 B of 16 MiB .*a holds 0 B, min 16 MiB.*lower this min"):
        arena.account("b", min=1)


@pytest.mark.parametrize("capacity", [0, -1, HUGE, 2**64, "many", None])
def test_a_new_capacity_that_cannot_be_right_changes_nothing(rung: Rung, capacity: object) -> None:
    arena = rung.arena(16 * MiB)
    memory = filled(arena.account("a"), 8 * MiB)
    before = books(rung, arena)
    with pytest.raises(InvalidArgument):
        arena.set_capacity(capacity)  # type: ignore[arg-type]
    assert (books(rung, arena), memory.mapped, arena.capacity) == (before, 8 * MiB, 16 * MiB)


def test_out_of_memory_is_pythons_own_and_no_other_error_is(rung: Rung) -> None:
    memory = rung.arena(4 * MiB).account("a").range(16 * MiB)
    with pytest.raises(MemoryError) as refused:
        memory.grow(16 * MiB)
    assert isinstance(refused.value, OutOfMemory) and tem.is_out_of_memory(refused.value)
    with pytest.raises(ValueError) as invalid:
        memory.grow(0)
    assert not tem.is_out_of_memory(invalid.value)


def open_arena(library: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a process says that tries to open an arena with that driver."""
    script = (
        "import torch_elastic_mem as tem\n"
        "from torch_elastic_mem import arena\n"
        f"arena.LIBCUDA = {library!r} or arena.LIBCUDA\n"
        "try:\n"
        "    tem.Arena('cuda', capacity=8 << 20)\n"
        "except tem.TemError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"FAKE_CUDA_VERSION": "11080"}, "version 11.8; 12.0 or newer is needed"),
        ({"FAKE_CUDA_NO_VMM": "1"}, "device 0 does not support virtual memory management"),
        ({"FAKE_CUDA_DEVICES": "0"}, "CUDA_ERROR_NO_DEVICE (100)"),
    ],
)
def test_a_driver_that_will_not_do_is_missing(
    fake_library: Path, environment: dict[str, str], words: str
) -> None:
    done = open_arena(str(fake_library), **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DriverMissing ") and words in done.stdout


@pytest.mark.parametrize("library", ["/nowhere/libcuda.so.1", "libc.so.6", "/etc/hostname"])
def test_a_library_that_is_no_driver_is_named(library: str) -> None:
    done = open_arena(library)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DriverMissing ") and library in done.stdout
