"""Whom a new broker waits for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from torch_elastic_mem.broker.peers import start_tick
from torch_elastic_mem.broker.roster import Roster
from torch_elastic_mem.broker.session import Process


def myself() -> Process:
    return Process(os.getpid(), os.getuid(), start_tick(os.getpid()))


def test_processes_that_live_are_waited_for(tmp_path: Path) -> None:
    Roster(tmp_path / "roster").add(myself())
    assert Roster(tmp_path / "roster").left() == {(os.getpid(), start_tick(os.getpid()))}


def test_those_that_have_left_or_died_are_not(tmp_path: Path) -> None:
    roster = Roster(tmp_path / "roster")
    roster.add(myself())
    roster.discard(myself())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    roster.add(Process(child.pid, os.getuid(), start_tick(child.pid)))
    child.communicate()
    roster.add(Process(os.getpid(), os.getuid(), 1))  # another of that number
    assert roster.left() == set()


def test_a_file_that_is_none_or_garbage_names_nobody(tmp_path: Path) -> None:
    assert Roster(tmp_path / "roster").left() == set()
    (tmp_path / "roster").write_bytes(b"\xff\n1\n1 2 3\nx y\n")
    assert Roster(tmp_path / "roster").left() == set()


def test_a_directory_that_cannot_be_written_to_hurts_nobody(tmp_path: Path) -> None:
    Roster(tmp_path / "missing" / "roster").add(myself())
