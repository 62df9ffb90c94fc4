"""The real engine on the host backend: it serves the same tokens, however it is squeezed meanwhile."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import torch_elastic_mem as tem
from tests.arena.watch import comes_true
from tests.broker.service import Service
from tests.vllm.facts import Apart, facts, read, under_tem_run
from torch_elastic_mem.broker.control import ControlClient

pytest.importorskip("vllm")
pytestmark = pytest.mark.timeout(400)

MiB = 1 << 20
LONG = 120.0


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return facts("plain")


@pytest.fixture(scope="module")
def squeezed() -> dict[str, Any]:
    return facts("squeezed")


def test_a_variable_is_all_it_takes(plain: dict[str, Any], squeezed: dict[str, Any]) -> None:
    assert squeezed["scheduler"] == f"Elastic{plain['scheduler']}"


def test_an_engine_that_is_squeezed_serves_the_same_tokens(
    plain: dict[str, Any], squeezed: dict[str, Any]
) -> None:
    assert squeezed["tokens"] == plain["tokens"]


def test_a_model_of_several_groups_of_layers_serves_the_same_tokens() -> None:
    plain, squeezed = facts("plain", "tiny-windows"), facts("squeezed", "tiny-windows")
    assert squeezed["scheduler"] == f"Elastic{plain['scheduler']}"
    assert all(squeezed["demands"])
    assert squeezed["tokens"] == plain["tokens"]
    assert squeezed["came in the end"] == 16


def test_what_vllm_is_to_keep_free_is_a_part_of_what_has_memory_and_grows_with_it() -> None:
    assert facts("watermarked")["ran at once"] == 8


def test_it_starts_with_memory_for_one_step(squeezed: dict[str, Any]) -> None:
    assert 0 < squeezed["resident at first"] <= 8 * MiB


def test_a_higher_class_gets_what_it_asks_of_a_busy_engine(squeezed: dict[str, Any]) -> None:
    assert len(squeezed["demands"]) > 3 and all(squeezed["demands"])
    assert squeezed["least"] <= 16 * MiB, "a quarter of the cache is left"


def test_warm_prefixes_stay_until_somebody_asks(squeezed: dict[str, Any]) -> None:
    left, chunk = squeezed["kept when somebody asks"]
    assert squeezed["kept when nobody asks"] > chunk
    assert left == chunk


def test_blocks_without_memory_are_not_in_use(squeezed: dict[str, Any]) -> None:
    assert squeezed["usage when idle"] == 0.0
    assert squeezed["in use after aborts"] == 0


def test_the_prefix_cache_can_be_reset_while_blocks_are_parked(squeezed: dict[str, Any]) -> None:
    assert squeezed["reset"] is True


def test_under_a_limit_below_one_request_requests_wait_and_none_fails(squeezed: dict[str, Any]) -> None:
    assert squeezed["over the limit"] == 0
    assert squeezed["came under it"] == 0
    assert squeezed["came in the end"] == 16


@pytest.fixture
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    # The path of a socket is short.
    service = Service(tmp_path_factory.mktemp("b")).start()
    made = Apart(service)
    try:
        yield made
    finally:
        made.end()
        service.close()


def test_an_idle_engine_in_another_process_yields_obeys_and_serves_on(
    plain: dict[str, Any], apart: Apart
) -> None:
    first, _ = apart.fact()
    before = apart.held()
    with (
        tem.Arena("host", capacity=100 * MiB, broker=str(apart.service.path)) as arena,
        arena.account("other", tem.PriorityClass("pressing", 10**6)) as account,
    ):
        memory = account.range(100 * MiB)
        memory.grow(100 * MiB - before + 4 * MiB, timeout=10)
        assert apart.comes_down_to(before - 4 * MiB)
        memory.close()
    with ControlClient(apart.service.directory / "control.sock") as control:
        control.set_limits("vllm", {"max": 8 * MiB})
    assert apart.comes_down_to(8 * MiB), "an idle engine obeys a limit"
    with ControlClient(apart.service.directory / "control.sock") as control:
        control.set_limits("vllm", {"max": 64 * MiB})
    apart.go_on()
    apart.service.stop(9)  # while it serves
    apart.service.start()
    assert [first, apart.fact()] == plain["tokens"]
    _, err = apart.program.communicate(timeout=LONG)
    assert apart.program.returncode == 0, err[-3000:]


def test_under_tem_run_it_is_a_tenant_of_the_machines_broker(
    plain: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEM_BROKER")
    # The path of a socket is short.
    runtime = tmp_path_factory.mktemp("r")
    program = under_tem_run(runtime, "--max", "40MiB")
    try:
        assert program.stdout is not None
        first = read(program.stdout.readline())[1][0]
        with ControlClient(runtime / "control.sock") as control:
            (chat,) = (each for device in control.state().devices for each in device.accounts)
        assert (chat.name, chat.priority) == ("chat", "serving")
        assert 0 < chat.held <= 40 * MiB
        assert chat.blocks is not None, "people see what is in its blocks"
    finally:
        _, err = program.communicate("\n", timeout=LONG)
    assert program.returncode == 0, err[-3000:]
    assert first == plain["tokens"][0]


def test_an_engine_that_is_shut_down_leaves_its_process_and_the_next_engine_all_memory() -> None:
    ended = facts("ended")
    assert ended["held before"] > 0
    assert (ended["held after"], ended["found"]) == (0, False)
    assert ended["tokens"][0] == ended["tokens"][1]


def test_an_engine_that_is_killed_amid_a_yield_leaves_nothing_behind(apart: Apart) -> None:
    apart.fact()
    assert apart.held() > 0
    with (
        tem.Arena("host", capacity=100 * MiB, broker=str(apart.service.path)) as arena,
        arena.account("other", tem.PriorityClass("pressing", 10**6)) as account,
        ControlClient(apart.service.directory / "control.sock") as control,
    ):
        memory = account.range(100 * MiB)
        asks = control.state().asks
        subprocess.run(["pkill", "-STOP", "-P", str(apart.program.pid)], check=True)
        growing = threading.Thread(target=memory.grow, args=(100 * MiB,), kwargs={"timeout": LONG})
        growing.start()
        assert comes_true(lambda: control.state().asks > asks)
        subprocess.run(["pkill", "-KILL", "-P", str(apart.program.pid)], check=True)
        apart.program.kill()
        growing.join()
        assert memory.mapped == 100 * MiB
        memory.close()
    assert apart.comes_down_to(0)


@pytest.mark.slow
def test_two_engines_of_one_name_are_two_tenants(plain: dict[str, Any], apart: Apart) -> None:
    other = Apart(apart.service)
    try:
        for engine in (apart, other):
            assert engine.fact()[0] == plain["tokens"][0]
        with ControlClient(apart.service.directory / "control.sock") as control:
            tenants = [each for device in control.state().devices for each in device.accounts]
        assert [each.name for each in tenants] == ["vllm", "vllm"]
        assert len({each.pid for each in tenants}) == 2
        for engine in (apart, other):
            engine.go_on()
        for engine in (apart, other):
            assert engine.fact() == plain["tokens"][1]
    finally:
        other.end()
