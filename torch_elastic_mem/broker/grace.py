"""The time in which a new broker grants nothing, so that tenants of one that has died can come back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Grace:
    """Until when, in seconds of the monotonic clock.

    All devices' books share one: even where the driver tells what is used, it does not tell what of a
    configured limit is.
    """

    until: float = 0.0
