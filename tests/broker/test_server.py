"""A broker as a process, over real sockets, with tenants that behave, stop and die."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.broker.actor import STEPS
from tests.broker.service import SOON, MiB, Service, actor, hear
from tests.broker.tenant import LONG, Tenant, ended
from torch_elastic_mem.broker.protocol import (
    FREE_ONLY,
    HOST,
    LAST,
    Close,
    Denied,
    Done,
    Gave,
    Hello,
    Limits,
    Report,
    SetLimits,
    Welcome,
    Withdraw,
)


def test_two_tenants_pass_memory_to_and_fro(service: Service) -> None:
    with service.tenant() as low, service.tenant() as high:
        training, serving = low.open("training", 0), high.open("serving", 100)
        assert low.get(training, 100 * MiB) == 100 * MiB
        number = high.demand(serving, 30 * MiB)
        while not low.asks:
            low.serve(0.05)
        assert low.asks[0][1].demander == f"serving/{os.getpid()}"
        assert high.granted(number) == 30 * MiB
        high.put(serving, 30 * MiB)
        assert low.get(training, 30 * MiB, rung=FREE_ONLY) == 30 * MiB


def test_a_tenant_sets_its_limits_and_closes(service: Service) -> None:
    with service.tenant() as tenant:
        account = tenant.open("a", max=50 * MiB)
        assert isinstance(tenant.ask(SetLimits(account, Limits(0, max=60 * MiB)), Done), Done)
        assert isinstance(tenant.wait(tenant.demand(account, 61 * MiB)), Denied)
        tenant.bye()
    with service.tenant() as again:
        assert again.get(again.open("a"), 100 * MiB) == 100 * MiB


def test_what_crosses_the_closing_of_an_account_ends_no_connection(service: Service) -> None:
    with service.tenant() as tenant, service.tenant() as other:
        account, kept = tenant.open("a"), tenant.open("kept")
        tenant.ask(Close(account), Done)
        tenant.send(Report(account, 0, 0, 0))
        tenant.send(Gave(account, LAST, 0, 0), 77)
        assert tenant.get(kept, MiB) == MiB
        # Of an account that is there it may only be said by whose it is; and nothing comes back of one that
        # is not.
        other.send(Report(kept, 0, 0, 0))
        assert ended(other)
        tenant.send(Gave(account, LAST, MiB, 0), 77)
        assert ended(tenant)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_what_a_killed_process_held_is_granted_again(service: Service, step: str) -> None:
    with service.tenant() as tenant:
        account = tenant.open("survivor", 100)
        if step == "waiting":
            tenant.get(account, 60 * MiB)
        process = actor(service.path, step, 100 * MiB if step != "waiting" else 50 * MiB)
        try:
            if step in ("asked", "half given", "given"):
                hear(process, "granted")
                waiting = tenant.demand(account, 100 * MiB, timeout=60.0)
                hear(process, "there")
                process.kill()
                assert tenant.granted(waiting) == 100 * MiB
            else:
                hear(process, "there")
                process.kill()
                want = 40 * MiB if step == "waiting" else 100 * MiB
                assert tenant.get(account, want, timeout=SOON, rung=4) == want
        finally:
            process.kill()
            process.wait()


def test_a_process_that_comes_back_has_its_account_though_its_last_words_are_not_read_yet(
    service: Service,
) -> None:
    """The broker stood still. The old connection's words come before the new one's, however many they are."""
    with service.tenant() as tenant:
        account = tenant.open("a")
        tenant.get(account, 60 * MiB)
        os.kill(service.pid, signal.SIGSTOP)
        try:
            # Words that the broker itself hears, and that have no answer: one would show it the end.
            for number in range(100):
                tenant.send(Withdraw(), 1000 + number)
            tenant.put(account, 20 * MiB)
            tenant.socket.close()
            again = Tenant(service.path, hello=False)
            hello = again.send(Hello(HOST, "host", HOST, "tenant", 1 << 40, 1))
        finally:
            os.kill(service.pid, signal.SIGCONT)
        with again:
            assert isinstance(again.wait(hello), Welcome)
            back = again.open("a", lease=40 * MiB)
            assert again.get(back, 60 * MiB) == 60 * MiB


def test_what_a_process_said_before_its_end_is_heard_though_it_left_an_answer_unread(
    stopped: Service,
) -> None:
    # So that a process can end while the broker has a message of it in hand.
    stopped.before = (
        "import time; from torch_elastic_mem.broker.server import Server; hear = Server._hear; "
        "Server._hear = lambda *heard: (time.sleep(0.2), hear(*heard)); "
    )
    service = stopped.start()
    with service.tenant() as tenant, service.tenant() as other:
        account = tenant.open("a")
        tenant.get(account, 60 * MiB)
        tenant.send(SetLimits(account, Limits(0)))
        assert select.select([tenant.socket], [], [], LONG)[0], "there is an answer"
        kept = other.open("b")
        tenant.send(Withdraw())
        time.sleep(0.1)
        tenant.bye()
        assert other.get(kept, 100 * MiB, rung=FREE_ONLY) == 100 * MiB


def test_who_cannot_be_asked_any_more_is_heard_out(service: Service) -> None:
    with service.tenant() as low, service.tenant() as high:
        training, serving = low.open("training", 0), high.open("serving", 100)
        low.get(training, 100 * MiB)
        os.kill(service.pid, signal.SIGSTOP)
        try:
            number = high.demand(serving, 100 * MiB, timeout=SOON)
            low.bye()
        finally:
            os.kill(service.pid, signal.SIGCONT)
        assert high.granted(number) == 100 * MiB


def test_who_has_not_read_its_answers_is_heard_out(service: Service) -> None:
    with service.tenant() as deaf, service.tenant() as other:
        account, kept = deaf.open("deaf"), other.open("other")
        deaf.get(account, 60 * MiB)
        # More than its socket takes, and fewer than the broker keeps.
        for _ in range(900):
            deaf.demand(account, 1 << 40)
        other.get(kept, MiB)
        os.kill(service.pid, signal.SIGSTOP)
        try:
            deaf.bye()
        finally:
            os.kill(service.pid, signal.SIGCONT)
        assert other.get(kept, 99 * MiB) == 99 * MiB


def test_an_answer_that_the_kernel_had_no_memory_for_is_sent_later(stopped: Service) -> None:
    stopped.before = """
