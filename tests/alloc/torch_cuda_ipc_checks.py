"""Checks of torch.multiprocessing over accounts' memory: `python -m tests.alloc.torch_cuda_ipc_checks`.

Every process has the allocator installed before anything is received. Prints a line of JSON a check.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.multiprocessing as mp

import torch_elastic_mem as tem
from tests.programs import report

MiB, GiB = 1 << 20, 1 << 30
CHECKS: list[Callable[[], None]] = []


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS.append(function)
    return function


def install(capacity: int = 4 * GiB) -> tem.Arena:
    arena = tem.Arena("cuda", capacity=capacity)
    torch.cuda.memory.change_current_allocator(tem.torch_allocator("cuda", arena.account("training")))
    return arena


class Peer:
    """A child that answers: each request is the name of a function below and its arguments."""

    def __init__(self, installs: bool = True) -> None:
        context = mp.get_context("spawn")
        self.requests, self.answers = context.Queue(), context.Queue()
        self.process = context.Process(target=serve, args=(self.requests, self.answers, installs))
        self.process.start()

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.send(function, *arguments)
        return self.answer()

    def send(self, function: Callable[..., Any], *arguments: Any) -> None:
        # What is sent is pickled by a thread of the queue, which may come late.
        self.requests.put((function.__name__, arguments))

    def answer(self) -> Any:
        kind, value = self.answers.get(timeout=120)
        if kind == "error":
            raise RuntimeError(value)
        return value

    def end(self) -> None:
        self.requests.put(None)
        self.process.join(60)
        assert self.process.exitcode == 0, self.process.exitcode


def serve(requests: Any, answers: Any, installs: bool) -> None:
    _arena = install() if installs else None
    kept: dict[str, Any] = {}
    while True:
        try:
            request = requests.get()
            if request is None:
                break
            name, arguments = request
            answers.put(("value", globals()[name](kept, *arguments)))
            del request, arguments
        except Exception as error:  # noqa: BLE001
            answers.put(("error", f"{type(error).__name__}: {error}"))
    kept.clear()
    gc.collect()
    torch.cuda.synchronize()


@contextmanager
def peer(**options: Any) -> Iterator[Peer]:
    made = Peer(**options)
    try:
        yield made
        made.end()
    finally:
        made.process.kill()


def freed_down_to(before: int) -> bool:
    """Whether torch has let go of what it sent, which it does when next somebody looks."""
    for _ in range(100):
        gc.collect()
        torch.cuda.ipc_collect()
        if torch.cuda.memory_allocated() <= before:
            return True
        time.sleep(0.05)
    return False


# What a peer does.


def add_one(kept: dict[str, Any], tensor: torch.Tensor) -> float:
    tensor.add_(1)
    torch.cuda.synchronize()
    return float(tensor.sum().item())


def keep(kept: dict[str, Any], tensor: Any) -> int:
    kept["tensor"] = tensor
    return torch.cuda.memory_allocated()


def total(kept: dict[str, Any]) -> float:
    held = kept["tensor"]
    return float(sum(each.double().sum().item() for each in (held if isinstance(held, list) else [held])))


def pointers(kept: dict[str, Any]) -> list[int]:
    return [each.data_ptr() for each in kept["tensor"]]


def drop(kept: dict[str, Any]) -> int:
    kept.clear()
    gc.collect()
    return torch.cuda.memory_allocated()


def send_on(kept: dict[str, Any]) -> torch.Tensor:
    import io
    from multiprocessing.reduction import ForkingPickler

    ForkingPickler(io.BytesIO()).dump(kept["tensor"])
    raise AssertionError("torch sends what it received")


def send_clone(kept: dict[str, Any]) -> torch.Tensor:
    kept["clone"] = kept["tensor"].clone()
    torch.cuda.synchronize()
    return kept["clone"]  # type: ignore[no-any-return]


# Checks


@check
def a_tensor_is_modified_by_another_process() -> None:
    with peer() as other:
        for size in (1, 1000, 3 * MiB, 50 * MiB):
            mine = torch.ones(size, device="cuda")
            assert other.ask(add_one, mine) == 2 * size
            assert bool((mine == 2).all()), size
            view = mine[size // 2 :]
            other.ask(add_one, view)
            assert float(view[0].item()) == 3


@check
def a_receiver_keeps_the_memory_and_its_end_frees_it() -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    with peer() as other:
        mine = torch.full((40 * MiB,), 2.0, device="cuda")
        assert other.ask(keep, mine) == 0, "a receiver is charged nothing"
        del mine
        torch.cuda.empty_cache()
        noise = [torch.full((40 * MiB,), 9.0, device="cuda") for _ in range(3)]
        assert other.ask(total) == 80 * MiB
        del noise
        other.ask(drop)
        assert freed_down_to(before)
        reserved = torch.cuda.memory_reserved()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() <= reserved - 160 * MiB


@check
def what_was_received_is_sent_on_as_a_clone() -> None:
    with peer() as first, peer() as second:
        mine = torch.arange(10, device="cuda", dtype=torch.float32)
        first.ask(keep, mine)
        try:
            first.ask(send_on)
        except RuntimeError as error:
            assert "received from another process" in str(error), error
        theirs = first.ask(send_clone)
        assert torch.equal(theirs, mine)
        theirs = theirs.clone()
        assert second.ask(add_one, theirs) == 55
        first.ask(drop)


@check
def a_receiver_waits_for_what_was_submitted_before() -> None:
    with peer() as other:
        other.ask(drop)
        for turn in range(1, 5):
            mine = torch.zeros(MiB, device="cuda")
            torch.cuda._sleep(500_000_000)
            mine.fill_(turn)
            other.ask(keep, mine)
            assert other.ask(total) == turn * MiB


@check
def many_tensors_of_one_extent_are_one_mapping() -> None:
    with peer() as other:
        mine = [torch.full((200,), float(i), device="cuda") for i in range(100)]
        other.ask(keep, mine)
        assert other.ask(total) == 200 * sum(range(100))
        theirs = other.ask(pointers)
        moved = {there - here.data_ptr() for there, here in zip(theirs, mine, strict=True)}
        assert len(moved) <= 3, "an extent is mapped once, and a block at the edge of two another time"
        other.ask(drop)
        for _ in range(50):
            for each in mine:
                other.send(add_one, each)
            for _each in mine:
                other.answer()
        assert all(float(each[0].item()) == i + 50 for i, each in enumerate(mine))


@check
def a_receiver_that_is_killed_harms_nobody() -> None:
    mine = torch.ones(30 * MiB, device="cuda")
    victim = Peer()
    victim.ask(keep, mine)
    assert victim.process.pid
    os.kill(victim.process.pid, signal.SIGKILL)
    victim.process.join()
    with peer() as other:
        assert other.ask(add_one, mine) == 60 * MiB
    assert bool((mine == 2).all())


@check
def a_sender_may_die_after_the_tensor_was_received() -> None:
    other = Peer()
    other.ask(keep, torch.arange(100, device="cuda", dtype=torch.float32))
    theirs = other.ask(send_clone)
    other.process.kill()
    other.process.join()
    assert float(theirs.sum().item()) == 4950
    theirs.fill_(1)
    torch.cuda.synchronize()
    del theirs
    gc.collect()


@check
def a_process_with_torchs_own_allocator_is_told() -> None:
    other = Peer(installs=False)
    mine = torch.ones(10, device="cuda")
    try:
        other.ask(add_one, mine)
    except RuntimeError as error:
        assert "does not know how to handle" in str(error), error
    else:
        raise AssertionError("torch's own allocator opened it")
    theirs = torch.ones(1)
    assert other.ask(add_one, theirs) == 2
    other.process.kill()


def main() -> None:
    _arena = install()
    report(CHECKS, torch.cuda.synchronize)


if __name__ == "__main__":
    main()
