"""What a preemption does in each kind of release, and in which order requests wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from torch_elastic_mem.integrations.vllm import compat


class FakeScheduler:
    def __init__(self, *running: Any) -> None:
        self.running = list(running)
        self.prev_step_scheduled_req_ids = {request.request_id for request in running}
        self.preempted: list[tuple[Any, dict[str, bool]]] = []

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
    assert (scheduler.running, scheduler.prev_step_scheduled_req_ids) == ([second], {"b"})


def test_output_in_flight_is_dropped_by_vllm_later() -> None:
    request = SimpleNamespace(request_id="a", num_stale_output_tokens=0, num_output_placeholders=2)
    scheduler = FakeScheduler(request)
    compat.preempt(scheduler, request)
    assert scheduler.preempted == [(request, {"drop_stale_output": True})]
    assert (scheduler.running, scheduler.prev_step_scheduled_req_ids) == ([], set())


def test_this_release_has_what_a_preemption_touches() -> None:
    import inspect

    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.request import Request

    later = "drop_stale_output" in inspect.signature(Scheduler._preempt_request).parameters
    source = inspect.getsource(Request.__init__)
    assert ("num_stale_output_tokens" in source) is later
    assert ("async_tokens_to_discard" in source) is not later
    assert "num_output_placeholders" in source
    assert "self.prev_step_scheduled_req_ids" in inspect.getsource(Scheduler.__init__)


def test_requests_wait_in_the_order_of_the_queues_that_there_are() -> None:
    queues = SimpleNamespace(waiting=["b", "c"], skipped_waiting=["d"], kv_holding_waiting=["a"])
    assert list(compat.waiting(queues)) == ["a", "b", "c", "d"]
    assert list(compat.waiting(SimpleNamespace(waiting=["b"]))) == ["b"]
