"""Checks of torch over an account's memory, run as a program of their own.

torch takes one CUDA allocator a process, and importing it takes seconds, so a group of checks shares one:
`python torch_cuda_checks.py GROUP` installs the allocator, runs the group and prints a line of JSON a check.
The group "native" installs nothing and prints what torch's own allocator answers.
"""

from __future__ import annotations

import gc
import json
import pickle
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

import torch_elastic_mem as tem

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
CAPACITY = 8 * GiB
SIZES = (
    1,
    511,
    512,
    513,
    4 * KiB,
    100_000,
    MiB - 1,
    MiB,
    MiB + 1,
    3 * MiB,
    10 * MiB,
    20 * MiB + 1,
    100 * MiB,
)

Check = Callable[[], None]
GROUPS: dict[str, list[Check]] = {}
native: dict[str, Any] = {}


def group(name: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        GROUPS.setdefault(name, []).append(check)
        return check

    return add


def tensor(size: int, stream: torch.cuda.Stream | None = None) -> torch.Tensor:
    with torch.cuda.stream(stream):
        return torch.empty(size, dtype=torch.uint8, device="cuda")


def allocated_by_size() -> list[int]:
    growth = []
    for size in SIZES:
        before = torch.cuda.memory_allocated()
        held = tensor(size)
        growth.append(torch.cuda.memory_allocated() - before)
        del held
    return growth


def answers() -> dict[str, Any]:
    """What must be the same whichever allocator torch has."""
    return {"keys": sorted(torch.cuda.memory_stats()), "allocated": allocated_by_size()}


@contextmanager
def raises(kind: type[BaseException], *words: str) -> Iterator[None]:
    try:
        yield
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in {error}"
    else:
        raise AssertionError(f"no {kind.__name__}")


# What is counted


@group("figures")
def the_backend_has_our_name() -> None:
    assert torch.cuda.get_allocator_backend() == "torch_elastic_mem"


@group("figures")
def memory_stats_have_the_keys_of_torchs_own_allocator() -> None:
    assert answers()["keys"] == native["keys"]


@group("figures")
def sizes_are_rounded_as_by_torchs_own_allocator() -> None:
    assert answers()["allocated"] == native["allocated"]


@group("figures")
def peaks_and_sums_start_over_when_told_to() -> None:
    held = tensor(10 * MiB)
    del held
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    held = tensor(4 * MiB)
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()
    torch.cuda.reset_accumulated_memory_stats()
    del held
    stats = torch.cuda.memory_stats()
    assert stats["allocated_bytes.all.allocated"] == 0
    assert stats["allocated_bytes.all.freed"] == 4 * MiB
    assert stats["allocated_bytes.large_pool.freed"] == 4 * MiB


@group("figures")
def the_summary_is_printed() -> None:
    assert "Allocated memory" in torch.cuda.memory_summary()
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total


@group("figures")
def emptying_the_cache_gives_memory_back() -> None:
    held = tensor(200 * MiB)
    del held
    assert torch.cuda.memory_reserved() >= 200 * MiB
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= torch.cuda.memory_allocated() + 8 * MiB


# Allocating and freeing


@group("blocks")
def empty_tensors_need_no_memory() -> None:
    before = torch.cuda.memory_allocated()
    assert tensor(0).data_ptr() == 0
    assert torch.cuda.memory_allocated() == before


@group("blocks")
def raw_blocks_come_and_go() -> None:
    before = torch.cuda.memory_allocated()
    block = torch.cuda.caching_allocator_alloc(3 * MiB)
    assert torch.cuda.memory_allocated() == before + 3 * MiB
    torch.cuda.caching_allocator_delete(block)
    assert torch.cuda.memory_allocated() == before
    with raises(RuntimeError, "invalid device pointer"):
        torch.cuda.caching_allocator_delete(block)
    with raises(RuntimeError, "invalid device pointer"):
        torch.cuda.caching_allocator_delete(0x1000)


@group("blocks")
def a_block_used_on_another_stream_waits_for_it() -> None:
    side = torch.cuda.Stream()
    held = tensor(32 * MiB).fill_(0)  # a kernel's first launch waits for all that runs
    torch.cuda.synchronize()
    address = held.data_ptr()
    with torch.cuda.stream(side):
        torch.cuda._sleep(1_000_000_000)
        held.fill_(1)
    held.record_stream(side)
    del held
    other = tensor(32 * MiB)
    assert other.data_ptr() != address
    stats = torch.cuda.memory_stats()
    assert stats["active_bytes.all.current"] >= stats["allocated_bytes.all.current"] + 32 * MiB
    side.synchronize()
    again = [tensor(32 * MiB) for _ in range(2)]
    assert address in [each.data_ptr() for each in again]


@group("blocks")
def a_refusal_is_torchs_and_says_who_holds_what() -> None:
    seen: list[tuple[int, ...]] = []
    private: Any = torch._C
    private._cuda_attach_out_of_memory_observer(lambda *figures: seen.append(figures))
    ooms = torch.cuda.memory_stats()["num_ooms"]
    with raises(torch.OutOfMemoryError, "CUDA out of memory. ", "training"):
        tensor(2 * CAPACITY)
    assert torch.cuda.memory_stats()["num_ooms"] == ooms + 1
    ((device, wanted, total, free),) = seen
    assert device == 0
    assert wanted == 2 * CAPACITY
    assert 0 < free <= total
    assert tensor(MiB).fill_(1).sum().item() == MiB


@group("blocks")
def the_cache_is_given_up_before_a_request_is_refused() -> None:
    small = [tensor(100 * MiB) for _ in range(60)]
    del small
    whole = tensor(7 * GiB)
    del whole
    torch.cuda.empty_cache()


@group("blocks")
def a_fraction_of_the_device_is_the_most() -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(GiB / total)
    assert abs(torch.cuda.get_per_process_memory_fraction() - GiB / total) < 1e-6
    try:
        with raises(torch.OutOfMemoryError):
            tensor(2 * GiB)
        tensor(GiB // 2)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    tensor(2 * GiB)


@group("blocks")
def cudnn_tries_its_algorithms() -> None:
    torch.backends.cudnn.benchmark = True
    conv = torch.nn.Conv2d(16, 32, 3, padding=1).cuda()
    image = torch.randn(4, 16, 64, 64, device="cuda", requires_grad=True)
    conv(image).sum().backward()
    assert image.grad is not None and bool(image.grad.isfinite().all())


@group("blocks")
def threads_allocate_and_free_each_others_blocks() -> None:
    before = torch.cuda.memory_allocated()
    shelf: list[tuple[int, torch.Tensor]] = []
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(200):
                    value = seed * 7 + turn % 5
                    held = torch.full((((seed + turn) % 13 + 1) * 50_000,), value, device="cuda")
                    torch.cuda.current_stream().synchronize()
                    shelf.append((value, held))
                    if len(shelf) > 20:
                        wanted, other = shelf.pop(0)
                        assert bool((other == wanted).all())
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    shelf.clear()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@group("blocks")
def a_caching_allocator_that_is_off_asks_the_driver() -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.caching_allocator_enable(False)
    held = tensor(MiB)
    assert torch.cuda.memory_allocated() == before
    torch.cuda.caching_allocator_enable(True)
    assert held.fill_(2).sum().item() == 2 * MiB
    del held


# History


@contextmanager
def recording(**options: Any) -> Iterator[None]:
    torch.cuda.memory._record_memory_history(**options)
    try:
        yield
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def actions(snapshot: dict[str, Any]) -> list[str]:
    return [entry["action"] for entry in snapshot["device_traces"][0]]


@group("history")
def a_snapshot_tiles_each_segment_with_blocks() -> None:
    held = [tensor(size) for size in SIZES]
    segments = torch.cuda.memory_snapshot()
    assert sum(each["total_size"] for each in segments) == torch.cuda.memory_reserved()
    assert sum(each["allocated_size"] for each in segments) == torch.cuda.memory_allocated()
    for segment in segments:
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    live = {block["address"] for each in segments for block in each["blocks"] if block["state"] != "inactive"}
    assert {each.data_ptr() for each in held} <= live


@group("history")
def the_trace_has_stacks() -> None:
    with recording():
        held = tensor(3 * MiB)
        address = held.data_ptr()
        snapshot = torch.cuda.memory._snapshot()
        del held
        after = torch.cuda.memory._snapshot()
    blocks = [block for each in snapshot["segments"] for block in each["blocks"]]
    (mine,) = [block for block in blocks if block["address"] == address]
    assert any(frame["filename"].endswith("torch_cuda_checks.py") for frame in mine["frames"])
    of_mine = [each for each in after["device_traces"][0] if each["addr"] == address]
    assert [each["action"] for each in of_mine] == ["alloc", "free_requested", "free_completed"]
    assert all(each["size"] == 3 * MiB and each["frames"] for each in of_mine)
    assert not actions(torch.cuda.memory._snapshot())


@group("history")
def maps_and_refusals_are_in_the_trace() -> None:
    torch.cuda.empty_cache()
    with recording(context="alloc"):
        held = tensor(500 * MiB)
        del held
        torch.cuda.empty_cache()
        with raises(torch.OutOfMemoryError):
            tensor(2 * CAPACITY)
        seen = actions(torch.cuda.memory._snapshot())
    assert {"segment_map", "segment_unmap", "oom", "alloc"} <= set(seen), seen


@group("history")
def the_ring_forgets_the_oldest() -> None:
    with recording(max_entries=5):
        for size in range(1, 20):
            tensor(size * KiB)
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
    assert len(trace) == 5
    assert trace[-1]["size"] == 19 * KiB


@group("history")
def the_viewer_renders() -> None:
    from torch.cuda import _memory_viz

    with recording():
        held = [tensor(size) for size in SIZES]
        held.pop()
        snapshot = torch.cuda.memory._snapshot()
        pickle.loads(pickle.dumps(snapshot))
    assert "<html" in _memory_viz.trace_plot(snapshot).lower()
    assert "<html" in _memory_viz.segment_plot(snapshot).lower()
    assert _memory_viz.segsum(snapshot)
    assert _memory_viz.trace(snapshot)


@group("history")
def the_profiler_sees_memory() -> None:
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, cuda], profile_memory=True
    ) as seen:
        tensor(5 * MiB)
    usage = [getattr(each, "device_memory_usage", 0) for each in seen.events() or ()]
    assert max(usage) >= 5 * MiB


