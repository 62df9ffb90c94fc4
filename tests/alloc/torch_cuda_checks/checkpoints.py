"""Checkpoints of private pools, as graph trees take and restore them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .harness import KiB, MiB, check, clean, graph_of, pools, private, tensor

PoolId = tuple[int, ...]


def ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8, device="cuda")


def live(pool: PoolId) -> list[tuple[int, int, str]]:
    """The blocks of a pool that are not free, by address."""
    blocks = [
        (block["address"], block["size"], block["state"])
        for each in torch.cuda.memory_snapshot()
        if tuple(each["segment_pool_id"]) == pool
        for block in each["blocks"]
    ]
    return sorted(block for block in blocks if block[2] != "inactive")


def totals(pool: PoolId) -> list[tuple[Any, ...]]:
    fields = ("address", "total_size", "allocated_size", "active_size", "segment_type", "stream")
    segments = [each for each in torch.cuda.memory_snapshot() if tuple(each["segment_pool_id"]) == pool]
    return sorted(tuple(each[field] for field in fields) for each in segments)


def restore(
    state: Any, gone: Sequence[torch.UntypedStorage] = (), back: Sequence[torch.UntypedStorage] = ()
) -> None:
    """`gone`: storages that the checkpoint does not know; `back`: those that shall own its blocks."""
    private._cuda_setCheckpointPoolState(
        0, state, [each._cdata for each in gone], [each._cdata for each in back]
    )


def unowned(held: torch.Tensor) -> torch.UntypedStorage:
    """A storage of the same bytes, which frees nothing."""
    storage = held.untyped_storage()
    made: torch.UntypedStorage = private._construct_storage_from_data_pointer(
        storage.data_ptr(), held.device, storage.nbytes()
    )
    return made


PROGRAMS: dict[str, Callable[[], Any]] = {
    "large and small": lambda: (ones(8 * MiB) + ones(8 * MiB), ones(MiB) + ones(MiB), ones(MiB)),
    "one in the middle": lambda: [ones(512) for _ in range(11)][5].add_(2),
    "two in the middle": lambda: [ones(512) for _ in range(11)][5:9:3],
    "two neighbours": lambda: [ones(512) for _ in range(11)][5:7],
    "many classes": lambda: [ones(size) for size in range(100, 64 * KiB, 3001)][::2],
}


@check
def restoring_what_is_changes_nothing() -> None:
    for name, program in PROGRAMS.items():
        graph, _outputs = graph_of(program)
        pool = tuple(graph.pool())
        before = live(pool), totals(pool)
        assert before[0], name
        restore(private._cuda_getCheckpointState(0, pool))
        assert (live(pool), totals(pool)) == before, name


@check
def blocks_made_since_are_free_again() -> None:
    graph, kept = graph_of(lambda: ones(512))
    pool = tuple(graph.pool())
    before = live(pool)
    state = private._cuda_getCheckpointState(0, pool)
    later, more = graph_of(lambda: [ones(512), ones(5 * MiB)], pool)
    assert len(live(pool)) == len(before) + 2
    restore(state, gone=[each.untyped_storage() for each in more])
    assert live(pool) == before
    del more
    assert live(pool) == before
    del later, kept


@check
def blocks_that_died_since_live_again_until_they_are_freed() -> None:
    graph, outputs = graph_of(lambda: [ones(512), ones(3 * MiB)])
    pool = tuple(graph.pool())
    before = live(pool)
    state = private._cuda_getCheckpointState(0, pool)
    addresses = [each.data_ptr() for each in outputs]
    del outputs
    assert not live(pool)
    restore(state)
    assert live(pool) == before
    for left, address in ((1, addresses[0]), (0, addresses[1])):
        private._cuda_cudaCachingAllocator_raw_delete(address)
        assert len(live(pool)) == left


@check
def blocks_are_handed_to_the_storages_that_stand_for_them() -> None:
    static = torch.ones(1, dtype=torch.uint8, device="cuda")
    graph, outputs = graph_of(lambda: [ones(2 * MiB) + static, ones(20 * MiB) + static, ones(100) + static])
    pool = tuple(graph.pool())
    graph.replay()
    state = private._cuda_getCheckpointState(0, pool)
    addresses = [each.data_ptr() for each in outputs]
    storages = [unowned(each) for each in outputs]
    del outputs
    assert not live(pool)
    static.fill_(4)
    graph.replay()
    restore(state, back=storages[:2])
    assert len(live(pool)) == 3
    view = torch.empty(0, dtype=torch.uint8, device="cuda").set_(storages[1], 0, (20 * MiB,), (1,))
    assert bool((view == 5).all())
    del view
    storages.pop(0)
    assert len(live(pool)) == 2
    storages.pop(0)
    # What no storage was given for is still there, and the caller's to free.
    storages.pop(0)
    assert [block[0] for block in live(pool)] == [addresses[2]]
    private._cuda_cudaCachingAllocator_raw_delete(addresses[2])
    assert not live(pool)


@check
def torch_may_ask_which_blocks_of_a_pool_live() -> None:
    graph, output = graph_of(lambda: ones(4))
    pool = tuple(graph.pool())

    def are(*addresses: int) -> bool:
        return bool(private._cuda_checkPoolLiveAllocations(0, pool, set(addresses)))

    address = output.data_ptr()
    assert are(address)
    assert not are(address, 0)
    assert not are()
    del output
    assert are()


@check
def a_thread_may_allocate_to_a_pool_while_others_do_not() -> None:
    graph, output = graph_of(lambda: ones(4))
    pool = tuple(graph.pool())
    del output
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        private._cuda_beginAllocateCurrentThreadToPool(0, pool)
        try:
            inside = [tensor(20 * MiB, side) for _ in range(2)]
        finally:
            private._cuda_endAllocateToPool(0, pool)
            private._cuda_releasePool(0, pool)
        outside = tensor(20 * MiB, side)
    assert {each.data_ptr() for each in inside} == {block[0] for block in live(pool)}
    assert outside.data_ptr() not in {block[0] for block in live(pool)}
    del graph, inside
    clean()
    assert pool not in pools()


@check
def checkpoints_of_a_whole_network_are_exact() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 7, stride=2),
        torch.nn.BatchNorm2d(64),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(3, 2),
        *(torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(8)),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    ).cuda()
    image = torch.randn(2, 3, 225, 225, device="cuda")
    model(image).sum().backward()
    with torch.no_grad():
        graph, output = graph_of(lambda: model(image))
        pool = tuple(graph.pool())
        before = live(pool), totals(pool)
        restore(private._cuda_getCheckpointState(0, pool))
        assert (live(pool), totals(pool)) == before
        graph.replay()
        torch.testing.assert_close(output, model(image))
