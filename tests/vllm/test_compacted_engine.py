"""The real engine on the host backend: blocks of its running requests move, and it serves the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vllm.facts import facts

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(600)

PROGRAM = "tests.vllm.compacted_engine"


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return facts("plain", program=PROGRAM)


@pytest.fixture(scope="module")
def moving() -> dict[str, Any]:
    return facts("moving", program=PROGRAM)


def test_what_sparse_chunks_hold_is_had_without_preempting_anybody(moving: dict[str, Any]) -> None:
    assert moving["moved"] and all(moving["met"])
    assert moving["preempted"] == []


def test_the_tokens_are_those_of_an_engine_whose_blocks_stay(
    plain: dict[str, Any], moving: dict[str, Any]
) -> None:
    assert moving["tokens"] == plain["tokens"]


def test_prefixes_that_moved_are_found_again_and_are_right(moving: dict[str, Any]) -> None:
    assert moving["hashed"] > 0
    assert all(moving["hits"])
    assert moving["again"] == moving["tokens"][-1][::3]


def test_nobody_is_preempted_for_what_is_on_its_way() -> None:
    plain, late = (facts(each, "wide", PROGRAM) for each in ("plain", "late"))
    assert late["moved"] and all(late["met"])
    assert late["preempted"] == []
    assert late["tokens"] == plain["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ngram", "draft", "eagle"])
def test_blocks_move_while_tokens_are_drafted_and_drafts_stay_as_good(method: str) -> None:
    plain, moving = (facts(each, method, PROGRAM) for each in ("plain", "moving"))
    assert moving["moved"] and all(moving["met"])
    assert moving["preempted"] == []
    assert moving["tokens"] == plain["tokens"]
    assert moving["accepted"] == plain["accepted"]
    # An Eagle of drawn weights guesses nothing; a draft that is the model itself guesses all.
    assert method == "eagle" or moving["accepted"] > 0


@pytest.mark.slow
def test_blocks_of_several_groups_of_layers_move() -> None:
    plain, moving = (facts(each, "tiny-windows", PROGRAM) for each in ("plain", "moving"))
    assert moving["moved"] and all(moving["met"])
    assert moving["preempted"] == []
    assert moving["tokens"] == plain["tokens"]
