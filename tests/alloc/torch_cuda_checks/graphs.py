"""Captures and the memory of graphs."""

from __future__ import annotations

import gc
import threading
from typing import Any

import torch

from .harness import CAPACITY, MiB, check, clean, graph_of, pools, private, raises, stat, tensor


@check
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


@check
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


@check
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


@check
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


@check
def a_tensor_keeps_its_memory_when_its_graph_has_gone() -> None:
    graph, result = graph_of(lambda: torch.full((1 << 20,), 3.0, device="cuda"))
    pool = tuple(graph.pool())
    graph.replay()
    torch.cuda.synchronize()
    del graph
    clean()
    noise = [torch.full((1 << 20,), 9.0, device="cuda") for _ in range(8)]
    assert bool((result == 3).all())
    assert pool in pools()
    del result
    clean()
    assert pool not in pools()
    assert all(bool((each == 9).all()) for each in noise)


@check
def memory_is_to_be_had_in_every_capture_mode() -> None:
    static = torch.ones(1 << 20, device="cuda")
    for mode in ("global", "thread_local", "relaxed"):
        clean()

        def work() -> torch.Tensor:
            big = torch.full((64 << 20,), 2.0, device="cuda")
            return (static * big[: 1 << 20]).sum()

        graph, result = graph_of(work, capture_error_mode=mode)
        graph.replay()
        assert result.item() == 2.0 * (1 << 20), mode


@check
def other_threads_allocate_while_one_captures() -> None:
    static = torch.ones(1 << 20, device="cuda")
    other = torch.cuda.Stream()
    failed: list[BaseException] = []

    def churn() -> None:
        try:
            with torch.cuda.stream(other):
                for turn in range(50):
                    held = torch.full((300_000 * (turn % 7 + 1),), turn, device="cuda")
                    assert bool((held == turn).all())
        except BaseException as error:  # noqa: BLE001
            failed.append(error)

    def work() -> torch.Tensor:
        middle = static * 2
        thread = threading.Thread(target=churn)
        thread.start()
        thread.join()
        return middle + 1

    churn()
    torch.cuda.synchronize()
    graph, result = graph_of(work, capture_error_mode="thread_local")
    assert not failed, failed
    graph.replay()
    assert bool((result == 3).all())


@check
def blocks_of_other_streams_may_be_freed_in_a_capture() -> None:
    static = torch.ones(1 << 20, device="cuda")
    side = torch.cuda.Stream()
    mine = [tensor(32 * MiB).fill_(7)]
    theirs = [tensor(32 * MiB, side)]
    mine[0].record_stream(side)
    theirs[0].record_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()

    def work() -> torch.Tensor:
        mine.clear()
        theirs.clear()
        return static + 1

    graph, result = graph_of(work)
    graph.replay()
    assert bool((result == 2).all())
    # An allocation looks after what was freed, and what a capture saw freed needs two looks.
    for _ in range(2):
        torch.cuda.synchronize()
        tensor(1)
    assert stat("active_bytes.all.current") == stat("allocated_bytes.all.current")


@check
def a_capture_that_forks_into_another_stream_keeps_its_blocks_apart() -> None:
    static = torch.ones(1 << 20, device="cuda")
    side = torch.cuda.Stream()

    def work() -> torch.Tensor:
        main = torch.cuda.current_stream()
        data = static * 2
        side.wait_stream(main)
        with torch.cuda.stream(side):
            part = data + 1
            data.record_stream(side)
        del data
        noise = torch.full_like(static, -1.0)
        main.wait_stream(side)
        return part + noise

    graph, result = graph_of(work)
    for value in (5.0, 7.0):
        static.fill_(value)
        graph.replay()
        assert bool((result == 2 * value).all())
    # An allocation looks after what was freed, and what a capture saw freed needs two looks.
    for _ in range(2):
        torch.cuda.synchronize()
        tensor(1)
    assert stat("active_bytes.all.current") == stat("allocated_bytes.all.current")


