"""`tem run -- vllm serve MODEL`, by HTTP: what its users and its operators see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

import torch

import torch_elastic_mem as tem
from tests.broker.service import Service
from tests.vllm.server import CACHE, MiB, Server

pytestmark = pytest.mark.timeout(600)
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "host"
# On a GPU torch's memory is the account's too.
CAPACITY = "8GiB" if ON_GPU else "128MiB"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with tem.Arena(DEVICE, capacity="8MiB", broker=None) as arena:
        uuid = arena.uuid if ON_GPU else "HOST"
    # The path of a socket is short.
    folder = tmp_path_factory.mktemp("b")
    made = Service(folder, "--device", f"{uuid}={CAPACITY}", "--reserve", f"{uuid}=0,0").start()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ["--enable-sleep-mode"] if ON_GPU else []
    made = Server(tmp_path_factory.mktemp("s"), service, *options, VLLM_SERVER_DEV_MODE="1")
    try:
        yield made.ready()
    finally:
        made.end()


def test_its_operator_sees_one_account_and_what_is_in_its_blocks(server: Server) -> None:
    server.complete(1)
    chat = server.account()
    assert (chat.name, chat.priority) == ("chat", "serving")
    assert chat.held > 0 and chat.blocks is not None and chat.blocks.parked > 0
    assert server.metric("vllm:kv_cache_usage_perc") == 0.0


def test_a_limit_takes_memory_from_the_idle_server_and_it_serves_on(server: Server) -> None:
    first = server.complete(2)
    held = server.account().held
    with server.control() as control:
        control.set_limits("chat", {"max": held - 8 * MiB})
        assert server.comes_down_to(held - 8 * MiB)
        control.set_limits("chat", {"max": None})
    assert server.complete(2) == first


@pytest.mark.skipif(not ON_GPU, reason="the CPU engine has no sleep mode")
def test_asleep_it_gives_up_its_weights_and_cache_and_it_wakes_up_as_it_was(server: Server) -> None:
    first = server.complete(3)
    awake = server.account().held
    server.ask("sleep?level=1", post=True)
    assert b"true" in server.ask("is_sleeping")
    assert server.comes_down_to(awake - 8 * MiB), "torch's buffers and graphs stay"
    server.ask("wake_up", post=True)
    assert server.complete(3) == first


def test_a_neighbour_of_a_higher_class_takes_half_of_its_cache_and_it_serves_on(
    server: Server, service: Service
) -> None:
    first = server.complete(4)
    with (
        tem.Arena(DEVICE, broker=str(service.path)) as arena,
        arena.account("neighbour", tem.PriorityClass("pressing", 10**6)) as account,
        server.control() as control,
    ):
        (free,) = (each.free for each in control.state().devices if each.accounts)
        idle = max(0, server.account().held - CACHE // 4)
        wanted = (free + min(idle, CACHE // 4)) // (2 * MiB) * 2 * MiB
        memory = account.range(wanted)
        memory.grow(wanted, timeout=30)
        assert server.complete(4) == first
        memory.close()
    assert server.complete(4) == first


def test_it_ends_as_a_terminal_ends_it(server: Server) -> None:
    assert server.stop() in (0, -2, 130), server.said()
