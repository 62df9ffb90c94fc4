"""Prompts that are longer than what a step computes: vLLM admits a request only if the whole of it fits."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.vllm.facts import facts
from tests.vllm.pools import free_ids
from tests.vllm.small_engine import LONG, Engine
from torch_elastic_mem.integrations.vllm.demand import Needs

pytestmark = pytest.mark.timeout(400)


def test_an_engine_serves_a_prompt_that_is_longer_than_what_it_has_free() -> None:
    plain, elastic = (facts(how, program="tests.vllm.long_engine") for how in ("plain", "elastic"))
    assert elastic["chunks at first"] == elastic["chunks after a squeeze"] == 1
    assert elastic["tokens"] == plain["tokens"]


def test_what_is_to_be_admitted_next_is_room_to_have_at_hand(small: Engine) -> None:
    while len(free_ids(small.pool)) < 20:
        small.step(needed=20, ahead=20, least=0)
        small.controller.grower.wait(LONG)
    small.assert_sound()


def test_who_drains_grows_for_those_that_run_and_asks_nobody_for_more(small: Engine) -> None:
    small.hold(1)
    small.step(needed=9, ahead=9)
    asked: list[tuple[int, bool]] = []
    small.controller.grower.ask = lambda chunks, short: asked.append((len(chunks), short))  # type: ignore[method-assign]
    small.controller._debt, small.controller._debt_until = 1 << 40, float("inf")
    small.needs = Needs(8, 8, 30)
    small.step(ahead=100)
    assert small.controller.draining and asked == []
    small.needs = Needs(len(free_ids(small.pool)) + 3, 8, 30)
    small.step(ahead=100)
    assert small.controller.draining and asked == [(2, False)]
