"""The real engine with a rank on each of two GPUs: squeezed and put to sleep, it serves vLLM's tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from tests.vllm.facts import facts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
RUNS = ("plain", "squeezed", "sleeping")


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What each run says; they run at once, for most of a run is a start."""
    with ThreadPoolExecutor(len(RUNS)) as threads:
        started = {run: threads.submit(facts, run, "tensor", "tests.vllm.ranks_engine") for run in RUNS}
        return {run: each.exception() or each.result() for run, each in started.items()}


def of(told: dict[str, Any], scenario: str) -> dict[str, Any]:
    found = told[scenario]
    if isinstance(found, BaseException):
        raise found
    assert isinstance(found, dict)
    return found


def test_ranks_that_are_squeezed_serve_the_same_tokens(told: dict[str, Any]) -> None:
    plain, squeezed = of(told, "plain"), of(told, "squeezed")
    assert squeezed["scheduler"] == f"Elastic{plain['scheduler']}"
    assert squeezed["tokens"] == plain["tokens"]
    for rank in squeezed["pressed"]:
        assert len(rank["met"]) > 3 and all(rank["met"])


def test_ranks_have_memory_under_the_same_chunks(told: dict[str, Any]) -> None:
    for name in ("chunks after", "chunks under it"):
        first, second, scheduler = of(told, "squeezed")[name]
        assert first == second == scheduler


def test_an_idle_engine_yields_on_every_rank_what_is_wanted_of_one(told: dict[str, Any]) -> None:
    squeezed = of(told, "squeezed")
    assert min(squeezed["kept when nobody asks"]) > max(squeezed["chunk"])
    assert squeezed["kept when one asks"] == squeezed["chunk"]


def test_sleeping_ranks_hold_nothing_and_wake_up_as_they_were(told: dict[str, Any]) -> None:
    sleeping = of(told, "sleeping")
    assert sleeping["asleep"] == sleeping["asleep at level 2"] == [0, 0]
    first, *others = sleeping["tokens"]
    assert len(others) == 2 and all(other == first for other in others)
    assert sleeping["addresses stay"]


def test_if_one_rank_cannot_wake_all_sleep_on(told: dict[str, Any]) -> None:
    refusals = of(told, "sleeping")["refusals"]
    assert len(refusals) == 4, "of the cache and of the weights, at either level"
    for refusal, held, asleep in refusals:
        assert "sleeps on: rank 1" in refusal and "neighbour holds" in refusal
        assert (held, asleep) == ([0, 0], True)