@check
def emptying_the_cache_spoils_no_capture() -> None:
    static = torch.ones(1 << 20, device="cuda")
    held = [tensor(200 * MiB)]

    def work() -> torch.Tensor:
        held.clear()
        middle = static + 1
        torch.cuda.empty_cache()
        return middle * 2

    graph, result = graph_of(work)
    graph.replay()
    assert bool((result == 4).all())


@check
def random_numbers_in_a_graph_are_those_without() -> None:
    graph, result = graph_of(lambda: torch.rand(1000, device="cuda"))
    torch.cuda.manual_seed(5)
    replayed = []
    for _ in range(2):
        graph.replay()
        replayed.append(result.clone())
    torch.cuda.manual_seed(5)
    for each in replayed:
        assert torch.equal(each, torch.rand(1000, device="cuda"))
    assert not torch.equal(*replayed)


@check
def libraries_have_their_workspaces_in_a_capture() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 30 * 30, 10)
    ).cuda()
    static = torch.randn(8, 3, 32, 32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad():
        with torch.cuda.stream(side):
            model(static)
        torch.cuda.current_stream().wait_stream(side)
        graph, result = graph_of(lambda: model(static))
        for _ in range(3):
            static.normal_()
            graph.replay()
            torch.testing.assert_close(result, model(static))
    pool = tuple(graph.pool())
    del graph, result
    private._cuda_clearCublasWorkspaces()
    clean()
    assert pool not in pools()


@check
def capturing_over_and_over_takes_no_more_memory() -> None:
    static = torch.ones(512, 512, device="cuda")
    reserved = []
    for _ in range(6):
        graph, result = graph_of(lambda: static @ static)
        graph.replay()
        assert result[0, 0].item() == 512
        del graph, result
        clean()
        reserved.append(torch.cuda.memory_reserved())
    assert max(reserved[2:]) <= reserved[1] + 2 * MiB, reserved


@check
def a_graph_may_be_reset_and_captured_again() -> None:
    static = torch.ones(1 << 20, device="cuda")
    graph, result = graph_of(lambda: static + 1)
    graph.replay()
    assert bool((result == 2).all())
    del result
    graph.reset()
    with torch.cuda.graph(graph):
        result = static + 2
    graph.replay()
    assert bool((result == 3).all())


@check
def two_graphs_of_a_pool_share_what_the_first_freed() -> None:
    pool = torch.cuda.graph_pool_handle()
    static = torch.ones(32 << 20, device="cuda")

    def work() -> torch.Tensor:
        return (static * 2 + 1).amax()

    clean()
    first, one = graph_of(work, pool)
    reserved = torch.cuda.memory_reserved()
    second, two = graph_of(work, pool)
    assert torch.cuda.memory_reserved() <= reserved + 4 * MiB
    for graph, result in ((first, one), (second, two)):
        graph.replay()
        assert result.item() == 3.0


@check
def an_error_in_a_capture_leaves_everything_usable() -> None:
    static = torch.ones(1 << 20, device="cuda")
    before = torch.cuda.memory_allocated()

    def wrong() -> torch.Tensor:
        _ = static + 1
        raise ValueError("mine")

    for _ in range(2):
        with raises(ValueError, "mine"):
            graph_of(wrong)
    goes_on(static, before)


@check
def a_refusal_in_a_capture_leaves_everything_usable() -> None:
    static = torch.ones(1 << 20, device="cuda")
    before = torch.cuda.memory_allocated()

    def too_much() -> torch.Tensor:
        _ = static + 1
        return tensor(2 * CAPACITY)

    for _ in range(2):
        with raises(torch.OutOfMemoryError, "CUDA out of memory. "):
            graph_of(too_much)
    goes_on(static, before)


def goes_on(static: torch.Tensor, before: int) -> None:
    clean()
    assert torch.cuda.memory_allocated() == before
    assert not torch.cuda.is_current_stream_capturing()
    assert (static * 2).sum().item() == 2.0 * (1 << 20)
    graph, result = graph_of(lambda: static * 3)
    graph.replay()
    assert bool((result == 3).all())
