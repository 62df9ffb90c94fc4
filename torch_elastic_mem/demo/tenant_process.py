"""The process of one tenant: `python -m torch_elastic_mem.demo.tenant_process DESCRIPTOR NAME BACKEND`.

It does what the directing process says at the other end of the descriptor, and ends with it. What fails here
goes to the standard error, which that process reads.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

import torch_elastic_mem as tem
from torch_elastic_mem.demo import link as words
from torch_elastic_mem.demo.bursts import schedule
from torch_elastic_mem.demo.device import (
    close_arena,
    equal_bits,
    give_torch,
    measure,
    open_arena,
    open_stage,
    setting_for,
)
from torch_elastic_mem.demo.link import Link
from torch_elastic_mem.demo.pair import Setting
from torch_elastic_mem.demo.serving import LocalServing
from torch_elastic_mem.demo.side import LocalSide
from torch_elastic_mem.demo.stage import Stage
from torch_elastic_mem.demo.training import LocalTraining

_LOOK_SECONDS = 0.05


def main() -> None:
    descriptor, name, backend = sys.argv[1:]
    link = Link(int(descriptor))
    try:
        with equal_bits(backend):
            _live(link, name, backend)
    except (EOFError, ConnectionError):
        pass  # who directs is gone, and nobody is left to tell


def _live(link: Link, name: str, backend: str) -> None:
    try:
        uuid, free = measure(backend)
        link.send(words.Found(uuid, "cpu" if backend == "host" else backend, free))
        opening = link.receive()
        if not isinstance(opening, words.Open):
            return  # cancelled
        setting = setting_for(backend, opening.capacity, free, opening.seconds)
        arena = open_arena(setting, opening.broker)
        stage = open_stage(arena, name, setting)
        give_torch(stage.account)
    except tem.TemError as error:
        sys.exit(str(error))  # says all; where it happened is no riddle
    side = _side(stage, setting)
    try:
        link.send(words.Opened())
        _obey(link, side)
    finally:
        side.cancel()
    stage.close()
    link.send(words.Closed(close_arena(arena)))


def _side(stage: Stage, setting: Setting) -> LocalSide[Any, Any, Any]:
    if stage.account.name == LocalTraining.name:
        return LocalTraining(stage, setting.seconds)
    return LocalServing(stage, schedule(setting.scale, setting.seconds, stage.text))


def _obey(link: Link, side: LocalSide[Any, Any, Any]) -> None:
    """Does as it is told until it is told to close."""
    result = None
    while True:
        if link.waits(_LOOK_SECONDS):
            match link.receive():
                case words.Play():
                    side.play()
                    result = side.outcome
                case words.Prove():
                    side.prove()
                    result = side.proof
                case words.Finish():
                    side.finish()
                case words.Cancel():
                    side.cancel()
                    result = None
                case words.Close():
                    return
        # Before the moment: the last one is then of the end.
        over = result is not None and not side.running
        side.check()
        link.send(words.Look(_raw(side.moment()), side.progress()))
        if over:
            assert result is not None
            link.send(words.Ended(_raw(result())))
            result = None


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


if __name__ == "__main__":
    main()
