"""A stowage beside the account's other memory: put away under tensors, and back at their addresses."""

from __future__ import annotations

import gc

import torch

from torch_elastic_mem.account import Account
from torch_elastic_mem.stowage import Stowage
from torch_elastic_mem.torch_cuda import account_of_torch

from .harness import GiB, MiB, check, clean, graph_of, raises, tensor


def torchs() -> Account:
    found = account_of_torch("cuda")
    assert found is not None
    return found


def opened() -> Stowage:
    clean()
    return Stowage(torchs(), "weights")


def ended(stowage: Stowage) -> None:
    gc.collect()
    stowage.close()


@check
def a_model_in_it_computes_the_same_when_it_is_back() -> None:
    stowage = opened()
    with stowage.allocations():
        model = torch.nn.Sequential(torch.nn.Linear(2048, 4096), torch.nn.Linear(4096, 512)).cuda()
    model.requires_grad_(False)
    x = torch.randn(16, 2048, device="cuda")
    before, addresses = model(x), [each.data_ptr() for each in model.parameters()]
    for _ in range(2):
        stowage.put_away(keep=True)
        assert stowage.resident_bytes == 0
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.full((512 * MiB,), 7, dtype=torch.uint8, device="cuda")
        clean()
        stowage.bring_back()
        assert torch.equal(model(x), before)
        assert [each.data_ptr() for each in model.parameters()] == addresses
    del model
    ended(stowage)


@check
def a_graph_over_it_replays_when_it_is_back() -> None:
    stowage = opened()
    with stowage.allocations():
        stowed = [torch.randn(1024, 1024, device="cuda")]
    x = torch.randn(1024, 1024, device="cuda")
    graph, result = graph_of(lambda: torch.addmm(x, x, stowed[0]))
    graph.replay()
    before = result.clone()
    stowage.put_away(keep=True)
    stowage.bring_back()
    result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(result, before)
    stowed.clear()
    del graph, result
    ended(stowage)


@check
def its_memory_is_free_on_the_device_while_it_is_away() -> None:
    stowage = opened()
    with stowage.allocations():
        weights = [tensor(GiB) for _ in range(2)]
    awake = torchs().held
    stowage.put_away(keep=False)
    assert torchs().held <= awake - 2 * GiB
    stowage.bring_back()
    assert torchs().held == awake
    del weights
    ended(stowage)


@check
def nothing_is_allocated_in_it_while_it_is_away() -> None:
    stowage = opened()
    with stowage.allocations():
        held = tensor(3 * MiB)
    stowage.put_away(keep=False)
    with stowage.allocations(), raises(RuntimeError):
        tensor(3 * MiB)
    outside = tensor(3 * MiB)
    del held, outside
    ended(stowage)
