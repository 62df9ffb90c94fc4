"""Over two GPUs, torch computes the same bits on accounts as on its own allocator."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch

from tests.alloc import two_gpus
from tests.programs import end, reports, start
from tests.rungs import Rung

pytestmark = [
    pytest.mark.rungs("cuda"),
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
Lines = dict[str, dict[str, object]]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def programs(*parts: tuple[str, ...]) -> list[Lines]:
    """What these processes say, which run at once."""
    started = [start("-m", "tests.alloc.two_gpus", *part) for part in parts]
    ended = [end(each) for each in started]
    found = [reports(each, "workload") for each in ended]
    for done, lines in zip(ended, found, strict=True):
        assert done.returncode == 0 and lines, done.stderr[-5000:]
    return found


@pytest.fixture(scope="module")
def peers() -> Iterator[dict[str, Lines]]:
    yield {mode: programs(("peers", mode))[0] for mode in ("native", "ours")}


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[str, list[Lines]]]:
    found = {}
    for mode in ("native", "ours"):
        port = free_port()
        found[mode] = programs(*(("rank", mode, str(rank), port) for rank in range(2)))
    yield found


def same(native: Lines, ours: Lines, workload: str) -> None:
    for lines in (native, ours):
        assert not lines[workload].get("failure"), lines[workload]["failure"]
    assert ours[workload]["bits"] == native[workload]["bits"]
    assert not ours["rival"]["failure"]
    assert ours["rival"]["bursts"], "nobody took memory meanwhile"


@pytest.mark.parametrize("workload", [each.__name__ for each in two_gpus.PEERS])
def test_devices_reach_each_others_memory(rung: Rung, peers: dict[str, Lines], workload: str) -> None:
    same(peers["native"], peers["ours"], workload)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("workload", [each.__name__ for each in two_gpus.RANKS])
def test_ranks_talk_by_nccl(rung: Rung, ranks: dict[str, list[Lines]], workload: str, rank: int) -> None:
    same(ranks["native"][rank], ranks["ours"][rank], workload)