import errno, socket
send, errors = socket.socket.send, [errno.ENOBUFS, errno.EAGAIN, errno.ENOBUFS, errno.ENOBUFS]
def lacking(self, data):
    if data[2] == 35 and errors:
        raise OSError(errors.pop(), "of a test")
    return send(self, data)
socket.socket.send = lacking
"""
    with stopped.start().tenant() as tenant:
        account = tenant.open("a")
        assert isinstance(tenant.ask(SetLimits(account, Limits(0)), Done), Done)
        assert tenant.get(account, MiB) == MiB


def test_a_stopped_process_is_a_debtor_and_others_are_served(service: Service) -> None:
    process = actor(service.path, "asked", 50 * MiB)
    with service.tenant() as other, service.tenant() as tenant:
        try:
            hear(process, "granted")
            os.kill(process.pid, signal.SIGSTOP)
            lower, account = other.open("other", 50), tenant.open("a", 100)
            other.get(lower, 50 * MiB)
            number = tenant.demand(account, 20 * MiB, timeout=3.0)
            end = time.monotonic() + SOON
            while not other.asks and time.monotonic() < end:
                other.serve(0.1)
            assert tenant.granted(number) == 20 * MiB
            assert other.asks, "the one that still answers gave"
        finally:
            process.kill()
            process.wait()


def test_a_second_broker_says_who_serves(service: Service) -> None:
    second = service.launch(subprocess.PIPE)
    _, error = second.communicate(timeout=LONG)
    assert second.returncode == 2
    assert f"another broker serves in {service.directory}: process {service.pid}" in error
    with service.tenant() as tenant:
        assert tenant.open("a")


def test_a_new_broker_is_told_what_tenants_of_a_killed_one_hold(service: Service) -> None:
    tenant = service.tenant()
    epoch = tenant.welcome.epoch
    tenant.get(tenant.open("a", 0), 70 * MiB)
    service.stop(signal.SIGKILL)
    assert ended(tenant)
    # This process is all that is awaited, and has come with the first connection.
    service.before = "from torch_elastic_mem.broker import daemon; daemon.SAYING = 4.0; "
    service.start()
    early = service.tenant("early")
    account = early.open("early", 0)
    waiting = early.demand(account, 100 * MiB, rung=FREE_ONLY)
    back = service.tenant()
    assert back.welcome.epoch != epoch
    again = back.open("a", 0, lease=70 * MiB)
    assert isinstance(early.wait(waiting), Denied), "in the grace nobody is granted what others hold"
    assert early.get(account, 30 * MiB) == 30 * MiB
    back.put(again, 70 * MiB)


def test_a_broker_that_stopped_without_tenants_needs_no_grace(service: Service) -> None:
    with service.tenant() as tenant:
        tenant.bye()
    time.sleep(0.2)
    assert service.stop() == 0
    assert not service.path.exists()
    assert (service.directory / "roster").read_text() == ""
    service.start()
    with service.tenant() as tenant:
        assert tenant.get(tenant.open("a"), MiB, rung=FREE_ONLY, timeout=0.0) == MiB


def test_a_broker_that_stopped_with_memory_leased_gives_its_tenants_a_grace(service: Service) -> None:
    with service.tenant() as tenant:
        tenant.get(tenant.open("a"), MiB)
    assert service.stop() == 0
    assert (service.directory / "roster").read_text().split()[0] == str(os.getpid())


def test_an_option_that_will_not_do_is_said_and_nothing_is_served(tmp_path: Path) -> None:
    for option, words in (("--device=much", "HOST=4GiB"), ("--device=X=much", "'much' is not a size")):
        launched = Service(tmp_path, option).launch(subprocess.PIPE)
        _, error = launched.communicate(timeout=LONG)
        assert launched.returncode == 2 and words in error


def test_a_new_configuration_is_read_at_sighup_and_a_wrong_one_changes_nothing(service: Service) -> None:
    with service.tenant() as tenant:
        account = tenant.open("a")
        service.config.write_text('[[limits]]\nname = "a"\nmax = "10MiB"\n')
        os.kill(service.pid, signal.SIGHUP)
        _, message = tenant.receive() or (0, None)
        assert message is not None and type(message).__name__ == "Set"
        service.config.write_text("colour = 1\n")
        os.kill(service.pid, signal.SIGHUP)
        assert isinstance(tenant.wait(tenant.demand(account, 11 * MiB)), Denied)
        end = time.monotonic() + SOON
        while not any("unknown key 'colour'" in str(line["message"]) for line in service.lines()):
            assert time.monotonic() < end


def test_a_full_disk_costs_log_lines_and_nothing_else(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.log = Path("/dev/full")
    try:
        service.start()
        with service.tenant() as bad, service.tenant() as good:
            bad.socket.send(b"garbage")
            assert ended(bad)
            assert good.get(good.open("a"), MiB) == MiB
        assert service.stop() == 0
    finally:
        service.close()


def test_a_stale_socket_is_replaced(stopped: Service) -> None:
    stopped.directory.mkdir(mode=0o700)
    left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.bind(str(stopped.path))
    left.close()
    with stopped.start().tenant() as tenant:
        assert tenant.open("a")


def test_a_socket_of_systemd_is_served_and_it_hears_that_the_service_is_ready(
    stopped: Service, tmp_path: Path
) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(tmp_path / "given.sock"))
    listener.listen()
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(LONG)
    # What systemd does between fork and exec: the socket is descriptor 3, and the pid is the service's.
    stopped.before = (
        f"import os; os.dup2({listener.fileno()}, 3); os.environ.update(LISTEN_PID=str(os.getpid()), "
        f"LISTEN_FDS='1', LISTEN_FDNAMES='tenants.socket', NOTIFY_SOCKET='{tmp_path}/notify', "
        f"WATCHDOG_USEC='200000');"
    )
    stopped.descriptors = (listener.fileno(),)
    stopped.start()
    told = {manager.recv(100) for _ in range(3)}
    assert {b"READY=1", b"WATCHDOG=1"} <= told
    with Tenant(tmp_path / "given.sock") as tenant:
        assert tenant.open("a")
    assert stopped.stop() == 0
