"""The time in which a new broker grants nothing, so that tenants of one that has died can come back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Grace:
    """Until when, in seconds of the monotonic clock. The books of devices that cannot be seen share one."""

    until: float = 0.0
