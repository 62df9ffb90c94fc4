"""The result of a run as a value that others may read: one JSON object."""

from __future__ import annotations

import msgspec

from torch_elastic_mem.demo.phase import Outcome
from torch_elastic_mem.demo.proofs import Verdict
from torch_elastic_mem.units import format_bytes


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a run proved and measured. Sizes are bytes, `*_ms` milliseconds.

    Attributes:
        ok: All proofs hold, and training yielded at least once.
        loss_equal: Every step's loss has the same bits as in the same run alone.
        tokens_equal: Every served token is the same as in a run with all memory.
        uncached_equal: Every sampled token is what decoding without a cache gives.
        yields: How often training gave memory to a demand of serving.
        given_bytes: What it gave so, and what it let go when it was denied memory that serving had.
        returned_bytes: What of it training got back.
        leaked_bytes: What was still leased or mapped when both accounts were closed.
        processes: How many the tenants ran in.
    """

    ok: bool
    loss_equal: bool
    tokens_equal: bool
    uncached_equal: bool
    uncached_tokens: int
    yields: int
    yield_ms_median: float
    yield_ms_max: float
    yield_ms: list[float]
    given_bytes: int
    returned_bytes: int
    leaked_bytes: int
    processes: int
    backend: str
    device: str
    capacity: int
    seconds: float
    steps: int
    steps_per_second: float
    first_loss: float | None
    last_loss: float | None
    micro_batches_redone: int
    spilled_bytes: int
    requests: int
    tokens: int
    tokens_per_second: float
    tokens_per_second_peak: float
    preemptions: int
    compactions: int
    compacted_bytes: int
    training_bytes_peak: int
    serving_bytes_peak: int
    timeline: str


def make_report(
    outcome: Outcome,
    verdict: Verdict,
    leaked_bytes: int,
    *,
    processes: int,
    backend: str,
    device: str,
    timeline: str,
) -> Report:
    """Puts what was found together."""
    training, serving = outcome.training, outcome.serving
    samples = outcome.history.samples
    lasted = sorted(record.duration_ns / 1e6 for record in outcome.history.yields)
    tokens = sum(len(request.produced) for request in serving.served)
    proved = verdict.loss_equal and verdict.tokens_equal and verdict.uncached_equal
    return Report(
        ok=proved and leaked_bytes == 0 and bool(lasted),
        loss_equal=verdict.loss_equal,
        tokens_equal=verdict.tokens_equal,
        uncached_equal=verdict.uncached_equal,
        uncached_tokens=verdict.uncached_tokens,
        yields=len(lasted),
        yield_ms_median=lasted[len(lasted) // 2] if lasted else 0.0,
        yield_ms_max=lasted[-1] if lasted else 0.0,
        yield_ms=[record.duration_ns / 1e6 for record in outcome.history.yields],
        given_bytes=outcome.given_bytes,
        returned_bytes=outcome.returned_bytes,
        leaked_bytes=leaked_bytes,
        processes=processes,
        backend=backend,
        device=device,
        capacity=outcome.history.capacity,
        seconds=outcome.seconds,
        steps=len(training.losses),
        steps_per_second=len(training.losses) / outcome.seconds,
        first_loss=training.losses[0] if training.losses else None,
        last_loss=training.losses[-1] if training.losses else None,
        micro_batches_redone=training.abandoned,
        spilled_bytes=training.spilled_bytes,
        requests=len(serving.served),
        tokens=tokens,
        tokens_per_second=tokens / outcome.seconds,
        tokens_per_second_peak=max((sample.tokens_per_second for sample in samples), default=0.0),
        preemptions=serving.preemptions,
        compactions=serving.compactions,
        compacted_bytes=serving.compacted_bytes,
        training_bytes_peak=max((sample.training for sample in samples), default=0),
        serving_bytes_peak=max((sample.serving for sample in samples), default=0),
        timeline=timeline,
    )


def statements(report: Report) -> list[tuple[bool, str]]:
    """Says in words what holds and what does not."""
    first, last = report.first_loss, report.last_loss
    fell = "" if first is None or last is None else f" ({first:.3f} to {last:.3f})"
    return [
        (
            report.loss_equal,
            f"training: {report.steps} losses{fell} are bit for bit those of the same run alone",
        ),
        (
            report.tokens_equal,
            f"serving: {report.tokens} tokens of {report.requests} requests are those of a run with all "
            "memory",
        ),
        (
            report.uncached_equal,
            f"cache: {report.uncached_tokens} of those tokens are what decoding without a cache gives",
        ),
        (
            report.yields > 0,
            f"memory: training yielded {report.yields} times, half of them within "
            f"{report.yield_ms_median:.1f} ms and all within {report.yield_ms_max:.1f} ms; it gave "
            f"{format_bytes(report.given_bytes)}, and {format_bytes(report.returned_bytes)} came back",
        ),
        (report.leaked_bytes == 0, f"leaked: {format_bytes(report.leaked_bytes)}"),
    ]
