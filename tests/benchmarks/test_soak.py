"""The soak, short, and what it would notice."""

import ctypes
import random
import signal

import click.testing
import pytest

import torch_elastic_mem as tem
from benchmarks import soak
from benchmarks.broker_process import BrokerProcess
from benchmarks.patterns import HostPattern
from benchmarks.results import load
from benchmarks.soak_crowd import Crowd
from benchmarks.soak_tenant import Piece
from benchmarks.soak_watch import Watch
from tests.broker.tenant import Tenant

MIB = 1 << 20


def run(out, *arguments):
    done = click.testing.CliRunner().invoke(soak.main, [*map(str, arguments), "--json", str(out)])
    assert done.exit_code == 0, done.output
    return load(out).raw


def test_a_soak_of_four_processes(tmp_path):
    found = run(tmp_path / "soak.json", "--seconds", 3, "--processes", 4)
    assert found["wrong"] == [] and found["lost"] == 0
    assert found["kills"] > 0
    assert found["samples"] > 20
    # The device was full, so there was something to go wrong.
    assert found["most_leased"] > found["capacity"] // 2


@pytest.mark.slow
def test_a_soak_in_which_the_broker_dies_too(tmp_path):
    found = run(tmp_path / "soak.json", "--seconds", 15, "--processes", 6, "--kill-broker")
    assert found["wrong"] == [] and found["lost"] == 0
    assert found["kills"] > 0 and found["stops"] > 0 and found["broker_restarts"] > 0


def test_a_byte_that_is_not_as_it_was_written_is_noticed():
    memory = ctypes.create_string_buffer(b"\7" * 4096, 4096)
    pattern, at = HostPattern(), ctypes.addressof(memory)
    assert pattern.found(at, 4096) == 7
    for number in (0, 1, 2048, 4095):
        memory[number] = b"\x08"
        assert pattern.found(at, 4096) is None
        memory[number] = b"\7"
    pattern.fill(at, 4096, 9)
    assert pattern.found(at, 4096) == 9


def test_a_tenant_refuses_memory_that_is_not_its_own():
    class Foreign(HostPattern):
        def found(self, address, nbytes):
            return 77

    with tem.Arena("host", capacity=8 * MIB, broker=None) as arena, arena.account("a") as account:
        piece = Piece(account, Foreign(), 4 * MIB, 0, 5)
        with pytest.raises(AssertionError, match="byte 77"):
            piece.grow(2 * MIB)
        piece._memory.close()


def test_bytes_that_are_still_leased_are_lost(monkeypatch):
    monkeypatch.setattr("benchmarks.soak_watch._GONE_SECONDS", 0.1)
    with BrokerProcess(["--device", "HOST=64MiB", "--reserve", "HOST=0,0"]) as broker:
        watch = Watch(broker)
        with Tenant(broker.paths.tenants) as tenant:
            tenant.get(tenant.open(), 3 * MIB)
            assert watch.lost() == 3 * MIB
            tenant.bye()
        assert watch.lost() == 0


def test_a_tenant_that_ends_of_itself_is_an_error_and_is_replaced(tmp_path):
    with Crowd("host", str(tmp_path / "nobody.sock"), 2, 24 * MIB, random.Random(1)) as crowd:
        first = crowd.members[0].process
        first.terminate()
        first.wait(20)
        crowd.tend()
        assert crowd.errors == [f"tenant 1: ended with code {-signal.SIGTERM}"]
        assert len(crowd.members) == 2