# Private pools


def graph_of(work: Callable[[], torch.Tensor], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = work()
    return graph, result


@group("graphs")
def graphs_that_share_a_pool_replay() -> None:
    static = torch.ones(1 << 20, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    first, one = graph_of(lambda: (static * 2 + 1).relu(), pool)
    second, two = graph_of(lambda: (one * 3).sum(), pool)
    for value in (1.0, 5.0):
        static.fill_(value)
        noise = [torch.full((1 << 20,), 9.0, device="cuda") for _ in range(4)]
        first.replay()
        second.replay()
        assert two.item() == (value * 2 + 1) * 3 * (1 << 20)
        assert all(bool((each == 9).all()) for each in noise)
    pools = {tuple(each["segment_pool_id"]) for each in torch.cuda.memory_snapshot()}
    assert pool in pools


@group("graphs")
def a_graphs_memory_goes_with_it() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graph, result = graph_of(lambda: torch.full((100 << 20,), 2.0, device="cuda").sum())
    assert torch.cuda.memory_reserved() >= before + 400 * MiB
    torch.cuda.empty_cache()
    graph.replay()
    assert result.item() == 2.0 * (100 << 20)
    del graph, result
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 8 * MiB


@group("graphs")
def callables_are_graphed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8)).cuda()
    example = torch.randn(16, 64, device="cuda", requires_grad=True)
    with torch.no_grad():  # a graph of autograd that lives would bind the capture to this stream
        plain = model(example)
    graphed: Any = torch.cuda.make_graphed_callables(model, (torch.randn_like(example, requires_grad=True),))
    for _ in range(3):
        result = graphed(example)
        torch.testing.assert_close(result, plain)
        result.sum().backward()
    gradients = [each.grad for each in model.parameters()]
    assert all(each is not None and bool(each.isfinite().all()) for each in gradients)


