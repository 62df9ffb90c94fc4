"""The training tenant: trains out of an account, gives way when asked, takes up again when there is room."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch_elastic_mem as tem
from torch_elastic_mem.demo.trainer import Trainer

_Result = TypeVar("_Result")
_WAIT_SECONDS = 0.05
_MARGIN = 32  # training takes up again when there is room for it and for this part of the capacity besides


class _GaveWay(Exception):
    """Raised at a safe point to give the running micro-batch up."""


class Appeal:
    """One thread asks another for something, and waits until it has got round to it."""

    def __init__(self) -> None:
        self._answered = threading.Event()
        self._pending = False

    @property
    def pending(self) -> bool:
        return self._pending

    def ask(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds for the answer. One that comes too late is still given."""
        self._answered.clear()
        self._pending = True
        return self._answered.wait(timeout)

    def answer(self) -> None:
        self._pending = False
        self._answered.set()


class TrainingTenant:
    """Runs a trainer on the calling thread, and yields its memory to demands from any other.

    Two rungs: "spill" moves Adam's moments out and training goes on; "pause" gives the running micro-batch
    up, moves the moments out, and stands still until there is room again.

    Args:
        account: What training's memory is charged to.
        build: Makes the trainer, which must call the function it is given between layers.
        micro_batches: Micro-batches of a step.
        peak_bytes: What training will hold at its peak, reckoned; what is seen to be more counts instead.
        capacity: Of the arena, in bytes.
        settle: Seconds for which room must last before training takes up again.
    """

    def __init__(
        self,
        account: tem.Account,
        build: Callable[[Callable[[], None]], Trainer],
        *,
        micro_batches: int,
        peak_bytes: int,
        capacity: int,
        settle: float,
    ) -> None:
        self._account = account
        self._build = build
        self._micro_batches = micro_batches
        self._peak = peak_bytes
        self._margin = capacity // _MARGIN
        self._settle = settle
        self._spill = Appeal()
        self._pause = Appeal()
        self._halt = threading.Event()
        self._cancelled = False
        self._trainer: Trainer | None = None
        self._last_held = 0
        self._gave = False
        self.state = "starting"
        self.losses: list[float] = []
        self.progress = 0.0
        self.abandoned = 0
        self.spilled = 0
        self.let_go = 0
        self.regained = 0

    def run(self) -> None:
        """Trains until `finish` or `cancel`. Nothing of it is left in the account when it returns."""
        handles = [
            self._account.on_reclaim(self._on_spill, rung="spill"),
            self._account.on_reclaim(self._on_pause, rung="pause"),
        ]
        try:
            with self._account.allocations():
                self._train()
        except _GaveWay:
            pass  # cancelled
        finally:
            self.state = "ended"
            self._trainer = None
            for handle in handles:
                handle.remove()
            self._answer()

    def finish(self) -> None:
        """Ends the run after the step it is in."""
        self._halt.set()

    def cancel(self) -> None:
        """Ends the run at the next safe point, in the middle of a step."""
        self._cancelled = True
        self._halt.set()

    def _train(self) -> None:
        self._trainer = trainer = self._insist(lambda: self._build(self._safe_point))
        while not self._halt.is_set():
            loss = 0.0
            for number in range(self._micro_batches):
                loss += self._insist(partial(trainer.micro_batch, number))
                self.progress += 1 / self._micro_batches
            self._insist(trainer.update)
            self.losses.append(loss / self._micro_batches)

    def _insist(self, move: Callable[[], _Result]) -> _Result:
        """Makes a move again, whenever there is room, until it is made."""
        while True:
            self.state = "training"
            try:
                result = move()
                self._watch()
                return result
            except _GaveWay:
                if self._cancelled:
                    raise
            except (RuntimeError, MemoryError) as error:
                if not tem.is_out_of_memory(error):
                    raise
            # Only here, past the except clauses, are the frames that hold the activations gone.
            self._stand_still()

    def _stand_still(self) -> None:
        self.abandoned += 1
        asked = self._pause.pending
        before = self._last_held
        self._move_out()
        if not asked:
            self.let_go += max(0, before - self._last_held)
        self.state = "waiting"
        self._answer()
        needed = max(0, self._peak - self._last_held) + self._margin
        while not self._cancelled:
            # An appeal that crossed with the answer above finds nothing left to give.
            self._answer()
            if not self._account.wait(needed, _WAIT_SECONDS):
                continue
            # Between two requests of a burst there is room for a moment: what lasts is worth a forward pass.
            self._halt.wait(self._settle)
            if self._account.room() >= needed:
                return
        raise _GaveWay

    def _safe_point(self) -> None:
        self._watch()
        if self._pause.pending or self._cancelled:
            raise _GaveWay
        if self._spill.pending:
            self._move_out()
            self._spill.answer()

    def _move_out(self) -> None:
        if self._trainer is not None:
            self.spilled += self._trainer.spill()
        self._account.trim()
        self._gave = True
        self._last_held = self._account.held

    def _watch(self) -> None:
        held = self._account.held
        self._peak = max(self._peak, held)
        if self._gave:
            self.regained += max(0, held - self._last_held)
        self._last_held = held

    def _answer(self) -> None:
        self._spill.answer()
        self._pause.answer()

    def _on_spill(self, nbytes: int, timeout: float) -> int:
        return self._ask(self._spill, timeout)

    def _on_pause(self, nbytes: int, timeout: float) -> int:
        return self._ask(self._pause, timeout)

    def _ask(self, appeal: Appeal, timeout: float) -> int:
        if self.state != "training":
            return 0
        before: int = self._account.held
        appeal.ask(timeout)
        return max(0, before - self._account.held)
