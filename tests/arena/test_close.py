"""The end of things, in any order: what is in use or closed says so, and a forked child is dead."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import torch_elastic_mem as tem
from tests.arena.watch import MiB, comes_true, filled, kept_idle
from tests.rungs import FakeRung, Rung
from torch_elastic_mem.account import Reclaimer
from torch_elastic_mem.errors import ClosedError, InUseError

ROOT = Path(__file__).resolve().parents[2]


def test_accounts_and_arenas_in_use_stay_open_and_say_by_whom(rung: Rung) -> None:
    arena = rung.arena()
    account = arena.account("tenant")
    memory = filled(account, 4 * MiB)
    with pytest.raises(InUseError, match="'tenant' still has a range of 4 MiB of tenant; close it first"):
        account.close()
    with pytest.raises(InUseError, match="open accounts: tenant holds 4 MiB; close their tensors"):
        arena.close()
    memory.shrink(2 * MiB)
    memory.close()
    account.close()
    arena.close()


def test_an_arena_stays_open_while_a_tensor_lives(rung: Rung) -> None:
    import torch

    arena = rung.arena()
    account = arena.account("tenant")
    kv = tem.ElasticKVTensor(account, 64, (64, 1024), torch.float32)
    kv.ensure([0, 1])
    tensor = kv.tensor
    del kv
    gc.collect()
    with pytest.raises(InUseError):
        account.close()
    with pytest.raises(InUseError):
        arena.close()
    tensor[0].fill_(1.0)
    assert tensor[0].sum() == 64 * 1024
    del tensor
    gc.collect()
    assert comes_true(lambda: account.held == 0)
    account.close()
    arena.close()


def test_closing_twice_is_harmless(rung: Rung) -> None:
    arena = rung.arena()
    account = arena.account("a")
    memory = filled(account, 2 * MiB)
    for closing in (memory, account, arena):
        closing.close()
        closing.close()


def test_what_is_closed_says_so(rung: Rung) -> None:
    arena = rung.arena()
    account = arena.account("a")
    memory = filled(account, 2 * MiB)
    memory.close()
    with pytest.raises(ClosedError, match="closed"):
        memory.grow(2 * MiB)
    account.close()
    for use in (
        lambda: account.held,
        account.room,
        account.trim,
        lambda: account.range(2 * MiB),
        lambda: account.wait(0, 0.0),
        lambda: account.set_limits(max=2),
        lambda: account.on_reclaim(lambda nbytes, timeout: None),
    ):
        with pytest.raises(ClosedError, match="the account has been closed"):
            use()
    arena.close()
    for use in (
        arena.snapshot,
        arena.collect,
        arena.refill,
        arena.yields,
        lambda: arena.capacity,
        lambda: arena.account("b"),
        lambda: arena.set_capacity(4 * MiB),
        lambda: arena.set_reserve(0, 0),
        lambda: account.held,
    ):
        with pytest.raises(ClosedError, match="the arena has been closed"):
            use()


def test_an_arena_gives_everything_back_when_it_closes(rung: Rung) -> None:
    arena = rung.arena(32 * MiB, reserve=(0, 8 * MiB))
    account = arena.account("a")
    idle = kept_idle(account, 8 * MiB)
    idle.close()
    account.close()
    arena.close()
    if isinstance(rung, FakeRung):
        assert rung.live()[:2] == rung.before[:2]


@pytest.mark.rungs("fake")
def test_a_device_has_one_open_arena(rung: FakeRung) -> None:
    arena = rung.arena()
    with pytest.raises(InUseError, match="has an open arena in this process; share it, or close it"):
        rung.arena()
    other = rung.arena(device="cuda:1")
    assert other.uuid != arena.uuid
    arena.close()
    again = rung.arena()
    assert (again.device, other.device) == ("cuda:0", "cuda:1")


def test_any_number_of_host_arenas_may_be_open(rung: Rung) -> None:
    first, second = (tem.Arena("host", capacity=8 * MiB) for _ in range(2))
    held = filled(first.account("a"), 8 * MiB)
    assert second.snapshot().free == held.mapped


def test_references_may_go_in_any_order(rung: Rung) -> None:
    for order in itertools.permutations(["arena", "account", "memory", "reclaimer"]):
        arena = tem.Arena(rung.device, capacity=16 * MiB, reserve=(0, 4 * MiB))
        account = arena.account("a")
        core = account._core
        alive: dict[str, object] = {
            "arena": arena,
            "account": account,
            "memory": filled(account, 8 * MiB, keep=4 * MiB),
            "reclaimer": Reclaimer(core, core.add_reclaimer("evict", lambda nbytes, timeout: None)),
        }
        del arena, account, core
        for name in order:
            del alive[name]
        gc.collect()
        if isinstance(rung, FakeRung):
            assert comes_true(lambda: rung.live() == rung.before), order


def test_references_may_go_while_a_fence_is_pending(rung: Rung) -> None:
    stream = rung.stream()
    arena = tem.Arena(rung.device, capacity=16 * MiB, reserve=(0, 0))
    account = arena.account("a")
    memory = filled(account, 4 * MiB, stream=stream.handle)
    address = memory.address
    stream.submit()
    del memory
    rung.write(address, b"the device may still write")
    stream.complete()
    del arena, account
    gc.collect()
    if isinstance(rung, FakeRung):
        assert comes_true(lambda: rung.live() == rung.before)


FORK = """
import gc, os, sys, threading
import torch_elastic_mem as tem
from torch_elastic_mem import arena as arena_module
if {library!r}:
    arena_module.LIBCUDA = {library!r}
