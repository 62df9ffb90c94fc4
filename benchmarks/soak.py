"""Processes that take and give at random against a full device, and die at random; counts what was lost.

Run as python -m benchmarks.soak --help.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import click
import msgspec

import torch_elastic_mem as tem
from benchmarks import machine
from benchmarks.broker_process import BrokerProcess
from benchmarks.options import backend_option, errors_as_messages, out_option, size_option
from benchmarks.results import Result, Table, command_line
from benchmarks.terminal import progress, publish
from benchmarks.worker import ROOT
from torch_elastic_mem.broker.paths import BROKER
from torch_elastic_mem.broker.state import DeviceState

CLASSES = ("idle", "training", "training", "serving")
LOOK_S = 0.05
ASIDE = 24 << 30  # on a GPU, for the contexts of the processes
SETTLE_S = 30.0


class Process:
    """A tenant's process and what it has said last."""

    def __init__(self, backend: str, broker: str, seed: int) -> None:
        command = [sys.executable, "-m", "benchmarks.soak_tenant", backend, CLASSES[seed % 4], str(seed)]
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {BROKER: broker},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.said: tuple[int, int, int, list[str]] = (0, 0, 0, [])
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said = msgspec.json.decode(line, type=tuple[int, int, int, list[str]])

    def pause(self, seconds: float) -> None:
        self._process.send_signal(signal.SIGSTOP)
        threading.Timer(seconds, self._process.send_signal, [signal.SIGCONT]).start()

    def kill(self) -> None:
        self._process.kill()
        self._ended()

    def finish(self) -> int:
        """Has it close all it has; its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._ended()

    def _ended(self) -> int:
        code = self._process.wait(60)
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return code


class Soak:
    """One run. `wrong` says, in words, what should not have been."""

    def __init__(self, backend: str, uuid: str, broker: BrokerProcess, seed: int) -> None:
        self._backend = backend
        self._uuid = uuid
        self._broker = broker
        self._random = random.Random(seed)
        self._seed = seed
        self._living: list[Process] = []
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def device(self) -> DeviceState:
        with self._broker.control() as control:
            return next(device for device in control.state().devices if device.uuid == self._uuid)

    def start(self, count: int) -> None:
        for _ in range(count):
            self._seed += 1
            self._living.append(Process(self._backend, self._broker.path, self._seed))

    def run(self, seconds: float, kill_every: float) -> None:
        begin = time.monotonic()
        last, next_fault = begin, begin + kill_every
        with progress("soak, seconds", int(seconds)) as advance:
            while (now := time.monotonic()) < begin + seconds:
                self._look()
                if now >= next_fault:
                    self._fault()
                    next_fault = now + kill_every * self._random.uniform(0.5, 1.5)
                if now - last >= 1:
                    advance(int(now - last))
                    last = now
                time.sleep(LOOK_S)

    def _look(self) -> None:
        device = self.device()
        self.counts["looks"] += 1
        if device.leased > device.capacity - device.reserve_low:
            self.wrong.append(f"{device.leased} bytes are leased of {device.capacity}")

    def _fault(self) -> None:
        victim = self._random.randrange(len(self._living))
        if self._random.random() < 0.2:
            self._living[victim].pause(self._random.uniform(0.1, 3.0))
            self.counts["stopped"] += 1
            return
        dead = self._living.pop(victim)
        dead.kill()
        self._add(dead)
        self.counts["killed"] += 1
        self.start(1)

    def _add(self, process: Process) -> None:
        grown, denied, yielded, errors = process.said
        self.counts += Counter(growths=grown, denied=denied, yields=yielded)
        self.wrong += errors

    def finish(self) -> int:
        """Ends all; returns the bytes that are leased though nobody is left."""
        for process in self._living:
            if (code := process.finish()) != 0:
                self.wrong.append(f"a tenant ended with code {code}")
            self._add(process)
        deadline = time.monotonic() + SETTLE_S
        while (lost := self.device().leased) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        if lost:
            self.wrong.append(f"{lost} bytes are lost")
        return lost


@click.command()
@backend_option
@click.option("--seconds", default=600.0, show_default=True, type=click.FloatRange(min=1))
@click.option("--processes", default=16, show_default=True, type=click.IntRange(1))
@size_option("--capacity", "What they share. [default: 512MiB on the host, most of a GPU]")
@click.option("--kill-every", default=2.0, show_default=True, help="Seconds between faults, about.")
@click.option("--seed", default=1, show_default=True)
@out_option
def main(
    backend: str,
    seconds: float,
    processes: int,
    capacity: int | None,
    kill_every: float,
    seed: int,
    out: Path | None,
) -> None:
    """Soaks a device: processes take, give, yield, are stopped and killed at random. Lost bytes must be 0."""
    with errors_as_messages():
        with tem.Arena(backend, capacity="2MiB" if backend == "host" else None, broker=None) as arena:
            uuid = "HOST" if arena.backend == "host" else arena.uuid
            shared = capacity or (512 << 20 if arena.backend == "host" else arena.capacity - ASIDE)
        options = ["--device", f"{uuid}={shared}", "--reserve", f"{uuid}=0,0"]
        with BrokerProcess(options) as broker:
            soak = Soak(backend, uuid, broker, seed)
            soak.start(processes)
            time.sleep(1)
            soak.run(seconds, kill_every)
            lost = soak.finish()
    rows = [
        [what, str(soak.counts[what])]
        for what in ("growths", "denied", "yields", "killed", "stopped", "looks")
    ]
    rows += [["wrong", str(len(soak.wrong))], ["bytes lost", str(lost)]]
    table = Table(
        f"{processes} processes share {tem.format_bytes(shared)} for {seconds:g} s", ["what", "count"], rows
    )
    result = Result(
        "soak",
        command_line("soak", sys.argv[1:]),
        machine.facts(gpu_uuid=None if backend == "host" else uuid),
        {
            "seconds": seconds,
            "processes": processes,
            "capacity": shared,
            "kill_every": kill_every,
            "seed": seed,
        },
        [table],
        {"counts": dict(soak.counts), "wrong": soak.wrong, "lost": lost},
    )
    publish(result, out, backend, soak.wrong[:10])


if __name__ == "__main__":
    main()
