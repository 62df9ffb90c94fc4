"""The examples run as they stand, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("elastic_kv_cache.py", ["memory for 0 B", "blocks moved", "debug mode: "]),
        ("shared_base.py", ["server: shares 10 MiB", "lora: step 20: loss", "the server answers the same"]),
        ("train_with_two_lines.py", ["step 150: loss ", "its account h"]),
        ("two_tenants.py", ["burst 2: chat holds", "fine-tune gave chat"]),
    ],
)
def test_an_example_runs_and_shows_what_it_is_for(name: str, says: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in says), done.stdout


def test_every_example_is_run_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "elastic_kv_cache.py",
        "shared_base.py",
        "train_with_two_lines.py",
        "two_tenants.py",
    }
