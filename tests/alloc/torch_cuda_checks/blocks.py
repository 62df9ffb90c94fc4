"""Allocating and freeing."""

from __future__ import annotations

import gc
import random
import threading

import torch
import torch.utils.dlpack

from .harness import SIZES, MiB, check, clean, private, raises, tensor


@check
def empty_tensors_need_no_memory() -> None:
    before = torch.cuda.memory_allocated()
    assert tensor(0).data_ptr() == 0
    assert torch.cuda.memory_allocated() == before


@check
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


@check
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


@check
def cudnn_tries_its_algorithms() -> None:
    torch.backends.cudnn.benchmark = True
    conv = torch.nn.Conv2d(16, 32, 3, padding=1).cuda()
    image = torch.randn(4, 16, 64, 64, device="cuda", requires_grad=True)
    conv(image).sum().backward()
    assert image.grad is not None and bool(image.grad.isfinite().all())


@check
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


@check
def a_caching_allocator_that_is_off_asks_the_driver() -> None:
    before = torch.cuda.memory_allocated()
    torch.cuda.caching_allocator_enable(False)
    held = tensor(MiB)
    assert torch.cuda.memory_allocated() == before
    torch.cuda.caching_allocator_enable(True)
    assert held.fill_(2).sum().item() == 2 * MiB
    del held


@check
def blocks_start_where_kernels_may_assume_it() -> None:
    held = [tensor(size) for size in SIZES for _ in range(3)]
    assert all(each.data_ptr() % 512 == 0 for each in held)


@check
def a_freed_block_serves_the_next_request_of_its_stream_at_once() -> None:
    clean()
    for size in (MiB + 1, 10 * MiB, 100 * MiB):
        held = tensor(size)
        address = held.data_ptr()
        del held
        held = tensor(size)
        assert held.data_ptr() == address, size
        del held
    reserved = torch.cuda.memory_reserved()
    for size in SIZES:
        for _ in range(50):
            tensor(size)
    assert torch.cuda.memory_reserved() <= reserved + 16 * MiB


@check
def a_view_keeps_the_whole_block() -> None:
    before = torch.cuda.memory_allocated()
    held = tensor(10 * MiB)
    view = held[MiB : 2 * MiB]
    del held
    assert torch.cuda.memory_allocated() == before + 10 * MiB
    del view
    assert torch.cuda.memory_allocated() == before


@check
def a_storage_may_be_emptied_and_filled_again() -> None:
    before = torch.cuda.memory_allocated()
    held = torch.ones(10 * MiB, dtype=torch.uint8, device="cuda")
    held.untyped_storage().resize_(0)
    assert torch.cuda.memory_allocated() == before
    held.untyped_storage().resize_(10 * MiB)
    assert torch.cuda.memory_allocated() == before + 10 * MiB
    assert held.fill_(1).sum().item() == 10 * MiB


@check
def a_block_lives_as_long_as_what_was_made_of_it_by_dlpack() -> None:
    before = torch.cuda.memory_allocated()
    held = torch.ones(3 * MiB, device="cuda")
    other = torch.utils.dlpack.from_dlpack(held)
    del held
    assert torch.cuda.memory_allocated() == before + 12 * MiB
    assert other.sum().item() == 3 * MiB
    del other
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@check
def raw_blocks_may_be_for_a_stream() -> None:
    side = torch.cuda.Stream()
    before = torch.cuda.memory_allocated()
    block = torch.cuda.caching_allocator_alloc(MiB, stream=side)
    streams = {each["stream"] for each in torch.cuda.memory_snapshot() if each["allocated_size"]}
    assert side.cuda_stream in streams
    torch.cuda.caching_allocator_delete(block)
    assert torch.cuda.memory_allocated() == before


@check
def workspaces_of_cublas_are_blocks_too() -> None:
    private._cuda_clearCublasWorkspaces()
    held = torch.ones(64, 64, device="cuda")
    before = torch.cuda.memory_allocated()
    assert (held @ held).sum().item() == 64**3
    assert torch.cuda.memory_allocated() > before
    private._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() == before


@check
def blocks_of_random_sizes_never_overlap() -> None:
    chance = random.Random(123)
    held: list[tuple[int, torch.Tensor]] = []
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")

    def free() -> None:
        value, block = held.pop(chance.randrange(len(held)))
        wrong.add_((block != value).sum())

    for turn in range(3000):
        size = int(2 ** chance.uniform(0, 22))
        held.append((turn, torch.full((size,), turn, dtype=torch.int32, device="cuda")))
        while len(held) > 150 or (held and chance.random() < 0.4):
            free()
        if chance.random() < 0.01:
            torch.cuda.empty_cache()
    while held:
        free()
    assert wrong.item() == 0


@check
def arithmetic_on_threads_of_their_own_streams_is_right() -> None:
    weight = torch.ones(512, 512, device="cuda")
    torch.cuda.synchronize()
    sums: list[float] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            result = torch.ones(512, 512, device="cuda")
            for _ in range(100):
                result = (result @ weight).div_(512)
            sums.append(result.sum().item())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums == [512 * 512.0] * 4
