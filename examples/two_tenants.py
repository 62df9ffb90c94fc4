"""A burst of requests takes memory from a training loop and gives it back, in one process on any machine.

    python examples/two_tenants.py

Training keeps its state and recomputes what it dropped. `tem demo` is the whole of it, with a real model and
proofs.
"""

from __future__ import annotations

import threading

import torch

import torch_elastic_mem as tem


class Trainer:
    """Steps whose activations yield at the next safe point."""

    def __init__(self, account: tem.Account) -> None:
        self.account = account
        self.steps = 0
        self.stopped = threading.Event()
        self._asked = threading.Event()
        self._yielded = threading.Event()

    def make_room(self, nbytes: int, timeout: float) -> None:
        """On the demander's thread: asks, and waits until this tenant's own thread has stopped."""
        self._yielded.clear()
        self._asked.set()
        self._yielded.wait(timeout)

    def step(self, weights: torch.Tensor) -> bool:
        activations = [weights]
        for _ in range(20):
            if self._asked.is_set():
                return False
            activations.append(torch.tanh(activations[-1] @ weights))
        self.steps += 1
        return True

    def run(self) -> None:
        with self.account.allocations():
            weights = torch.randn(1024, 1024) / 32
            while not self.stopped.is_set():
                try:
                    done = self.step(weights)
                except torch.OutOfMemoryError:
                    done = False
                if done:
                    continue
                # What step() held has gone with its frame; what is idle now goes to whoever asked.
                self.account.trim()
                self._asked.clear()
                self._yielded.set()
                self.account.wait(96 << 20, timeout=1.0)


def main() -> None:
    with (
        tem.Arena("host", capacity="192MiB") as arena,
        arena.account("chat", priority="serving") as chat,
        arena.account("fine-tune", priority="training") as training,
    ):
        trainer = Trainer(training)
        thread = threading.Thread(target=trainer.run)
        reclaimer = training.on_reclaim(trainer.make_room, rung="pause")
        thread.start()
        with tem.ElasticKVTensor(chat, 1024, (2, 16, 4, 256), torch.float32) as kv:
            pool = tem.BlockPool(kv)
            for burst in range(3):
                steps = trainer.steps
                while trainer.steps < steps + 3:
                    training.wait(0, timeout=0.01)
                blocks = pool.allocate(1000)
                print(
                    f"burst {burst}: chat holds {tem.format_bytes(chat.held)}, "
                    f"fine-tune {tem.format_bytes(training.held)} after {trainer.steps} steps"
                )
                pool.free(blocks)
        trainer.stopped.set()
        thread.join()
        reclaimer.remove()
        for record in arena.yields():
            print(
                f"{record.victim} gave {record.demander} {tem.format_bytes(record.given)} by {record.rung} "
                f"in {record.duration_ns / 1e6:.2f} ms"
            )


if __name__ == "__main__":
    main()
