"""torch.cuda.MemPool."""

from __future__ import annotations

import ctypes
import gc
import threading
from typing import Any

import torch

from .harness import GiB, MiB, check, clean, graph_of, holds, pools, private, raises, tensor


@check
def a_mem_pool_keeps_to_itself() -> None:
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside = tensor(4 * MiB)
    outside = tensor(4 * MiB)
    segments = pool.snapshot()
    assert all(tuple(each["segment_pool_id"]) == pool.id for each in segments)
    assert any(
        each["address"] <= inside.data_ptr() < each["address"] + each["total_size"] for each in segments
    )
    assert not any(
        each["address"] <= outside.data_ptr() < each["address"] + each["total_size"] for each in segments
    )
    assert pool.use_count() == 1
    del inside, pool
    gc.collect()
    torch.cuda.empty_cache()
    assert all(tuple(each["segment_pool_id"]) == (0, 0) for each in torch.cuda.memory_snapshot())


@check
def a_pool_may_serve_others_before_a_refusal() -> None:
    torch.cuda.empty_cache()
    pool = torch.cuda.MemPool(use_on_oom=True)
    with torch.cuda.use_mem_pool(pool):
        inside = tensor(5 * GiB)
    del inside
    outside = tensor(5 * GiB)
    del outside, pool


@check
def a_pool_need_not_split() -> None:
    pool = torch.cuda.MemPool(no_split=True)
    with torch.cuda.use_mem_pool(pool):
        held = [tensor(3 * MiB) for _ in range(3)]
    assert len({each.data_ptr() for each in held}) == 3


@check
def a_pool_may_have_an_allocator_of_its_own() -> None:
    for make in (of_an_account, of_the_driver):
        pool = make()
        identity = tuple(pool.id)
        with torch.cuda.use_mem_pool(pool):
            held = tensor(3 * MiB).fill_(3)
            address = held.data_ptr()
            assert [each["address"] for each in pool.snapshot()] == [address]
            del held
            again = tensor(3 * MiB)
            assert again.data_ptr() == address
        again.record_stream(torch.cuda.Stream())
        del again, pool
        gc.collect()
        torch.cuda.empty_cache()  # of pools that went before their tensors, too
        assert identity not in pools()


def of_an_account() -> Any:
    """A pool with an allocator of its own, which has the account's memory."""
    from torch_elastic_mem import _C

    plug = torch.cuda.memory.CUDAPluggableAllocator(_C.__file__, "tem_cuda_alloc", "tem_cuda_free")
    return torch.cuda.MemPool(plug.allocator())


driver = ctypes.CDLL("libcuda.so.1")
from_driver: dict[int, int] = {}  # the size of what lives, by address


@ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
def driver_alloc(size: int, device: int, stream: int | None) -> int:
    address = ctypes.c_size_t()
    if driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) != 0:
        return 0
    from_driver[address.value] = size
    return address.value


