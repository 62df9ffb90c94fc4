"""Kinds of models and features on the real engine: squeezed again and again, they serve vLLM's tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from tests.programs import end, start
from tests.vllm.facts import read
from tests.vllm.models import CACHE
from torch_elastic_mem.integrations.vllm import compat

pytestmark = pytest.mark.timeout(900)


needs_fp8 = pytest.mark.skipif(
    not (torch.cuda.is_available() or torch.cpu._is_avx512_supported()),
    reason="vLLM has no kernel for FP8 on this processor",
)


def facts(how: str, kind: str) -> dict[str, Any]:
    done = end(start("-m", "tests.vllm.models", how, kind, TEM_BROKER="0"), timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    return dict(map(read, done.stdout.splitlines()))


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("states", ["MambaSpec", "FullAttentionSpec"]),
        pytest.param("mla", ["MLAAttentionSpec"], marks=pytest.mark.slow),
        pytest.param("ngram", ["FullAttentionSpec"], marks=pytest.mark.slow),
        pytest.param("eagle", ["FullAttentionSpec"], marks=pytest.mark.slow),
        pytest.param("lora", ["FullAttentionSpec"], marks=pytest.mark.slow),
        pytest.param("reload", ["FullAttentionSpec"], marks=pytest.mark.slow),
        pytest.param("reset", ["FullAttentionSpec"], marks=pytest.mark.slow),
        pytest.param("simple_offload", ["FullAttentionSpec"], marks=pytest.mark.slow),
        pytest.param("offload", ["FullAttentionSpec"], marks=pytest.mark.slow),
        pytest.param("several", ["FullAttentionSpec"], marks=pytest.mark.slow),
        pytest.param("fp8", ["FullAttentionSpec"], marks=[pytest.mark.slow, needs_fp8]),
    ],
)
def test_it_serves_the_same_tokens(kind: str, groups: list[str]) -> None:
    if kind == "several" and compat.release() == "0.26":
        pytest.skip("its MultiConnector does not know the statistics of OffloadingConnector")
    with ThreadPoolExecutor(2) as threads:
        alone, shared = threads.map(facts, ("alone", "shared"), (kind, kind))
    assert shared["groups"] == alone["groups"] == groups
    assert shared["scheduler"] == f"Elastic{alone['scheduler']}"
    assert any(shared["demands"]) and shared["least"] <= CACHE // 2
    assert shared["tokens"] == alone["tokens"]
    if kind in ("simple_offload", "offload", "several"):
        assert shared["found elsewhere"] > 0, "what was dropped here came back from the connector"
