"""The TEM_* variables of an engine: read where it is configured, before anything has been started for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch_elastic_mem.activate.settings import Settings
from torch_elastic_mem.broker.launch import connected
from torch_elastic_mem.broker.paths import BROKER
from torch_elastic_mem.errors import BrokerError


def account(environment: Mapping[str, str]) -> Settings:
    """The account that they describe; without a class named it serves.

    Raises:
        InvalidArgument: one of them says what cannot be; the message names it.
    """
    return Settings.read({"TEM_PRIORITY": "serving", **environment})


def check(environment: Mapping[str, str]) -> None:
    """Finds what would stop the worker, which cannot say it as plainly.

    Raises:
        InvalidArgument: a variable says what cannot be.
        BrokerError: no broker answers at the place that was named.
    """
    account(environment)
    named = environment.get(BROKER)
    if named is None or named in ("", "0"):
        return
    found = connected(Path(named))
    if found is None:
        raise BrokerError(
            f"{BROKER}: no broker listens at {named}; start one with `tem serve`, or set {BROKER}=0 for an "
            "engine that has its device to itself"
        )
    found.close()
