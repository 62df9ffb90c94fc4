"""Both tenants in a real arena: giving way, taking up again, preemption, compaction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from torch_elastic_mem.demo.bursts import Arrival
from torch_elastic_mem.demo.server import Server
from torch_elastic_mem.demo.stage import Stage
from torch_elastic_mem.demo.tenant import Appeal, TrainingTenant
from torch_elastic_mem.demo.text import Text
from torch_elastic_mem.demo.trainer import Trainer, train
from torch_elastic_mem.demo.worker import Worker

MIB = 1 << 20


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Waits for another thread."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@contextmanager
def training(stage: Stage) -> Iterator[tuple[TrainingTenant, Worker[None]]]:
    """Trains on a thread, which ends with the context at the latest."""
    cold = torch.empty(2, stage.initial.numel())
    tenant = TrainingTenant(
        stage.account,
        lambda boundary: stage.trainer(boundary, cold),
        micro_batches=stage.scale.micro_batches,
        peak_bytes=stage.scale.training_peak,
        capacity=stage.scale.capacity,
        settle=0.01,
    )
    worker = Worker("training", tenant.run)
    worker.start()
    try:
        yield tenant, worker
    finally:
        tenant.cancel()
        worker.join()


def has_losses(tenant: TrainingTenant, steps: int) -> bool:
    return len(tenant.losses) >= steps


def losses_alone(stage: Stage, steps: int) -> list[float]:
    trainer = stage.trainer()
    return [train(trainer, stage.scale.micro_batches) for _ in range(steps)]


def test_an_answer_ends_the_wait_and_a_late_one_is_still_asked_for() -> None:
    appeal = Appeal()
    assert not appeal.ask(0.01)
    assert appeal.pending
    asking = Worker("asking", partial(appeal.ask, 30))
    asking.start()
    until(lambda: appeal.pending)
    time.sleep(0.01)
    appeal.answer()
    assert asking.result()
    assert not appeal.pending


def test_training_gives_way_to_a_demand_and_goes_on_with_the_same_bits(trained: Stage, served: Stage) -> None:
    # Beside so much there is room for training's weights and sums, and none for its activations.
    demand = trained.arena.capacity - 12 * MIB
    with training(trained) as (tenant, worker):
        until(partial(has_losses, tenant, 2))
        for _ in range(3):
            # By itself an allocation takes what is idle, and calls no reclaimer.
            with served.account.reserve(demand), served.account.allocations():
                burst = torch.ones(demand // 4)
            assert trained.account.held <= 12 * MIB
            until(lambda: tenant.state == "waiting")
            assert float(burst.sum()) == demand // 4
            del burst
            served.account.trim()
            until(partial(has_losses, tenant, len(tenant.losses) + 2))
        tenant.finish()
        worker.result()
    assert tenant.abandoned >= 3
    assert tenant.regained > 0
    assert any(record.victim == "training" and record.given for record in trained.arena.yields())
    assert tenant.losses == losses_alone(trained, len(tenant.losses))


def test_the_cheaper_rung_moves_the_moments_out_and_training_goes_on(trained: Stage) -> None:
    with training(trained) as (tenant, worker):
        until(partial(has_losses, tenant, 1))
        until(lambda: tenant._on_spill(MIB, 1.0) >= 0 and tenant.spilled)
        until(partial(has_losses, tenant, len(tenant.losses) + 2))
        tenant.finish()
        worker.result()
    assert tenant.spilled >= 2 * trained.initial.nbytes
    assert tenant.abandoned == 0
    assert tenant.losses == losses_alone(trained, len(tenant.losses))


def test_cancelled_training_ends_in_the_middle_of_a_wait(trained: Stage, served: Stage) -> None:
    with served.account.allocations():
        burst = torch.empty((trained.arena.capacity - 4 * MIB) // 4)
    with training(trained) as (tenant, worker):
        until(lambda: tenant.state == "waiting")
        tenant.cancel()
        worker.result()
    assert tenant.losses == []
    del burst


def test_a_failure_of_training_is_not_taken_for_want_of_memory(trained: Stage) -> None:
    def build(boundary: Callable[[], None]) -> Trainer:
        raise RuntimeError("broken")

    tenant = TrainingTenant(
        trained.account, build, micro_batches=1, peak_bytes=0, capacity=trained.scale.capacity, settle=0.0
    )
    with pytest.raises(RuntimeError, match="broken"):
        tenant.run()


def arrivals_of(text: Text, count: int) -> list[Arrival]:
    return [Arrival(0.0, tuple(text.prompt(n, 8 + 3 * n % 25)), 8 + 5 * n % 20) for n in range(count)]


def serve(stage: Stage, arrivals: list[Arrival], blocks: int) -> Server:
    """Serves all arrivals with a cache of so many blocks."""
    server = stage.server(arrivals, blocks)
    stage.serve(server, threading.Event())
    return server


def tokens_of(server: Server) -> list[list[int]]:
    return [request.produced for request in server.served()]


def test_a_server_with_too_few_blocks_preempts_and_answers_the_same(served: Stage, text: Text) -> None:
    arrivals = arrivals_of(text, 24)
    roomy = serve(served, arrivals, 512)
    tight = serve(served, arrivals, 20)
    assert tight.preemptions > 0
    assert tokens_of(tight) == tokens_of(roomy)
    assert [len(tokens) for tokens in tokens_of(roomy)] == [arrival.new_tokens for arrival in arrivals]
    assert tight.running == tight.waiting == 0


def test_a_stopped_server_has_given_all_its_blocks_back(served: Stage, text: Text) -> None:
    server = served.server([Arrival(0.0, tuple(text.prompt(n, 30)), 30) for n in range(50)])
    stop = threading.Event()
    worker = Worker("serving", partial(served.serve, server, stop))
    worker.start()
    try:
        while server.tokens < 60 and worker.is_alive():
            time.sleep(0.002)
    finally:
        stop.set()
    worker.result()
    assert 0 < len(server.served()) <= 50
    assert server.running == 0
    del server, worker
    served.account.trim()


def test_blocks_may_move_between_two_tokens(served: Stage, text: Text) -> None:
    # A block is 4 KiB, 512 fill an extent: a few long answers hold on to extents that all others have left.
    arrivals = [Arrival(0.0, tuple(text.prompt(n, 32)), 32 if n % 16 == 0 else 2 + n % 3) for n in range(600)]
    server = serve(served, arrivals, 8192)
    assert server.compactions > 0
    assert server.compacted_bytes > 0
    calm = serve(served, arrivals[:1] + arrivals[16:17], 64)
    assert tokens_of(server)[0] == tokens_of(calm)[0]
    assert tokens_of(server)[16] == tokens_of(calm)[1]
