"""`account.allocations()` on the host: torch's own tensors, drawn from the arena."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

import torch_elastic_mem as tem

MiB = 1 << 20


@pytest.fixture
def arena() -> Iterator[tem.Arena]:
    with tem.Arena("host", capacity=64 * MiB) as made:
        yield made


@pytest.fixture
def account(arena: tem.Arena) -> Iterator[tem.Account]:
    with arena.account("training") as made:
        yield made
        gc.collect()


def live(account: tem.Account) -> int:
    return account.allocator().live_bytes


def test_tensors_within_the_scope_are_charged_and_no_others(account: tem.Account) -> None:
    before = torch.ones(MiB)
    with account.allocations():
        within = torch.ones(MiB)
    after = torch.ones(MiB)
    assert live(account) == within.nbytes <= account.held
    assert torch.equal(before, within)
    assert torch.equal(after, within)
    del within
    assert live(account) == 0


def test_the_scope_is_this_threads_alone(account: tem.Account) -> None:
    made: list[torch.Tensor] = []
    with account.allocations():
        thread = threading.Thread(target=lambda: made.append(torch.ones(MiB)))
        thread.start()
        thread.join()
        assert live(account) == 0


def test_scopes_nest_and_end_with_an_exception(arena: tem.Arena, account: tem.Account) -> None:
    with arena.account("inner") as inner:
        with account.allocations():
            with inner.allocations():
                a = torch.ones(MiB)
            with pytest.raises(ZeroDivisionError), inner.allocations():
                raise ZeroDivisionError
            b = torch.ones(MiB // 2)
        assert (live(inner), live(account)) == (a.nbytes, b.nbytes)
        del a, b


def test_two_threads_that_enter_at_once_share_one_allocator(account: tem.Account) -> None:
    barrier = threading.Barrier(4)
    made = []

    def enter() -> None:
        barrier.wait()
        made.append(account.allocator())

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, made))) == 1


def test_tensors_outlive_the_scope_and_the_account_waits_for_them(account: tem.Account) -> None:
    with account.allocations():
        x = torch.arange(1000)
    assert int(x.sum()) == 499500
    with pytest.raises(tem.InUseError, match=r"1 live blocks of .* delete their tensors first"):
        account.close()
    with account.allocations():
        y = x + 1
    assert int(y[-1]) == 1000
    del x, y
    account.close()
    account.close()


def test_a_closed_accounts_scope_allocates_nothing(account: tem.Account) -> None:
    with account.allocations():
        account.close()
        with pytest.raises(RuntimeError, match=r"torch_elastic_mem: .*has been closed"):
            torch.ones(10)
    assert torch.ones(10).sum() == 10


def train(steps: int = 5) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Embedding(64, 32),
        torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
        torch.nn.LayerNorm(32),
        torch.nn.Linear(32, 64),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(64, (8, 16))
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return [*losses, *(p.detach().clone() for p in model.parameters())]


def test_training_within_the_scope_is_bit_equal_to_training_outside(account: tem.Account) -> None:
    outside = train()
    with account.allocations():
        within = train()
    assert live(account) > 0
    assert all(torch.equal(a, b) for a, b in zip(outside, within, strict=True))
    del within
    gc.collect()
    assert live(account) == 0


def test_out_of_memory_is_torchs_and_says_who_holds_what(account: tem.Account) -> None:
    with account.allocations():
        keep = torch.ones(8 * MiB // 4)
        with pytest.raises(torch.OutOfMemoryError, match=r"'training' asked for 100 MiB .* training holds"):
            torch.empty(100 * MiB, dtype=torch.uint8)
        with pytest.raises(torch.OutOfMemoryError) as refused:
            [torch.empty(8 * MiB, dtype=torch.uint8) for _ in range(20)]
        assert tem.is_out_of_memory(refused.value)
        assert float(keep.sum()) == keep.numel()
        del refused
        gc.collect()
        again = torch.empty(40 * MiB, dtype=torch.uint8)  # what the failed ones held is there again
        del again, keep


def test_only_errors_of_memory_are_errors_of_memory() -> None:
    assert tem.is_out_of_memory(tem.OutOfMemory("full"))
    assert tem.is_out_of_memory(torch.OutOfMemoryError("full"))
    assert tem.is_out_of_memory(RuntimeError("torch_elastic_mem: out of memory: account 'a' asked for 1 GiB"))
    for other in (RuntimeError("shape"), MemoryError(), ValueError("torch_elastic_mem: out of memory")):
        assert not tem.is_out_of_memory(other)


def test_a_tensor_is_deleted_on_any_thread(account: tem.Account) -> None:
    with account.allocations():
        held = [torch.ones(1000) for _ in range(100)]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert live(account) == 0


def test_threads_that_make_and_delete_at_once_leave_nothing(account: tem.Account) -> None:
    def churn(seed: int) -> None:
        with account.allocations():
            kept: list[torch.Tensor] = []
            for i in range(200):
                kept.append(torch.full(((i * 37 + seed * 101) % 5000 + 1,), float(seed)))
                if len(kept) > 10:
                    gone = kept.pop(i % 10)
                    assert float(gone.min()) == float(gone.max()) == seed

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert live(account) == 0


def test_storages_resize_and_are_shared_with_numpy(account: tem.Account) -> None:
    with account.allocations():
        x = torch.arange(10.0)
        x.resize_(1000)
        assert torch.equal(x[:10], torch.arange(10.0))
        x.untyped_storage().resize_(40)
        assert torch.equal(x.set_(x.untyped_storage(), 0, (10,)), torch.arange(10.0))
        array = x.numpy()
        clone = x.untyped_storage().clone()
        empty = torch.empty(0)
        assert empty.sum() == 0
    del x
    assert live(account) > 0
    assert array.sum() == 45
    del array, clone, empty
    gc.collect()
    assert live(account) == 0


def test_what_the_scope_freed_goes_back_when_it_is_asked_for(arena: tem.Arena, account: tem.Account) -> None:
    with account.allocations():
        x = torch.ones(40 * MiB, dtype=torch.uint8)
    del x
    assert account.held >= 40 * MiB, "cached"
    with arena.account("serving", "serving") as serving, serving.allocations():
        y = torch.ones(50 * MiB, dtype=torch.uint8)
        assert account.held <= 14 * MiB
        del y
