"""The real engine asleep: it holds nothing, and serves the same tokens when it is awake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("vllm")


import torch_elastic_mem as tem
from tests.broker.service import Service
from tests.vllm.facts import Apart, facts
from tests.vllm.small_engine import MiB

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def sleeping(extension: None) -> dict[str, Any]:
    return facts("sleeping")


def test_an_engine_that_slept_at_either_level_serves_the_same_tokens(sleeping: dict[str, Any]) -> None:
    first, *others = sleeping["tokens"]
    assert len(others) >= 2 and all(other == first for other in others)
    assert sleeping["addresses stay"] and sleeping["buffers"]


def test_a_sleeping_engine_costs_nothing_at_either_level(sleeping: dict[str, Any]) -> None:
    assert sleeping["weights"] >= sleeping["model"] > 0
    assert sleeping["asleep"] == 0
    assert sleeping["asleep at level 2"] == [0, 0]
    assert sleeping["demands of a sleeper"] == []


def test_an_engine_that_cannot_wake_sleeps_on(sleeping: dict[str, Any]) -> None:
    assert sleeping["after a refusal"] == [0, True]
    assert "neighbour holds" in sleeping["refusal"]


def test_an_engine_goes_on_when_all_of_it_is_awake_and_not_before(sleeping: dict[str, Any]) -> None:
    assert len(sleeping["resumed while asleep"]) == 2
    assert "UNPAUSED" not in sleeping["resumed while asleep"], "nor with the cache alone"
    assert sleeping["with weights"] == [sleeping["weights"], True]
    assert sleeping["with all"] == [sleeping["weights"] + sleeping["chunk"], False]


def test_the_cache_alone_may_be_released_where_vllm_has_that(sleeping: dict[str, Any]) -> None:
    if "without its cache" in sleeping:
        assert sleeping["without its cache"] == [sleeping["weights"], True]


def test_requests_that_are_kept_or_come_while_it_sleeps_are_served_when_it_is_awake(extension: None) -> None:
    amid = facts("sleeping_amid")
    assert (amid["asleep"], amid["late"]) == (0, 8)
    alone, kept = amid["tokens"]
    assert kept == alone


@pytest.fixture
def apart(extension: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    # The path of a socket is short.
    service = Service(tmp_path_factory.mktemp("b")).start()
    made = Apart(service, "sleeping_apart")
    try:
        yield made
    finally:
        made.end()
        service.close()


def test_under_a_broker_a_sleeper_leaves_its_memory_to_others_and_wakes_when_they_let_it(
    apart: Apart,
) -> None:
    apart.fact()
    assert apart.held() > 0
    apart.go_on()
    apart.fact()
    assert apart.comes_down_to(0)
    with (
        tem.Arena("host", capacity=100 * MiB, broker=str(apart.service.path)) as arena,
        arena.account("other", tem.PriorityClass("pressing", 10**6)) as account,
    ):
        memory = account.range(100 * MiB)
        memory.grow(100 * MiB, timeout=10)
        apart.go_on()
        assert "other" in apart.fact()
        assert apart.fact() is True
        assert apart.held() == 0
        memory.close()
    apart.go_on()
    first, again = apart.fact()
    assert first == again
    _, err = apart.program.communicate(timeout=120)
    assert apart.program.returncode == 0, err[-3000:]
