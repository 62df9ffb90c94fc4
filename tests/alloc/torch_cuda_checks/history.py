"""What torch.cuda.memory records, and who reads it."""

from __future__ import annotations

import json
import pickle
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from .harness import CAPACITY, SIZES, KiB, MiB, check, clean, raises, recording, tensor


def actions(snapshot: dict[str, Any]) -> list[str]:
    return [entry["action"] for entry in snapshot["device_traces"][0]]


def entries(snapshot: dict[str, Any], address: int) -> list[dict[str, Any]]:
    return [each for each in snapshot["device_traces"][0] if each.get("addr") == address]


def block_at(snapshot: dict[str, Any], address: int) -> dict[str, Any]:
    blocks = [block for each in snapshot["segments"] for block in each["blocks"]]
    (found,) = [block for block in blocks if block["address"] == address]
    return dict(found)


@check
def a_snapshot_tiles_each_segment_with_blocks() -> None:
    held = [tensor(size) for size in SIZES]
    segments = torch.cuda.memory_snapshot()
    assert sum(each["total_size"] for each in segments) == torch.cuda.memory_reserved()
    assert sum(each["allocated_size"] for each in segments) == torch.cuda.memory_allocated()
    for segment in segments:
        assert sum(block["size"] for block in segment["blocks"]) == segment["total_size"]
    live = {block["address"] for each in segments for block in each["blocks"] if block["state"] != "inactive"}
    assert {each.data_ptr() for each in held} <= live


@check
def the_trace_has_stacks() -> None:
    with recording():
        held = tensor(3 * MiB)
        address = held.data_ptr()
        snapshot = torch.cuda.memory._snapshot()
        del held
        after = torch.cuda.memory._snapshot()
    blocks = [block for each in snapshot["segments"] for block in each["blocks"]]
    (mine,) = [block for block in blocks if block["address"] == address]
    assert any(frame["filename"].endswith("history.py") for frame in mine["frames"])
    of_mine = [each for each in after["device_traces"][0] if each["addr"] == address]
    assert [each["action"] for each in of_mine] == ["alloc", "free_requested", "free_completed"]
    assert all(each["size"] == 3 * MiB and each["frames"] for each in of_mine)
    assert not actions(torch.cuda.memory._snapshot())


@check
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


@check
def the_ring_forgets_the_oldest() -> None:
    with recording(max_entries=5):
        for size in range(1, 20):
            tensor(size * KiB)
        trace = torch.cuda.memory._snapshot()["device_traces"][0]
    assert len(trace) == 5
    assert trace[-1]["size"] == 19 * KiB


@check
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


@check
def the_profiler_sees_memory() -> None:
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, cuda], profile_memory=True
    ) as seen:
        tensor(5 * MiB)
    usage = [getattr(each, "device_memory_usage", 0) for each in seen.events() or ()]
    assert max(usage) >= 5 * MiB


def make_it_here(box: list[torch.Tensor]) -> None:
    box.append(torch.rand(311, 411, device="cuda"))


def drop_it_here(box: list[torch.Tensor]) -> None:
    box.pop()


def empty_it_here() -> None:
    torch.cuda.empty_cache()


@check
def stacks_are_kept_of_what_the_context_names() -> None:
    for context in (None, "state", "alloc", "all"):
        clean()
        with recording(context=context, stacks="python"):
            box: list[torch.Tensor] = []
            make_it_here(box)
            drop_it_here(box)
            empty_it_here()
            gone = json.dumps(torch.cuda.memory._snapshot())
            make_it_here(box)
            lives = torch.cuda.memory._snapshot()
        assert ("make_it_here" in gone) == (context in ("alloc", "all")), context
        assert ("drop_it_here" in gone) == (context == "all"), context
        assert ("empty_it_here" in gone) == (context == "all"), context
        frames = block_at(lives, box[0].data_ptr())["frames"]
        assert ("make_it_here" in str(frames)) == (context is not None), context
        assert str(311 * 411 * 4) in gone


@check
def stacks_have_the_frames_of_cpp_where_they_are_asked_for() -> None:
    for stacks in ("python", "all"):
        with recording(stacks=stacks):
            box: list[torch.Tensor] = []
            make_it_here(box)
            text = str(block_at(torch.cuda.memory._snapshot(), box[0].data_ptr())["frames"])
        assert "make_it_here" in text
        assert ("::rand" in text) == (stacks == "all"), text


@check
def stacks_are_those_of_the_thread_that_allocates() -> None:
    box: list[torch.Tensor] = []
    with recording(stacks="python"):
        thread = threading.Thread(target=make_it_here, args=(box,))
        thread.start()
        thread.join()
        trace = entries(torch.cuda.memory._snapshot(), box[0].data_ptr())
    assert "make_it_here" in str(trace[-1]["frames"])


