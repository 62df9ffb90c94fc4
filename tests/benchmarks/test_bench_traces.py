import itertools

import pytest

from benchmarks.traces import Request, TraceError, bursts, fingerprint, read

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:05.9799600,110,0
"""
MOONCAKE = """{"timestamp": 500, "input_length": 40160, "output_length": 6, "hash_ids": [0, 1]}

{"timestamp": 2000, "input_length": 10, "output_length": 4}
"""


def written(tmp_path, text):
    path = tmp_path / "trace"
    path.write_text(text)
    return path


def test_azure_is_sorted_and_starts_at_zero(tmp_path):
    requests = read(written(tmp_path, AZURE))
    assert [(request.prompt, request.output) for request in requests] == [(4808, 10), (3180, 8), (110, 1)]
    assert [request.arrival for request in requests] == pytest.approx([0.0, 0.052, 2.0], abs=1e-5)


def test_mooncake_counts_in_milliseconds(tmp_path):
    assert read(written(tmp_path, MOONCAKE)) == [Request(0.0, 40160, 6), Request(1.5, 10, 4)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "expected a header"),
        ("", "expected a header"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1\n", "line 2"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 1}\n', "line 2"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path, text, says):
    with pytest.raises(TraceError, match=says):
        read(written(tmp_path, text))


def test_synthetic_requests_repeat_and_come_in_bursts():
    requests = bursts(500, seed=1)
    assert requests == bursts(500, seed=1)
    assert fingerprint(requests) != fingerprint(bursts(500, seed=2))
    assert requests[0].arrival == 0.0
    assert all(1 <= request.prompt <= 7500 and request.output >= 1 for request in requests)
    gaps = sorted(after.arrival - before.arrival for before, after in itertools.pairwise(requests))
    assert gaps[0] >= 0
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    # A Poisson stream's gaps have a coefficient of variation of one.
    assert spread / mean > 1.5
