"""Two processes that share memory: this one's heap, and the other, share_peer.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch_elastic_mem as tem
from tests.rungs import MiB, Rung
from torch_elastic_mem import _C

ROOT = Path(__file__).resolve().parent.parent.parent


class Peer:
    """share_peer.py, running."""

    def __init__(self, rung: Rung, **environment: str) -> None:
        library = [] if rung.name == "host" else [str(sys.modules["torch_elastic_mem.arena"].LIBCUDA)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.alloc.share_peer", rung.device, *library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | environment,
        )
        self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        answer = json.loads(self.process.stdout.readline())
        if len(answer) == 2:
            raise getattr(tem, answer[0])(*([answer[1], 0] if "Driver" in answer[0] else [answer[1]]))
        return answer[0]

    def ask(self, *command: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()


class Home:
    def __init__(self, rung: Rung) -> None:
        self.arena = rung.arena(64 * MiB)
        self.account = self.arena.account("training")
        self.heap = _C.Allocator(self.account._core, "training")
