import threading

import pytest
import torch

import torch_elastic_mem as tem
from benchmarks.bench_train import Drips, Trainings, request_for
from benchmarks.drip import Drip
from benchmarks.traces import Request
from benchmarks.train_models import SHAPES, make_job
from benchmarks.train_tables import DRIPPED, tables
from benchmarks.worker import WorkerError
from torch_elastic_mem import _C

MIB = 1 << 20


@pytest.fixture
def settings():
    """Torch's settings as they were: a job changes them for its whole process."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.backends.cudnn.deterministic = before[1]
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.usefixtures("settings")
def test_equal_jobs_have_equal_bits_and_learn():
    def losses():
        job = make_job("gpt-tiny", torch.device("cpu"))
        return [job.step(length).item() for length in (64, 128, 64)]

    first = losses()
    assert losses() == first
    assert len(set(first)) == 3


def test_a_turn_has_its_lengths_from_the_trace():
    requests = [Request(0.0, 100, 1), Request(1.0, 3000, 1)]
    turn = request_for("gpt-124m", requests, 8)
    assert turn.lengths == [128, 2048] * 4
    assert turn.warmup == 2
    assert request_for("gpt-1b", None, None).lengths == request_for("gpt-1b", None, None).lengths
    assert len(request_for("gpt-1b", None, None).lengths) == SHAPES["gpt-1b"].steps
    assert set(request_for("resnet-50", None, None).lengths) == {256}


def answer(**changes):
    plain = {
        "uuid": None,
        "per_second": 100.0,
        "step_ms": 10.0,
        "reserved": 100 * MIB,
        "allocated": 90 * MIB,
        "retries": 0,
        "losses": "bits",
        "drip": None,
    }
    return plain | changes


DRIP = {"met": 3, "refused": 1, "latencies_ms": [1.0, 2.0, 3.0], "yields_ms": [0.5, 0.25], "yielded": MIB}


class Fake:
    def __init__(self, answers):
        self.answers = iter(answers)
        self.asked = []

    def ask(self, request):
        self.asked.append(request)
        found = next(self.answers)
        if isinstance(found, Exception):
            raise found
        return found


def test_every_contender_trains_once_a_round_and_ours_once_more_yielding():
    ours = Fake([answer(reserved=7), answer(drip=DRIP), answer(reserved=8), answer(drip=DRIP)])
    workers = {"native": Fake([answer()] * 2), "ours": ours}
    trainings = Trainings(workers, Drips(MIB, 0.5))
    trainings.run([request_for("gpt-tiny", None, None)], 2)
    assert {name: len(turns) for name, turns in trainings.answers["gpt-tiny"].items()} == {
        "native": 2,
        "ours": 2,
        DRIPPED: 2,
    }
    assert [(asked["drip_bytes"], asked["peak"]) for asked in ours.asked] == [
        (0, 0),
        (MIB, 7),
        (0, 0),
        (MIB, 8),
    ]


def test_one_that_fails_is_left_out_of_that_model_alone():
    broken = WorkerError("ours: it broke")
    workers = {"native": Fake([answer()] * 4), "ours": Fake([broken, answer(), answer(drip=DRIP)])}
    trainings = Trainings(workers, Drips(MIB, 0.5))
    trainings.run([request_for("gpt-tiny", None, None), request_for("gpt-1b", None, None)], 1)
    assert set(trainings.answers["gpt-tiny"]) == {"native"}
    assert set(trainings.answers["gpt-1b"]) == {"native", "ours", DRIPPED}
    assert trainings.failures == {"gpt-tiny, ours": "ours: it broke"}


def test_tables_show_targets_missed_and_bits_that_differ():
    answers = {
        "native": [answer(), answer()],
        "expandable": [answer(reserved=50 * MIB), answer(reserved=50 * MIB)],
        "ours": [answer(per_second=98.0, losses="others"), answer(per_second=98.0)],
        DRIPPED: [answer(per_second=97.0, drip=DRIP)] * 2,
    }
    main, dripped, targets = tables({"gpt": answers}, {"gpt": "tokens"}, {"gpt": "a drip"}, ["Failed: x."])
    assert [row[-1] for row in main.rows] == ["repeat", "equal", "DIFFER", "equal"]
    assert main.rows[2][3] == "0.98 (0.98 to 0.98)"
    assert "Failed: x." in main.note
    assert dripped.rows == [
        ["gpt, a drip", "0.99 (0.99 to 0.99)", "6 / 2", "4", "2 MiB", "2.00 / 3.00 ms", "0.50 / 0.50 ms"],
    ]
    assert [row[1:] for row in targets.rows] == [
        ["0.980", "at least 0.99", "NO"],
        ["2.000", "at most 1", "NO"],
        ["0.990", "at least 0.95", "yes"],
        ["4 of 6", "most", "yes"],
    ]


def test_a_drip_takes_from_a_cache_that_is_filled_again_and_returns_it():
    streams = _C.host_stream_create(), _C.host_stream_create()
    with tem.Arena("host", capacity=256 * MIB) as arena, arena.account("training") as training:
        core = training.allocator()
        block = core.allocate(16 * MIB, 0)
        drip = Drip(arena, training, 32 * MIB, 0.01, streams)
        with drip.running(peak=48 * MIB):
            assert arena.capacity == 96 * MIB
            assert training.held >= 48 * MIB, "what it may reserve anyway is no room for a demand"
            threading.Event().wait(0.5)
        assert arena.capacity == 256 * MIB
        figures = drip.figures()
        assert figures.met > 2
        assert len(figures.yields_ms) > 2
        assert len(figures.latencies_ms) == figures.met
        assert figures.yielded >= len(figures.yields_ms) * MIB
        core.free(block)
    for stream in streams:
        _C.host_stream_destroy(stream)
