from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.broker.machine import GPU, GiB, account, device, granted, machine, serving, yielded
from torch_elastic_mem.broker.state import Event
from torch_elastic_mem.observe.trace import chrome_trace


def traced(*events: Event) -> list[dict[str, Any]]:
    made = json.loads(json.dumps(chrome_trace(events, machine())))["traceEvents"]
    assert all({"ph", "pid", "name"} <= event.keys() for event in made)
    return [event for event in made if isinstance(event, dict)]


def of(made: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [event for event in made if event["ph"] == phase]


def test_nothing_makes_an_empty_trace() -> None:
    assert chrome_trace([], machine()) == {"displayTimeUnit": "ms", "traceEvents": []}


def test_an_account_is_a_named_track_of_its_process() -> None:
    made = traced(yielded(1), granted(2))
    names = {(event["pid"], event["name"]): event["args"]["name"] for event in of(made, "M")}
    assert names == {
        (4711, "process_name"): "train.py",
        (4711, "thread_name"): "fine-tune on NVIDIA H100 80GB HBM3",
        (4712, "process_name"): "serve.py",
        (4712, "thread_name"): "chat on NVIDIA H100 80GB HBM3",
    }
    assert [(event["pid"], event["name"], event["dur"]) for event in of(made, "X")] == [
        (4711, "gave", 5000.0),
        (4712, "granted", 6000.0),
    ]


def test_an_arrow_goes_from_a_yield_into_the_grant_that_it_was_for() -> None:
    gave = yielded(1, start_ns=2_000_000, duration_ns=1_000_000)
    other = granted(2, account="eval", pid=5, start_ns=2_000_000)
    got = granted(3, start_ns=1_000_000, duration_ns=3_000_000)
    made = traced(gave, other, got, granted(4, start_ns=9_000_000))
    (start,), (end,) = of(made, "s"), of(made, "f")
    slices = {event["args"]["seq"]: event for event in of(made, "X")}
    for tip, of_slice in ((start, slices[1]), (end, slices[3])):
        assert (tip["pid"], tip["tid"]) == (of_slice["pid"], of_slice["tid"])
        assert of_slice["ts"] <= tip["ts"] <= of_slice["ts"] + of_slice["dur"]
    assert start["id"] == end["id"] and start["name"] == end["name"] and start["cat"] == end["cat"]


def test_what_the_reserve_asked_for_and_what_came_to_nothing_have_no_arrow() -> None:
    made = traced(granted(1), yielded(2), yielded(3, demander="reserve"))
    assert not of(made, "s") and not of(made, "f")


def test_what_takes_no_time_is_a_mark() -> None:
    made = traced(granted(1, kind="join", duration_ns=0, bytes=0), granted(2, kind="dead"))
    assert [event["name"] for event in of(made, "i")] == ["join", "dead"]


def test_a_counter_follows_a_lease_and_ends_at_what_it_is() -> None:
    made = traced(granted(1, bytes=5 * GiB), granted(2, kind="yield", bytes=2 * GiB), granted(3, bytes=GiB))
    values = [event["args"]["bytes"] for event in of(made, "C") if "chat" in event["name"]]
    assert values == [5 * GiB, 3 * GiB, 4 * GiB, 20 * GiB]


def test_an_account_that_has_gone_is_nought() -> None:
    made = traced(granted(1, pid=1), granted(2, kind="dead", pid=1, bytes=3 * GiB))
    assert [event["args"]["bytes"] for event in of(made, "C")] == [3 * GiB, 0]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["grant", "deny", "yield", "join", "leave", "dead", "limit"]),
            st.integers(0, 10**6),
            st.integers(0, 10**6),
            st.integers(1, 3),
        ),
        max_size=30,
    )
)
def test_slices_of_one_track_never_overlap(shapes: list[tuple[str, int, int, int]]) -> None:
    events = [
        granted(seq, kind=kind, start_ns=start, duration_ns=length, pid=pid, demander="chat/1")
        for seq, (kind, start, length, pid) in enumerate(shapes, start=1)
    ]
    made = traced(*events)
    assert len(of(made, "X")) + len(of(made, "i")) == len(events)
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in of(made, "X"):
        place = event["pid"], event["tid"]
        tracks.setdefault(place, []).append((event["ts"], event["ts"] + event["dur"]))
    for slices in tracks.values():
        for (_, end), (start, _) in itertools.pairwise(sorted(slices)):
            assert start >= end - 1e-6


def test_devices_have_tracks_of_their_own() -> None:
    other = device(account(), uuid="GPU-2", label="other")
    state = machine(device(serving(), account()), other)
    made = chrome_trace([yielded(1), yielded(2, device="GPU-2")], state)["traceEvents"]
    tracks = {event["tid"] for event in made if event["ph"] == "X"}
    assert len(tracks) == 2
    assert {event["args"]["device"] for event in made if event["ph"] == "X"} == {GPU, "GPU-2"}
