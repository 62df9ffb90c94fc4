from __future__ import annotations

import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import torch_elastic_mem as tem
from torch_elastic_mem.cli import main


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Puts a recorder in the demo's place; returns the calls it got."""
    calls: list[tuple[Any, ...]] = []

    def run_demo(*arguments: Any) -> int:
        calls.append(arguments)
        if arguments[0] == 13:
            raise tem.OutOfMemory("asked 1 GiB, free 2 MiB")
        return 3 if arguments[0] == 7 else 0

    package, module = types.ModuleType("demo"), types.ModuleType("main")
    module.run_demo = run_demo  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_elastic_mem.demo", package)
    monkeypatch.setitem(sys.modules, "torch_elastic_mem.demo.main", module)
    return calls


def test_version_and_help() -> None:
    assert CliRunner().invoke(main, ["--version"]).output == f"tem, version {tem.__version__}\n"
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    assert re.search("demo +Train and serve", shown.output)


def test_help_loads_neither_torch_nor_a_command() -> None:
    code = (
        "import sys\n"
        "from torch_elastic_mem.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'rich', 'torch_elastic_mem.cli.demo', 'torch_elastic_mem._C'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_demo_passes_its_options_on(demo: list[tuple[Any, ...]]) -> None:
    assert CliRunner().invoke(main, ["demo"]).exit_code == 0
    options = "--seconds 4.5 --capacity 256MiB --backend host --json --plain --out somewhere --one-process"
    assert CliRunner().invoke(main, ["demo", *options.split()]).exit_code == 0
    assert demo == [
        (None, None, "auto", False, False, Path("tem-demo"), False),
        (4.5, 256 << 20, "host", True, True, Path("somewhere"), True),
    ]


def test_the_demo_s_verdict_is_the_exit_code(demo: list[tuple[Any, ...]]) -> None:
    assert CliRunner().invoke(main, ["demo", "--seconds", "7"]).exit_code == 3


def test_an_error_of_the_package_is_a_message(demo: list[tuple[Any, ...]]) -> None:
    done = CliRunner().invoke(main, ["demo", "--seconds", "13"])
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", "tem: asked 1 GiB, free 2 MiB\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("demo --seconds 0", "--seconds"),
        ("demo --seconds -1", "--seconds"),
        ("demo --seconds soon", "--seconds"),
        ("demo --capacity lots", "'lots' is not a size"),
        ("demo --backend rocm", "--backend"),
        ("demo --out setup.py", "--out"),
        ("demo extra", "extra"),
        ("demon", "No such command 'demon'"),
    ],
)
def test_bad_input_is_a_usage_error(
    demo: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    done = CliRunner().invoke(main, arguments.split())
    assert done.exit_code == 2
    assert said in done.stderr
    assert demo == []