@ctypes.CFUNCTYPE(None, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
def driver_free(address: int, size: int, device: int, stream: int | None) -> None:
    assert from_driver.pop(address) == size
    assert driver.cuMemFree_v2(ctypes.c_size_t(address)) == 0


def of_the_driver() -> Any:
    """A pool with an allocator of its own, in Python, whose memory is no account's."""
    functions = (ctypes.cast(each, ctypes.c_void_p).value for each in (driver_alloc, driver_free))
    return torch.cuda.MemPool(private._cuda_customAllocator(*functions))


@check
def what_another_allocator_gives_is_in_the_figures_as_with_torchs_own() -> None:
    clean()
    torch.cuda.reset_peak_memory_stats()

    def now() -> list[int]:
        stats = torch.cuda.memory_stats()
        figures = ("allocation", "allocated_bytes", "active_bytes", "requested_bytes", "segment")
        return [stats[f"{figure}.all.current"] for figure in (*figures, "reserved_bytes")]

    def grown(*by: int) -> list[int]:
        return [start + more for start, more in zip(before, by, strict=True)]

    before = now()
    pool = of_the_driver()
    with torch.cuda.use_mem_pool(pool):
        held = tensor(3 * MiB - 5)
    assert now() == grown(1, 3 * MiB, 3 * MiB, 3 * MiB - 5, 1, 3 * MiB)
    assert list(from_driver.values()) == [3 * MiB]
    assert holds(torch.cuda.memory_snapshot(), held)
    del held
    assert now() == grown(0, 0, 0, 0, 1, 3 * MiB)
    assert torch.cuda.max_memory_allocated() == before[1] + 3 * MiB
    del pool
    clean()
    assert now() == before
    assert not from_driver


@check
def what_another_allocator_has_of_the_account_is_in_the_figures_once() -> None:
    clean()
    allocated = torch.cuda.memory_allocated()
    pool = of_an_account()
    with torch.cuda.use_mem_pool(pool):
        held = tensor(3 * MiB)
    assert torch.cuda.memory_allocated() == allocated + 3 * MiB
    addresses = [each["address"] for each in torch.cuda.memory_snapshot()]
    assert len(addresses) == len(set(addresses))
    del held, pool
    clean()
    assert torch.cuda.memory_allocated() == allocated


@check
def what_a_pool_reserves_is_in_the_figures_of_torchs_that_have_it() -> None:
    pool = torch.cuda.MemPool()
    identity = tuple(pool.id)
    with torch.cuda.use_mem_pool(pool):
        held = tensor(3 * MiB)
    every = torch.cuda.memory_stats_as_nested_dict().get("reserved_bytes_by_private_pools")
    if every is None:  # before 2.13
        return
    reserved = sum(each["total_size"] for each in pool.snapshot())
    assert every[identity]["all"]["current"] == every[identity]["large_pool"]["current"] == reserved
    del held, pool
    clean()
    every = torch.cuda.memory_stats_as_nested_dict()["reserved_bytes_by_private_pools"]
    assert (every[identity]["all"]["current"], every[identity]["all"]["peak"]) == (0, reserved)


@check
def the_innermost_of_nested_pools_serves() -> None:
    outer, middle, inner = (torch.cuda.MemPool() for _ in range(3))
    held = []
    with torch.cuda.use_mem_pool(outer):
        held.append((tensor(20 * MiB), outer))
        with torch.cuda.use_mem_pool(middle):
            held.append((tensor(20 * MiB), middle))
            with torch.cuda.use_mem_pool(inner):
                held.append((tensor(20 * MiB), inner))
            held.append((tensor(20 * MiB), middle))
        held.append((tensor(20 * MiB), outer))
    for block, pool in held:
        for each in (outer, middle, inner):
            assert holds(each.snapshot(), block) == (each is pool)


@check
def the_innermost_serves_whatever_allocators_the_pools_have() -> None:
    plain, own = torch.cuda.MemPool(), of_an_account()
    for outer, inner in ((plain, own), (own, plain)):
        with torch.cuda.use_mem_pool(outer):
            with torch.cuda.use_mem_pool(inner):
                in_inner = tensor(3 * MiB)
            in_outer = tensor(3 * MiB)
        assert holds(inner.snapshot(), in_inner) and not holds(outer.snapshot(), in_inner)
        assert holds(outer.snapshot(), in_outer) and not holds(inner.snapshot(), in_outer)
        del in_inner, in_outer


@check
def a_pool_serves_the_thread_that_asked_for_it() -> None:
    made: list[tuple[torch.cuda.MemPool, torch.Tensor]] = []
    turn = threading.Barrier(4)

    def work() -> None:
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            turn.wait(20)
            made.append((pool, tensor(4 * MiB)))
            turn.wait(20)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    turn.wait(20)
    outside = tensor(4 * MiB)
    turn.wait(20)
    for thread in threads:
        thread.join()
    assert len({pool.id for pool, _ in made}) == 3
    for pool, held in made:
        assert holds(pool.snapshot(), held) and not holds(pool.snapshot(), outside)
        assert all(holds(pool.snapshot(), other) == (other is held) for _, other in made)


@check
def a_pool_counts_who_uses_it() -> None:
    pool = torch.cuda.MemPool()
    assert pool.use_count() == 1
    with torch.cuda.use_mem_pool(pool):
        assert pool.use_count() == 2
    assert pool.use_count() == 1


@check
def tensors_outlive_their_pool() -> None:
    pool = torch.cuda.MemPool()
    identity = tuple(pool.id)
    with torch.cuda.use_mem_pool(pool):
        held = torch.full((1 << 20,), 3.0, device="cuda")
    del pool
    clean()
    noise = [torch.full((1 << 20,), 9.0, device="cuda") for _ in range(8)]
    assert bool((held == 3).all())
    assert identity in pools()
    del held
    clean()
    assert identity not in pools()
    assert all(bool((each == 9).all()) for each in noise)


@check
def what_a_pool_has_free_stays_its_own_while_it_lives() -> None:
    clean()
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        inside = tensor(5 * GiB)
        address = inside.data_ptr()
        del inside
        torch.cuda.empty_cache()
    torch.cuda.empty_cache()
    assert sum(each["total_size"] for each in pool.snapshot()) >= 5 * GiB
    with raises(torch.OutOfMemoryError):
        tensor(5 * GiB)
    with torch.cuda.use_mem_pool(pool):
        assert tensor(5 * GiB).data_ptr() == address
    del pool
    clean()
    tensor(5 * GiB)
    clean()


@check
def a_pools_snapshot_is_that_of_its_id() -> None:
    pool = torch.cuda.MemPool()
    assert not pool.snapshot()
    with torch.cuda.use_mem_pool(pool):
        held = tensor(4 * MiB)
    of_pool = torch.cuda.memory_snapshot(pool.id)
    assert holds(of_pool, held)
    assert pool.snapshot() == of_pool == torch.cuda.memory_snapshot(pool.id, include_traces=False)


@check
def a_graph_may_be_captured_into_a_pool() -> None:
    pool = torch.cuda.MemPool()
    graph, result = graph_of(lambda: torch.full((1 << 20,), 3.0, device="cuda"), pool.id)
    assert holds(pool.snapshot(), result)
    graph.replay()
    assert bool((result == 3).all())
    del graph
    clean()
    assert bool((result == 3).all())
