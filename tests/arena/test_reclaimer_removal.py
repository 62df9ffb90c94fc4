"""How callbacks go: they are let go of without a lock, so what they own may call back."""

from __future__ import annotations

import gc
import threading

import pytest

import torch_elastic_mem as tem
from tests.arena.watch import EXTENT, MiB, Pair
from tests.rungs import Rung
from torch_elastic_mem.errors import OutOfMemory

pytestmark = pytest.mark.timeout(30)


def test_a_removed_one_is_not_asked(rung: Rung) -> None:
    pair = Pair(rung)
    handle = pair.training.on_reclaim(pair.give)
    handle.remove()
    handle.remove()
    with pytest.raises(OutOfMemory):
        pair.new.grow(EXTENT)


def test_one_may_remove_itself_while_it_runs(rung: Rung) -> None:
    pair = Pair(rung)

    def once(nbytes: int, timeout: float) -> None:
        handle.remove()
        gc.collect()
        pair.give(nbytes, timeout)

    handle = pair.training.on_reclaim(once)
    del once
    pair.new.grow(2 * MiB)
    with pytest.raises(OutOfMemory):
        pair.new.grow(2 * MiB)


class Owner:
    """Calls back into the arena when it is let go: with a lock held there, that would hang."""

    def __init__(self, arena: tem.Arena) -> None:
        self.arena = arena
        self.gone: list[int] = []

    def __call__(self, nbytes: int, timeout: float) -> None:
        return None

    def __del__(self) -> None:
        self.gone.append(self.arena.snapshot().leased)


@pytest.mark.parametrize("way", ["remove", "close", "remove while running"])
def test_what_one_owns_may_call_back_when_it_goes(rung: Rung, way: str) -> None:
    pair = Pair(rung)
    owner = Owner(pair.arena)
    gone = owner.gone
    account = pair.arena.account("owner", "idle") if way == "close" else pair.training
    handle = account.on_reclaim(owner)
    if way == "remove while running":
        account.on_reclaim(lambda nbytes, timeout: handle.remove(), rung="evict")
        account.on_reclaim(pair.give, rung="pause")
    del owner
    if way == "remove":
        handle.remove()
    elif way == "close":
        account.close()
    else:
        pair.new.grow(2 * MiB)
    assert gone == [16 * MiB] if way != "remove while running" else len(gone) == 1


def test_closing_an_account_does_not_wait_for_the_interpreter(rung: Rung) -> None:
    pair = Pair(rung)
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            assert pair.training.held >= 0

    looker = threading.Thread(target=look)
    looker.start()
    try:
        for i in range(50):
            account = pair.arena.account(f"short {i}", "idle")
            account.on_reclaim(lambda nbytes, timeout: None)
            account.close()
    finally:
        stop.set()
        looker.join()
