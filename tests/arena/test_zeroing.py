"""What one tenant wrote is never read by another, and nobody's own memory is lost."""

from __future__ import annotations

import pytest

from tests.arena.watch import MiB, calls, filled, kept_idle
from tests.rungs import FakeRung, Rung

SECRET = b"secret" * 1000


def spoil(rung: Rung, address: int, nbytes: int) -> None:
    for offset in range(0, nbytes, MiB):
        rung.write(address + offset, SECRET)


def assert_zeros(rung: Rung, address: int, nbytes: int) -> None:
    for offset in range(0, nbytes, MiB):
        assert rung.read(address + offset, len(SECRET)) == bytes(len(SECRET)), f"at {offset}"


def test_memory_that_another_account_yields_reads_as_zeros(rung: Rung) -> None:
    arena = rung.arena(8 * MiB)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    old = filled(training, 8 * MiB, keep=8 * MiB)
    spoil(rung, old.address, 8 * MiB)
    old.shrink(8 * MiB)
    new = filled(serving, 8 * MiB)
    assert_zeros(rung, new.address, 8 * MiB)


def test_memory_from_the_warm_reserve_reads_as_zeros(rung: Rung) -> None:
    arena = rung.arena(16 * MiB, reserve=(0, 8 * MiB))
    first = arena.account("first")
    memory = filled(first, 8 * MiB)
    spoil(rung, memory.address, 8 * MiB)
    memory.close()
    first.close()
    second = filled(arena.account("second"), 16 * MiB)
    assert_zeros(rung, second.address, 16 * MiB)


def test_another_range_of_the_same_account_is_another_tenant(rung: Rung) -> None:
    arena = rung.arena(8 * MiB, reserve=(0, 6 * MiB))
    account = arena.account("a")
    old = filled(account, 8 * MiB)
    spoil(rung, old.address, 8 * MiB)
    old.close()
    new = filled(account, 8 * MiB)
    assert_zeros(rung, new.address, 8 * MiB)


def test_a_mix_of_own_fresh_and_foreign_memory_reads_as_zeros_where_it_is_foreign(rung: Rung) -> None:
    arena = rung.arena(12 * MiB)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    new = filled(serving, 4 * MiB)
    spoil(rung, new.address, 4 * MiB)
    old = filled(training, 4 * MiB, keep=4 * MiB)
    spoil(rung, old.address, 4 * MiB)
    old.shrink(4 * MiB)
    wide = filled(serving, 8 * MiB)
    assert_zeros(rung, wide.address, 8 * MiB)
    assert rung.read(new.address, len(SECRET)) == SECRET, "nobody's live memory is touched"


def test_own_idle_memory_keeps_its_contents_while_nobody_needs_it(rung: Rung) -> None:
    memory = filled(rung.arena().account("a"), 8 * MiB, keep=8 * MiB)
    spoil(rung, memory.address, 8 * MiB)
    memory.shrink(8 * MiB)
    memory.grow(8 * MiB)
    for offset in range(0, 8 * MiB, MiB):
        assert rung.read(memory.address + offset, len(SECRET)) == SECRET


def test_live_memory_is_never_zeroed_by_growth_beside_it(rung: Rung) -> None:
    arena = rung.arena(16 * MiB)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    new = serving.range(16 * MiB)
    new.grow(4 * MiB)
    spoil(rung, new.address, 4 * MiB)
    old = kept_idle(training, 12 * MiB)
    new.grow(12 * MiB)
    assert old.resident == 0
    assert rung.read(new.address + 3 * MiB, len(SECRET)) == SECRET
    assert_zeros(rung, new.address + 4 * MiB, 12 * MiB)


@pytest.mark.rungs("fake")
def test_zeroing_runs_in_the_order_of_the_stream_it_was_given(rung: FakeRung) -> None:
    arena = rung.arena(8 * MiB)
    training, serving = arena.account("training", "training"), arena.account("serving", "serving")
    old = filled(training, 4 * MiB, keep=4 * MiB)
    spoil(rung, old.address, 4 * MiB)
    old.shrink(4 * MiB)
    stream = rung.stream()
    stream.submit()
    new = filled(serving, 8 * MiB, stream=stream.handle)
    stream.complete()
    assert_zeros(rung, new.address, 8 * MiB)


@pytest.mark.rungs("fake")
def test_fresh_and_own_memory_costs_no_memset(rung: FakeRung) -> None:
    names = ("cuMemsetD8Async", "cuMemsetD32Async", "cuMemsetD8", "cuMemsetD32")
    before = [calls(rung, name) for name in names]
    memory = filled(rung.arena().account("a"), 32 * MiB, keep=32 * MiB)
    memory.shrink(32 * MiB)
    memory.grow(32 * MiB)
    assert [calls(rung, name) for name in names] == before
