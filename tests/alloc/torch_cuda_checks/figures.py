"""What is counted."""

from __future__ import annotations

from typing import Any

import torch

from .answers import allocated_by_size, shape_of, snapshot_keys, sums_by_size
from .harness import MiB, check, clean, native, private, stat, tensor


@check
def the_backend_has_our_name() -> None:
    assert torch.cuda.get_allocator_backend() == "torch_elastic_mem"


@check
def memory_stats_have_the_keys_of_torchs_own_allocator() -> None:
    assert sorted(torch.cuda.memory_stats()) == native["keys"]


@check
def sizes_are_rounded_as_by_torchs_own_allocator() -> None:
    assert allocated_by_size() == native["allocated"]


@check
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


@check
def the_summary_is_printed() -> None:
    assert "Allocated memory" in torch.cuda.memory_summary()
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total


@check
def emptying_the_cache_gives_memory_back() -> None:
    held = tensor(200 * MiB)
    del held
    assert torch.cuda.memory_reserved() >= 200 * MiB
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= torch.cuda.memory_allocated() + 8 * MiB


@check
def sums_by_size_are_those_of_torchs_own_allocator() -> None:
    assert sums_by_size() == native["sums"]


@check
def nested_statistics_have_the_shape_of_torchs_own_and_the_values_of_the_flat_ones() -> None:
    nested = torch.cuda.memory_stats_as_nested_dict()
    assert shape_of(nested) == native["nested"]
    flat: dict[str, Any] = {}

    def flatten(prefix: str, value: Any) -> None:
        if not isinstance(value, dict):
            flat[prefix] = value
            return
        for key in value:
            flatten(f"{prefix}.{key}" if prefix else key, value[key])

    flatten("", nested)
    assert flat == dict(torch.cuda.memory_stats())


@check
def snapshots_have_the_keys_of_torchs_own_allocator() -> None:
    assert snapshot_keys() == native["snapshot"]


@check
def requested_bytes_are_those_asked_for() -> None:
    requested, allocated = stat("requested_bytes.all.current"), torch.cuda.memory_allocated()
    held = tensor(1000)
    assert stat("requested_bytes.all.current") == requested + 1000
    assert torch.cuda.memory_allocated() == allocated + 1024
    del held
    assert stat("requested_bytes.all.current") == requested


@check
def what_no_other_stream_uses_is_active_while_it_is_allocated() -> None:
    torch.cuda.synchronize()
    held = [tensor(size) for size in (100, 5 * MiB)]
    for _ in range(2):
        stats = torch.cuda.memory_stats()
        for kind in ("all", "small_pool", "large_pool"):
            assert stats[f"active_bytes.{kind}.current"] == stats[f"allocated_bytes.{kind}.current"]
            assert stats[f"active.{kind}.current"] == stats[f"allocation.{kind}.current"]
        held.pop()


@check
def peaks_are_the_most_since_they_were_reset() -> None:
    clean()
    torch.cuda.reset_peak_memory_stats()
    reserved, allocated = torch.cuda.memory_reserved(), torch.cuda.memory_allocated()
    assert torch.cuda.max_memory_reserved() == reserved
    held = tensor(300 * MiB)
    del held
    torch.cuda.empty_cache()
    assert torch.cuda.max_memory_allocated() == allocated + 300 * MiB
    assert torch.cuda.max_memory_reserved() >= reserved + 300 * MiB > torch.cuda.memory_reserved()
    assert stat("requested_bytes.all.peak") >= 300 * MiB
    assert stat("segment.all.peak") > stat("segment.all.current")


@check
def calls_of_the_driver_are_counted_where_they_are_made() -> None:
    clean()
    torch.cuda.reset_accumulated_memory_stats()
    held = tensor(300 * MiB)
    mapped = stat("num_device_alloc")
    assert mapped > 0 and stat("num_device_free") == 0
    del held
    held = tensor(300 * MiB)
    assert stat("num_device_alloc") == mapped
    del held
    clean()
    assert stat("num_device_free") > 0
    assert stat("reserved_bytes.all.freed") >= 300 * MiB


@check
def the_accelerator_interface_shows_the_same_figures() -> None:
    held = tensor(3 * MiB)
    assert torch.accelerator.memory_allocated() == torch.cuda.memory_allocated() > 0
    assert torch.accelerator.memory_reserved() == torch.cuda.memory_reserved() > 0
    own = torch.cuda.memory_stats()
    for key, value in torch.accelerator.memory_stats().items():
        assert own.get(key, value) == value, key
    del held
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == torch.cuda.memory_allocated()


@check
def pinned_memory_is_none_of_the_device() -> None:
    before = torch.cuda.memory_allocated()
    held = torch.ones(MiB, pin_memory=True)
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] > 0
    copied = held.to("cuda", non_blocking=True)
    assert copied.sum().item() == MiB


@check
def settings_of_torchs_own_allocator_are_taken_and_change_nothing() -> None:
    clean()
    try:
        for settings in (
            "roundup_power2_divisions:4",
            "max_split_size_mb:40,garbage_collection_threshold:0.5",
            "expandable_segments:True",
        ):
            torch.cuda.memory._set_allocator_settings(settings)
            assert allocated_by_size() == native["allocated"], settings
            whole = tensor(100 * MiB)
            address = whole.data_ptr()
            del whole
            part = tensor(60 * MiB)
            assert part.data_ptr() == address, settings
            del part
    finally:
        torch.cuda.memory._set_allocator_settings("")


@check
def the_allocator_that_torch_has_is_ours() -> None:
    current = torch.cuda.memory._get_current_allocator()
    assert isinstance(current.allocator(), private._cuda_CUDAAllocator)
