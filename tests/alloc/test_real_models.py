"""Whole training runs compute the same bits on an account as on torch's own allocator."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.programs import decorated, end, reports, start
from tests.rungs import Rung

pytestmark = [pytest.mark.rungs("cuda"), pytest.mark.gpu, pytest.mark.timeout(300)]

MODULE = "tests.alloc.real_models"
FILE = Path(__file__).with_name("real_models.py")
MODES = ("native", "ours", "pressed")

Line = dict[str, object]


class Runs:
    """The three programs, which run at once."""

    def __init__(self, folder: Path, workers: ThreadPoolExecutor) -> None:
        self.ended: dict[str, Future[subprocess.CompletedProcess[str]]] = {}
        for mode in MODES:
            # Compiled kernels are shared by none: each process chooses and builds its own.
            cache = str(folder / mode)
            started = start(
                *("-m", MODULE, mode), TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=cache + "-triton"
            )
            self.ended[mode] = workers.submit(end, started)

    def line(self, mode: str, workload: str) -> Line:
        done = self.ended[mode].result()
        line = reports(done, "workload").get(workload)
        assert line, f"{mode} ended with {done.returncode} before {workload}: {done.stderr[-5000:]}"
        if "missing" in line:
            pytest.skip(f"{line['missing']} is not installed")
        assert not line.get("failure"), f"{mode}: {line['failure']}\n{done.stderr[-2000:]}"
        return line


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with ThreadPoolExecutor(len(MODES)) as workers:
        yield Runs(tmp_path_factory.mktemp("compiled"), workers)


def same(runs: Runs, mode: str, workload: str) -> None:
    native, line = runs.line("native", workload), runs.line(mode, workload)
    assert line["losses"] == native["losses"]
    assert line["trained"] == native["trained"]


@pytest.mark.parametrize("workload", decorated(FILE, "workload"))
def test_it_trains_to_the_same_bits(rung: Rung, runs: Runs, workload: str) -> None:
    same(runs, "ours", workload)


@pytest.mark.parametrize("workload", decorated(FILE, "pressed"))
def test_it_trains_to_the_same_bits_while_serving_takes_memory_from_it(
    rung: Rung, runs: Runs, workload: str
) -> None:
    same(runs, "pressed", workload)


def test_serving_did_take_memory(rung: Rung, runs: Runs) -> None:
    line = runs.line("pressed", "rival")
    bursts, refused, yields = (int(str(line[key])) for key in ("bursts", "refused", "yields"))
    assert yields >= 1 and bursts > refused, line


@pytest.mark.parametrize("mode", MODES)
def test_the_programs_end_well(rung: Rung, runs: Runs, mode: str) -> None:
    done = runs.ended[mode].result()
    assert done.returncode == 0, done.stderr[-5000:]
    assert "torch_elastic_mem: " not in done.stderr, done.stderr
