"""Many processes that take and give at random on a full device, and are killed and stopped meanwhile.

Run as python -m benchmarks.soak --help.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

import torch_elastic_mem as tem
from benchmarks import machine
from benchmarks.broker_process import BrokerProcess
from benchmarks.options import backend_option, errors_as_messages, out_option
from benchmarks.results import TARGET_COLUMNS, Result, Table, command_line, target_row
from benchmarks.soak_crowd import Crowd
from benchmarks.soak_watch import Watch
from benchmarks.terminal import live, publish

MIB = 1 << 20
# A tenant's part of the device. It would take OVER times as much.
PART = {"host": 24 * MIB, "cuda": 512 * MIB}
OVER = 4
_BEAT = 0.05
_KILL_EVERY = 1.5
_STOP_EVERY = 2.0
_BROKER_EVERY = 10.0
# Longer than the broker lets a demand wait, so that who stands still becomes a debtor.
_STOPPED = (0.1, 1.5)
# A broker that starts waits so long for its predecessor's tenants: one that stands still would come too late.
_BACK = 2.0


class Soak:
    """One run.

    Args:
        backend: the tenants'.
        seconds: how long they take and give, before they all go.
        processes: how many tenants there are at any time.
        kill_broker: whether the broker dies too, every ten seconds or so.
        seed: of what befalls whom.
    """

    def __init__(self, backend: str, seconds: float, processes: int, kill_broker: bool, seed: int) -> None:
        self._backend = backend
        self._seconds = seconds
        self._processes = processes
        self._kill_broker = kill_broker
        self._chance = random.Random(seed)
        self.restarts = 0
        self.uuid: str | None = None

    def run(self) -> dict[str, Any]:
        """Runs it; what was seen, and what was wrong."""
        kind, device = "host", "HOST"
        if self._backend not in ("host", "cpu"):
            with tem.Arena(self._backend, broker=None) as arena:
                kind, device, self.uuid = "cuda", arena.uuid, arena.uuid
        capacity = PART[kind] * self._processes
        options = ["--device", f"{device}={capacity}", "--reserve", f"{device}=2MiB,4MiB"]
        with (
            BrokerProcess(options) as broker,
            Watch(broker) as watch,
            Crowd(self._backend, broker.path, self._processes, OVER * PART[kind], self._chance) as crowd,
            live() as show,
        ):
            self._storm(broker, watch, crowd, show)
            crowd.end()
            lost = watch.lost()
        reports = crowd.reports
        wrong = [*crowd.errors, *(f"{what}: {text}" for what, text in watch.wrong.items())]
        if lost:
            wrong.append(f"{tem.format_bytes(lost)} were lost: leased when all had gone")
        if "Traceback" in broker.log:
            wrong.append(f"the broker failed: {broker.log[-2000:]}")
        return {
            "tenants": len(reports),
            "kills": crowd.kills,
            "stops": crowd.stops,
            "broker_restarts": self.restarts,
            "steps": sum(report.steps for report in reports),
            "denied": sum(report.denied for report in reports),
            "checked": sum(report.checked for report in reports),
            "given": sum(report.given for report in reports),
            "grants": watch.grants,
            "asks": watch.asks,
            "samples": watch.samples,
            "capacity": capacity,
            "most_leased": watch.most,
            "lost": lost,
            "wrong": wrong,
        }

    def _storm(self, broker: BrokerProcess, watch: Watch, crowd: Crowd, show: Callable[[str], None]) -> None:
        start = time.monotonic()
        kill, stop, fall = self._next(_KILL_EVERY), self._next(_STOP_EVERY), self._next(_BROKER_EVERY)
        calm_until = 0.0
        while (now := time.monotonic()) < start + self._seconds:
            crowd.tend()
            if now >= kill:
                crowd.kill_one()
                kill = self._next(_KILL_EVERY)
            if now >= stop and now >= calm_until:
                crowd.stop_one(self._chance.uniform(*_STOPPED))
                stop = self._next(_STOP_EVERY)
            if self._kill_broker and now >= fall:
                # Nobody is stopped any more; those that stand still go on first.
                calm_until = now + _BACK + _STOPPED[1]
                if not crowd.stopped:
                    self._replace(broker, watch)
                    calm_until, fall = time.monotonic() + _BACK, self._next(_BROKER_EVERY)
            show(self._line(now - start, watch, crowd))
            time.sleep(_BEAT)

    def _next(self, every: float) -> float:
        return time.monotonic() + self._chance.uniform(0.5, 1.5) * every

    def _replace(self, broker: BrokerProcess, watch: Watch) -> None:
        watch.away.set()
        broker.kill()
        broker.restart()
        self.restarts += 1
        watch.away.clear()

    def _line(self, seconds: float, watch: Watch, crowd: Crowd) -> str:
        leased = sum(device.leased for device in watch.last.devices) if watch.last else 0
        steps = sum(report.steps for report in crowd.reports)
        wrong = len(crowd.errors) + len(watch.wrong)
        return (
            f"{seconds:.0f} of {self._seconds:.0f} s: {steps} steps, {tem.format_bytes(leased)} leased, "
            f"{crowd.kills} killed, {crowd.stops} stopped, {self.restarts} brokers, {wrong} wrong"
        )


def tables(found: dict[str, Any]) -> list[Table]:
    """What was done, and what had to hold."""
    sizes = {"checked", "given", "capacity", "most_leased", "lost"}
    rows = [
        [name.replace("_", " "), tem.format_bytes(value) if name in sizes else f"{value:,}"]
        for name, value in found.items()
        if name != "wrong"
    ]
    note = (
        "Tenants: all that lived, those in the place of a killed one too. Denied: growths that found no "
        "memory to be had, as they must at times. Checked: bytes looked at when they came and before "
        "they were given back. Given: by reclaimers. Samples: looks at the broker's leases."
    )
    wrong = found["wrong"]
    met = [
        target_row("errors", str(len(wrong)), "0", not wrong),
        target_row("bytes lost", str(found["lost"]), "0", not found["lost"]),
        target_row(
            "most leased, of the capacity",
            f"{found['most_leased'] / found['capacity']:.1%}",
            "at most 100%",
            found["most_leased"] <= found["capacity"],
        ),
    ]
    return [
        Table("The soak", ["what", "seen"], rows, note),
        Table("Targets", TARGET_COLUMNS, met, "; ".join(wrong)),
    ]


def run(
    backend: str, seconds: float, processes: int, kill_broker: bool, seed: int, arguments: Sequence[str]
) -> Result:
    """Runs a soak.

    Raises:
        tem.TemError, WorkerError: it could not be run; what goes wrong within it is in the result.
    """
    soak = Soak(backend, seconds, processes, kill_broker, seed)
    found = soak.run()
    return Result(
        benchmark="soak",
        command=command_line("soak", arguments),
        machine=machine.facts(gpu_uuid=soak.uuid),
        settings={
            "backend": backend,
            "seconds": seconds,
            "processes": processes,
            "kill_broker": kill_broker,
            "seed": seed,
        },
        tables=tables(found),
        raw=found,
    )


@click.command()
@backend_option
@click.option("--seconds", type=click.FloatRange(1), default=600, show_default=True, help="How long.")
@click.option("--processes", type=click.IntRange(2), default=16, show_default=True, help="Tenants at a time.")
@click.option("--kill-broker", is_flag=True, help="Kill the broker too, every ten seconds or so.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of what befalls whom.")
@out_option
def main(
    backend: str, seconds: float, processes: int, kill_broker: bool, seed: int, out: Path | None
) -> None:
    """Wear processes out on a full device: exits 1 if a byte is lost, foreign, or leased twice."""
    with errors_as_messages():
        result = run(backend, seconds, processes, kill_broker, seed, sys.argv[1:])
    publish(result, out, backend, result.raw["wrong"])


if __name__ == "__main__":
    main()
