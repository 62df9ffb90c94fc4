"""Request traces: when requests come, how long their prompts are, and how much is generated.

Three sources: the Azure LLM inference traces (CSV), the Mooncake traces (JSON lines), and a seeded generator
of bursts for anyone who has no trace at hand.
"""

from __future__ import annotations

import csv
import hashlib
import random
from datetime import datetime
from pathlib import Path

import msgspec


class Request(msgspec.Struct, frozen=True):
    """One request: seconds since the first one, prompt tokens, tokens to generate (at least one)."""

    arrival: float
    prompt: int
    output: int


class TraceError(ValueError):
    """A trace file that cannot be read; says the file, the line and what was expected there."""


class _MooncakeLine(msgspec.Struct):
    timestamp: float  # milliseconds
    input_length: int
    output_length: int


def read(path: Path) -> list[Request]:
    """Reads a trace by the form of its content: JSON lines or CSV.

    Returns:
        Requests sorted by arrival, the first at 0.0 s.

    Raises:
        TraceError: the file is in neither form, or holds no requests.
    """
    text = path.read_text(encoding="utf-8-sig")
    requests = _read_mooncake(path, text) if text.lstrip().startswith("{") else _read_azure(path, text)
    if not requests:
        raise TraceError(f"{path.name} holds no requests")
    requests.sort(key=lambda request: request.arrival)
    first = requests[0].arrival
    return [Request(request.arrival - first, request.prompt, request.output) for request in requests]


def _read_azure(path: Path, text: str) -> list[Request]:
    reader = csv.DictReader(text.splitlines())
    expected = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if reader.fieldnames is None or not set(expected) <= set(reader.fieldnames):
        raise TraceError(
            f"{path.name}: expected a header with {', '.join(expected)}, found {reader.fieldnames}"
        )
    requests = []
    for row in reader:
        try:
            # The traces carry 100 ns ticks; fromisoformat of Python 3.11 drops what is beyond microseconds.
            arrival = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
            requests.append(_request(arrival, int(row["ContextTokens"]), int(row["GeneratedTokens"])))
        except (TypeError, ValueError) as error:
            raise TraceError(f"{path.name}, line {reader.line_num}: {error}") from error
    return requests


def _read_mooncake(path: Path, text: str) -> list[Request]:
    requests = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found = msgspec.json.decode(line, type=_MooncakeLine)
        except msgspec.DecodeError as error:
            raise TraceError(f"{path.name}, line {number}: {error}") from error
        requests.append(_request(found.timestamp / 1000, found.input_length, found.output_length))
    return requests


def _request(arrival: float, prompt: int, output: int) -> Request:
    # Azure's traces hold a few requests that generated nothing; a prefill always yields one token.
    return Request(arrival, max(prompt, 1), max(output, 1))


def bursts(count: int, seed: int) -> list[Request]:
    """Makes `count` requests that come in bursts: long quiet spells at 0.5 a second, short ones at 25.

    Lengths are log-normal with the medians and means of the Azure code trace: 1,469 and 2,048 prompt tokens,
    13 and 28 generated ones. The same seed gives the same requests on every machine.
    """
    rng = random.Random(seed)
    requests: list[Request] = []
    now = 0.0
    spell_end = 0.0
    rate = 25.0
    while len(requests) < count:
        if now >= spell_end:
            busy = rate < 1.0
            rate = 25.0 if busy else 0.5
            spell_end = now + rng.expovariate(1 / (3.0 if busy else 30.0))
        now += rng.expovariate(rate)
        prompt = min(int(rng.lognormvariate(7.292, 0.815)), 7500)
        requests.append(_request(now, prompt, min(int(rng.lognormvariate(2.565, 1.239)), 2000)))
    first = requests[0].arrival
    return [Request(request.arrival - first, request.prompt, request.output) for request in requests]


def fingerprint(requests: list[Request]) -> str:
    """A short hash of the requests themselves, to tell whether two results come from one trace."""
    return hashlib.sha256(msgspec.json.encode(requests)).hexdigest()[:12]
