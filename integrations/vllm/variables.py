"""The TEM_* variables of an engine: read where it is configured, before anything has been started for it."""

from __future__ import annotations

from collections.abc import Mapping

from torch_elastic_mem.activate.settings import PRIORITY, Settings
from torch_elastic_mem.broker.launch import connected
from torch_elastic_mem.broker.paths import BROKER, tenants_socket
from torch_elastic_mem.errors import BrokerError


def account(environment: Mapping[str, str]) -> Settings:
    """The account that they describe; without a class named it serves.

    Raises:
        InvalidArgument: one of them says what cannot be; the message names it.
    """
    return Settings.read({**environment, PRIORITY: environment.get(PRIORITY) or "serving"})


def check(environment: Mapping[str, str]) -> None:
    """Finds what would stop the worker, which cannot say it as plainly.

    Raises:
        InvalidArgument: a variable says what cannot be.
        BrokerError: no broker answers at the place that was named.
    """
    account(environment)
    named = tenants_socket(environment)
    if BROKER not in environment or named is None:
        return
    found = connected(named)
    if found is None:
        raise BrokerError(
            f"{BROKER}: no broker listens at {named}; start one with `tem serve`, or set {BROKER}=0 for an "
            "engine that has its device to itself"
        )
    found.close()
