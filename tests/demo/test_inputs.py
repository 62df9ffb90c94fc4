"""Text, sizes and arrivals."""

from __future__ import annotations

import pytest

import torch_elastic_mem as tem
from torch_elastic_mem.demo.bursts import schedule
from torch_elastic_mem.demo.scale import default_capacity, scale_for
from torch_elastic_mem.demo.text import Text, corpus

MIB, GIB = 1 << 20, 1 << 30


def test_the_corpus_is_text_and_always_the_same() -> None:
    text = corpus(100_000)
    assert len(text) == 100_000
    assert text == corpus(100_000)
    assert text.decode(errors="replace").count(" ") > 5_000


def test_a_batch_depends_on_its_seed_alone(text: Text) -> None:
    inputs, targets = text.batch(7, 3, 40)
    again, _ = Text().batch(7, 3, 40)
    assert inputs.shape == targets.shape == (3, 40)
    assert inputs.equal(again)
    assert inputs[:, 1:].equal(targets[:, :-1])
    assert not inputs.equal(text.batch(8, 3, 40)[0])


@pytest.mark.parametrize(
    ("backend", "capacity"),
    [("host", 128 * MIB), ("host", 192 * MIB), ("host", 512 * MIB), ("cuda", 2 * GIB), ("cuda", 64 * GIB)],
)
def test_a_burst_fits_only_once_training_stands_still(backend: str, capacity: int) -> None:
    scale = scale_for(backend, capacity)
    weights = scale.shape.weight_bytes
    assert scale.sequences > 0
    assert scale.training_peak + weights + scale.burst_bytes > capacity * 1.05
    assert 3 * weights + scale.burst_bytes < capacity * 0.9


@pytest.mark.parametrize("backend", ["host", "cuda"])
def test_a_capacity_that_shows_nothing_is_refused(backend: str) -> None:
    for capacity in (0, 64 * MIB, 1 << 40):
        with pytest.raises(tem.InvalidArgument, match="pass a --capacity between"):
            scale_for(backend, capacity)


def test_the_default_capacities_suit() -> None:
    scale_for("host", default_capacity("host", 0))
    scale_for("cuda", default_capacity("cuda", 16 * GIB))


@pytest.mark.parametrize("seconds", [4, 20, 300])
def test_arrivals_come_in_order_twice_in_bursts_and_fit_the_context(text: Text, seconds: int) -> None:
    scale = scale_for("host", 192 * MIB)
    arrivals = schedule(scale, seconds, text)
    assert arrivals == schedule(scale, seconds, text)
    times = [arrival.at for arrival in arrivals]
    assert times == sorted(times)
    assert 0 <= times[0] <= times[-1] < seconds
    assert sum(seconds * 0.18 <= at <= seconds * 0.24 for at in times) >= scale.burst_requests
    assert sum(seconds * 0.56 <= at <= seconds * 0.62 for at in times) >= scale.burst_requests
    assert all(
        0 < len(arrival.prompt) <= scale.shape.context - arrival.new_tokens and arrival.new_tokens > 0
        for arrival in arrivals
    )
