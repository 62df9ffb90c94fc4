"""Memory from one process to another through a broker, beside the bare driver between two processes.

Run as python -m benchmarks.bench_handover --help.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

import torch_elastic_mem as tem
from benchmarks import machine
from benchmarks.broker_process import broker_for
from benchmarks.floor.handover import HandoverFloor
from benchmarks.handover_tables import IDLE, NO_GIL, RESERVE, TRAINING, Readings, tables
from benchmarks.handover_worker import HOLDER, TAKER, TRAINER
from benchmarks.options import backend_option, errors_as_messages, out_option, size_option
from benchmarks.results import Result, command_line
from benchmarks.terminal import publish
from benchmarks.timing import interleave
from benchmarks.worker import Worker
from torch_elastic_mem.device import device_of

MIB = 1 << 20
PAGE = 2 * MIB
EXTENT = 64 * MIB
# Stays free on the device, as the broker's lower mark: a device with nothing free makes every create wait.
FREE = {"host": 0, "cuda": 256 * MIB}
_GIL_SECONDS = 2.0
# Of a GPU, for the contexts of the run's processes, where the broker cannot see them.
_CONTEXTS = 5 << 30
# The broker looks at a GPU ten times a second, and must have seen a context before the rest is filled.
_LOOK_SECONDS = 0.4
_FILLS = 3


class Bench:
    """The processes of one run, all on one device."""

    def __init__(self, backend: str, size: int, rounds: int) -> None:
        self._backend = backend
        self._size = size
        self._rounds = rounds
        self._few = max(2, rounds // 4)
        self._stack = ExitStack()

    def __enter__(self) -> Bench:
        kind = device_of(self._backend)[0]
        with ExitStack() as stack:
            with tem.Arena(self._backend, capacity=PAGE if kind == "host" else None, broker=None) as arena:
                left = arena.capacity - 2 * self._size - _CONTEXTS
                capacity = 2 * self._size if kind == "host" else left
                self.uuid = None if kind == "host" else arena.uuid
                # They hold theirs before the broker comes: it shares out the rest.
                self._floor = stack.enter_context(HandoverFloor(self._backend, self._size, EXTENT))
                self._pages = stack.enter_context(HandoverFloor(self._backend, self._size, PAGE))
                for floor in (self._floor, self._pages):
                    floor.hold()
                self._broker = stack.enter_context(broker_for(arena, capacity, FREE[kind]))
            self._taker = stack.enter_context(self._worker(TAKER))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self) -> dict[str, Readings]:
        """All of it, from the emptiest victim to the busiest."""
        raw = {}
        with self._worker(HOLDER) as holder:
            raw[IDLE] = self._idle(holder)
            raw[NO_GIL] = self._without_gil(holder)
            holder.ask({"op": "empty"})
            raw[RESERVE] = self._reserve()
        with self._worker(TRAINER) as trainer:
            raw[TRAINING] = self._training(trainer)
            trainer.ask({"op": "end"})
        with self._broker.control() as control:
            yields = [event.duration_ns for event in control.events() if event.kind == "yield"]
        raw["asks"] = {"yield": [float(each) for each in yields]}
        return raw

    def _idle(self, holder: Worker) -> Readings:
        holder.ask({"op": "fill"})
        return self._interleave(
            IDLE, self._rounds, take=self._take, give=self._give, fill=lambda: self._fill(holder)
        )

    def _without_gil(self, holder: Worker) -> Readings:
        def take() -> float:
            holder.ask({"op": "hold_gil", "seconds": _GIL_SECONDS})
            time.sleep(0.05)
            answer = self._ask_for_memory()
            held = holder.ask({"op": "held"})
            if not held["start"] < answer["end"] - answer["ns"] < answer["end"] < held["end"]:
                raise tem.TemError("the victim did not hold the GIL for all of the handover")
            return float(answer["ns"])

        return self._interleave(
            NO_GIL, self._few, take=take, give=self._give, fill=lambda: self._fill(holder)
        )

    def _reserve(self) -> Readings:
        return interleave(
            {
                "floor": self._floor.create,
                "floor give": self._floor.give,
                "pages": self._pages.create,
                "pages give": self._pages.give,
                "take": self._take,
                "give": self._give,
            },
            self._rounds,
            label=RESERVE,
        )

    def _training(self, trainer: Worker) -> Readings:
        steps = trainer.ask({"op": "steps"})
        start = time.perf_counter()
        self._fill(trainer)
        readings = self._interleave(
            TRAINING, self._few, take=self._take, give=self._give, fill=lambda: self._fill(trainer)
        )
        steps = trainer.ask({"op": "steps"}) - steps
        readings["steps a second"] = [steps / (time.perf_counter() - start)]
        return readings

    def _interleave(self, label: str, rounds: int, **ours: Callable[[], float]) -> Readings:
        cases: dict[str, Callable[[], float]] = {}
        for name, floor in (("floor", self._floor), ("pages", self._pages)):
            cases |= {name: floor.take, f"{name} give": floor.give, f"{name} hold": floor.hold}
        return interleave(cases | ours, rounds, label=label)

    @contextmanager
    def _worker(self, role: str) -> Iterator[Worker]:
        with Worker("handover_worker", role, self._backend) as worker:
            worker.ask({"op": "open", "path": self._broker.path})
            time.sleep(_LOOK_SECONDS)
            yield worker

    def _ask_for_memory(self) -> dict[str, Any]:
        answer: dict[str, Any] = self._taker.ask({"op": "take", "nbytes": self._size})
        return answer

    def _take(self) -> float:
        return float(self._ask_for_memory()["ns"])

    def _give(self) -> float:
        self._taker.ask({"op": "give"})
        return 0.0

    def _fill(self, victim: Worker) -> float:
        """The victim has all again that the taker gave back."""
        for _ in range(_FILLS):
            victim.ask({"op": "fill"})
            with self._broker.control() as control:
                (device,) = control.state().devices
            # Less than an extent may be left over beside those of a fill.
            if device.free < self._size:
                return float(device.free)
            time.sleep(_LOOK_SECONDS)
        raise tem.TemError(f"{tem.format_bytes(device.free)} is free: the victim does not fill the device")


def run(backend: str, size: int, rounds: int, arguments: Sequence[str]) -> Result:
    """Measures everything on one device.

    Raises:
        tem.TemError: the device is missing, or a demand was not met.
        FloorError, WorkerError: a process of the bench failed.
    """
    with Bench(backend, size, rounds) as bench:
        raw = bench.run()
    return Result(
        benchmark="bench_handover",
        command=command_line("bench_handover", arguments),
        machine=machine.facts(gpu_uuid=bench.uuid),
        settings={"backend": backend, "size": size, "rounds": rounds},
        tables=tables(size, raw),
        raw=dict(raw),
    )


@click.command()
@backend_option
@size_option("--size", "Bytes to hand over, in whole 64 MiB. [default: 1GiB; 256MiB on host]")
@click.option("--rounds", type=click.IntRange(2), help="Readings of each case. [default: 200; 20 on host]")
@out_option
def main(backend: str, size: int | None, rounds: int | None, out: Path | None) -> None:
    """Hand memory from process to process through a broker, beside the bare driver."""
    host = backend in ("host", "cpu")
    if size is None:
        size = 256 * MIB if host else 1024 * MIB
    if size <= 0 or size % EXTENT:
        raise click.BadParameter("must be a multiple of 64 MiB", param_hint="--size")
    with errors_as_messages():
        result = run(backend, size, rounds or (20 if host else 200), sys.argv[1:])
    publish(result, out, backend)


if __name__ == "__main__":
    main()