MiB = 1 << 20
arena = tem.Arena({device!r}, capacity=32 * MiB, reserve=(0, 4 * MiB))
account = arena.account("a")
memory = account.range(16 * MiB, keep=4 * MiB)
memory.grow(8 * MiB)
memory.shrink(4 * MiB)
handle = account.on_reclaim(lambda nbytes, timeout: None)
before = arena.snapshot()
child = os.fork()
if child == 0:
    uses = [
        lambda: arena.snapshot(), lambda: arena.collect(), lambda: arena.refill(), lambda: arena.yields(),
        lambda: arena.capacity, lambda: arena.account("b"), lambda: arena.set_capacity(4 * MiB),
        lambda: arena.set_reserve(0, 0), lambda: arena.close(), lambda: account.held, lambda: account.room(),
        lambda: account.trim(), lambda: account.wait(1, 1.0), lambda: account.set_limits(max=2 * MiB),
        lambda: account.on_reclaim(print), lambda: account.range(4 * MiB), lambda: account.close(),
        lambda: memory.grow(2 * MiB), lambda: memory.shrink(2 * MiB), lambda: memory.resident,
        lambda: handle.remove(),
    ]
    for number, use in enumerate(uses):
        try:
            use()
        except tem.ForkedError as error:
            assert "before fork()" in str(error) and "spawn" in str(error), error
        else:
            os._exit(100 + number)
    memory.close()
    del arena, account, memory, handle, uses, use
    gc.collect()
    fresh = tem.Arena("host", capacity=8 * MiB)
    inside = fresh.account("child").range(4 * MiB)
    inside.grow(4 * MiB)
    sys.exit(0)
_, status = os.waitpid(child, 0)
code = os.waitstatus_to_exitcode(status)
assert code == 0, f"the child ended with {{code}}"
after = arena.snapshot()
assert (after.leased, after.accounts) == (before.leased, before.accounts)
memory.grow(8 * MiB)
memory.close()
account.close()
arena.close()
print("parent well")
"""


def test_in_a_forked_child_every_call_says_so_and_the_parent_is_not_disturbed(
    rung: Rung, request: pytest.FixtureRequest
) -> None:
    if rung.name == "cuda":
        pytest.skip("the driver itself forbids the child")
    library = str(request.getfixturevalue("fake_library")) if rung.name == "fake" else ""
    script = textwrap.dedent(FORK).format(library=library, device=rung.device)
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout.strip()) == (0, "parent well"), done.stderr


EXIT = """
import torch_elastic_mem as tem
from torch_elastic_mem import arena as arena_module
if {library!r}:
    arena_module.LIBCUDA = {library!r}
arena = tem.Arena({device!r}, capacity=32 << 20, reserve=(0, 4 << 20))
account = arena.account("a")
account.on_reclaim(lambda nbytes, timeout: account.trim())
memory = account.range(16 << 20, keep=4 << 20)
memory.grow(8 << 20)
print("well")
"""


def test_a_process_may_end_with_everything_open(rung: Rung, request: pytest.FixtureRequest) -> None:
    library = str(request.getfixturevalue("fake_library")) if rung.name == "fake" else ""
    done = subprocess.run(
        [sys.executable, "-c", EXIT.format(library=library, device=rung.device)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "well", "")
