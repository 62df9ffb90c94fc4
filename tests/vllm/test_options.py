"""The real engine with options that change what is scheduled: the same tokens, squeezed or not."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from tests.vllm.facts import facts
from tests.vllm.options_engine import OPTIONS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(800)]


@pytest.mark.parametrize("which", OPTIONS)
def test_an_engine_that_is_squeezed_serves_the_same_tokens_with(which: str) -> None:
    plain, elastic = (facts(how, which, "tests.vllm.options_engine") for how in ("plain", "elastic"))
    assert elastic["tokens"] == plain["tokens"]
    assert any(elastic["met"])
    least, capacity = elastic["least"]
    assert least <= capacity // 2
