"""What tenants can see of the broker's two threads: nothing but the time that it takes."""

from __future__ import annotations

import os
import signal
import time

from tests.broker.service import MiB, Service
from tests.broker.tenant import LONG, Tenant
from torch_elastic_mem.broker.control import ControlClient
from torch_elastic_mem.broker.protocol import Demand, Denied, Done, Grant, Limits, Report, SetLimits, encode
from torch_elastic_mem.broker.state import MachineState


def control(service: Service) -> ControlClient:
    return ControlClient(service.directory / "control.sock")


def state(service: Service) -> MachineState:
    with control(service) as client:
        return client.state()


def test_whoever_looks_sees_every_grant_return_and_report(service: Service) -> None:
    with service.tenant() as tenant:
        account = tenant.open("a")
        for _ in range(300):
            tenant.get(account, 2 * MiB)
            tenant.put(account, MiB)
            tenant.put(account, MiB)
        tenant.get(account, 3 * MiB)
        tenant.send(Report(account, 5, 2 * MiB, MiB))
        tenant.get(account, 4 * MiB)
        seen = state(service)
        (found,) = seen.devices[0].accounts
        assert (seen.grants, found.taken, found.lease) == (302, 607 * MiB, 7 * MiB)
        assert (found.held, found.idle) == (2 * MiB, MiB)
        with control(service) as client:
            events = [event for event in client.events(0) if event.kind == "grant"]
        assert [event.bytes for event in events] == [2 * MiB] * 300 + [3 * MiB, 4 * MiB]
        assert [event.start_ns for event in events] == sorted(event.start_ns for event in events)
        assert events[-1].start_ns <= time.monotonic_ns()


def test_answers_come_in_the_order_of_what_was_asked(service: Service) -> None:
    with service.tenant() as tenant:
        account = tenant.open("a")
        asked = []
        for most in range(50, 100):
            asked.append((tenant.send(SetLimits(account, Limits(0, max=most * MiB))), Done))
            asked.append((tenant.demand(account, MiB), Grant))
            asked.append((tenant.demand(account, 100 * MiB, timeout=0.0), Denied))
            asked.append((tenant.demand(account, MiB), Grant))
            tenant.leases[account] += 2 * MiB
            tenant.put(account, 2 * MiB)
        for number, kind in asked:
            answer = tenant.receive()
            assert answer is not None and (answer[0], type(answer[1])) == (number, kind)


def test_a_grant_does_not_overtake_letters_that_wait_for_room(service: Service) -> None:
    with service.tenant() as tenant:
        account = tenant.open("a")
        numbers = []
        # What cannot be granted, until the answers fill the socket and some wait in the broker.
        for number in range(1000, 1000 + 700):
            tenant.socket.send(encode(number, Demand(account, 0, 1 << 40, 1 << 40, 1)))
            numbers.append(number)
        tenant.socket.send(encode(5000, Demand(account, 0, MiB, MiB, 1)))
        for number in [*numbers, 5000]:
            answer = tenant.receive()
            assert answer is not None and answer[0] == number
        assert tenant.get(account, MiB) == MiB


def test_what_a_process_said_before_its_end_counts(service: Service) -> None:
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            tenant = Tenant(service.path, "child")
            account = tenant.open("child")
            tenant.get(account, 50 * MiB)
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            for _ in range(50):
                tenant.put(account, MiB)
                tenant.send(Report(account, 0, 0, 0))
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    # All of it waits when its end is seen.
    os.kill(service.pid, signal.SIGSTOP)
    os.write(go[1], b"x")
    os.waitpid(child, 0)
    os.kill(service.pid, signal.SIGCONT)
    end = time.monotonic() + LONG
    while not (dead := ends(service)):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert dead == [0]
    for descriptor in (*ready, *go):
        os.close(descriptor)


def ends(service: Service) -> list[int]:
    """What processes held when they were seen dead."""
    with control(service) as client:
        return [event.bytes for event in client.events(0) if event.kind == "dead"]
