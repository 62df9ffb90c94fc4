"""The processes of the demo, and what happens when one of them dies."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

import torch_elastic_mem as tem
from torch_elastic_mem.demo.phase import run_elastic
from torch_elastic_mem.demo.remote import Remote
from torch_elastic_mem.demo.sample import History, Sample
from torch_elastic_mem.demo.side import ServingMoment, TrainingMoment, TrainingOutcome
from torch_elastic_mem.demo.two_processes import TwoProcesses


def test_one_that_is_killed_is_told_and_the_others_end() -> None:
    said: list[str] = []

    def show(history: History, sample: Sample) -> None:
        if sample.steps and not said:
            said.append(f"{sample.training} of training")
            os.kill(pair.serving.pid, signal.SIGKILL)

    with (
        pytest.raises(
            tem.TemError, match=r"the process of serving \(\d+\) ended by signal 9; it said:\nnothing"
        ),
        TwoProcesses("host", None, 20.0) as pair,
    ):
        others = [pair.training.pid, pair.broker_pid]
        run_elastic(pair, show)
    assert said
    for pid in others:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_one_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    side = Remote("training", "cuda:63", tmp_path, TrainingMoment(), TrainingOutcome, list[float])
    with pytest.raises(tem.TemError, match=r"ended with exit code 1; it said:\n.*(driver|device)") as told:
        side.found()
    assert re.search(r"the process of training \(\d+\)", str(told.value))
    side.cancel()
    with pytest.raises(tem.TemError, match="exit code 1"):
        side.check()


def test_one_that_is_not_needed_ends_without_a_word(tmp_path: Path) -> None:
    side = Remote("serving", "host", tmp_path, ServingMoment(), TrainingOutcome, list[float])
    assert side.found().uuid == "HOST"
    side.cancel()
    assert (tmp_path / "serving.log").read_text() == ""
