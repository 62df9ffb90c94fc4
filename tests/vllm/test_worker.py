"""Our workers where the cache is not elastic, there is none, or one of several ranks sleeps already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1.kv_cache_interface import CrossAttentionSpec, FullAttentionSpec
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

import torch_elastic_mem as tem
from torch_elastic_mem.errors import InvalidArgument
from torch_elastic_mem.integrations.vllm import gpu_worker
from torch_elastic_mem.integrations.vllm import worker as module
from torch_elastic_mem.integrations.vllm.compat import Region, Unsupported
from torch_elastic_mem.integrations.vllm.cpu_worker import ElasticCPUWorker
from torch_elastic_mem.integrations.vllm.gpu_worker import ElasticWorker

GiB = 1 << 30
OURS = {ElasticWorker: Worker, ElasticCPUWorker: CPUWorker}


def made(kind: type[Any], spec: type[Any] = CrossAttentionSpec, sleep: Any = None) -> Any:
    worker = object.__new__(kind)
    layer = spec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float16)
    worker.get_kv_cache_spec = lambda: {"layer": layer}
    scheduling = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    worker.vllm_config = SimpleNamespace(scheduler_config=scheduling, kv_transfer_config=None)
    worker.elastic_sleep = sleep
    return worker


def sleeper(*, away: bool) -> Any:
    levels: list[int] = []
    return SimpleNamespace(weights=SimpleNamespace(away=away), suspend=levels.append, levels=levels)


def test_an_engine_that_is_left_alone_gets_what_vllm_would_have_given_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    worker = made(ElasticWorker)
    worker.cache_config, worker.init_snapshot = SimpleNamespace(gpu_memory_utilization=0.5), object()
    monkeypatch.setattr(gpu_worker, "request_memory", lambda *what: what)
    monkeypatch.setattr(Worker, "determine_available_memory", lambda self: self.requested_memory)
    assert worker.determine_available_memory() == (worker.init_snapshot, worker.cache_config)


def test_on_the_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CPUWorker, "determine_available_memory", lambda self: 7)
    assert made(ElasticCPUWorker).determine_available_memory() == 7


def test_layers_that_are_known_are_served() -> None:
    assert made(ElasticWorker, FullAttentionSpec).keeps_what_is_known()
    assert not made(ElasticWorker).keeps_what_is_known()


def test_a_cache_that_would_not_sleep_is_an_error_of_an_engine_that_is_to() -> None:
    with pytest.raises(Unsupported, match=r"CrossAttentionSpec; such a cache does not sleep"):
        made(ElasticWorker, sleep=sleeper(away=False)).keeps_what_is_known()


def test_a_cache_has_what_the_accounts_max_leaves_beside_the_weights_in_it() -> None:
    worker = made(ElasticWorker)
    worker.elastic_account = SimpleNamespace(limits=SimpleNamespace(max=None))
    assert worker.within_its_limit(40 * GiB, 17 * GiB) == 40 * GiB
    worker.elastic_account.limits.max = 40 * GiB
    assert worker.within_its_limit(80 * GiB, 17 * GiB) == 23 * GiB
    assert worker.within_its_limit(20 * GiB, 17 * GiB) == 20 * GiB
    with pytest.raises(InvalidArgument, match=r"max is 40 GiB, and .* take 40 GiB of it: nothing is left"):
        worker.within_its_limit(80 * GiB, 40 * GiB)


@pytest.mark.parametrize("ours", [False, True])
def test_where_a_layout_is_refused_after_the_cache_was_sized_as_ours_the_warning_says_so(
    ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise Unsupported("its layout is unknown")

    told: list[str] = []
    monkeypatch.setattr(module.compat, "specs", lambda _: [])
    monkeypatch.setattr(module.compat_layers, "require_on_device", refuse)
    monkeypatch.setattr(module.log, "warning", lambda text, *args: told.append(text % args))
    worker = made(ElasticWorker)
    worker.sized_by_account = ours
    assert worker._new_cache(None) is None
    assert "leaves this engine's KV cache alone: its layout is unknown" in told[0]
    assert ["--kv-cache-memory-bytes" in each for each in told[1:]] == [True] * ours


@pytest.mark.parametrize("connector", [None, SimpleNamespace(kv_connector="OffloadingConnector")])
def test_memory_that_comes_is_waited_for_only_beside_a_kv_connector(
    connector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for owner, name in (
        (module.compat, "make_block_major"),
        (module.compat_layers, "require_on_device"),
        (module.connectors, "require_whole_layers"),
    ):
        monkeypatch.setattr(owner, name, lambda *_: None)
    monkeypatch.setattr(module.compat, "specs", lambda _: [])
    monkeypatch.setattr(module.compat, "regions", lambda _: [Region(32 << 20, 1 << 20)])
    worker = made(ElasticWorker)
    worker.vllm_config.kv_transfer_config = connector
    arena = tem.Arena("host", capacity="64MiB", reserve=(0, 0), broker=None)
    worker.elastic_account = arena.account("engine", "serving")
    cache = worker._new_cache(SimpleNamespace(num_blocks=32))
    assert cache.aside is (connector is not None)


def test_an_engine_without_a_cache_warms_up_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: 1.5)
    assert made(ElasticWorker).compile_or_warm_up_model() == 1.5


@pytest.mark.parametrize("kind", OURS)
def test_where_the_weights_are_away_no_buffer_of_theirs_is_read_to_fall_asleep(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = made(kind, sleep=sleeper(away=True))
    monkeypatch.setattr(OURS[kind], "sleep", lambda *_: pytest.fail("it saves buffers"), raising=False)
    worker.sleep(2)
    assert worker.elastic_sleep.levels == [2]


class Stepping:
    """A worker of vLLM's, whose steps are told what becomes of them."""

    def execute_model(self, step: Any) -> Any:
        return come(step)

    def sample_tokens(self, step: Any) -> Any:
        return come(step)


def come(what: Any) -> Any:
    if isinstance(what, BaseException):
        raise what
    return what


class ElasticStepping(module.Elastic, Stepping):  # type: ignore[misc]
    def __init__(self) -> None:
        self.enqueued = 0
        self.elastic_cache: Any = SimpleNamespace(on_enqueued=self._count)

    def _count(self) -> None:
        self.enqueued += 1


@pytest.mark.parametrize(("model", "sampled", "enqueued"), [("output", None, 1), (None, "output", 1)])
def test_a_step_is_on_the_stream_when_it_has_an_output(model: Any, sampled: Any, enqueued: int) -> None:
    worker = ElasticStepping()
    if worker.execute_model(model) is None:
        assert worker.enqueued == 0
        assert worker.sample_tokens(sampled) == sampled
    assert worker.enqueued == enqueued


@pytest.mark.parametrize("fails", ["execute_model", "sample_tokens"])
def test_nothing_more_comes_of_a_step_that_fails_and_nobody_waits_for_it(fails: str) -> None:
    worker = ElasticStepping()
    with pytest.raises(torch.OutOfMemoryError):
        getattr(worker, fails)(torch.OutOfMemoryError("too large"))
    assert worker.enqueued == 1
