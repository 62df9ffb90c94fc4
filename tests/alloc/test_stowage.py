"""Torch memory that is put away as a whole: what was kept is back, at the same addresses."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

import torch_elastic_mem as tem
from tests.rungs import Rung
from torch_elastic_mem.stowage import Stowage

MiB = 1 << 20
PRESSING = tem.PriorityClass("pressing", 10**6)


class Model:
    """A small network in a stowage, on the host."""

    def __init__(self, account: tem.Account) -> None:
        self.stowage = Stowage(account, "weights")
        with self.stowage.allocations():
            self.net = torch.nn.Sequential(torch.nn.Linear(700, 900), torch.nn.Linear(900, 3))
        self.net.requires_grad_(False)
        self.x = torch.ones(2, 700)

    def __call__(self) -> torch.Tensor:
        return self.net(self.x).clone()

    def addresses(self) -> list[int]:
        return [each.data_ptr() for each in self.net.parameters()]


@pytest.fixture
def arena() -> Iterator[tem.Arena]:
    with tem.Arena("host", capacity=64 * MiB, broker=None) as made:
        yield made


@pytest.fixture
def model(arena: tem.Arena) -> Iterator[Model]:
    account = arena.account("engine", "serving")
    made = Model(account)
    yield made
    made.stowage.bring_back()
    del made.net
    gc.collect()
    made.stowage.close()
    arena.collect()
    account.close()


def test_a_model_computes_the_same_when_it_is_back(arena: tem.Arena, model: Model) -> None:
    before, addresses = model(), model.addresses()
    for _ in range(2):
        model.stowage.put_away(keep=True)
        assert (model.stowage.away, arena.snapshot().leased) == (True, 0)
        with arena.account("neighbour", PRESSING) as other:
            # What others write meanwhile is none of the model's.
            memory = other.range(arena.capacity)
            memory.grow(arena.capacity)
            memory.close()
            arena.collect()
        model.stowage.bring_back()
        assert model.addresses() == addresses
        assert torch.equal(model(), before)


def test_what_is_not_kept_is_not_copied_and_can_be_loaded_anew(model: Model) -> None:
    before = model()
    weights = {name: each.clone() for name, each in model.net.state_dict().items()}
    model.stowage.put_away(keep=False)
    assert model.stowage._saved == []
    model.stowage.bring_back()
    model.net.load_state_dict(weights)
    assert torch.equal(model(), before)


def test_its_bytes_are_those_that_bringing_it_back_takes(model: Model) -> None:
    awake = model.stowage.resident_bytes
    assert model.stowage.bytes == awake > 700 * 900 * 4
    model.stowage.put_away(keep=True)
    assert (model.stowage.bytes, model.stowage.resident_bytes) == (awake, 0)


def test_a_refusal_leaves_it_away_with_what_was_kept(arena: tem.Arena, model: Model) -> None:
    before = model()
    model.stowage.put_away(keep=True)
    with arena.account("neighbour", PRESSING) as other:
        memory = other.range(arena.capacity)
        memory.grow(arena.capacity)
        with pytest.raises(tem.OutOfMemory, match="neighbour"):
            model.stowage.bring_back(0.01)
        assert (model.stowage.away, model.stowage.resident_bytes) == (True, 0)
        memory.close()
        arena.collect()
    model.stowage.bring_back()
    assert torch.equal(model(), before)


def test_what_came_free_before_is_neither_kept_nor_brought_back(model: Model) -> None:
    with model.stowage.allocations():
        transient = torch.ones(8 * MiB)
    awake = model.stowage.bytes
    del transient
    model.stowage.put_away(keep=True)
    assert model.stowage.bytes <= awake - 32 * MiB
    assert sum(data.numel() for _, data in model.stowage._saved) == model.stowage.bytes


def test_what_comes_free_between_saving_and_going_has_a_place_when_it_is_back(model: Model) -> None:
    before = model()
    with model.stowage.allocations():
        transient = torch.ones(8 * MiB)
    model.stowage.save()
    del transient
    model.stowage.put_away(keep=True)
    model.stowage.bring_back()
    assert torch.equal(model(), before)


def test_other_memory_of_the_account_stays(arena: tem.Arena, model: Model) -> None:
    account = model.stowage._account
    memory = account.range(4 * MiB)
    memory.grow(4 * MiB)
    model.stowage.put_away(keep=True)
    assert account.held == 4 * MiB
    memory.close()


def test_bytes_survive_on_every_rung(rung: Rung) -> None:
    arena = rung.arena(64 * MiB)
    account = arena.account("engine")
    stowage = Stowage(account, "weights")
    heap = stowage._heap
    sizes = (100, 5 * MiB, 70 << 10)
    blocks = {heap.allocate(nbytes, 0): bytes([nbytes % 251]) * nbytes for nbytes in sizes}
    for block, data in blocks.items():
        rung.write(block, data)
    stowage.put_away(keep=True)
    assert account.held == 0
    stowage.bring_back()
    assert all(rung.read(block, len(data)) == data for block, data in blocks.items())
    for block in blocks:
        heap.free(block)
    stowage.close()
    arena.collect()
    account.close()


@pytest.mark.rungs("cuda")
def test_with_torchs_own_allocator_a_model_and_a_graph_over_it_are_as_they_were(rung: Rung) -> None:
    arena = rung.arena(1 << 30)
    account = arena.account("engine", "serving")
    stowage = Stowage(account, "weights")
    reserved = torch.cuda.memory_reserved()
    with stowage.allocations():
        net = torch.nn.Sequential(torch.nn.Linear(2048, 4096), torch.nn.Linear(4096, 512)).cuda()
        transient = torch.ones(64 * MiB, device="cuda")
        del transient
    assert account.held >= sum(each.nbytes for each in net.parameters())
    # What came free within the block has gone with the pool, and is the account's to give.
    torch.cuda.synchronize()
    account.trim()
    assert account.held < 64 * MiB * 4
    net.requires_grad_(False)
    x = torch.randn(16, 2048, device="cuda")
    net(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = net(x)
    graph.replay()
    before, addresses = result.clone(), [each.data_ptr() for each in net.parameters()]
    free, _ = torch.cuda.mem_get_info()
    for _ in range(2):
        stowage.put_away(keep=True)
        assert account.held == 0
        assert torch.cuda.mem_get_info()[0] > free
        stowage.bring_back()
        result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(result, before) and torch.equal(net(x), before)
        assert [each.data_ptr() for each in net.parameters()] == addresses
    del graph, result, net
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved + 64 * MiB
    stowage.close()
    arena.collect()
    account.close()