@group("graphs")
def a_block_freed_in_a_capture_is_used_again_there() -> None:
    static = torch.ones(1 << 22, device="cuda")

    def work() -> torch.Tensor:
        result = static
        for _ in range(20):
            result = result + 1
        return result

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    graph, result = graph_of(work)
    assert torch.cuda.memory_reserved() - before <= 5 * static.nbytes
    graph.replay()
    assert bool((result == 21).all())


@group("pools")
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


@group("pools")
def a_pool_may_serve_others_before_a_refusal() -> None:
    torch.cuda.empty_cache()
    pool = torch.cuda.MemPool(use_on_oom=True)
    with torch.cuda.use_mem_pool(pool):
        inside = tensor(5 * GiB)
    del inside
    outside = tensor(5 * GiB)
    del outside, pool


@group("pools")
def a_pool_need_not_split() -> None:
    pool = torch.cuda.MemPool(no_split=True)
    with torch.cuda.use_mem_pool(pool):
        held = [tensor(3 * MiB) for _ in range(3)]
    assert len({each.data_ptr() for each in held}) == 3


@group("pools")
def a_pool_may_have_an_allocator_of_its_own() -> None:
    from torch_elastic_mem import _C

    plug = torch.cuda.memory.CUDAPluggableAllocator(_C.__file__, "tem_cuda_alloc", "tem_cuda_free")
    pool = torch.cuda.MemPool(plug.allocator())
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
    assert all(tuple(each["segment_pool_id"]) == (0, 0) for each in torch.cuda.memory_snapshot())


