import pytest

import torch_elastic_mem as tem
from benchmarks.serving import STEP_S, Engine
from benchmarks.traces import Request


class CountingCache:
    """Blocks of one byte, and a check that none is lost or given twice."""

    def __init__(self, blocks, moves=()):
        self.free_blocks = list(range(blocks))[::-1]
        self.taken = set()
        self.moves = list(moves)

    def allocate(self, count):
        if count > len(self.free_blocks):
            raise tem.OutOfMemory("full")
        blocks = [self.free_blocks.pop() for _ in range(count)]
        self.taken.update(blocks)
        return blocks

    def free(self, blocks):
        for block in blocks:
            self.taken.remove(block)
            self.free_blocks.append(block)

    def compact(self):
        if not self.taken or not self.moves:
            return {}
        source, target = self.moves.pop()
        self.free_blocks.remove(target)
        self.taken.remove(source)
        self.taken.add(target)
        self.free_blocks.append(source)
        return {source: target}

    @property
    def live_bytes(self):
        return len(self.taken)

    @property
    def mapped_bytes(self):
        return -(-len(self.taken) // 4) * 4


def serve(cache, requests, compact_every_s=None):
    outcome = Engine(cache, compact_every_s=compact_every_s).serve(requests)
    assert not cache.taken
    return outcome


def test_a_request_lives_for_its_prefill_and_its_tokens():
    # 1,000 tokens are read in 0.1 s: steps 0 to 4. The five tokens come at steps 5 to 9.
    outcome = serve(CountingCache(100), [Request(0.0, 1000, 5)])
    assert outcome.finished == 1
    assert outcome.seconds == pytest.approx(10 * STEP_S)
    figures = outcome.residency.figures()
    assert figures.peak_live == 63
    assert figures.peak_mapped == 64


def test_blocks_grow_by_one_every_16_tokens():
    outcome = serve(CountingCache(100), [Request(0.0, 16, 34)])
    # 16 tokens of prompt and 33 in the cache when the last one comes: four blocks.
    assert outcome.residency.figures().peak_live == 4


def test_idle_time_is_skipped_but_counted():
    advanced = []
    cache = CountingCache(10)
    requests = [Request(0.0, 1, 1), Request(1000.0, 1, 1)]
    outcome = Engine(cache, compact_every_s=None).serve(requests, advanced.append)
    assert outcome.seconds == pytest.approx(1000, abs=1)
    assert sum(advanced) == 2
    assert len(advanced) < 10
    assert outcome.residency.figures().mean_live < 0.01


def test_what_does_not_fit_now_waits_and_is_served():
    outcome = serve(CountingCache(10), [Request(0.0, 150, 2), Request(0.0, 150, 2)])
    assert outcome.finished == 2
    assert outcome.delayed > 0
    assert outcome.residency.figures().peak_live == 10


def test_what_never_fits_is_rejected_and_the_rest_served():
    outcome = serve(CountingCache(10), [Request(0.0, 161, 2), Request(0.0, 16, 2), Request(0.0, 160, 20)])
    # The last one fits at first and outgrows the whole cache.
    assert (outcome.finished, outcome.rejected) == (1, 2)


def test_the_youngest_gives_way_when_a_running_request_cannot_grow():
    outcome = serve(CountingCache(10), [Request(0.0, 80, 40), Request(0.0, 80, 40)])
    assert outcome.finished == 2
    assert outcome.preempted > 0
    assert outcome.residency.figures().peak_live <= 10


def test_moved_blocks_are_freed_where_they_are_now():
    outcome = serve(
        CountingCache(20, moves=[(1, 19), (0, 18)]), [Request(0.0, 100, 100)], compact_every_s=STEP_S
    )
    assert outcome.finished == 1
