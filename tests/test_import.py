"""Importing the package touches no driver, reads no environment, starts no thread, installs no handler."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import torch_elastic_mem as tem

PACKAGE = Path(tem.__file__).parent


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_heavy_is_loaded() -> None:
    run(
        "import sys, torch_elastic_mem\n"
        "heavy = {'torch', 'numpy', 'rich', 'matplotlib', 'msgspec', 'torch_elastic_mem._C'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )


def test_no_environment_is_read() -> None:
    run(
        "import os\n"
        "read = []\n"
        "original = os._Environ.__getitem__\n"
        "os._Environ.__getitem__ = lambda self, key: (read.append(key), original(self, key))[1]\n"
        "assert os.environ.get('HOME') and read == ['HOME'], 'the spy sees nothing'\n"
        "read.clear()\n"
        "import torch_elastic_mem\n"
        "assert not read, read\n"
    )


def test_no_thread_handler_or_driver() -> None:
    run(
        "import os, signal\n"
        "handlers = lambda: {number: signal.getsignal(number) for number in signal.valid_signals()}\n"
        "before = handlers()\n"
        "import torch_elastic_mem\n"
        "assert handlers() == before\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
        "assert 'libcuda' not in open('/proc/self/maps').read()\n"
    )


@pytest.mark.parametrize("name", tem.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(tem, name).__module__.startswith("torch_elastic_mem.")
    assert name in dir(tem)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Aerna'"):
        tem.Aerna  # noqa: B018


def test_no_lazy_name_is_also_a_module() -> None:
    # Loading such a module would bind it to the package in place of what the name stands for.
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert not modules & tem._LAZY.keys()
    run("import torch_elastic_mem.priority, torch_elastic_mem as tem; tem.priority('idle')")