# Compilation


@group("compile")
def graph_trees_train_and_infer() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).cuda()
    compiled = torch.compile(model, mode="reduce-overhead")
    for turn in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        batch = torch.randn(32, 64, device="cuda")
        loss = compiled(batch).square().mean()
        loss.backward()
        torch.testing.assert_close(loss, model(batch).square().mean(), msg=f"turn {turn}")
        model.zero_grad()


@group("compile")
def graph_trees_branch_and_go_back_to_a_checkpoint() -> None:
    @torch.compile(mode="reduce-overhead")
    def first(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).relu()

    @torch.compile(mode="reduce-overhead")
    def left(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @torch.compile(mode="reduce-overhead")
    def right(x: torch.Tensor) -> torch.Tensor:
        return x.sum(0) * 3

    x = torch.ones(256, 256, device="cuda")
    with torch.no_grad():
        for turn in range(12):
            torch.compiler.cudagraph_mark_step_begin()
            middle = first(x)
            # The branch that comes late is recorded after the other was replayed.
            end = right(middle) if turn % 3 == 2 and turn > 4 else left(middle)
            expected = 2.0 * 256 * 3 if turn % 3 == 2 and turn > 4 else 3.0
            assert bool((end == expected).all()), turn
            del middle, end


def install() -> tem.Arena:
    arena = tem.Arena("cuda", capacity=CAPACITY)
    account = arena.account("training")
    torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", account))
    return arena


def main() -> None:
    name = sys.argv[1]
    if name == "native":
        torch.cuda.init()
        print(json.dumps(answers()))
        return
    native.update(json.load(sys.stdin))
    _arena = install()
    for check in GROUPS[name]:
        failure = ""
        try:
            check()
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001
            failure = traceback.format_exc()
        print(json.dumps({"check": check.__name__, "failure": failure}), flush=True)


if __name__ == "__main__":
    main()
