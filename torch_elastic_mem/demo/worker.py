"""A thread whose failure is not lost, and whose progress can be read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Generic, TypeVar

import msgspec
import torch

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


class Worker(threading.Thread, Generic[_Result]):
    """Runs `work` on a thread of its own, with one core's worth of torch threads."""

    def __init__(self, name: str, work: Callable[[], _Result]) -> None:
        super().__init__(name=name)
        self._work = work
        self._result: _Result | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        torch.set_num_threads(1)
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001  raised again where the thread is joined
            self.error = error
        finally:
            # The work closes over tensors of an arena, which must not live as long as this object.
            del self._work

    def result(self) -> _Result:
        """Waits for the end; returns what the work returned, or raises what it raised."""
        self.join()
        if self.error is not None:
            raise self.error
        return self._result  # type: ignore[return-value]


class Progress(msgspec.Struct, frozen=True):
    """How far one piece of work had come."""

    label: str
    done: int
    total: int


class Task:
    """How far one piece of work has come; written by one thread, read by another.

    Args:
        label: What is being done.
        total: Items that there are.
        stop: Ends the work early.
    """

    def __init__(self, label: str, total: int, stop: threading.Event) -> None:
        self.label = label
        self.total = total
        self.stop = stop
        self._items: Sized = ()
        self._dealt_with = 0

    @property
    def done(self) -> int:
        """Items dealt with."""
        return self._dealt_with + len(self._items)

    def progress(self) -> Progress:
        """How far it is now."""
        return Progress(self.label, self.done, self.total)

    def follow(self, items: Sized) -> None:
        """Takes the length of a growing list for the number of items dealt with."""
        self._items = items

    def over(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """Passes items on, counting those that were dealt with, until it is to stop."""
        for item in items:
            if self.stop.is_set():
                return
            yield item
            self._dealt_with += 1
