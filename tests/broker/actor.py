"""A tenant as a process of its own that goes as far as it is told, says so, and waits to be killed.

python -m tests.broker.actor SOCKET STEP BYTES
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.broker.tenant import Tenant
from torch_elastic_mem.broker.protocol import Ask

STEPS = ("connected", "welcomed", "opened", "granted", "waiting", "asked", "half given", "given", "forked")


def go(path: Path, step: str, bytes: int) -> None:
    tenant = Tenant(path, "actor", hello=step != "connected")
    tenant.answer = None
    if step in ("connected", "welcomed"):
        return keep(tenant)
    account = tenant.open("actor", 0)
    if step == "opened":
        return keep(tenant)
    if step == "waiting":
        tenant.demand(account, bytes, timeout=60.0)
        return keep(tenant)
    tenant.get(account, bytes)
    if step == "granted":
        return keep(tenant)
    if step == "forked" and os.fork() == 0:
        # The child keeps the socket; the parent is who connected.
        signal.alarm(60)
        return keep(tenant, quiet=True)
    if step == "forked":
        return keep(tenant)
    say("granted")
    number, ask = tenant.receive(60.0) or (0, None)
    assert isinstance(ask, Ask)
    if step == "half given":
        tenant.give(number, account, ask.bytes // 2, last=False)
    if step == "given":
        tenant.give(number, account, ask.bytes)
    keep(tenant)


def say(word: str) -> None:
    print(word, flush=True)


def keep(tenant: Tenant, quiet: bool = False) -> None:
    if not quiet:
        say("there")
    while True:
        signal.pause()


if __name__ == "__main__":
    go(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
