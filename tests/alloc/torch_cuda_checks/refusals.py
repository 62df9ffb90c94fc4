"""Requests that cannot be met, and what is left afterwards."""

from __future__ import annotations

import gc
from typing import Any

import torch

from .harness import CAPACITY, LONG, GiB, MiB, check, clean, raises, tensor


@check
def a_refusal_is_torchs_and_says_who_holds_what() -> None:
    seen: list[tuple[int, ...]] = []
    private: Any = torch._C
    private._cuda_attach_out_of_memory_observer(lambda *figures: seen.append(figures))
    torch.cuda.init()  # before that there are no figures
    ooms = torch.cuda.memory_stats()["num_ooms"]
    with raises(torch.OutOfMemoryError, "CUDA out of memory. ", "training"):
        tensor(2 * CAPACITY)
    assert torch.cuda.memory_stats()["num_ooms"] == ooms + 1
    ((device, wanted, total, free),) = seen
    assert device == 0
    assert wanted == 2 * CAPACITY
    assert 0 < free <= total
    assert tensor(MiB).fill_(1).sum().item() == MiB


@check
def the_cache_is_given_up_before_a_request_is_refused() -> None:
    small = [tensor(100 * MiB) for _ in range(60)]
    del small
    whole = tensor(7 * GiB)
    del whole
    torch.cuda.empty_cache()


@check
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


@check
def more_than_there_are_addresses_is_refused_by_its_size_alone() -> None:
    with raises(torch.OutOfMemoryError, "Tried to allocate more than 1EB memory"):
        tensor(1 << 61)


@check
def a_fraction_is_kept_and_a_wrong_one_refused() -> None:
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
    for wrong in (-0.1, 2.0):
        with raises(ValueError, "Invalid fraction value"):
            torch.cuda.set_per_process_memory_fraction(wrong)
    clean()
    try:
        for fraction in (0.0, 0.25, 0.9):
            torch.cuda.set_per_process_memory_fraction(fraction)
            assert abs(torch.cuda.get_per_process_memory_fraction() - fraction) < 1e-6
        torch.cuda.set_per_process_memory_fraction(0.0)
        with raises(torch.OutOfMemoryError, "CUDA out of memory. ", "limit"):
            tensor(GiB)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.get_per_process_memory_fraction() == 1.0
    tensor(GiB)


@check
def a_refusal_disturbs_no_kernel_and_keeps_no_memory() -> None:
    held = torch.zeros(MiB, device="cuda")
    before = torch.cuda.memory_allocated()
    for turn in range(3):
        with raises(torch.OutOfMemoryError):
            _ = [tensor(GiB) for _ in range(CAPACITY // GiB + 1)]
        gc.collect()
        assert torch.cuda.memory_allocated() == before
        assert held.add_(1).sum().item() == (turn + 1) * MiB


@check
def training_goes_on_after_a_batch_that_did_not_fit() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step(rows: int) -> None:
        optimizer.zero_grad()
        model(torch.ones(rows, 1024, device="cuda")).sum().backward()
        optimizer.step()

    step(16)
    clean()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        with raises(torch.OutOfMemoryError):
            step(1_000_000)
        optimizer.zero_grad()
        step(16)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
    assert all(bool(each.isfinite().all()) for each in model.parameters())


@check
def blocks_that_other_streams_use_are_waited_for_before_a_refusal() -> None:
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        total = torch.zeros(40 * MiB, device="cuda")
        torch.cuda._sleep(LONG)
    for _ in range(2 * CAPACITY // (160 * MiB)):
        more = torch.ones(40 * MiB, device="cuda")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            total += more
        more.record_stream(side)
        del more
    side.synchronize()
    assert bool((total == 2 * CAPACITY // (160 * MiB)).all())


@check
def a_refusal_is_counted_with_the_try_before_it() -> None:
    torch.cuda.reset_accumulated_memory_stats()
    with raises(torch.OutOfMemoryError):
        tensor(2 * CAPACITY)
    stats = torch.cuda.memory_stats()
    assert (stats["num_alloc_retries"], stats["num_ooms"]) == (1, 1)
    assert stats["allocation.all.allocated"] == 0


@check
def what_the_fraction_refuses_is_a_rejection_where_torch_is_told_so() -> None:
    if "num_oom_rejections" not in torch.cuda.memory_stats():  # before 2.12
        return
    clean()
    before = torch.cuda.memory_stats()
    torch.cuda.memory._set_allocator_settings("throw_on_cudamalloc_oom:True")
    torch.cuda.set_per_process_memory_fraction(GiB / torch.cuda.mem_get_info()[1])
    try:
        with raises(torch.OutOfMemoryError, "CUDA out of memory. ", "throw_on_cudamalloc_oom"):
            tensor(2 * GiB)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.memory._set_allocator_settings("throw_on_cudamalloc_oom:False")
    stats = torch.cuda.memory_stats()
    assert stats["num_oom_rejections"] == before["num_oom_rejections"] + 1
    assert stats["num_ooms"] == before["num_ooms"]
