"""How much of the last seconds somebody of a class waited for memory."""

from __future__ import annotations

from collections import deque

WINDOW = 10.0


class Pressure:
    """The waits of one device by class. Times are seconds of the monotonic clock."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[int, float]] = {}
        self._past: dict[str, deque[tuple[float, float]]] = {}

    def begin(self, priority: str, now: float) -> None:
        """A demand of the class begins to wait."""
        count, since = self._waiting.get(priority, (0, now))
        self._waiting[priority] = count + 1, since

    def end(self, priority: str, now: float) -> None:
        """It waits no longer."""
        count, since = self._waiting.pop(priority)
        if count > 1:
            self._waiting[priority] = count - 1, since
        else:
            past = self._past.setdefault(priority, deque(maxlen=4096))
            past.append((since, now))
            while past[0][1] < now - WINDOW:
                past.popleft()

    def parts(self, now: float) -> dict[str, float]:
        """By class, the part of the last 10 s, 0 to 1; classes that did not wait are not named."""
        sums: dict[str, float] = {}
        for priority, past in self._past.items():
            sums[priority] = sum(max(0.0, end - max(start, now - WINDOW)) for start, end in past)
        for priority, (_, since) in self._waiting.items():
            sums[priority] = sums.get(priority, 0.0) + now - max(since, now - WINDOW)
        return {priority: min(1.0, seconds / WINDOW) for priority, seconds in sums.items() if seconds > 0}
