from benchmarks.lengths import chosen, log_normal, of_requests, rounded
from benchmarks.traces import Request


def test_lengths_are_multiples_of_64_within_bounds():
    assert [rounded(length, 2048) for length in (0, 1, 64, 65, 2047, 9999)] == [64, 64, 64, 128, 2048, 2048]


def test_prompts_of_a_trace_start_over_when_they_run_out():
    requests = [Request(0.0, 100, 1), Request(1.0, 3000, 1)]
    assert of_requests(requests, 3, 2048) == [128, 2048, 128]
    assert chosen(requests, 2, 2048, seed=1) == [128, 2048]


def test_drawn_lengths_repeat_and_vary():
    drawn = log_normal(200, 2048, seed=1)
    assert drawn == log_normal(200, 2048, seed=1) == chosen(None, 200, 2048, seed=1)
    assert drawn != log_normal(200, 2048, seed=2)
    assert len(set(drawn)) > 10
    assert 64 <= min(drawn) < max(drawn) == 2048
