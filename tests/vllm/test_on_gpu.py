"""The real engine on a GPU: squeezed, moved and put to sleep, it serves the tokens that it serves alone."""

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
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MOVED = "tests.vllm.compacted_engine"
RUNS = (("plain", ""), ("squeezed", ""), ("sleeping", ""), ("plain", MOVED), ("moving", MOVED))


@pytest.fixture(scope="module")
def told() -> dict[tuple[str, str], Any]:
    """What each run says; they run at once, for most of a run is a start."""
    with ThreadPoolExecutor(len(RUNS)) as threads:
        started = {
            run: threads.submit(facts, run[0], **({"program": run[1]} if run[1] else {})) for run in RUNS
        }
        return {run: each.exception() or each.result() for run, each in started.items()}


def of(told: dict[tuple[str, str], Any], scenario: str, program: str = "") -> dict[str, Any]:
    found = told[scenario, program]
    if isinstance(found, BaseException):
        raise found
    assert isinstance(found, dict)
    return found


def test_an_engine_that_is_squeezed_serves_the_same_tokens(told: dict[tuple[str, str], Any]) -> None:
    plain, squeezed = of(told, "plain"), of(told, "squeezed")
    assert squeezed["scheduler"] == f"Elastic{plain['scheduler']}"
    assert len(squeezed["demands"]) > 3 and all(squeezed["demands"])
    assert squeezed["tokens"] == plain["tokens"]
    assert squeezed["came in the end"] == 16


def test_blocks_of_running_requests_move(told: dict[tuple[str, str], Any]) -> None:
    plain, moving = of(told, "plain", MOVED), of(told, "moving", MOVED)
    assert moving["moved"] and all(moving["met"])
    assert moving["preempted"] == 0
    assert moving["tokens"] == plain["tokens"]
    assert all(moving["hits"]) and moving["again"] == moving["tokens"][-1][::3]


def test_a_sleeper_holds_nothing_and_wakes_up_as_it_was(told: dict[tuple[str, str], Any]) -> None:
    sleeping = of(told, "sleeping")
    assert sleeping["asleep"] == sleeping["asleep at level 2"][0] == 0
    assert sleeping["addresses stay"] and sleeping["buffers"]
    assert all(each == sleeping["tokens"][0] for each in sleeping["tokens"])
