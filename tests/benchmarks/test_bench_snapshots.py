import pickle

import pytest

from benchmarks.snapshots import SnapshotError, Step, parse, read

MIB = 1 << 20


def event(action, addr=0, size=0, stream=0):
    return {"action": action, "addr": addr, "size": size, "stream": stream, "frames": [], "time_us": 0}


def segment(total, blocks=(), stream=0, address=0):
    return {
        "device": 0,
        "address": address,
        "total_size": total,
        "stream": stream,
        "segment_type": "large",
        "blocks": list(blocks),
    }


def test_a_block_lives_from_its_allocation_until_torch_could_use_it_again():
    trace = parse(
        [
            event("segment_alloc", 0, 20 * MIB),
            event("alloc", 0, 4 * MIB),
            event("free_requested", 0, 4 * MIB),
            event("alloc", 4 * MIB, 8 * MIB, stream=7),
            event("free_completed", 0, 4 * MIB),
            event("alloc", 0, MIB),
        ],
        [segment(20 * MIB)],
    )
    assert trace.steps == [Step(0, 4 * MIB, 0), Step(1, 8 * MIB, 7), Step(0), Step(2, MIB, 0)]
    assert (trace.before, trace.blocks, trace.pairs) == (0, 3, 1)
    assert trace.streams == [0, 7]
    assert (trace.peak_allocated, trace.native_peak) == (12 * MIB, 20 * MIB)


def test_what_lived_before_the_recording_is_made_first():
    trace = parse(
        [
            event("segment_alloc", 100 * MIB, 2 * MIB),
            event("free_completed", 6, 3 * MIB, stream=5),
            event("alloc", 8, MIB),
        ],
        [
            segment(
                10 * MIB,
                [
                    {"address": 8, "size": MIB, "requested_size": MIB, "state": "active_allocated"},
                    {"address": 9, "size": 2 * MIB, "requested_size": 5, "state": "active_allocated"},
                    {"address": 10, "size": MIB, "requested_size": 0, "state": "inactive"},
                ],
            )
        ],
    )
    # The block at 9 is told of by the segments only, the one at 6 by its free.
    assert trace.steps == [Step(0, 3 * MIB, 5), Step(1, 5, 0), Step(0), Step(2, MIB, 0)]
    assert trace.before == 2
    assert trace.native_peak == 10 * MIB
    assert trace.peak_allocated == 3 * MIB + 5


def test_native_peaks_follow_every_kind_of_segment():
    history = [
        event("segment_map", 0, 8),
        event("alloc", 0, 1),
        event("segment_alloc", 8, 4),
        event("segment_unmap", 0, 6),
        event("segment_free", 8, 4),
        event("snapshot"),
        event("oom", 12345, 10),
    ]
    assert parse(history, [segment(2)]).native_peak == 12
    # Eight bytes more at the end than the history tells of: they were there before it.
    assert parse(history, [segment(10)]).native_peak == 20


def written(tmp_path, content):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(content)
    return path


def test_the_device_that_allocated_is_read(tmp_path):
    histories = [[], [event("alloc", 0, 64)]]
    here, elsewhere = {**segment(2 * MIB), "device": 1}, segment(4 * MIB)
    path = written(
        tmp_path, pickle.dumps({"segments": [here, elsewhere], "device_traces": histories, "more": ()})
    )
    assert read(path).native_peak == 2 * MIB


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "Ran out of input"),
        (b"nonsense", "."),
        (pickle.dumps({"segments": []}), "device_traces"),
        (pickle.dumps({"segments": [], "device_traces": [[event("snapshot")]]}), "records no allocation"),
        (pickle.dumps({"segments": [], "device_traces": []}), "."),
        (pickle.dumps({"segments": SnapshotError, "device_traces": []}), "it holds a benchmarks.snapshots"),
        (pickle.dumps([1, 2]), "."),
    ],
)
def test_what_is_no_snapshot_is_refused_and_runs_nothing(tmp_path, content, says):
    with pytest.raises(SnapshotError, match=says):
        read(written(tmp_path, content))
