"""What a cache does on the stream of an engine's steps: memory that comes is zeroed before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

import torch_elastic_mem as tem
from tests.rungs import Rung
from torch_elastic_mem.elastic_kv import ElasticKVTensor
from torch_elastic_mem.integrations.vllm.cache import ElasticCache
from torch_elastic_mem.integrations.vllm.compat import Region

MiB = 1 << 20

pytestmark = pytest.mark.rungs("fake")


def cache_of(arena: tem.Arena, *block_bytes: int, **more: Any) -> ElasticCache:
    """One of 16 blocks, in regions of blocks of so many bytes."""
    regions = [Region(16 * each, each) for each in block_bytes]
    cache = ElasticCache(arena.account("engine", "serving", **more.pop("limits", {})), 16, regions, **more)
    cache.use_stream()
    return cache


def bytes_of(rung: Rung, cache: ElasticCache, chunks: int) -> bytes:
    (part, _), *_ = cache._parts
    return rung.read(part.tensors[0].data_ptr(), chunks * cache.chunk_bytes)


class Streams:
    """torch's streams, of which it has none without a GPU, over those of a rung."""

    def __init__(self, rung: Rung) -> None:
        self._rung = rung
        self.waits: list[tuple[Any, Any]] = []  # which for which
        self.engine = self.new()
        # Whoever grows is another thread, whose current stream is none of the engine's.
        self.current = self.new()

    def new(self) -> Any:
        """One with work on its way: what is queued has run once it has been waited for, and more comes."""
        made = SimpleNamespace(of=self._rung.stream())
        made.of.submit()

        def synchronize() -> None:
            made.of.complete()
            made.of.submit()

        made.synchronize = synchronize
        made.wait_stream = lambda other: self.waits.append((made, other))
        return made

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream or self.current
        try:
            yield
        finally:
            self.current = before


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch, rung: Rung) -> Streams:
    made = Streams(rung)
    monkeypatch.setattr(torch.cuda, "stream", made.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: made.engine)
    monkeypatch.setattr(ElasticKVTensor, "stream", lambda _: made.current.of.handle)
    return made


@pytest.fixture
def foreign(rung: Rung) -> Iterator[tem.Arena]:
    """An arena of 32 MiB, all of it written to by a tenant that has just let it go."""
    arena = rung.arena("32MiB")
    other = arena.account("other", "training").range("32MiB", keep="32MiB", extent="2MiB")
    other.grow("32MiB")
    rung.write(other.address, b"x" * 32 * MiB)
    other.shrink("32MiB")
    yield arena  # while the range is there: its memory comes from it, and not by way of the driver


@pytest.mark.parametrize("aside", [False, True])
def test_what_comes_is_zeroed_between_steps_and_waited_for_only_where_others_use_it(
    rung: Rung, streams: Streams, foreign: tem.Arena, aside: bool
) -> None:
    cache = cache_of(foreign, MiB, aside=aside)
    cache.ensure([0, 1])
    # Behind the step on its way, and so before those to come; a connector may load into it at once.
    assert any(bytes_of(rung, cache, 2)) is not aside
    streams.engine.of.complete()
    assert not any(bytes_of(rung, cache, 2))


def test_what_comes_in_vain_does_not_go_before_it_is_zeroed(
    rung: Rung, streams: Streams, foreign: tem.Arena
) -> None:
    # The smaller region comes first, and then there is no room for the larger.
    cache = cache_of(foreign, MiB, 2 * MiB, limits={"max": "24MiB"})
    with pytest.raises(tem.OutOfMemory):
        cache.ensure(range(cache.num_chunks), timeout=0.1)
    assert not cache._backed
    foreign.collect()
    assert cache.resident_bytes == 16 * MiB
    streams.engine.of.complete()
    foreign.collect()
    assert cache.resident_bytes == cache.account.held == 0


def test_where_another_thread_steps_its_stream_goes_behind_what_the_last_one_had(
    rung: Rung, streams: Streams, foreign: tem.Arena
) -> None:
    cache = cache_of(foreign, MiB)
    cache.use_stream()
    assert streams.waits == []
    cache.ensure([0])
    first, streams.engine = streams.engine, streams.new()
    cache.use_stream()
    ((after, before),) = streams.waits
    assert (after.of, before.of) == (streams.engine.of, first.of)


def test_what_comes_on_a_stream_that_has_just_been_left_is_waited_for(
    rung: Rung, streams: Streams, foreign: tem.Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(foreign, MiB)
    ensure = ElasticKVTensor.ensure

    def ensured(*args: Any, **more: Any) -> None:
        streams.engine = streams.new()
        cache.use_stream()
        ensure(*args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(ElasticKVTensor, "ensure", ensured)
        cache.ensure([0])
    assert not any(bytes_of(rung, cache, 1))
