"""Memory between two processes: whose it may become, and that it is never more than what is free."""

from __future__ import annotations

import os

import pytest

from tests.broker.world import World
from torch_elastic_mem.broker.basket import MOST_DESCRIPTORS, Basket
from torch_elastic_mem.broker.descriptor import Descriptor
from torch_elastic_mem.broker.holder import Holder
from torch_elastic_mem.broker.protocol import Limits, Pass, ProtocolError
from torch_elastic_mem.broker.session import Process, Session

MiB = 1 << 20


def session(uid: int = 1) -> Session:
    return Session(Process(100 + uid, uid, 7), "tests")


def holder(uid: int = 1) -> Holder:
    return World().holder(session(uid))


def some(count: int = 1) -> tuple[Descriptor, ...]:
    return tuple(Descriptor(os.open(os.devnull, os.O_RDONLY)) for _ in range(count))
