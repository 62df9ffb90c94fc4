"""The real engine with `OffloadingConnector`: what it has yet to copy stays, and no more."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.facts import facts

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return facts("", program="tests.vllm.offloading_engine")


def test_it_is_served(told: dict[str, Any]) -> None:
    assert told["scheduler"] in ("ElasticScheduler", "ElasticAsyncScheduler")


def test_what_comes_is_waited_for_as_its_streams_are_not_the_steps(told: dict[str, Any]) -> None:
    assert told["what comes is waited for"]


def test_the_blocks_of_a_request_that_has_just_ended_are_read_yet(told: dict[str, Any]) -> None:
    had, others = told["ended"]
    assert had and others == []


def test_what_is_read_is_not_given_and_all_else_is(told: dict[str, Any]) -> None:
    left, read = told["left"]
    assert left == read and len(left) > 2


def test_once_it_is_copied_all_of_it_is_given(told: dict[str, Any]) -> None:
    before, read, left = told["copied"]
    assert before and read == [] and left == [0]


def test_of_a_request_that_is_preempted_nothing_more_is_copied(told: dict[str, Any]) -> None:
    freed, known = told["preempted"]
    assert freed and known == []


def test_copies_of_a_request_that_were_asked_for_outlive_its_preemption(told: dict[str, Any]) -> None:
    read, lost = told["copies of the preempted"]
    assert read and lost == []


def test_who_was_preempted_is_not_admitted_in_the_same_step(told: dict[str, Any]) -> None:
    assert told["running after each step"] == [False, True]


def test_what_it_is_told_to_forget_is_read_until_the_next_step(told: dict[str, Any]) -> None:
    succeeded, read, lost = told["forgotten"]
    assert succeeded and read and lost == []
    assert told["flushed"] == []
