"""What a preemption does in each kind of release, and in which order requests wait."""

from __future__ import annotations

import inspect
from types import MethodType, SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from torch_elastic_mem.integrations.vllm import compat
from torch_elastic_mem.integrations.vllm.scheduler import Elastic


class FakeScheduler:
    def __init__(self, *running: Any, stages: int = 1) -> None:
        self.running = list(running)
        parallel = SimpleNamespace(pipeline_parallel_size=stages)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.preempted: list[tuple[Any, dict[str, bool]]] = []

        self.waiting: Any = []

    def _preempt_request(self, request: Any, timestamp: float, **more: bool) -> None:
        assert request not in self.running, "vLLM wants it taken off the running ones before"
        assert timestamp > 0
        self.preempted.append((request, more))


def test_output_in_flight_is_discarded_up_to_028() -> None:
    # A step that verifies drafts makes several tokens in one output.
    first = SimpleNamespace(request_id="a", async_tokens_to_discard=1, num_output_placeholders=4)
    second = SimpleNamespace(request_id="b", async_tokens_to_discard=0, num_output_placeholders=1)
    scheduler = FakeScheduler(first, second)
    compat.preempt(scheduler, first)
    assert scheduler.preempted == [(first, {})]
    assert (first.async_tokens_to_discard, first.num_output_placeholders) == (2, 0)
    assert (second.async_tokens_to_discard, second.num_output_placeholders) == (0, 1)
    assert scheduler.running == [second]


def test_in_a_pipeline_output_in_flight_is_delivered_up_to_028() -> None:
    request = SimpleNamespace(request_id="a", async_tokens_to_discard=0, num_output_placeholders=2)
    scheduler = FakeScheduler(request, stages=2)
    compat.preempt(scheduler, request)
    assert scheduler.preempted == [(request, {})]
    assert (request.async_tokens_to_discard, request.num_output_placeholders) == (0, 2)


class InFlight:
    """A request whose output is on its way; later releases count what of it is stale."""

    def __init__(self, count: int, *, later: bool = False) -> None:
        self.num_in_flight_tokens = count
        if later:
            self.num_stale_output_tokens = 0


def queue(*requests: Any) -> Any:
    from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue

    made = create_request_queue(SchedulingPolicy.FCFS)
    for each in requests:
        made.add_request(each)
    return made


def test_and_nobody_is_admitted_before_it_has_come() -> None:
    first, second, third = map(InFlight, (4, 0, 1))
    scheduler = FakeScheduler(stages=2)
    scheduler.waiting = queue(first, second, third)
    with compat.delivering(scheduler)():
        assert list(scheduler.waiting) == [second]
    assert list(scheduler.waiting) == [first, third, second]
    first.num_in_flight_tokens = third.num_in_flight_tokens = 0
    with compat.delivering(scheduler)():
        assert list(scheduler.waiting) == [first, third, second]


@pytest.mark.parametrize(("stages", "later"), [(1, False), (2, True)])
def test_elsewhere_whoever_is_first_is_admitted(stages: int, later: bool) -> None:
    request = InFlight(4, later=later)
    scheduler = FakeScheduler(stages=stages)
    scheduler.waiting = queue(request)
    with compat.delivering(scheduler)():
        assert list(scheduler.waiting) == [request]


def test_output_in_flight_is_dropped_by_vllm_later() -> None:
    request = SimpleNamespace(request_id="a", num_stale_output_tokens=0, num_output_placeholders=2)
    scheduler = FakeScheduler(request)
    compat.preempt(scheduler, request)
    assert scheduler.preempted == [(request, {"drop_stale_output": True})]
    assert scheduler.running == []


def test_this_release_has_what_a_preemption_touches() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    later = "drop_stale_output" in inspect.signature(Scheduler._preempt_request).parameters
    source = inspect.getsource(Request.__init__)
    assert ("num_stale_output_tokens" in source) is later
    assert ("async_tokens_to_discard" in source) is not later
    assert later or "num_in_flight_tokens" in source
    assert "num_output_placeholders" in source
    assert "self.reset_preempted_req_ids" in inspect.getsource(Scheduler.__init__)


def test_requests_wait_in_the_queues_that_there_are() -> None:
    queues = SimpleNamespace(waiting=["b", "c"], skipped_waiting=["d"], kv_holding_waiting=["a"])
    assert compat.queues(queues) == [["a"], ["b", "c"], ["d"]]
    assert compat.queues(SimpleNamespace(waiting=["b"])) == [["b"]]


class Waiting:
    """A request that wants so many tokens' blocks in all, of which so many are computed."""

    def __init__(self, tokens: int, computed: int = 0, status: str = "WAITING") -> None:
        self.request_id, self.num_tokens, self.num_computed_tokens = f"{tokens}", tokens, computed
        self.status = RequestStatus[status]
        self.skip_reading_prefix_cache = True


def scheduler_of(*queues: list[Waiting], put_off: Any = (), held: Any = None) -> Any:
    """As much of ours as counts blocks of 16 tokens, for layers with a window of 64 tokens and without."""
    blocks = [SimpleNamespace(is_null=null) for null in held or ()]
    made = SimpleNamespace(
        _queues=queues,
        _deferred=put_off,
        _low=2,
        _states=0,
        _block_sizes=[16, 16],
        _most=[10**6, 5],
        _managers=[SimpleNamespace(req_to_blocks={"320": blocks}), SimpleNamespace(req_to_blocks={})],
        num_lookahead_tokens=0,
    )
    for name in ("_blocks_of", "_held_by", "_first_waiting"):
        setattr(made, name, MethodType(getattr(Elastic, name), made))
    return made


def test_who_waits_with_blocks_needs_only_the_others() -> None:
    assert scheduler_of()._blocks_of(Waiting(320)) == 21 + 6
    assert scheduler_of(held=[False] * 18 + [True] * 5)._blocks_of(Waiting(320, 300)) == 27 - 18
    assert scheduler_of(held=[False] * 40)._blocks_of(Waiting(320, 300)) == 0


def test_the_first_of_each_queue_is_to_be_admitted_next_but_for_those_with_blocks() -> None:
    short, long, loading = Waiting(16), Waiting(640), Waiting(1600, status="WAITING_FOR_REMOTE_KVS")
    assert scheduler_of([])._first_waiting() == 0
    assert scheduler_of([loading, short, long])._first_waiting() == 2 + 2
    assert scheduler_of([short], [long])._first_waiting() == 41 + 6


def test_who_is_put_off_does_not_hide_a_long_prompt_behind_it() -> None:
    first, second, long, last = Waiting(16), Waiting(3200), Waiting(640), Waiting(6400)
    scheduler = scheduler_of([first, second, long, last], put_off={first, second})
    assert scheduler._first_waiting() == 41 + 6
    assert scheduler_of([first, second], put_off={first, second})._first_waiting() == 2 + 2


def test_a_scheduler_keeps_what_it_has_put_off_in_one_set() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    assigned = "self.deferred_waiting: set[Request] = set()"
    every = inspect.getsource(Scheduler).count("self.deferred_waiting =")
    assert every == 0 and inspect.getsource(Scheduler.__init__).count(assigned) <= 1
    assert compat.deferred(SimpleNamespace()) == ()


def test_a_scheduler_keeps_the_queues_it_began_with() -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    first = inspect.getsource(Scheduler.__init__)
    for name in ("waiting", "skipped_waiting", "kv_holding_waiting"):
        assigned = f"self.{name} = "
        every = sum(inspect.getsource(kind).count(assigned) for kind in (Scheduler, AsyncScheduler))
        assert every == first.count(assigned)
        assert name != "waiting" or every == 1
