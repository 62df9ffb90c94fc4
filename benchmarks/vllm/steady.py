"""A batch of one size decodes: what its steps take, of the engine's thread and of the device."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import msgspec

from benchmarks.timing import percentile
from benchmarks.vllm.engine import Engine
from benchmarks.vllm.load import drawn

# Steps before those that are timed: prompts are computed, and the first decodes are launched.
BEFORE = 24


class Batch(msgspec.Struct, frozen=True):
    """So many requests with prompts of so many tokens, which decode for so many steps."""

    requests: int
    prompt: int
    steps: int
    vocabulary: int


class Steps(msgspec.Struct):
    """What a batch's steps took, in seconds.

    Attributes:
        whole: each step, as who drives the engine sees it.
        parts: the median of what each part of a step keeps the engine's thread busy.
        work, pause: medians of the device's stream: from where a step's work begins, or is waited for once
            the step is being launched, to its end; and from there to where the next begins. None on the host.
    """

    whole: list[float]
    parts: dict[str, float]
    work: float | None = None
    pause: float | None = None


def run(engine: Engine, batch: Batch) -> Steps:
    """Has the engine, which serves nothing else, decode the batch; nothing of it is left.

    Raises:
        RuntimeError: not all of it decoded in each of these steps.
    """
    engine.llm.reset_prefix_cache()
    rng = random.Random(batch.requests)
    names = [f"steady-{number}" for number in range(batch.requests)]
    for name in names:
        _add(engine.llm, name, drawn(rng, batch.prompt, batch.vocabulary), batch.steps + 2 * BEFORE)
    for _ in range(BEFORE):
        engine.llm.step()
    _require_whole(engine, batch)
    device = _Device(engine.worker.device)
    whole: list[float] = []
    with _parts(engine, device) as parts:
        for _ in range(batch.steps):
            begun = time.perf_counter()
            engine.llm.step()
            whole.append(time.perf_counter() - begun)
    _require_whole(engine, batch)
    work, pause = device.medians()
    engine.llm.abort_request(names)
    # What runs now, and the runner's rows of what has ended, of which the next step tells it.
    core = engine.llm.engine_core.engine_core
    while engine.scheduler.has_requests() or core.batch_queue:
        engine.llm.step()
    return Steps(whole, {name: percentile(spent, 50) for name, spent in parts.items()}, work, pause)


def _require_whole(engine: Engine, batch: Batch) -> None:
    if (running := len(engine.scheduler.running)) != batch.requests:
        raise RuntimeError(
            f"{running} of {batch.requests} requests decode: the cache, or the length of one, allows no more"
            "; ask for fewer requests or steps"
        )


def _add(llm: Any, name: str, prompt: list[int], output: int) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = SamplingParams(
        max_tokens=output,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    llm.add_request(name, {"prompt_token_ids": prompt}, sampling)


@contextmanager
def _parts(engine: Engine, device: _Device) -> Iterator[dict[str, list[float]]]:
    """Within the block the calls that a step is made of are timed."""
    found: dict[str, list[float]] = {}
    calls = {
        "schedule": (engine.scheduler, "schedule"),
        "launch": (engine.worker, "execute_model"),
        "sample": (engine.worker, "sample_tokens"),
        "update": (engine.scheduler, "update_from_output"),
    }
    around = {"launch": (device.begin, _nothing), "sample": (_nothing, device.end)}
    with ExitStack() as stack:
        for name, (owner, method) in calls.items():
            spent = found[name] = []
            before, after = around.get(name, (_nothing, _nothing))
            timed = _timed(getattr(owner, method), spent, before, after)
            stack.enter_context(mock.patch.object(owner, method, timed))
        yield found


def _nothing() -> None:
    pass


def _timed(
    plain: Callable[..., Any], spent: list[float], before: Callable[[], None], after: Callable[[], None]
) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        before()
        begun = time.perf_counter()
        answer = plain(*args, **kwargs)
        spent.append(time.perf_counter() - begun)
        after()
        return answer

    return timed


class _Device:
    """Events on the stream that an engine's steps are launched on, at the beginning and the end of each."""

    def __init__(self, device: Any) -> None:
        self._on_cuda = device.type == "cuda"
        self._begun: list[Any] = []
        self._ended: list[Any] = []

    def begin(self) -> None:
        """The stream's next work is a step's."""
        self._note(self._begun)

    def end(self) -> None:
        """The stream has all of a step's work."""
        self._note(self._ended)

    def _note(self, events: list[Any]) -> None:
        if self._on_cuda:
            import torch

            event = torch.cuda.Event(enable_timing=True)
            event.record()
            events.append(event)

    def medians(self) -> tuple[float | None, float | None]:
        """Of the steps' work, and of the pauses between one and the next, in seconds."""
        if not self._on_cuda:
            return None, None
        self._ended[-1].synchronize()
        work = [start.elapsed_time(end) for start, end in zip(self._begun, self._ended, strict=True)]
        pairs = zip(self._ended, self._begun[1:], strict=False)
        pause = [end.elapsed_time(start) for end, start in pairs]
        return percentile(work, 50) / 1e3, percentile(pause, 50) / 1e3
