"""Requests whose rate rises to a peak and falls again, at one engine after the other."""

from __future__ import annotations

import math
import random

import msgspec

from benchmarks.vllm.load import Arrival, drawn

ENGINES = 3
# How much of its ramp an engine is behind the one before it. At a half the rates of all add up to the peak
# from the first engine's peak to the last's; at a quarter to twice the peak, when the middle one has it.
PATTERNS = {"staggered": 0.5, "overlapping": 0.25, "together": 0.0}


class Ramp(msgspec.Struct, frozen=True):
    """Poisson arrivals whose rate rises from 0 to `peak` a second and falls to 0, linearly, in `seconds`.

    Attributes:
        delay: seconds before it begins.
        prompt, output: tokens of each request.
        seed: of the times and the prompts. Equal ramps bring equal requests at equal times.
        vocabulary: tokens are drawn below it.
    """

    peak: float
    seconds: float
    delay: float
    prompt: int
    output: int
    seed: int
    vocabulary: int

    def times(self) -> list[float]:
        """When requests come, in order."""
        rng = random.Random(self.seed)
        # A process of rate 1 on the axis of the requests that are expected by a moment, which is then bent.
        expected = self.peak * self.seconds / 2
        found, at = [], rng.expovariate(1.0)
        while at < expected:
            found.append(self.delay + self._moment(at))
            at += rng.expovariate(1.0)
        return found

    def _moment(self, expected: float) -> float:
        """When so many requests are expected to have come."""
        left = self.peak * self.seconds / 2 - expected
        if expected <= left:
            return math.sqrt(expected * self.seconds / self.peak)
        return self.seconds - math.sqrt(left * self.seconds / self.peak)

    def arrivals(self) -> list[Arrival]:
        """Its requests, in order."""
        # Prompts of their own source, so that they do not depend on how many requests come.
        rng = random.Random(f"prompts {self.seed}")
        return [
            Arrival(at, f"{self.seed}-{number}", drawn(rng, self.prompt, self.vocabulary), self.output)
            for number, at in enumerate(self.times())
        ]


class Run(msgspec.Struct, frozen=True):
    """One pattern at one peak, and the number of its round, which draws requests of its own."""

    pattern: str
    peak: float
    round: int

    def __str__(self) -> str:
        """For the tables."""
        return f"{self.pattern}, {self.peak:g}/s"

    def seconds(self, seconds: float) -> float:
        """How long requests arrive, in all."""
        return seconds * (1 + PATTERNS[self.pattern] * (ENGINES - 1))

    def ramps(self, seconds: float, prompt: int, output: int, vocabulary: int) -> list[Ramp]:
        """Each engine's."""
        return [
            Ramp(
                self.peak,
                seconds,
                number * PATTERNS[self.pattern] * seconds,
                prompt,
                output,
                # One for each engine, peak and round; patterns differ in when ramps begin, and in no more.
                (self.round * 1000 + round(self.peak)) * 10 + number,
                vocabulary,
            )
            for number in range(ENGINES)
        ]
