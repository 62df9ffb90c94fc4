"""Which fixed split of the memory would serve a load best: a search over a model of engines that share a GPU.

Stock vLLM cannot change the size of its cache without a restart, so a split cannot be searched by trying. The
model stands in for it. It is kind to fixed splits: it knows the load in advance.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence

import msgspec

from benchmarks.timing import percentile

# A split is searched in so many parts, of which each engine has so many at least.
PARTS, LEAST = 12, 2


class Pace(msgspec.Struct, frozen=True):
    """Seconds that a step of one engine takes of the device.

    Attributes:
        step: of itself. running: more for each running request. prompt: more for each that it admits.
    """

    step: float
    running: float
    prompt: float


# cuda: one H100 and a Llama-3.1-8B's shape, from what bench_engine has seen: 6.5 ms between two tokens when
# few run, 12.8 ms when 256 do, and 256 prompts of 256 tokens read in 1.55 s. host: a tiny model on two cores.
PACES = {"cuda": Pace(0.0065, 0.000025, 0.006), "host": Pace(0.012, 0.0005, 0.004)}


def waits(arrivals: Sequence[Sequence[float]], slots: Sequence[int], output: int, pace: Pace) -> list[float]:
    """Seconds from each request's arrival to its first token, of all engines.

    The engines take turns on the device, so a step of any takes as long as the steps of all that are busy.
    A request takes its whole memory when it is admitted, in order of arrival, and gives it back with its last
    token.

    Args:
        arrivals: the times of each engine's requests, in order.
        slots: how many requests each engine's memory holds.
        output: tokens of a request, one a step, two at least.
        pace: of a step.
    """
    if not all(slots):
        return [math.inf]
    coming = [deque(each) for each in arrivals]
    # How many requests end in so many steps, by engine; the sum of each is what runs.
    ending = [deque([0] * (output - 1), output - 1) for _ in arrivals]
    running = [0] * len(arrivals)
    found: list[float] = []
    now = 0.0
    while any(coming) or any(running):
        admitted: list[list[float]] = []
        for number, queue in enumerate(coming):
            new = []
            while queue and queue[0] <= now and running[number] < slots[number]:
                new.append(queue.popleft())
                running[number] += 1
            admitted.append(new)
        if not any(running):
            now = min(queue[0] for queue in coming if queue)
            continue
        now += sum(
            pace.step + pace.running * busy + pace.prompt * len(new)
            for busy, new in zip(running, admitted, strict=True)
            if busy
        )
        for number, new in enumerate(admitted):
            found += [now - at for at in new]
            running[number] -= ending[number][0]
            ending[number].append(len(new))
    return found


def splits(parts: int, count: int, least: int) -> Iterator[tuple[int, ...]]:
    """All ways to share out `parts` among `count`, with so many at least for each."""
    if count == 1:
        yield (parts,)
        return
    for first in range(least, parts - least * (count - 1) + 1):
        for rest in splits(parts - first, count - 1, least):
            yield first, *rest


def best(
    loads: Sequence[Sequence[Sequence[float]]], slots: int, output: int, pace: Pace
) -> tuple[tuple[int, ...], float, float]:
    """The split with the lowest p99 of the time to the first token, on average over loads.

    Args:
        loads: for each load, the times of each engine's requests.
        slots: requests that the memory of all engines holds.
        output: as of `waits`.
        pace: likewise.

    Returns:
        The split in PARTS-ths; its p99, and that of the equal split, in seconds.
    """
    count = len(loads[0])
    equal = (PARTS // count,) * count

    def badness(split: tuple[int, ...]) -> float:
        shares = [slots * part // PARTS for part in split]
        worst = [percentile(waits(load, shares, output, pace), 99) for load in loads]
        return sum(worst) / len(worst)

    scores = {split: badness(split) for split in splits(PARTS, count, LEAST)}
    # Of equally good ones the most even.
    chosen = min(scores, key=lambda split: (round(scores[split], 3), max(split)))
    return chosen, scores[chosen], scores[equal]
