"""The real engine with two ranks on the host backend: it serves the same tokens, and they stay in step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

import torch_elastic_mem as tem
from tests.broker.service import Service
from tests.programs import end, start
from tests.vllm.facts import Apart, read

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(900)

MiB = 1 << 20


def facts(scenario: str, split: str) -> dict[str, Any]:
    done = end(start("-m", "tests.vllm.ranks_engine", scenario, split, TEM_BROKER="0"), timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(map(read, done.stdout.splitlines()))


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return facts("plain", "tensor")


@pytest.fixture(scope="module", params=["tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
def both(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """What vLLM does by itself, and with ranks that are squeezed."""
    split = request.param
    by_itself = request.getfixturevalue("plain") if split == "tensor" else facts("plain", split)
    return by_itself, facts("squeezed", split) | {"split": split}


def test_ranks_that_are_squeezed_serve_the_same_tokens(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    plain, squeezed = both
    assert squeezed["scheduler"] == f"Elastic{plain['scheduler']}"
    assert squeezed["tokens"] == plain["tokens"]


def test_who_asks_how_ranks_are_started_hears_what_vllm_calls_it(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    assert both[1]["started by"] == ["mp", "mp"]


def test_each_rank_yields_to_whom_it_must_while_the_engine_is_busy(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    for rank in both[1]["pressed"]:
        assert len(rank["met"]) > 3 and all(rank["met"])
        assert rank["least"] <= rank["quarter"]


def test_ranks_have_memory_under_the_same_chunks(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for name in ("chunks after", "chunks under it"):
        first, second, scheduler = both[1][name]
        assert first == second == scheduler


def test_an_idle_engine_yields_on_every_rank_what_is_wanted_of_one(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    squeezed = both[1]
    assert min(squeezed["kept when nobody asks"]) > max(squeezed["chunk"])
    assert squeezed["kept when one asks"] == squeezed["chunk"]


def test_requests_that_are_preempted_while_their_output_is_in_flight_get_each_token_once(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    plain, squeezed = both
    assert squeezed["tokens of the preempted"] == plain["tokens"][0]
    if squeezed["split"] == "pipeline":
        assert squeezed["in flight when preempted"] > 0


def test_ranks_do_not_grow_beyond_the_limit_of_one_and_grow_again_without_it(
    both: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    squeezed = both[1]
    assert squeezed["refusals"] > 0
    assert squeezed["under one's limit"] == squeezed["chunk"]
    first, second = squeezed["grown again"]
    assert first == second > squeezed["chunk"][1]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_ranks_whose_blocks_are_offloaded_late_serve_the_same_tokens(
    split: str, request: pytest.FixtureRequest
) -> None:
    plain = request.getfixturevalue("plain") if split == "tensor" else facts("plain", split)
    offloading = facts("offloading", split)
    first, again = offloading["tokens"]
    assert first == again == [each[: len(first[0])] for each in plain["tokens"][0]]
    assert offloading["found elsewhere"][1] > 0, "what was dropped here came back from the connector"
    for rank in offloading["pressed"]:
        assert len(rank["met"]) > 3 and all(rank["met"])
        assert rank["least"] <= rank["quarter"]
    first, second, read = offloading["left"]
    assert first == second == read and len(read) > 1, "what is yet to be copied stays, on every rank"
    assert offloading["left when copied"] == [[0], [0]]


@pytest.fixture(scope="module")
def sleeping() -> dict[str, Any]:
    """Two ranks that sleep at both levels."""
    return facts("sleeping", "tensor")


def test_ranks_that_slept_at_either_level_serve_the_same_tokens(sleeping: dict[str, Any]) -> None:
    first, *others = sleeping["tokens"]
    assert len(others) == 2 and all(other == first for other in others)
    assert sleeping["addresses stay"]


def test_sleeping_ranks_cost_nothing_at_either_level(sleeping: dict[str, Any]) -> None:
    assert min(sleeping["weights"]) > 0
    assert sleeping["asleep"] == sleeping["asleep at level 2"] == [0, 0]


def test_if_one_rank_cannot_wake_all_sleep_on(sleeping: dict[str, Any]) -> None:
    assert len(sleeping["refusals"]) == 4, "of the cache and of the weights, at either level"
    for refusal, held, asleep in sleeping["refusals"]:
        assert "sleeps on: rank 1" in refusal and "neighbour holds" in refusal
        assert (held, asleep) == ([0, 0], True)
    grown = ["so none grows" in refusal for refusal, *_ in sleeping["refusals"]]
    assert grown == [True, False, True, False]


def test_ranks_wake_partly_together(sleeping: dict[str, Any]) -> None:
    assert sleeping["with weights"] == [sleeping["weights"], True]
    both = [sum(each) for each in zip(sleeping["weights"], sleeping["chunk"], strict=True)]
    assert sleeping["with all"] == [both, False]


@pytest.fixture
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """Two ranks under a broker."""
    # The path of a socket is short.
    service = Service(tmp_path_factory.mktemp("b")).start()
    made = Apart(service, "shared", "tests.vllm.ranks_engine", "tensor")
    try:
        yield made
    finally:
        made.end()
        service.close()


@pytest.mark.slow
def test_under_a_broker_an_idle_engine_of_two_ranks_yields_and_serves_on(
    plain: dict[str, Any], shared: Apart
) -> None:
    first, resident, _ = shared.fact(), shared.fact(), shared.fact()
    assert shared.held() >= sum(resident) and resident[0] == resident[1]
    with (
        tem.Arena("host", capacity=100 * MiB, broker=str(shared.service.path)) as arena,
        arena.account("other", tem.PriorityClass("pressing", 10**6)) as account,
    ):
        memory = account.range(100 * MiB)
        memory.grow(100 * MiB - sum(resident) + 8 * MiB, timeout=30)
        assert shared.comes_down_to(sum(resident) - 8 * MiB)
        memory.close()
    shared.go_on()
    after = shared.fact()
    assert after[0] == after[1] < resident[0]
    assert [first, *shared.fact()] == plain["tokens"]
    chunks = shared.fact()
    assert chunks[0] == chunks[1]


@pytest.mark.slow
def test_what_a_rank_held_that_is_killed_comes_back_with_the_engines_end(shared: Apart) -> None:
    _, _, (first, _) = shared.fact(), shared.fact(), shared.fact()
    assert shared.held() > 0
    os.kill(first, signal.SIGKILL)
    assert shared.comes_down_to(0), "vLLM ends an engine that has lost a rank"