@check
def the_state_alone_may_be_recorded() -> None:
    with recording(enabled="state", stacks="python"):
        held = tensor(3 * MiB)
        tensor(5 * MiB)
        snapshot = torch.cuda.memory._snapshot()
    assert len(snapshot["device_traces"][0]) == 1
    assert "history.py" in str(block_at(snapshot, held.data_ptr())["frames"])


@check
def history_goes_on_or_starts_over_as_told() -> None:
    with recording(stacks="python"):
        first = tensor(3 * MiB)
        torch.cuda.memory._record_memory_history(stacks="python")
        assert entries(torch.cuda.memory._snapshot(), first.data_ptr())
        torch.cuda.memory._record_memory_history(stacks="python", clear_history=True)
        second = tensor(3 * MiB)
        snapshot = torch.cuda.memory._snapshot()
    assert not entries(snapshot, first.data_ptr())
    assert entries(snapshot, second.data_ptr())


@check
def stacks_may_be_turned_off_and_on_again() -> None:
    box: list[torch.Tensor] = []
    with recording(stacks="python"):
        make_it_here(box)
        torch.cuda.memory._record_memory_history(context=None)
        unseen = tensor(3 * MiB)
        torch.cuda.memory._record_memory_history(stacks="python")
        snapshot = torch.cuda.memory._snapshot()
    assert "make_it_here" in str(block_at(snapshot, box[0].data_ptr())["frames"])
    assert not block_at(snapshot, unseen.data_ptr())["frames"]


@check
def entries_may_be_left_out_by_action() -> None:
    for skipped in (["alloc"], ["free_requested", "free_completed"], ["segment_map", "segment_unmap"]):
        clean()
        with recording(stacks="python", skip_actions=skipped):
            held = tensor(50 * MiB)
            del held
            clean()
            seen = set(actions(torch.cuda.memory._snapshot()))
        assert seen == {"alloc", "free_requested", "free_completed", "segment_map", "segment_unmap"} - set(
            skipped
        )


@check
def entries_carry_the_users_words() -> None:
    torch.cuda.memory._set_memory_metadata("step 3")
    try:
        assert torch.cuda.memory._get_memory_metadata() == "step 3"
        with recording(stacks="python"):
            held = tensor(3 * MiB)
            del held
            trace = torch.cuda.memory._snapshot()["device_traces"][0]
    finally:
        torch.cuda.memory._set_memory_metadata("")
    assert {each["user_metadata"] for each in trace} == {"step 3"}


@check
def entries_are_in_the_order_of_time() -> None:
    with recording(stacks="python"):
        for size in SIZES:
            tensor(size)
        times = [each["time_us"] for each in torch.cuda.memory._snapshot()["device_traces"][0]]
    assert times == sorted(times)


@check
def annotations_of_the_profiler_are_recorded_beside() -> None:
    with recording(stacks="python", global_record_annotations=True):
        with torch.profiler.record_function("## a step ##"):
            tensor(3 * MiB)
        noted = torch.cuda.memory._snapshot()["external_annotations"]
    assert "## a step ##" in str(noted), noted


@check
def a_dump_can_be_read_by_every_view_of_memory_viz() -> None:
    from torch.cuda import _memory_viz

    def view(lines: str) -> str:
        return lines

    with recording(stacks="python"), tempfile.TemporaryDirectory() as folder:
        clean()
        before = torch.cuda.memory._snapshot()
        held = [tensor(size) for size in SIZES]
        held.pop()
        clean()
        file = Path(folder) / "dump.pickle"
        torch.cuda.memory._dump_snapshot(str(file))
        dump = pickle.loads(file.read_bytes())
    assert "history.py" in _memory_viz.memory(dump, format_flamegraph=view)
    assert "history.py" in _memory_viz.segments(dump, format_flamegraph=view)
    assert "history.py" in _memory_viz.compare(before["segments"], dump["segments"], format_flamegraph=view)
    assert "<html" in _memory_viz.trace_plot(dump, filter_freed=True).lower()
    assert "<html" in _memory_viz.trace_plot(dump, plot_segments=True).lower()


@check
def the_profilers_own_timeline_is_drawn() -> None:
    from torch.cuda import _memory_viz

    with torch.profiler.profile(with_stack=True, profile_memory=True, record_shapes=True) as seen:
        held = torch.rand(128, 128, device="cuda")
        held = held * held + held
    assert held.numel() == 128 * 128
    assert "<html" in _memory_viz.profile_plot(seen).lower()
    drawn = json.dumps(_memory_viz._profile_to_snapshot(seen))
    assert "category" in drawn and "history.py" in drawn
