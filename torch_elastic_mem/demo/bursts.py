"""When requests come: quiet, a burst, quiet, a burst, quiet."""

from __future__ import annotations

import random
from dataclasses import dataclass

from torch_elastic_mem.demo.scale import Scale
from torch_elastic_mem.demo.text import Text

_BURSTS = (0.18, 0.56)  # where a burst begins, as a share of the phase
_WITHIN = 0.06  # of the phase, in which a burst's requests come
_DECODING = 0.16  # of the phase, in which a burst is to be decoded
_QUIET_GAP = 0.06  # of the phase, between the requests of quiet times
_ANSWER = (4, 64)  # fewest and most tokens of an answer


@dataclass(frozen=True)
class Arrival:
    """One request to come: seconds after the start, what is asked, how many tokens are to be answered."""

    at: float
    prompt: tuple[int, ...]
    new_tokens: int


def schedule(scale: Scale, seconds: float, text: Text, seed: int = 0) -> list[Arrival]:
    """Draws the arrivals of a phase of `seconds`, in order. The same arguments give the same arrivals."""
    draw = random.Random(seed)
    shortest, longest = scale.prompt_tokens
    mean = _DECODING * seconds * scale.tokens_per_second / scale.burst_requests
    arrivals = []

    def arrive(at: float, prompt_tokens: int, new_tokens: float) -> None:
        least, most = _ANSWER
        answer = max(least, min(most, scale.shape.context - longest, round(new_tokens)))
        prompt = text.prompt(draw.randrange(1 << 31), prompt_tokens)
        arrivals.append(Arrival(at, tuple(prompt), answer))

    for begin in _BURSTS:
        for _ in range(scale.burst_requests):
            at = seconds * (begin + draw.random() * _WITHIN)
            arrive(at, draw.randint(shortest, longest), mean * draw.uniform(0.5, 1.5))
    for beat in range(int(1 / _QUIET_GAP)):
        arrive(seconds * (beat + draw.random()) * _QUIET_GAP, shortest // 4, mean)
    return sorted(arrivals, key=lambda arrival: arrival.at)
