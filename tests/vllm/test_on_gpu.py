"""The real engine on a GPU: squeezed, moved and put to sleep, it serves the tokens that it serves alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from tests.programs import end
from tests.vllm.compacted_engine import START
from tests.vllm.engine import CACHE
from tests.vllm.facts import facts, read, run_by_tem, under_tem_run
from torch_elastic_mem.broker.control import ControlClient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MOVED = "tests.vllm.compacted_engine"
RUNS = (("plain", ""), ("squeezed", ""), ("sleeping", ""), ("plain", MOVED), ("moving", MOVED))


@pytest.fixture(scope="module")
def told() -> dict[tuple[str, str], Any]:
    """What each run says; they run at once, for most of a run is a start."""
    with ThreadPoolExecutor(len(RUNS)) as threads:
        started = {
            run: threads.submit(facts, run[0], **({"program": run[1]} if run[1] else {})) for run in RUNS
        }
        return {run: each.exception() or each.result() for run, each in started.items()}


def of(told: dict[tuple[str, str], Any], scenario: str, program: str = "") -> dict[str, Any]:
    found = told[scenario, program]
    if isinstance(found, BaseException):
        raise found
    assert isinstance(found, dict)
    return found


def test_an_engine_that_is_squeezed_serves_the_same_tokens(told: dict[tuple[str, str], Any]) -> None:
    plain, squeezed = of(told, "plain"), of(told, "squeezed")
    assert squeezed["scheduler"] == f"Elastic{plain['scheduler']}"
    assert len(squeezed["demands"]) > 3 and all(squeezed["demands"])
    assert squeezed["tokens"] == plain["tokens"]
    assert squeezed["came in the end"] == 16


def test_blocks_of_running_requests_move(told: dict[tuple[str, str], Any]) -> None:
    plain, moving = of(told, "plain", MOVED), of(told, "moving", MOVED)
    assert moving["moved"] and all(moving["met"])
    assert moving["preempted"] == []
    assert moving["tokens"] == plain["tokens"]
    # Here a squeeze lasts for many steps: who ended first may have lost its prefix, and has all of it anew.
    assert max(moving["hits"]) > START and moving["again"] == moving["tokens"][-1][::3]


def test_a_sleeper_holds_nothing_and_wakes_up_as_it_was(told: dict[tuple[str, str], Any]) -> None:
    sleeping = of(told, "sleeping")
    assert sleeping["asleep"] == sleeping["asleep at level 2"][0] == 0
    assert sleeping["addresses stay"] and sleeping["buffers"]
    assert all(each == sleeping["tokens"][0] for each in sleeping["tokens"])


def test_under_tem_run_what_graphs_work_in_sleeps_and_comes_back(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEM_BROKER", raising=False)
    done = end(run_by_tem(tmp_path_factory.mktemp("g"), "sleeping_graphs", "--max", "8GiB"), timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    told_by_it = dict(map(read, done.stdout.splitlines()))
    assert told_by_it["graphs"] > 0 and told_by_it["the next engine's too"] is False
    for level in (1, 2):
        left, given = told_by_it[f"level {level}"]
        assert left == 0 and given > told_by_it["graphs"] + told_by_it["weights"]
    first, *others = told_by_it["tokens"]
    assert all(each == first for each in others)


def test_under_tem_run_its_cache_and_its_torch_are_one_tenant(
    told: dict[tuple[str, str], Any],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TEM_BROKER", raising=False)
    # The path of a socket is short.
    runtime = tmp_path_factory.mktemp("r")
    program = under_tem_run(runtime, "--max", "8GiB")
    try:
        assert program.stdout is not None
        line = program.stdout.readline()
        assert line, program.communicate()[1][-5000:]
        first = read(line)[1][0]
        with ControlClient(runtime / "control.sock") as control:
            tenants = [each for device in control.state().devices for each in device.accounts]
        (chat,) = (each for each in tenants if each.blocks is not None)
        assert (chat.name, chat.priority) == ("chat", "serving")
        here = chat.blocks.in_use + chat.blocks.cached + chat.blocks.free
        cached = here * CACHE // (here + chat.blocks.parked)
        assert chat.held > cached > 0, "weights and activations are in its books too"
    finally:
        out, err = program.communicate("\n", timeout=120)
    assert program.returncode == 0, err[-3000:]
    assert [first, read(out.splitlines()[0])[1]] == of(told, "plain")["tokens"]
